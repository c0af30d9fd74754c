"""Intervals, tests and comparisons of numbers. Needs no torch, so tables are made from records alone.

Clips of one source video or one input count as one observation. An interval and its p value come from one test, so they
cannot contradict each other. docs/metrics.md has the measured coverage and error rates.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from dcbench.errors import UserError
from dcbench.record import Replicates, Score

ROUNDING = 1e-9  # relative; smaller spreads are no spread: both models have the same value
BLOCKS_OF_OLD = 16  # of the intervals in older records
FEW_GROUPS = 6  # with fewer, all sign flips of a perfect difference give p > 0.05, so nothing can be told
Interval = tuple[float, float]


# Intervals -----------------------------------------------------------------------------------------------------------


def student_interval(value: float, error: float, degrees: float, level: float = 0.95) -> Interval:
    """value ± t · error."""
    width = float(stdtrit(degrees, 0.5 + level / 2)) * error
    return value - width, value + width


def student_p(value: float, error: float, degrees: float) -> float:
    """Two-sided p value of 'the value is 0'. It is below 0.05 if and only if `student_interval` leaves out 0."""
    return float(2 * stdtr(degrees, -abs(value) / error))


def wilson(hits: float, count: float, degrees: float = math.inf) -> tuple[float, Interval]:
    """A share and its 95 % interval (Wilson 1927). `count` may be a fraction: an effective number of clips."""
    z = float(ndtri(0.975) if math.isinf(degrees) else stdtrit(degrees, 0.975))
    share = hits / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return share, (min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def share_interval(share: float, error: float, count: int, n_groups: int) -> Interval:
    """Wilson's interval of a share with this standard error: its effective number of clips is share(1 - share)/error².

    That number is at most `count`, or `n_groups` if the error is 0: 24 hits of 24 say no more than 'at least 86 %'.
    """
    effective = min(share * (1 - share) / error**2, count) if error > 0 else n_groups
    return wilson(share * effective, effective, n_groups - 1 if n_groups < count else math.inf)[1]


def mean_interval(
    values: Sequence[float], groups: Sequence[str] | None = None, level: float = 0.95, seed: int = 0
) -> Interval | None:
    """Interval of the mean of per-clip values: of two intervals over groups, at each end the wider one.

    The bias-corrected and accelerated bootstrap (BCa) follows skewed values, but holds the truth too seldom with heavy
    tails and unequal groups; Student's t the other way round. Clips of one group are drawn together. The percentiles
    are widened like Student's t (Hesterberg, arXiv 1411.5279, §3.2). Below 6 effective groups, where the bootstrap has
    too few values, it is Student's t alone. None for fewer than three groups, and if all groups have the same mean:
    then the spread is not known.
    """
    from scipy.stats import bootstrap  # the import takes a second

    sums, sizes = group_sums(values, groups)
    means = sums / sizes
    if len(sums) < 3 or float(np.ptp(means)) == 0:
        return None
    count = len(sums)
    student = student_interval(math.fsum(sums) / float(sizes.sum()), *_mean_error(sums, sizes), level)
    if effective_number(sizes) < FEW_GROUPS:
        return student
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
    return min(float(low), student[0]), max(float(high), student[1])


def group_sums(values: Sequence[float], groups: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of each group, sorted, so that the order of the clips changes no digit."""
    if groups is not None and len(groups) != len(values):
        raise UserError(f"{len(groups)} groups for {len(values)} values; give one group for each value")
    table: dict[str, list[float]] = {}
    for index, value in enumerate(values):
        table.setdefault(groups[index] if groups is not None else str(index), []).append(value)
    rows = sorted((math.fsum(part), len(part)) for part in table.values())
    return np.array([total for total, _ in rows]), np.array([size for _, size in rows])


