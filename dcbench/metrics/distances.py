"""FVD and KVD: distances between the features of two sets of clips.

`SetDistance` is what the runner calls with cached features; `FrechetVideoDistance` and `KernelVideoDistance` are the
same scores as `torchmetrics.Metric`, for a training loop or a notebook:

    fvd = FrechetVideoDistance()
    fvd.update(real_clips, real=True)        # uint8 [b, t, 3, h, w]
    fvd.update(generated_clips, real=False)
    print(fvd.compute(), fvd.compute_with_interval().ci95)
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, Score
from dcbench.metrics.extractors import Preprocessing, i3d_extractor

NO_INTERVAL = "none: fewer than 3 independent clips"
RECOMMENDED_CLIPS = 1024  # below, FVD of one distribution against itself is above 58 on Kinetics logits


def small_sample_warnings(real: Tensor, generated: Tensor, biased: bool) -> tuple[str, ...]:
    """What a reader must know about these sample sizes."""
    n, m, d = len(real), len(generated), real.shape[1]
    found = []
    if n != m:
        found.append(f"{n} reference and {m} generated clips: compare only with scores of the same two sizes")
    if min(n, m) <= d and biased:
        found.append(f"{min(n, m)} clips span fewer than the {d} feature dimensions: the covariances are singular")
    if min(n, m) < RECOMMENDED_CLIPS and biased:
        found.append(f"{min(n, m)} clips: the distance is biased upwards by about c / N; the paper used 2048")
    elif min(n, m) < RECOMMENDED_CLIPS:
        found.append(f"{min(n, m)} clips: the interval is wide; the paper used 2048")
    return tuple(found)


def score_frechet(real: Tensor, generated: Tensor, groups: Sequence[str] | None = None, interval: bool = True) -> Score:
    """FVD with a delete-a-block jackknife interval.

    The interval is for the expected FVD at this sample size; `frechet_infinity` estimates the limit of many clips.
    """
    real, generated = fn.check_features(real, generated)
    value = fn.frechet_distance(real, generated)
    details: dict[str, Any] = {"definition": "|μ1-μ2|² + tr(Σ1+Σ2-2√(Σ1Σ2)), covariances with n-1, float64"}
    ci95, method = None, NO_INTERVAL
    if interval and (blocks := _blocks(real, generated, groups)):
        result = fn.jackknife(fn.frechet_distance, real, generated, blocks, value)
        low, high = fn.student_interval(value, result.standard_error, result.degrees)
        ci95, method = (max(low, 0.0), high), f"jackknife over {len(blocks)} blocks{_by(groups)}"
        details |= {"standard_error": result.standard_error, "bias_corrected": result.bias_corrected}
    warned = small_sample_warnings(real, generated, biased=True)
    return Score(value, ci95, method, len(real), len(generated), warned, details)


def score_frechet_infinity(real: Tensor, generated: Tensor, groups: Sequence[str] | None = None) -> Score:
    """FVD extrapolated to infinitely many clips; the fitted curve stands in the details, ready to plot."""
    real, generated = fn.check_features(real, generated)
    blocks = _blocks(real, generated, groups)
    fit = fn.frechet_infinity(real, generated, blocks)
    details = {"sizes": list(fit.sizes), "values": list(fit.values), "coefficients": list(fit.coefficients)}
    method = f"jackknife of the whole fit over {len(blocks)} blocks{_by(groups)}" if fit.ci95 else NO_INTERVAL
    warned: tuple[str, ...] = ()
    if min(len(real), len(generated)) < 512:
        warned = (f"{min(len(real), len(generated))} clips: the extrapolation is rough; 512 or more make it steady",)
    return Score(fit.value, fit.ci95, method, len(real), len(generated), warned, details)


def score_kernel(
    real: Tensor,
    generated: Tensor,
    groups: Sequence[str] | None = None,
    kernel: fn.PolynomialKernel = fn.CUBIC,
    interval: bool = True,
) -> Score:
    """KVD (unbiased, full sets, x1) with an interval: analytic for equal sets of independent clips, else jackknife."""
    real, generated = fn.check_features(real, generated)
    value = fn.kernel_distance(real, generated, kernel)
    details: dict[str, Any] = {"kernel": str(kernel), "estimator": "unbiased, full sets, x1"}
    ci95, method = None, NO_INTERVAL
    if interval and (blocks := _blocks(real, generated, groups)):
        if len(real) == len(generated) and (groups is None or len(set(groups)) == len(groups)):
            error, degrees = fn.kernel_distance_variance(real, generated, kernel) ** 0.5, len(real) - 1
            method = "analytic variance of the unbiased MMD"
        else:
            result = fn.jackknife(lambda a, b: fn.kernel_distance(a, b, kernel), real, generated, blocks, value)
            error, degrees = result.standard_error, result.degrees
            method = f"jackknife over {len(blocks)} blocks{_by(groups)}"
        ci95 = fn.student_interval(value, error, degrees)
        details |= {
            "standard_error": error,
            "p_same_distribution": fn.kernel_permutation_p(real, generated, kernel),
        }
    warned = small_sample_warnings(real, generated, biased=False)
    return Score(value, ci95, method, len(real), len(generated), warned, details)


def _blocks(real: Tensor, generated: Tensor, groups: Sequence[str] | None) -> list[Tensor]:
    """Blocks of rows for the jackknife. Groups name the generated clips; they hold for the reference clips too when
    the two lists are as long, as they are when each clip was generated from a frame of its reference."""
    longer = max(len(real), len(generated))
    return fn.make_blocks(longer, groups if groups is not None and len(groups) == longer else None)


def _by(groups: Sequence[str] | None) -> str:
    return " of source videos" if groups is not None and len(set(groups)) < len(groups) else ""


class SetDistance:
    """A set metric of the runner: one extractor, one score."""

    def __init__(self, card: MetricCard, extractor: FeatureExtractor, score: Callable[..., Score]) -> None:
        self.card, self.extractor, self._score = card, extractor, score

    def extract(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [t c h w] each -> float32 [b d]"""
        return self.extractor.extract(clips)

    def score(self, real: Tensor, generated: Tensor, groups: Sequence[str] | None = None) -> Score:
        return self._score(real, generated, groups)


