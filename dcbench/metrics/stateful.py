"""The metrics as `torchmetrics.Metric`, for a training loop or a notebook.

    fvd = FrechetVideoDistance()
    fvd.update(real_clips, real=True)        # uint8 [b, t, 3, h, w]
    fvd.update(generated_clips, real=False)
    print(fvd.compute(), fvd.compute_with_interval().ci95)

    pic = PerceptualInputConformity()
    pic.update(generated_clips, images=images)  # uint8 [b, 3, h, w]

`update(..., groups=names)` says which clips depend on each other: those of one source video or one input image. In I2V,
a generated clip and the reference clip that it starts from have the same group.

Runs do not import this module, because importing torchmetrics takes ten seconds.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from dcbench.catalogue import MetricCard, find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import ClipMetric, FeatureExtractor, Score, View, score_values
from dcbench.metrics.design import Design, codes
from dcbench.metrics.distances import score_frechet, score_kernel
from dcbench.metrics.extractors import Preprocessing, i3d_extractor


class _SetMetric(Metric):
    """Base of the set metrics. State: float64 features and group of every clip, gathered before `compute`."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    real_features: list[Tensor]
    generated_features: list[Tensor]
    real_groups: list[Tensor]
    generated_groups: list[Tensor]

    def __init__(
        self, extractor: FeatureExtractor | None = None, preprocessing: Preprocessing = "squash", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._given = extractor
        self._preprocessing: Preprocessing = preprocessing
        _add_states(self, ("real_features", "generated_features"), torch.zeros(0, 0, dtype=torch.float64))
        _add_states(self, ("real_groups", "generated_groups"), NO_GROUPS)

    @property
    def extractor(self) -> FeatureExtractor:
        """The given extractor, or the shared I3D, loaded on first use."""
        if self._given is None:
            self._given = i3d_extractor(self._preprocessing, str(self.device))
        return self._given

    def update(self, clips: Tensor, real: bool, groups: Sequence[str] | None = None) -> None:
        """Add clips, uint8 [b, t, 3, h, w]. real=True: reference clips.

        `groups`: the source video or input image of each clip, for all clips or for none. A generated clip has the
        group of the reference clip that it starts from. Without groups, all clips are taken as independent.
        """
        self.update_features(self.extractor(clips), real, groups)
        self._update_count -= 1  # torchmetrics' wrapper of `update` has counted it already

    def update_features(self, features: Tensor, real: bool, groups: Sequence[str] | None = None) -> None:
        """Add features [b, d], as the extractor returns them. `groups`: as for `update`."""
        if features.ndim != 2:
            raise ValueError(f"expected features [b, d], got {list(features.shape)}")
        state = self.real_features if real else self.generated_features
        named = self.real_groups if real else self.generated_groups
        if len(features):
            _add_groups(named, groups, len(features), sum(map(len, state)), self.device)
        state.append(features.detach().to(self.device, torch.float64))
        self._computed = None  # as torchmetrics' wrapper of `update` does
        self._update_count += 1

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Join each state to one tensor, because processes may have different numbers of batches, or none."""
        for name, join in self._reductions.items():
            setattr(self, name, [join(getattr(self, name))])  # type: ignore[operator]
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """The distance as a float64 scalar. Warns if the sample sizes make it hard to compare."""
        score = self._score(interval=False)
        for message in score.warnings:
            warnings.warn(message, stacklevel=2)
        return torch.tensor(score.value, dtype=torch.float64)

    def compute_with_interval(self) -> Score:
        """The distance with its 95 % interval, sample sizes and warnings."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._score(interval=True)

    def _score(self, interval: bool) -> Score:
        raise NotImplementedError

    def _sets(self) -> tuple[Tensor, Tensor, Design | None]:
        """Both sets and their design. The scores do not depend on the order of the rows."""
        sides, named = [], []
        for name, state, of in (
            ("reference", self.real_features, self.real_groups),
            ("generated", self.generated_features, self.generated_groups),
        ):
            features, groups = _join(state).cpu(), _join(of, NO_GROUPS).cpu()
            if not len(features):
                raise UserError(f"no {name} clips: call update(clips, real={name == 'reference'}) first")
            sides.append(features)
            named.append(groups.numpy())
        given = [len(groups) for groups in named]
        if not any(given):
            return sides[0], sides[1], None
        if given != [len(side) for side in sides]:
            raise UserError(f"groups were given for {given[0]} reference and {given[1]} generated clips; {ALL_OR_NONE}")
        return sides[0], sides[1], Design(named[0], named[1])


NO_GROUPS = torch.zeros(0, dtype=torch.int64)
ALL_OR_NONE = "give the groups of all clips of both sides, or of none"


def _add_groups(state: list[Tensor], groups: Sequence[str] | None, count: int, before: int, device: Any) -> None:
    """Append the hashes of `count` group names. UserError if only some of the clips of a state have a group."""
    if groups is not None and len(groups) != count:
        raise UserError(f"{len(groups)} groups for {count} clips; give one group for each clip")
    if before and (groups is not None) != bool(sum(map(len, state))):
        raise UserError(f"earlier clips have {'no ' if groups is not None else ''}groups; {ALL_OR_NONE}")
    if groups is not None:
        state.append(torch.from_numpy(codes(groups)).to(device))


def _add_states(metric: Metric, names: Sequence[str], empty: Tensor) -> None:
    for name in names:
        metric.add_state(name, [], dist_reduce_fx=partial(_join, empty=empty))


def _join(state: list[Tensor] | Tensor, empty: Tensor = torch.zeros(0, 0, dtype=torch.float64)) -> Tensor:  # noqa: B008
    """The state's tensors as one; `empty` for none. Empty ones are left out, because their d is unknown."""
    parts = [part for part in ([state] if isinstance(state, Tensor) else state) if len(part)]
    return torch.cat(parts) if parts else empty


class FrechetVideoDistance(_SetMetric):
    """FVD (Unterthiner et al., arXiv 1812.01717) over I3D logits, or over any other extractor's features.

    Args:
        extractor: a `FeatureExtractor`; None = the Kinetics-400 I3D.
        preprocessing: resize for that I3D: "squash", "crop", "tf1" or "aa". It changes FVD by hundreds.

    Example:
        >>> import torch
        >>> from dcbench.metrics import FrechetVideoDistance
        >>> fvd = FrechetVideoDistance()
        >>> features = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> fvd.update_features(features, real=True)
        >>> fvd.update_features(features + 1, real=False)
        >>> round(fvd.compute_with_interval().value, 6)  # a shift by 1 in 8 dimensions
        8.0
    """

    def _score(self, interval: bool) -> Score:
        return score_frechet(*self._sets(), interval=interval)


class KernelVideoDistance(_SetMetric):
    """KVD: the unbiased squared MMD with k(x, y) = (xᵀy / d + 1)³ over I3D logits, full sets, x1.

    With `groups`, clips of one group are not compared with each other. Without, it is the KVD of LVDM and TATS.

    Args:
        extractor, preprocessing: as for `FrechetVideoDistance`.
        kernel: another polynomial kernel; its formula is part of the score.
    """

    def __init__(
        self,
        extractor: FeatureExtractor | None = None,
        preprocessing: Preprocessing = "squash",
        kernel: fn.PolynomialKernel = fn.CUBIC,
        **kwargs: Any,
    ) -> None:
        super().__init__(extractor, preprocessing, **kwargs)
        self.kernel = kernel

    def _score(self, interval: bool) -> Score:
        return score_kernel(*self._sets(), kernel=self.kernel, interval=interval)


class _ClipMean(Metric):
    """Base of the per-clip metrics. State: float64 value and group of every clip, gathered before `compute`."""

    higher_is_better = True
    is_differentiable = False
    full_state_update = False
    values: list[Tensor]
    groups: list[Tensor]

    def __init__(self, card: MetricCard, download: bool, metric: ClipMetric | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._card, self._download, self._metric = card, download, metric
        _add_states(self, ("values",), torch.zeros(0, dtype=torch.float64))
        _add_states(self, ("groups",), NO_GROUPS)

    @property
    def metric(self) -> ClipMetric:
        """The metric that computes a clip's value. Its network is loaded on first use."""
        if self._metric is None:
            # the fields of dcbench.models.base.Runtime that metrics read
            runtime = SimpleNamespace(device=str(self.device), offline=not self._download)
            self._metric = load_entry_point(self._card)(self._card, runtime)
        return self._metric

    def update(
        self,
        clips: Sequence[Tensor] | Tensor,
        images: Tensor | None = None,
        prompts: Sequence[str] | None = None,
        groups: Sequence[str] | None = None,
    ) -> None:
        """Add clips, uint8 [b, t, 3, h, w] or b of [t, 3, h, w]; if needed, images, uint8 [b, 3, h, w], or prompts.

        `groups`: the source video or input image of each clip, for all clips or for none.
        """
        inputs: dict[str, Sequence[Any] | Tensor | None] = {"image": images, "prompt": prompts}
        needed = {name: values for name, values in inputs.items() if name in self._card.needs}
        for name, values in needed.items():
            count = 0 if values is None else len(values)
            if count != len(clips):
                raise UserError(f"{self._card.name} needs one {name} for each of the {len(clips)} clips; got {count}")
        views = [View(clip, **{name: values[k] for name, values in needed.items()}) for k, clip in enumerate(clips)]  # type: ignore[index]
        if len(views):
            _add_groups(self.groups, groups, len(views), sum(map(len, self.values)), self.device)
        rows = [self.metric.observe(view) for view in views]
        self.values.append(torch.tensor([row["value"] for row in rows], dtype=torch.float64, device=self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Join each state to one tensor, as in the set metrics."""
        for name, join in self._reductions.items():
            setattr(self, name, [join(getattr(self, name))])  # type: ignore[operator]
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Mean over clips as a float64 scalar."""
        return torch.tensor(self._score().value, dtype=torch.float64)

    def compute_with_interval(self) -> Score:
        """The mean with its 95 % interval over groups; without groups, over clips."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, should_sync=self._to_sync, should_unsync=self._should_unsync
        ):
            return self._score()

    def _score(self) -> Score:
        groups = [str(code) for code in _join(self.groups, NO_GROUPS).tolist()]
        return score_values([{"value": value} for value in _join(self.values).flatten().tolist()], groups or None)


class PerceptualInputConformity(_ClipMean):
    """PIC (DynamiCrafter, arXiv 2310.12190, §4): mean over all frames of 1 - DreamSim(image, frame).

    Args:
        dreamsim_type: "ensemble", "dino_vitb16", "open_clip_vitb32", "clip_vitb32" or "synclr_vitb16".
        download: fetch missing weights. If False, missing weights are an error that names the command.
        metric: your own `dcbench.metrics.pic.ConformityMetric` instead of both.

    `update(clips, images=...)`.
    """

    def __init__(
        self, dreamsim_type: str = "ensemble", download: bool = False, metric: ClipMetric | None = None, **kwargs: Any
    ) -> None:
        card = find_metric("pic")
        card = card.model_copy(update={"options": {**card.options, "dreamsim_type": dreamsim_type}})
        super().__init__(card, download, metric, **kwargs)


class ClipSimilarity(_ClipMean):
    """Cosine of CLIP embeddings, by open_clip: not x100, not clamped.

    Args:
        kind: "text" (prompt and frame; `update(clips, prompts=...)`), "frames" (consecutive frames), "image" (input
            image and frame; `update(clips, images=...)`).
        model: an open_clip name, or the path of a JSON description; OpenAI's weights need "...-quickgelu".
        checkpoint: a file of weights; "" = OpenAI's ViT-B/32.
        download, metric: as for `PerceptualInputConformity`.
    """

    def __init__(
        self,
        kind: Literal["text", "frames", "image"] = "text",
        model: str = "ViT-B-32-quickgelu",
        checkpoint: str = "",
        download: bool = False,
        metric: ClipMetric | None = None,
        **kwargs: Any,
    ) -> None:
        card = find_metric(f"clip_{kind}")
        options = {**card.options, "model": model, "checkpoint": checkpoint}
        super().__init__(card.model_copy(update={"options": options}), download, metric, **kwargs)


class Motion(_ClipMean):
    """Mean length of the optical flow between consecutive frames, in pixels of a frame whose short side is 256.

    Example:
        >>> import torch
        >>> from dcbench.metrics import Motion
        >>> motion = Motion()
        >>> motion.update(torch.full((2, 9, 3, 64, 64), 128, dtype=torch.uint8))
        >>> float(motion.compute())  # nothing moves
        0.0
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(find_metric("motion"), download=False, metric=None, **kwargs)
