"""Pure functions of features: distances between two sets, and their uncertainty. Everything is computed in float64.

Features are [n, d], one row per clip. docs/metrics.md defines the metrics and lists what other code computes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor

from dcbench.errors import UserError

Statistic = Callable[[Tensor, Tensor], float]


def check_features(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets as float64 [n, d] and [m, d]. UserError for NaN, infinity, different d or fewer than two rows."""
    for name, features in (("reference", real), ("generated", generated)):
        if features.ndim != 2:
            raise UserError(f"{name} features: got shape {list(features.shape)}, expected [clips, features]")
        if len(features) < 2:
            raise UserError(f"{len(features)} {name} clip(s): a distance between two sets needs at least 2 a side")
        bad = (~torch.isfinite(features).all(1)).nonzero().flatten().tolist()
        if bad:
            raise UserError(f"{name} features hold NaN or infinity in {len(bad)} row(s), the first is row {bad[0]}")
    if real.shape[1] != generated.shape[1]:
        raise UserError(
            f"reference features have {real.shape[1]} dimensions, generated ones {generated.shape[1]}: "
            "they come from different extractors"
        )
    return real.double(), generated.double()


# Fréchet distance ------------------------------------------------------------------------------------------------


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 √(Σ1 Σ2)), covariances with n - 1 (Unterthiner et al., arXiv 1812.01717).

    C holds the centred rows divided by √(n - 1), so Σ = CᵀC, and tr √(Σ1 Σ2) is the sum of the singular values of
    C1 C2ᵀ. No matrix root is needed. The value is exact for fewer clips than dimensions, and 0 (up to rounding) for
    identical sets.
    """
    real, generated = check_features(real, generated)
    mean_part = (real.mean(0) - generated.mean(0)).square().sum()
    roots = []
    for features in (real, generated):
        centred = (features - features.mean(0)) / math.sqrt(len(features) - 1)
        # CᵀC = RᵀR, and R is smaller if there are more rows than columns
        roots.append(torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred)
    covariance_part = sum(root.square().sum() for root in roots) - 2 * torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    return max(float(mean_part + covariance_part), 0.0)


@dataclass(frozen=True)
class Extrapolation:
    """The curve fitted to FVD against 1 / N."""

    value: float  # at 1 / N = 0
    coefficients: tuple[float, ...]  # of 1, 1/N, 1/N²
    sizes: tuple[int, ...]
    values: tuple[float, ...]  # mean over the subsets of each size
    ci95: tuple[float, float] | None = None


def frechet_infinity(
    real: Tensor,
    generated: Tensor,
    blocks: Sequence[Tensor] = (),
    points: int = 8,
    draws: int = 1,
    order: int = 2,
    seed: int = 0,
) -> Extrapolation:
    """The Fréchet distance of infinitely many clips: a + b / N + c / N², fitted over N/4 ... N (arXiv 1911.07023).

    The sizes are evenly spaced in 1 / N. Each value is the mean over disjoint subsets of `draws` seeded shuffles.
    `order` 1 is the straight line of the paper; it is biased below about 4 d clips (docs/metrics.md). If the sets
    differ in size, N is the smaller size, and the other set is thinned in proportion. With `blocks` (see
    `make_blocks`), the fit is repeated without each block, which gives the interval. UserError below 16 clips.
    """
    real, generated = check_features(real, generated)
    if min(len(real), len(generated)) < 16:
        raise UserError(f"{min(len(real), len(generated))} clips are too few to extrapolate; at least 16 are needed")

    def fit(first: Tensor, second: Tensor) -> tuple[list[float], list[int], list[float]]:
        small = min(len(first), len(second))
        inverse = torch.linspace(1 / small, 1 / max(small // 4, 3), points, dtype=torch.float64)
        sizes = sorted({round(1 / value) for value in inverse.tolist()})
        generator = torch.Generator().manual_seed(seed)
        totals = [0.0] * len(sizes)
        for _ in range(draws):
            shuffled = [torch.randperm(len(side), generator=generator) for side in (first, second)]
            for index, size in enumerate(sizes):
                subsets = small // size
                parts = [rows[: round(subsets * size * len(rows) / small)].tensor_split(subsets) for rows in shuffled]
                found = [frechet_distance(first[a], second[b]) for a, b in zip(*parts, strict=True)]
                totals[index] += sum(found) / len(found) / draws
        x = 1 / torch.tensor(sizes, dtype=torch.float64)
        powers = torch.stack([(x / x.max()) ** power for power in range(order + 1)], 1)
        solved = torch.linalg.lstsq(powers, torch.tensor(totals, dtype=torch.float64)[:, None]).solution[:, 0]
        return [float(c / x.max() ** power) for power, c in enumerate(solved)], sizes, totals

    coefficients, sizes, values = fit(real, generated)
    value, interval = coefficients[0], None
    if blocks:
        result = jackknife(lambda a, b: fit(a, b)[0][0], real, generated, blocks, value)
        interval = student_interval(value, result.standard_error, result.degrees)
    return Extrapolation(value, tuple(coefficients), tuple(sizes), tuple(values), interval)


# Kernel distance -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolynomialKernel:
    """k(x, y) = (γ xᵀy + c)^degree. The default is LVDM's KVD: degree 3, γ = 1/d, c = 1."""

    degree: int = 3
    gamma: float | None = None  # None: 1 / d
    coef0: float = 1.0

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """[n, d], [m, d] -> [n, m]"""
        gamma = 1 / x.shape[1] if self.gamma is None else self.gamma
        return (gamma * (x @ y.T) + self.coef0) ** self.degree

    def __str__(self) -> str:
        gamma = "x·y/d" if self.gamma is None else f"{self.gamma:g} x·y"
        return f"({gamma} + {self.coef0:g})^{self.degree}"


