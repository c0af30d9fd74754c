"""Why two numbers differ: score the clips of a run again under other common choices, one at a time.

No clip is generated again. Each choice occurs in published code (docs/metrics.md); those that are mistakes are marked.
The table shows how much FVD and KVD change, and the intervals of the protocol's own values for comparison.
"""

import contextlib
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcbench import video
from dcbench.catalogue import find_metric
from dcbench.clips import resize
from dcbench.errors import UserError, near_match
from dcbench.escape import markdown
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, SetDistance
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.design import Design
from dcbench.metrics.distances import kernel_of, score_frechet, score_kernel
from dcbench.metrics.extractors import I3DExtractor, i3d_extractor
from dcbench.protocol import Protocol
from dcbench.record import Case, Failure
from dcbench.runs import planning
from dcbench.runs.directory import CLEANED
from dcbench.runs.run import Options, Run
from dcbench.runs.scoring import observe_all
from dcbench.seeding import generator

Source = Callable[[Run, Case], Tensor]  # -> uint8 [t 3 h w]
OTHER_FPS = 8.0
CRF = 23  # H.264's default


@dataclass(frozen=True)
class Choice:
    """One changed choice: how both sides are read, the extractor, and changed fields of the protocol."""

    name: str
    what: str  # for the table
    reference: Source
    generated: Source
    extractor: FeatureExtractor
    is_mistake: bool = False
    protocol: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """FVD and KVD under one choice, and those under the protocol (`base_`) on the same clips."""

    name: str
    what: str
    n: int
    fvd: float
    base_fvd: float
    kvd: float
    base_kvd: float
    is_mistake: bool = False


class OtherRange(I3DExtractor):
    """I3D with input pixels in [low, high]. It was trained on [-1, 1]."""

    def __init__(self, base: I3DExtractor, low: float, high: float) -> None:
        torch.nn.Module.__init__(self)  # I3DExtractor.__init__ would load the network again
        self.network, self.weights_sha256 = base.network, base.weights_sha256
        self.mode, self.batch_size, self.low, self.high = base.mode, base.batch_size, low, high
        self.preprocessing = f"{base.mode}, input in [{low:g}, {high:g}]"

    def prepare(self, clips: Tensor) -> Tensor:
        return (super().prepare(clips) + 1) * ((self.high - self.low) / 2) + self.low


def other_epsilon(base: I3DExtractor, epsilon: float) -> I3DExtractor:
    """A copy of `base` with another batch-norm epsilon (1e-5 is PyTorch's; the original network has 1e-3)."""
    changed = copy.copy(base)
    changed._modules = {"network": copy.deepcopy(base.network)}
    for layer in changed.network.modules():
        if isinstance(layer, torch.nn.BatchNorm3d):
            layer.eps = epsilon
    changed.name = f"{base.name}, batch-norm eps {epsilon:g}"
    return changed


# Where the pixels come from ---------------------------------------------------------------------------------------


def own_reference(run: Run, case: Case) -> Tensor:
    return run.reference(case)[0]


def own_generated(run: Run, case: Case) -> Tensor:
    return run.generated(case)


def resized(mode: str | None = None, antialias: bool | None = None) -> Source:
    """The reference at the protocol's size, with another resize mode or antialias."""

    def read(run: Run, case: Case) -> Tensor:
        p = run.protocol
        clip, _ = video.read(run.item(case).video, case.frames)
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
    """As many reference frames from the same first frame, but `stride` source frames apart."""

    def read(run: Run, case: Case) -> Tensor:
        frames = [case.frames[0] + stride * k for k in range(len(case.frames))]
        clip, _ = video.read(run.item(case).video, frames)
        return run.to_size(clip)

    return read


def at_fps(fps: float) -> Source:
    """As many reference frames from the same first frame, chosen for another frame rate: the nearest in time."""

    def read(run: Run, case: Case) -> Tensor:
        step = case.fps * case.frame_stride / fps
        frames = [case.frames[0] + round(step * k) for k in range(len(case.frames))]
        clip, _ = video.read(run.item(case).video, frames)
        return run.to_size(clip)

    return read


