"""The base classes of metrics: their inputs from a case, their identity, their observations and their score."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dcbench.catalogue import MetricCard, source_sha256
from dcbench.clips import check_clip
from dcbench.errors import UserError
from dcbench.files import digest
from dcbench.metrics import functional as fn
from dcbench.metrics.design import Design, DesignedStatistic, Groups, codes, replicates
from dcbench.metrics.statistics import (
    FEW_GROUPS,
    Comparison,
    compare_paired,
    compare_scores,
    effective_number,
    group_sums,
    jackknife,
    mean_interval,
    mean_replicates,
    share_interval,
    student_interval,
    wilson,
)
from dcbench.record import Replicates, Score
from dcbench.takes import Takes

OVER_SAMPLES = "over_samples"  # option of a card: which of several clips of an input count, "mean" (all) or "best"
NO_INTERVAL = "none: fewer than 3 independent clips"
TOO_FEW_LEFT = "none: without a part of them, the clips are too few for a value"
NO_SPREAD = "none: the value is the same without any part of the clips"


class MetricFailed(UserError):
    """A metric that can observe no further clip: scoring stops, so that no score lacks clips for this reason."""


NEEDED = {
    "image": "the input image",
    "picture": "a picture file",
    "prompt": "a caption",
    "reference": "a reference clip",
    "fps": "a frame rate",
    "siblings": "another clip of the same input (--samples 2 or more)",
    "truth": "what the clip should show",
    "takes": "two recordings of the real event (data set physics-iq)",
}


@dataclass(frozen=True)
class View:
    """The inputs of a metric from one case. None: the case does not have it, or the metric's card does not need it."""

    clip: Tensor  # uint8 [t 3 h w]: the clip to observe, generated or reference
    image: Tensor | None = None  # uint8 [3 h w], the input image
    prompt: str | None = None
    reference: Tensor | None = None  # uint8 [t 3 h w]
    fps: float | None = None
    siblings: Sequence[Tensor] | None = None  # uint8 [t 3 h w] each: for the first clip of an input, the others
    truth: Mapping[str, Any] | None = None  # facts of the video from its data set, such as the scene of `shapes`
    takes: Takes | None = None  # two recordings of what happened after the input image; read when they are asked for
    picture: Tensor | None = None  # uint8 [3 h w], of a data set of pictures: the image at the size of its file

    def need(self, name: str) -> Any:
        """The value of a field that the metric's card needs. UserError if it is None."""
        value = getattr(self, name)
        if value is None:
            raise UserError(f"{NEEDED[name]} is needed, and this clip does not have it")
        return value


@dataclass(frozen=True)
class Observations:
    """A metric's observations of a set of cases. Both lists are in the order of the cases. Either may lack cases."""

    generated: list[Any]
    reference: list[Any] = field(default_factory=list)
    groups: list[str] | None = None  # of each generated clip: its source video or input. None: all are independent
    reference_groups: list[str] | None = None  # of each reference clip; None: the list `groups`
    items: list[str] | None = None  # of each generated clip: the item that it was made for. None: one clip an item

    @property
    def design(self) -> Design | None:
        """Which of these clips depend on each other. None: not known, so all are taken as independent."""
        if self.groups is None:
            return None
        return Design.of(self.groups if self.reference_groups is None else self.reference_groups, self.groups)


class HasIdentity(Protocol):
    @property
    def identity(self) -> dict[str, str]: ...


@dataclass(frozen=True)
class NoNetwork:
    """The extractor of a metric that uses no network: it computes from the pixels alone."""

    name: str
    preprocessing: str = ""

    @property
    def identity(self) -> dict[str, str]:
        return {"name": self.name, "weights_sha256": "", "preprocessing": self.preprocessing}