def _mean_error(sums: np.ndarray, sizes: np.ndarray) -> tuple[float, float]:
    """Standard error of sum(sums) / sum(sizes) over independent groups, and its degrees of freedom.

    The residual of a large group is too small, because the mean follows that group; the division corrects it (CR2 of
    Bell & McCaffrey 2002, for group means of equal variance). Seven groups, one of them with 3 of 4 clips, are no
    better than two, so the degrees are those of the effective number of groups. Equal groups have the usual n - 1.
    """
    shares = sizes / sizes.sum()
    residuals = shares * (sums / sizes - sums.sum() / sizes.sum())
    variance = np.square(residuals) / (1 - 2 * shares + np.square(shares).sum())
    return math.sqrt(float(variance.sum())), effective_number(sizes) - 1


def effective_number(sizes: np.ndarray) -> float:
    """The number of groups of equal size that is worth as much: (sum of sizes)² / sum of sizes²."""
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


@dataclass(frozen=True)
class Jackknife:
    standard_error: float
    bias_corrected: float
    degrees: float  # of freedom


def jackknife(value: float, replicates: Replicates) -> Jackknife:
    """Delete-a-block jackknife for blocks of unequal size (Busing, Meijer & van der Leeden 1999).

    The strata are independent samples: their variances add, and the degrees of freedom are Welch's.
    """
    corrected, variances, degrees = value, [], []
    for stratum in replicates.strata:
        h, without = (np.array(column) for column in zip(*stratum, strict=True))
        pseudo = h * value - (h - 1) * without
        mean = float((pseudo / h).sum())
        corrected += mean - value
        variances.append(float(((pseudo - mean) ** 2 / (h - 1)).mean()))
        degrees.append(effective_number(1 / h) - 1)  # one block with most of the clips is worth little
    total = sum(variances)
    welch = sum(variance**2 / df for variance, df in zip(variances, degrees, strict=True))
    return Jackknife(math.sqrt(total), corrected, total**2 / welch if welch > 0 else sum(degrees))


def mean_replicates(values: Sequence[float], groups: np.ndarray, blocks: Sequence[np.ndarray]) -> list[float]:
    """The mean of the values without each block of groups; `groups`: the group of each value."""
    numbers = np.array(values)
    return [math.fsum(kept) / len(kept) for kept in (numbers[~np.isin(groups, block)] for block in blocks)]


# Comparisons ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Model A minus model B on the same clips."""

    difference: float  # for a biased metric such as FVD: that of many clips, without the bias of few
    ci95: Interval | None
    p_value: float  # of 'no difference'; below 0.05 if and only if the interval leaves out 0
    method: str
    n: int  # clips
    n_groups: int  # independent source videos or inputs
    detectable: float | None = None  # the difference that 80 % of such comparisons would find
    plain: float | None = None  # the difference of the two values as they are printed, if it is another one

    @property
    def is_too_small(self) -> bool:
        """Whether there are too few independent clips to tell anything."""
        return self.n_groups < FEW_GROUPS


def detectable(error: float, degrees: float) -> float:
    """The true difference that a test at level 5 % finds with a chance of 80 %."""
    return error * float(stdtrit(degrees, 0.975) + stdtrit(degrees, 0.8))


def compare_paired(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str] | None = None, seed: int = 0
) -> Comparison:
    """Mean of first - second: a two-sided sign-flip test over groups, and the interval of all means it does not reject.

    All flips for up to 14 groups, else 9999 random ones. Exact for differences with a symmetric distribution, however
    heavy its tails. Below 6 groups no flip can show a difference, so it is Student's t.
    """
    if len(first) != len(second):
        raise UserError(f"a paired comparison needs the same clips on both sides, got {len(first)} and {len(second)}")
    if len(first) < 2:
        raise UserError("a paired comparison needs at least 2 clips")
    gaps = [float(a) - float(b) for a, b in zip(first, second, strict=True)]
    if not np.isfinite(gaps).all():
        raise UserError("a value is NaN or infinite; compare only clips that both models have a value for")
    sums, sizes = group_sums(gaps, groups)
    count = len(sums)
    if count < 2:
        raise UserError("a paired comparison needs at least 2 independent source videos")
    mean, (error, degrees) = math.fsum(sums) / float(sizes.sum()), _mean_error(sums, sizes)
    if not any(gaps):
        return Comparison(0.0, (0.0, 0.0), 1.0, "no clip differs", len(gaps), count)
    if float(np.ptp(sums / sizes)) == 0:
        return Comparison(mean, None, 0.5 ** (count - 1), "sign-flip test, no spread", len(gaps), count)
    if count < FEW_GROUPS:
        interval, p_value = student_interval(mean, error, degrees), student_p(mean, error, degrees)
        method = "Student's t"
    else:
        (interval, p_value), method = _sign_flips(sums, sizes, seed), "sign-flip test and its interval"
    return Comparison(mean, interval, p_value, method, len(gaps), count, detectable(error, degrees))


