"""Pure functions of features: distances between two sets. Everything is computed in float64.

Features are [n, d], one row per clip. docs/metrics.md defines the metrics and lists what other code computes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.metrics.design import Design, Groups, as_design

Statistic = Callable[[Tensor, Tensor], float]


def check_features(real: Tensor, generated: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets as float64 [n, d] and [m, d]. UserError for NaN, infinity, different d or fewer than two rows."""
    sides = check_set(real, "reference"), check_set(generated, "generated")
    if real.shape[1] != generated.shape[1]:
        raise UserError(
            f"reference features have {real.shape[1]} dimensions, generated ones {generated.shape[1]}: "
            "they come from different extractors"
        )
    return sides


def check_set(features: Tensor, name: str = "generated") -> Tensor:
    """One set as float64 [n, d]. UserError for NaN, infinity or fewer than two rows; it calls the set `name`."""
    if features.ndim != 2:
        raise UserError(f"{name} features: got shape {list(features.shape)}, expected [clips, features]")
    if len(features) < 2:
        raise UserError(f"{len(features)} {name} clip(s): a metric of sets needs at least 2 a side")
    bad = (~torch.isfinite(features).all(1)).nonzero().flatten().tolist()
    if bad:
        raise UserError(f"{name} features hold NaN or infinity in {len(bad)} row(s), the first is row {bad[0]}")
    return features.double()


def in_order(features: Tensor) -> np.ndarray:
    """Indices that sort the rows by their numbers. Sums in this order do not depend on the order of the clips."""
    rows = features.double().cpu().numpy()
    order = np.lexsort(rows.T[2::-1])
    ahead = rows[order][:, :3]
    if len(rows) > 1 and (ahead[1:] == ahead[:-1]).all(1).any():  # rare: the first three numbers do not decide
        order = np.lexsort(rows.T[::-1])
    return order


def arrange(real: Tensor, generated: Tensor, groups: Groups = None) -> tuple[Tensor, Tensor, Design]:
    """Both sets, checked, in float64 and in the order of their rows' numbers, with their design."""
    real, generated = check_features(real, generated)
    design = as_design(groups, real, generated)
    orders = in_order(real), in_order(generated)
    first, second = real[torch.from_numpy(orders[0])], generated[torch.from_numpy(orders[1])]
    return first, second, design.rows(*orders)


# Fréchet distance ------------------------------------------------------------------------------------------------


