"""Tables of records: models x datasets x metrics. Pure functions; `notations` writes them as Markdown, LaTeX and CSV.

Two measured numbers are comparable if dataset, metric (with options and code), fingerprint, extractor and sample sizes
are equal; two published numbers, if dataset, metric and protocol tag are equal. Bold: the best of comparable numbers,
and all that a paired test does not tell from it. A metric that was scored in two ways has two columns.
"""

import contextlib
import fnmatch
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dcbench.catalogue import Card, MetricCard, ModelCard, cards, find_metric
from dcbench.errors import UserError, near_match
from dcbench.files import digest
from dcbench.metrics.statistics import Comparison, compare_scores, holm, jackknife
from dcbench.protocol import shipped_totals
from dcbench.record import Score
from dcbench.reports.results import Result, name_runs
from dcbench.runs.metrics import score_name

ORDER = (
    "fvd",
    "fvd_infinity",
    "kvd",
    "kvd_all_pairs",
    "fid",
    "is_c3d",
    "is_i3d",
    "pic",
    "st_lpips_image",
    "ssim_image",
    "clip_text",
    "clip_image",
    "clip_frames",
    "motion",
    "warp_error",
    "psnr",
    "psnr_middle",
    "ssim",
    "ssim_middle",
    "lpips",
    "lpips_middle",
    "st_lpips",
    "first_frame_psnr",
    "first_frame_mse",
    "diversity",
    "flicker",
    "cut",
    "vbench_i2v_total",
    "vbench_i2v_i2v",
    "vbench_i2v_quality",
    "camera_motion",
    "i2v_subject",
    "i2v_background",
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_flickering",
)
PUBLISHED = ("none", "same-protocol", "all")


@dataclass(frozen=True)
class Number:
    """One measured or published number: a line of the CSV file."""

    block: str  # of the table: a protocol and its version, or "published, <protocol tag>"
    protocol: str  # the protocol and its version, or the protocol tag of a published number
    model: str
    dataset: str
    metric: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n_reference: int | None = None
    n_generated: int | None = None
    n_groups: int | None = None  # independent source videos or inputs
    higher_is_better: bool | None = None
    best: bool = False  # no comparable number is told from it, and some number is told from the best
    detectable: float | None = None  # the difference from the best that 80 % of such comparisons would find
    published: bool = False
    fingerprint: str = ""  # "published" for a published number: its clips are not known
    source: str = ""
    reason: str = ""  # why there is no value; with a value: what it lacks
    ci_method: str = ""
    extractor: str = ""
    comparable: str = ""  # equal for comparable numbers; "" = not comparable
    run: str = ""


def numbers(runs: Sequence[Result], models: Mapping[str, Card] | None = None) -> list[Number]:
    """All numbers of the runs, and the published numbers on the same datasets.

    The `dataset` of a published number may be the name of a protocol (a benchmark). Runs of that protocol have such
    numbers beside them, and no others of their data set.
    `models`: the cards to take published numbers from (default: the catalogue).
    """
    columns, labels = _columns(runs), name_runs(runs)
    found = _mark_best([pair for run in runs for pair in _measured(run, labels[run.path], columns)])
    directions = {
        name: card.higher_is_better for name, card in cards("metrics").items() if isinstance(card, MetricCard)
    } | {name: total.higher_is_better for name, total in shipped_totals().items()}
    chosen = (models if models is not None else cards("models")).values()
    known = {entry.dataset for card in chosen if isinstance(card, ModelCard) for entry in card.published}
    protocols = [(run.dataset, str(run.record.plan.protocol["name"])) for run in runs]
    datasets = {name if name in known else dataset: dataset for dataset, name in protocols}
    for card in chosen:
        for entry in card.published if isinstance(card, ModelCard) else ():
            if entry.dataset in datasets:
                found.append(
                    Number(
                        block=f"published, {entry.protocol}",
                        protocol=entry.protocol,
                        model=card.title,
                        dataset=datasets[entry.dataset],
                        metric=entry.metric,
                        value=entry.value,
                        higher_is_better=directions.get(entry.metric),
                        published=True,
                        fingerprint="published",
                        source=entry.source + ("" if entry.status == "verified" else f" ({entry.status})"),
                        comparable=f"published/{entry.dataset}/{entry.metric}/{entry.protocol}",
                    )
                )
    return found


