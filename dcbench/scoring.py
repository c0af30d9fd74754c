"""Scoring: one streaming pass over pairs of reference and generated clips, then one number a metric.

Each clip is decoded once for all metrics, the next ones while the networks work on the last; only features are kept,
so memory does not grow with the number of clips.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dcbench import record, video
from dcbench.catalogue import MetricCard, cards, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, SetMetric
from dcbench.metrics.cache import FeatureCache
from dcbench.models.base import Runtime

PREFETCH = 3  # pairs decoded ahead


@dataclass(frozen=True)
class Pair:
    """A reference and a generated clip to read; either may be absent when two unpaired folders are scored."""

    id: str
    reference: Callable[[], Tensor] | None  # -> uint8 [t 3 h w]
    generated: Callable[[], Tensor] | None
    condition_frame: int = 0  # which reference frame was the input image
    prompt: str | None = None
    group: str | None = None


@dataclass
class Extracted:
    """What one pass leaves: features by extractor identity, values by metric, hashes, failures."""

    reference: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # extractor key -> clip id -> [d]
    generated: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    values: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)  # metric -> clip id -> values
    reference_values: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    pixels: dict[str, list[str]] = field(default_factory=dict)  # clip id -> hashes of [reference, generated]
    decoders: dict[str, str] = field(default_factory=dict)  # clip id -> what read the reference
    failures: list[record.Failure] = field(default_factory=list)

    def merge(self, other: "Extracted") -> None:
        for name in ("reference", "generated", "values", "reference_values"):
            mine: dict[str, dict[str, Any]] = getattr(self, name)
            for key, table in getattr(other, name).items():
                mine.setdefault(key, {}).update(table)
        self.groups.update(other.groups)
        self.pixels.update(other.pixels)
        self.decoders.update(other.decoders)
        self.failures.extend(other.failures)


@dataclass
class Metrics:
    """The metrics of a run, built; those that cannot be built, with the reason."""

    cards: list[MetricCard]
    sets: dict[str, SetMetric] = field(default_factory=dict)
    clips: dict[str, ClipMetric] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def choose_metrics(names: Sequence[str] | None) -> list[MetricCard]:
    """The metric cards of a run: the default ones, or those named (an unknown name is an error)."""
    if not names:
        return [card for card in cards("metrics").values() if isinstance(card, MetricCard) and card.default]
    chosen = {card.name: card for card in map(find_metric, names)}
    return list(chosen.values())


def build_metrics(chosen: Sequence[MetricCard], runtime: Runtime, explicit: bool) -> Metrics:
    """Build every metric. One whose weights are missing keeps its reason; named explicitly, it is an error."""
    built = Metrics(list(chosen))
    for card in chosen:
        try:
            metric = load_entry_point(card)(card, runtime)
        except UserError as error:
            if explicit:
                raise
            built.missing[card.name] = str(error).replace("weights fetch NAME", f"weights fetch {card.name}")
            continue
        (built.sets if card.kind == "set" else built.clips)[card.name] = metric
    return built


def pixels_sha256(clip: Tensor) -> str:
    """Hash of a clip's shape and pixels."""
    header = f"{list(clip.shape)}".encode()
    return hashlib.sha256(header + clip.contiguous().numpy().tobytes()).hexdigest()


def extractor_key(metric: SetMetric | ClipMetric) -> str:
    """An extractor's identity as one string: what shares features, and the first part of a cache key."""
    return record.digest(metric.extractor.identity, 32)


@dataclass
class Prepared:
    """A pair as a worker hands it over: decoded, hashed, its features extracted."""

    reference: Tensor | None
    generated: Tensor | None
    hashes: list[str]
    features: list[dict[str, Tensor]]  # of [reference, generated], by extractor
    error: UserError | None = None  # of an extractor; a clip that cannot be read is the worker's own UserError


def extract(pairs: Sequence[Pair], metrics: Metrics, cache: FeatureCache | None) -> Iterator[Extracted]:
    """One pass; yields after each pair what it gave (merge them).

    On a processor each core takes a pair of its own: faster than all cores on one clip, and features do not depend on
    the number of cores.
    """
    by_extractor = {extractor_key(metric): metric for metric in metrics.sets.values()}
    cores = torch.get_num_threads()

    def prepare(pair: Pair) -> Prepared:
        clips = [read() if read else None for read in (pair.reference, pair.generated)]
        hashes = [pixels_sha256(clip) if clip is not None else "" for clip in clips]
        done = Prepared(clips[0], clips[1], hashes, [{}, {}])
        try:
            for key, metric in by_extractor.items():
                for clip, pixels, side in zip(clips, hashes, done.features, strict=True):
                    if clip is not None:
                        side[key] = _features(metric, clip, f"{key}-{pixels}", cache)
        except UserError as error:
            done.error = error
        return done

    for pair, got in zip(pairs, video.in_order(prepare, pairs, cores, cores + PREFETCH), strict=True):
        out = Extracted()
        if isinstance(got, UserError):
            out.failures.append(record.Failure(id=pair.id, reason=str(got)))
        else:
            _take(out, pair, got, metrics, cache)
        yield out