def first_videos(run: Run) -> Source:
    """Instead of each clip's own reference, one of the dataset's first videos in sorted order, from its first frame."""
    compared = [case.apart or case for case in run.cases]
    others = dict(zip((case.id for case in compared), sorted(run.items), strict=False))

    def read(run: Run, case: Case) -> Tensor:
        clip, _ = video.read(run.items[others[case.id]].video, [frame - case.frames[0] for frame in case.frames])
        return run.to_size(clip)

    return read


def by_decoder(name: str) -> Source:
    def read(run: Run, case: Case) -> Tensor:
        item = run.item(case)
        assert isinstance(item.video, video.VideoFile)
        clip, _ = video.read(replace(item.video, decoder=name), case.frames)
        return run.to_size(clip)

    return read


def through_mp4(run: Run, case: Case) -> Tensor:
    """The generated clip, written to an H.264 file and read back."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        video.write_mp4(path, own_generated(run, case), case.fps, crf=CRF)
        return video.read_clip(path)[0]


def _fits(protocol: Protocol, option: str, value: str) -> bool:
    """Whether the protocol may have another value of a field."""
    with contextlib.suppress(ValueError):
        return bool(Protocol.model_validate(protocol.model_dump() | {option: value}))
    return False


# The choices -------------------------------------------------------------------------------------------------------


def choices(run: Run, base: I3DExtractor, i3d: Sequence[Path] = ()) -> list[Choice]:
    """Every choice that is possible for this run. `i3d`: other files of the network's weights, a choice for each."""
    p, device = run.protocol, str(next(base.network.parameters()).device)
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
    if p.chunks == "one" and sorted(case.item_id for case in run.cases) != sorted(run.items)[: len(run.cases)]:
        what = f"reference: the dataset's first {len(run.cases)} videos, not those of the clips"
        found.append(Choice("reference-first", what, first_videos(run), own_generated, base, True))
    found += [
        Choice(name, what, *own, base, protocol={option: value})
        for name, what, option, value in (
            ("disjoint", "reference: other videos than those animated", "reference_videos", "disjoint"),
            ("paired", "reference: the videos that are animated", "reference_videos", "paired"),
            ("without-condition", "the condition frame left out of both sides", "scored_frames", "without_condition"),
            ("with-condition", "the condition frame kept on both sides", "scored_frames", "all"),
        )
        if getattr(p, option) != value and _fits(p, option, value)
    ]
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
    items = [run.items[case.source_id] for case in run.cases if case.source_id in run.items]
    if all(isinstance(item.video, video.VideoFile) for item in items):
        for name in ("decord", "pyav") if video.has_decord() else ():
            found.append(
                Choice(f"decoder-{name}", f"reference decoded by {name}", by_decoder(name), own_generated, base)
            )
    return found


def is_torchscript(extractor: I3DExtractor) -> bool:
    return not any(isinstance(layer, torch.nn.BatchNorm3d) for layer in extractor.network.modules())


@dataclass(frozen=True)
class Sensitivity:
    """The scores under the protocol, and a row for each choice. `skipped`: choices that are not possible, and why."""

    base_fvd: float
    base_fvd_ci95: tuple[float, float] | None
    base_kvd: float
    base_kvd_ci95: tuple[float, float] | None
    n: int
    rows: list[Outcome]
    skipped: list[str]

    def markdown(self) -> str:
        """A Markdown table. The largest change of FVD comes first."""
        lines = [
            "| what is done otherwise | N | FVD | change | KVD | change |",
            "|:--|--:|--:|--:|--:|--:|",
            f"| **nothing: the run's own protocol** | {self.n} | {self.base_fvd:.1f} {_range(self.base_fvd_ci95)} | | "
            f"{self.base_kvd:.2f} {_range(self.base_kvd_ci95)} | |",
        ]
        for row in sorted(self.rows, key=lambda row: -abs(row.fvd - row.base_fvd)):
            what = markdown(f"{row.what} (a mistake)" if row.is_mistake else row.what)
            lines.append(
                f"| {what} | {row.n} | {row.fvd:.1f} | {_change(row.fvd, row.base_fvd)} | {row.kvd:.2f} | "
                f"{row.kvd - row.base_kvd:+.2f} |"
            )
        notes = [f"\nnot possible here: {markdown(reason)}" for reason in self.skipped]
        return "\n".join(lines + notes) + "\n"


