"""FVD and KVD as classes: one value whatever the batches, the order or the number of processes."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from observing import between
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import FrechetVideoDistance, KernelVideoDistance
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, SetMetric
from dcbench.metrics.distances import score_frechet, score_frechet_infinity, score_kernel
from dcbench.metrics.extractors import I3DExtractor
from dcbench.models.base import Runtime

pytestmark = pytest.mark.filterwarnings("ignore:.*clips:UserWarning")  # small samples are what these tests use


class Means(FeatureExtractor):
    """Six numbers a clip, for tests of state rather than of a network."""

    name, weights_sha256, preprocessing, num_features = "means", "", "none", 6

    def forward(self, clips: Tensor) -> Tensor:
        return torch.cat([clips.float().mean((1, 3, 4)), clips.float().std((1, 3, 4))], 1)


def clips(count: int, seed: int, low: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, 256, (count, 2, 3, 4, 4), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", [FrechetVideoDistance, KernelVideoDistance])
def test_value_and_interval_do_not_depend_on_batches_or_order(kind: type) -> None:
    real, made = clips(40, 0), clips(32, 1, low=40)
    seen = []
    for size, order in ((40, "same"), (7, "same"), (1, "reversed")):
        metric = kind(extractor=Means())
        first, second = (real, made) if order == "same" else (real.flip(0), made.flip(0))
        for batch in second.split(size):
            metric.update(batch, real=False)
        for batch in first.split(size):
            metric.update(batch, real=True)
        seen.append((metric.compute_with_interval(), float(metric.compute())))
    assert seen[0] == seen[1] == seen[2]  # to the last bit
    assert seen[0][0].value == seen[0][1] and seen[0][0].n_reference == 40 and seen[0][0].n_generated == 32


def test_real_and_generated_are_not_swapped() -> None:
    metric = FrechetVideoDistance(extractor=Means())
    metric.update(clips(5, 0), real=True)
    metric.update(clips(9, 1), real=False)
    score = metric.compute_with_interval()
    assert (score.n_reference, score.n_generated) == (5, 9)


def test_reset_and_a_second_compute() -> None:
    metric = FrechetVideoDistance(extractor=Means())
    metric.update(clips(12, 0), real=True)
    metric.update(clips(12, 1), real=False)
    first = metric.compute()
    assert first == metric.compute() and first.dtype == torch.float64
    metric.update(clips(12, 2, low=200), real=False)
    assert metric.compute() != first
    metric.reset()
    with pytest.raises(UserError, match="no reference clips: call update"):
        metric.compute_with_interval()


WORKER = """
import json, multiprocessing, sys, warnings
from pathlib import Path
import torch, torch.distributed as dist
from dcbench.metrics import FrechetVideoDistance, KernelVideoDistance, Motion

SHARES = {1: [(0, 50)], 2: [(0, 13), (13, 50)], 3: [(0, 20), (20, 50), (50, 50)]}  # the last of three gets none

def work(rank, world, folder):
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    real, made = torch.randn(50, 6, generator=generator), torch.randn(41, 6, generator=generator) + 0.3
    low, high = SHARES[world][rank]
    out = []
    names = [f"video{k // 2}" for k in range(50)]
    for kind, grouped in ((FrechetVideoDistance, False), (KernelVideoDistance, False), (KernelVideoDistance, True)):
        metric = kind()
        if high > low:
            for start in range(low, high, 5):
                part = slice(start, min(start + 5, high))
                metric.update_features(real[part], real=True, groups=names[part] if grouped else None)
            mine = names[low:high][: len(made[low:high])]
            metric.update_features(made[low:high], real=False, groups=mine if grouped else None)
        score = metric.compute_with_interval()
        out.append([score.value, score.ci95, score.n_reference, score.n_generated, float(metric.compute())])
        assert sum(len(part) for part in metric.real_features) == high - low  # its own clips only, again
    clips = torch.randint(0, 256, (10, 2, 3, 32, 32), dtype=torch.uint8, generator=generator)
    motion = Motion()
    if high > low:
        part = slice(low // 5, high // 5)
        motion.update(clips[part], groups=[f"video{k // 2}" for k in range(10)[part]])
    score = motion.compute_with_interval()
    out.append([score.value, score.ci95, score.n_generated, float(motion.compute())])
    if rank == 0:
        Path(folder, f"{world}.json").write_text(json.dumps(out))
    dist.destroy_process_group()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # one import of torch for all
    for world in SHARES:
        processes = [context.Process(target=work, args=(rank, world, sys.argv[1])) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0] * world
"""


@pytest.mark.slow
def test_value_does_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    """1, 2 and 3 gloo processes with uneven shards, one of them empty: the same to the last bit."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    texts = [(tmp_path / f"{world}.json").read_text() for world in (1, 2, 3)]
    assert texts[0] == texts[1] == texts[2] and "50, 41" in texts[0]


def test_fvd_of_real_clips_against_themselves_is_zero(i3d: I3DExtractor, moving_clip: Tensor) -> None:
    features = i3d.extract([moving_clip[:9], moving_clip[7:], moving_clip[:9].flip(3)])
    score = score_frechet(features, features)
    assert score.value == 0 and score.ci95 is None and "the same without any part" in score.ci_method
    assert score_frechet(features, features + 1).value == pytest.approx(400, rel=1e-6)


def planted(count: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)) + shift


