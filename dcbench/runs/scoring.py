"""Scoring, the second half of a run: one streaming pass over its cases, then one score per metric, and the record.

Each clip is decoded once for all metrics. The next clips are decoded while the networks compute. Only observations are
kept, so memory does not grow with the number of clips.
"""

import contextlib
import datetime
import itertools
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcbench import machine, record, video
from dcbench.catalogue import find_metric
from dcbench.clips import pixels_sha256
from dcbench.errors import UserError
from dcbench.escape import screen
from dcbench.files import digest, optional_cache, write_json
from dcbench.metrics.base import Metric, MetricFailed, Observations, SetMetric, View
from dcbench.metrics.cache import FeatureCache
from dcbench.progress import track
from dcbench.protocol import Protocol
from dcbench.ranks import gather, held_by_first_rank, join_ranks, on_first_rank, rank, together, world_size
from dcbench.record import Case, Cost, Failure, Record, Score
from dcbench.runs import suspect
from dcbench.runs.directory import CLEANED, RunDirectory
from dcbench.runs.metrics import Metrics, build_metrics, card_file, choose_metrics, score_name
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import raise_lost
from dcbench.runs.totals import total_scores
from dcbench.takes import Takes

PREFETCH = 3  # cases decoded ahead


# --- one pass ---------------------------------------------------------------------------------------------------------


@dataclass
class Seen:
    """The results of a pass: observations by key (see `Metric.observation_key`) and case id, hashes, failures."""

    generated: dict[str, dict[str, Any]] = field(default_factory=dict)  # key -> case id -> observation
    reference: dict[str, dict[str, Any]] = field(default_factory=dict)
    lacking: dict[str, dict[str, str]] = field(default_factory=dict)  # key -> case id -> the missing input
    outside: dict[str, dict[str, str]] = field(default_factory=dict)  # key -> case id -> "": see `Metric.counts`
    # case id -> hashes of [reference, generated]; "": none. Also of the cases apart, which are not generated
    pixels: dict[str, list[str]] = field(default_factory=dict)
    decoders: dict[str, str] = field(default_factory=dict)  # case id -> the decoder of the reference
    likenesses: dict[str, float] = field(default_factory=dict)  # case id -> see `suspect.likeness`
    failures: list[Failure] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)  # clips that could not be read for a reason that may pass, and why

    def merge(self, other: "Seen") -> None:
        for name in ("generated", "reference", "lacking", "outside"):
            mine: dict[str, dict[str, Any]] = getattr(self, name)
            for key, table in getattr(other, name).items():
                mine.setdefault(key, {}).update(table)
        self.pixels.update(other.pixels)
        self.decoders.update(other.decoders)
        self.likenesses.update(other.likenesses)
        self.failures.extend(other.failures)
        self.lost.extend(other.lost)

    def of(self, metric: Metric, cases: Sequence[Case]) -> Observations:
        """A metric's observations in the order of the cases. Cases without an observation are left out."""
        made, real = (side.get(metric.observation_key, {}) for side in (self.generated, self.reference))
        generated, reference = ([case for case in cases if case.id in side] for side in (made, real))
        # the reference clips of a set metric are those of the cases apart, where there are any
        observed = [(isinstance(metric, SetMetric) and case.apart) or case for case in reference]
        return Observations(
            [made[case.id] for case in generated],
            [real[case.id] for case in reference],
            [case.cluster for case in generated],
            [case.cluster for case in observed],
            [case.item_id for case in generated],
        )


@dataclass
class Prepared:
    """A worker's result for a case: decoded clips, their hashes, and observations of metrics with `in_workers`."""

    case: Case
    image: Tensor | None
    reference: Tensor | None
    generated: Tensor | None
    siblings: Sequence[Tensor] | None  # of the first clip of an item: the other clips, if a metric needs them
    picture: Tensor | None  # the input image at the size of its file, if a metric needs it
    truth: Mapping[str, Any] | None
    seen: Seen
    protocol: Protocol
    takes: Takes | None = None  # of the real event, unread
    apart: "Prepared | None" = None  # of the case apart


