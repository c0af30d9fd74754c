"""The results of a suite: a row per arm with the numbers of every seed, in one table and curves."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcbench.analysis.suite import Arm, Suite
from dcbench.files import write_text
from dcbench.metrics.functional import mean_interval
from dcbench.metrics.statistics import compare_paired
from dcbench.record import Record
from dcbench.reports.figures import Curve, curves
from dcbench.training.held_out import SWAPS, HeldOut

Interval = tuple[float, float] | None


@dataclass
class ArmScores:
    """An arm's numbers: by metric, a value and its interval for each seed."""

    arm: Arm
    scores: dict[str, list[tuple[float, Interval]]] = field(default_factory=dict)
    gaps: dict[str, list[tuple[float, Interval]]] = field(default_factory=dict)  # to the baseline, on the same clips
    reasons: dict[str, str] = field(default_factory=dict)  # metrics that could not be computed
    no_gap: str = ""  # why there are no gaps
    clips: int = 0

    def add(self, metric: str, value: float, interval: Interval) -> None:
        self.scores.setdefault(metric, []).append((value, interval))

    def add_scores(self, record: Record) -> None:
        """Add the scores of a finished run. Those of the data set's own metrics come last."""
        own = list(record.plan.dataset.get("metrics", ()))
        ordered = sorted(record.scores.items(), key=lambda item: own.index(item[0]) + 1 if item[0] in own else 0)
        for name, score in ordered:
            if score.value is None:
                self.reasons[name] = score.reason or "no reason given"
            else:
                self.add(name, score.value, score.ci95)
        self.clips = record.n_planned

    def add_held_out(self, measured: HeldOut, baseline: HeldOut | None) -> None:
        """Add the losses of an arm. A swap and its interval are the growth of the loss, divided by the mean loss."""
        half = 1.96 * measured.error
        self.add("held_out_loss", measured.loss, (measured.loss - half, measured.loss + half))
        for swap in SWAPS:
            growth = mean_interval(measured.growth[swap]) if measured.growth else None
            relative = (growth[0] / measured.loss, growth[1] / measured.loss) if growth else None
            self.add(f"swap_{swap}", measured.reliance(swap), relative)
        if measured.sampled:
            mean = sum(measured.sampled) / len(measured.sampled)
            self.add("first_frame_loss", mean, mean_interval(measured.sampled))
        if baseline and baseline.sampled and measured.sampled:
            gap = compare_paired(measured.sampled, baseline.sampled)
            self.gaps.setdefault("first_frame_loss", []).append((gap.difference, gap.ci95))

    def add_gaps(self, stored: Mapping[str, Any]) -> None:
        """Add the content of a run's gap.json: differences from the baseline's run on the same clips."""
        self.no_gap = stored["reason"]
        for name, gap in stored["gaps"].items():
            self.gaps.setdefault(name, []).append((gap["difference"], tuple(gap["ci95"]) if gap["ci95"] else None))

    def add_no_difference(self) -> None:
        """Add gaps of 0, for an arm that shares the run of the baseline."""
        for name in self.scores:
            self.gaps.setdefault(name, []).append((0.0, (0.0, 0.0)))

    def summary(self, metric: str) -> tuple[float, Interval] | None:
        """The mean over seeds, and the interval of a single seed, or the range of the intervals of all seeds."""
        return _span(self.scores.get(metric, []))

    def gap(self, metric: str) -> tuple[float, Interval] | None:
        """As `summary`, for the difference from the baseline."""
        return _span(self.gaps.get(metric, []))


def _span(found: Sequence[tuple[float, Interval]]) -> tuple[float, Interval] | None:
    if not found:
        return None
    ends = [end for value, interval in found for end in (interval or (value, value))]
    interval = (min(ends), max(ends)) if len(found) > 1 or found[0][1] else None
    return sum(value for value, _ in found) / len(found), interval


