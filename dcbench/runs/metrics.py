"""The metrics of a run: chosen by name, built, named in its record, and built again from a record."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcbench.catalogue import CODE_OPTIONS, MetricCard, cards, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.files import cache_dir, digest, read_json
from dcbench.metrics.base import Metric
from dcbench.models.base import Runtime
from dcbench.record import Score


@dataclass
class Metrics:
    """The metrics of a run, by the name of their score. `missing`: those that cannot be built, with the reason."""

    built: dict[str, Metric] = field(default_factory=dict)
    missing: dict[str, tuple[MetricCard, str]] = field(default_factory=dict)


def choose_metrics(names: Sequence[str] | None) -> list[MetricCard]:
    """The metric cards of a run: the default ones, or `names`, each a name, a pattern such as judge_*, or card.toml."""
    known = [card for card in cards("metrics").values() if isinstance(card, MetricCard)]
    if not names:
        return [card for card in known if card.default]
    chosen: dict[str, MetricCard] = {}
    for name in names:
        matching = [card for card in known if "*" in name and fnmatch.fnmatch(card.name, name)]
        for card in matching or [find_metric(name)]:
            if chosen.setdefault(score_name(card), card) != card:
                raise UserError(f"two metrics are called {score_name(card)}; give one of the cards another name")
    return list(chosen.values())


def score_name(card: MetricCard) -> str:
    """The name of a metric's score: the card's name, and its differences from this machine's card of that name."""
    known = cards("metrics").get(card.name)
    if known is None:
        return card.name
    differing = {key: value for key, value in card.options.items() if known.options.get(key) != value}
    if known.entry_point != card.entry_point:
        differing["entry_point"] = card.entry_point
    shown = []
    for key, value in differing.items():
        is_path = isinstance(value, str) and Path(value).is_absolute()
        shown.append(f"{key}={Path(value).name if is_path else value}")
    return f"{card.name}({', '.join(shown)})" if shown else card.name


def build_metrics(chosen: Sequence[MetricCard], runtime: Runtime, explicit: bool) -> Metrics:
    """Build every metric. If one cannot be built, `missing` has the reason; with `explicit`, UserError is raised."""
    metrics = Metrics()
    for card in chosen:
        try:
            metric = load_entry_point(card)(card, runtime)
        except UserError as error:
            reason = str(error).replace("weights fetch NAME", f"weights fetch {card.name}")
            if explicit:
                raise type(error)(reason) from error
            metrics.missing[score_name(card)] = card, reason
            continue
        if not isinstance(metric, Metric):
            raise UserError(
                f"{card.name}: {card.entry_point} made {type(metric).__name__}, which is no metric; expected a "
                "SetMetric or a ClipMetric of dcbench.metrics (CONTRIBUTING.md, 'Add a metric')"
            )
        metrics.built[score_name(card)] = metric
    return metrics


def card_file(score: Score) -> Path:
    """The file that stores, on this machine, the path of your own card that a score was made with."""
    return cache_dir() / "metrics" / f"{digest([score.metric, score.extractor], 32)}.json"


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and ("/" in value or "\\" in value or bool(Path(value).suffix))


def metric_of(name: str, score: Score, runtime: Runtime, given: MetricCard | None = None) -> Metric:
    """Build the metric of a score again. UserError if this is not possible, or would give other numbers.

    A record is data, so code that it names is not run. Only these cards are used: those of this machine, and files that
    were given on a command line, now (`given`) or before.
    """
    card = given or cards("metrics").get(str(score.metric.get("name", name)))
    if given is None and card_file(score).is_file():
        card = find_metric(read_json(card_file(score))["card"])
    elif given is None and card is not None:
        named = [value for value in score.metric.get("options", {}).values() if _is_path(value)]
        if any(value not in card.options.values() for value in named):
            raise UserError(
                f"it was scored with the file {named[0]!r}; give the card that names it: --metrics CARD.toml"
            )
        recorded = {k: v for k, v in score.metric.get("options", {}).items() if k not in CODE_OPTIONS}
        card = card.model_copy(update={"options": {**card.options, **recorded}})
    if card is None:
        raise UserError("it was scored with a card that this machine does not have; give it: --metrics CARD.toml")
    metric: Metric = load_entry_point(card)(card, runtime)
    if score.metric and metric.identity != score.metric:
        raise UserError("its card or its code has changed; score both runs again")
    if metric.extractor.identity != score.extractor:
        raise UserError("its extractor has other weights or preprocessing on this machine; score both runs again")
    return metric
