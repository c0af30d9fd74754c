"""Do intervals hold the truth, and do tests hold their level, when clips come in pairs and in groups?

    uv run python benchmarks/paired_clips.py [--parts means inputs sets infinity sizes] [--trials 400] [--processes 2]

Planted truth in 8 dimensions, which is cheap enough for many trials. Every number is drawn with a known distribution:
normal, a mixture of two normals, or heavy tails (Student's t with 5 degrees of freedom). A generated clip is like its
own reference with correlation `tie`, and clips of one video are alike with correlation 0.8. The true FVD is 1.55 in
every cell. The standard error of a share of 400 trials is 1.1 % near 95 %. docs/paired-clips.md shows this output.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from multiprocessing import get_context

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import best_of_each, score_statistic, score_values
from dcbench.metrics.design import Design
from dcbench.metrics.distances import score_frechet, score_frechet_infinity
from dcbench.metrics.statistics import compare_paired, compare_scores
from dcbench.record import Score

DIMENSIONS, TRUE_FVD, ALIKE = 8, 1.55, 0.8
KINDS = ("normal", "mixture", "heavy")
TIES = (0.0, 0.5, 0.9, 1.0)


@cache
def quantiles(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A table (standard normal value, value of the distribution), for a mean of 0 and a variance of 1."""
    z = np.linspace(-7, 7, 20_001)
    if kind == "heavy":
        return z, stats.t.ppf(stats.norm.cdf(z), 5) / math.sqrt(5 / 3)
    x = np.linspace(-12, 12, 20_001)  # 4 of 5 near -0.5, 1 of 5 near 2
    level = 0.8 * stats.norm.cdf(x, -0.5, 0.5) + 0.2 * stats.norm.cdf(x, 2, 0.5)
    return z, np.interp(stats.norm.cdf(z), level, x) / math.sqrt(0.25 + 0.8 * 0.25 + 0.2 * 4)


def shaped(normal: np.ndarray, kind: str) -> Tensor:
    """Standard normal numbers [n d] -> numbers of that distribution. The order of the numbers stays."""
    return torch.from_numpy(normal if kind == "normal" else np.interp(normal, *quantiles(kind)))


def video_of(clips: int, groups: str) -> np.ndarray:
    """The video of each clip. groups: "1", "4" (clips a video), or "uneven": 1, 1, 2, 4, 1, 1, 2, 4, ..."""
    sizes = [1, 1, 2, 4] if groups == "uneven" else [int(groups)]
    return np.repeat(np.arange(clips), np.resize(sizes, clips))[:clips]


def noise(random: np.random.Generator, video: np.ndarray) -> np.ndarray:
    """Standard normal rows [n d]; rows of one video are alike."""
    if len(np.unique(video)) == len(video):
        return random.normal(size=(len(video), DIMENSIONS))
    own = random.normal(size=(len(video), DIMENSIONS))
    shared = random.normal(size=(int(video.max()) + 1, DIMENSIONS))[video]
    return math.sqrt(ALIKE) * shared + math.sqrt(1 - ALIKE) * own


def made(
    random: np.random.Generator, real: np.ndarray, video: np.ndarray, tie: float, kind: str, shift: float = 1.0
) -> Tensor:
    """A model's clips for references `real` (normal numbers): tied to them, with a true FVD of 1.55 · shift²."""
    clips = shaped(tie * real + math.sqrt(1 - tie**2) * noise(random, video), kind)
    clips[:, 0] += shift * math.sqrt(TRUE_FVD)
    return clips


def mmd(real: Tensor, generated: Tensor, design: Design) -> float:
    return fn.kernel_distance(real, generated, groups=design)


score_mmd = partial(score_statistic, mmd)


@cache
def true_kvd(kind: str) -> float:
    """The mean of 12 values of 4000 independent clips a side: its error is below 0.005."""
    values = []
    for trial in range(12):
        random = np.random.default_rng([7, trial])
        video = np.arange(4000)
        real = noise(random, video)
        values.append(fn.kernel_distance(shaped(real, kind), made(random, real, video, 0.0, kind)))
    return float(np.mean(values))


def holds(score: Score, truth: float) -> float:
    """1 if the interval holds the truth, 0 if not; NaN without an interval."""
    return float(score.ci95[0] <= truth <= score.ci95[1]) if score.ci95 else math.nan