def test_intervals_and_their_method() -> None:
    real, made = planted(60, 0), planted(60, 1, 0.5)
    fvd, kvd = score_frechet(real, made), score_kernel(real, made)
    for score in (fvd, kvd):
        assert score.value is not None and score.ci95 is not None and score.ci95[0] < score.value < score.ci95[1]
    assert fvd.ci_method == kvd.ci_method == "jackknife over 16 and 16 blocks"
    pairs = [f"video{index}" for index in range(60)]
    assert score_frechet(real, made, pairs).ci_method == "jackknife over 16 blocks"
    assert kvd.details["kernel"] == "(x·y/d + 1)^3"
    groups = [f"video{index // 4}" for index in range(60)]
    assert score_frechet(real, made, groups).ci_method == "jackknife over 15 blocks of source videos"
    assert score_kernel(real, made, groups).ci_method == "jackknife over 15 blocks of source videos"
    assert score_kernel(real, made, groups).details["all_pairs"] == score_kernel(real, made).value
    assert score_kernel(real, made).details["p_same_distribution"] < 0.01


def test_groups_widen_the_interval_of_clips_that_share_a_video() -> None:
    real, made = planted(15, 0).repeat_interleave(4, 0), planted(15, 1, 0.5).repeat_interleave(4, 0)
    groups = [str(index // 4) for index in range(60)]
    together, apart = score_frechet(real, made, groups).ci95, score_frechet(real, made).ci95
    assert together and apart and together[1] - together[0] > 1.3 * (apart[1] - apart[0])


def test_too_few_clips_have_a_value_and_no_interval() -> None:
    score = score_frechet(planted(2, 0), planted(2, 1))
    assert score.ci95 is None and score.ci_method.startswith("none: fewer than 3")
    with pytest.raises(UserError, match="at least 2 a side"):
        score_frechet(planted(1, 0), planted(1, 1))


@pytest.mark.parametrize(
    ("n", "m", "expected"),
    [
        (6, 6, ["fewer than the 8 feature dimensions", "biased upwards"]),
        (100, 100, ["biased upwards"]),
        (1024, 1024, []),
        (1100, 1030, ["1100 reference and 1030 generated"]),
    ],
)
def test_sample_sizes_are_commented(n: int, m: int, expected: list[str]) -> None:
    warned = score_frechet(planted(n, 0), planted(m, 1), interval=False).warnings
    assert len(warned) == len(expected)
    assert all(text in warning for text, warning in zip(expected, warned, strict=True))


def test_compute_warns_about_small_samples() -> None:
    metric = FrechetVideoDistance()
    metric.update_features(planted(5, 0), real=True)
    metric.update_features(planted(5, 1), real=False)
    with pytest.warns(UserWarning, match="biased upwards"):
        metric.compute()


def test_infinity_score_carries_its_curve() -> None:
    score = score_frechet_infinity(planted(64, 0), planted(64, 1, 0.5))
    assert score.ci95 and len(score.details["sizes"]) == len(score.details["values"])
    assert score.value == fn.frechet_infinity(planted(64, 0), planted(64, 1, 0.5)).value
    assert score.value is not None and score.value < fn.frechet_distance(planted(64, 0), planted(64, 1, 0.5))
    assert "rough" in score.warnings[0]


def test_precision_and_its_kin() -> None:
    real, narrow = planted(60, 0), 0.1 * planted(60, 1)
    scores = {}
    for name in ("precision", "recall", "density", "coverage"):
        metric = load_entry_point(find_metric(name))(find_metric(name), Runtime())
        scores[name] = between(metric, real, narrow)
        expected = getattr(fn.manifold_metrics(real, narrow), name)
        assert scores[name].value == expected and "steady from about a thousand" in scores[name].warnings[0]
        assert scores[name].ci95 and scores[name].ci95[0] <= expected <= scores[name].ci95[1]
    assert scores["precision"].value > 0.9 > 0.3 > scores["recall"].value
    with pytest.raises(UserError, match="more than 5 clips"):
        between(metric, real[:4], narrow[:4])


def test_cards_build_metrics_that_share_one_extractor() -> None:
    metrics = [
        load_entry_point(find_metric(name))(find_metric(name), Runtime()) for name in ("fvd", "kvd", "fvd_infinity")
    ]
    for metric, other in itertools.pairwise(metrics):
        assert isinstance(metric, SetMetric) and metric.extractor is other.extractor
    assert metrics[0].extractor.extract([]).shape == (0, 400)
    real, made = planted(20, 0), planted(20, 1)
    assert between(metrics[0], real, made).value == fn.frechet_distance(real, made)
    assert between(metrics[1], real, made).value == fn.kernel_distance(real, made)


def test_a_card_may_name_another_kernel() -> None:
    card = find_metric("kvd").model_copy(update={"options": {"degree": 2, "coef0": 0.0, "gamma": 1.0}})
    metric = load_entry_point(card)(card, Runtime())
    real, made = planted(20, 0), planted(20, 1)
    score = between(metric, real, made)
    assert score.value == fn.kernel_distance(real, made, fn.PolynomialKernel(2, 1.0, 0.0))
    assert score.details["kernel"] == "(1 x·y + 0)^2"
