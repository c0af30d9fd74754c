"""A run: plan -> sample -> score -> record. Each step finds what is already there, so the same command continues."""

import contextlib
import datetime
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dcbench import machine, record, scoring, video
from dcbench.catalogue import load_entry_point
from dcbench.clips import resize
from dcbench.datasets.base import Item
from dcbench.errors import UserError
from dcbench.metrics.cache import FeatureCache
from dcbench.models.base import ChecksFirst, ImageToVideo, PreparesFirst, Request, Runtime, check_generated
from dcbench.planning import Job
from dcbench.progress import track
from dcbench.protocol import Protocol
from dcbench.ranks import barrier, gather, join_ranks, on_first_rank, rank, world_size
from dcbench.record import Cost, Failure, ManifestItem, Record


@dataclass(frozen=True)
class Options:
    """How to run what the plan says; none of these changes a clip (a batch above 1 may change rounding)."""

    device: str = "auto"
    dtype: str | None = None
    batch_size: int = 1
    offline: bool = True  # weights that are missing are named, not downloaded
    quiet: bool = False

    def runtime(self) -> Runtime:
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: this PyTorch sees no GPU. Use --device cpu or --device auto")
        if device == "cuda" and world_size() > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            torch.device(device)
        except RuntimeError as error:
            raise UserError(
                f"--device {device}: {str(error).splitlines()[0]}. For example: auto, cpu, cuda, cuda:1"
            ) from error
        return Runtime(device=device, dtype=self.dtype, offline=self.offline)


# --------------------------------------------------------------------------------------------------------------- sample


def reference_clip(
    item: Item, entry: ManifestItem, protocol: Protocol, frames: Sequence[int] | None = None
) -> tuple[Tensor, str]:
    """The reference clip (or some of its frames) as the protocol defines it, and the decoder that read it."""
    clip, decoder = video.read(item.video, entry.frames if frames is None else frames)
    return to_protocol_size(clip, protocol), decoder


def to_protocol_size(clip: Tensor, protocol: Protocol) -> Tensor:
    """uint8 [t 3 h w] -> uint8 [t 3 height width]"""
    return resize(clip, protocol.height, protocol.width, protocol.resize, protocol.interpolation, protocol.antialias)


def build_request(job: Job, entry: ManifestItem, with_reference: bool) -> Request:
    item = job.items.get(entry.id)
    if item is None:
        raise video.VideoError(f"{entry.id} is not in the dataset any more")
    reference = reference_clip(item, entry, job.protocol)[0] if with_reference else None
    condition = entry.frames[entry.condition_frame]
    return Request(
        clip_id=entry.id,
        image=reference_clip(item, entry, job.protocol, [condition])[0][0],
        prompt=entry.prompt,
        num_frames=job.protocol.num_frames,
        fps=entry.fps,
        frame_stride=entry.frame_stride,
        seed=entry.seed,
        reference=reference,
    )


def sample(job: Job, options: Options) -> None:
    """Make every clip that is missing. Interrupt it at will."""
    join_ranks()
    held = job.directory.locked() if rank() == 0 else contextlib.nullcontext()
    with held:
        on_first_rank(job.directory.mend)
        finished = job.directory.finished_samples()
        missing = [entry for entry in job.manifest if entry.id not in finished]
        if missing:
            _check_room(job, missing)
            runtime = options.runtime()
            machine.forget_peak_memory()
            model: ImageToVideo = load_entry_point(job.model)(job.model, runtime)
            _check_model(model, missing)
            mine = missing[rank() :: world_size()]
            batches = [mine[i : i + options.batch_size] for i in range(0, len(mine), options.batch_size)]
            done = len(job.manifest) - len(missing)
            quiet = options.quiet or rank() > 0
            spent = _prepare(job, model, mine)
            facts = {
                "device": runtime.device,
                "dtype": runtime.dtype or "float32",
                "hardware": machine.hardware(runtime.device),
            }
            facts |= getattr(model, "facts", {})  # what a model alone knows: its precision, its weights
            for _ in track(
                _sample_batches(job, model, batches, facts, spent), len(mine) + done, "generating", done, quiet
            ):
                pass
        barrier()


def _check_model(model: ImageToVideo, missing: Sequence[ManifestItem]) -> None:
    if isinstance(model, ChecksFirst):
        model.check([entry.id for entry in missing])


