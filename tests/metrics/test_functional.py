"""Distances and their uncertainty, against recorded values of the peers' own code and against planted truth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.metrics import functional as fn

CASES = (
    "logits400_N<d",
    "logits_first32_N>d",
    "pooled1024_N<d",
    "real_vs_real_logits400",
    "identical_logits400",
    "synthetic_N800/700_d64_seed10",
)


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Tensor], dict]:
    folder = Path(__file__).parents[1] / "data" / "i3d"
    features = {name: torch.from_numpy(array) for name, array in np.load(folder / "features.npz").items()}
    return features, json.loads((folder / "expected.json").read_text())


def case(features: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    real, fake = features["real_logits"], features["fake_logits"]
    if name.startswith("synthetic"):
        random = np.random.default_rng(10)
        mix = random.normal(size=(64, 64)) / 8
        first = (random.normal(size=(800, 64)) @ mix).astype(np.float32)
        return torch.from_numpy(first), torch.from_numpy(
            (random.normal(size=(700, 64)) @ mix * 1.1 + 0.05).astype(np.float32)
        )
    order = np.random.default_rng(3).permutation(64)
    return {
        "logits400_N<d": (real, fake),
        "logits_first32_N>d": (real[:, :32], fake[:, :32]),
        "pooled1024_N<d": (features["real_pool"], features["fake_pool"]),
        "real_vs_real_logits400": (real[order[:32]], real[order[32:]]),
        "identical_logits400": (real, real),
    }[name]


@pytest.mark.parametrize("name", CASES)
def test_equals_the_exact_value_of_recorded_features(recorded: tuple, name: str) -> None:
    """Measured: 1e-13 relative or better in all six cases; exactly 0 for identical sets."""
    features, expected = recorded
    real, generated = case(features, name)
    fvd = expected["fvd"][name]["exact_f64_ddof1 (nuclear norm; reference)"]
    kvd = expected["kvd"][name]["unbiased_full_f64 (reference)"]
    assert fn.frechet_distance(real, generated) == pytest.approx(fvd, rel=1e-9, abs=1e-9)
    assert fn.kernel_distance(real, generated) == pytest.approx(kvd, rel=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_original_tensorflow_formula_and_the_groups_own_kvd(recorded: tuple, name: str) -> None:
    """tf-gan's roots in float64, and the code of the paper's group, whose float32 leaves 3e-6."""
    features, expected = recorded
    real, generated = case(features, name)
    tfgan = expected["fvd"][name]["tfgan (re-typed, f64, ddof1, SVD roots)"]
    lvdm = expected["kvd"][name]["LVDM/TATS polynomial_mmd (re-typed; sklearn, unbiased, full, x1)"]
    assert fn.frechet_distance(real, generated) == pytest.approx(tfgan, rel=1e-9, abs=1e-9)
    assert fn.kernel_distance(real, generated) == pytest.approx(lvdm, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_other_published_definitions_of_kvd_are_reachable(recorded: tuple, name: str) -> None:
    features, expected = recorded
    real, generated = case(features, name)
    table = expected["kvd"][name]
    biased = fn.kernel_distance(real, generated, unbiased=False)
    assert biased == pytest.approx(table["biased_full_f64"], rel=1e-9, abs=1e-9)
    square = fn.PolynomialKernel(degree=2, gamma=None, coef0=0.0)
    jedi = 100 * fn.kernel_distance(real, generated, square, unbiased=False)
    assert jedi == pytest.approx(table["JEDi mmd_poly deg2 coef0=0 biased x100"], rel=1e-5, abs=1e-3)


def test_a_known_distance_between_two_gaussians() -> None:
    """Σ = diag(a²), diag(b²), means m apart: |m|² + Σ (a - b)², with sample moments made exact by whitening."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    base = base - base.mean(0)
    white = base @ torch.linalg.inv(torch.linalg.cholesky(base.T @ base / 499)).T
    a = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64)
    b = torch.tensor([2.0, 2, 1, 4, 7, 6], dtype=torch.float64)
    real, generated = white * a, white.flip(0) * b + 0.5
    assert fn.frechet_distance(real, generated) == pytest.approx(6 * 0.25 + 1 + 4 + 4, rel=1e-10)
    assert fn.frechet_distance(generated, real) == pytest.approx(fn.frechet_distance(real, generated), rel=1e-12)


@pytest.mark.parametrize("count", [3, 40, 400])
def test_identical_sets_are_at_distance_zero(count: int) -> None:
    features = 20 * torch.randn(count, 40, generator=torch.Generator().manual_seed(1)) + 3
    assert fn.frechet_distance(features, features) < 1e-8
    assert fn.frechet_distance(features, features[torch.randperm(count)]) < 1e-8