def _way(score: Score) -> dict[str, Any]:
    """How a score was made: options and version, where they are not those of this machine's card; the extractor."""
    card, version = cards("metrics").get(str(score.metric.get("name"))), score.metric.get("version", "1")
    options = score.metric.get("options", {})  # a record of dcbench 0.1 has none: taken as the card's own
    own = {key: value for key, value in options.items() if card is None or card.options.get(key) != value}
    return own | ({"version": version} if version != "1" else {}) | score.extractor


def _columns(runs: Sequence[Result]) -> dict[tuple[str, str], str]:
    """(metric, digest of a way to score it) -> its column: the metric's name, with what tells several ways apart."""
    ways: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for metric, score in run.record.scores.items():
            if score.value is not None:
                ways.setdefault(metric, {})[digest(_way(score))] = _way(score)
    columns = {}
    for metric, found in ways.items():
        keys = dict.fromkeys(key for way in found.values() for key in way)
        differing = [key for key in keys if len({str(way.get(key)) for way in found.values()}) > 1]
        for name, way in found.items():
            parts = [f"{key}={str(way[key])[:12]}" for key in differing if way.get(key)]
            columns[metric, name] = f"{metric}({', '.join(parts)})" if parts else metric
    return columns


def _measured(run: Result, label: str, columns: Mapping[tuple[str, str], str]) -> Iterator[tuple[Number, Score]]:
    for name, score in run.record.scores.items():
        low, high = score.ci95 or (None, None)
        metric = columns.get((name, digest(_way(score))), name)
        known = [run.dataset, name, score.fingerprint, _way(score), score.n_reference, score.n_generated]
        number = Number(
            block=run.block,
            protocol=run.block,
            model=label,
            dataset=run.dataset,
            metric=metric,
            value=score.value,
            low=low,
            high=high,
            n_reference=score.n_reference,
            n_generated=score.n_generated,
            n_groups=score.n_groups,
            higher_is_better=score.higher_is_better,
            fingerprint=score.fingerprint or run.record.plan.fingerprint,
            reason=score.reason or "",
            ci_method=score.ci_method,
            extractor=", ".join(f"{key} {value}" for key, value in score.extractor.items() if value),
            comparable="" if score.value is None or run.is_bound else digest(known),
            run=run.path.name,
        )
        yield number, score


def _mark_best(found: Sequence[tuple[Number, Score]]) -> list[Number]:
    """Mark the best of comparable numbers, and all that a paired test (Holm, 5 %) does not tell from it.

    No number is marked if none is told from the best. For a biased metric such as FVD, the best is that without the
    bias. A record without replicates (an older one) cannot be told from anything.
    """
    numbers = [number for number, _ in found]
    groups: dict[str, list[int]] = defaultdict(list)
    for index, number in enumerate(numbers):
        if number.comparable and number.higher_is_better is not None:
            groups[number.comparable].append(index)
    for members in groups.values():
        sign = -1 if numbers[members[0]].higher_is_better else 1
        best = min(members, key=lambda index: sign * _without_bias(found[index][1]))
        against: dict[int, Comparison] = {}
        for index in members:
            with contextlib.suppress(UserError):  # not to be told apart: too few clips, or other ones
                if index != best:
                    against[index] = compare_scores(found[index][1], found[best][1])
        adjusted = holm({str(index): one.p_value for index, one in against.items()})
        told = {index for index in against if adjusted[str(index)] < 0.05}
        for index in members:
            least = against[index].detectable if index in against else None
            numbers[index] = replace(numbers[index], best=bool(told) and index not in told, detectable=least)
    return numbers


def _without_bias(score: Score) -> float:
    if score.replicates is not None and score.replicates.biased and score.value is not None:
        return jackknife(score.value, score.replicates).bias_corrected
    return score.value if score.value is not None else math.inf