def _prepare(job: Job, model: ImageToVideo, entries: Sequence[ManifestItem]) -> dict[str, float]:
    """Let a model that asks for it see all requests at once; seconds that it spent, by clip id."""
    if not isinstance(model, PreparesFirst):
        return {}

    def requests() -> Iterator[Request]:
        for entry in entries:
            with contextlib.suppress(UserError):  # a video that cannot be read is named when its turn comes
                yield build_request(job, entry, "reference" in model.conditions_on)

    return model.prepare(requests(), job.directory.path / "work")


def _check_room(job: Job, missing: Sequence[ManifestItem]) -> None:
    """Fail on what is cheap to check before the model loads."""
    free = shutil.disk_usage(job.directory.path).free
    needed = len(missing) * job.protocol.num_frames * job.protocol.height * job.protocol.width  # about a third of raw
    if free < needed:
        raise UserError(
            f"{job.directory.path}: {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed for "
            f"{len(missing)} clips. Free some room, or choose another disk: --out DIR"
        )


def _sample_batches(
    job: Job,
    model: ImageToVideo,
    batches: Sequence[Sequence[ManifestItem]],
    facts: dict[str, Any],
    spent: dict[str, float],
) -> Iterator[str]:
    with_reference = "reference" in model.conditions_on

    def read(batch: Sequence[ManifestItem]) -> list[Request | UserError]:
        requests: list[Request | UserError] = []
        for entry in batch:
            try:
                requests.append(build_request(job, entry, with_reference))
            except UserError as error:
                requests.append(error)
        return requests

    for batch, got in zip(batches, video.in_order(read, batches), strict=True):
        if isinstance(got, UserError):
            raise got
        for entry, request in zip(batch, got, strict=True):
            if isinstance(request, UserError):
                print(f"cannot read {entry.video} for clip {entry.id}: {request}", file=sys.stderr, flush=True)
        requests = [request for request in got if isinstance(request, Request)]
        start = time.perf_counter()
        made = model.generate(requests) if requests else []
        seconds = time.perf_counter() - start
        if len(made) != len(requests):
            raise UserError(f"model {job.model.name} returned {len(made)} clips for {len(requests)} requests")
        for request, clip in zip(requests, made, strict=True):
            clip = check_generated(clip, request, job.model.name).cpu()
            video.write_lossless(job.directory.clip(request.clip_id), clip, request.fps)
            job.directory.append_sample(
                {
                    "id": request.clip_id,
                    "sha256": scoring.pixels_sha256(clip),
                    "shape": list(clip.shape),
                    "seconds": round(seconds / len(requests) + spent.get(request.clip_id, 0), 4),
                    "peak_memory_mb": round(machine.peak_memory_mb(), 1),
                    **facts,
                }
            )
        yield from (entry.id for entry in batch)


# ---------------------------------------------------------------------------------------------------------------- score


def generated_clip(job: Job, entry: ManifestItem, row: dict[str, Any]) -> Tensor:
    """A finished clip, checked against its hash, at the protocol's size."""
    path = job.directory.clip(entry.id)
    clip, _ = video.read_clip(path)
    if scoring.pixels_sha256(clip) != row["sha256"]:
        raise UserError(
            f"{path} is not the clip that was made (its pixels changed). Remove it and run the same command again"
        )
    return to_protocol_size(clip, job.protocol)


def check_metrics(names: Sequence[str] | None) -> None:
    """Fail on an unknown metric before the first clip is made."""
    scoring.choose_metrics(names)


def score(job: Job, options: Options, metrics: Sequence[str] | None = None, strict: bool = True) -> Record:
    """Score every clip that is there and write per_clip.jsonl, record.json and cost.json.

    A metric that is named but cannot be built is an error; with `strict` off, its score says why it is missing.
    """
    join_ranks()
    start = time.perf_counter()
    held = job.directory.locked() if rank() == 0 else contextlib.nullcontext()
    with held:
        built = scoring.build_metrics(scoring.choose_metrics(metrics), options.runtime(), bool(metrics) and strict)
        extracted = extract(job, options, built, FeatureCache())
        seconds = time.perf_counter() - start
        return on_first_rank(lambda: _finish(job, options, built, extracted, seconds))