# --- trials: each gives a row of numbers -----------------------------------------------------------------------------


def trial_of_sets(cell: tuple, trial: int) -> list[float]:
    """FVD and KVD of a tied model, and four comparisons of two models: equal ones, and one that is better."""
    kind, clips, groups, tie = cell
    random = np.random.default_rng([clips, round(10 * tie), KINDS.index(kind), trial])
    video = video_of(clips, groups)
    names, real = [str(v) for v in video], noise(random, video)
    reference = shaped(real, kind)
    tied, free, better = (made(random, real, video, t, kind, s) for t, s in ((tie, 1.0), (0.0, 1.0), (tie, 0.5)))
    opposite = made(random, real, video, tie, kind, -1.0)
    fvd = [score_frechet(reference, side, names) for side in (tied, free, opposite, better)]
    kvd = [score_mmd(reference, side, names) for side in (tied, free, opposite, better)]
    row = [fvd[0].value or 0.0, *(fvd[0].ci95 or (math.nan, math.nan)), fvd[0].details.get("bias_corrected", math.nan)]
    row += [kvd[0].value or 0.0, holds(kvd[0], true_kvd(kind)), fn.kernel_distance(reference, tied)]
    for scores in (fvd, kvd):
        row += [rejected(scores[0], other) for other in scores[1:]]
    return row


def rejected(first: Score, second: Score) -> float:
    """1.0 if the test tells them apart. NaN if the difference has no spread at all (tie 1: no noise is left in FVD)."""
    try:
        return float(compare_scores(first, second).p_value <= 0.05)
    except UserError:
        return math.nan


def trial_of_infinity(cell: tuple, trial: int) -> list[float]:
    kind, clips, groups, tie = cell
    random = np.random.default_rng([clips, round(10 * tie), KINDS.index(kind), trial])
    video = video_of(clips, groups)
    real = noise(random, video)
    score = score_frechet_infinity(shaped(real, kind), made(random, real, video, tie, kind), [str(v) for v in video])
    return [score.value or 0.0, holds(score, TRUE_FVD)]


def trial_of_sizes(cell: tuple, trial: int) -> list[float]:
    """Independent sides of unequal sizes, or five generated clips for each reference clip (tie 0.9)."""
    references, clips, each, groups = cell
    random = np.random.default_rng([references, clips, each, trial])
    if each:
        of_real, video = np.arange(references), np.repeat(np.arange(references), each)
        real = noise(random, of_real)
        normal = 0.9 * real[video] + math.sqrt(1 - 0.81) * noise(random, np.arange(len(video)))
        design = Design.of([str(v) for v in of_real], [str(v) for v in video])
    else:
        of_real, video = video_of(references, groups), video_of(clips, groups)
        real, normal = noise(random, of_real), noise(random, video)
        design = Design.of([f"real {v}" for v in of_real], [f"made {v}" for v in video])
    reference, same = torch.from_numpy(real), torch.from_numpy(normal)
    p = fn.kernel_permutation_p(reference, same, permutations=199, groups=design)
    generated = same.clone()
    generated[:, 0] += math.sqrt(TRUE_FVD)
    fvd, kvd = (score(reference, generated, design) for score in (score_frechet, score_mmd))
    values = [{"value": float(value)} for value in generated[:, 1]]
    of_clips = score_values(values, [str(v) for v in video])
    return [
        fvd.value or 0.0,
        *(fvd.ci95 or (math.nan, math.nan)),
        fvd.details.get("standard_error", math.nan),
        holds(kvd, true_kvd("normal")),
        holds(of_clips, 0.0),
        math.nan if p is None else p,
    ]


def trial_of_means(cell: tuple, trial: int) -> list[float]:
    """The mean of a model's values, and the paired test of two models whose clips share their difficulty."""
    kind, clips, groups = cell
    random = np.random.default_rng([clips, KINDS.index(kind), trial])
    video = video_of(clips, groups)
    names = [str(v) for v in video]
    one, two, difficulty = (shaped(noise(random, video), kind)[:, 0].numpy() for _ in range(3))
    score = score_values([{"value": float(v)} for v in one], names)
    first, second = difficulty + one, difficulty + two
    null = compare_paired(first.tolist(), second.tolist(), names)
    spread = float(np.std(one - two))
    better = compare_paired((first + 0.5 * spread).tolist(), second.tolist(), names)
    return [holds(score, 0.0), float(null.p_value <= 0.05), float(better.p_value <= 0.05)]


