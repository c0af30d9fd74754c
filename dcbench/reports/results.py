"""Finished runs as reports see them: their records, their costs, and the names that tell them apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcbench.errors import UserError
from dcbench.facts import validate
from dcbench.protocol import compared
from dcbench.record import Cost, Record, read_cost, read_record
from dcbench.totals import Total, partial

LITTLE_MOTION = 0.1  # a model with a smaller share of the real clips' motion gets a footnote


@dataclass(frozen=True)
class Result:
    """A finished run: its record and what it cost."""

    path: Path
    record: Record
    cost: Cost | None = None

    @property
    def title(self) -> str:
        return str(self.record.plan.model.get("title") or self.record.plan.model["name"])

    @property
    def dataset(self) -> str:
        plan = self.record.plan
        return str(plan.dataset.get("title" if plan.dataset["name"] == "folder" else "name") or plan.dataset["name"])

    @property
    def block(self) -> str:
        return f"{self.record.plan.protocol['name']} v{self.record.plan.protocol['version']}"

    @property
    def compared(self) -> str:
        """What is scored, where it is not the usual: see `Protocol.compared`."""
        return compared(self.record.plan.protocol)

    @property
    def is_bound(self) -> bool:
        """Whether the model gets the reference clip as input."""
        return "reference" in self.record.plan.model.get("conditions_on", ())

    @property
    def hardly_moves(self) -> bool:
        motion = self.record.scores.get("motion")
        of_real = motion.details.get("reference_value") if motion else None
        return bool(motion and motion.value is not None and of_real and motion.value < LITTLE_MOTION * of_real)


def load_results(paths: Sequence[Path]) -> list[Result]:
    """Records of run directories or record.json files, each once, in the order given."""
    runs: dict[Path, Result] = {}
    for path in paths:
        directory = (path if path.is_dir() else path.parent).resolve()
        runs.setdefault(directory, Result(path if path.is_dir() else path.parent, read_record(path), read_cost(path)))
    if not runs:
        raise UserError("no runs were given; expected run directories or record.json files")
    return list(runs.values())


def with_partial(run: Result) -> Result:
    """The run with a score `NAME(partial)` for each total that lacks some of its parts."""
    data = run.record.plan.protocol.get("total", ())
    totals = [validate(total, Total, f"{run.path}, total") for total in data]
    found = {f"{total.name}(partial)": partial(total, totals, run.record.scores) for total in totals}
    scores = run.record.scores | {name: score for name, score in found.items() if score}
    return replace(run, record=run.record.model_copy(update={"scores": scores}))


def name_runs(runs: Sequence[Result]) -> dict[Path, str]:
    """A label for each run: the model's title. If several runs share it, the differing settings are added."""
    names: dict[Path, str] = {}
    for run in runs:
        alike = [
            other for other in runs if (other.title, other.dataset, other.block) == (run.title, run.dataset, run.block)
        ]
        settings = {other.path: _settings(other) for other in alike}
        mine = settings[run.path]
        differing = [key for key in mine if len({repr(s.get(key)) for s in settings.values()}) > 1]
        told_apart = len({tuple(repr(s.get(k)) for k in differing) for s in settings.values()}) == len(alike)
        extra = [f"{key} {mine[key]}" for key in differing] if told_apart else [run.path.name]
        names[run.path] = f"{run.title} ({', '.join(extra)})" if len(alike) > 1 else run.title
    return names


def _settings(run: Result) -> dict[str, Any]:
    plan = run.record.plan
    values = {**plan.model.get("sampling", {}), **plan.model.get("options", {})}
    return {**values, "seed": plan.seed, "clips": run.record.n_planned, "fingerprint": plan.fingerprint[:8]}