# --- layout -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    text: str
    interval: str = ""
    bold: bool = False
    notes: tuple[int, ...] = ()


@dataclass
class Table:
    """A table, independent of the output format: blocks of rows. A row is a label and its cells."""

    columns: list[tuple[str, str]]  # (dataset, heading)
    blocks: list[tuple[str, list[tuple[Cell, list[Cell]]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    full_notes: bool = True  # False: only what a reader of a paper needs, no warnings and no advice

    def note(self, text: str) -> int:
        """Add a footnote and return its number. Equal texts share one."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1


def show_value(value: float) -> str:
    """Two decimals from 10 on, four below 10, an exponent below 0.001, as in papers."""
    size = abs(value)
    return f"{value:.2f}" if size >= 10 else f"{value:.4f}" if size >= 1e-3 or size < 5e-7 else f"{value:.1e}"


def choose(
    runs: Sequence[Result], found: Sequence[Number], metrics: Sequence[str] = (), published: str = "all"
) -> list[Number]:
    """The numbers of some metrics (as for `chosen_metrics`; default: all), and which published ones: one of PUBLISHED.

    "same-protocol": those of a data set whose tag is the name of a protocol that was measured on it.
    """
    if published not in PUBLISHED:
        meant = near_match(published, PUBLISHED)
        raise UserError(f'--published "{published}": expected {", ".join(PUBLISHED)}.{meant}')
    wanted = chosen_metrics(metrics, [number.metric for number in found])
    measured = {(run.dataset, str(run.record.plan.protocol["name"])) for run in runs}
    return [
        number
        for number in found
        if number.metric in wanted
        and (
            not number.published
            or published == "all"
            or (published == "same-protocol" and (number.dataset, number.protocol) in measured)
        )
    ]


def chosen_metrics(given: Sequence[str], known: Iterable[str]) -> list[str]:
    """Those of the known metrics that are given: by name, pattern, or your own card.toml; all if nothing is given.

    "kvd" is also "kvd(degree=2)". UserError for one that fits none.
    """
    known = list(dict.fromkeys(known))
    chosen = dict.fromkeys([] if given else known)
    for name in given:
        wanted = score_name(find_metric(name)) if name.endswith(".toml") else name
        found = [m for m in known if wanted in (m, m.partition("(")[0]) or ("*" in name and fnmatch.fnmatch(m, name))]
        if not found:
            raise UserError(f'no run was scored with "{name}".{near_match(name, known)} Known: {", ".join(known)}')
        chosen |= dict.fromkeys(found)
    return list(chosen)


def layout(runs: Sequence[Result], found: Sequence[Number], full_notes: bool = True) -> Table:
    """Arrange numbers in a table: measured blocks first, then a block for each published protocol tag."""
    columns: list[tuple[str, str]] = []  # (dataset, metric); metric "" = the sample size
    for dataset in dict.fromkeys(number.dataset for number in found):
        present = {number.metric for number in found if number.dataset == dataset and number.value is not None}
        columns += [(dataset, metric) for metric in sorted(present, key=_rank)] + [(dataset, "")]
    table = Table([(dataset, _heading(metric, found)) for dataset, metric in columns], full_notes=full_notes)
    labels = name_runs(runs)
    blocks: dict[str, dict[str, list[Number]]] = {}
    for number in sorted(found, key=lambda number: (number.published, number.block)):
        blocks.setdefault(number.block, {}).setdefault(number.model, []).append(number)
    for block, models in blocks.items():
        rows = []
        for model, line in models.items():
            own = [run for run in runs if labels[run.path] == model and run.block == block]
            rows.append(
                (_label(model, own, table), [_cell(line, dataset, metric, table) for dataset, metric in columns])
            )
        table.blocks.append((block, rows))
    _explain(runs, found, table)
    return table


def _rank(metric: str) -> tuple[int, str]:
    name = metric.partition("(")[0]
    return (ORDER.index(name) if name in ORDER else len(ORDER), metric)


def _title(metric: str) -> str:
    name, bracket, way = metric.partition("(")
    card = cards("metrics").get(name) or shipped_totals().get(name)
    return f"{card.title if card else name}{' ' if bracket else ''}{bracket}{way}"


def heading(metric: str) -> str:
    """The title of a metric with the arrow of its card. A metric that dcbench does not have has its name."""
    card = cards("metrics").get(metric)
    better = card.higher_is_better if isinstance(card, MetricCard) else None
    return _title(metric) + ("" if better is None else " ↑" if better else " ↓")


def _heading(metric: str, found: Sequence[Number]) -> str:
    if not metric:
        return "N"
    directions = [n.higher_is_better for n in found if n.metric == metric and n.higher_is_better is not None]
    return f"{_title(metric)} {'↑' if directions[0] else '↓'}" if directions else _title(metric)


def _label(model: str, own: Sequence[Result], table: Table) -> Cell:
    notes = []
    if any(run.is_bound for run in own):
        notes.append(table.note("Returns the reference clip itself: the bound of the metrics, not a competing model."))
    if any(run.hardly_moves for run in own):
        notes.append(
            table.note(
                "Moves less than a tenth as much as the real clips: a near-still clip gets good FVD, PIC and ST-LPIPS "
                "easily."
            )
        )
    return Cell(model, notes=tuple(notes))


def _cell(line: Sequence[Number], dataset: str, metric: str, table: Table) -> Cell:
    if not metric:
        return _size_cell([number for number in line if number.dataset == dataset], table)
    number = next((number for number in line if (number.dataset, number.metric) == (dataset, metric)), None)
    if number is None:
        return Cell("")
    if number.value is None:
        reason = _first_line(number.reason) if table.full_notes else ""
        return Cell("–", notes=(table.note(reason or "not computed"),))
    interval = ""
    if number.low is not None and number.high is not None:
        interval = f"[{show_value(number.low)}, {show_value(number.high)}]"
    notes = tuple(table.note(text) for text in (number.source and f"Source: {number.source}.", number.reason) if text)
    return Cell(show_value(number.value), interval, number.best, notes)


def _size_cell(line: Sequence[Number], table: Table) -> Cell:
    """The sample size, with a footnote that gives the fingerprint."""
    whole = [number for number in line if not number.metric.endswith("(partial)")]
    scored = [number for number in whole if number.value is not None and not number.published]
    if not scored:
        return Cell("")
    counts = {(number.n_reference, number.n_generated, number.n_groups) for number in scored}
    sizes = sorted({_size(*count) for count in counts})
    prints = dict.fromkeys((number.fingerprint, number.block) for number in scored)
    notes = [
        table.note(f"Fingerprint {p} ({block}): comparable with the same fingerprint only.") for p, block in prints
    ]
    return Cell(" / ".join(sizes), notes=tuple(notes))


def _size(real: int | None, made: int | None, groups: int | None) -> str:
    size = str(made) if real in (made, 0) else f"{made} vs {real}"
    return f"{size} ({groups} videos)" if groups is not None and groups < min(made or 0, real or made or 0) else size


def _explain(runs: Sequence[Result], found: Sequence[Number], table: Table) -> None:
    """Add footnotes for the whole table: intervals, extractors, lost clips, metrics that no run has."""
    methods = sorted({number.ci_method for number in found if number.low is not None and number.ci_method})
    if methods:
        how = f" ({'; '.join(methods)})" if table.full_notes else ""
        table.note(f"In brackets: 95 % interval{how}.")
    _explain_bold(found, table)
    if table.full_notes:
        _explain_metrics(found, table)
    _explain_losses(runs, found, table)
    if any(number.published for number in found):
        table.note("Published numbers were not measured here; compare them only within their own block.")


def _explain_metrics(found: Sequence[Number], table: Table) -> None:
    """One footnote for all metrics that share an extractor, or the reason why no run has them."""
    valued = {number.metric for number in found if number.value is not None}
    by_text: dict[str, list[str]] = {}
    for number in sorted((n for n in found if not n.published), key=lambda n: _rank(n.metric)):
        if number.metric not in valued:
            by_text.setdefault(f"not computed: {_first_line(number.reason)}", []).append(_title(number.metric))
        elif number.value is not None and number.extractor:
            by_text.setdefault(f"{_shorten(number.extractor)}.", []).append(_title(number.metric))
    for text, titles in by_text.items():
        table.note(f"{', '.join(dict.fromkeys(titles))}: {text}")


def _explain_losses(runs: Sequence[Result], found: Sequence[Number], table: Table) -> None:
    labels, shown = name_runs(runs), {number.metric.partition("(")[0] for number in found}
    for run in runs:
        for warning in run.record.warnings:
            table.note(f"{labels[run.path]} on {run.dataset}: {warning}")
        if run.compared:
            table.note(f"{run.block}: {run.compared}.")
        lost = {failure.id: failure.reason for failure in run.record.failures}
        if lost:
            first = next(iter(lost))
            example = f", for example {first} ({_first_line(lost[first])})" if table.full_notes else ""
            table.note(f"{labels[run.path]} on {run.dataset}: {len(lost)} clips are lost and not counted{example}.")
        if not table.full_notes:
            continue
        short = sum(entry.rule == "short" for entry in run.record.plan.excluded)
        if short:
            table.note(f"{run.dataset}: {short} videos are too short for the protocol and were replaced.")
        if cut := [entry.id for entry in run.record.plan.excluded if entry.rule == "cut"]:
            table.note(f"{run.dataset}: {len(cut)} videos have a cut inside and were replaced, for example {cut[0]}.")
        for metric, score in sorted(run.record.scores.items()):
            for warning in score.warnings if metric.partition("(")[0] in shown else ():
                table.note(f"{_title(metric)}: {_first_line(warning)}")


def _explain_bold(found: Sequence[Number], table: Table) -> None:
    """What bold means, which columns have none, and how large a difference would have to be."""
    if any(number.best for number in found):
        table.note("Bold: the best, and all that a paired test does not tell from it (p < 0.05 after Holm).")
    compared: dict[str, list[Number]] = defaultdict(list)
    for number in found:
        if number.comparable and not number.published and number.higher_is_better is not None:
            compared[number.comparable].append(number)
    several = [group for group in compared.values() if len(group) > 1]
    if silent := [_title(group[0].metric) for group in several if not any(number.best for number in group)]:
        table.note(f"No model is told from the best by a paired test: {', '.join(dict.fromkeys(silent))}.")
    least: dict[str, float] = {}
    for group in several:
        is_told = any(number.best for number in group)
        for number in group:
            if number.detectable is not None and (number.best or not is_told):
                least[_title(number.metric)] = max(least.get(_title(number.metric), 0.0), number.detectable)
    if least and table.full_notes:
        table.note(
            "For these models to be told from the best in 80 % of such tests, the true difference must be at least: "
            f"{', '.join(f'{title} {show_value(value)}' for title, value in least.items())}."
        )


def _shorten(extractor: str) -> str:
    """Shorten hashes to twelve digits. The CSV file has all digits."""
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{20,}\b", r"\1", extractor).removeprefix("name ").replace("_", " ")


def _first_line(text: str) -> str:
    return text.strip().split("\n")[0].strip()


COST_HEADINGS = ("Model", "Dataset", "Seconds a clip", "Peak memory, MB", "On")


def costs(runs: Sequence[Result]) -> list[list[str]]:
    """The cost of the runs, in the columns of COST_HEADINGS. Runs without a measured time are left out."""
    labels = name_runs(runs)
    lines = []
    for run in runs:
        if run.cost is not None and run.cost.seconds_per_clip is not None:
            memory = run.cost.peak_memory_mb
            place = ", ".join(part for part in (run.cost.device, run.cost.dtype, run.cost.hardware) if part)
            seconds = show_value(run.cost.seconds_per_clip)
            lines.append([labels[run.path], run.dataset, seconds, "" if memory is None else f"{memory:.0f}", place])
    return lines
