"""FVD and KVD: distances between the features of two sets of clips, with intervals and warnings.

`runs/scoring.py` calls them with cached features. `stateful.py` has the same scores as `torchmetrics.Metric`.
"""

from functools import partial
from typing import Any

from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import SetDistance, score_statistic
from dcbench.metrics.design import Design, Groups
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


def score_frechet(real: Tensor, generated: Tensor, groups: Groups = None, interval: bool = True) -> Score:
    """FVD with a delete-a-block jackknife interval.

    The interval is for the expected FVD at this number of clips. Its bias is smaller if a generated clip resembles its
    own reference: `bias_corrected` in `details` is the jackknife's estimate without the bias.
    """
    score = score_statistic(_frechet, real, generated, groups, lowest=0.0, interval=interval, biased=True)
    score.details["definition"] = "|μ1-μ2|² + tr(Σ1+Σ2-2√(Σ1Σ2)), covariances with n-1, float64"
    score.warnings = small_sample_warnings(real, generated, biased=True)
    return score


def _frechet(real: Tensor, generated: Tensor, design: Design) -> float:
    return fn.frechet_distance(real, generated)


def score_frechet_infinity(real: Tensor, generated: Tensor, groups: Groups = None) -> Score:
    """FVD extrapolated to infinitely many clips. `details` has the points and coefficients of the fitted curve."""
    score = score_statistic(_infinity, real, generated, groups)
    fit = fn.frechet_infinity(real, generated, groups)
    if score.ci95:
        score.ci_method = score.ci_method.replace("jackknife", "jackknife of the whole fit")
    score.details |= {"sizes": list(fit.sizes), "values": list(fit.values), "coefficients": list(fit.coefficients)}
    if (score.n_groups or 0) < 512:
        score.warnings = [f"{score.n_groups} independent clips: the extrapolation is rough with fewer than 512"]
    return score


def _infinity(real: Tensor, generated: Tensor, design: Design) -> float:
    return fn.frechet_infinity(real, generated, design).value


def score_kernel(
    real: Tensor,
    generated: Tensor,
    groups: Groups = None,
    kernel: fn.PolynomialKernel = fn.CUBIC,
    interval: bool = True,
) -> Score:
    """KVD (unbiased, full sets, x1) with a delete-a-block jackknife interval and a permutation p value.

    Pairs of clips that depend on each other are left out. `details["all_pairs"]` is the value with them, as LVDM and
    TATS compute it. Below about a thousand clips, the interval misses the true value too often: the cubic kernel of
    logits has heavy tails (docs/metrics.md).
    """
    score = score_statistic(partial(_kernel, kernel), real, generated, groups, interval=interval)
    score.details |= {
        "kernel": str(kernel),
        "estimator": "unbiased, full sets, x1, without pairs of one group",
        "all_pairs": fn.kernel_distance(real, generated, kernel),
    }
    if interval:
        score.details["p_same_distribution"] = fn.kernel_permutation_p(real, generated, kernel, groups=groups)
    score.warnings = small_sample_warnings(real, generated, biased=False)
    return score


def _kernel(kernel: fn.PolynomialKernel, real: Tensor, generated: Tensor, design: Design) -> float:
    return fn.kernel_distance(real, generated, kernel, groups=design)


def score_all_pairs(
    real: Tensor, generated: Tensor, groups: Groups = None, kernel: fn.PolynomialKernel = fn.CUBIC
) -> Score:
    """KVD as LVDM and TATS compute it: a generated clip is also compared with its own reference."""
    statistic = partial(_all_pairs, kernel)
    score = score_statistic(statistic, real, generated, groups)
    score.details |= {"kernel": str(kernel), "estimator": "unbiased for independent clips, full sets, x1"}
    score.warnings = small_sample_warnings(real, generated, biased=False)
    return score


def _all_pairs(kernel: fn.PolynomialKernel, real: Tensor, generated: Tensor, design: Design) -> float:
    return fn.kernel_distance(real, generated, kernel)


def _manifold(measure: str, neighbours: int, real: Tensor, generated: Tensor, design: Design) -> float:
    return getattr(fn.manifold_metrics(real, generated, neighbours), measure)


def score_manifold(measure: str, real: Tensor, generated: Tensor, groups: Groups = None, neighbours: int = 5) -> Score:
    """One of precision, recall, density, coverage. All but density are shares, with Wilson's interval."""
    fewest = min(len(real), len(generated))
    score = score_statistic(
        partial(_manifold, measure, neighbours),
        real,
        generated,
        groups,
        lowest=0.0,
        interval=fewest > 2 * neighbours,
        is_share=measure != "density",
    )
    score.details["neighbours"] = neighbours
    if fewest < RECOMMENDED_CLIPS:
        score.warnings = [f"{fewest} clips: {measure} is steady from about a thousand"]
    return score


def _i3d(card: MetricCard, runtime: Any) -> I3DExtractor:
    return i3d_extractor(card.options.get("preprocessing", "squash"), runtime.device)


def build_fvd(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `fvd` card; options: preprocessing."""
    return SetDistance(card, _i3d(card, runtime), score_frechet, designed=_frechet, biased=True)


def build_fvd_infinity(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `fvd_infinity` card; options: preprocessing."""
    return SetDistance(card, _i3d(card, runtime), score_frechet_infinity, designed=_infinity, version=2)


def build_kvd(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `kvd` card; options: preprocessing, degree, coef0, gamma ("1/d" or a number)."""
    kernel = kernel_of(card.options)
    score, statistic = partial(score_kernel, kernel=kernel), partial(_kernel, kernel)
    return SetDistance(card, _i3d(card, runtime), score, designed=statistic, version=2)


def build_kvd_all_pairs(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of the `kvd_all_pairs` card; options as for `kvd`."""
    kernel = kernel_of(card.options)
    score, statistic = partial(score_all_pairs, kernel=kernel), partial(_all_pairs, kernel)
    return SetDistance(card, _i3d(card, runtime), score, designed=statistic)


def build_manifold(card: MetricCard, runtime: Any) -> SetDistance:
    """Entry point of `precision`, `recall`, `density`, `coverage`; options: measure, neighbours, preprocessing."""
    measure, neighbours = card.options.get("measure", card.name), int(card.options.get("neighbours", 5))
    if measure not in ("precision", "recall", "density", "coverage"):
        raise UserError(f'{card.name}: options.measure is "{measure}"; allowed: precision, recall, density, coverage')
    score, statistic = partial(score_manifold, measure, neighbours=neighbours), partial(_manifold, measure, neighbours)
    return SetDistance(card, _i3d(card, runtime), score, designed=statistic, version=2)


def kernel_of(options: dict[str, Any]) -> fn.PolynomialKernel:
    """The kernel with the degree, gamma and coef0 of a card's options."""
    gamma = options.get("gamma", "1/d")
    return fn.PolynomialKernel(
        int(options.get("degree", 3)), None if gamma == "1/d" else float(gamma), float(options.get("coef0", 1.0))
    )