CUBIC = PolynomialKernel()


def kernel_distance(real: Tensor, generated: Tensor, kernel: PolynomialKernel = CUBIC, unbiased: bool = True) -> float:
    """Squared maximum mean discrepancy over the full sets (Gretton et al., JMLR 2012, Lemma 6), scale x1.

    `unbiased` leaves out the diagonals of both within-set sums, and the value may be negative. Sizes may differ.
    """
    real, generated = check_features(real, generated)
    within = []
    for features in (real, generated):
        matrix, n = kernel(features, features), len(features)
        within.append((matrix.sum() - matrix.trace()) / (n * (n - 1)) if unbiased else matrix.mean())
    return float(within[0] + within[1] - 2 * kernel(real, generated).mean())


def kernel_distance_variance(real: Tensor, generated: Tensor, kernel: PolynomialKernel = CUBIC) -> float:
    """Variance of the unbiased estimate for n = m (Sutherland et al., arXiv 1611.04488, §2).

    h_ij = k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i);  (4/n) Var(mean_j h_ij) - 2/(n(n-1)) Var(h_ij).
    Row i of both sets is one pair, so x_i and y_i may depend on each other. UserError if n ≠ m.
    """
    real, generated = check_features(real, generated)
    n = len(real)
    if n != len(generated):
        raise UserError(f"the analytic variance needs equal sets, got {n} and {len(generated)} clips")
    cross = kernel(real, generated)
    h = kernel(real, real) + kernel(generated, generated) - cross - cross.T
    h.fill_diagonal_(0)
    mean = h.sum() / (n * (n - 1))
    rows = h.sum(1) / (n - 1)
    spread = (h - mean).square().sum() - n * mean.square()  # minus the diagonal's n terms (0 - mean)²
    variance = 4 / n * rows.var() - 2 / (n * (n - 1)) * spread / (n * (n - 1) - 1)
    return max(float(variance), 0.0)


# Uncertainty -----------------------------------------------------------------------------------------------------


def make_blocks(count: int, groups: Sequence[str] | None = None, blocks: int = 16) -> list[Tensor]:
    """Split range(count) into at most `blocks` near-equal blocks of rows. Rows of one group stay together.

    A group is the source video of several clips. Returns [] if there are fewer than three blocks: no interval.
    """
    if groups is not None and len(groups) != count:
        raise ValueError(f"{len(groups)} groups for {count} clips")
    rows_of: dict[str, list[int]] = {}
    for row in range(count):
        rows_of.setdefault(groups[row] if groups is not None else str(row), []).append(row)
    number = min(blocks, len(rows_of))
    if number < 3:
        return []
    members: list[list[int]] = [[] for _ in range(number)]
    # The largest group goes to the smallest block, so neighbouring rows fall into different blocks
    for rows in sorted(rows_of.values(), key=len, reverse=True):
        min(members, key=len).extend(rows)
    return [torch.tensor(sorted(rows)) for rows in members]


@dataclass(frozen=True)
class Jackknife:
    standard_error: float
    bias_corrected: float
    degrees: int  # of freedom


def jackknife(
    statistic: Statistic, real: Tensor, generated: Tensor, blocks: Sequence[Tensor], value: float | None = None
) -> Jackknife:
    """Delete-a-block jackknife for blocks of unequal size (Busing, Meijer & van der Leeden 1999).

    Block k is removed from both sets at once. Blocks index the larger set; the smaller set loses the same share.
    """
    value = statistic(real, generated) if value is None else value
    longer = max(len(real), len(generated))
    weights, pseudo = [], []
    for block in blocks:
        keep = torch.ones(longer, dtype=torch.bool)
        keep[block] = False
        without = statistic(real[_thin(keep, len(real))], generated[_thin(keep, len(generated))])
        h = longer / len(block)
        weights.append(h)
        pseudo.append(h * value - (h - 1) * without)
    count = len(blocks)
    corrected = sum(p / h for p, h in zip(pseudo, weights, strict=True))
    variance = sum((p - corrected) ** 2 / (h - 1) for p, h in zip(pseudo, weights, strict=True)) / count
    return Jackknife(math.sqrt(variance), corrected, count - 1)


