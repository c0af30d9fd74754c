"""FVD and KVD: distances between the features of two sets of clips, with intervals and warnings.

`runs/scoring.py` calls them with cached features. `stateful.py` has the same scores as `torchmetrics.Metric`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import NO_INTERVAL, SetDistance
from dcbench.metrics.extractors import I3DExtractor, i3d_extractor
from dcbench.record import Score

RECOMMENDED_CLIPS = 1024  # with fewer, FVD of a distribution against itself exceeds 58 on Kinetics logits


def small_sample_warnings(real: Tensor, generated: Tensor, biased: bool) -> list[str]:
    """Warnings about the sizes of two sets [n d] and [m d]. `biased`: fewer clips give a larger value, as for FVD."""
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
    return found


def make_blocks(real: Tensor, generated: Tensor, groups: Sequence[str] | None) -> list[Tensor]:
    """Blocks of rows for the jackknife. `groups`: the source video of each generated clip; ignored if there are more
    reference clips. For sets of one size they apply to both: each clip starts from a frame of its reference."""
    longer = max(len(real), len(generated))
    return fn.make_blocks(longer, groups if groups is not None and len(groups) == longer else None)


def score_statistic(
    statistic: Callable[[Tensor, Tensor], float],
    real: Tensor,
    generated: Tensor,
    groups: Sequence[str] | None = None,
    lowest: float = -math.inf,
    highest: float = math.inf,
    interval: bool = True,
) -> tuple[Score, fn.Jackknife | None]:
    """The statistic of [n d] and [m d] with its delete-a-block jackknife interval, limited to [lowest, highest]."""
    value = statistic(real, generated)
    score = Score(value=value, ci_method=NO_INTERVAL, n_reference=len(real), n_generated=len(generated))
    blocks = make_blocks(real, generated, groups) if interval else []
    if not blocks:
        return score, None
    result = fn.jackknife(statistic, real, generated, blocks, value)
    low, high = fn.student_interval(value, result.standard_error, result.degrees)
    score.ci95 = (max(low, lowest), min(high, highest))
    score.ci_method = f"jackknife over {len(blocks)} blocks{_by(groups)}"
    return score, result


def _by(groups: Sequence[str] | None) -> str:
    return " of source videos" if groups is not None and len(set(groups)) < len(groups) else ""


def score_frechet(real: Tensor, generated: Tensor, groups: Sequence[str] | None = None, interval: bool = True) -> Score:
    """FVD with a delete-a-block jackknife interval.

    The interval is for the expected FVD at this sample size. `fn.frechet_infinity` estimates FVD for infinite samples.
    """
    real, generated = fn.check_features(real, generated)
    score, result = score_statistic(fn.frechet_distance, real, generated, groups, lowest=0.0, interval=interval)
    score.details["definition"] = "|μ1-μ2|² + tr(Σ1+Σ2-2√(Σ1Σ2)), covariances with n-1, float64"
    if result:
        score.details |= {"standard_error": result.standard_error, "bias_corrected": result.bias_corrected}
    score.warnings = small_sample_warnings(real, generated, biased=True)
    return score


def score_frechet_infinity(real: Tensor, generated: Tensor, groups: Sequence[str] | None = None) -> Score:
    """FVD extrapolated to infinitely many clips. `details` has the points and coefficients of the fitted curve."""
    real, generated = fn.check_features(real, generated)
    blocks = make_blocks(real, generated, groups)
    fit = fn.frechet_infinity(real, generated, blocks)
    fewest, warned = min(len(real), len(generated)), []
    if fewest < 512:
        warned = [f"{fewest} clips: the extrapolation is rough with fewer than 512"]
    return Score(
        value=fit.value,
        ci95=fit.ci95,
        ci_method=f"jackknife of the whole fit over {len(blocks)} blocks{_by(groups)}" if fit.ci95 else NO_INTERVAL,
        n_reference=len(real),
        n_generated=len(generated),
        warnings=warned,
        details={"sizes": list(fit.sizes), "values": list(fit.values), "coefficients": list(fit.coefficients)},
    )


def score_kernel(
    real: Tensor,
    generated: Tensor,
    groups: Sequence[str] | None = None,
    kernel: fn.PolynomialKernel = fn.CUBIC,
    interval: bool = True,
) -> Score:
    """KVD (unbiased, full sets, x1) with a delete-a-block jackknife interval and a permutation p value.

    For sets of one size and one clip per video, `details` also has the analytic standard error. Below about a thousand
    clips, its intervals miss the true value too often: the cubic kernel of logits has heavy tails (docs/metrics.md).
    """
    real, generated = fn.check_features(real, generated)
    statistic = partial(fn.kernel_distance, kernel=kernel)
    score, result = score_statistic(statistic, real, generated, groups, interval=interval)
    score.details |= {"kernel": str(kernel), "estimator": "unbiased, full sets, x1"}
    if result:
        score.details["standard_error"] = result.standard_error
        score.details["p_same_distribution"] = fn.kernel_permutation_p(real, generated, kernel)
        if len(real) == len(generated) and (groups is None or len(set(groups)) == len(groups)):
            score.details["analytic_standard_error"] = fn.kernel_distance_variance(real, generated, kernel) ** 0.5
    score.warnings = small_sample_warnings(real, generated, biased=False)
    return score


def manifold_measure(measure: str, neighbours: int, real: Tensor, generated: Tensor) -> float:
    return getattr(fn.manifold_metrics(real, generated, neighbours), measure)


def score_manifold(
    measure: str, real: Tensor, generated: Tensor, groups: Sequence[str] | None = None, neighbours: int = 5
) -> Score:
    """One of precision, recall, density, coverage, with a delete-a-block jackknife interval."""
    real, generated = fn.check_features(real, generated)
    fewest = min(len(real), len(generated))
    score, _ = score_statistic(
        partial(manifold_measure, measure, neighbours),
        real,
        generated,
        groups,
        lowest=0.0,
        highest=math.inf if measure == "density" else 1.0,
        interval=fewest > 2 * neighbours,
    )
    score.details["neighbours"] = neighbours
    if fewest < RECOMMENDED_CLIPS:
        score.warnings = [f"{fewest} clips: {measure} is steady from about a thousand"]
    return score


def _i3d(card: MetricCard, runtime: Any) -> I3DExtractor:
    return i3d_extractor(card.options.get("preprocessing", "squash"), runtime.device)


def build_fvd(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `fvd` card; options: preprocessing."""
    return SetDistance(card, _i3d(card, runtime), score_frechet, fn.frechet_distance)


