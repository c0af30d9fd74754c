"""`dcbench report --compare A B`: for two runs on the same clips, each metric's difference, interval and p value."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dcbench.errors import UserError
from dcbench.escape import markdown
from dcbench.metrics.base import OVER_SAMPLES, Metric, best_of_each
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.statistics import Comparison, compare_paired, compare_scores, holm
from dcbench.record import Case, Record, Score, read_per_clip, read_record
from dcbench.reports.tables import chosen_metrics, show_value
from dcbench.runs import planning
from dcbench.runs.directory import CLEANED, RunDirectory
from dcbench.runs.metrics import choose_metrics, metric_of, score_name
from dcbench.runs.run import Options
from dcbench.runs.scoring import observe_all


@dataclass(frozen=True)
class Compared:
    """A minus B for each metric with a value in both runs. `reasons`: why other metrics are not compared."""

    found: dict[str, Comparison] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    higher_is_better: dict[str, bool | None] = field(default_factory=dict)

    @property
    def adjusted(self) -> dict[str, float]:
        """The p values with Holm's correction, by metric."""
        return holm({name: comparison.p_value for name, comparison in self.found.items()})


def compare_runs(first: Path, second: Path, options: Options, metrics: Sequence[str] = ()) -> Compared:
    """Compare two runs by the metrics of either. UserError if their clips differ or they have no metric in common.

    Set metrics are compared from the records, if both runs lost the same clips. Otherwise the features come from the
    cache, or are extracted again. No clip is generated. `metrics`: only these (names, patterns, or your own cards,
    which are needed if this machine does not know them).
    """
    paths = (first, second)
    records = [read_record(path) for path in paths]
    _check_same_clips(records, paths)
    rows = [read_per_clip(path) for path in paths]
    cases = planning.recorded_cases(first)
    failed = {failure.id for record in records for failure in record.failures}
    own = [name for name in metrics if name.endswith(".toml")]
    given = {score_name(card): card for card in choose_metrics(own)} if own else {}
    compared, sets = Compared(), dict[str, Metric]()
    for name in chosen_metrics(metrics, [*records[0].scores, *records[1].scores]):
        scores = [record.scores.get(name) for record in records]
        if all(score is None or score.value is None for score in scores):
            continue
        if reason := _not_comparable(scores, paths):
            compared.reasons[name] = reason
            continue
        one, two = (record.scores[name] for record in records)
        compared.higher_is_better[name] = one.higher_is_better
        both = [case for case in cases if _has(rows, case.id, name, failed)]
        try:
            if both:
                values = [[table[case.id][name]["value"] for case in both] for table in rows]
                compared.found[name] = _paired(values, both, one)
            elif one.replicates and two.replicates and one.replicates.design == two.replicates.design:
                compared.found[name] = compare_scores(one, two)
            elif "parts" in one.metric.get("options", {}):
                compared.reasons[name] = "a total, and the runs lost other clips, or it has no interval"
            else:
                sets[name] = metric_of(name, one, options.runtime(), given.get(name))
        except UserError as error:
            compared.reasons[name] = str(error)
    _compare_sets(compared, sets, paths, failed, options)
    if not compared.found and not compared.reasons:
        raise UserError(f"{first} and {second} have no metric in common; score both with the same --metrics")
    return compared


def _paired(values: Sequence[Sequence[float]], cases: Sequence[Case], score: Score) -> Comparison:
    """Compare the values of two runs on the cases; only the best clip of each input, if the score is of these."""
    kept, clusters = values, [case.cluster for case in cases]
    if score.metric.get("options", {}).get(OVER_SAMPLES) == "best":
        items = [case.item_id for case in cases]
        best = [best_of_each(side, items, bool(score.higher_is_better)) for side in values]
        kept = [[side[i] for i in places] for side, places in zip(values, best, strict=True)]
        clusters = [clusters[i] for i in best[0]]
    return compare_paired(kept[0], kept[1], clusters)


def _has(rows: Sequence[Mapping[str, dict]], case_id: str, name: str, failed: set[str]) -> bool:
    """Whether both runs have a value of this metric for this clip."""
    return case_id not in failed and all("value" in table.get(case_id, {}).get(name, {}) for table in rows)