class FeatureExtractor(nn.Module):
    """Computes the features of clips. Its identity covers its resize, its range of pixel values and its weights."""

    name: str
    weights_sha256: str  # of the tensors, not of a file: files with the same numbers have the same hash
    preprocessing: str
    num_features: int
    min_frames: int = 1
    batch_size: int = 2

    @property
    def identity(self) -> dict[str, str]:
        """Everything that changes the features. It is in every score, and in the key of every cached feature."""
        return {"name": self.name, "weights_sha256": self.weights_sha256, "preprocessing": self.preprocessing}

    def forward(self, clips: Tensor) -> Tensor:
        """uint8 [b t c h w] -> float32 [b d]"""
        raise NotImplementedError

    def extract(self, clips: Sequence[Tensor]) -> Tensor:
        """Clips uint8 [t c h w], their sizes may differ -> float32 [len(clips), d] on the CPU."""
        rows: list[Tensor] = []
        batch: list[Tensor] = []
        for clip in clips:
            if batch and (clip.shape != batch[0].shape or len(batch) == self.batch_size):
                rows.append(self(torch.stack(batch)).cpu())
                batch = []
            batch.append(clip)
        if batch:
            rows.append(self(torch.stack(batch)).cpu())
        return torch.cat(rows) if rows else torch.zeros(0, self.num_features)


class Metric:
    """A metric: `observe` computes an observation of one case, `score` computes one number from many observations.

    Two metrics that give different numbers have different identities. `identity` is the key of cached values, of
    columns in tables, and of comparisons, so your own metric needs no code for these.
    """

    version: int = 1  # increase it when the code gives other numbers
    compares_sets: ClassVar[bool] = False  # False: the real clips have a value of their own
    extractor_options: ClassVar[tuple[str, ...]] = ()  # options that the identity of dcbench's extractor covers
    in_workers: ClassVar[bool] = False  # `observe` may run in several threads at once
    facts: Mapping[str, Any] = MappingProxyType({})  # about the work that it did, for cost.json
    of_items: ClassVar[bool] = False  # one observation an item, of all its clips: the first, and its siblings

    def __init__(self, card: MetricCard, extractor: HasIdentity | None = None) -> None:
        """`extractor` None: the metric uses no network."""
        self.card, self.extractor = card, extractor or NoNetwork("pixels, no network")

    @property
    def observes_reference(self) -> bool:
        """Whether the reference clips are observed too."""
        return self.card.of_reference

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Name, version and options as JSON values. The version of your own metric includes the hash of its file."""
        version, covered = str(self.version), self.extractor_options
        if source := source_sha256(self.card):
            version, covered = f"{version} {source[:16]}", ()
        options = {key: value for key, value in self.card.options.items() if key not in covered}
        return {"name": self.card.name, "version": version, "options": options}

    @cached_property
    def observation_key(self) -> str:
        """The first part of the key of a cached observation. Metrics with equal keys share their observations."""
        return digest([self.identity, self.extractor.identity], 32)

    def counts(self, truth: Mapping[str, Any] | None) -> bool:
        """Whether a clip belongs to the metric. `truth`: facts of its video from its data set.

        The data set of a suite lists under "dimensions" what each clip is scored for. A metric whose card has a
        `dimension` counts the clips that list it. Without such a list, every clip counts.
        """
        listed = (truth or {}).get("dimensions")
        return not self.card.dimension or listed is None or self.card.dimension in listed

    def lacks(self, view: View) -> str | None:
        """A message that names the first input that the metric needs and the case does not have. None: it has all."""
        for name in self.card.needs:
            if getattr(view, name) is None:
                without = "no caption: " if name == "prompt" else ""
                return f"{without}{self.card.name} needs {NEEDED[name]}, which this clip does not have"
        return None

    def observe(self, view: View) -> Any:
        """The observation of one case: a tensor, or a dict of JSON values.

        UserError if the case cannot be observed; MetricFailed if no case can.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Free what `observe` holds, such as a program, at the end of a pass. `observe` may be called again."""

    def score(self, seen: Observations) -> Score:
        raise NotImplementedError

    def difference(self, first: Observations, second: Observations) -> Comparison:
        """The score of `first` minus the score of `second`: two models on the same cases."""
        raise NotImplementedError


class SetMetric(Metric):
    """A metric of two sets of clips, for example FVD. An observation is a row of features, float32 [d].

    With `compares_sets` False, it is a metric of one set alone, for example the Inception Score: `score` uses only the
    generated side, which may be all there is.
    """

    extractor: FeatureExtractor
    extractor_options = ("preprocessing",)
    in_workers = True
    compares_sets = True
    biased: bool = False  # True: the value depends on the number of clips, and comparisons remove that bias

    @property
    def observes_reference(self) -> bool:
        return True

    @cached_property
    def observation_key(self) -> str:
        """For dcbench's own extractors, the key is that of the extractor: all its set metrics share their features."""
        own = {type(self.extractor).__module__.split(".")[0], type(self).observe.__module__.split(".")[0]}
        return digest(self.extractor.identity, 32) if own == {"dcbench"} else super().observation_key

    @property
    def batch(self) -> int:
        """How many clips `observe_batch` takes at once: 1 on a CPU, where each core has a clip of its own."""
        if not isinstance(self.extractor, FeatureExtractor) or type(self).observe is not SetMetric.observe:
            return 1
        parameter = next(self.extractor.parameters(), None)
        return 1 if parameter is None or parameter.device.type == "cpu" else self.extractor.batch_size

    def observe(self, view: View) -> Tensor:
        return self.finite(self.extractor.extract([view.clip])[0])

    def observe_batch(self, clips: Sequence[Tensor]) -> list[Tensor | UserError]:
        """`observe` of several clips, or why not; those of equal size go through the network together."""

        def checked(features: Callable[[], Tensor]) -> Tensor | UserError:
            try:
                return self.finite(features())
            except UserError as error:
                return error

        try:
            rows = list(self.extractor.extract(clips))
        except UserError:  # one clip is too short, say; the others are not
            return [checked(lambda clip=clip: self.extractor.extract([clip])[0]) for clip in clips]
        return [checked(lambda row=row: row) for row in rows]

    def finite(self, features: Tensor) -> Tensor:
        """Return the features of a clip. UserError if they have NaN or infinity."""
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"the features of {self.extractor.identity['name']} have NaN or infinity")
        return features

    def observation_shape(self, clip: Tensor) -> tuple[int, ...]:
        """The shape of the observation of a clip: a cached one of another shape is not used."""
        return (self.extractor.num_features,)

    def statistic(self, real: Tensor, generated: Tensor) -> float:
        """Features [n d] and [m d] -> the value alone, without its interval."""
        raise NotImplementedError

    def designed_statistic(self, real: Tensor, generated: Tensor, design: Design) -> float:
        """`statistic`, for metrics that need to know which clips depend on each other."""
        return self.statistic(real, generated)

    def score(self, seen: Observations) -> Score:
        """The value with its jackknife interval."""
        real, generated = torch.stack(seen.reference), torch.stack(seen.generated)
        return score_statistic(self.designed_statistic, real, generated, seen.design, biased=self.biased)

    def difference(self, first: Observations, second: Observations) -> Comparison:
        """By the replicates of both scores. UserError if the clips of the two have other groups, or too few."""
        scores = [self.score(seen) for seen in (first, second)]
        if not all(score.replicates for score in scores):  # your own `score` may give a value alone
            scores = [SetMetric.score(self, seen) for seen in (first, second)]
        return compare_scores(*scores)