def _sign_flips(sums: np.ndarray, sizes: np.ndarray, seed: int) -> tuple[Interval, float]:
    """The means that the sign-flip test does not reject at 5 %, and its p value of a mean of 0.

    With signs s, 'the flipped sums of (gap - mean) are as large as the observed ones' holds for all means up to some
    distance from the observed one, which a formula gives. So no search is needed.
    """
    total, rows = float(sums.sum()), float(sizes.sum())
    above, below = [], []  # how far the mean may move, times the number of rows, for each pattern of signs
    for signs in _sign_patterns(len(sums), seed):
        b = signs @ sizes / rows  # in [-1, 1]
        c = signs @ sums - total * b
        with np.errstate(divide="ignore", invalid="ignore"):
            ends = np.stack([c / (1 + b), -c / (1 - b), c / (1 - b), -c / (1 + b)])
        ends[:, np.abs(b) == 1] = np.inf  # the observed signs, or all turned: never smaller
        above.append(ends[:2].max(0))
        below.append(ends[2:].max(0))
    reach = [np.sort(np.concatenate(side))[::-1] for side in (above, below)]
    kept = math.floor(0.05 * len(reach[0]))  # as many patterns may be as large in a rejected mean
    side, distance = (0, -total) if total < 0 else (1, total)
    p_value = float((reach[side] >= distance * (1 - 1e-12)).mean())
    return ((total - reach[1][kept]) / rows, (total + reach[0][kept]) / rows), p_value


def _sign_patterns(count: int, seed: int) -> list[np.ndarray]:
    """Rows of +1 and -1: all with a first +1 for up to 14 groups, else the observed one and 9999 random ones."""
    if count <= 14:
        bits = np.arange(2 ** (count - 1))[:, None] >> np.arange(count - 1) & 1
        return [np.concatenate([np.ones((len(bits), 1)), 1.0 - 2 * bits], 1)]
    random = np.random.default_rng(seed)
    parts = [np.ones((1, count))]
    return parts + [1.0 - 2 * random.integers(0, 2, (1111, count), dtype=np.int8) for _ in range(9)]


def compare_replicates(
    values: tuple[float, float], replicates: tuple[Replicates, Replicates], n: int, n_groups: int
) -> Comparison:
    """Difference of two scores on the same clips, from the same blocks: interval and p value of one jackknife.

    For a biased metric the difference is the jackknife's, without the bias. A model that copies its input has less bias
    at the same number of clips, so the plain difference of two FVDs favours it.
    """
    if replicates[0].design != replicates[1].design:
        raise UserError("they were scored on other clips, or on other groups of clips")
    plain, gaps = values[0] - values[1], subtract(*replicates)
    result = jackknife(plain, gaps)
    biased = replicates[0].biased and replicates[1].biased
    value, error, degrees = result.bias_corrected if biased else plain, result.standard_error, result.degrees
    method = f"jackknife over {' and '.join(str(len(stratum)) for stratum in gaps.strata)} blocks"
    scale = max(abs(number) for one in replicates for stratum in one.strata for _, number in stratum)
    if error <= ROUNDING * scale:
        if abs(value) > ROUNDING * scale:
            raise UserError("each block of clips gives the same difference, so there is no error to test it with")
        return Comparison(0.0, (0.0, 0.0), 1.0, method, n, n_groups, plain=plain if biased else None)
    return Comparison(
        value,
        student_interval(value, error, degrees),
        student_p(value, error, degrees),
        f"{method}, bias of {n} clips removed" if biased else method,
        n,
        n_groups,
        detectable(error, degrees),
        plain if biased else None,
    )


