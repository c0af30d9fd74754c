"""The command line: parse, call, print. Rooms are imported inside commands: `--help` never imports torch."""

import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcbench import cli_analysis, cli_models, cli_tools, cli_weights
from dcbench.errors import UserError

if TYPE_CHECKING:
    from dcbench.run import Job, Options

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Reproducible, explainable evaluation of image-to-video models. Start with: "
    "dcbench run --model zoom --dataset shapes",
)

app.add_typer(cli_tools.data, name="data")
app.add_typer(cli_tools.cache, name="cache")
app.add_typer(cli_tools.doctor, name="doctor")
app.add_typer(cli_weights.weights, name="weights")
app.add_typer(cli_analysis.probe, name="probe")
app.command()(cli_analysis.ablate)
app.command()(cli_models.animate)
app.command()(cli_models.train)

MODEL_HELP = "A name, alias, card.toml, file.py:Class or folder of clips."
Model = Annotated[str, typer.Option("--model", help=MODEL_HELP)]
DatasetName = Annotated[str, typer.Option("--dataset", help="A name, alias or card.toml.")]
Models = Annotated[list[str], typer.Option("--model", help=f"{MODEL_HELP} Several: a grid.")]
Datasets = Annotated[list[str], typer.Option("--dataset", help="A name, alias or card.toml. Several: a grid.")]
Roots = Annotated[
    list[str] | None, typer.Option("--data", help="Where the dataset's files lie; in a grid NAME=DIR for each dataset.")
]
ProtocolName = Annotated[
    str | None, typer.Option("--protocol", help="A name or protocol.toml; default: the dataset's own.")
]
Data = Annotated[Path | None, typer.Option("--data", help="Where the dataset's files lie.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run directory; default: runs/<names>-<hash>.")]
Limit = Annotated[int | None, typer.Option("--limit", help="At most so many clips.")]
MetricNames = Annotated[str | None, typer.Option("--metrics", help="Comma-separated; default: all that are at hand.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Autocast dtype on a GPU: float16 or bfloat16.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Clips made at a time.")]
Seed = Annotated[int, typer.Option("--seed", help="The run's seed; each clip has its own, derived from it.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="Change the model's card: sampling.steps=25.")]
Manifest = Annotated[Path | None, typer.Option("--manifest", help="Replay somebody else's manifest.jsonl.")]
Download = Annotated[
    bool, typer.Option("--download/--offline", help="Fetch missing weights first; otherwise nothing is downloaded.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")]


class _Stopped(BaseException):
    """Ctrl-C, or a polite kill. Not KeyboardInterrupt, which the argument parser would take for itself."""


def _stop(number: int, frame: object) -> None:
    raise _Stopped(number)


def main() -> None:
    """Entry point: errors for the user without a traceback, Ctrl-C without noise."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve decoding and neighbours
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        app()
    except UserError as error:
        print(f"dcbench: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except _Stopped as stopped:
        print("\ndcbench: stopped. The same command continues where it was.", file=sys.stderr)
        raise SystemExit(128 + int(str(stopped))) from None
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _prepare(
    model: str,
    dataset: str,
    protocol: str | None,
    data: Path | None,
    out: Path | None,
    seed: int,
    limit: int | None,
    manifest: Path | None,
    settings: list[str] | None,
    options: "Options",
    write: bool = True,
) -> "Job":
    from dcbench import run as runner
    from dcbench.catalogue import find_dataset, find_model, with_overrides
    from dcbench.protocol import find_protocol

    model_card = with_overrides(find_model(model), settings or [])
    dataset_card = find_dataset(dataset)
    chosen = find_protocol(protocol or dataset_card.protocol)
    problems = runner.missing(model_card, dataset_card, data) if options.offline else []
    if problems:
        problems.append("This works right now: dcbench run --model dynamicrafter-tiny --dataset shapes")
        raise UserError("\n\n".join(problems))
    return runner.plan(
        model_card, dataset_card, chosen, data, out, seed, limit, manifest, quiet=options.quiet, write=write
    )


def _options(device: str, dtype: str | None, batch_size: int, download: bool) -> "Options":
    if not download:
        os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported: it reads this once
    from dcbench.run import Options

    if dtype not in (None, "float16", "bfloat16", "float32"):
        raise UserError(f'--dtype "{dtype}": expected float16, bfloat16 or float32')
    return Options(device, None if dtype == "float32" else dtype, batch_size, offline=not download)


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",") if name.strip()] if text else None


@app.command()
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

    options = _options(device, dtype, batch_size, download)
    write = not dry_run
    cells = grid.cells(model, dataset, data or [], settings or [], out, manifest)
    jobs = [
        _prepare(c.model, c.dataset, protocol, c.data, c.out, seed, limit, manifest, list(c.settings), options, write)
        for c in cells
    ]
    if dry_run:
        for job in jobs:
            _print_plan(job)
        return
    finished, failed = grid.run(jobs, options, _names(metrics))
    if finished and _first_rank():
        _report(finished, grid.report_folder(finished, out))
    if failed:
        raise UserError("\n".join(failed))


def _first_rank() -> bool:
    from dcbench.run import rank

    return rank() == 0


@app.command()
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
    options = _options(device, dtype, batch_size, download)
    job = _prepare(model, dataset, protocol, data, out, seed, limit, manifest, settings, options)
    from dcbench import run as runner

    runner.sample(job, options)
    if runner.rank() == 0:
        print(f"{len(job.manifest)} clips of {job.model.name} lie in {job.directory.path / 'clips'}")


@app.command()
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
    options = _options(device, None, 1, download)
    from dcbench import run as runner

    if (generated / "plan.json").is_file():
        if reference:
            raise UserError(f"{generated} is a run: its reference clips are those of its plan; leave out --reference")
        job = runner.reopen(generated, data)
        runner.score(job, options, _names(metrics))
        _report([generated], job.directory.report)
        return
    if reference is None:
        raise UserError(
            f"{generated} is no run directory (it has no plan.json). To score a folder of videos give --reference "
            f"FOLDER, or compare with a dataset: dcbench run --model {generated} --dataset ucf101"
        )
    from dcbench.folders import score_folders

    directory = score_folders(generated, reference, protocol, options, _names(metrics), out)
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


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or record.json files.")],
    out: Annotated[Path, typer.Option("--out", help="Where tables and figures go.")] = Path("reports/latest"),
    compare: Annotated[bool, typer.Option("--compare", help="Test two runs on one manifest, clip by clip.")] = False,
) -> None:
    """Merge runs into one table (Markdown, LaTeX, CSV, HTML) beside the published numbers."""
    if compare:
        if len(runs) != 2:
            raise UserError(f"--compare takes two runs; {len(runs)} were given")
        from dcbench.analysis import compare as comparing
        from dcbench.record import write_text

        found, adjusted = comparing.compare_runs(runs[0], runs[1], _options("auto", None, 1, download=False))
        text = comparing.to_markdown(found, adjusted, [path.name for path in runs])
        write_text(out / "compare.md", text)
        write_text(out / "compare.json", comparing.to_json(found, adjusted))
        print(f"{text}\nreport: {out}")
        return
    _report(runs, out)


@app.command("list")
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


if __name__ == "__main__":
    main()
