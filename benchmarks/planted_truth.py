"""Bias of the metrics and coverage of their intervals, on distributions with a known true distance.

    uv run python benchmarks/planted_truth.py [--trials 100] [--dimensions 400] [--sizes 128 ...] [--pairs 16 ...]

Both sets are Gaussian in the 400 dimensions of I3D's logits; fewer `--dimensions` are much faster. The covariance is
that of 120 recorded clips (plus 2 % of its mean variance in every direction), so bias and spread are those of real FVD.
The true FVD is 50.1. The tables in docs/metrics.md are this script's output.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcbench.metrics import functional as fn
from dcbench.metrics import statistics

FEATURES = Path(__file__).parents[1] / "tests" / "data" / "i3d" / "features.npz"
TRUE_MEAN_PART, TRUE_COVARIANCE_PART = 45.0, 5.1


class Planted:
    """x ~ N(μ, Σ), y ~ N(μ + δ, s² Σ): FVD = |δ|² + (s - 1)² tr Σ."""

    def __init__(self, dimensions: int = 400) -> None:
        arrays = np.load(FEATURES)
        features = torch.from_numpy(np.concatenate([arrays["real_logits"], arrays["fake_logits"]])).double()
        features = features[:, :dimensions]
        covariance = torch.cov(features.T)
        covariance += 0.02 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        self.root, self.mean = torch.linalg.cholesky(covariance), features.mean(0)
        direction = self.root @ torch.randn(
            features.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64
        )
        self.shift = direction * (TRUE_MEAN_PART / direction.square().sum()).sqrt()
        self.scale = 1 + float((TRUE_COVARIANCE_PART / covariance.trace()).sqrt())
        self.fvd = TRUE_MEAN_PART + TRUE_COVARIANCE_PART

    def draw(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        size = (count, len(self.root))
        x, y = (torch.randn(size, generator=generator, dtype=torch.float64) @ self.root.T for _ in range(2))
        return self.mean + x, self.mean + self.shift + self.scale * y


def inside(intervals: list[tuple[float, float]], truth: float) -> str:
    return f"{100 * np.mean([low <= truth <= high for low, high in intervals]):.0f} %"


def set_metrics(planted: Planted, count: int, trials: int, infinity: bool) -> str:
    fvd, fvd_ci, line, curve, curve_ci, kvd, kvd_ci, kvd_jack = [], [], [], [], [], [], [], []
    for trial in range(trials):
        real, generated = planted.draw(count, 10_000 * count + trial)
        blocks = fn.make_blocks(count)
        fvd.append(fn.frechet_distance(real, generated))
        result = fn.jackknife(fn.frechet_distance, real, generated, blocks, fvd[-1])
        fvd_ci.append(fn.student_interval(fvd[-1], result.standard_error, result.degrees))
        if infinity:
            fit = fn.frechet_infinity(real, generated, blocks)
            line.append(np.polyfit([1 / size for size in fit.sizes], fit.values, 1)[1])
            curve.append(fit.value)
            curve_ci.append(fit.ci95)
        kvd.append(fn.kernel_distance(real, generated))
        error = fn.kernel_distance_variance(real, generated) ** 0.5
        kvd_ci.append(fn.student_interval(kvd[-1], error, count - 1))
        result = fn.jackknife(fn.kernel_distance, real, generated, blocks, kvd[-1])
        kvd_jack.append(fn.student_interval(kvd[-1], result.standard_error, result.degrees))
    truth = planted.fvd
    cells = [
        str(count),
        f"{np.mean(fvd):.1f} ± {np.std(fvd):.1f}",
        f"+{np.mean(fvd) - truth:.1f}",
        inside(fvd_ci, float(np.mean(fvd))),
        f"{np.mean(line) - truth:+.1f}" if infinity else "",
        f"{np.mean(curve):.1f} ± {np.std(curve):.1f}" if infinity else "",
        f"{np.mean(curve) - truth:+.1f}" if infinity else "",
        inside(curve_ci, truth) if infinity else "",
        f"{np.mean(kvd):.2f} ± {np.std(kvd):.2f}",
        inside(kvd_ci, float(np.mean(kvd))),
        inside(kvd_jack, float(np.mean(kvd))),
    ]
    return "| " + " | ".join(cells) + " |"


def paired_tests(count: int, trials: int, difference: float) -> str:
    """A row for two simulated models: shared difficulty per clip, skewed noise per model, `difference` between them."""
    rejected, covered = 0, 0
    for trial in range(trials):
        random = np.random.default_rng([count, trial])
        shared = random.normal(size=count)
        first = shared + 0.3 * random.exponential(size=count)
        second = shared + 0.3 * random.exponential(size=count) - difference
        result = statistics.compare_paired(first.tolist(), second.tolist(), seed=trial)
        rejected += result.p_value <= 0.05
        assert result.ci95 is not None
        covered += result.ci95[0] <= difference <= result.ci95[1]
    return f"| {count} | {difference:g} | {100 * rejected / trials:.1f} % | {100 * covered / trials:.1f} % |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--dimensions", type=int, default=400)
    parser.add_argument("--skip-infinity", action="store_true", help="FVD-infinity takes nine tenths of the time")
    parser.add_argument("--sizes", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--pairs", type=int, nargs="*", default=[8, 16, 64, 256], help="clips of the paired tests")
    given = parser.parse_args()
    planted = Planted(given.dimensions)
    print(f"{given.dimensions} dimensions, true FVD {planted.fvd}; {given.trials} trials a row\n")
    print(
        "| N | FVD | bias | its interval holds E[FVD] | bias of a + b/N | FVD∞ (a + b/N + c/N²) | bias | its interval "
        "holds the truth | KVD | analytic interval | jackknife |"
    )
    print("|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|")
    for count in given.sizes:
        print(set_metrics(planted, count, given.trials, not given.skip_infinity), flush=True)
    print("\n| clips | true difference | sign-flip test rejects at 5 % | BCa interval holds it |\n|--:|--:|--:|--:|")
    for count in given.pairs:
        for difference in (0.0, 0.1):
            print(paired_tests(count, 10 * given.trials, difference), flush=True)


if __name__ == "__main__":
    main()
