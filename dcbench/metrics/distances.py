"""FVD and KVD: distances between the features of two sets of clips, with intervals and warnings.

The runner calls these with cached features; `stateful.py` has the same scores as `torchmetrics.Metric`.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, Score
from dcbench.metrics.extractors import i3d_extractor

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
    """KVD (unbiased, full sets, x1) with a delete-a-block jackknife interval and a permutation p value.

    The interval from the analytic variance stands in the details for equal sets; it covers too seldom below about a
    thousand clips, because the cubic kernel of logits has heavy tails (docs/metrics.md).
    """
    real, generated = fn.check_features(real, generated)
    value = fn.kernel_distance(real, generated, kernel)
    details: dict[str, Any] = {"kernel": str(kernel), "estimator": "unbiased, full sets, x1"}
    ci95, method = None, NO_INTERVAL
    if interval and (blocks := _blocks(real, generated, groups)):
        result = fn.jackknife(lambda a, b: fn.kernel_distance(a, b, kernel), real, generated, blocks, value)
        ci95 = fn.student_interval(value, result.standard_error, result.degrees)
        method = f"jackknife over {len(blocks)} blocks{_by(groups)}"
        details["standard_error"] = result.standard_error
        details["p_same_distribution"] = fn.kernel_permutation_p(real, generated, kernel)
        if len(real) == len(generated) and (groups is None or len(set(groups)) == len(groups)):
            details["analytic_standard_error"] = fn.kernel_distance_variance(real, generated, kernel) ** 0.5
    warned = small_sample_warnings(real, generated, biased=False)
    return Score(value, ci95, method, len(real), len(generated), warned, details)


def _blocks(real: Tensor, generated: Tensor, groups: Sequence[str] | None) -> list[Tensor]:
    """Blocks of rows for the jackknife. Groups name the generated clips; they hold for the reference clips too when
    the two lists are as long, as they are when each clip was generated from a frame of its reference."""
    longer = max(len(real), len(generated))
    return fn.make_blocks(longer, groups if groups is not None and len(groups) == longer else None)


def _by(groups: Sequence[str] | None) -> str:
    return " of source videos" if groups is not None and len(set(groups)) < len(groups) else ""


def score_manifold(
    measure: str, real: Tensor, generated: Tensor, groups: Sequence[str] | None = None, neighbours: int = 5
) -> Score:
    """One of precision, recall, density, coverage, with a delete-a-block jackknife interval."""
    real, generated = fn.check_features(real, generated)

    def statistic(a: Tensor, b: Tensor) -> float:
        return getattr(fn.manifold_metrics(a, b, neighbours), measure)

    value = statistic(real, generated)
    blocks = _blocks(real, generated, groups)
    ci95, method = None, NO_INTERVAL
    if blocks and min(len(real), len(generated)) > 2 * neighbours:
        result = fn.jackknife(statistic, real, generated, blocks, value)
        low, high = fn.student_interval(value, result.standard_error, result.degrees)
        ci95 = (max(low, 0.0), high if measure == "density" else min(high, 1.0))
        method = f"jackknife over {len(blocks)} blocks{_by(groups)}"
    warned: tuple[str, ...] = ()
    if min(len(real), len(generated)) < RECOMMENDED_CLIPS:
        warned = (f"{min(len(real), len(generated))} clips: {measure} is steady from about a thousand",)
    return Score(value, ci95, method, len(real), len(generated), warned, {"neighbours": neighbours})


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


def build_manifold(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of `precision`, `recall`, `density`, `coverage`; options: measure, neighbours, preprocessing."""
    measure, neighbours = card.options.get("measure", card.name), int(card.options.get("neighbours", 5))
    if measure not in ("precision", "recall", "density", "coverage"):
        raise UserError(f'{card.name}: options.measure is "{measure}"; allowed: precision, recall, density, coverage')
    return SetDistance(
        card,
        i3d_extractor(card.options.get("preprocessing", "squash"), runtime.device),
        lambda real, generated, groups: score_manifold(measure, real, generated, groups, neighbours),
    )


def kernel_of(options: dict[str, Any]) -> fn.PolynomialKernel:
    """The kernel that a card's options name."""
    gamma = options.get("gamma", "1/d")
    return fn.PolynomialKernel(
        int(options.get("degree", 3)), None if gamma == "1/d" else float(gamma), float(options.get("coef0", 1.0))
    )
