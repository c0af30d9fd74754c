"""The Inception Score of videos: how sure a classifier is of each clip, and how many classes all clips cover.

IS = exp(mean over clips of KL(p(class | clip) || p(class))), where p(class) is the mean over the clips (Salimans et
al., arXiv 1606.03498). It is a number of one set: it needs no reference clips. Papers print the mean over 10 splits.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dcbench.catalogue import MetricCard
from dcbench.errors import UserError
from dcbench.metrics import functional as fn
from dcbench.metrics.base import FeatureExtractor, Observations, SetMetric, score_arranged
from dcbench.metrics.c3d import c3d_extractor
from dcbench.metrics.design import Design, codes
from dcbench.metrics.extractors import i3d_extractor
from dcbench.metrics.statistics import Comparison, compare_scores
from dcbench.record import Score
from dcbench.weights import fetch

RECOMMENDED_CLIPS = 2048  # what papers use


def inception_score(logits: Tensor) -> float:
    """IS of all rows of logits [n, classes], between 1 and the number of classes. Computed in float64."""
    log_p = torch.log_softmax(logits.double(), 1)
    log_mean = torch.logsumexp(log_p, 0) - math.log(len(log_p))
    return math.exp(float((log_p.exp() * (log_p - log_mean)).sum(1).mean()))


def split_scores(logits: Tensor, groups: np.ndarray, splits: int) -> list[float]:
    """IS of each split of the rows. `groups`: int64 [n], the hash of the group of each row.

    Groups are taken in the order of their hashes, which is as good as a shuffle, and whole groups go into one split. So
    the splits do not depend on the order of the clips, and clips in the order of their classes do no harm. UserError
    for fewer groups than splits.
    """
    names, places, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(names) < splits:
        raise UserError(
            f"{len(names)} independent clips for {splits} splits: score more clips, or use a card with fewer "
            "options.splits"
        )
    middles = np.cumsum(sizes) - (sizes - 1) / 2  # 1 ... n; a group goes to the split that has its middle row
    of_row = (np.ceil(middles * splits / len(groups)) - 1)[places]  # split k has the rows from k n // splits on
    found = (logits[torch.from_numpy(of_row == split)] for split in range(splits))
    return [inception_score(part) for part in found if len(part)]  # a large group may leave a split without rows


def score_inception(logits: Tensor, groups: Design | Sequence[str] | None = None, splits: int = 10) -> Score:
    """Mean IS over the splits of logits [n, classes], with a delete-a-block jackknife interval.

    `groups`: the group of each row, or a design; None: all rows are independent. `details` has the value of the whole
    set and the standard deviation over the splits. UserError for fewer than two clips, or fewer groups than splits.
    """
    logits = fn.check_set(logits)
    nothing = logits[:0]
    if isinstance(groups, Design):
        design = groups
    else:
        design = Design.independent(nothing, logits) if groups is None else Design(codes([]), codes(groups))
    if len(design.generated) != len(logits):
        raise UserError(f"{len(design.generated)} groups for {len(logits)} clips; give one group for each clip")
    order = fn.in_order(logits)
    logits, design = logits[torch.from_numpy(order)], design.rows(np.arange(len(design.real)), order)
    score = score_arranged(
        partial(_mean_of_splits, splits),
        nothing,
        logits,
        design,
        lowest=1.0,
        highest=float(logits.shape[1]),
        biased=True,
    )
    parts = split_scores(logits, design.generated, splits)
    score.details |= {
        "splits": splits,
        "standard_deviation_over_splits": float(np.std(parts)),
        "whole_set": inception_score(logits),
        "classes": logits.shape[1],
    }
    if len(logits) < RECOMMENDED_CLIPS:
        few = f"{len(logits)} clips in {splits} splits"
        score.warnings = [f"{few}: with few clips the score is too low; papers use {RECOMMENDED_CLIPS}"]
    return score


def _mean_of_splits(splits: int, real: Tensor, generated: Tensor, design: Design) -> float:
    parts = split_scores(generated, design.generated, splits)
    return math.fsum(parts) / len(parts)


class InceptionScore(SetMetric):
    """The Inception Score of the generated clips. The extractor gives logits."""

    compares_sets = False
    biased = True

    def __init__(self, card: MetricCard, extractor: FeatureExtractor) -> None:
        super().__init__(card, extractor)
        self.splits = card.options.get("splits", 10)
        if not isinstance(self.splits, int) or isinstance(self.splits, bool) or self.splits < 1:
            raise UserError(f"{card.name}: options.splits is {self.splits!r}; allowed: 1, 2, 3 ... (papers use 10)")

    def score(self, seen: Observations) -> Score:
        return score_inception(torch.stack(seen.generated), seen.groups, self.splits)

    def difference(self, first: Observations, second: Observations) -> Comparison:
        return compare_scores(self.score(first), self.score(second))


def build_is_i3d(card: MetricCard, runtime: Any) -> InceptionScore:
    """Entry point of the `is_i3d` card; options: splits, preprocessing. Its features are those of FVD."""
    return InceptionScore(card, i3d_extractor(card.options.get("preprocessing", "squash"), runtime.device))


def build_is_c3d(card: MetricCard, runtime: Any) -> InceptionScore:
    """Entry point of the `is_c3d` card; options: splits."""
    network, mean = (fetch(source, runtime.offline) for source in card.weights[:2])
    return InceptionScore(card, c3d_extractor(network, mean, runtime.device))