def build_fvd_infinity(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `fvd_infinity` card; options: preprocessing."""
    extractor = _i3d(card, runtime)
    return SetDistance(card, extractor, score_frechet_infinity, lambda a, b: fn.frechet_infinity(a, b).value)


def build_kvd(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `kvd` card; options: preprocessing, degree, coef0, gamma ("1/d" or a number)."""
    kernel = kernel_of(card.options)
    return SetDistance(
        card, _i3d(card, runtime), partial(score_kernel, kernel=kernel), partial(fn.kernel_distance, kernel=kernel)
    )


def build_manifold(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of `precision`, `recall`, `density`, `coverage`; options: measure, neighbours, preprocessing."""
    measure, neighbours = card.options.get("measure", card.name), int(card.options.get("neighbours", 5))
    if measure not in ("precision", "recall", "density", "coverage"):
        raise UserError(f'{card.name}: options.measure is "{measure}"; allowed: precision, recall, density, coverage')
    return SetDistance(
        card,
        _i3d(card, runtime),
        partial(score_manifold, measure, neighbours=neighbours),
        partial(manifold_measure, measure, neighbours),
    )


def kernel_of(options: dict[str, Any]) -> fn.PolynomialKernel:
    """The kernel with the degree, gamma and coef0 of a card's options."""
    gamma = options.get("gamma", "1/d")
    return fn.PolynomialKernel(
        int(options.get("degree", 3)), None if gamma == "1/d" else float(gamma), float(options.get("coef0", 1.0))
    )