def frechet_distance(real: Tensor, generated: Tensor, fast: bool = False) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2 √(Σ1 Σ2)), covariances with n - 1 (Unterthiner et al., arXiv 1812.01717).

    C holds the centred rows divided by √(n - 1), so Σ = CᵀC, and tr √(Σ1 Σ2) is the sum of the singular values of
    C1 C2ᵀ. No matrix root is needed. The value is exact for fewer clips than dimensions, and 0 for identical sets.
    `fast`: the singular values are roots of eigenvalues. This takes a tenth of the time at 2048 dimensions; the error
    is about 1e-8 of the largest one.
    """
    real, generated = check_features(real, generated)
    real, generated = (side[torch.from_numpy(in_order(side))] for side in (real, generated))
    if torch.equal(real, generated):
        return 0.0
    mean_part = (real.mean(0) - generated.mean(0)).square().sum()
    roots = []
    for features in (real, generated):
        centred = (features - features.mean(0)) / math.sqrt(len(features) - 1)
        # CᵀC = RᵀR, and R is smaller if there are more rows than columns
        roots.append(torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred)
    variance = sum(root.square().sum() for root in roots)
    product = roots[0] @ roots[1].T
    if fast:
        square = product @ product.T if len(roots[0]) < len(roots[1]) else product.T @ product
        singular = torch.linalg.eigvalsh(square).clamp_(min=0).sqrt()
    else:
        singular = torch.linalg.svdvals(product)
    value = float(mean_part + variance - 2 * singular.sum())
    return value if value > 1e-12 * float(variance) else 0.0  # smaller values are rounding


@dataclass(frozen=True)
class Extrapolation:
    """The curve fitted to FVD against 1 / N."""

    value: float  # at 1 / N = 0
    coefficients: tuple[float, ...]  # of 1, 1/N, 1/N²
    sizes: tuple[int, ...]
    values: tuple[float, ...]  # mean over the subsets of each size


def frechet_infinity(
    real: Tensor, generated: Tensor, groups: Groups = None, points: int = 8, draws: int = 1, order: int = 2
) -> Extrapolation:
    """The Fréchet distance of infinitely many clips: a + b / N + c / N², fitted over N/4 ... N (arXiv 1911.07023).

    N counts groups: a group is in a subset on both sides, or on neither. So a clip stays with its own reference, and
    clips of one video stay together. The sizes are evenly spaced in 1 / N. Each value is the mean over disjoint subsets
    of `draws` shuffles, which depend on the groups' names only. `order` 1 is the straight line of the paper; it is
    biased below about 4 d clips (docs/metrics.md). If the sides have other groups, N is the smaller number, and the
    other side is thinned in proportion. UserError below 16 groups.
    """
    real, generated, design = arrange(real, generated, groups)
    count = design.n_groups
    if count < 16:
        raise UserError(f"{count} independent clips are too few to extrapolate; at least 16 are needed")
    inverse = torch.linspace(1 / count, 1 / max(count // 4, 3), points, dtype=torch.float64)
    sizes = sorted({round(1 / value) for value in inverse.tolist()})
    totals = [0.0] * len(sizes)
    for draw in range(draws):
        shuffled = [_shuffled(stratum, draw) for stratum in design.strata()]
        for index, size in enumerate(sizes):
            number = count // size
            parts = [np.array_split(names[: round(number * size * len(names) / count)], number) for names in shuffled]
            found = []
            for subset in (np.concatenate(part) for part in zip(*parts, strict=True)):
                first, second = (torch.from_numpy(np.isin(side, subset)) for side in (design.real, design.generated))
                found.append(frechet_distance(real[first], generated[second]))
            totals[index] += sum(found) / len(found) / draws
    x = 1 / torch.tensor(sizes, dtype=torch.float64)
    powers = torch.stack([(x / x.max()) ** power for power in range(order + 1)], 1)
    solved = torch.linalg.lstsq(powers, torch.tensor(totals, dtype=torch.float64)[:, None]).solution[:, 0]
    coefficients = [float(c / x.max() ** power) for power, c in enumerate(solved)]
    return Extrapolation(coefficients[0], tuple(coefficients), tuple(sizes), tuple(totals))


def _shuffled(names: np.ndarray, draw: int) -> np.ndarray:
    """Group hashes in another order for each draw. Without some groups, the order of the others stays the same."""
    factor = np.uint64((0x9E3779B97F4A7C15 * (2 * draw + 1)) % 2**64)  # odd, so no two hashes become equal
    return names[np.argsort(names.view(np.uint64) * factor)]


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


def kernel_distance(
    real: Tensor,
    generated: Tensor,
    kernel: PolynomialKernel = CUBIC,
    unbiased: bool = True,
    groups: Groups = None,
) -> float:
    """Squared maximum mean discrepancy over the full sets (Gretton et al., JMLR 2012, Lemma 6), scale x1.

    `unbiased` leaves out the diagonals of both within-set sums, and the value may be negative. Sizes may differ. With
    `groups`, it leaves out all pairs of rows of one group, between the sets too: these depend on each other, and would
    make the value too small for a generated clip that resembles its own reference. Without `groups`, it is the KVD of
    LVDM and TATS: all pairs between the sets count. UserError if no pair is left.
    """
    real, generated, design = arrange(real, generated, groups)
    if not unbiased:
        within = kernel(real, real).mean() + kernel(generated, generated).mean()
        return float(within - 2 * kernel(real, generated).mean())
    sides, names, means = (real, generated), (design.real, design.generated), []
    if groups is None:
        names = np.arange(len(real)), -1 - np.arange(len(generated))
    for rows, columns in ((0, 0), (1, 1), (0, 1)):
        apart = torch.from_numpy(names[rows][:, None] != names[columns][None])
        if not bool(apart.any()):
            raise UserError("all clips are of one group: a kernel distance needs at least 2 independent groups")
        means.append(float((kernel(sides[rows], sides[columns]) * apart).sum()) / int(apart.sum()))
    return means[0] + means[1] - 2 * means[2]


def kernel_permutation_p(
    real: Tensor,
    generated: Tensor,
    kernel: PolynomialKernel = CUBIC,
    permutations: int = 1000,
    seed: int = 0,
    groups: Groups = None,
) -> float | None:
    """p value of 'both sets come from one distribution': the labels of whole groups are permuted. One-sided.

    A group on both sides swaps its sides, which is exact if the two may be exchanged: given the same input, a generated
    clip is like a real one. Groups on one side permute their labels. None if a group has other numbers of rows on its
    two sides: then a swap changes more than the labels.
    """
    real, generated, design = arrange(real, generated, groups)
    tied = np.intersect1d(design.real, design.generated)
    counted = [np.unique(side, return_counts=True) for side in (design.real, design.generated)]
    numbers = [dict(zip(*(part.tolist() for part in side), strict=True)) for side in counted]
    if any(numbers[0][group] != numbers[1][group] for group in tied.tolist()):
        return None
    # A unit is one side of one group. Its rows keep together, so sums over units are all that is needed.
    names = np.concatenate([side[0] for side in counted])
    places = [np.searchsorted(side[0], own) for side, own in zip(counted, (design.real, design.generated), strict=True)]
    units = torch.from_numpy(np.concatenate([places[0], len(counted[0][0]) + places[1]]))
    sizes = torch.bincount(units).double()
    pooled, zeros = torch.cat([real, generated]), torch.zeros(len(sizes), len(units), dtype=torch.float64)
    sums = zeros.index_add(0, units, kernel(pooled, pooled)).T
    sums = torch.zeros(len(sizes), len(sizes), dtype=torch.float64).index_add(0, units, sums)
    apart = torch.from_numpy(names[:, None] != names[None])
    labels = _permuted_labels(names, len(counted[0][0]), tied, permutations, seed)
    totals = []
    for table in (sums * apart, torch.outer(sizes, sizes) * apart):  # of the kernel, and of the number of pairs
        of_first = labels @ table
        between = (of_first * (1 - labels)).sum(1)
        first = (of_first * labels).sum(1)
        totals.append((first, table.sum() - first - 2 * between, between))
    xx, yy, xy = (summed / number for summed, number in zip(*totals, strict=True))
    values = xx + yy - 2 * xy
    tolerance = 1e-12 * float(values.abs().max())
    return float((values >= values[0] - tolerance).double().mean())


def _permuted_labels(names: np.ndarray, first: int, tied: np.ndarray, permutations: int, seed: int) -> Tensor:
    """[1 + permutations, units]: 1 for a unit of the reference side. The first row is as observed; it counts too."""
    random = np.random.default_rng(seed)
    is_real = np.arange(len(names)) < first
    single = np.flatnonzero(~np.isin(names, tied))
    labels = np.tile(is_real, (permutations + 1, 1))
    swaps = dict(zip(tied.tolist(), random.random((len(tied), permutations)) < 0.5, strict=True))
    for unit in np.flatnonzero(np.isin(names, tied)):
        labels[1:, unit] ^= swaps[int(names[unit])]
    for row in labels[1:]:
        row[single] = random.permutation(is_real[single])
    return torch.from_numpy(labels).double()


# Fidelity and variety --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifold:
    precision: float
    recall: float
    density: float
    coverage: float


def manifold_metrics(real: Tensor, generated: Tensor, neighbours: int = 5) -> Manifold:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797) with k-nearest-neighbour balls.

    A point on the edge of a ball is outside, as in the authors' `prdc`: identical sets have density 1. Stable from
    about a thousand clips. Recall and coverage are low if generated clips lack variety.
    """
    real, generated = check_features(real, generated)
    if min(len(real), len(generated)) <= neighbours:
        raise UserError(f"precision and recall with {neighbours} neighbours need more than {neighbours} clips a side")

    distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # equal rows: exactly 0 apart

    def radii(features: Tensor) -> Tensor:  # [n], distance to the k-th neighbour; the first is the row itself
        return distances(features, features).kthvalue(neighbours + 1, dim=1).values

    between = distances(real, generated)
    real_radii, generated_radii = radii(real), radii(generated)
    in_real = between < real_radii[:, None]
    return Manifold(
        precision=float(in_real.any(0).double().mean()),
        recall=float((between < generated_radii[None]).any(1).double().mean()),
        density=float(in_real.double().sum(0).mean() / neighbours),
        coverage=float(in_real.any(1).double().mean()),
    )