def observe(run: Run, metrics: Sequence[Metric], cache: FeatureCache | None, cases: Sequence[Case]) -> Iterator[Seen]:
    """One pass over the cases. Yields the results of each case; merge them. `cache` None: nothing is cached.

    On a CPU, each core takes its own case. This is faster than all cores on one clip, and features do not depend on the
    number of cores. On a GPU, clips are decoded ahead, and a network takes a batch of them. A clip that cannot be read
    is a failure. What one metric cannot observe, the others can.
    """
    distinct = list({metric.observation_key: metric for metric in metrics}.values())
    batched = [metric for metric in distinct if isinstance(metric, SetMetric) and metric.batch > 1]
    parallel = [metric for metric in distinct if metric.in_workers and metric not in batched]
    others = [metric for metric in distinct if metric not in parallel and metric not in batched]
    cores, size = torch.get_num_threads(), max((metric.batch for metric in batched), default=1)
    of_item: dict[str, list[Case]] = defaultdict(list)
    for case in run.cases if any("siblings" in metric.card.needs for metric in distinct) else ():
        of_item[case.item_id].append(case)

    with_picture = any("picture" in metric.card.needs for metric in distinct)

    def prepare(case: Case) -> Prepared:
        siblings = [other for other in of_item[case.item_id] if case.is_first and other.id != case.id]
        done = _read(run, case, Seen(), run.has_generated(case), siblings)
        done.picture = _picture(run, case) if with_picture else None
        if run.protocol.reference_videos == "disjoint" and case.apart:
            done.apart = _read(run, case.apart, done.seen, generated=False)
        for metric in parallel:
            _observe_case(metric, done, cache)
        return done

    found = zip(cases, video.in_order(prepare, cases, cores, max(cores + PREFETCH, 2 * size)), strict=True)
    while some := list(itertools.islice(found, size)):
        done = [got for _, got in some if isinstance(got, Prepared)]
        for metric in batched:
            _observe_batch(metric, done, cache)
        for case, got in some:
            if isinstance(got, UserError):
                lost = [f"clip {case.id}, {got}"] if isinstance(got, video.PassingError) else []
                yield Seen(failures=[Failure(id=case.id, reason=str(got))], lost=lost)
                continue
            for metric in others:
                _observe_case(metric, got, cache)
            yield got.seen


def _read(run: Run, case: Case, seen: Seen, generated: bool, siblings: Sequence[Case] = ()) -> Prepared:
    """Decode the reference of a case, if `generated` the clip made for it, and the clips of `siblings`."""
    image = reference = made = None
    if run.has_reference(case):
        reference, decoder = run.reference(case)
        image = reference[case.condition_frame]
        seen.decoders |= {case.id: decoder} if case.is_first else {}
    elif case.frames:
        image = run.image(case)
    if generated:
        try:
            made = run.generated(case)
        except UserError as error:
            if case.sample is None or isinstance(error, video.PassingError):
                raise  # without its clip, this pair of clips does not count
            seen.failures.append(Failure(id=case.id, reason=str(error)))
    seen.pixels[case.id] = [pixels_sha256(clip) if clip is not None else "" for clip in (reference, made)]
    if image is not None and made is not None and suspect.is_made_elsewhere(run):
        likeness = suspect.likeness(case, made, image)
        seen.likenesses |= {} if likeness is None else {case.id: likeness}
    item = run.items.get(case.source_id)
    others = _readable(run, siblings)
    truth, takes = (item.truth, item.takes) if item else (None, None)
    return Prepared(case, image, reference, made, others, None, truth, seen, run.protocol, takes)


def _picture(run: Run, case: Case) -> Tensor | None:
    """The picture of a case at the size of its file, uint8 [3 h w]. None: its image is a frame of a video."""
    item = run.items.get(case.source_id)
    if item is None or not case.frames or run.has_reference(case):
        return None
    return item.video.read([case.frames[case.condition_frame]])[0]


