"""Distances and their uncertainty, against recorded values of the peers' own code and against planted truth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.design import Design

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


def names(count: int, each: int = 1, kind: str = "video") -> list[str]:
    return [f"{kind}{index // each}" for index in range(count)]


def grouped(count: int, each: int, seed: int, shift: float = 0.0) -> Tensor:
    """`count` groups of `each` rows, which are nearly equal."""
    own = gaussian(count, seed, shift).repeat_interleave(each, 0)
    return own + 0.1 * gaussian(len(own), seed + 10_000)


@pytest.mark.parametrize("each", [1, 4])
@pytest.mark.parametrize("paired", [False, True])
def test_permutation_p_holds_its_level_and_finds_a_difference(each: int, paired: bool) -> None:
    """200 null trials: 10 expected, 20 is three standard errors above. Rows of a group count once."""
    low = 0
    for trial in range(200):
        real, made = grouped(20, each, 2 * trial), grouped(20, each, 2 * trial + 1)
        made = 0.8 * real + 0.6 * made if paired else made
        groups = Design.of(names(len(real), each), names(len(made), each, "video" if paired else "other"))
        low += (fn.kernel_permutation_p(real, made, permutations=99, groups=groups) or 0) <= 0.05
    assert low <= 20
    real, far = grouped(30, each, 0), grouped(30, each, 1, shift=0.8)
    groups = Design.of(names(len(real), each), names(len(far), each, "other"))
    assert fn.kernel_permutation_p(real, far, permutations=199, groups=groups) == pytest.approx(1 / 200)


def slow_kernel_distance(x: Tensor, y: Tensor, x_names: list[str], y_names: list[str]) -> float:
    """Numpy and two loops: the mean of k over pairs of rows of different groups, (x·y/d + 1)³."""

    def mean(a: np.ndarray, b: np.ndarray, a_names: list[str], b_names: list[str]) -> float:
        found = []
        for row, name in zip(a, a_names, strict=True):
            for other, its in zip(b, b_names, strict=True):
                if name != its:
                    found.append((row @ other / len(row) + 1) ** 3)
        return float(np.mean(found))

    a, b = x.numpy(), y.numpy()
    within = mean(a, a, x_names, x_names) + mean(b, b, y_names, y_names)
    return within - 2 * mean(a, b, x_names, y_names)


def test_kernel_distance_leaves_out_pairs_of_one_group() -> None:
    real, made = gaussian(9, 0), gaussian(7, 1, shift=0.5)
    x_names = ["a", "a", "b", "c", "d", "d", "d", "e", "f"]
    y_names = ["a", "b", "b", "g", "d", "h", "e"]
    value = fn.kernel_distance(real, made, groups=Design.of(x_names, y_names))
    assert value == pytest.approx(slow_kernel_distance(real, made, x_names, y_names), rel=1e-12)
    plain = fn.kernel_distance(real, made)
    assert plain == pytest.approx(slow_kernel_distance(real, made, names(9), names(7, 1, "made")), rel=1e-12)
    with pytest.raises(UserError, match="at least 2 independent groups"):
        fn.kernel_distance(real, real, groups=["a"] * 9)


@pytest.mark.parametrize(("tie", "each"), [(0.0, 1), (0.9, 1), (1.0, 1), (0.9, 4)])
def test_kernel_distance_is_unbiased_for_pairs_and_groups(tie: float, each: int) -> None:
    """The true value is measured with 4000 independent rows. With pairs it stays."""
    truth = fn.kernel_distance(gaussian(4000, 1), gaussian(4000, 2, shift=0.3))
    values, all_pairs = [], []
    for trial in range(150):
        real = grouped(24, each, 3 * trial)
        made = tie * real + math.sqrt(1 - tie**2) * grouped(24, each, 3 * trial + 1) + 0.3
        values.append(fn.kernel_distance(real, made, groups=names(len(real), each)))
        all_pairs.append(fn.kernel_distance(real, made))
    error = np.std(values) / math.sqrt(150)
    assert abs(np.mean(values) - truth) < 3.5 * error + 0.02  # the groups' own noise adds 1 % to the variance
    assert tie == 0 or np.mean(all_pairs) < truth - (0.05 if each == 1 else 0.01)


def test_permutation_values_are_kernel_distances() -> None:
    """The shuffled values come from sums over one matrix; here each is computed anew, from shuffled rows."""
    real, made = gaussian(9, 0), gaussian(6, 1, shift=0.5)
    design = Design.independent(real, made)
    for groups in (None, design):
        fast = fn.kernel_permutation_p(real, made, permutations=4000, seed=1, groups=groups)
        observed, pooled, random, above = (
            fn.kernel_distance(real, made),
            torch.cat([real, made]),
            np.random.default_rng(0),
            1,
        )
        for _ in range(2000):
            rows = torch.from_numpy(random.permutation(15))
            above += fn.kernel_distance(pooled[rows[:9]], pooled[rows[9:]]) >= observed - 1e-12
        assert fast == pytest.approx(above / 2001, abs=0.02)
    uneven = Design.of(["a", "b", "c"], ["a", "a", "b"])
    assert fn.kernel_permutation_p(real[:3], made[:3], groups=uneven) is None


def test_frechet_infinity_removes_most_of_the_bias() -> None:
    """True distance 12 · 0.5² = 3. At N = 64 the plain value lies near 4.3."""
    plain, limit = [], []
    for trial in range(60):
        real, generated = gaussian(64, 2 * trial), gaussian(64, 2 * trial + 1, shift=0.5)
        plain.append(fn.frechet_distance(real, generated))
        limit.append(fn.frechet_infinity(real, generated).value)
    assert np.mean(plain) - 3 > 1
    assert abs(np.mean(limit) - 3) < 0.35


@pytest.mark.parametrize(("tie", "each"), [(0.9, 1), (1.0, 1), (0.9, 4), (0.0, 4)])
def test_frechet_infinity_keeps_pairs_and_groups_together(tie: float, each: int) -> None:
    """True distance 3. Shuffled apart, tied pairs gave a limit below 0; with rows thinned, that of groups was 3 x."""
    found = []
    for trial in range(60):
        real = grouped(64, each, 3 * trial)
        made = tie * real + math.sqrt(1 - tie**2) * grouped(64, each, 3 * trial + 1) + 0.5
        found.append(fn.frechet_infinity(real, made, names(len(real), each)).value)
    assert abs(np.mean(found) - 3) < 0.4


def test_frechet_infinity_is_the_slow_obvious_version() -> None:
    """Numpy: subsets by the order of the groups' hashes, FVD by a matrix root, numpy's own least squares."""
    real, made = gaussian(40, 0), gaussian(40, 1, shift=0.5)
    labels = names(20, 1) * 2
    design = Design.of(labels, labels)
    order = sorted(set(design.real.tolist()), key=lambda code: (code * 0x9E3779B97F4A7C15) % 2**64)
    sizes = sorted({round(1 / v) for v in np.linspace(1 / 20, 1 / 5, 8)})
    values = []
    for size in sizes:
        number, own = 20 // size, []
        for part in np.array_split(np.array(order[: number * size]), number):
            x, y = (side.numpy()[np.isin(design.real, part)] for side in (real, made))
            root = scipy.linalg.sqrtm(np.cov(x.T) @ np.cov(y.T) + 1e-14 * np.eye(12))
            own.append(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(np.cov(x.T) + np.cov(y.T) - 2 * np.real(root)))
        values.append(np.mean(own))
    fit = np.polynomial.Polynomial.fit(1 / np.array(sizes), values, 2).convert().coef
    found = fn.frechet_infinity(real, made, labels)
    assert found.sizes == tuple(sizes) and found.values == pytest.approx(values, rel=2e-3)  # singular roots: 1e-3
    assert found.value == pytest.approx(
        np.polynomial.Polynomial.fit(1 / np.array(sizes), found.values, 2).convert().coef[0]
    )
    assert fit[0] == pytest.approx(found.value, rel=0.1)


def test_frechet_infinity_beside_the_original_definition(recorded: tuple) -> None:
    """Chong & Forsyth thin the generated set alone and draw a straight line (the table in docs/metrics.md)."""
    real, generated = (side.double() for side in case(recorded[0], "logits_first32_N>d"))
    limits = [fn.frechet_infinity(real, generated, draws=draws).value for draws in (1, 16)]
    assert limits == pytest.approx([21.0, 22.8], abs=12)  # with 56 clips it depends on the shuffle
    line = fn.frechet_infinity(real, generated, order=1, draws=16).value
    sizes, found = np.linspace(len(generated) // 4, len(generated), 15).astype(int), []
    for seed in range(200):
        random = np.random.default_rng(seed)
        subsets = [generated[torch.from_numpy(random.choice(len(generated), size, replace=False))] for size in sizes]
        values = [fn.frechet_distance(real, subset) for subset in subsets]
        found.append(np.polyfit(1 / sizes, values, 1)[1])
    assert np.mean(found) == pytest.approx(33.0, abs=0.1)  # 33.02, with a spread of 3.6 over the draws
    assert limits[1] < line == pytest.approx(31.7, abs=4)


def test_frechet_infinity_reports_its_fit() -> None:
    real, generated = gaussian(200, 0), gaussian(150, 1, shift=0.5)
    fit = fn.frechet_infinity(real, generated)
    assert fit.sizes[0] == 37 and fit.sizes[-1] == 150 and len(fit.sizes) == len(fit.values) == 8
    assert fit.values[-1] == pytest.approx(fn.frechet_distance(real, generated))
    turned = fn.frechet_infinity(real.flip(0), generated.flip(0))
    assert fit.value == fit.coefficients[0] == turned.value  # no order of the rows changes a digit
    line = fn.frechet_infinity(real, generated, order=1)
    assert len(line.coefficients) == 2 and line.coefficients[1] > 0
    with pytest.raises(UserError, match="8 independent clips are too few"):
        fn.frechet_infinity(real[:8], generated[:8])
    with pytest.raises(UserError, match="8 independent clips are too few"):
        fn.frechet_infinity(real[:32], generated[:32], names(32, 4))


@pytest.mark.parametrize("count", [2, 3, 24, 100])
@pytest.mark.parametrize("each", [1, 2])
def test_a_set_against_itself_is_at_distance_zero(count: int, each: int) -> None:
    """Exactly 0 at any number of clips, for pairs: FVD, FVD-infinity, KVD. KVD with all pairs is far below 0."""
    same, groups = gaussian(count * each, 0), names(count * each, each)
    assert fn.frechet_distance(same, same) == 0 and fn.kernel_distance(same, same, groups=groups) == 0
    if count >= 16:
        assert fn.frechet_infinity(same, same, groups).value == pytest.approx(0, abs=1e-12)
    assert fn.kernel_distance(same, same) < -1e-3


def test_manifold_metrics_of_plain_cases() -> None:
    real = gaussian(300, 0)
    same = fn.manifold_metrics(real, real)
    assert same == fn.Manifold(1, 1, 1, 1)  # the edge of a ball is outside, as in prdc
    far = fn.manifold_metrics(real, gaussian(300, 1, shift=100.0))
    assert far == fn.Manifold(0, 0, 0, 0)
    narrow = fn.manifold_metrics(real, gaussian(300, 2, scale=0.1))
    assert narrow.precision == 1 and narrow.recall < 0.05  # faithful, but without variety
    with pytest.raises(UserError, match="more than 5 clips"):
        fn.manifold_metrics(real[:5], real[:5])


def slow_manifold(x: np.ndarray, y: np.ndarray, k: int) -> tuple[float, float, float, float]:
    """Numpy and loops, as the definitions say: a ball reaches to the k-th other point, and its edge is outside."""

    def radius(points: np.ndarray, i: int) -> float:
        return sorted(float(np.sqrt(((p - points[i]) ** 2).sum())) for j, p in enumerate(points) if j != i)[k - 1]

    def inside(points: np.ndarray, others: np.ndarray) -> np.ndarray:  # [points, others]
        return np.array(
            [[float(np.sqrt(((p - o) ** 2).sum())) < radius(points, i) for o in others] for i, p in enumerate(points)]
        )

    of_real, of_made = inside(x, y), inside(y, x)
    return of_real.any(0).mean(), of_made.any(0).mean(), of_real.sum(0).mean() / k, of_real.any(1).mean()


@pytest.mark.parametrize("copies", [0, 6, 20])
def test_manifold_metrics_are_the_slow_obvious_version(copies: int) -> None:
    """Also with copies of references, where a point lies exactly on the edge of balls."""
    real, made = gaussian(20, 0), gaussian(18, 1, shift=0.3)
    made = torch.cat([real[:copies], made])
    found = fn.manifold_metrics(real, made, neighbours=3)
    expected = slow_manifold(real.numpy(), made.numpy(), 3)
    assert (found.precision, found.recall, found.density, found.coverage) == pytest.approx(expected, abs=1e-12)
