"""Intervals hold the truth, tests hold their level and find a difference, and no p value contradicts its interval.

The trials here are few, to be fast. `benchmarks/paired_clips.py` measures the same with 400 trials in each cell.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import score_statistic, score_values
from dcbench.metrics.design import Design
from dcbench.metrics.distances import score_frechet
from dcbench.metrics.statistics import (
    Comparison,
    average,
    compare_paired,
    compare_scores,
    group_sums,
    holm,
    jackknife,
    mean_interval,
    over_seeds,
    share_interval,
    student_interval,
    student_p,
    wilson,
)
from dcbench.record import Replicates, Score

# Means over clips ----------------------------------------------------------------------------------------------------


def test_mean_interval_covers_and_respects_source_videos() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = mean_interval(random.normal(size=30).tolist(), seed=trial) or (0, 0)
        covered += low <= 0 <= high
    assert covered >= 180
    per_video = np.repeat(random.normal(size=20), 5)
    groups = [str(index // 5) for index in range(100)]
    wide, narrow = mean_interval(per_video.tolist(), groups), mean_interval(per_video.tolist())
    assert wide and narrow and wide[1] - wide[0] > 1.7 * (narrow[1] - narrow[0])


def test_a_mean_without_spread_or_with_two_groups_has_no_interval() -> None:
    assert mean_interval([1.0, 2.0]) is None and mean_interval([3.0] * 5) is None
    score = score_values([{"value": 3.0}] * 5)
    assert score.ci95 is None and score.ci_method == "none: the value is the same without any part of the clips"
    assert score_values([{"value": 1.0}, {"value": 2.0}]).ci_method == "none: fewer than 3 independent clips"


def test_few_groups_have_students_interval() -> None:
    """Equal groups: the textbook's t of the group means. Unequal ones: Bell & McCaffrey's error, written out."""
    plain = stats.ttest_1samp([1.0, 2.0, 4.0, 0.5], 0).confidence_interval()
    assert mean_interval([1.0, 2.0, 4.0, 0.5]) == pytest.approx((plain.low, plain.high), rel=1e-12)
    twice = [v for v in (1.0, 2.0, 4.0, 0.5) for _ in range(2)]
    assert mean_interval(twice, list("aabbccdd")) == pytest.approx((plain.low, plain.high), rel=1e-12)
    values, groups = [1.0, 2.0, 4.0, 0.5, 3.0, 3.5, 2.5], ["a", "a", "b", "c", "d", "e", "e"]
    means = np.array([1.5, 4.0, 0.5, 3.0, 3.0])
    shares = np.array([2, 1, 1, 1, 2]) / 7
    residual = np.eye(5) - shares  # of the group means, from the mean of all clips
    kept = np.diag(residual @ residual.T)  # how much of a group's variance its residual has
    error = math.sqrt(sum(w**2 * (row @ means) ** 2 / k for w, row, k in zip(shares, residual, kept, strict=True)))
    half = stats.t.ppf(0.975, 1 / (shares**2).sum() - 1) * error
    assert mean_interval(values, groups) == pytest.approx((np.mean(values) - half, np.mean(values) + half), rel=1e-12)
    assert score_values([{"value": v} for v in values], groups).ci_method == "Student's t over source videos"


@pytest.mark.parametrize("sizes", [(1, 1, 2, 4), (1, 1, 1, 1, 8), (1,) * 7 + (20,), (2,) * 5])
def test_a_large_group_makes_no_false_alarm(sizes: tuple[int, ...]) -> None:
    """400 null trials: 20 rejections and 380 covered are expected; 33 and 367 are three standard errors away."""
    names = [f"v{k}" for k, size in enumerate(sizes) for _ in range(size)]
    random, rejected, covered = np.random.default_rng(0), 0, 0
    for _ in range(400):
        values = np.repeat(random.normal(size=len(sizes)), sizes) + 0.3 * random.normal(size=len(names))
        rejected += compare_paired(values.tolist(), [0.0] * len(names), names).p_value <= 0.05
        low, high = mean_interval(values.tolist(), names) or (math.nan, math.nan)
        covered += low <= 0 <= high
    assert rejected <= 33 and covered >= 367


def test_the_order_of_clips_changes_no_digit() -> None:
    random = np.random.default_rng(1)
    values, groups = random.lognormal(size=40).tolist(), [str(k % 11) for k in range(40)]
    order = random.permutation(40)
    turned = [values[k] for k in order], [groups[k] for k in order]
    assert mean_interval(values, groups) == mean_interval(*turned)
    first, second = (score_values([{"value": v} for v in side], names) for side, names in ((values, groups), turned))
    assert first == second and first.n_groups == 11 and first.replicates is not None
    paired = [compare_paired(side, [0.9] * 40, names) for side, names in ((values, groups), turned)]
    assert paired[0] == paired[1]


def test_wilson_is_scipys_and_shares_of_few_groups_are_wide() -> None:
    for hits, count in ((8, 10), (0, 20), (24, 24)):
        expected = stats.binomtest(hits, count).proportion_ci(0.95, "wilson")
        share, interval = wilson(hits, count)
        assert share == hits / count and interval == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert share_interval(1.0, 0.0, 24, 24)[0] == pytest.approx(0.862, abs=1e-3)  # all hits: 'at least 86 %'
    assert share_interval(1.0, 0.0, 24, 6)[0] < 0.53
    binomial = math.sqrt(0.8 * 0.2 / 50)
    assert share_interval(0.8, binomial, 50, 50) == pytest.approx(wilson(40, 50)[1], rel=1e-9)
    together = share_interval(0.8, 2 * binomial, 50, 50)  # twice the error: a quarter of the clips
    assert together == pytest.approx(wilson(10, 12.5)[1], rel=1e-9)


# Paired values -------------------------------------------------------------------------------------------------------


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
    assert 2 <= rejected <= 20
    assert covered == 200 - rejected


def test_paired_test_finds_a_small_difference_that_unpaired_values_hide() -> None:
    random = np.random.default_rng(0)
    shared = 5 * random.normal(size=60)
    first = shared + 0.5 * random.normal(size=60) + 0.5
    second = shared + 0.5 * random.normal(size=60)
    result = compare_paired(first.tolist(), second.tolist())
    assert result.p_value < 0.001 and result.ci95 and 0 < result.ci95[0] < 0.5 < result.ci95[1] < 1
    assert result.difference == pytest.approx(float(np.mean(first - second)))
    swapped = compare_paired(second.tolist(), first.tolist())
    assert swapped.difference == pytest.approx(-result.difference) and swapped.p_value == pytest.approx(
        result.p_value, abs=0.005
    )


@pytest.mark.parametrize("count", [2, 3, 5, 6, 7, 9, 14, 15, 40])
def test_p_value_and_interval_never_contradict(count: int) -> None:
    """p <= 0.05 if and only if the interval leaves out 0, for shifts that cross the border."""
    random = np.random.default_rng(count)
    gaps, groups = random.standard_t(3, size=2 * count), [str(k // 2) for k in range(2 * count)]
    seen = set()
    for shift in np.linspace(-4, 4, 161):
        result = compare_paired((gaps + shift).tolist(), [0.0] * (2 * count), groups)
        assert result.ci95 is not None and result.ci95[0] <= result.difference <= result.ci95[1]
        assert (result.p_value <= 0.05) == (not result.ci95[0] <= 0 <= result.ci95[1])
        seen.add(result.p_value <= 0.05)
    assert seen == ({True, False} if count > 3 else seen)


def slow_sign_flip_p(gaps: np.ndarray, names: list[str], mean: float) -> float:
    """All sign flips of groups, one after the other, for 'the mean is `mean`'."""
    sums = [sum(g - mean for g, n in zip(gaps, names, strict=True) if n == name) for name in dict.fromkeys(names)]
    observed = abs(sum(sums))
    flips = itertools.product((1, -1), repeat=len(sums))
    values = [abs(sum(s * x for s, x in zip(signs, sums, strict=True))) for signs in flips]
    return float(np.mean([value >= observed * (1 - 1e-12) for value in values]))


def test_sign_flips_are_the_slow_obvious_version() -> None:
    random = np.random.default_rng(3)
    gaps, names = random.exponential(size=12) - 0.6, [f"v{k // 2}" if k < 6 else f"w{k}" for k in range(12)]
    result = compare_paired(gaps.tolist(), [0.0] * 12, names)
    assert result.p_value == pytest.approx(slow_sign_flip_p(gaps, names, 0.0), abs=1e-12)
    assert result.ci95 is not None
    for end, out in ((result.ci95[0], -1), (result.ci95[1], 1)):
        assert slow_sign_flip_p(gaps, names, end - out * 1e-9) > 0.05
        assert slow_sign_flip_p(gaps, names, end + out * 1e-9) <= 0.05


def test_clips_of_one_video_count_once() -> None:
    gaps = np.repeat(np.linspace(-0.5, 1.2, 8), 10)
    groups = [str(index // 10) for index in range(80)]
    apart, together = compare_paired(gaps.tolist(), [0.0] * 80), compare_paired(gaps.tolist(), [0.0] * 80, groups)
    assert apart.p_value < 0.001 < together.p_value
    assert (together.n, together.n_groups) == (80, 8)


def test_equal_models_do_not_differ_and_few_clips_cannot_tell() -> None:
    result = compare_paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert result.difference == 0 and result.p_value == 1 and result.ci95 == (0, 0)
    shifted = compare_paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert (shifted.difference, shifted.ci95, shifted.p_value) == (0.5, None, 0.25) and shifted.is_too_small
    few = compare_paired([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    expected = stats.ttest_1samp([1.0, 2.0, 4.0], 0)
    assert few.p_value == pytest.approx(expected[1]) and few.is_too_small
    assert not compare_paired([1.0, 2.0, 4.0, 1.0, 2.0, 5.0], [0.0] * 6).is_too_small


def test_the_detectable_difference_is_found_in_four_of_five_trials() -> None:
    random = np.random.default_rng(5)
    least = np.mean([compare_paired(random.normal(size=24).tolist(), [0.0] * 24).detectable or 0 for _ in range(40)])
    found = [compare_paired((random.normal(size=24) + least).tolist(), [0.0] * 24).p_value <= 0.05 for _ in range(200)]
    assert np.mean(found) == pytest.approx(0.8, abs=0.085)  # three standard errors


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
    with pytest.raises(UserError, match="1 groups for 2 values"):
        group_sums([1.0, 2.0], ["a"])


# Sets ----------------------------------------------------------------------------------------------------------------

TRUTH, DIMENSIONS = 1.55, 8


def models(count: int, trial: int, ties: tuple[float, float], shifts: tuple[float, float]) -> tuple[Tensor, ...]:
    """References and two models, Gaussian: correlation `ties` with the own reference, FVD TRUTH · shift²."""
    generator = torch.Generator().manual_seed(trial)
    real, *noise = (torch.randn(count, DIMENSIONS, generator=generator, dtype=torch.float64) for _ in range(3))
    sides = [real]
    for tie, shift, own in zip(ties, shifts, noise, strict=True):
        made = tie * real + math.sqrt(1 - tie**2) * own
        made[:, 0] += shift * math.sqrt(TRUTH)
        sides.append(made)
    return tuple(sides)


def score_mmd(real: Tensor, made: Tensor, names: list[str]) -> Score:
    """`score_kernel` without its permutation test, which takes most of the time."""
    return score_statistic(lambda a, b, design: fn.kernel_distance(a, b, groups=design), real, made, names)


def compared(score, sides: tuple[Tensor, ...]) -> Comparison:
    names = [f"clip{k}" for k in range(len(sides[0]))]
    return compare_scores(score(sides[0], sides[1], names), score(sides[0], sides[2], names))


@pytest.mark.parametrize("score", [score_frechet, score_mmd])
@pytest.mark.parametrize(
    ("ties", "shifts"),
    [((0.9, 0.0), (1.0, 1.0)), ((0.5, 0.5), (1.0, -1.0)), ((0.0, 0.0), (1.0, 1.0))],
    ids=["one model is tied to its references", "opposite errors", "the same distribution"],
)
def test_comparison_of_equal_models_holds_its_level(score, ties, shifts) -> None:
    """100 null trials: 5 expected, 12 is three standard errors above. The old test of FVD rejected 67 of the first."""
    rejected = sum(compared(score, models(48, trial, ties, shifts)).p_value <= 0.05 for trial in range(100))
    assert rejected <= 12


@pytest.mark.parametrize("score", [score_frechet, score_mmd])
def test_comparison_finds_the_better_model_although_the_other_copies(score) -> None:
    """True FVD 0.25 · 1.55 against 4 · 1.55; the worse model is tied to its references."""
    results = [compared(score, models(96, trial, (0.0, 0.9), (0.5, 2.0))) for trial in range(20)]
    assert sum(result.p_value < 0.05 and result.difference < 0 for result in results) >= 18


def test_the_comparison_of_fvd_has_no_bias_of_few_clips() -> None:
    """Equal true FVD, one model tied: at 48 clips the plain difference is -0.95, the reported one 0.00 ± 0.07."""
    results = [compared(score_frechet, models(48, trial, (0.9, 0.0), (1.0, 1.0))) for trial in range(60)]
    assert np.mean([result.plain or 0.0 for result in results]) < -0.6
    assert abs(np.mean([result.difference for result in results])) < 0.25
    assert "bias of 48 clips removed" in results[0].method


def test_set_comparisons_never_contradict_their_interval_and_count_groups() -> None:
    for trial in range(30):
        result = compared(score_frechet, models(24, trial, (0.5, 0.0), (1.0, 1.6)))
        assert result.ci95 is not None
        assert (result.p_value <= 0.05) == (not result.ci95[0] <= 0 <= result.ci95[1])
    real, first, second = models(80, 0, (0.0, 0.0), (0.3, 3.0))
    groups = [str(index // 4) for index in range(80)]
    result = compare_scores(score_frechet(real, first, groups), score_frechet(real, second, groups))
    assert (result.n, result.n_groups) == (80, 20) and "16 blocks" in result.method
    same = compare_scores(score_frechet(real, first, groups), score_frechet(real, first, groups))
    assert same.difference == 0 and same.p_value == 1 and same.ci95 == (0, 0)


def test_scores_of_other_clips_are_not_compared() -> None:
    real, first, second = models(20, 0, (0.0, 0.0), (1.0, 1.0))
    names = [str(k) for k in range(20)]
    whole = score_frechet(real, first, names)
    with pytest.raises(UserError, match="other clips"):
        compare_scores(whole, score_frechet(real[1:], second[1:], names[1:]))
    with pytest.raises(UserError, match="older dcbench"):
        compare_scores(whole, Score(value=1.0))


def test_student_p_is_that_of_its_interval() -> None:
    low, _ = student_interval(2.0, 0.7, 9.0)
    assert student_p(2.0 - low, 0.7, 9.0) == pytest.approx(0.05, rel=1e-9)


# The jackknife -------------------------------------------------------------------------------------------------------


def slow_jackknife(value: float, strata: list[list[tuple[float, float]]]) -> tuple[float, float]:
    """Busing et al. 1999, equations written out: (standard error, value without bias)."""
    variance, corrected = 0.0, value
    for stratum in strata:
        g = len(stratum)
        estimate = g * value - sum((1 - 1 / h) * without for h, without in stratum)
        corrected += estimate - value
        pseudo = [h * value - (h - 1) * without for h, without in stratum]
        variance += sum((p - estimate) ** 2 / (h - 1) for p, (h, _) in zip(pseudo, stratum, strict=True)) / g
    return math.sqrt(variance), corrected


def test_the_jackknife_is_the_published_one() -> None:
    random = np.random.default_rng(0)
    strata = []
    for sizes in ([3, 5, 2, 6], [1, 1, 4]):
        strata.append([(sum(sizes) / size, float(random.normal())) for size in sizes])
    result = jackknife(0.4, Replicates(design="", strata=strata))
    error, corrected = slow_jackknife(0.4, strata)
    assert result.standard_error == pytest.approx(error, rel=1e-12)
    assert result.bias_corrected == pytest.approx(corrected, rel=1e-12)
    assert 1 < result.degrees < 5


# Seeds ---------------------------------------------------------------------------------------------------------------


def seeds_of(
    random: np.random.Generator, clips: int, seeds: int, of_seed: float
) -> tuple[list[float], list[Replicates]]:
    """Values = effect of the clip + effect of the seed + noise. The true mean is 0."""
    effects = random.normal(size=clips)
    rows = [effects + of_seed * random.normal() + random.normal(size=clips) for _ in range(seeds)]
    groups = [str(k) for k in range(clips)]
    scores = [score_values([{"value": v} for v in row], groups) for row in rows]
    return [float(score.value or 0) for score in scores], [score.replicates for score in scores if score.replicates]


@pytest.mark.parametrize("of_seed", [0.0, 1.0])
def test_the_interval_over_seeds_covers_clips_and_seeds(of_seed: float) -> None:
    """200 trials with 4 seeds of 40 clips. Seeds that do not differ, and seeds that differ more than the clips."""
    random = np.random.default_rng(0)
    covered = narrow = 0
    for _ in range(200):
        values, several = seeds_of(random, 40, 4, of_seed)
        whole = over_seeds(values, several)
        assert whole.ci95 is not None and whole.method == "over clips and seeds"
        covered += whole.ci95[0] <= 0 <= whole.ci95[1]
        clips = jackknife(float(np.mean(values)), average(several))
        low, high = student_interval(float(np.mean(values)), clips.standard_error, clips.degrees)
        narrow += low <= 0 <= high
    assert 180 <= covered <= 199
    assert of_seed == 0 or narrow < 120  # clips alone hold the truth too seldom


def test_the_variance_over_seeds_is_that_of_two_crossed_factors() -> None:
    """Numpy: mean squares of a table [clips, seeds], each clip a block of its own."""
    values = np.random.default_rng(3).normal(size=(12, 3)) + np.array([0.0, 0.9, -0.4])
    groups = [str(k) for k in range(12)]
    scores = [score_values([{"value": v} for v in column], groups) for column in values.T.tolist()]
    found = over_seeds([float(score.value or 0) for score in scores], [score.replicates for score in scores])
    mean, rows, columns = values.mean(), values.mean(1), values.mean(0)
    rest = values - rows[:, None] - columns + mean
    of_clips = rows.var(ddof=1) / 12
    of_seeds = columns.var(ddof=1) / 3 - (rest**2).sum() / (11 * 2) / (12 * 3)
    error = math.sqrt(of_clips + of_seeds)
    degrees = error**4 / (of_clips**2 / 11 + of_seeds**2 / 2)
    half = stats.t.ppf(0.975, degrees) * error
    assert of_seeds > 0 and found.ci95 == pytest.approx((mean - half, mean + half), rel=1e-9)


def test_seeds_without_replicates_have_students_interval() -> None:
    found = over_seeds([1.0, 2.0, 4.0], [None, None, None])
    expected = stats.ttest_1samp([1.0, 2.0, 4.0], 0)
    assert found.method == "over seeds" and found.p_value == pytest.approx(expected[1])
    assert found.ci95 == pytest.approx(tuple(expected.confidence_interval()))
    assert over_seeds([1.0], [None]).ci95 is None
    old = over_seeds([1.0, 1.2], [None, None], [(-1.0, 3.0), (-0.8, 3.2)])  # an older record: an interval a seed
    assert old.method == "over clips and seeds" and old.ci95 is not None
    assert old.ci95[0] < -0.9 < 3.1 < old.ci95[1] < 3.5  # clips count, and hardly the seeds


def test_holm_is_the_published_procedure() -> None:
    """Sorted p times 4, 3, 2, 1, then never falling."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_a_design_of_one_side_is_that_of_means() -> None:
    score = score_values([{"value": float(k)} for k in range(8)], [str(k) for k in range(8)])
    assert score.replicates is not None
    assert score.replicates.design == Design.of([], [str(k) for k in range(8)]).digest


def test_values_that_differ_by_rounding_alone_are_equal():
    """Two models whose clips are the references plus and minus the same shift have one FVD, up to the last digits."""
    real = torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    names = [str(k) for k in range(64)]
    scores = [score_frechet(real, real + sign * shift, names) for sign in (1, -1)]
    found = compare_scores(*scores)
    assert (found.difference, found.ci95, found.p_value) == (0.0, (0.0, 0.0), 1.0)