def _readable(run: Run, cases: Sequence[Case]) -> list[Tensor] | None:
    """The generated clips of the cases; those that cannot be read are left out. None: none is left."""
    clips = []
    for case in cases:
        with contextlib.suppress(video.VideoError):  # it is a failure of its own case
            clips.append(run.generated(case))
    return clips or None


def _observe_case(metric: Metric, of: Prepared, cache: FeatureCache | None) -> None:
    """Store a metric's observations of a case."""
    for side, view, table in _views(metric, of):
        try:
            table[metric.observation_key] = {of.case.id: _observation(metric, view, side, cache)}
        except MetricFailed:
            raise
        except UserError as error:  # this metric cannot observe this clip; the others can
            of.seen.lacking.setdefault(metric.observation_key, {})[of.case.id] = str(error)


def _observe_batch(metric: SetMetric, cases: Sequence[Prepared], cache: FeatureCache | None) -> None:
    """Store a metric's observations of several cases. Those that are not in the cache are made together."""
    wanted = [(of, *views) for of in cases for views in _views(metric, of)]
    keys = [_key(metric, view, side) for _, side, view, _ in wanted]
    features: dict[str, Tensor | UserError] = {}
    for key, (_, _, view, _) in zip(keys, wanted, strict=True):
        if cache and (known := cache.get(key, {"features": metric.observation_shape(view.clip)})):
            features[key] = known["features"]
    new = {key: view.clip for key, (_, _, view, _) in zip(keys, wanted, strict=True) if key not in features}
    for key, made in zip(new, metric.observe_batch(list(new.values())) if new else (), strict=True):
        features[key] = made
        if cache and isinstance(made, Tensor):
            cache.put(key, {"features": made})
    for key, (of, _, _, table) in zip(keys, wanted, strict=True):
        got = features[key]
        if isinstance(got, UserError):
            of.seen.lacking.setdefault(metric.observation_key, {})[of.case.id] = str(got)
        else:
            table.setdefault(metric.observation_key, {})[of.case.id] = got


def _views(metric: Metric, of: Prepared) -> Iterator[tuple[Prepared, View, dict[str, dict[str, Any]]]]:
    """What a metric observes: (whose clip, its view, the table of results); the generated clip, and the reference clip
    if the metric observes it.

    The protocol says which reference clip and which frames metrics of sets see. What a case lacks is written down.
    """
    is_set = isinstance(metric, SetMetric)
    sides = [(of, of.generated, of.seen.generated)]
    other = of.apart if is_set and of.protocol.reference_videos == "disjoint" else of
    if other and metric.observes_reference and other.case.is_first:
        sides.append((other, other.reference, of.seen.reference))
    for side, clip, table in sides:
        if clip is None or (metric.of_items and not side.case.is_first):
            continue
        if not metric.counts(side.truth):
            of.seen.outside.setdefault(metric.observation_key, {})[of.case.id] = ""
            continue
        if is_set and of.protocol.scored_frames == "without_condition":
            clip = torch.cat([clip[: side.case.condition_frame], clip[side.case.condition_frame + 1 :]])
        elif is_set and of.protocol.scored_frames == "between":
            clip = clip[1:-1].contiguous()
        view = _view(metric, clip, side)
        if lack := metric.lacks(view):
            of.seen.lacking.setdefault(metric.observation_key, {})[of.case.id] = lack
        else:
            yield side, view, table


def _view(metric: Metric, clip: Tensor, of: Prepared) -> View:
    """A clip with the inputs that the metric's card `needs`. The metric gets no others, so it cannot depend on them."""
    known: dict[str, Any] = {
        "image": of.image,
        "picture": of.picture,
        "prompt": of.case.prompt if of.image is not None and of.case.prompt.strip() else None,
        "reference": of.reference,
        "fps": of.case.fps,
        "siblings": of.siblings if clip is of.generated else None,
        "truth": of.truth,
        "takes": of.takes,
    }
    return View(clip, **{name: known[name] for name in metric.card.needs})


