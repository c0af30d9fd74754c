"""Compares two models: paired differences with intervals, significance tests, and a correction for many metrics.

Both models must have the same clips (one manifest). The tests use the difference of a clip's two values. Clips of one
source video count as one observation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import binomtest, permutation_test
from torch import Tensor

from dcbench.errors import UserError
from dcbench.metrics.functional import group_sums, jackknife, make_blocks, mean_interval, student_interval

Statistic = Callable[[Tensor, Tensor], float]


def wilson(hits: int, count: int) -> tuple[float, tuple[float, float]]:
    """A share and its 95 % interval (Wilson 1927)."""
    low, high = binomtest(hits, count).proportion_ci(0.95, "wilson")
    return hits / count, (float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """Model A minus model B on the same clips."""

    difference: float
    ci95: tuple[float, float] | None
    p_value: float  # of 'no difference'
    method: str
    n: int  # clips
    n_groups: int  # independent source videos


def compare_paired(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0
) -> Comparison:
    """Mean of first - second with a BCa bootstrap interval and a two-sided sign-flip test, both over source videos.

    The test swaps the two models within source videos: all 2ⁿ swaps for few videos, else 9999 random ones.
    """
    if len(first) != len(second):
        raise UserError(f"a paired comparison needs the same clips on both sides, got {len(first)} and {len(second)}")
    if len(first) < 2:
        raise UserError("a paired comparison needs at least 2 clips")
    gaps = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    if not np.isfinite(gaps).all():
        raise UserError("a value is NaN or infinite; compare only clips that both models have a value for")
    sums, _ = group_sums(gaps, groups)
    if len(sums) < 2:
        raise UserError("a paired comparison needs at least 2 independent source videos")
    if np.all(sums == 0):
        p_value = 1.0
    else:
        p_value = permutation_test(
            (sums,),
            lambda x, axis: x.mean(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            batch=1000,
            rng=np.random.default_rng(seed),
        ).pvalue
    interval = mean_interval(gaps, groups, seed=seed)
    return Comparison(
        float(np.mean(gaps)), interval, float(p_value), "sign-flip test, BCa bootstrap", len(gaps), len(sums)
    )


def compare_sets(
    statistic: Statistic,
    real: Tensor,
    first: Tensor,
    second: Tensor,
    groups: Sequence[str] | None = None,
    permutations: int = 199,
    seed: int = 0,
) -> Comparison:
    """Difference of a set metric (`frechet_distance`, `kernel_distance`) of two models against the same references.

    Shapes: [n d], [m d], [m d]. The interval is a delete-a-block jackknife of the difference: each block is removed
    from reference, A and B at once, so shared variation and most of FVD's bias cancel. The p value comes from random
    swaps of A's and B's features of a source video. It is exact for 'both models make clips of one distribution'.
    """
    if first.shape != second.shape:
        raise UserError(f"two models are compared on the same clips: got {list(first.shape)} and {list(second.shape)}")
    count = len(first)
    value = statistic(real, first) - statistic(real, second)
    stacked = torch.stack([first, second], 1)  # the jackknife deletes rows; A and B of a clip are one row
    interval, blocks = None, make_blocks(max(len(real), count), groups if len(real) <= count else None)
    if blocks:
        result = jackknife(
            lambda reference, both: statistic(reference, both[:, 0]) - statistic(reference, both[:, 1]),
            real,
            stacked,
            blocks,
            value,
        )
        interval = student_interval(value, result.standard_error, result.degrees)
    names = list(groups) if groups is not None else [str(index) for index in range(count)]
    index_of = {name: index for index, name in enumerate(dict.fromkeys(names))}
    group_of = torch.tensor([index_of[name] for name in names])
    generator = torch.Generator().manual_seed(seed)
    extreme = 1
    for _ in range(permutations):
        swap = torch.randint(0, 2, (len(index_of),), generator=generator, dtype=torch.bool)[group_of, None]
        gap = statistic(real, torch.where(swap, second, first)) - statistic(real, torch.where(swap, first, second))
        extreme += abs(gap) >= abs(value) * (1 - 1e-12)
    method = f"swap test ({permutations} swaps), jackknife over {len(blocks)} blocks"
    return Comparison(value, interval, extreme / (permutations + 1), method, count, len(index_of))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values after Holm's step-down adjustment (1979): reject those up to 0.05. The metrics may be dependent."""
    adjusted, highest = {}, 0.0
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p) in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