class ClipMetric(Metric):
    """A metric with a value per clip, averaged over the set, such as PIC. An observation is a dict with a "value".

    If there are several clips of each input, all count. With the card's option over_samples = "best", the best clip of
    each input counts alone.
    """

    @cached_property
    def observation_key(self) -> str:
        options = {key: value for key, value in self.identity["options"].items() if key != OVER_SAMPLES}
        return digest([self.identity | {"options": options}, self.extractor.identity], 32)

    @property
    def takes_best(self) -> bool:
        """Whether only the best clip of each input counts. UserError for an unknown value of the option."""
        chosen = self.card.options.get(OVER_SAMPLES, "mean")
        if chosen not in ("mean", "best"):
            raise UserError(f'{self.card.name}: {OVER_SAMPLES} is "{chosen}"; allowed: mean, best')
        if chosen == "best" and self.card.higher_is_better is None:
            raise UserError(f"{self.card.name}: no value is better than another, so there is no best clip of an input")
        return chosen == "best"

    def observe(self, view: View) -> dict[str, Any]:
        raise NotImplementedError

    def score(self, seen: Observations) -> Score:
        kept = self.kept(seen)
        score = score_values(kept.generated, kept.groups)
        if seen.items and (most := max(Counter(seen.items).values())) > 1:
            score.details["samples"] = f"{'best' if self.takes_best else 'mean'} of {most} clips of each input"
        return score

    def kept(self, seen: Observations) -> Observations:
        """The observations that count: all, or the best one of each item."""
        if not self.takes_best or seen.items is None:
            return seen
        best = best_of_each([row["value"] for row in seen.generated], seen.items, bool(self.card.higher_is_better))
        groups = None if seen.groups is None else [seen.groups[i] for i in best]
        return Observations([seen.generated[i] for i in best], groups=groups)

    def difference(self, first: Observations, second: Observations) -> Comparison:
        sides = self.kept(first), self.kept(second)
        values = [[row["value"] for row in seen.generated] for seen in sides]
        return compare_paired(values[0], values[1], sides[0].groups)

    def check(self, clip: Tensor, min_frames: int = 1) -> Tensor:
        """Return the clip if it is uint8 [t 3 h w] with at least `min_frames` frames. Otherwise raise UserError."""
        check_clip(clip, f"{self.card.name}: clip")
        if len(clip) < min_frames:
            raise UserError(f"{self.card.name} compares consecutive frames: a clip needs at least {min_frames} frames")
        return clip