def test_inputs_are_not_changed() -> None:
    real, generated = torch.rand(20, 4), torch.rand(20, 4)
    before = real.clone(), generated.clone()
    for distance in (fn.frechet_distance, fn.kernel_distance):
        distance(real, generated)
    fn.kernel_distance_variance(real, generated)
    assert torch.equal(real, before[0]) and torch.equal(generated, before[1])


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (torch.rand(1, 4), torch.rand(5, 4), r"1 reference clip\(s\): .* at least 2 a side"),
        (torch.rand(5, 4), torch.rand(0, 4), r"0 generated clip\(s\)"),
        (torch.rand(5, 4), torch.rand(5, 3), "reference features have 4 dimensions, generated ones 3"),
        (torch.rand(5), torch.rand(5, 3), r"got shape \[5\]"),
        (torch.rand(5, 4), torch.full((5, 4), math.nan), "generated features hold NaN or infinity in 5 row"),
        (torch.full((5, 4), math.inf), torch.rand(5, 4), "reference features hold NaN or infinity"),
    ],
)
def test_bad_features_are_refused(real: Tensor, generated: Tensor, message: str) -> None:
    for distance in (fn.frechet_distance, fn.kernel_distance):
        with pytest.raises(UserError, match=message):
            distance(real, generated)


def test_two_clips_are_enough_for_a_value() -> None:
    real, generated = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    assert fn.frechet_distance(real, generated) == pytest.approx(1.0)


# Uncertainty


def gaussian(count: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 12, generator=generator, dtype=torch.float64) * scale + shift


def test_the_analytic_variance_is_the_variance_over_repetitions() -> None:
    values, variances = [], []
    for trial in range(300):
        real, generated = gaussian(60, 2 * trial), gaussian(60, 2 * trial + 1, shift=0.3)
        values.append(fn.kernel_distance(real, generated))
        variances.append(fn.kernel_distance_variance(real, generated))
    assert np.mean(variances) == pytest.approx(np.var(values), rel=0.2)


def test_the_analytic_variance_equals_its_definition() -> None:
    real, generated = gaussian(7, 0), gaussian(7, 1, shift=1.0)
    k, n = fn.CUBIC, 7
    rows, pairs = [], []
    for i in range(n):
        row = []
        for j in range(n):
            if i != j:
                x, y = real[i : i + 1], generated[i : i + 1]
                u, v = real[j : j + 1], generated[j : j + 1]
                row.append(float(k(x, u) + k(y, v) - k(x, v) - k(y, u)))
        rows.append(np.mean(row))
        pairs += row
    slow = 4 / n * np.var(rows, ddof=1) - 2 / (n * (n - 1)) * np.var(pairs, ddof=1)
    assert fn.kernel_distance_variance(real, generated) == pytest.approx(slow, rel=1e-9)
    with pytest.raises(UserError, match="equal sets, got 7 and 6"):
        fn.kernel_distance_variance(real, generated[:6])


def test_the_jackknife_of_a_mean_is_the_standard_error_of_a_mean() -> None:
    real, generated = gaussian(48, 3), gaussian(48, 4)

    def difference(a: Tensor, b: Tensor) -> float:
        return float((a - b)[:, 0].mean())

    blocks = fn.make_blocks(48, blocks=48)
    result = fn.jackknife(difference, real, generated, blocks)
    gaps = (real - generated)[:, 0]
    assert result.standard_error == pytest.approx(float(gaps.std() / math.sqrt(48)), rel=1e-9)
    assert result.bias_corrected == pytest.approx(difference(real, generated), rel=1e-9)


def test_the_jackknife_deletes_the_same_share_of_sets_of_other_sizes() -> None:
    seen: list[tuple[int, int]] = []

    def sizes(a: Tensor, b: Tensor) -> float:
        seen.append((len(a), len(b)))
        return 0.0

    fn.jackknife(sizes, gaussian(32, 0), gaussian(64, 1), fn.make_blocks(64, blocks=8), 0.0)
    assert all(n + m < 96 and m == 56 for n, m in seen) and sum(32 - n for n, _ in seen) == 32


def test_blocks_keep_source_videos_together() -> None:
    groups = [f"video{index // 3}" for index in range(30)]
    blocks = fn.make_blocks(30, groups, blocks=4)
    assert sorted(torch.cat(blocks).tolist()) == list(range(30))
    for block in blocks:
        assert all(
            groups.count(name) == [groups[i] for i in block.tolist()].count(name)
            for name in {groups[i] for i in block.tolist()}
        )
    assert fn.make_blocks(5, ["a", "a", "b", "b", "b"]) == []
    with pytest.raises(ValueError, match="2 groups for 3 clips"):
        fn.make_blocks(3, ["a", "b"])


def test_permutation_p_holds_its_level_and_finds_a_difference() -> None:
    """Under the null the p value is uniform: 5 % of 400 trials below 0.05 is 20; 32 is three standard errors above."""
    low = sum(
        fn.kernel_permutation_p(gaussian(20, 2 * trial), gaussian(15, 2 * trial + 1), permutations=99) <= 0.05
        for trial in range(400)
    )
    assert low <= 32
    assert fn.kernel_permutation_p(gaussian(40, 0), gaussian(30, 1, shift=0.8), permutations=199) == pytest.approx(
        1 / 200
    )