def _range(interval: tuple[float, float] | None) -> str:
    return f"[{interval[0]:.1f}, {interval[1]:.1f}]" if interval else ""


def _change(value: float, base: float) -> str:
    return f"{value - base:+.1f}" + (f" ({100 * (value - base) / base:+.0f} %)" if base > 1e-6 else "")


class Row(NamedTuple):
    """The features of a reference clip and of a generated clip, and the groups of these two."""

    real: Tensor
    made: Tensor
    real_group: str
    group: str


Features = dict[str, Row]  # by case id


def measure(
    path: Path,
    options: Options,
    only: Sequence[str] | None = None,
    limit: int | None = None,
    i3d: Sequence[Path] = (),
) -> Sensitivity:
    """Score the run at `path` again under each choice (or those named in `only`), on its first `limit` clips.

    `i3d`: other files of I3D's weights, a choice for each. Features are cached by pixels and extractor, so none are
    extracted twice. UserError for an unknown name in `only`, or fewer than 4 clips.
    """
    run = planning.reopen(path)
    if run.protocol.of_pictures:
        raise UserError(f"{path} has no reference clips: there is nothing to read in other ways")
    if run.directory.is_cleaned():
        raise UserError(f"{path} cannot be scored in other ways: {CLEANED}")
    run.cases = [case for case in run.cases if case.is_first]  # of several clips of an input, one
    cases = run.cases[:limit]
    if len(cases) < 4:
        raise UserError(f"{path} has {len(cases)} clips; at least 4 are needed to compare choices")
    base = i3d_extractor(find_metric("fvd").options["preprocessing"], options.runtime().device)
    offered = choices(run, base, i3d)
    _check_names(only, [choice.name for choice in offered])
    kernel = kernel_of(find_metric("kvd").options)
    features, failures = _features(run, cases, Choice("", "", own_reference, own_generated, base), options)
    kept = list(features)
    if len(kept) < 4:
        raise UserError(
            f"only {len(kept)} of {len(cases)} clips of {path} can be read; at least 4 are needed{_example(failures)}"
        )

    def distances(table: Features, ids: Sequence[str]) -> tuple[float, float]:
        real, made, design = _sides(table, ids)
        return fn.frechet_distance(real, made), fn.kernel_distance(real, made, kernel, groups=design)

    rows, skipped = [], []
    for choice in offered:
        if only and choice.name not in only:
            continue
        try:
            changed, failures = _features(run, [case for case in cases if case.id in features], choice, options)
        except UserError as error:
            skipped.append(f"{choice.what}: {error}")
            continue
        if len(changed) < 4:
            lost = f"{len(kept) - len(changed)} of {len(kept)} clips cannot be read in this way"
            skipped.append(f"{choice.what}: {lost}{_example(failures)}")
            continue
        ids = list(changed)
        pairs = _pairs(distances(changed, ids), distances(features, ids))
        rows.append(Outcome(choice.name, choice.what, len(ids), *pairs, choice.is_mistake))
    if not only:
        rows += _fewer_clips(features, kept, distances)
        rows.append(_other_covariance(features, kept, distances))
    real, made, design = _sides(features, kept)
    fvd, kvd = score_frechet(real, made, design), score_kernel(real, made, design, kernel)
    assert fvd.value is not None and kvd.value is not None
    return Sensitivity(fvd.value, fvd.ci95, kvd.value, kvd.ci95, len(kept), rows, skipped)


