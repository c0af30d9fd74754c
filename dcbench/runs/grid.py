"""A grid: runs of several models on several datasets, one after the other, and one report of all."""

import gc
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dcbench.catalogue import find_dataset, find_model
from dcbench.errors import LostRank, UserError, near_match
from dcbench.files import digest
from dcbench.ranks import rank
from dcbench.runs.metrics import choose_metrics
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample
from dcbench.runs.scoring import score


@dataclass(frozen=True)
class Cell:
    """One run of the grid, with the values of its command-line options."""

    model: str
    dataset: str
    data: Path | None
    settings: tuple[str, ...]
    out: Path | None


def cells(
    models: Sequence[str],
    datasets: Sequence[str],
    data: Sequence[str],
    settings: Sequence[str],
    out: Path | None,
    manifest: Path | None,
) -> list[Cell]:
    """The runs of every model on every dataset, one dataset after the other. UserError for options that do not fit.

    `data`: one folder, or NAME=DIR for each dataset. `settings`: key=value for every model, MODEL:key=value for one.
    """
    if manifest and len(datasets) > 1:
        raise UserError("--manifest lists the clips of one dataset; give only one --dataset with it")
    names = {"model": [find_model(name).name for name in models], "dataset": [find_dataset(n).name for n in datasets]}
    for kind, found in names.items():
        twice = [name for name, count in Counter(found).items() if count > 1]
        if twice:
            raise UserError(f"--{kind} {twice[0]} is given twice; give each {kind} once")
    roots = _roots(data, datasets)
    single = len(models) == len(datasets) == 1
    return [
        Cell(
            model,
            dataset,
            roots[dataset],
            _settings_of(model, models, settings),
            out if single or out is None else out / f"{model_name}-{dataset_name}",
        )
        for dataset, dataset_name in zip(datasets, names["dataset"], strict=True)
        for model, model_name in zip(models, names["model"], strict=True)
    ]


def _roots(data: Sequence[str], datasets: Sequence[str]) -> dict[str, Path | None]:
    """The folder of each dataset; None if --data does not give it."""
    roots: dict[str, Path | None] = dict.fromkeys(datasets)
    for text in data:
        name, equals, path = text.partition("=")
        if equals and name in roots:
            roots[name] = Path(path)
        elif len(data) > 1 or (len(datasets) > 1 and sum(find_dataset(d).needs_files for d in datasets) > 1):
            raise UserError(
                f"--data {text}: with several datasets give --data NAME=DIR for each; NAME is one of "
                f"{', '.join(datasets)}.{near_match(name, datasets)}"
            )
        else:
            roots = dict.fromkeys(datasets, Path(text))
    return roots


def _settings_of(model: str, models: Sequence[str], settings: Sequence[str]) -> tuple[str, ...]:
    """The settings for one model of the grid, without the prefix MODEL:."""
    mine = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        name, colon, rest = key.rpartition(":")
        if colon and name not in models:
            raise UserError(
                f"--set {setting}: {name!r} is not in this grid ({', '.join(models)}).{near_match(name, models)}"
            )
        if not colon or name == model:
            mine.append(f"{rest}{equals}{value}")
    return tuple(mine)


def run_all(runs: Sequence[Run], options: Options, metrics: Sequence[str] | None) -> tuple[list[Path], list[str]]:
    """Sample and score every run. If a run of a grid fails, the others continue. A single run raises its UserError.

    Returns the directories of the runs that this process has scored, and an error message for each that failed.
    """
    for run in runs:  # before the first clip is made, so that an unknown name fails early
        choose_metrics(metrics or run.protocol.metrics)
    failed: list[str] = []

    def each(runs: Sequence[Run], what: str, step: Callable[[Run], object]) -> list[Run]:
        done = []
        for number, run in enumerate(runs, start=1):
            name = f"{run.name} on {run.plan.dataset['name']}"
            if len(runs) > 1 and rank() == 0:
                print(f"[{number}/{len(runs)}] {what} {name}", file=sys.stderr, flush=True)
            try:
                step(run)
                done.append(run)
            except LostRank:
                raise
            except Exception as error:  # of a model: out of memory, a mistake in its code
                if single:
                    raise
                kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
                failed.append(f"{name}: {kind}{error}")
                free_memory()
        return done

    single = len(runs) == 1
    # all runs are sampled first: while a model's memory is measured, no network of a metric is in memory
    mine: list[Run] = []  # runs that this process scores

    def make(run: Run) -> None:
        if sample(run, options):
            mine.append(run)
        else:
            print(f"{run.directory.path}: {_left(run)}", file=sys.stderr, flush=True)

    each(runs, "generating", make)
    scored = each(mine, "scoring", lambda run: score(run, options, metrics))
    return [run.directory.path for run in scored], failed


def _left(run: Run) -> str:
    """Why this process does not score a run."""
    missing = len(run.missing())
    if missing:
        return f"{missing} of {len(run.cases)} clips are left for other processes"
    return "all clips are finished, and another process scores them"


def free_memory() -> None:
    """Free what networks that are no longer needed hold, so that the next ones have room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def report_folder(finished: Sequence[Path], out: Path | None) -> Path:
    """The folder of the report: in the directory of a single run, or next to the runs of a grid."""
    if len(finished) == 1:
        return finished[0] / "report"
    if out:
        return out / "report"
    return finished[0].parent / f"grid-{digest(sorted(path.name for path in finished), 8)}" / "report"
