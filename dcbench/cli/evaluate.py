"""The commands run, sample, score, report and list."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcbench.cli.options import (
    Address,
    Batch,
    Calibrate,
    Data,
    DatasetName,
    Datasets,
    Device,
    Download,
    DryRun,
    Dtype,
    Engine,
    GpusPerWorker,
    Join,
    Limit,
    Manifest,
    MetricNames,
    Model,
    Models,
    Out,
    ProtocolName,
    Roots,
    Samples,
    Seed,
    Settings,
    Shard,
    Workers,
    names,
    on_ray,
    run_options,
)
from dcbench.errors import UserError
from dcbench.escape import plain, screen, shown

if TYPE_CHECKING:
    from dcbench.reports import Choices
    from dcbench.runs.grid import Cell
    from dcbench.runs.run import Options, Run


LATEST = Path("reports/latest")


def _prepare(
    cell: "Cell",
    protocol: str | None,
    seed: int,
    limit: int | None,
    manifest: Path | None,
    options: "Options",
    write: bool = True,
    samples: int | None = None,
) -> "Run":
    from dcbench.catalogue import find_model, with_overrides
    from dcbench.runs.planning import plan_named

    how = {"data": cell.data, "out": cell.out, "seed": seed, "limit": limit, "manifest": manifest, "write": write}
    model = with_overrides(find_model(cell.model), list(cell.settings))
    return plan_named(model, cell.dataset, protocol, samples, options, **how)


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
    samples: Samples = None,
    settings: Settings = None,
    manifest: Manifest = None,
    download: Download = False,
    shard: Shard = None,
    join: Join = False,
    engine: Engine = None,
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
    dry_run: DryRun = False,
    calibrate: Calibrate = None,
) -> None:
    """Generate clips with a model, score them, and print a table. The same command continues a stopped run.

    Several models or datasets make a grid: each model runs on each dataset, with one table at the end.
    """
    from dcbench.runs import grid

    ray = on_ray(engine, address, workers, gpus_per_worker)
    options = run_options(device, dtype, batch_size, download, shard, join, ray)
    if calibrate and not dry_run:
        raise UserError("--calibrate belongs to --dry-run: give both, or leave it out")
    if calibrate and engine:
        raise UserError("--calibrate measures this machine; leave out --engine")
    cells = grid.cells(model, dataset, data or [], settings or [], out, manifest)
    write = not dry_run or calibrate is not None  # what is made to measure is the beginning of the run
    planned = [_prepare(cell, protocol, seed, limit, manifest, options, write, samples) for cell in cells]
    if dry_run:
        _print_plans(planned, options, names(metrics), calibrate or 0)
        return
    finished, failed = grid.run_all(planned, options, names(metrics))
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
    samples: Samples = None,
    settings: Settings = None,
    manifest: Manifest = None,
    download: Download = False,
    shard: Shard = None,
    join: Join = False,
    engine: Engine = None,
    address: Address = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = None,
) -> None:
    """Only generate the clips: the first half of `run`."""
    ray = on_ray(engine, address, workers, gpus_per_worker)
    options = run_options(device, dtype, batch_size, download, shard, join, ray)
    from dcbench.ranks import rank
    from dcbench.runs.grid import Cell
    from dcbench.runs.sampling import sample as sample_run

    cell = Cell(model, dataset, data, tuple(settings or ()), out)
    run = _prepare(cell, protocol, seed, limit, manifest, options, samples=samples)
    sample_run(run, options)
    if rank() == 0:
        made = len(run.directory.finished_samples())
        print(f"{made} of {len(run.cases)} clips of {run.name} are in {run.directory.path / 'clips'}")


def score(
    generated: Annotated[Path, typer.Argument(help="A run directory, or any folder of generated videos.")],
    reference: Annotated[Path | None, typer.Option("--reference", help="A folder of real videos.")] = None,
    protocol: Annotated[str, typer.Option("--protocol", help="How both folders are read.")] = "folders",
    groups: Annotated[
        Path | None,
        typer.Option("--groups", help="CSV (file, group): source video or input image of each video of both folders."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="For a run: the card.toml of a dataset that is not installed here.")
    ] = None,
    data: Data = None,
    out: Out = None,
    limit: Annotated[int | None, typer.Option("--limit", help="Folders: at most so many videos of each.")] = None,
    fps: Annotated[
        float | None, typer.Option("--fps", help="Folders: read both at this frame rate, by time; else frame by frame.")
    ] = None,
    metrics: MetricNames = None,
    device: Device = "auto",
    download: Download = False,
) -> None:
    """Score a run again, or a folder of videos against a folder of real ones."""
    options = run_options(device, None, 1, download)
    from dcbench.catalogue import find_dataset
    from dcbench.runs import planning
    from dcbench.runs.scoring import score as score_run

    if (generated / "plan.json").is_file():
        if reference:
            raise UserError(f"{generated} is a run, and its plan names the reference clips; leave out --reference")
        if groups:
            raise UserError(f"{generated} is a run, and its manifest names the groups; leave out --groups")
        if limit is not None or fps is not None:
            raise UserError(f"{generated} is a run, and its manifest names the frames; leave out --limit and --fps")
        run = planning.reopen(generated, data, find_dataset(dataset) if dataset else None)
        score_run(run, options, names(metrics))
        if _first_rank():
            _report([generated], run.directory.report)
        return
    if reference is None:
        raise UserError(
            f"{generated} is not a run directory (it has no plan.json). For a folder of videos, give --reference "
            f"FOLDER, or compare with a dataset: dcbench run --model {generated} --dataset ucf101"
        )
    from dcbench.runs.folders import score_folders

    directory = score_folders(generated, reference, protocol, options, names(metrics), out, groups, limit, fps)
    if _first_rank():
        _report([directory], directory / "report")


def status(
    run: Annotated[Path, typer.Argument(help="A run directory.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Show it again every 10 seconds until all clips are there.")
    ] = False,
    missing: Annotated[bool, typer.Option("--missing", help="Only the ids of the missing clips, one a line.")] = False,
) -> None:
    """Show how far a run is: finished and missing clips, the processes that make them, the time left."""
    import time

    from dcbench.runs.status import lines
    from dcbench.runs.status import status as find

    found = find(run)
    if missing:
        for clip_id in found.missing:
            print(plain(clip_id))
        return
    print(screen("\n".join(lines(found))))
    while watch and found.missing:
        time.sleep(10)
        found = find(run)
        print(screen("\n" + "\n".join(lines(found))), flush=True)


def _print_plans(runs: Sequence["Run"], options: "Options", metrics: Sequence[str] | None, calibrate: int) -> None:
    """Print the plan of each run and what it will cost."""
    from dcbench import machine
    from dcbench.progress import duration
    from dcbench.runs.estimate import estimate, lines

    device = machine.hardware(options.runtime().device)
    found = []
    for run in runs:
        _print_plan(run)
        found.append(estimate(run, options, metrics, calibrate))
        print(screen("\n".join(lines(found[-1], device))))
    if len(runs) > 1:
        known = [one.seconds for one in found if one.seconds is not None]
        whole = f"{duration(sum(known))} on {device}" if len(known) == len(found) else "time not known: --calibrate 2"
        print(f"in all       {sum(one.missing for one in found)} clips to make, {whole}")


def _print_plan(run: "Run") -> None:
    short, cut, lost = ([e.id for e in run.plan.excluded if e.rule == rule] for rule in ("short", "cut", "unreadable"))
    first = run.cases[0]
    print(f"model        {run.name}: {plain(run.plan.model['title'])}")
    print(f"dataset      {run.plan.dataset['name']}, split {run.protocol.split}")
    print(f"protocol     {run.protocol.name} version {run.protocol.version}, fingerprint {run.plan.fingerprint}")
    print(f"clips        {len(run.cases)} of {run.protocol.num_frames} frames at stride {run.protocol.frame_stride}")
    if run.protocol.compared:
        print(f"compared     {run.protocol.compared}")
    if run.protocol.metrics:
        print(f"metrics      {', '.join(run.protocol.metrics)}")
    print(f"left out     {len(short)} too short, {len(lost)} unreadable")
    if run.protocol.cuts == "drop":
        print(plain(f"             {len(cut)} with a cut inside{': ' if cut else ''}{', '.join(cut)}"))
    where = plain(f"{first.id}: frames {first.frames[0]}-{first.frames[-1]} of {first.video}, '{first.prompt}'")
    print(f"first clip   {where}")
    print(f"would go to  {run.directory.path}")


def _report(runs: list[Path], to: Path, choices: "Choices | None" = None) -> None:
    """Write the report. Print its table and the paths of report and record."""
    from dcbench.reports import write_report

    text = write_report(runs, to, choices)
    print(shown(text))
    print(f"report: {to}   record: {runs[0] / 'record.json'}")


def report(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="Run directories, or record.json files; with --discrepancies, models.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for tables and figures; default: reports/latest.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Test two runs of one manifest, clip by clip.")] = False,
    metrics: Annotated[
        str | None,
        typer.Option("--metrics", help="Only these metrics: names, patterns such as judge_*, or your own card.toml."),
    ] = None,
    published: Annotated[
        str | None,
        typer.Option(
            "--published", help="none, same-protocol or all; default: all, in table.tex those of the same protocol."
        ),
    ] = None,
    notes: Annotated[
        str | None, typer.Option("--notes", help="Footnotes: short or full; default: full, in table.tex short.")
    ] = None,
    clips: Annotated[
        int | None, typer.Option("--clips", min=1, help="Clips of each fingerprint on the page; default: 12.")
    ] = None,
    clips_by: Annotated[
        str | None,
        typer.Option("--clips-by", help="A metric: show its worst and best clips. Default: evenly over the manifest."),
    ] = None,
    discrepancies: Annotated[
        bool,
        typer.Option("--discrepancies", help="Published numbers of one model, data set and metric that differ."),
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Also totals that lack parts, such as VBench's; marked as partial.")
    ] = False,
    vbench: Annotated[
        Path | None,
        typer.Option("--vbench", help="Only write VBench-I2V's result files and zip for its leaderboard here."),
    ] = None,
) -> None:
    """Merge runs into one table (Markdown, LaTeX, CSV, HTML) with the published numbers.

    For folders of ablation suites, their table and curves are written again, in place. With --discrepancies no run is
    needed: the numbers are those of papers, from the cards of the given models, or of all.
    """
    runs = runs or []
    of_tables = {"--published": published, "--notes": notes, "--clips": clips, "--clips-by": clips_by}
    of_runs = of_tables | {"--metrics": metrics, "--compare": compare or None}
    if discrepancies:
        _refuse(of_runs | {"--partial": partial or None, "--vbench": vbench}, "--discrepancies")
        _report_discrepancies([str(name) for name in runs], out)
    elif not runs:
        raise UserError("give run directories or record.json files: dcbench report runs/a runs/b")
    elif vbench:
        _refuse(of_runs | {"--out": out}, "--vbench")
        _write_vbench(runs, vbench, partial)
    elif any((path / "suite.json").is_file() for path in runs):
        _refuse(of_runs | {"--partial": partial or None}, "folders of suites")
        _report_suites(runs)
    elif compare:
        _refuse(of_tables | {"--partial": partial or None}, "--compare")
        _report_comparison(runs, out or LATEST, names(metrics) or ())
    else:
        from dcbench.reports import Choices

        choices = Choices(names(metrics) or (), published, notes, clips or Choices.clips, clips_by, partial)
        _report(runs, out or LATEST, choices)


def _report_discrepancies(models: Sequence[str], out: Path | None) -> None:
    from dcbench.reports.discrepancies import write_discrepancies

    print(shown(write_discrepancies(models, out)))
    if out:
        print(f"report: {out}")


def _write_vbench(runs: Sequence[Path], out: Path, partial: bool) -> None:
    """Write VBench's files of each run. UserError if two runs would write the same ones."""
    from dcbench.record import read_record
    from dcbench.reports.vbench import write_results

    models = [str(read_record(path).plan.model["name"]) for path in runs]
    if twice := next((name for name in models if models.count(name) > 1), None):
        raise UserError(f"two of the runs are of {twice}, and its files have its name; give each a folder of its own")
    for path in runs:
        print(shown(write_results(path, out, partial)))


