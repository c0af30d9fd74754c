"""The Inception Score equals its closed forms on planted logits, and is a number of one set."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dcbench import load_metric
from dcbench.catalogue import find_metric
from dcbench.errors import UserError
from dcbench.metrics import FeatureExtractor, I3DExtractor, Observations, distances
from dcbench.metrics import inception_score as score_module
from dcbench.metrics.design import Design, codes
from dcbench.metrics.inception_score import InceptionScore, inception_score, score_inception, split_scores

SURE = 1000.0  # a logit that leaves no probability to the other classes


def one_hot(classes: int, number: int) -> Tensor:
    """[number classes]: the classes in turn, each sure."""
    return SURE * torch.eye(classes)[torch.arange(number) % classes]


def drawn(number: int, classes: int, sharpness: float, seed: int = 0) -> Tensor:
    """[number classes]: a random class a clip, with this logit."""
    label = torch.randint(0, classes, (number,), generator=torch.Generator().manual_seed(seed))
    return sharpness * torch.nn.functional.one_hot(label, classes).double()


def slow(logits: Tensor) -> float:
    p = torch.softmax(logits.double(), 1).numpy()
    mean = p.mean(0)
    return float(np.exp(np.mean([sum(q * math.log(q / m) for q, m in zip(row, mean, strict=True)) for row in p])))


@pytest.mark.parametrize("classes", [2, 101, 400])
def test_sure_and_even_is_the_number_of_classes(classes: int) -> None:
    assert inception_score(one_hot(classes, 2 * classes)) == pytest.approx(classes, rel=1e-12)


def test_equal_predictions_score_one() -> None:
    assert inception_score(torch.ones(7, 101)) == pytest.approx(1, abs=1e-12)
    assert inception_score(SURE * torch.eye(5)[[2] * 9]) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sure", [0.5, 0.9])
def test_a_mixture_is_the_formula(sure: float) -> None:
    """Each clip gives its class the probability a, all others b, and the classes are even: KL = log K - entropy."""
    classes = 10
    rest = (1 - sure) / (classes - 1)
    logits = torch.full((classes, classes), math.log(rest)).fill_diagonal_(math.log(sure))
    entropy = -sure * math.log(sure) - (classes - 1) * rest * math.log(rest)
    assert inception_score(logits) == pytest.approx(classes * math.exp(-entropy), rel=1e-5)
    logits = torch.randn(40, 6, generator=torch.Generator().manual_seed(1)) * 3
    assert inception_score(logits) == pytest.approx(slow(logits), rel=1e-12)


def test_splits_do_not_depend_on_the_order_of_the_clips() -> None:
    """Clips sorted by class, cut in their order, would have one class a split, and score 1."""
    logits = drawn(400, 20, SURE)
    names = [f"video {k}" for k in range(400)]
    order = logits.argmax(1).sort().indices
    first = score_inception(logits, names)
    by_class = score_inception(logits[order], [names[k] for k in order])
    assert first.value is not None and first.value > 12
    assert first.model_dump() == by_class.model_dump()
    in_order = [inception_score(part) for part in logits[order].chunk(20)]
    assert np.mean(in_order) < 3


def test_groups_are_whole_in_a_split_and_splits_are_even() -> None:
    groups = codes([f"video {k // 4}" for k in range(200)])
    rows = torch.arange(200.0)[:, None] * torch.ones(1, 3)
    parts: list[Tensor] = []

    def keep(part: Tensor) -> float:
        parts.append(part)
        return 1.0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dcbench.metrics.inception_score.inception_score", keep)
        split_scores(rows, groups, 10)
    assert [len(part) for part in parts] == [20] * 10
    assert sorted(torch.cat(parts)[:, 0].tolist()) == list(range(200))
    videos = [{int(row) // 4 for row in part[:, 0]} for part in parts]
    assert sum(len(part) for part in videos) == 50


def test_splits_of_independent_clips_are_those_of_others() -> None:
    """torch-fidelity and StyleGAN-V cut rows k n // splits ... (k + 1) n // splits, here of the order of the hashes."""
    logits, names = drawn(137, 10, 4.0), [str(k) for k in range(137)]
    rows = logits[torch.from_numpy(np.argsort(codes(names)))]
    expected = [slow(rows[k * 137 // 10 : (k + 1) * 137 // 10]) for k in range(10)]
    assert split_scores(logits, codes(names), 10) == pytest.approx(expected, rel=1e-12)


def test_value_is_the_mean_over_splits_and_details_have_the_rest() -> None:
    logits = drawn(500, 10, 4.0)
    names = [str(k) for k in range(500)]
    score = score_inception(logits, names)
    parts = split_scores(logits, codes(names), 10)
    assert len(parts) == 10 and score.value == pytest.approx(np.mean(parts))
    assert score.details["standard_deviation_over_splits"] == pytest.approx(np.std(parts))
    assert score.details["whole_set"] == pytest.approx(slow(logits))
    assert (score.n_reference, score.n_generated, score.n_groups) == (0, 500, 500)
    assert score.ci95 and score.value is not None and score.ci95[0] < score.value < score.ci95[1]
    assert score.ci_method == "jackknife over 16 blocks" and "500 clips in 10 splits" in score.warnings[0]
    assert score_inception(logits, names, splits=1).value == pytest.approx(slow(logits))


def test_few_clips_lower_the_score_and_the_jackknife_finds_that() -> None:
    """True value of even classes with these logits, by the formula; 10 splits of 40 clips are far below it."""
    true = inception_score(4.0 * torch.eye(20))
    score = score_inception(drawn(400, 20, 4.0), [str(k) for k in range(400)])
    assert score.value is not None and score.value < 0.93 * true
    assert score.details["bias_corrected"] == pytest.approx(true, rel=0.06)


def test_bad_sets_are_named() -> None:
    with pytest.raises(UserError, match="4 independent clips for 10 splits"):
        score_inception(torch.randn(8, 5), ["a", "b", "c", "d"] * 2)
    with pytest.raises(UserError, match="1 generated clip"):
        score_inception(torch.randn(1, 5))
    with pytest.raises(UserError, match=r"hold NaN or infinity in 1 row\(s\), the first is row 3"):
        score_inception(torch.where(torch.arange(20)[:, None] == 3, math.nan, torch.randn(20, 5)))
    with pytest.raises(UserError, match="3 groups for 20 clips"):
        score_inception(torch.randn(20, 5), ["a", "b", "c"])
    assert score_inception(torch.randn(20, 5), Design(codes([]), codes([str(k) for k in range(20)]))).ci95
    assert score_inception(torch.randn(20, 5)).n_groups == 20


class Planted(FeatureExtractor):
    name, weights_sha256, preprocessing, num_features = "planted", "", "", 20


def metric(splits: object = 10) -> InceptionScore:
    card = find_metric("is_i3d")
    return InceptionScore(card.model_copy(update={"options": card.options | {"splits": splits}}), Planted())


def test_two_models_are_compared_without_reference_clips() -> None:
    names = [str(k) for k in range(300)]
    sure, unsure = (Observations(list(drawn(300, 20, logit)), groups=names) for logit in (6.0, 2.0))
    found = metric().difference(sure, unsure)
    assert found.ci95 and found.ci95[0] > 0 and found.p_value < 1e-6 and found.n_groups == 300
    assert found.plain is not None and found.difference != found.plain  # the bias of 300 clips is removed
    with pytest.raises(UserError, match="too few independent clips for an interval"):
        metric(1).difference(*(Observations(list(drawn(4, 20, 6.0)), groups=["a", "a", "b", "b"]) for _ in range(2)))


@pytest.mark.parametrize("splits", [0, -1, 2.5, "10", True])
def test_splits_are_a_positive_number(splits: object) -> None:
    with pytest.raises(UserError, match=r"options\.splits is .*; allowed: 1, 2, 3"):
        metric(splits)


def test_with_i3d_it_shares_the_features_of_fvd(i3d: I3DExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a run has one pass through I3D for both, and an old cache serves."""
    for module in (distances, score_module):
        monkeypatch.setattr(module, "i3d_extractor", lambda mode, device: i3d)
    fvd, score = (load_metric(name, device="cpu") for name in ("fvd", "is_i3d"))
    assert fvd.observation_key == score.observation_key and fvd.observes_reference and score.observes_reference
    assert fvd.identity != score.identity