def build_fvd(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `fvd` card; options: preprocessing."""
    return SetDistance(card, i3d_extractor(card.options.get("preprocessing", "squash"), runtime.device), score_frechet)


def build_fvd_infinity(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `fvd_infinity` card; options: preprocessing."""
    extractor = i3d_extractor(card.options.get("preprocessing", "squash"), runtime.device)
    return SetDistance(card, extractor, score_frechet_infinity)


def build_kvd(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `kvd` card; options: preprocessing, degree, coef0, gamma ("1/d" or a number)."""
    return SetDistance(
        card,
        i3d_extractor(card.options.get("preprocessing", "squash"), runtime.device),
        lambda real, generated, groups: score_kernel(real, generated, groups, kernel_of(card.options)),
    )


def kernel_of(options: dict[str, Any]) -> fn.PolynomialKernel:
    """The kernel that a card's options name."""
    gamma = options.get("gamma", "1/d")
    return fn.PolynomialKernel(
        int(options.get("degree", 3)), None if gamma == "1/d" else float(gamma), float(options.get("coef0", 1.0))
    )


class _SetMetric(Metric):
    """State of a set metric: the features of every clip, in float64; gathered from all processes before `compute`."""

    higher_is_better = False
    is_differentiable = False
    full_state_update = False
    real_features: list[Tensor]
    generated_features: list[Tensor]

    def __init__(
        self, extractor: FeatureExtractor | None = None, preprocessing: Preprocessing = "squash", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self._given = extractor
        self._preprocessing: Preprocessing = preprocessing
        self.add_state("real_features", [], dist_reduce_fx=_join)
        self.add_state("generated_features", [], dist_reduce_fx=_join)

    @property
    def extractor(self) -> FeatureExtractor:
        """The given extractor, or the shared I3D; loaded when it is first needed."""
        if self._given is None:
            self._given = i3d_extractor(self._preprocessing, str(self.device))
        return self._given

    def update(self, clips: Tensor, real: bool) -> None:
        """uint8 [b, t, 3, h, w]; reference clips with real=True."""
        self.update_features(self.extractor(clips), real)

    def update_features(self, features: Tensor, real: bool) -> None:
        """[b, d], as the extractor returns them."""
        if features.ndim != 2:
            raise ValueError(f"expected features [b, d], got {list(features.shape)}")
        state = self.real_features if real else self.generated_features
        state.append(features.detach().to(self.device, torch.float64))
        self._computed = None

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """One tensor a state and process, so that processes with other numbers of batches, or none, gather alike."""
        self.real_features = [_join(self.real_features)]
        self.generated_features = [_join(self.generated_features)]
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """The distance as a float64 scalar; warns about sample sizes that make it hard to compare."""
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

    def _sets(self) -> tuple[Tensor, Tensor]:
        """Both sets in an order of their own, so that neither order nor sharding can change the last digit."""
        sets = []
        for name, state in (("reference", self.real_features), ("generated", self.generated_features)):
            features = _join(state).cpu()
            if not len(features):
                raise UserError(f"no {name} clips: call update(clips, real={name == 'reference'}) first")
            sets.append(_canonical_order(features))
        return sets[0], sets[1]


def _join(state: list[Tensor] | Tensor) -> Tensor:
    """The state's tensors as one; empty ones, which know no d, are left out."""
    parts = [part for part in ([state] if isinstance(state, Tensor) else state) if len(part)]
    return torch.cat(parts) if parts else torch.zeros(0, 0, dtype=torch.float64)


def _canonical_order(features: Tensor) -> Tensor:
    """Rows sorted, then shuffled by a fixed seed: neighbours in the sorted order would make the blocks too alike."""
    rows = features.tolist()
    order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__), dtype=torch.long)
    shuffle = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return features[order][shuffle]


class FrechetVideoDistance(_SetMetric):
    """FVD (Unterthiner et al., arXiv 1812.01717) over I3D logits, or over any other extractor's features.

    Args:
        extractor: a `FeatureExtractor`; None = the Kinetics-400 I3D.
        preprocessing: of that I3D: "squash", "crop", "tf1" or "aa". Part of the number: it moves FVD by hundreds.

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