def _thin(keep: Tensor, length: int) -> Tensor:
    """The mask for a shorter set: its row i uses entry i · (longer / length) of `keep`."""
    rows = torch.arange(length) * len(keep) // length
    return keep[rows]


def student_interval(value: float, error: float, degrees: int, level: float = 0.95) -> tuple[float, float]:
    """value ± t · error."""
    width = float(stdtrit(degrees, 0.5 + level / 2)) * error
    return value - width, value + width


def kernel_permutation_p(
    real: Tensor, generated: Tensor, kernel: PolynomialKernel = CUBIC, permutations: int = 1000, seed: int = 0
) -> float:
    """p value of 'both sets come from one distribution', by permuting the labels. One-sided, valid at any size.

    The kernel matrix of the pooled set is computed once for all permutations.
    """
    real, generated = check_features(real, generated)
    n, m = len(real), len(generated)
    matrix = kernel(pooled := torch.cat([real, generated]), pooled)
    diagonal = matrix.diagonal().clone()
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(permutations + 1, n + m, dtype=torch.float64)
    labels[0, :n] = 1  # the observed labels count as one of the permutations, which keeps p valid
    for row in labels[1:]:
        row[torch.randperm(n + m, generator=generator)[:n]] = 1
    sums_real = labels @ matrix  # [p, n + m]
    total = matrix.sum()
    xx = (sums_real * labels).sum(1)
    xy = (sums_real * (1 - labels)).sum(1)
    yy = total - xx - 2 * xy
    trace_x = labels @ diagonal
    values = (xx - trace_x) / (n * (n - 1)) + (yy - (diagonal.sum() - trace_x)) / (m * (m - 1)) - 2 * xy / (n * m)
    tolerance = 1e-12 * float(values.abs().max())
    return float((values >= values[0] - tolerance).double().mean())


# Fidelity and variety --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifold:
    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(real: Tensor, generated: Tensor, neighbours: int = 5) -> Manifold:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) with k-nearest-neighbour balls.

    Stable from about a thousand clips. Recall and coverage are low if generated clips lack variety.
    """
    real, generated = check_features(real, generated)
    if min(len(real), len(generated)) <= neighbours:
        raise UserError(f"precision and recall with {neighbours} neighbours need more than {neighbours} clips a side")

    def radii(features: Tensor) -> Tensor:  # [n], distance to the k-th neighbour; the first is the row itself
        return torch.cdist(features, features).kthvalue(neighbours + 1, dim=1).values

    between = torch.cdist(real, generated)
    real_radii, generated_radii = radii(real), radii(generated)
    in_real = between <= real_radii[:, None]
    return Manifold(
        precision=float(in_real.any(0).double().mean()),
        recall=float((between <= generated_radii[None]).any(1).double().mean()),
        density=float(in_real.double().sum(0).mean() / neighbours),
        coverage=float(in_real.any(1).double().mean()),
    )


# Means over clips -------------------------------------------------------------------------------------------------


def mean_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Interval of the mean of per-clip values: bias-corrected and accelerated bootstrap (BCa) over source videos.

    Clips of one group are drawn together. For few groups, the percentiles are widened like Student's t (Hesterberg,
    arXiv 1411.5279, §3.2). None for fewer than three groups; a single point if all group means are equal.
    """
    from scipy.stats import bootstrap  # the import takes a second

    sums, sizes = group_sums(values, groups)
    if len(sums) < 3:
        return None
    means = sums / sizes
    if float(means.max() - means.min()) == 0:
        return float(means[0]), float(means[0])
    count = len(sums)
    quantile = float(stdtrit(count - 1, 0.5 + level / 2)) * math.sqrt(count / (count - 1))
    result = bootstrap(
        (sums, sizes),
        lambda total, size, axis: total.sum(axis) / size.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        batch=500,
        confidence_level=1 - 2 * float(ndtr(-quantile)),
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def group_sums(values: Sequence[float], groups: Sequence[str] | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group, in the order of first appearance."""
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values")
    table: dict[str, list[float]] = {}
    for index, value in enumerate(values):
        table.setdefault(groups[index] if groups is not None else str(index), []).append(value)
    return np.array([sum(part) for part in table.values()]), np.array([len(part) for part in table.values()])
