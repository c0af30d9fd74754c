"""The results of a suite: a row per arm with the numbers of every seed, in one table and curves."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dcbench.analysis.suite import Arm, Suite
from dcbench.catalogue import slug
from dcbench.escape import csv_cell, markdown
from dcbench.files import write_text
from dcbench.metrics.statistics import (
    Estimate,
    compare_paired,
    holm,
    mean_interval,
    over_seeds,
    student_interval,
    subtract,
)
from dcbench.record import Record, Replicates
from dcbench.reports.figures import Curve, curves
from dcbench.training.held_out import SWAPS, HeldOut

Interval = tuple[float, float] | None


@dataclass(frozen=True)
class Point:
    """A number of one seed. `p_value`: of 'it is 0', for a difference. `plain`: the difference with the bias of FVD."""

    value: float
    interval: Interval
    replicates: Replicates | None = None
    p_value: float | None = None
    plain: float | None = None
    is_share: bool = False  # between 0 and 1


@dataclass
class ArmScores:
    """An arm's numbers: by metric, a point for each seed."""

    arm: Arm
    scores: dict[str, list[Point]] = field(default_factory=dict)
    gaps: dict[str, list[Point]] = field(default_factory=dict)  # differences from the baseline, on the same clips
    reasons: dict[str, str] = field(default_factory=dict)  # metrics that could not be computed
    no_gap: str = ""  # why there are no gaps
    clips: int = 0

    def add(self, metric: str, value: float, interval: Interval, **more: Any) -> None:
        """`more`: other fields of the `Point`."""
        self.scores.setdefault(metric, []).append(Point(value, interval, **more))

    def add_scores(self, record: Record) -> None:
        """Add the scores of a finished run. Those of the data set's own metrics come last."""
        own = list(record.plan.dataset.get("metrics", ()))
        ordered = sorted(record.scores.items(), key=lambda item: own.index(item[0]) + 1 if item[0] in own else 0)
        for name, score in ordered:
            if score.value is None:
                self.reasons[name] = score.reason or "no reason given"
            else:
                is_share = "Wilson" in score.ci_method
                self.add(name, score.value, score.ci95, replicates=score.replicates, is_share=is_share)
        self.clips = record.n_planned

    def add_held_out(self, measured: HeldOut, baseline: HeldOut | None) -> None:
        """Add the losses of an arm. A swap and its interval are the growth of the loss, divided by the mean loss."""
        clips = len(measured.sampled)  # 0 in older files: then the number of clips is not known
        interval = student_interval(measured.loss, measured.error, clips - 1) if clips > 1 else None
        self.add("held_out_loss", measured.loss, interval)
        for swap in SWAPS:
            growth = mean_interval(measured.growth[swap]) if measured.growth else None
            relative = (growth[0] / measured.loss, growth[1] / measured.loss) if growth else None
            self.add(f"swap_{swap}", measured.reliance(swap), relative)
        if measured.sampled:
            mean = sum(measured.sampled) / len(measured.sampled)
            self.add("first_frame_loss", mean, mean_interval(measured.sampled))
        if baseline and baseline.sampled and measured.sampled:
            gap = compare_paired(measured.sampled, baseline.sampled)
            self.gaps.setdefault("first_frame_loss", []).append(Point(gap.difference, gap.ci95, p_value=gap.p_value))

    def add_gaps(self, stored: Mapping[str, Any], records: Sequence[Record] = ()) -> None:
        """Add the content of a run's gap.json: differences from the baseline's run on the same clips.

        `records`: that of the run and of the baseline's, for an interval over several seeds.
        """
        self.no_gap = stored["reason"]
        for name, gap in stored["gaps"].items():
            sides = [record.scores[name].replicates if name in record.scores else None for record in records]
            pair = subtract(*sides) if sides and all(sides) and _same_clips(sides) else None  # type: ignore[arg-type]
            interval = tuple(gap["ci95"]) if gap["ci95"] else None
            point = Point(gap["difference"], interval, pair, gap["p_value"], gap.get("plain"))
            self.gaps.setdefault(name, []).append(point)

    def add_no_difference(self) -> None:
        """Add gaps of 0, for an arm that shares the run of the baseline."""
        for name in self.scores:
            self.gaps.setdefault(name, []).append(Point(0.0, None))

    def summary(self, metric: str) -> Estimate | None:
        """A single seed's number with its interval, or the mean over seeds with an interval for clips and seeds."""
        return _over_seeds(self.scores.get(metric, []))

    def gap(self, metric: str) -> Estimate | None:
        """As `summary`, for the difference from the baseline."""
        return _over_seeds(self.gaps.get(metric, []))


def _same_clips(sides: Sequence[Replicates | None]) -> bool:
    return len({side.design if side else None for side in sides}) == 1


def _over_seeds(points: Sequence[Point]) -> Estimate | None:
    if not points:
        return None
    if len(points) == 1:
        return Estimate(points[0].value, points[0].interval, points[0].p_value, "")
    several = [point.replicates for point in points]
    values = [point.value for point in points]
    if all(several) and _same_clips(several):
        values = [point.value if point.plain is None else point.plain for point in points]
    is_gap = any(point.p_value is not None for point in points)
    found = over_seeds(values, several, [point.interval for point in points], without_bias=is_gap)
    if points[0].is_share and found.ci95:
        return replace(found, ci95=(max(found.ci95[0], 0.0), min(found.ci95[1], 1.0)))
    return found


