"""The totals of a run: their values, and intervals that know that their parts are means over different clips."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.files import digest
from dcbench.metrics.base import score_arranged
from dcbench.metrics.design import Design, codes
from dcbench.record import Case, Score
from dcbench.totals import Sum, Total, expand, lacking

SLACK = 1e-9  # relative: a score is the mean of the values in per_clip.jsonl, or it is not
Rows = Mapping[str, Mapping[str, Any]]


def total_scores(
    totals: Sequence[Total], scores: Mapping[str, Score], rows: Rows, cases: Sequence[Case], fingerprint: str
) -> dict[str, Score]:
    """A score for each total. `rows`: the lines of per_clip.jsonl, by clip id.

    A total without all its parts has no value, and its reason names them. If no part was scored, there is no total.
    """
    made = {}
    for total in totals:
        whole = expand(total, totals)
        assert whole is not None
        if not whole.factors.keys() & scores.keys():
            continue
        if missing := lacking(whole, scores):
            reason = f"It lacks {len(missing)} of {len(whole.factors)} parts: {', '.join(missing)}."
            score = Score(value=None, reason=f"{reason} `dcbench report --partial` shows the total of the others")
        else:
            score = _score(whole, scores, rows, cases)
        made[total.name] = score.model_copy(
            update={
                "higher_is_better": total.higher_is_better,
                "metric": _identity(total, totals, whole, scores),
                "fingerprint": fingerprint,
            }
        )
    return made


def _identity(total: Total, totals: Sequence[Total], whole: Sum, scores: Mapping[str, Score]) -> dict[str, Any]:
    """Equal for totals that are made in one way, of metrics with equal identities: only these are comparable."""
    parts = {name: [scores[name].metric, scores[name].extractor] for name in whole.factors if name in scores}
    options = {"parts": dict(whole.factors), "constant": whole.constant, "scored": digest(parts)}
    return {"name": total.name, "version": "1", "options": options}


def _score(whole: Sum, scores: Mapping[str, Score], rows: Rows, cases: Sequence[Case]) -> Score:
    names = list(whole.factors)
    values = {name: float(scores[name].value or 0.0) for name in names}
    counted = [case for case in cases if any(_value(rows, case, name) is not None for name in names)]
    table = torch.tensor(
        [[math.nan if (v := _value(rows, case, name)) is None else v for name in names] for case in counted],
        dtype=torch.float64,
    ).reshape(len(counted), len(names))
    details = {name: {"value": values[name], "factor": whole.factors[name]} for name in names}
    score = Score(value=whole.value(values), n_generated=len(counted), details={"parts": details})
    if other := [name for name, column in zip(names, table.T, strict=True) if not _is_mean(column, values[name])]:
        return score.model_copy(update={"ci_method": f"none: {other[0]} is no mean over the values of clips"})

    def statistic(real: Tensor, generated: Tensor, design: Design) -> float:
        means = {name: _mean(column) for name, column in zip(names, generated.T, strict=True)}
        return whole.value(means)

    groups = [case.cluster for case in counted]
    found = score_arranged(statistic, table[:0], table, Design(codes([]), codes(groups)))
    return found.model_copy(update={"value": score.value, "details": found.details | score.details})


def _value(rows: Rows, case: Case, name: str) -> float | None:
    observed = rows.get(case.id, {}).get(name)
    value = observed.get("value") if isinstance(observed, Mapping) else None
    return None if value is None else float(value)


def _mean(column: Tensor) -> float:
    """Of the clips of a part alone. UserError if none is left."""
    kept = column[~column.isnan()].tolist()
    if not kept:
        raise UserError("no clip of a part is left")
    return math.fsum(kept) / len(kept)


def _is_mean(column: Tensor, value: float) -> bool:
    return bool((~column.isnan()).any()) and math.isclose(_mean(column), value, rel_tol=SLACK, abs_tol=SLACK)
