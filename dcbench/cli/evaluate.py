"""run, sample, score, report, list."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcbench.cli.options import (
    Batch,
    Data,
    DatasetName,
    Datasets,
    Device,
    Download,
    DryRun,
    Dtype,
    Limit,
    Manifest,
    MetricNames,
    Model,
    Models,
    Out,
    ProtocolName,
    Roots,
    Seed,
    Settings,
    names,
    run_options,
)
from dcbench.errors import UserError

if TYPE_CHECKING:
    from dcbench.grid import Cell
    from dcbench.planning import Job
    from dcbench.run import Options


def _prepare(
    cell: "Cell",
    protocol: str | None,
    seed: int,
    limit: int | None,
    manifest: Path | None,
    options: "Options",
    write: bool = True,
) -> "Job":
    from dcbench import planning
    from dcbench.catalogue import find_dataset, find_model, with_overrides
    from dcbench.protocol import find_protocol

    model, dataset = with_overrides(find_model(cell.model), list(cell.settings)), find_dataset(cell.dataset)
    chosen = find_protocol(protocol or dataset.protocol)
    problems = planning.missing(model, dataset, cell.data) if options.offline else []
    if problems:
        problems.append("This works right now: dcbench run --model dynamicrafter-tiny --dataset shapes")
        raise UserError("\n\n".join(problems))
    return planning.plan(
        model, dataset, chosen, cell.data, cell.out, seed, limit, manifest, quiet=options.quiet, write=write
    )


def run(
    model: Models,
    dataset: Datasets,
    protocol: ProtocolName = None,
    data: Roots = None,
    out: Out = None,
    limit: Limit = None,
    metrics: MetricNames = None,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: Batch = 1,
    seed: Seed = 123,
    settings: Settings = None,
    manifest: Manifest = None,
    download: Download = False,
    dry_run: DryRun = False,
) -> None:
    """Generate clips with a model, score them, and end in a table. The same command continues a stopped run.

    Several models or datasets make a grid: each model on each dataset, one table at the end.
    """
    from dcbench import grid

    options = run_options(device, dtype, batch_size, download)
    write = not dry_run
    cells = grid.cells(model, dataset, data or [], settings or [], out, manifest)
    jobs = [_prepare(cell, protocol, seed, limit, manifest, options, write) for cell in cells]
    if dry_run:
        for job in jobs:
            _print_plan(job)
        return
    finished, failed = grid.run(jobs, options, names(metrics))
    if finished and _first_rank():
        _report(finished, grid.report_folder(finished, out))
    if failed:
        raise UserError("\n".join(failed))


def _first_rank() -> bool:
    from dcbench.ranks import rank

    return rank() == 0


def sample(
    model: Model,
    dataset: DatasetName,
    protocol: ProtocolName = None,
    data: Data = None,
    out: Out = None,
    limit: Limit = None,
    device: Device = "auto",
    dtype: Dtype = None,
    batch_size: Batch = 1,
    seed: Seed = 123,
    settings: Settings = None,
    manifest: Manifest = None,
    download: Download = False,
) -> None:
    """The first half of `run`: only make the clips."""
    options = run_options(device, dtype, batch_size, download)
    from dcbench import run as runner
    from dcbench.grid import Cell
    from dcbench.ranks import rank

    job = _prepare(Cell(model, dataset, data, tuple(settings or ()), out), protocol, seed, limit, manifest, options)
    runner.sample(job, options)
    if rank() == 0:
        print(f"{len(job.manifest)} clips of {job.model.name} lie in {job.directory.path / 'clips'}")


def score(
    generated: Annotated[Path, typer.Argument(help="A run directory, or any folder of generated videos.")],
    reference: Annotated[Path | None, typer.Option("--reference", help="A folder of real videos.")] = None,
    protocol: Annotated[str, typer.Option("--protocol", help="How both folders are read.")] = "folders",
    data: Data = None,
    out: Out = None,
    metrics: MetricNames = None,
    device: Device = "auto",
    download: Download = False,
) -> None:
    """Score a run again, or a folder of videos against a folder of real ones."""
    options = run_options(device, None, 1, download)
    from dcbench import planning
    from dcbench import run as runner

    if (generated / "plan.json").is_file():
        if reference:
            raise UserError(f"{generated} is a run: its reference clips are those of its plan; leave out --reference")
        job = planning.reopen(generated, data)
        runner.score(job, options, names(metrics))
        _report([generated], job.directory.report)
        return
    if reference is None:
        raise UserError(
            f"{generated} is no run directory (it has no plan.json). To score a folder of videos give --reference "
            f"FOLDER, or compare with a dataset: dcbench run --model {generated} --dataset ucf101"
        )
    from dcbench.folders import score_folders

    directory = score_folders(generated, reference, protocol, options, names(metrics), out)
    _report([directory], directory / "report")


def _print_plan(job: "Job") -> None:
    lost = [entry for entry in job.plan.excluded if entry.rule == "unreadable"]
    short = len(job.plan.excluded) - len(lost)
    first = job.manifest[0]
    print(f"model        {job.model.name}: {job.model.title}")
    print(f"dataset      {job.plan.dataset['name']}, split {job.protocol.split}")
    print(f"protocol     {job.protocol.name} version {job.protocol.version}, fingerprint {job.plan.fingerprint}")
    print(f"clips        {len(job.manifest)} of {job.protocol.num_frames} frames at stride {job.protocol.frame_stride}")
    print(f"left out     {short} too short, {len(lost)} unreadable")
    print(f"first clip   {first.id}: frames {first.frames[0]}-{first.frames[-1]} of {first.video}, '{first.prompt}'")
    print(f"would go to  {job.directory.path}")


def _report(runs: list[Path], to: Path) -> None:
    """Write the report and print its table; one closing line says where things lie."""
    from dcbench.reports import write_report

    text = write_report(runs, to)
    print(text)
    print(f"report: {to}   record: {runs[0] / 'record.json'}")


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or record.json files.")],
    out: Annotated[Path, typer.Option("--out", help="Where tables and figures go.")] = Path("reports/latest"),
    compare: Annotated[bool, typer.Option("--compare", help="Test two runs on one manifest, clip by clip.")] = False,
) -> None:
    """Merge runs into one table (Markdown, LaTeX, CSV, HTML) beside the published numbers.

    Folders of ablation suites get their own table and curves again, in place.
    """
    suites = [path for path in runs if (path / "suite.json").is_file()]
    if suites:
        if len(suites) < len(runs):
            raise UserError("suites and runs in one report: give the folders of suites alone")
        from dcbench.analysis.ablation import rebuild

        for path in suites:
            print(f"{rebuild(path)}\nreport: {path}\n")
        return
    if compare:
        if len(runs) != 2:
            raise UserError(f"--compare takes two runs; {len(runs)} were given")
        from dcbench.analysis import compare as comparing
        from dcbench.record import write_text

        found, adjusted = comparing.compare_runs(runs[0], runs[1], run_options("auto", None, 1, download=False))
        text = comparing.to_markdown(found, adjusted, [path.name for path in runs])
        write_text(out / "compare.md", text)
        write_text(out / "compare.json", comparing.to_json(found, adjusted))
        print(f"{text}\nreport: {out}")
        return
    _report(runs, out)


def list_(
    kind: Annotated[str, typer.Argument(help="models, datasets, metrics or protocols")],
    as_json: Annotated[bool, typer.Option("--json", help="All facts, for programs.")] = False,
) -> None:
    """What dcbench knows: models, datasets, metrics, protocols."""
    from dcbench.catalogue import cards
    from dcbench.errors import near_match
    from dcbench.protocol import protocols

    kinds: dict[str, Any] = {"protocols": protocols}
    kinds |= {name: lambda name=name: cards(name) for name in ("models", "datasets", "metrics")}
    if kind not in kinds:
        raise UserError(f'list "{kind}": expected one of {", ".join(sorted(kinds))}.{near_match(kind, kinds)}')
    found = kinds[kind]()
    if as_json:
        print(json.dumps([card.model_dump(mode="json") for card in found.values()], indent=1, ensure_ascii=False))
        return
    width = max(len(name) for name in found)
    for name, card in found.items():
        mark = " " if getattr(card, "available", True) else "-"
        print(f"{mark} {name:<{width}}  {card.title}: {' '.join(card.summary.split())}")
    if any(not getattr(card, "available", True) for card in found.values()):
        print("\n- = not available here yet; its published numbers stand in reports")
