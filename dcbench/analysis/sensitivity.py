"""Why two numbers differ: the clips of a run scored again under other common choices, one at a time.

Nothing is generated again. Each choice stands in somebody's published code (docs/metrics.md); some are mistakes, and
are marked so. The table says how far FVD and KVD move, beside the interval of the protocol's own value.
"""

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dcbench import planning, run, scoring, video
from dcbench.catalogue import find_metric
from dcbench.clips import resize
from dcbench.errors import UserError, near_match
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.distances import kernel_of, score_frechet, score_kernel
from dcbench.metrics.extractors import I3DExtractor, i3d_extractor
from dcbench.progress import track
from dcbench.record import ManifestItem
from dcbench.seeding import generator

Source = Callable[[planning.Job, ManifestItem], Tensor]  # -> uint8 [t 3 h w]
OTHER_FPS = 8.0
CRF = 23  # H.264's default


@dataclass(frozen=True)
class Choice:
    """One thing done otherwise."""

    name: str
    what: str  # for the table
    reference: Source
    generated: Source
    extractor: FeatureExtractor
    is_mistake: bool = False


@dataclass(frozen=True)
class Row:
    """FVD and KVD under one choice, beside the protocol's own on the same clips."""

    name: str
    what: str
    n: int
    fvd: float
    base_fvd: float
    kvd: float
    base_kvd: float
    is_mistake: bool = False


class OtherRange(I3DExtractor):
    """I3D fed with pixels in another range than the [-1, 1] that it was trained on."""

    def __init__(self, base: I3DExtractor, low: float, high: float) -> None:
        torch.nn.Module.__init__(self)  # the network is the base's own
        self.network, self.weights_sha256 = base.network, base.weights_sha256
        self.mode, self.batch_size, self.low, self.high = base.mode, base.batch_size, low, high
        self.preprocessing = f"{base.mode}, input in [{low:g}, {high:g}]"

    def prepare(self, clips: Tensor) -> Tensor:
        return (super().prepare(clips) + 1) * ((self.high - self.low) / 2) + self.low


def other_epsilon(base: I3DExtractor, epsilon: float) -> I3DExtractor:
    """The network with PyTorch's batch-norm epsilon in place of the original's 1e-3."""
    changed = copy.copy(base)
    changed._modules = {"network": copy.deepcopy(base.network)}
    for layer in changed.network.modules():
        if isinstance(layer, torch.nn.BatchNorm3d):
            layer.eps = epsilon
    changed.name = f"{base.name}, batch-norm eps {epsilon:g}"
    return changed


# Where the pixels come from ---------------------------------------------------------------------------------------


def own_reference(job: planning.Job, entry: ManifestItem) -> Tensor:
    return run.reference_clip(job.items[entry.id], entry, job.protocol)[0]


def own_generated(job: planning.Job, entry: ManifestItem) -> Tensor:
    row = job.directory.finished_samples().get(entry.id)
    if row is None:
        raise video.VideoError(f"no clip was generated for {entry.id}")
    return run.generated_clip(job, entry, row)


def resized(mode: str | None = None, antialias: bool | None = None) -> Source:
    """The reference at the protocol's size, by another resize."""

    def read(job: planning.Job, entry: ManifestItem) -> Tensor:
        p = job.protocol
        clip, _ = video.read(job.items[entry.id].video, entry.frames)
        return resize(
            clip,
            p.height,
            p.width,
            mode or p.resize,  # type: ignore[arg-type]
            p.interpolation,
            p.antialias if antialias is None else antialias,
        )

    return read


def at_stride(stride: int) -> Source:
    """As many reference frames from the same start, but `stride` apart."""

    def read(job: planning.Job, entry: ManifestItem) -> Tensor:
        frames = [entry.frames[0] + stride * k for k in range(len(entry.frames))]
        clip, _ = video.read(job.items[entry.id].video, frames)
        return run.to_protocol_size(clip, job.protocol)

    return read


