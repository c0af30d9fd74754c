"""Which clips depend on each other: blocks keep them together, and errors count what is independent."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import FrechetVideoDistance, KernelVideoDistance, Motion
from dcbench.metrics.base import Observations, score_statistic
from dcbench.metrics.design import Design, as_design, replicates
from dcbench.metrics.distances import score_frechet, score_frechet_infinity, score_kernel
from dcbench.metrics.statistics import jackknife
from dcbench.models.base import Runtime

pytestmark = pytest.mark.filterwarnings("ignore:.*clips:UserWarning")  # small samples are what these tests use


def rows(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def names(count: int, each: int = 1, kind: str = "video") -> list[str]:
    return [f"{kind}{index // each}" for index in range(count)]


def difference(real: Tensor, made: Tensor, design: Design) -> float:
    return float(real[:, 0].mean() - made[:, 0].mean())


def test_blocks_keep_groups_together_and_are_near_equal() -> None:
    design = Design.of(names(60, 3), names(90, 3))
    tied, single = design.blocks()
    assert len(tied) == 16 and len(single) == 10  # 20 videos on both sides, 10 on one
    assert sorted(np.concatenate([*tied, *single])) == sorted(set(design.generated.tolist()))
    assert {len(block) for block in tied} <= {1, 2}
    uneven = Design.of(names(40) + ["long"] * 40, names(40) + ["long"] * 40).blocks()[0]
    assert sorted(len(block) for block in uneven)[0] == 1  # the long video has a block alone


def test_strata_of_one_or_two_groups_join_another() -> None:
    one_lost = Design.of(names(20), [*names(19), "other"])
    assert [len(part) for part in one_lost.strata()] == [21]
    two_alike = Design.of(names(20), [*names(2), *names(30, 1, "other")])
    assert sorted(len(part) for part in two_alike.strata()) == [18, 32]
    assert Design.of(names(50), names(2, 1, "other")).blocks() == []  # two generated clips have no interval
    assert Design.of(names(2), names(2)).blocks() == []
    assert Design.of([], []).blocks() == []


def test_the_jackknife_of_a_mean_is_the_standard_error_of_a_mean() -> None:
    """Delete-one over 12 pairs, and over two independent samples of 16 and 11: the textbook's errors."""
    real, made = rows(12, 3), rows(12, 4)
    found = replicates(difference, real, made, Design.of(names(12), names(12)))
    assert found is not None
    result = jackknife(difference(real, made, Design.of([], [])), found)
    gaps = (real - made)[:, 0]
    assert result.standard_error == pytest.approx(float(gaps.std()) / math.sqrt(12), rel=1e-9)
    assert result.bias_corrected == pytest.approx(float(gaps.mean()), rel=1e-9) and result.degrees == pytest.approx(11)
    real, made = rows(16, 5), 3 * rows(11, 6)
    found = replicates(difference, real, made, Design.independent(real, made))
    assert found is not None
    result = jackknife(difference(real, made, Design.of([], [])), found)
    parts = [float(side[:, 0].var()) / len(side) for side in (real, made)]
    assert result.standard_error == pytest.approx(math.sqrt(sum(parts)), rel=1e-9)
    assert result.degrees == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 15 + parts[1] ** 2 / 10), rel=1e-9)


@pytest.mark.parametrize("sizes", [(2048, 128), (64, 4), (256, 64), (5, 200)])
def test_unequal_sizes_have_a_value_and_an_honest_interval(sizes: tuple[int, int]) -> None:
    """Each side loses blocks of its own, so no side becomes empty. The error is that of repeated samples."""
    score = score_frechet(rows(sizes[0], 0), rows(sizes[1], 1, 0.5))
    assert score.value is not None and score.ci95 is not None and score.n_groups == min(sizes)
    if min(sizes) > 50:
        values, errors = [], []
        for trial in range(40):
            one = score_frechet(rows(sizes[0], 2 * trial), rows(sizes[1], 2 * trial + 1, 0.5))
            values.append(one.value)
            errors.append(one.details["standard_error"])
        assert np.mean(errors) == pytest.approx(np.std(values), rel=0.35)