def best_of_each(values: Sequence[float], items: Sequence[str], higher_is_better: bool) -> list[int]:
    """The place of the best value of each item, in the order of the items. Of equal values, the first."""
    best: dict[str, int] = {}
    sign = 1 if higher_is_better else -1
    for place, item in enumerate(items):
        if item not in best or sign * values[place] > sign * values[best[item]]:
            best[item] = place
    return list(best.values())


class ShareMetric(ClipMetric):
    """A metric whose value is 1.0 or 0.0 for each clip. Its score is a share of clips, with Wilson's interval."""

    def score(self, seen: Observations) -> Score:
        score = score_values(seen.generated, seen.groups)
        assert score.value is not None and score.n_groups is not None
        if score.n_groups == score.n_generated:
            interval = wilson(sum(row["value"] == 1 for row in seen.generated), score.n_generated)[1]
        else:
            error = jackknife(score.value, score.replicates).standard_error if score.replicates else 0.0
            interval = share_interval(score.value, error, score.n_generated, score.n_groups)
        return score.model_copy(update={"ci95": interval, "ci_method": "Wilson interval"})


def score_values(values: Sequence[dict[str, Any]], groups: Sequence[str] | None = None, n_reference: int = 0) -> Score:
    """Mean of "value" over clips, with its interval over groups. `details` has the means of other numbers."""
    if not values:
        raise UserError("no clips to average over")
    numbers = [float(value["value"]) for value in values]
    if not np.isfinite(numbers).all():
        bad = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise UserError(f"the value of clip {bad} is {numbers[bad]}; expected a finite number")
    interval = mean_interval(numbers, groups)
    n_groups = len(set(groups)) if groups is not None else len(numbers)
    effective = effective_number(group_sums(numbers, groups)[1])
    method = "Student's t" if effective < FEW_GROUPS else "the wider of BCa bootstrap and Student's t"
    details: dict[str, Any] = {}
    for key, first in sorted(values[0].items()):  # sorted, because rows from the cache are sorted too
        column: list[Any] = [value.get(key) for value in values]
        if len({type(entry) for entry in column}) > 1:  # not every clip has it
            continue
        if key != "value" and isinstance(first, float):
            details[key] = math.fsum(column) / len(column)
        elif isinstance(first, list) and len({len(row) for row in column}) == 1:
            details[key] = [float(mean) for mean in np.mean(column, axis=0)]
    return Score(
        value=math.fsum(numbers) / len(numbers),
        ci95=interval,
        ci_method=f"{method} over source videos" if interval else NO_INTERVAL if n_groups < 3 else NO_SPREAD,
        n_reference=n_reference,
        n_generated=len(values),
        n_groups=n_groups,
        replicates=_of_mean(numbers, groups),
        details=details,
    )