def clips_of_inputs(random: np.random.Generator, kind: str, inputs: int, each: int) -> np.ndarray:
    """[inputs, each] values; clips of one input are alike, and the inputs have the distribution `kind`."""
    shared = shaped(random.normal(size=(inputs, 1)), kind).numpy()
    return math.sqrt(ALIKE) * shared + math.sqrt(1 - ALIKE) * random.normal(size=(inputs, each))


@cache
def true_best(kind: str, each: int) -> float:
    """The mean of the best of `each` clips of an input, from 2 million inputs: its error is below 0.001."""
    return float(clips_of_inputs(np.random.default_rng(11), kind, 2_000_000, each).max(1).mean())


def trial_of_inputs(cell: tuple, trial: int) -> list[float]:
    """The mean of several clips of each input, with inputs as clusters and without, and that of the best clips."""
    kind, inputs, each = cell
    clips = clips_of_inputs(np.random.default_rng([inputs, each, KINDS.index(kind), trial]), kind, inputs, each)
    values = [{"value": float(value)} for value in clips.ravel()]
    names = [str(number) for number in range(inputs) for _ in range(each)]
    places = best_of_each([row["value"] for row in values], names, higher_is_better=True)
    best = score_values([values[place] for place in places], [names[place] for place in places])
    clustered, independent = score_values(values, names), score_values(values)
    widths = [score.ci95[1] - score.ci95[0] if score.ci95 else math.nan for score in (clustered, independent)]
    return [holds(clustered, 0.0), holds(independent, 0.0), holds(best, true_best(kind, each)), widths[0] / widths[1]]


# --- tables ----------------------------------------------------------------------------------------------------------


def percent(values: np.ndarray) -> str:
    """The mean of 0 and 1, in percent; "–" if most trials have no interval."""
    return "–" if np.isnan(values).mean() > 0.5 else f"{100 * np.nanmean(values):.1f}"


def rows_of_sets(cell: tuple, found: np.ndarray) -> str:
    kind, clips, groups, tie = cell
    fvd, low, high, corrected, kvd, kvd_holds, all_pairs = found[:, :7].T
    inside = np.where(np.isnan(low), np.nan, (low <= fvd.mean()) & (fvd.mean() <= high))
    cells = [kind, groups, f"{tie:g}", str(clips), f"{fvd.mean():.2f}", percent(inside), f"{corrected.mean():.2f}"]
    cells += [f"{kvd.mean():.3f}", percent(kvd_holds), f"{all_pairs.mean():.3f}"]
    return "| " + " | ".join([*cells, *(percent(column) for column in found[:, 7:].T)]) + " |"


SETS = (
    "| numbers | clips a video | tie | N | FVD | its interval holds E[FVD], % | FVD without bias | KVD | its interval "
    "holds the truth, % | KVD, all pairs | FVD: tied against untied, % | opposite errors, % | power, % | KVD: tied "
    "against untied, % | opposite errors, % | power, % |"
)


def rows_of_infinity(cell: tuple, found: np.ndarray) -> str:
    kind, clips, groups, tie = cell
    value = f"{found[:, 0].mean():.2f} ± {found[:, 0].std():.2f}"
    return f"| {kind} | {groups} | {tie:g} | {clips} | {value} | {percent(found[:, 1])} |"


def rows_of_sizes(cell: tuple, found: np.ndarray) -> str:
    references, clips, each, groups = cell
    fvd, low, high, error, kvd, means, p = found.T
    inside = percent(np.where(np.isnan(low), np.nan, (low <= fvd.mean()) & (fvd.mean() <= high)))
    made_of = f"{each} for each" if each else str(clips)
    alarms = percent(np.where(np.isnan(p), np.nan, p <= 0.05))
    ratio = f"{np.nanmean(error) / fvd.std():.2f}"
    return (
        f"| {references} | {made_of} | {groups} | {inside} | {ratio} | {percent(kvd)} | {percent(means)} | {alarms} |"
    )


def rows_of_means(cell: tuple, found: np.ndarray) -> str:
    kind, clips, groups = cell
    return f"| {kind} | {groups} | {clips} | " + " | ".join(percent(column) for column in found.T) + " |"


