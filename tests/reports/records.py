"""Runs without clips, for tests of tables."""

import math
from pathlib import Path
from typing import Any

from dcbench.catalogue import ModelCard, Published
from dcbench.record import Plan, Record, Replicates, Score
from dcbench.reports.notations import to_markdown
from dcbench.reports.results import Result
from dcbench.reports.tables import layout, numbers

EXTRACTOR = {"name": "i3d", "weights_sha256": "ab" * 32, "preprocessing": "squash"}
DIRECTIONS = {"fvd": False, "kvd": False, "pic": True, "motion": None}


def without_blocks(value: float, spread: float, design: str = "d") -> Replicates:
    """The value without each of eight blocks; two scores of one spread differ by exactly the same in each."""
    wobble = [math.sin(5 * k * (1 + value)) for k in range(8)]
    return Replicates(design=design, strata=[[(8.0, value + spread * w) for w in wobble]])


def score(value: float | None, metric: str = "fvd", spread: float = 0.001, **changes: Any) -> Score:
    """`spread`: of the replicates, as a share of the value. The default tells any two values apart."""
    given: dict[str, Any] = {
        "n_reference": 2048,
        "n_generated": 2048,
        "extractor": EXTRACTOR,
        "fingerprint": "f00d",
        "higher_is_better": DIRECTIONS[metric],
        "n_groups": 2048,
        "replicates": None if value is None else without_blocks(value, spread * max(value, 1)),
        **changes,
    }
    return Score(value=value, **given)


def run(
    title: str,
    scores: dict[str, Score],
    dataset: str = "ucf101",
    protocol: str = "dynamicrafter-paper",
    fingerprint: str = "f00d",
    path: str = "",
    **more: Any,
) -> Result:
    model = {"name": "m", "title": title, "conditions_on": ["image"], **more.pop("model", {})}
    plan = Plan(
        dcbench="0",
        model=model,
        dataset={"name": dataset},
        protocol={"name": protocol, "version": 1},
        seed=more.pop("seed", 123),
        limit=None,
        fingerprint=fingerprint,
        excluded=more.pop("excluded", []),
        versions={},
    )
    cost = more.pop("cost", None)
    record = Record(plan=plan, scores=scores, n_planned=2048, n_scored=2048, clips_sha256="", **more)
    return Result(Path(path or f"runs/{title}"), record, cost)


def published(title: str = "Theirs", tag: str = "dynamicrafter-paper", value: float = 429.23, **more: Any) -> ModelCard:
    entry = Published(dataset="ucf101", metric="fvd", value=value, protocol=tag, source="arXiv 1 Table 1", **more)
    return ModelCard(name="theirs", title=title, summary="s", published=(entry,))


def markdown(runs: list[Result], cards: dict[str, ModelCard] | None = None) -> str:
    return to_markdown(layout(runs, numbers(runs, cards or {})))