def test_permutation_values_are_kernel_distances() -> None:
    """The shuffled values come from sums over one matrix; the observed one must be the distance itself."""
    real, generated = gaussian(9, 0), gaussian(6, 1, shift=0.5)
    observed = fn.kernel_distance(real, generated)
    pooled = torch.cat([real, generated])
    generator = torch.Generator().manual_seed(0)
    slow = [observed]
    for _ in range(50):
        rows = torch.randperm(15, generator=generator)[:9]
        mask = torch.zeros(15, dtype=torch.bool)
        mask[rows] = True
        slow.append(fn.kernel_distance(pooled[mask], pooled[~mask]))
    expected = np.mean([value >= observed - 1e-12 for value in slow])
    assert fn.kernel_permutation_p(real, generated, permutations=50) == pytest.approx(expected)


def test_frechet_infinity_removes_most_of_the_bias() -> None:
    """True distance 12 · 0.5² = 3. At N = 64 the plain value lies near 4.3."""
    plain, limit = [], []
    for trial in range(60):
        real, generated = gaussian(64, 2 * trial), gaussian(64, 2 * trial + 1, shift=0.5)
        plain.append(fn.frechet_distance(real, generated))
        limit.append(fn.frechet_infinity(real, generated).value)
    assert np.mean(plain) - 3 > 1
    assert abs(np.mean(limit) - 3) < 0.35


def test_frechet_infinity_beside_the_original_definition(recorded: tuple) -> None:
    """Chong & Forsyth thin the generated set alone and draw a straight line (the table in docs/metrics.md)."""
    real, generated = (side.double() for side in case(recorded[0], "logits_first32_N>d"))
    assert fn.frechet_infinity(real, generated).value == pytest.approx(18.233, abs=1e-3)
    assert fn.frechet_infinity(real, generated, order=1).value == pytest.approx(31.700, abs=1e-3)
    sizes, found = np.linspace(len(generated) // 4, len(generated), 15).astype(int), []
    for seed in range(200):
        random = np.random.default_rng(seed)
        subsets = [generated[torch.from_numpy(random.choice(len(generated), size, replace=False))] for size in sizes]
        values = [fn.frechet_distance(real, subset) for subset in subsets]
        found.append(np.polyfit(1 / sizes, values, 1)[1])
    assert np.mean(found) == pytest.approx(33.0, abs=0.1)  # 33.02, with a spread of 3.6 over the draws


def test_frechet_infinity_reports_its_fit_and_its_interval() -> None:
    real, generated = gaussian(200, 0), gaussian(150, 1, shift=0.5)
    fit = fn.frechet_infinity(real, generated, fn.make_blocks(200, blocks=8))
    assert fit.sizes[0] == 37 and fit.sizes[-1] == 150 and len(fit.sizes) == len(fit.values) == 8
    assert fit.values[-1] == pytest.approx(fn.frechet_distance(real, generated))
    assert fit.ci95 is not None and fit.ci95[0] < fit.value < fit.ci95[1]
    assert fit.value == fit.coefficients[0] == fn.frechet_infinity(real, generated).value  # seeded: the same again
    line = fn.frechet_infinity(real, generated, order=1)
    assert len(line.coefficients) == 2 and line.coefficients[1] > 0
    with pytest.raises(UserError, match="8 clips are too few"):
        fn.frechet_infinity(real[:8], generated[:8])


def test_manifold_metrics_of_plain_cases() -> None:
    real = gaussian(300, 0)
    same = fn.manifold_metrics(real, real)
    assert same.precision == same.recall == same.coverage == 1
    assert same.density > 1  # each point lies in its own ball and in those of its neighbours
    far = fn.manifold_metrics(real, gaussian(300, 1, shift=100.0))
    assert far == fn.Manifold(0, 0, 0, 0)
    narrow = fn.manifold_metrics(real, gaussian(300, 2, scale=0.1))
    assert narrow.precision == 1 and narrow.recall < 0.05  # faithful, but without variety
    with pytest.raises(UserError, match="more than 5 clips"):
        fn.manifold_metrics(real[:5], real[:5])


def test_mean_interval_covers_and_respects_source_videos() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        low, high = fn.mean_interval(random.normal(size=30).tolist(), seed=trial) or (0, 0)
        covered += low <= 0 <= high
    assert covered >= 180
    per_video = np.repeat(random.normal(size=20), 5)
    groups = [str(index // 5) for index in range(100)]
    wide, narrow = fn.mean_interval(per_video.tolist(), groups), fn.mean_interval(per_video.tolist())
    assert wide and narrow and wide[1] - wide[0] > 1.7 * (narrow[1] - narrow[0])
    assert fn.mean_interval([1.0, 2.0]) is None and fn.mean_interval([3.0] * 5) == (3.0, 3.0)