def _sides(table: Features, ids: Sequence[str]) -> tuple[Tensor, Tensor, Design]:
    """The rows of the reference clips and of the generated clips, and which of them depend on each other."""
    rows = [table[i] for i in ids]
    design = Design.of([row.real_group for row in rows], [row.group for row in rows])
    return torch.stack([row.real for row in rows]), torch.stack([row.made for row in rows]), design


def _check_names(only: Sequence[str] | None, names: Sequence[str]) -> None:
    for name in only or ():
        if name not in names:
            raise UserError(f'no choice is called "{name}".{near_match(name, names)} Known: {", ".join(names)}.')


def _example(failures: Sequence[Failure]) -> str:
    return f"; for example {failures[0].id}: {failures[0].reason}" if failures else ""


def _pairs(changed: tuple[float, float], own: tuple[float, float]) -> tuple[float, float, float, float]:
    return changed[0], own[0], changed[1], own[1]


class OtherwiseRead(Run):
    """A run whose pixels are read by the sources of a choice, and compared as its fields of the protocol say."""

    def __init__(self, own: Run, cases: Sequence[Case], choice: Choice) -> None:
        protocol = own.protocol.model_copy(update=choice.protocol)
        super().__init__(own.directory, own.plan, list(cases), protocol, own.items, own.model, own.folder)
        self.own, self.choice = own, choice

    def reference(self, case: Case, frames: Sequence[int] | None = None) -> tuple[Tensor, str]:
        if case.apart and self.protocol.reference_videos == "disjoint":
            return self.own.reference(case)  # it is not compared; the one apart is
        return self.choice.reference(self.own, case), "by the choice"

    def generated(self, case: Case) -> Tensor:
        return self.choice.generated(self.own, case)


def _features(run: Run, cases: Sequence[Case], choice: Choice, options: Options) -> tuple[Features, list[Failure]]:
    """The features of the cases under a choice, and the clips that cannot be read: they are left out."""
    if choice.protocol.get("reference_videos") == "disjoint":
        cases = planning.choose_apart(run, cases, options.quiet)
    metric = SetDistance(find_metric("fvd"), choice.extractor, score_frechet)
    changed = OtherwiseRead(run, cases, choice)
    seen = observe_all(changed, [metric], options, FeatureCache(), choice.name or "own protocol")
    real, made = (side.get(metric.observation_key, {}) for side in (seen.reference, seen.generated))
    rows: Features = {}
    for case in cases:
        if case.id in made and case.id in real:
            other = (changed.protocol.reference_videos == "disjoint" and case.apart) or case
            rows[case.id] = Row(real[case.id], made[case.id], other.cluster, case.cluster)
    lacking = seen.lacking.get(metric.observation_key, {})
    return rows, [*seen.failures, *(Failure(id=clip_id, reason=reason) for clip_id, reason in lacking.items())]


def _fewer_clips(features: Features, kept: Sequence[str], distances: Callable) -> list[Outcome]:
    """FVD and KVD of half of the clips: a random half, and the first half in sorted order (on UCF-101, few classes)."""
    half = max(2, len(kept) // 2)
    shuffled = torch.randperm(len(kept), generator=generator(0)).tolist()
    whole = distances(features, kept)
    found = []
    for name, what, ids in (
        ("half-random", f"{half} clips at random, not {len(kept)}", [kept[i] for i in shuffled[:half]]),
        ("half-first", f"the first {half} clips in sorted order", sorted(kept)[:half]),
    ):
        found.append(Outcome(name, what, half, *_pairs(distances(features, ids), whole), name == "half-first"))
    return found


def _other_covariance(features: Features, kept: Sequence[str], distances: Callable) -> Outcome:
    """FVD with covariances over n, not n - 1: its covariance part is multiplied by (n - 1) / n."""
    real, made, _ = _sides(features, kept)
    fvd, kvd = distances(features, kept)
    means = float((real.double().mean(0) - made.double().mean(0)).square().sum())
    biased = means + (fvd - means) * (len(kept) - 1) / len(kept)
    return Outcome(
        "covariance-n", "covariance over n, not n - 1 (StyleGAN-V, cd-fvd)", len(kept), biased, fvd, kvd, kvd
    )