def at_fps(fps: float) -> Source:
    """As many reference frames from the same start, nearest in time to another frame rate."""

    def read(job: planning.Job, entry: ManifestItem) -> Tensor:
        step = entry.fps * entry.frame_stride / fps
        frames = [entry.frames[0] + round(step * k) for k in range(len(entry.frames))]
        clip, _ = video.read(job.items[entry.id].video, frames)
        return run.to_protocol_size(clip, job.protocol)

    return read


def first_videos(job: planning.Job) -> Source:
    """In place of each clip's own reference one of the dataset's first videos in sorted order, from its first frame."""
    others = dict(zip((entry.id for entry in job.manifest), sorted(job.items), strict=False))

    def read(job: planning.Job, entry: ManifestItem) -> Tensor:
        clip, _ = video.read(job.items[others[entry.id]].video, [frame - entry.frames[0] for frame in entry.frames])
        return run.to_protocol_size(clip, job.protocol)

    return read


def by_decoder(name: str) -> Source:
    def read(job: planning.Job, entry: ManifestItem) -> Tensor:
        item = job.items[entry.id]
        assert isinstance(item.video, video.VideoFile)
        clip, _ = video.read(replace(item.video, decoder=name), entry.frames)
        return run.to_protocol_size(clip, job.protocol)

    return read


def through_mp4(job: planning.Job, entry: ManifestItem) -> Tensor:
    """The generated clip as an H.264 file gives it back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.write_mp4(path, own_generated(job, entry), entry.fps, crf=CRF)
        return video.read_clip(path)[0]


# The choices -------------------------------------------------------------------------------------------------------


def choices(job: planning.Job, base: I3DExtractor, i3d: Sequence[Path] = ()) -> list[Choice]:
    """Every choice that makes sense for this run; `i3d`: other files of the network's weights."""
    p, device = job.protocol, str(next(base.network.parameters()).device)
    own: tuple[Source, Source] = (own_reference, own_generated)
    shown = {
        "squash": "I3D input squashed to 224 (StyleGAN-V, cd-fvd, LVDM)",
        "aa": "I3D input squashed with antialias",
        "tf1": "I3D input by TensorFlow's legacy bilinear (the reference)",
        "crop": "I3D input by short side and centre crop (VideoGPT)",
    }
    found = [
        Choice(f"i3d-{mode}", what, *own, i3d_extractor(mode, device))  # type: ignore[arg-type]
        for mode, what in shown.items()
        if mode != base.mode
    ]
    found += [
        Choice("range-0-1", "I3D input in [0, 1]", *own, OtherRange(base, 0, 1), True),
        Choice("range-0-255", "I3D input in [0, 255]", *own, OtherRange(base, 0, 255), True),
        Choice(
            "mp4", f"generated clips through H.264 at crf {CRF}, one side only", own_reference, through_mp4, base, True
        ),
    ]
    if not is_torchscript(base):
        what = "batch-norm eps 1e-5 (cd-fvd's port)"
        found.append(Choice("bn-eps", what, *own, other_epsilon(base, 1e-5)))
    for path in i3d:
        other = I3DExtractor(base.mode, path, device)
        same = "the same numbers" if other.weights_sha256 == base.weights_sha256 else "other numbers"
        found.append(Choice(f"i3d-file-{path.name}", f"I3D weights from {path.name} ({same})", *own, other))
    if sorted(entry.id for entry in job.manifest) != sorted(job.items)[: len(job.manifest)]:
        what = f"reference: the dataset's first {len(job.manifest)} videos, not those that were animated"
        found.append(Choice("reference-first", what, first_videos(job), own_generated, base, True))
    other_mode = "squash" if p.resize == "crop" else "crop"
    what = f"reference {'squashed' if other_mode == 'squash' else 'cropped'} to {p.width}x{p.height}, one side only"
    found.append(Choice(f"reference-{other_mode}", what, resized(mode=other_mode), own_generated, base, True))
    what = f"reference resized {'without' if p.antialias else 'with'} antialias, one side only"
    found.append(Choice("antialias", what, resized(antialias=not p.antialias), own_generated, base))
    for stride in (1, 2, 3):
        if stride != p.frame_stride:
            what = f"reference at stride {stride}, not {p.frame_stride}"
            found.append(Choice(f"stride-{stride}", what, at_stride(stride), own_generated, base, True))
    found.append(
        Choice(
            f"fps-{OTHER_FPS:g}",
            f"reference at {OTHER_FPS:g} frames a second",
            at_fps(OTHER_FPS),
            own_generated,
            base,
            True,
        )
    )
    if all(isinstance(job.items[entry.id].video, video.VideoFile) for entry in job.manifest if entry.id in job.items):
        for name in ("decord", "pyav") if video.has_decord() else ():
            found.append(
                Choice(f"decoder-{name}", f"reference decoded by {name}", by_decoder(name), own_generated, base)
            )
    return found


