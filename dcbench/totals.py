"""Totals: scores that are weighted means of other scores, as benchmarks print them. Does not import torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import Field, model_validator

from dcbench.facts import Facts
from dcbench.record import Score


class Part(Facts):
    """A part of a total: a score, mapped to (score - low) / (high - low)."""

    score: str  # of a metric, as the record names it, or an earlier total
    low: float = 0.0
    high: float = 1.0
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _range_is_not_empty(self) -> "Part":
        if not self.low < self.high:
            raise ValueError(f"{self.score}: low is {self.low:g} and high is {self.high:g}; low must be less")
        return self


class Total(Facts):
    """A score that is the weighted mean of its parts."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    parts: tuple[Part, ...] = Field(min_length=1)
    higher_is_better: bool = True


@dataclass(frozen=True)
class Sum:
    """A total as a sum over the scores of metrics: constant + factor * score + ..."""

    constant: float
    factors: Mapping[str, float]  # by the name of the score

    def value(self, values: Mapping[str, float]) -> float:
        return math.fsum([self.constant, *(factor * values[name] for name, factor in self.factors.items())])


def expand(total: Total, totals: Sequence[Total], known: Mapping[str, Score] | None = None) -> Sum | None:
    """The total as a sum over metrics, through the totals among its parts.

    `known`: only parts with a value count, so the weights of the others share out what is left. None: no part has one.
    """
    by_name = {other.name: other for other in totals}
    found: list[tuple[Part, Sum]] = []
    for part in total.parts:
        if part.score in by_name:
            inner = expand(by_name[part.score], totals, known)
        else:
            counts = known is None or value_of(known, part.score) is not None
            inner = Sum(0.0, {part.score: 1.0}) if counts else None
        found += [(part, inner)] if inner else []
    if not found:
        return None
    whole = math.fsum(part.weight for part, _ in found)
    constant, factors = [], dict[str, float]()
    for part, inner in found:
        share = part.weight / whole / (part.high - part.low)
        constant.append(share * (inner.constant - part.low))
        for name, factor in inner.factors.items():
            factors[name] = factors.get(name, 0.0) + share * factor
    return Sum(math.fsum(constant), factors)


def value_of(scores: Mapping[str, Score], name: str) -> float | None:
    return scores[name].value if name in scores else None


def lacking(of: Sum, scores: Mapping[str, Score]) -> list[str]:
    """The scores that a total needs and that have no value. Those that were scored have reasons of their own."""
    known = {name: " (not scored)" if name not in scores else " (no value)" for name in of.factors}
    return [f"{name}{why}" for name, why in known.items() if value_of(scores, name) is None]


def partial(total: Total, totals: Sequence[Total], scores: Mapping[str, Score]) -> Score | None:
    """The total of the parts that have a value; its `reason` names the others. None: no part, or every part, has one.

    It has no direction and no interval, so that it is never compared with a whole one.
    """
    whole, part = expand(total, totals), expand(total, totals, scores)
    assert whole is not None
    missing = lacking(whole, scores)
    if part is None or not missing:
        return None
    values = {name: value for name in part.factors if (value := value_of(scores, name)) is not None}
    left = f"it lacks {len(missing)} of {len(whole.factors)} parts: {', '.join(missing)}"
    return Score(
        value=part.value(values),
        reason=f"Partial, no official number: {left}. The weights of the other parts share out what is left.",
        ci_method="none: a part of a total",
        fingerprint=scores[next(iter(values))].fingerprint,
        details={"factors": dict(part.factors), "missing": missing},
    )