def _not_comparable(scores: Sequence[Score | None], paths: Sequence[Path]) -> str:
    """Why two scores of the same name cannot be compared; "" if they can."""
    for score, path, other in zip(scores, paths, reversed(paths), strict=True):
        if score is None:
            return f"only {other} was scored with it"
        if score.value is None:
            return f"{path} has no value for it: {(score.reason or 'not computed').splitlines()[0]}"
    one, two = scores
    assert one is not None and two is not None
    if one.metric and two.metric and one.metric != two.metric:
        return f"scored with other options or other code ({_described(one)}; {_described(two)})"
    if one.extractor != two.extractor:
        return "scored with different extractors (other weights or other preprocessing)"
    return ""


def _described(score: Score) -> str:
    options = ", ".join(f"{key} {value}" for key, value in score.metric["options"].items())
    return f"version {score.metric['version']}" + (f", {options}" if options else "")


def _check_same_clips(records: Sequence[Record], paths: Sequence[Path]) -> None:
    prints = [record.plan.fingerprint for record in records]
    if prints[0] != prints[1]:
        raise UserError(
            f"{paths[0]} and {paths[1]} were scored on different clips (fingerprints {prints[0]} and {prints[1]}). "
            "Run the second with --manifest of the first"
        )


def _compare_sets(
    compared: Compared, metrics: Mapping[str, Metric], paths: Sequence[Path], failed: set[str], options: Options
) -> None:
    """Add the comparisons by set metrics, from the features of both runs."""
    passes, cases = [], []
    if cleaned := [path for path in paths if RunDirectory(path).is_cleaned()]:
        reason = f"this needs the clips of both runs; {cleaned[0]}: {CLEANED}"
        compared.reasons.update(dict.fromkeys(metrics, reason))
        return
    for path in paths if metrics else ():
        run = planning.reopen(path)
        cases = [case for case in run.cases if case.id not in failed]
        passes.append(observe_all(run, list(metrics.values()), options, FeatureCache()))
    for name, metric in metrics.items():
        try:
            compared.found[name] = metric.difference(*(seen.of(metric, cases) for seen in passes))
        except UserError as error:
            compared.reasons[name] = str(error)


def to_markdown(compared: Compared, names: Sequence[str]) -> str:
    """A Markdown table of A minus B. It names the better model if the adjusted p value is below 5 %."""
    adjusted = compared.adjusted
    lines = [
        f"{markdown(names[0])} minus {markdown(names[1])}, same clips\n",
        "| metric | difference | 95 % interval | p | p (Holm) | better | detectable | N | how |",
        "|:--|--:|:--|--:|--:|:--|--:|--:|:--|",
    ]
    for name, one in compared.found.items():
        interval = f"[{show_value(one.ci95[0])}, {show_value(one.ci95[1])}]" if one.ci95 else "–"
        better = verdict(one, adjusted[name], compared.higher_is_better[name], names)
        size = f"{one.n}" if one.n == one.n_groups else f"{one.n} clips of {one.n_groups} videos"
        how = one.method + (f"; as printed: {show_value(one.plain)}" if one.plain is not None else "")
        least = show_value(one.detectable) if one.detectable is not None else "–"
        lines.append(
            f"| {markdown(name)} | {show_value(one.difference)} | {interval} | {one.p_value:.4f} | "
            f"{adjusted[name]:.4f} | {markdown(better)} | {least} | {size} | {markdown(how)} |"
        )
    lines += [f"\nNot compared: {markdown(name)}: {markdown(reason)}" for name, reason in compared.reasons.items()]
    lines.append("\ndetectable: a true difference of this size is found at p < 0.05 in 80 % of such comparisons.")
    return "\n".join(lines) + "\n"


def verdict(one: Comparison, p_value: float, higher_is_better: bool | None, names: Sequence[str]) -> str:
    if p_value < 0.05:
        return "they differ" if higher_is_better is None else names[(one.difference > 0) != higher_is_better]
    if one.ci95 == (0.0, 0.0):
        return "equal"
    return "too few to tell" if one.is_too_small else "no difference shown"


def to_json(compared: Compared) -> str:
    adjusted = compared.adjusted
    rows = {name: vars(one) | {"p_holm": adjusted[name]} for name, one in compared.found.items()}
    return json.dumps(rows | ({"not_compared": compared.reasons} if compared.reasons else {}), indent=1) + "\n"