def extract(job: Job, options: Options, built: scoring.Metrics, cache: FeatureCache | None) -> scoring.Extracted:
    """Features and per-clip values of all clips of a run, each rank doing its share; the whole on every rank."""
    finished = job.directory.finished_samples()
    mine = job.manifest[rank() :: world_size()]
    extracted = scoring.Extracted()
    pairs = [_pair(job, entry, finished.get(entry.id), extracted.decoders) for entry in mine]
    quiet = options.quiet or rank() > 0
    for part in track(scoring.extract(pairs, built, cache), len(pairs), "scoring", quiet=quiet):
        extracted.merge(part)
    whole = scoring.Extracted()
    for part in gather(extracted):
        whole.merge(part)
    return whole


def _pair(job: Job, entry: ManifestItem, row: dict[str, Any] | None, decoders: dict[str, str]) -> scoring.Pair:
    def reference() -> Tensor:
        item = job.items.get(entry.id)
        if item is None:
            raise video.VideoError(f"{entry.video} is not in the dataset any more")
        clip, decoders[entry.id] = reference_clip(item, entry, job.protocol)
        return clip

    def generated() -> Tensor:
        if row is None:
            raise video.VideoError(f"no clip was generated for {entry.id}: its video {entry.video} could not be read")
        return generated_clip(job, entry, row)

    return scoring.Pair(entry.id, reference, generated, entry.condition_frame, entry.prompt, entry.group)


def _finish(
    job: Job,
    options: Options,
    built: scoring.Metrics,
    extracted: scoring.Extracted,
    seconds: float,
) -> Record:
    finished = job.directory.finished_samples()
    order = [entry.id for entry in job.manifest]
    scores = scoring.score(extracted, built, job.plan.fingerprint, order)
    rows = scoring.per_clip_rows(extracted, order)
    clips_sha256 = record.digest([[i, finished[i]["sha256"]] for i in order if i in finished], 64)
    if job.directory.record.is_file():  # keep what an earlier call scored with other metrics on the same clips
        before = record.read_record(job.directory.path)
        if before.clips_sha256 == clips_sha256:
            scores = {name: value for name, value in before.scores.items() if name not in scores} | scores
            old = {row["id"]: row for row in record.read_jsonl(job.directory.per_clip)}
            rows = [_merge_row(old.get(row["id"], {}), row) for row in rows]
    failures = sorted(extracted.failures, key=lambda failure: failure.id)
    failures += [Failure(id=lost.id, reason=lost.reason) for lost in job.plan.excluded if lost.rule == "unreadable"]
    result = Record(
        plan=job.plan,
        scores=dict(sorted(scores.items())),
        n_planned=len(order),
        n_scored=len(order) - len(extracted.failures),
        failures=failures,
        clips_sha256=clips_sha256,
        decoders=dict(sorted(Counter(extracted.decoders.values()).items())),
    )
    job.directory.write_per_clip(rows)
    record.write_json(job.directory.record, result)
    record.write_json(job.directory.cost, _cost(job, options, finished, seconds))
    return result


def _merge_row(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    reference = old.get("reference", {}) | new.get("reference", {})
    return old | new | ({"reference": reference} if reference else {})


def _cost(job: Job, options: Options, finished: dict[str, dict[str, Any]], seconds: float) -> Cost:
    rows = [finished[entry.id] for entry in job.manifest if entry.id in finished]
    per_clip = [row["seconds"] for row in rows]
    runtime = options.runtime()
    return Cost(
        seconds_per_clip=sum(per_clip) / len(per_clip) if per_clip else None,
        peak_memory_mb=max((row["peak_memory_mb"] for row in rows), default=None),
        sample_seconds=sum(per_clip),
        score_seconds=seconds,
        device=", ".join(_seen(rows, "device")) or runtime.device,
        dtype=", ".join(_seen(rows, "dtype")),
        hardware=", ".join(_seen(rows, "hardware")) or machine.hardware(runtime.device),
        git_commit=machine.git_commit(),
        finished=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        details={"steps": job.model.sampling.get("steps"), "weights": _seen(rows, "weights")},
    )


def _seen(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    """The values that the samples name: clips may have been made on another machine than they are scored on."""
    return sorted({row[key] for row in rows if row.get(key)})