def _observation(metric: Metric, view: View, of: Prepared, cache: FeatureCache | None) -> Any:
    """The metric's observation of a view. It is read from the cache if it is there, and stored there otherwise."""
    if cache is None:
        return metric.observe(view)
    key = _key(metric, view, of)
    if isinstance(metric, SetMetric):
        found = cache.get(key, {"features": metric.observation_shape(view.clip)})
        if found is None:
            found = {"features": metric.observe(view)}
            cache.put(key, found)
        return found["features"]
    value = cache.get_json(key)
    if value is None:
        value = metric.observe(view)
        cache.put_json(key, value)
    return value


def _key(metric: Metric, view: View, of: Prepared) -> str:
    """The key of a cached observation: the metric, and the pixels and texts that it sees."""
    hashes = of.seen.pixels[of.case.id]  # of [reference, generated]
    if view.clip is of.reference or view.clip is of.generated:
        pixels = hashes[0] if view.clip is of.reference else hashes[1]
    else:  # a part of a clip
        pixels = pixels_sha256(view.clip)
    needed = {name: getattr(view, name) for name in sorted(metric.card.needs)}
    if "reference" in needed:
        needed["reference"] = hashes[0]
    for name in ("image", "picture"):
        if needed.get(name) is not None:
            needed[name] = pixels_sha256(needed[name])
    if "takes" in needed:
        needed["takes"] = needed["takes"].sha256
    if "siblings" in needed:
        needed["siblings"] = [pixels_sha256(clip) for clip in needed["siblings"]]
    if isinstance(metric, SetMetric):
        return f"{metric.observation_key}-{digest([pixels, needed], 64) if needed else pixels}"
    return f"value-{digest([metric.observation_key, pixels, needed], 48)}"


# --- scores -----------------------------------------------------------------------------------------------------------


def score_all(seen: Seen, metrics: Metrics, cases: Sequence[Case], fingerprint: str) -> dict[str, Score]:
    """One score per metric, from the observations of one pass. A score that cannot be computed has a reason instead."""
    scores: dict[str, Score] = {}
    for name, (card, reason) in metrics.missing.items():
        scores[name] = Score(value=None, reason=reason, higher_is_better=card.higher_is_better, fingerprint=fingerprint)
    for name, metric in metrics.built.items():
        try:
            score = _score(metric, seen, cases)
        except UserError as error:
            score = Score(value=None, reason=str(error))
        scores[name] = score.model_copy(
            update={
                "higher_is_better": metric.card.higher_is_better,
                "metric": metric.identity,
                "extractor": metric.extractor.identity,
                "fingerprint": fingerprint,
            }
        )
    return scores


def _score(metric: Metric, seen: Seen, cases: Sequence[Case]) -> Score:
    observed, lacking = seen.of(metric, cases), seen.lacking.get(metric.observation_key, {})
    outside, dimension = len(seen.outside.get(metric.observation_key, {})), metric.card.dimension
    if outside and not (observed.generated or lacking):
        raise UserError(f"none of the {outside} clips is of the dimension {dimension}: their data set lists others")
    if metric.compares_sets and not (observed.reference and observed.generated):
        sizes = f"{len(observed.reference)} reference and {len(observed.generated)} generated clips: nothing to compare"
        raise UserError(next(iter(lacking.values()), sizes))
    if not observed.generated:
        raise UserError(next(iter(lacking.values()), "no generated clip could be scored"))
    score = metric.score(observed)
    if isinstance(metric, SetMetric) and metric.batch > 1:
        score.details["batch"] = metric.batch  # it changes features by rounding
    if observed.reference and not metric.compares_sets:
        reference = Observations(observed.reference, groups=observed.reference_groups)
        score.details["reference_value"] = metric.score(reference).value
    if outside:
        score.details["subset"] = {"dimension": dimension, "clips": len(observed.generated), "other_clips": outside}
    if lacking:
        score.warnings = [*score.warnings, f"{len(lacking)} clips do not count: {next(iter(lacking.values()))}"]
    return score