def _of_mean(numbers: Sequence[float], groups: Sequence[str] | None) -> Replicates | None:
    """The mean without each block of groups. None: the groups are not known, or too few."""
    if groups is None:
        return None
    design = Design(codes([]), codes(groups))
    strata = []
    for blocks in design.blocks():
        kept = mean_replicates(numbers, design.generated, blocks)
        sizes = [int(np.isin(design.generated, block).sum()) for block in blocks]
        strata.append([(len(numbers) / size, value) for size, value in zip(sizes, kept, strict=True)])
    return Replicates(design=design.digest, strata=strata) if strata else None


def score_statistic(
    statistic: DesignedStatistic,
    real: Tensor,
    generated: Tensor,
    groups: Groups = None,
    **how: Any,
) -> Score:
    """The statistic of [n d] and [m d] with its jackknife interval. `how`: options of `score_arranged`."""
    return score_arranged(statistic, *fn.arrange(real, generated, groups), **how)


def score_arranged(
    statistic: DesignedStatistic,
    real: Tensor,
    generated: Tensor,
    design: Design,
    lowest: float = -math.inf,
    highest: float = math.inf,
    interval: bool = True,
    biased: bool = False,
    is_share: bool = False,
) -> Score:
    """A score of float64 rows that are checked and in order; its interval is limited to [lowest, highest].

    `real` [0 d]: a statistic of one set alone. `interval` False: the value alone. `biased`: see `SetMetric`.
    `is_share`: the value is a share of clips, and the interval is Wilson's with the jackknife's error.
    """
    value = statistic(real, generated, design)
    score = Score(
        value=value,
        ci_method=TOO_FEW_LEFT if design.blocks() else NO_INTERVAL,
        n_reference=len(real),
        n_generated=len(generated),
        n_groups=design.n_groups,
        replicates=replicates(statistic, real, generated, design, biased) if interval else None,
    )
    if score.replicates is None:
        return score
    result = jackknife(value, score.replicates)
    score.details["standard_error"] = result.standard_error
    if biased:
        score.details["bias_corrected"] = result.bias_corrected
    blocks = " and ".join(str(len(stratum)) for stratum in score.replicates.strata)
    score.ci_method = f"jackknife over {blocks} blocks{' of source videos' if design.is_grouped else ''}"
    if is_share:
        score.ci95 = share_interval(value, result.standard_error, len(generated), design.n_groups)
        score.ci_method = f"Wilson's, with the error of a {score.ci_method}"
    elif result.standard_error == 0:
        score.ci_method = NO_SPREAD
    else:
        low, high = student_interval(value, result.standard_error, result.degrees)
        score.ci95 = (max(low, lowest), min(high, highest))
    return score


Scorer = Callable[[Tensor, Tensor, Any], Score]  # [n d], [m d], Design or None -> Score


class SetDistance(SetMetric):
    """A set metric made from two functions: `score` with interval, and `statistic`, the value alone for comparisons."""

    def __init__(
        self,
        card: MetricCard,
        extractor: FeatureExtractor,
        score: Scorer,
        statistic: Callable[[Tensor, Tensor], float] | None = None,
        designed: DesignedStatistic | None = None,
        biased: bool = False,
        version: int = 1,
    ) -> None:
        """Give `statistic`, or `designed` if the value depends on which clips depend on each other."""
        super().__init__(card, extractor)
        self._score, self._statistic, self._designed, self.biased = score, statistic, designed, biased
        self.version = version

    def score(self, seen: Observations) -> Score:
        return self._score(torch.stack(seen.reference), torch.stack(seen.generated), seen.design)

    def statistic(self, real: Tensor, generated: Tensor) -> float:
        if self._statistic is not None:
            return self._statistic(real, generated)
        value = self._score(real, generated, None).value
        assert value is not None
        return value

    def designed_statistic(self, real: Tensor, generated: Tensor, design: Design) -> float:
        if self._designed is not None:
            return self._designed(real, generated, design)
        return self.statistic(real, generated)