def is_torchscript(extractor: I3DExtractor) -> bool:
    return not any(isinstance(layer, torch.nn.BatchNorm3d) for layer in extractor.network.modules())


@dataclass(frozen=True)
class Sensitivity:
    """The protocol's own scores and a row for each choice."""

    base_fvd: float
    base_fvd_ci95: tuple[float, float] | None
    base_kvd: float
    base_kvd_ci95: tuple[float, float] | None
    n: int
    rows: list[Row]
    skipped: list[str]

    def markdown(self) -> str:
        """A table, largest change of FVD first."""
        lines = [
            "| what is done otherwise | N | FVD | change | KVD | change |",
            "|:--|--:|--:|--:|--:|--:|",
            f"| **nothing: the run's own protocol** | {self.n} | {self.base_fvd:.1f} {_range(self.base_fvd_ci95)} | | "
            f"{self.base_kvd:.2f} {_range(self.base_kvd_ci95)} | |",
        ]
        for row in sorted(self.rows, key=lambda row: -abs(row.fvd - row.base_fvd)):
            what = f"{row.what} (a mistake)" if row.is_mistake else row.what
            lines.append(
                f"| {what} | {row.n} | {row.fvd:.1f} | {_change(row.fvd, row.base_fvd)} | {row.kvd:.2f} | "
                f"{row.kvd - row.base_kvd:+.2f} |"
            )
        notes = [f"\nnot possible here: {reason}" for reason in self.skipped]
        return "\n".join(lines + notes) + "\n"


def _range(interval: tuple[float, float] | None) -> str:
    return f"[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""


def _change(value: float, base: float) -> str:
    return f"{value - base:+.1f}" + (f" ({100 * (value - base) / base:+.0f} %)" if base > 1e-6 else "")


def measure(
    path: Path,
    options: run.Options,
    only: Sequence[str] | None = None,
    limit: int | None = None,
    i3d: Sequence[Path] = (),
) -> Sensitivity:
    """Score the run at `path` again under each choice (or those named in `only`), on its first `limit` clips.

    `i3d`: other files of I3D's weights, each a choice of its own. Features are cached by pixels and extractor: a choice
    that changes no pixel costs nothing, nor does a second call.
    """
    job = planning.reopen(path)
    entries = job.manifest[:limit]
    if len(entries) < 4:
        raise UserError(f"{path} has {len(entries)} clips; at least 4 are needed to compare choices")
    base = i3d_extractor(find_metric("fvd").options["preprocessing"], options.runtime().device)
    offered = choices(job, base, i3d)
    _check_names(only, [choice.name for choice in offered])
    cache = FeatureCache()
    kernel = kernel_of(find_metric("kvd").options)
    usual = Choice("", "the run's own protocol", own_reference, own_generated, base)
    features = dict(_features(job, entries, usual, cache, options.quiet))
    kept = list(features)
    if len(kept) < 4:
        raise UserError(f"only {len(kept)} of {len(entries)} clips of {path} can be read; at least 4 are needed")

    def distances(table: dict[str, tuple[Tensor, Tensor]], ids: Sequence[str]) -> tuple[float, float]:
        real, made = (torch.stack([table[i][side] for i in ids]) for side in (0, 1))
        return fn.frechet_distance(real, made), fn.kernel_distance(real, made, kernel)

    rows, skipped = [], []
    for choice in offered:
        if only and choice.name not in only:
            continue
        changed = dict(_features(job, [e for e in entries if e.id in features], choice, cache, options.quiet))
        if len(changed) < 4:
            skipped.append(f"{choice.what}: {len(kept) - len(changed)} of {len(kept)} videos are too short for it")
            continue
        ids = list(changed)
        rows.append(
            Row(
                choice.name,
                choice.what,
                len(ids),
                *_pairs(distances(changed, ids), distances(features, ids)),
                choice.is_mistake,
            )
        )
    if not only:
        rows += _fewer_clips(features, kept, distances)
        rows.append(_other_covariance(features, kept, distances))
    real, made = (torch.stack([features[i][side] for i in kept]) for side in (0, 1))
    groups = [entry.group or entry.id for entry in entries if entry.id in features]
    fvd, kvd = score_frechet(real, made, groups), score_kernel(real, made, groups, kernel)
    return Sensitivity(fvd.value, fvd.ci95, kvd.value, kvd.ci95, len(kept), rows, skipped)