def write_table(suite: Suite, rows: Sequence[ArmScores], out: Path, seeds: Sequence[int]) -> str:
    """Write table.md, table.csv and curves into `out`. Returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = list(dict.fromkeys(name for row in rows for name in (*row.scores, *row.reasons)))
    paper = sorted({name for arm in suite.arms for name in arm.published})
    head = ["arm", "meaning", *metrics, *(f"{name} ({suite.published})" for name in paper)]
    body = []
    for row in rows:
        cells = [show(row.summary(name)) for name in metrics]
        body.append([row.arm.name, row.arm.meaning, *cells, *(f"{row.arm.published.get(n, '')}" for n in paper)])
    text = [f"# {suite.title}", "", suite.note, ""]
    many = "intervals span the seeds' own 95 % intervals" if len(seeds) > 1 else "95 % intervals"
    text += [f"{rows[0].clips if rows else 0} clips an arm, seeds {', '.join(map(str, seeds))}; {many}.", ""]
    text += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    text += ["| " + " | ".join(cells) + " |" for cells in body]
    text += _gap_table(suite, rows)
    reasons = {name: reason for row in rows for name, reason in row.reasons.items()}
    text += [f"\nNot computed: {name}: {reason}" for name, reason in reasons.items()]
    markdown = "\n".join(text) + "\n"
    write_text(out / "table.md", markdown)
    sheet = io.StringIO()
    writer = csv.writer(sheet)
    writer.writerow(["arm", "group", "x", "metric", "seed", "value", "low", "high"])
    for row in rows:
        gaps = {f"{name}_gap": found for name, found in row.gaps.items()}
        for name, found in (row.scores | gaps).items():
            for seed, (value, interval) in zip(seeds, found, strict=False):
                writer.writerow([row.arm.name, row.arm.group, row.arm.x, name, seed, value, *(interval or ("", ""))])
    write_text(out / "table.csv", sheet.getvalue())
    draw_curves(suite, rows, metrics, out)
    return markdown


def _gap_table(suite: Suite, rows: Sequence[ArmScores]) -> list[str]:
    """Each arm minus the baseline, clip by clip. Bold: the interval does not contain 0."""
    metrics = list(dict.fromkeys(name for row in rows for name in row.gaps))
    text = []
    if metrics:
        text += [
            "",
            f"Difference from *{suite.baseline_arm}* on the same clips. Bold: the interval is on one side of 0, which"
            " one in twenty is by chance.",
            "",
            "| arm | " + " | ".join(metrics) + " |",
            "|" + "---|" * (len(metrics) + 1),
        ]
    for row in rows:
        if row.gaps:
            text.append(f"| {row.arm.name} | " + " | ".join(_bold(row.gap(name)) for name in metrics) + " |")
    return text + [f"\nNot compared: {row.arm.name}: {row.no_gap}" for row in rows if row.no_gap]


def _bold(gap: tuple[float, Interval] | None) -> str:
    beyond = gap is not None and gap[1] is not None and (gap[1][0] > 0 or gap[1][1] < 0)
    return f"**{show(gap)}**" if beyond else show(gap)


def show(summary: tuple[float, Interval] | None) -> str:
    if summary is None:
        return ""
    value, interval = summary
    return f"{value:.4g}" + (f" [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else "")


def draw_curves(suite: Suite, rows: Sequence[ArmScores], metrics: Sequence[str], out: Path) -> None:
    """Draw curves of the arms with an `x`: a picture per metric, a line per group."""
    groups: dict[str, list[ArmScores]] = {}
    for row in rows:
        if row.arm.x is not None:
            groups.setdefault(row.arm.group, []).append(row)
    for metric in metrics:
        lines: dict[str, Curve] = {}
        for group, members in groups.items():
            points = [(row.arm.x, *s) for row in members if row.arm.x is not None and (s := row.summary(metric))]
            if len(points) < 2:
                continue
            band = [interval or (value, value) for _, value, interval in points]
            x, y = [point[0] for point in points], [point[1] for point in points]
            lines[group] = Curve(x, y, [low for low, _ in band], [high for _, high in band])
        if lines:
            curves(out / f"curves-{metric}.png", lines, suite.x_label, metric, title=suite.title)
