"""Bias of FVD, and coverage of its intervals, with the covariance of real logits: for free and for tied models.

    uv run python benchmarks/planted_truth.py [--trials 100] [--dimensions 400] [--sizes 128 ...] [--ties 0 0.9]

Both sets are Gaussian in the 400 dimensions of I3D's logits; fewer `--dimensions` are much faster. The covariance is
that of 120 recorded clips (plus 2 % of its mean variance in every direction), so bias and spread are those of real FVD.
The true FVD is 50.1. `--ties`: the correlation of a generated clip with its own reference. docs/metrics.md and
docs/paired-clips.md show this output; `--figure FILE` draws the bias.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcbench.metrics import functional as fn
from dcbench.metrics.base import score_statistic
from dcbench.metrics.design import Design
from dcbench.metrics.distances import score_frechet, score_frechet_infinity
from dcbench.reports.figures import Curve, curves

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

    def draw(self, count: int, seed: int, tie: float) -> tuple[Tensor, Tensor]:
        """`count` pairs; correlation `tie` between a clip and its own reference."""
        generator = torch.Generator().manual_seed(seed)
        size = (count, len(self.root))
        x, own = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
        y = tie * x + (1 - tie**2) ** 0.5 * own
        return self.mean + x @ self.root.T, self.mean + self.shift + self.scale * y @ self.root.T


def inside(intervals: list[tuple[float, float]], truth: float) -> str:
    return f"{100 * np.mean([low <= truth <= high for low, high in intervals]):.0f} %"


def mmd(real: Tensor, generated: Tensor, design: Design) -> float:
    return fn.kernel_distance(real, generated, groups=design)


def measure(planted: Planted, count: int, trials: int, tie: float, infinity: bool) -> tuple[list[str], float]:
    """The cells of a row, and the bias of FVD."""
    names = [str(k) for k in range(count)]
    fvd, corrected, fvd_ci, limit, limit_ci, kvd, kvd_ci = [], [], [], [], [], [], []
    for trial in range(trials):
        real, generated = planted.draw(count, 10_000 * count + trial, tie)
        score = score_frechet(real, generated, names)
        fvd.append(score.value)
        corrected.append(score.details["bias_corrected"])
        fvd_ci.append(score.ci95)
        if infinity:
            score = score_frechet_infinity(real, generated, names)
            limit.append(score.value)
            limit_ci.append(score.ci95)
        score = score_statistic(mmd, real, generated, names)
        kvd.append(score.value)
        kvd_ci.append(score.ci95)
    bias = float(np.mean(fvd)) - planted.fvd
    cells = [f"{tie:g}", str(count), f"{np.mean(fvd):.1f} ± {np.std(fvd):.1f}", f"{bias:+.1f}"]
    cells += [inside(fvd_ci, float(np.mean(fvd))), f"{np.mean(corrected) - planted.fvd:+.1f}"]
    cells += [f"{np.mean(limit):.1f} ± {np.std(limit):.1f}" if infinity else ""]
    cells += [inside(limit_ci, planted.fvd) if infinity else ""]
    return [*cells, f"{np.mean(kvd):.2f} ± {np.std(kvd):.2f}", inside(kvd_ci, float(np.mean(kvd)))], bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--dimensions", type=int, default=400)
    parser.add_argument("--skip-infinity", action="store_true", help="FVD-infinity takes nine tenths of the time")
    parser.add_argument("--sizes", type=int, nargs="*", default=[128, 256, 512, 1024, 2048])
    parser.add_argument("--ties", type=float, nargs="*", default=[0.0, 0.9])
    parser.add_argument("--figure", type=Path, help="draw the bias of FVD against the number of clips")
    given = parser.parse_args()
    planted, lines = Planted(given.dimensions), dict[str, Curve]()
    print(f"{given.dimensions} dimensions, true FVD {planted.fvd}; {given.trials} trials a row\n")
    print(
        "| tie | N | FVD | bias | its interval holds E[FVD] | bias left by the jackknife | FVD∞ | its interval holds "
        "the truth | KVD | its interval holds E[KVD] |"
    )
    print("|" + "--:|" * 10)
    for tie in given.ties:
        biases = []
        for count in given.sizes:
            row, bias = measure(planted, count, given.trials, tie, not given.skip_infinity)
            print("| " + " | ".join(row) + " |", flush=True)
            biases.append(bias)
        lines[f"correlation {tie:g} with the own reference"] = Curve(list(map(float, given.sizes)), biases)
    if given.figure:
        curves(given.figure, lines, "clips (N)", "bias of FVD", title=f"True FVD {planted.fvd}, {given.dimensions} d")


if __name__ == "__main__":
    main()