def _report_suites(paths: Sequence[Path]) -> None:
    """Write the tables and curves of suites again, in place."""
    if not all((path / "suite.json").is_file() for path in paths):
        raise UserError("a report cannot mix suites and runs; give only the folders of suites")
    from dcbench.analysis.ablation import rebuild

    for path in paths:
        print(f"{rebuild(path)}\nreport: {path}\n")


def _report_comparison(runs: Sequence[Path], out: Path, metrics: Sequence[str]) -> None:
    if len(runs) != 2:
        raise UserError(f"--compare takes two runs; {len(runs)} were given")
    from dcbench.analysis.compare import compare_runs, to_json, to_markdown
    from dcbench.files import write_text

    compared = compare_runs(runs[0], runs[1], run_options("auto", None, 1, download=False), metrics)
    text = to_markdown(compared, [path.name for path in runs])
    write_text(out / "compare.md", text)
    write_text(out / "compare.json", to_json(compared))
    print(f"{shown(text)}\nreport: {out}")


def _refuse(options: Mapping[str, Any], what: str) -> None:
    """Raise UserError for options that would change nothing."""
    if given := [name for name, value in options.items() if value is not None]:
        raise UserError(f"{', '.join(given)} cannot be used with {what}; leave it out")


def list_(
    kind: Annotated[str | None, typer.Argument(help="models, datasets, metrics or protocols; default: all")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All fields, for programs.")] = False,
) -> None:
    """List the known models, datasets, metrics and protocols, with their aliases."""
    from dcbench.catalogue import cards
    from dcbench.errors import near_match
    from dcbench.protocol import protocols

    kinds: dict[str, Any] = {name: lambda name=name: cards(name) for name in ("models", "datasets", "metrics")}
    kinds["protocols"] = protocols
    if kind is not None and kind not in kinds:
        raise UserError(f'list "{kind}": expected one of {", ".join(sorted(kinds))}.{near_match(kind, kinds)}')
    found = {name: read() for name, read in kinds.items() if kind in (None, name)}
    if as_json:
        dumped = {name: [card.model_dump(mode="json") for card in those.values()] for name, those in found.items()}
        print(json.dumps(dumped[kind] if kind else dumped, indent=1, ensure_ascii=False))
        return
    for name, those in found.items():
        if kind is None:
            print(f"{name}")
        for line in _lines(those):
            print(line)
        if kind is None:
            print()
    if any(not getattr(card, "available", True) for those in found.values() for card in those.values()):
        print(f"{'' if kind is None else chr(10)}- = not available yet; reports show its published numbers")


def _lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A line a card: its mark, name, title, summary, aliases."""
    width = max(len(name) for name in found)
    for name, card in found.items():
        mark = " " if getattr(card, "available", True) else "-"
        aliases = f" (also: {', '.join(card.aliases)})" if getattr(card, "aliases", ()) else ""
        compared = f" [{card.compared}]" if getattr(card, "compared", "") else ""
        yield plain(f"{mark} {name:<{width}}  {card.title}: {' '.join(card.summary.split())}{aliases}{compared}")
