"""Several models on several datasets: which runs they are, one after the other, and one report of all."""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcbench import planning
from dcbench import run as runner
from dcbench.catalogue import find_dataset, find_model
from dcbench.errors import UserError, near_match
from dcbench.record import digest


@dataclass(frozen=True)
class Cell:
    """One run of the grid, as the command line would name it."""

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
    """Every model on every dataset, dataset by dataset.

    `data`: one folder, or NAME=DIR for each dataset. `settings`: key=value for every model, MODEL:key=value for one.
    """
    if manifest and len(datasets) > 1:
        raise UserError("--manifest names the clips of one dataset; give one --dataset with it")
    names = {"model": [find_model(name).name for name in models], "dataset": [find_dataset(n).name for n in datasets]}
    for kind, found in names.items():
        twice = [name for name, count in Counter(found).items() if count > 1]
        if twice:
            raise UserError(f"--{kind} {twice[0]} is given twice; a grid has each {kind} once")
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
    """The folder of each dataset."""
    roots: dict[str, Path | None] = dict.fromkeys(datasets)
    for text in data:
        name, equals, path = text.partition("=")
        if equals and name in roots:
            roots[name] = Path(path)
        elif len(data) > 1 or (len(datasets) > 1 and sum(find_dataset(d).needs_files for d in datasets) > 1):
            raise UserError(
                f"--data {text}: with several datasets give --data NAME=DIR for each, NAME being one of "
                f"{', '.join(datasets)}.{near_match(name, datasets)}"
            )
        else:
            roots = dict.fromkeys(datasets, Path(text))
    return roots


def _settings_of(model: str, models: Sequence[str], settings: Sequence[str]) -> tuple[str, ...]:
    """The settings that concern one model of the grid."""
    mine = []
    for setting in settings:
        key, equals, value = setting.partition("=")
        name, colon, rest = key.rpartition(":")
        if colon and name not in models:
            raise UserError(
                f"--set {setting}: {name!r} is no model of this grid ({', '.join(models)}).{near_match(name, models)}"
            )
        if not colon or name == model:
            mine.append(f"{rest}{equals}{value}")
    return tuple(mine)


def run(
    jobs: Sequence[planning.Job], options: runner.Options, metrics: Sequence[str] | None
) -> tuple[list[Path], list[str]]:
    """Sample and score every job. In a grid, one that fails does not keep the others from running.

    Returns the directories of those that finished, and what was wrong with the others.
    """
    runner.check_metrics(metrics)
    failed: list[str] = []

    def each(jobs: Sequence[planning.Job], what: str, step: Callable[[planning.Job], object]) -> list[planning.Job]:
        done = []
        for number, job in enumerate(jobs, start=1):
            name = f"{job.model.name} on {job.plan.dataset['name']}"
            if len(jobs) > 1 and runner.rank() == 0:
                print(f"[{number}/{len(jobs)}] {what} {name}", file=sys.stderr, flush=True)
            try:
                step(job)
                done.append(job)
            except UserError as error:
                if single:
                    raise
                failed.append(f"{name}: {error}")
        return done

    single = len(jobs) == 1
    # all clips first: the networks of the metrics are not in memory when a model's memory is measured
    sampled = each(jobs, "generating", lambda job: runner.sample(job, options))
    scored = each(sampled, "scoring", lambda job: runner.score(job, options, metrics))
    return [job.directory.path for job in scored], failed


def report_folder(finished: Sequence[Path], out: Path | None) -> Path:
    """Where the report of these runs goes: with the run, or beside the runs of a grid."""
    if len(finished) == 1:
        return finished[0] / "report"
    if out:
        return out / "report"
    return finished[0].parent / f"grid-{digest(sorted(path.name for path in finished), 8)}" / "report"