def test_a_value_without_an_interval_is_kept() -> None:
    score = score_frechet(rows(64, 0), rows(2, 1))
    assert score.value is not None and score.ci95 is None and score.ci_method.startswith("none: fewer than 3")

    def fragile(real: Tensor, made: Tensor, design: Design) -> float:
        if len(made) < 20:
            raise UserError("too few")
        return 1.0

    whole = score_statistic(fragile, rows(20, 0), rows(20, 1), names(20))
    assert whole.value == 1.0 and whole.ci95 is None


@pytest.mark.parametrize("score", [score_frechet, score_kernel, score_frechet_infinity])
def test_no_order_of_rows_changes_a_digit(score) -> None:
    real, made, groups = rows(60, 0), rows(60, 1, 0.4), names(60, 3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    mixed = [groups[k] for k in order.tolist()]
    assert score(real, made, groups) == score(real[order], made[order], mixed)
    one_side = Design.of(mixed, groups)
    assert score(real, made, groups) == score(real[order], made, one_side)  # the sides need not be in one order
    assert score(real, made) == score(real[order], made.flip(0))


def test_groups_of_rows_are_checked() -> None:
    with pytest.raises(UserError, match="groups of 3 reference and 3 generated rows for 3 and 2 rows"):
        as_design(["a", "b", "c"], rows(3, 0), rows(2, 0))
    assert as_design(None, rows(3, 0), rows(3, 0)).n_groups == 3
    twice = torch.cat([rows(3, 0), rows(3, 0)])
    assert Design.independent(twice, twice).n_groups == 6  # equal rows are groups of their own


def test_observations_know_their_design() -> None:
    assert Observations([1, 2], [1, 2]).design is None
    paired = Observations([1, 2], [1, 2], ["a", "b"]).design
    apart = Observations([1, 2], [1, 2], ["a", "b"], ["c", "d"]).design
    assert paired is not None and len(paired.strata()) == 1
    assert apart is not None and len(apart.strata()) == 2 and apart.digest != paired.digest


@pytest.mark.parametrize(
    ("kind", "score"), [(FrechetVideoDistance, score_frechet), (KernelVideoDistance, score_kernel)]
)
def test_class_function_and_observations_agree_to_the_last_bit(kind: type, score) -> None:
    """Paired clips, two a video; the class gets them in other batches and another order on each side."""
    real, made, groups = rows(48, 0), rows(48, 1, 0.4), names(48, 2)
    expected = score(real, made, groups)
    for seed in (0, 1):
        metric = kind()
        for side, is_real in ((real, True), (made, False)):
            order = torch.randperm(48, generator=torch.Generator().manual_seed(seed + 10 * is_real)).tolist()
            for part in (order[:7], order[7:]):
                metric.update_features(side[part], real=is_real, groups=[groups[k] for k in part])
        assert metric.compute_with_interval() == expected and float(metric.compute()) == expected.value
    seen = Observations(list(made), list(real), groups, groups)
    card = find_metric("fvd" if kind is FrechetVideoDistance else "kvd")
    built = load_entry_point(card)(card, Runtime())
    assert built.score(seen).model_dump() == expected.model_dump()


def test_the_class_refuses_groups_of_some_clips_only() -> None:
    metric = FrechetVideoDistance()
    metric.update_features(rows(4, 0), real=True, groups=names(4))
    with pytest.raises(UserError, match="earlier clips have groups"):
        metric.update_features(rows(4, 0), real=True)
    with pytest.raises(UserError, match="3 groups for 4 clips"):
        metric.update_features(rows(4, 0), real=False, groups=names(3))
    metric.update_features(rows(4, 1), real=False)
    with pytest.raises(UserError, match="for 4 reference and 0 generated clips"):
        metric.compute_with_interval()


def test_per_clip_classes_take_groups() -> None:
    """Five clips of each of six inputs: the interval is that of six observations."""
    motion, apart = Motion(), Motion()
    clips = torch.randint(0, 256, (6, 2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clips = clips.repeat_interleave(5, 0)
    motion.update(clips, groups=names(30, 5, "input"))
    apart.update(clips)
    together, alone = motion.compute_with_interval(), apart.compute_with_interval()
    assert (together.n_groups, alone.n_groups) == (6, 30) and together.value == alone.value
    assert together.ci95 and alone.ci95
    assert together.ci95[1] - together.ci95[0] > 1.5 * (alone.ci95[1] - alone.ci95[0])