def _take(out: Extracted, pair: Pair, got: Prepared, metrics: Metrics, cache: FeatureCache | None) -> None:
    """Put a prepared pair's features into `out`, and the values of the per-clip metrics."""
    try:
        if got.error:
            raise got.error
        for table, features in ((out.reference, got.features[0]), (out.generated, got.features[1])):
            table.update({key: {pair.id: value} for key, value in features.items()})
        image = got.reference[pair.condition_frame] if got.reference is not None else None
        for name, metric in metrics.clips.items():
            if got.generated is not None:
                value = _values(metric, got.generated, image, pair.prompt, got.hashes[1], cache)
                out.values[name] = {pair.id: value}
            if got.reference is not None and "reference" in metric.card.needs:
                value = _values(metric, got.reference, image, pair.prompt, got.hashes[0], cache)
                out.reference_values[name] = {pair.id: value}
    except UserError as error:
        raise UserError(f"clip {pair.id}: {error}") from error
    out.pixels[pair.id] = got.hashes
    if pair.group:
        out.groups[pair.id] = pair.group


def _features(metric: SetMetric, clip: Tensor, key: str, cache: FeatureCache | None) -> Tensor:
    found = cache.get(key) if cache else None
    if found is not None:
        return found["features"]
    features = metric.extract([clip])[0]
    if not bool(torch.isfinite(features).all()):
        raise UserError(f"{metric.extractor.identity['name']} gives NaN or infinity for it")
    if cache:
        cache.put(key, {"features": features})
    return features


def _values(
    metric: ClipMetric, clip: Tensor, image: Tensor | None, prompt: str | None, pixels: str, cache: FeatureCache | None
) -> dict[str, Any]:
    needs = metric.card.needs
    if "image" in needs and image is None:
        raise video.VideoError(
            f"{metric.card.name} needs the input image, and no reference clip is paired with this one"
        )
    parts = [extractor_key(metric), metric.card.name, pixels]
    parts += [pixels_sha256(image[None])] if "image" in needs and image is not None else []
    parts += [prompt or ""] if "prompt" in needs else []
    key = f"value-{record.digest(parts, 48)}"
    found = cache.get_json(key) if cache else None
    if found is None:
        images = [image] if image is not None else None
        found = metric.extract([clip], images, [prompt] if prompt is not None else None)[0]
        if cache:
            cache.put_json(key, found)
    return found


def score(
    extracted: Extracted, metrics: Metrics, fingerprint: str, order: Sequence[str], paired: bool = True
) -> dict[str, record.Score]:
    """One score a metric, from the features of one pass, in the manifest's order.

    `paired`: only clips with both sides count, so that a lost reference takes its generated clip with it.
    """
    failed = {failure.id for failure in extracted.failures}
    kept = [clip_id for clip_id in order if not (paired and clip_id in failed)]
    scores: dict[str, record.Score] = {}
    for card in metrics.cards:
        common: dict[str, Any] = {"higher_is_better": card.higher_is_better, "fingerprint": fingerprint}
        if card.name in metrics.missing:
            scores[card.name] = record.Score(value=None, reason=metrics.missing[card.name], **common)
            continue
        metric = metrics.sets.get(card.name) or metrics.clips[card.name]
        common["extractor"] = metric.extractor.identity
        try:
            result = _score_one(card, metrics, extracted, kept)
        except UserError as error:
            scores[card.name] = record.Score(value=None, reason=str(error), **common)
            continue
        scores[card.name] = record.Score(
            value=result.value,
            ci95=result.ci95,
            ci_method=result.ci_method,
            n_reference=result.n_reference,
            n_generated=result.n_generated,
            warnings=list(result.warnings),
            details=result.details,
            **common,
        )
    return scores


def _score_one(card: MetricCard, metrics: Metrics, extracted: Extracted, kept: Sequence[str]) -> Any:
    if card.name in metrics.sets:
        metric = metrics.sets[card.name]
        key = extractor_key(metric)
        real = [extracted.reference.get(key, {})[i] for i in kept if i in extracted.reference.get(key, {})]
        made = [i for i in kept if i in extracted.generated.get(key, {})]
        if not real or not made:
            raise UserError(f"{len(real)} reference and {len(made)} generated clips: nothing to compare")
        groups = [extracted.groups.get(i, i) for i in made]
        return metric.score(torch.stack(real), torch.stack([extracted.generated[key][i] for i in made]), groups)
    metric = metrics.clips[card.name]
    table = extracted.values.get(card.name, {})
    made = [i for i in kept if i in table]
    if not made:
        raise UserError("no generated clip could be scored")
    result = metric.score([table[i] for i in made], [extracted.groups.get(i, i) for i in made])
    real_table = extracted.reference_values.get(card.name)
    if real_table:
        of_real = metric.score([real_table[i] for i in kept if i in real_table], None)
        result.details["reference_value"] = of_real.value
    return result


def per_clip_rows(extracted: Extracted, order: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of per_clip.jsonl: each clip's values under every per-clip metric."""
    rows = []
    for clip_id in order:
        values = {name: table[clip_id] for name, table in extracted.values.items() if clip_id in table}
        of_real = {name: table[clip_id] for name, table in extracted.reference_values.items() if clip_id in table}
        row: dict[str, Any] = {"id": clip_id, **values}
        rows.append(row | ({"reference": of_real} if of_real else {}))
    return rows