def _check_names(only: Sequence[str] | None, names: Sequence[str]) -> None:
    for name in only or ():
        if name not in names:
            raise UserError(f'no choice is called "{name}".{near_match(name, names)} Known: {", ".join(names)}.')


def _pairs(changed: tuple[float, float], own: tuple[float, float]) -> tuple[float, float, float, float]:
    return changed[0], own[0], changed[1], own[1]


def _features(
    job: planning.Job, entries: Sequence[ManifestItem], choice: Choice, cache: FeatureCache, quiet: bool
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """(clip id, its two rows of features); clips that the choice cannot read are left out."""
    key = scoring.extractor_key(_Holder(choice.extractor))  # type: ignore[arg-type]

    def read(entry: ManifestItem) -> tuple[Tensor, Tensor]:
        return choice.reference(job, entry), choice.generated(job, entry)

    read_all = zip(entries, video.in_order(read, entries, ahead=scoring.PREFETCH), strict=True)
    for entry, got in track(read_all, len(entries), choice.name or "own protocol", quiet=quiet):
        if isinstance(got, UserError):
            continue
        rows = []
        for clip in got:
            name = f"{key}-{scoring.pixels_sha256(clip)}"
            found = cache.get(name)
            if found is None:
                found = {"features": choice.extractor.extract([clip])[0]}
                cache.put(name, found)
            rows.append(found["features"])
        yield entry.id, (rows[0], rows[1])


@dataclass(frozen=True)
class _Holder:
    extractor: FeatureExtractor


def _fewer_clips(features: dict[str, tuple[Tensor, Tensor]], kept: Sequence[str], distances: Callable) -> list[Row]:
    """Half of the clips: a random half, and the first half in sorted order, which on UCF-101 means a few classes."""
    half = max(2, len(kept) // 2)
    shuffled = torch.randperm(len(kept), generator=generator(0)).tolist()
    whole = distances(features, kept)
    found = []
    for name, what, ids in (
        ("half-random", f"{half} clips at random, not {len(kept)}", [kept[i] for i in shuffled[:half]]),
        ("half-first", f"the first {half} clips in sorted order", sorted(kept)[:half]),
    ):
        found.append(Row(name, what, half, *_pairs(distances(features, ids), whole), name == "half-first"))
    return found


def _other_covariance(features: dict[str, tuple[Tensor, Tensor]], kept: Sequence[str], distances: Callable) -> Row:
    """Covariances over n in place of n - 1 scale the covariance part by (n - 1) / n."""
    real, made = (torch.stack([features[i][side] for i in kept]).double() for side in (0, 1))
    fvd, kvd = distances(features, kept)
    means = float((real.mean(0) - made.mean(0)).square().sum())
    biased = means + (fvd - means) * (len(kept) - 1) / len(kept)
    return Row("covariance-n", "covariance over n, not n - 1 (StyleGAN-V, cd-fvd)", len(kept), biased, fvd, kvd, kvd)