def compare_scores(first: Score, second: Score) -> Comparison:
    """Two scores of one metric on the same clips, by their replicates. UserError if this is not possible."""
    sides = (first, second)
    for score in sides:
        if score.value is None or score.replicates is None:
            raise UserError("too few independent clips for an interval, or a record of an older dcbench")
    values, parts = [score.value for score in sides], [score.replicates for score in sides]
    return compare_replicates(tuple(values), tuple(parts), first.n_generated, first.n_groups or 0)  # type: ignore[arg-type]


def subtract(first: Replicates, second: Replicates) -> Replicates:
    """Replicates of the difference of two scores with the same blocks."""
    pairs = zip(first.strata, second.strata, strict=True)
    strata = [[(h, a - b) for (h, a), (_, b) in zip(one, two, strict=True)] for one, two in pairs]
    return Replicates(design=first.design, strata=strata, biased=first.biased)


def average(several: Sequence[Replicates]) -> Replicates:
    """Replicates of the mean of scores with the same blocks."""
    strata = [
        [(blocks[0][0], math.fsum(value for _, value in blocks) / len(blocks)) for blocks in zip(*columns, strict=True)]
        for columns in zip(*(one.strata for one in several), strict=True)
    ]
    return Replicates(design=several[0].design, strata=strata, biased=several[0].biased)


@dataclass(frozen=True)
class Estimate:
    """A number over several seeds, with its interval, the p value of 'it is 0', and what the interval covers."""

    value: float
    ci95: Interval | None
    p_value: float | None
    method: str


def over_seeds(
    values: Sequence[float],
    several: Sequence[Replicates | None],
    intervals: Sequence[Interval | None] = (),
    without_bias: bool = False,
) -> Estimate:
    """The mean over seeds, for other clips and other seeds: clips and seeds are two crossed sources of variance.

    Variance = that of the clips (jackknife of the mean) + that of the seeds - that of both together, which the first
    two both contain (Cameron, Gelbach & Miller 2011). Without replicates (older records), or if the seeds had other
    clips, the variance of the clips is the mean of those in `intervals`: it may be too large, as seeds average a part
    of it. Without intervals too, only the seeds count. `without_bias`: the jackknife's value, for biased metrics.
    """
    count, known = len(values), [one for one in several if one is not None]
    mean = shown = math.fsum(values) / count
    spread = float(np.var(values, ddof=1)) / count if count > 1 else 0.0
    of_clips, degrees = 0.0, float(BLOCKS_OF_OLD - 1)
    if len(known) == count and len({one.design for one in known}) == 1:
        whole = average(known)
        result = jackknife(mean, whole)
        shown = result.bias_corrected if without_bias and whole.biased else mean
        of_clips, degrees = result.standard_error**2, result.degrees
        gaps = [jackknife(v - mean, subtract(one, whole)) for v, one in zip(values, known, strict=True)]
        spread -= sum(gap.standard_error**2 for gap in gaps) / count / max(count - 1, 1)
    elif intervals and all(intervals):
        widths = [high - low for low, high in intervals if (low, high)]  # type: ignore[misc]
        of_clips = sum((width / 2 / 1.96) ** 2 for width in widths) / count
    of_seeds = max(0.0, spread)
    variance = of_clips + of_seeds
    if variance == 0:
        return Estimate(shown, None, None, "no interval")
    welch = of_clips**2 / degrees + (of_seeds**2 / (count - 1) if count > 1 else 0.0)
    error, degrees = math.sqrt(variance), variance**2 / welch
    method = " and ".join(name for name, part in (("clips", of_clips), ("seeds", spread)) if part)
    return Estimate(shown, student_interval(shown, error, degrees), student_p(shown, error, degrees), f"over {method}")


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values after Holm's step-down adjustment (1979): reject those up to 0.05. The metrics may be dependent."""
    adjusted, highest = {}, 0.0
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p) in enumerate(ordered):
        highest = max(highest, min(1.0, (len(ordered) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