def rows_of_inputs(cell: tuple, found: np.ndarray) -> str:
    kind, inputs, each = cell
    held = " | ".join(percent(column) for column in found.T[:3])
    return f"| {kind} | {inputs} | {each} | {held} | {np.nanmean(found[:, 3]):.2f} |"


def grid(sizes: tuple[int, ...], ties: tuple[float, ...]) -> list[tuple]:
    """Normal numbers, one clip a video: all sizes and ties. Groups and other distributions: tie 0.9, fewer sizes."""
    cells = [("normal", n, "1", tie) for tie in ties for n in sizes]
    cells += [("normal", n, groups, 0.9) for groups in ("4", "uneven") for n in sizes if n > 24 or groups == "uneven"]
    cells += [("normal", n, "4", 0.0) for n in (64, 256)]
    return cells + [(kind, n, "1", 0.9) for kind in KINDS[1:] for n in (64, 256)]


Part = tuple[str, Callable[[tuple, int], list[float]], Callable[[tuple, np.ndarray], str], list[tuple]]
PARTS: dict[str, Part] = {
    "means": (
        "| numbers | clips a video | N | the mean's interval holds the truth, % | sign flips reject equal models, % | "
        "power for half a standard deviation, % |",
        trial_of_means,
        rows_of_means,
        [(kind, n, g) for kind in KINDS for g in ("1", "4", "uneven") for n in (5, 8, 24, 64, 128, 256)],
    ),
    "inputs": (
        "| inputs' values | inputs | clips of each | inputs as clusters: the interval holds the truth, % | clips as "
        "independent, % | best clip of each input, % | width of the first / of the second |",
        trial_of_inputs,
        rows_of_inputs,
        [(kind, n, each) for kind in KINDS for each in (2, 5) for n in (3, 6, 10, 20, 30, 64, 128)],
    ),
    "sets": (SETS, trial_of_sets, rows_of_sets, grid((24, 64, 128, 256), TIES)),
    "sizes": (
        "| reference clips | generated clips | clips a video | FVD: the interval holds E[FVD], % | "
        "its standard error / the true one | "
        "KVD: the interval holds the truth, % | mean of clips: the interval holds the truth, % | "
        "`p_same_distribution` <= 0.05 for equal sides, % |",
        trial_of_sizes,
        rows_of_sizes,
        [
            (64, 64, 0, "1"),
            (256, 64, 0, "1"),
            (64, 256, 0, "1"),
            (1024, 64, 0, "1"),
            (64, 64, 0, "4"),
            (256, 128, 0, "uneven"),
            (24, 120, 5, "1"),
            (64, 320, 5, "1"),
        ],
    ),
    "infinity": (
        "| numbers | clips a video | tie | N | FVD∞ (1.55 is true) | its interval holds the truth, % |",
        trial_of_infinity,
        rows_of_infinity,
        grid((64, 128, 256), (0.0, 0.9, 1.0)),
    ),
}


def share(trial: Callable[[tuple, int], list[float]], cell: tuple, trials: range) -> list[list[float]]:
    torch.set_num_threads(1)
    return [trial(cell, k) for k in trials]


def measure(part: Part, trials: int, processes: int) -> Iterator[str]:
    """The rows of a table, in order. The trials of a cell are shared among the processes."""
    heading, trial, to_row, cells = part
    yield heading
    yield "|" + "--:|" * (heading.count("|") - 1)
    for kind in KINDS:  # once, before the processes are forked
        if trial in (trial_of_sets, trial_of_sizes):
            true_kvd(kind)
        if trial is trial_of_inputs:
            _ = true_best(kind, 2), true_best(kind, 5)
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        step = math.ceil(trials / processes)
        parts = [range(k, min(k + step, trials)) for k in range(0, trials, step)]
        jobs = {cell: [pool.submit(share, trial, cell, part) for part in parts] for cell in cells}
        for cell, waiting in jobs.items():
            yield to_row(cell, np.array([row for job in waiting for row in job.result()], dtype=float))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--trials", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    for name in given.parts:
        print(f"\n{name}: {given.trials} trials a row\n")
        for row in measure(PARTS[name], given.trials, given.processes):
            print(row, flush=True)


if __name__ == "__main__":
    main()