def per_clip_rows(seen: Seen, metrics: Metrics, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Lines of per_clip.jsonl: the observations of each clip by every per-clip metric."""
    keys = {name: m.observation_key for name, m in metrics.built.items() if not isinstance(m, SetMetric)}

    def values(side: dict[str, dict[str, Any]], case: Case) -> dict[str, Any]:
        return {name: side[key][case.id] for name, key in keys.items() if case.id in side.get(key, {})}

    rows = []
    for case in cases:
        made, real = values(seen.generated, case), values(seen.reference, case)
        rows.append({"id": case.id, **made} | ({"reference": real} if real else {}))
    return rows


# --- the record -------------------------------------------------------------------------------------------------------


def score(run: Run, options: Options, metrics: Sequence[str] | None = None, strict: bool = True) -> Record:
    """Score every finished clip and write per_clip.jsonl, record.json and cost.json.

    UserError if a metric in `metrics` cannot be built; with `strict` False, its score has the reason instead. Without
    `metrics`: those of the protocol, or the default ones, and a score that cannot be built always has its reason.
    """
    join_ranks()
    start = time.perf_counter()
    wait = options.join or options.shard is not None  # others that made clips are about to leave
    with held_by_first_rank(lambda: run.directory.locked("scoring", wait)):
        on_first_rank(lambda: _check_clips(run))
        on_first_rank(run.directory.mend)
        chosen = metrics or run.protocol.metrics
        built = together(lambda: build_metrics(choose_metrics(chosen), options.runtime(), bool(metrics) and strict))
        with run.directory.noted(f"scoring with {', '.join(built.built) or 'no metric'}"):
            seen = observe_all(run, list(built.built.values()), options, FeatureCache())
        seconds = time.perf_counter() - start
        result = on_first_rank(lambda: _finish(run, options, built, seen, seconds))
    for name in metrics or ():
        if name.endswith(".toml"):
            made = result.scores[score_name(find_metric(name))]
            with optional_cache():
                write_json(card_file(made), {"card": str(Path(name).expanduser().resolve())})
    return result


def _check_clips(run: Run) -> None:
    """Raise UserError if a generated clip is damaged: a score without it would silently replace a better one."""
    if run.directory.is_cleaned():
        raise UserError(f"{run.directory.path} cannot be scored: {CLEANED}. `dcbench pull` may bring them back")
    if damaged := run.directory.damaged():
        first, why = next(iter(damaged.items()))
        raise UserError(
            f"{run.directory.path}: {len(damaged)} of {len(run.cases)} generated clips are damaged, for example "
            f"{first} ({why}). `dcbench run` or `dcbench sample` with the options of this run makes them again"
        )


def observe_all(
    run: Run, metrics: Sequence[Metric], options: Options, cache: FeatureCache | None, what: str = "scoring"
) -> Seen:
    """Observe all cases of a run. Each rank does its share, and gets the results of all ranks.

    UserError if a clip could not be read for a reason that may pass: a score without it would be of other clips.
    """
    mine = run.cases[rank() :: world_size()]

    def share() -> Seen:
        seen = Seen()
        parts, quiet = observe(run, metrics, cache, mine), options.quiet or rank() > 0
        for part in track(parts, len(mine), what, quiet=quiet, whole=len(run.cases)):
            seen.merge(part)
        return seen

    try:
        seen = together(share)
    finally:
        for metric in metrics:
            metric.close()
    whole = Seen()
    for part in gather(seen):
        whole.merge(part)
    raise_lost(whole.lost, "scored")
    return whole


def _finish(run: Run, options: Options, metrics: Metrics, seen: Seen, seconds: float) -> Record:
    directory, cases = run.directory, run.cases
    scores = score_all(seen, metrics, cases, run.plan.fingerprint)
    rows = per_clip_rows(seen, metrics, cases)
    finished = directory.finished_samples()
    if run.model is None:
        clips_sha256 = digest([[case.id, seen.pixels.get(case.id)] for case in cases], 64)
    else:
        hashes = [[case.id, finished[case.id]["sha256"]] for case in cases if case.id in finished]
        hashes += [[case.apart.id, *seen.pixels.get(case.apart.id, [])] for case in cases if case.apart]
        clips_sha256 = digest(hashes, 64)
    before = _earlier(directory)
    if before and before.clips_sha256 == clips_sha256:  # keep the scores of other metrics on the same clips
        scores = {name: value for name, value in before.scores.items() if name not in scores} | scores
        old = record.read_per_clip(directory.path)
        rows = [_merge_row(old.get(row["id"], {}), row) for row in rows]
    scores |= total_scores(run.protocol.total, scores, {row["id"]: row for row in rows}, cases, run.plan.fingerprint)
    planned = [case for case in cases if run.has_generated(case)]
    lost = [entry for entry in run.plan.excluded if run.model is None or entry.rule == "unreadable"]
    result = Record(
        plan=run.plan,
        scores=dict(sorted(scores.items())),
        n_planned=len(planned),
        n_scored=len(planned) - len(seen.failures),
        failures=[
            *sorted(seen.failures, key=lambda failure: failure.id),
            *(Failure(id=entry.id, reason=entry.reason) for entry in lost),
        ],
        clips_sha256=clips_sha256,
        decoders=dict(sorted(Counter(seen.decoders.values()).items())),
        warnings=suspect.warnings(run, seen.likenesses),
    )
    for warning in result.warnings:
        print(screen(f"WARNING: {warning}"), file=sys.stderr, flush=True)
        directory.note(f"warning: {warning}")
    directory.write_per_clip(rows)
    write_json(directory.record, result.model_dump(mode="json"))
    write_json(directory.cost, _cost(run, options, finished, seconds, metrics).model_dump(mode="json"))
    return result


def _earlier(directory: RunDirectory) -> Record | None:
    """The record that an earlier call wrote. A damaged one is made again, without the scores of other metrics."""
    if not directory.record.is_file():
        return None
    try:
        return record.read_record(directory.path)
    except UserError as error:
        print(screen(f"the earlier record is not used: {error}"), file=sys.stderr, flush=True)
        return None


def _merge_row(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    reference = old.get("reference", {}) | new.get("reference", {})
    return old | new | ({"reference": reference} if reference else {})


def _cost(run: Run, options: Options, finished: dict[str, dict[str, Any]], seconds: float, metrics: Metrics) -> Cost:
    rows = [finished[case.id] for case in run.cases if case.id in finished]
    per_clip = [row["seconds"] for row in rows]
    runtime = options.runtime()
    details = {"steps": run.model.sampling.get("steps") if run.model else None, "weights": _named(rows, "weights")}
    if facts := {name: metric.facts for name, metric in metrics.built.items() if metric.facts}:
        details["metrics"] = facts
    return Cost(
        seconds_per_clip=sum(per_clip) / len(per_clip) if per_clip else None,
        peak_memory_mb=max((row["peak_memory_mb"] for row in rows), default=None),
        sample_seconds=sum(per_clip),
        score_seconds=seconds,
        device=", ".join(_named(rows, "device")) or runtime.device,
        dtype=", ".join(_named(rows, "dtype")),
        hardware=", ".join(_named(rows, "hardware")) or machine.hardware(runtime.device),
        git_commit=machine.git_commit(),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        details=details,
    )


def _named(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The values of `key` in the lines of the samples, which may have been made on other machines than this one."""
    return sorted({row[key] for row in rows if row.get(key)})
