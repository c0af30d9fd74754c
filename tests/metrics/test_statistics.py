"""Comparisons find a real difference, and reject a null one no more often than their level."""

import numpy as np
import pytest
import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.statistics import compare_paired, compare_sets, holm


def test_paired_test_holds_its_level_and_its_interval_covers() -> None:
    """200 null trials at level 5 %: 10 expected, 20 is three standard errors above."""
    rejected = covered = 0
    for trial in range(200):
        random = np.random.default_rng(trial)
        shared = random.normal(size=10)  # the clip's own difficulty, far larger than the noise of either model
        first, second = 5 * shared + random.normal(size=10), 5 * shared + random.normal(size=10)
        result = compare_paired(first.tolist(), second.tolist(), seed=trial)
        rejected += result.p_value <= 0.05
        assert result.ci95 is not None
        covered += result.ci95[0] <= 0 <= result.ci95[1]
    assert rejected <= 20
    assert covered >= 176


def test_paired_test_finds_a_small_difference_that_unpaired_values_hide() -> None:
    random = np.random.default_rng(0)
    shared = 5 * random.normal(size=60)
    first = shared + 0.5 * random.normal(size=60) + 0.5
    second = shared + 0.5 * random.normal(size=60)
    result = compare_paired(first.tolist(), second.tolist())
    assert result.p_value < 0.001 and result.ci95 and 0 < result.ci95[0] < 0.5 < result.ci95[1] < 1
    assert result.difference == pytest.approx(float(np.mean(first - second)))
    swapped = compare_paired(second.tolist(), first.tolist())
    assert swapped.difference == -result.difference and swapped.p_value == pytest.approx(result.p_value, abs=0.005)


def test_clips_of_one_video_count_once() -> None:
    gaps = np.repeat(np.linspace(-0.5, 1.2, 8), 10)
    groups = [str(index // 10) for index in range(80)]
    apart, together = compare_paired(gaps.tolist(), [0.0] * 80), compare_paired(gaps.tolist(), [0.0] * 80, groups)
    assert apart.p_value < 0.001 < together.p_value
    assert (together.n, together.n_groups) == (80, 8)


def test_equal_models_do_not_differ() -> None:
    result = compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert result.difference == 0 and result.p_value == 1 and result.ci95 == (0, 0)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([1.0, 2.0], [1.0], "the same clips on both sides, got 2 and 1"),
        ([1.0], [1.0], "at least 2 clips"),
        ([1.0, float("nan")], [1.0, 2.0], "NaN or infinite"),
    ],
)
def test_bad_pairs_are_refused(first: list[float], second: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compare_paired(first, second)
    with pytest.raises(UserError, match="independent source videos"):
        compare_paired([1.0, 2.0], [0.0, 0.0], ["a", "a"])


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) + shift


@pytest.mark.parametrize("statistic", [fn.frechet_distance, fn.kernel_distance])
def test_set_comparison_holds_its_level(statistic: fn.Statistic) -> None:
    """100 null trials: 5 expected, 12 is three standard errors above."""
    rejected = 0
    for trial in range(100):
        real, first, second = (features(25, 3 * trial + side) for side in range(3))
        rejected += compare_sets(statistic, real, first, second, permutations=19, seed=trial).p_value <= 0.05
    assert rejected <= 12


@pytest.mark.parametrize("statistic", [fn.frechet_distance, fn.kernel_distance])
def test_set_comparison_finds_the_better_model(statistic: fn.Statistic) -> None:
    real, near, far = features(80, 0), features(80, 1, 0.1), features(80, 2, 1.0)
    result = compare_sets(statistic, real, near, far, permutations=99)
    assert result.difference < 0 and result.p_value == pytest.approx(0.01)
    assert result.ci95 is not None and result.ci95[1] < 0
    assert result.difference == statistic(real, near) - statistic(real, far)
    groups = [str(index // 4) for index in range(80)]
    grouped = compare_sets(statistic, real, near, far, groups, permutations=99)
    assert grouped.n_groups == 20 and "16 blocks" in grouped.method
    with pytest.raises(UserError, match=r"got \[80, 4\] and \[79, 4\]"):
        compare_sets(statistic, real, near, far[:79])


def test_one_model_against_itself() -> None:
    real, made = features(30, 0), features(30, 1)
    result = compare_sets(fn.frechet_distance, real, made, made, permutations=19)
    assert result.difference == 0 and result.p_value == 1 and result.ci95 == (0, 0)


def test_holm_is_the_published_procedure() -> None:
    """Sorted p times 4, 3, 2, 1, then never falling."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}