def write_table(suite: Suite, rows: Sequence[ArmScores], out: Path, seeds: Sequence[int]) -> str:
    """Write table.md and table.csv into `out`. Returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = _metrics(rows)
    paper = sorted({name for arm in suite.arms for name in arm.published})
    head = ["arm", "meaning", *metrics, *(f"{name} ({suite.published})" for name in paper)]
    body = []
    for row in rows:
        cells = [show(row.summary(name)) for name in metrics]
        theirs = (f"{row.arm.published.get(name, '')}" for name in paper)
        body.append([markdown(row.arm.name), markdown(row.arm.meaning), *cells, *theirs])
    text = [f"# {markdown(suite.title)}", "", markdown(suite.note), ""]
    found = [summary for row in rows for name in metrics if (summary := row.summary(name)) and summary.ci95]
    methods = dict.fromkeys(summary.method for summary in found)
    how = markdown(", ".join(methods))
    many = f"means over seeds; 95 % intervals {how}" if len(seeds) > 1 else "95 % intervals"
    text += [f"{rows[0].clips if rows else 0} clips an arm, seeds {', '.join(map(str, seeds))}; {many}.", ""]
    text += ["| " + " | ".join(map(markdown, head)) + " |", "|" + "---|" * len(head)]
    text += ["| " + " | ".join(cells) + " |" for cells in body]
    text += _gap_table(suite, rows)
    reasons = {name: reason for row in rows for name, reason in row.reasons.items()}
    text += [f"\nNot computed: {markdown(name)}: {markdown(why.splitlines()[0])}" for name, why in reasons.items()]
    whole = "\n".join(text) + "\n"
    write_text(out / "table.md", whole)
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(["arm", "group", "x", "metric", "seed", "value", "low", "high"])
    for row in rows:
        gaps = {f"{name}_gap": found for name, found in row.gaps.items()}
        for name, found in (row.scores | gaps).items():
            for seed, point in zip(seeds, found, strict=False):
                ends = point.interval or ("", "")
                line = [row.arm.name, row.arm.group, row.arm.x, name, seed, point.value, *ends]
                writer.writerow(map(csv_cell, line))
    write_text(out / "table.csv", sheet.getvalue())
    return whole


def _metrics(rows: Sequence[ArmScores]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in (*row.scores, *row.reasons)))


def _gap_table(suite: Suite, rows: Sequence[ArmScores]) -> list[str]:
    """Each arm minus the baseline, clip by clip. Bold: told from 0 after Holm's correction for the whole table."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.gaps))
    gaps = {(row.arm.name, name): row.gap(name) for row in rows for name in row.gaps}
    tested = {str(key): gap.p_value for key, gap in gaps.items() if gap and gap.p_value is not None}
    adjusted = holm(tested)
    text = []
    if metrics:
        text += [
            "",
            f"Difference from *{markdown(suite.baseline_arm)}* on the same clips. "
            f"Bold: p < 0.05 after Holm's correction for the {len(tested)} differences of this table.",
            "",
            "| arm | " + " | ".join(map(markdown, metrics)) + " |",
            "|" + "---|" * (len(metrics) + 1),
        ]
    for row in rows:
        if row.gaps:
            cells = [_bold(gaps.get((row.arm.name, name)), adjusted.get(str((row.arm.name, name)))) for name in metrics]
            text.append(f"| {markdown(row.arm.name)} | " + " | ".join(cells) + " |")
    return text + [f"\nNot compared: {markdown(row.arm.name)}: {markdown(row.no_gap)}" for row in rows if row.no_gap]


def _bold(gap: Estimate | None, adjusted: float | None) -> str:
    return f"**{show(gap)}**" if adjusted is not None and adjusted < 0.05 else show(gap)


def show(summary: Estimate | None) -> str:
    if summary is None:
        return ""
    interval = summary.ci95
    return f"{summary.value:.4g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def draw_curves(suite: Suite, rows: Sequence[ArmScores], out: Path) -> None:
    """Draw curves of the arms with an `x`: a picture per metric, a line per group."""
    groups: dict[str, list[ArmScores]] = {}
    for row in rows:
        if row.arm.x is not None:
            groups.setdefault(row.arm.group, []).append(row)
    for metric in _metrics(rows):
        lines: dict[str, Curve] = {}
        for group, members in groups.items():
            points = [
                (row.arm.x, s.value, s.ci95) for row in members if row.arm.x is not None and (s := row.summary(metric))
            ]
            if len(points) < 2:
                continue
            band = [interval or (value, value) for _, value, interval in points]
            x, y = [point[0] for point in points], [point[1] for point in points]
            lines[group] = Curve(x, y, [low for low, _ in band], [high for _, high in band])
        if lines:
            curves(out / f"curves-{slug(metric)}.png", lines, suite.x_label, metric, title=suite.title)
