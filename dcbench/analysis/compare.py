"""`dcbench report --compare A B`: two runs on the same clips, metric by metric: difference, interval, p value."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcbench import planning, run, scoring
from dcbench.analysis.statistics import Comparison, compare_paired, compare_sets, holm
from dcbench.catalogue import MetricCard, find_metric
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.distances import kernel_of
from dcbench.record import Record, read_jsonl, read_manifest, read_record
from dcbench.reports.tables import show_value


def compare_runs(first: Path, second: Path, options: run.Options) -> tuple[dict[str, Comparison], dict[str, float]]:
    """(comparison, Holm-adjusted p) by metric, for every metric that both records hold a value of.

    Features come from the cache, or are extracted again; nothing is generated.
    """
    records = [read_record(path) for path in (first, second)]
    _check_same_clips(records, (first, second))
    shared = [
        find_metric(name)
        for name in records[0].scores
        if all(name in r.scores and r.scores[name].value is not None for r in records)
    ]
    if not shared:
        raise UserError(f"{first} and {second} have no metric in common; score both with the same --metrics")
    failed = {failure.id for record in records for failure in record.failures}
    found: dict[str, Comparison] = {}
    sets = [card for card in shared if card.name in ("fvd", "kvd")]
    if sets:
        found |= _compare_sets(sets, (first, second), failed, options)
    rows = [{row["id"]: row for row in read_jsonl(path / "per_clip.jsonl")} for path in (first, second)]
    groups = {entry.id: entry.group or entry.id for entry in read_manifest(first / "manifest.jsonl")}
    for card in shared:
        if card.kind == "per_clip":
            ids = [i for i in groups if i not in failed and all(card.name in table.get(i, {}) for table in rows)]
            values = [[table[i][card.name]["value"] for i in ids] for table in rows]
            found[card.name] = compare_paired(values[0], values[1], [groups[i] for i in ids])
    return found, holm({name: comparison.p_value for name, comparison in found.items()})


def _check_same_clips(records: Sequence[Record], paths: Sequence[Path]) -> None:
    prints = [record.plan.fingerprint for record in records]
    if prints[0] != prints[1]:
        raise UserError(
            f"{paths[0]} and {paths[1]} were scored on different clips (fingerprints {prints[0]} and {prints[1]}). "
            "Run the second with --manifest of the first"
        )


def _compare_sets(
    metrics: Sequence[MetricCard], paths: Sequence[Path], failed: set[str], options: run.Options
) -> dict[str, Comparison]:
    built = scoring.build_metrics(metrics, options.runtime(), explicit=True)
    passes, order, groups = [], [], {}
    for path in paths:
        job = planning.reopen(path)
        order = [entry.id for entry in job.manifest if entry.id not in failed]
        groups = {entry.id: entry.group or entry.id for entry in job.manifest}
        passes.append(run.extract(job, options, built, FeatureCache()))
    found = {}
    for name, metric in built.sets.items():
        key = scoring.extractor_key(metric)
        real = torch.stack([passes[0].reference[key][i] for i in order]).double()
        made = [torch.stack([one.generated[key][i] for i in order]).double() for one in passes]
        found[name] = compare_sets(_statistic(metric.card), real, made[0], made[1], [groups[i] for i in order])
    return found


def _statistic(card: MetricCard) -> Callable[[Tensor, Tensor], float]:
    if card.name == "fvd":
        return fn.frechet_distance
    kernel = kernel_of(card.options)
    return lambda real, generated: fn.kernel_distance(real, generated, kernel)


def to_markdown(found: dict[str, Comparison], adjusted: dict[str, float], names: Sequence[str]) -> str:
    """A table of A minus B; the better model where the adjusted p is below 5 %."""
    lines = [
        f"{names[0]} minus {names[1]}, same clips\n",
        "| metric | difference | 95 % interval | p | p (Holm) | better | N | how |",
        "|:--|--:|:--|--:|--:|:--|--:|:--|",
    ]
    for name, one in found.items():
        interval = f"[{show_value(one.ci95[0])}, {show_value(one.ci95[1])}]" if one.ci95 else "–"
        higher = find_metric(name).higher_is_better
        better = "no difference shown"
        if adjusted[name] < 0.05:
            better = "they differ" if higher is None else names[(one.difference > 0) != higher]
        size = f"{one.n}" if one.n == one.n_groups else f"{one.n} clips of {one.n_groups} videos"
        lines.append(
            f"| {name} | {show_value(one.difference)} | {interval} | {one.p_value:.4f} | {adjusted[name]:.4f} | "
            f"{better} | {size} | {one.method} |"
        )
    return "\n".join(lines) + "\n"


def to_json(found: dict[str, Comparison], adjusted: dict[str, float]) -> str:
    rows: dict[str, Any] = {name: vars(one) | {"p_holm": adjusted[name]} for name, one in found.items()}
    return json.dumps(rows, indent=1) + "\n"
