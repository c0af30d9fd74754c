"""The base classes of metrics: their inputs from a case, their identity, their observations and their score."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from dcbench.catalogue import MetricCard, source_sha256
from dcbench.clips import check_clip
from dcbench.errors import UserError
from dcbench.files import digest
from dcbench.metrics.functional import mean_interval
from dcbench.metrics.statistics import Comparison, compare_paired, compare_sets
from dcbench.record import Score

NO_INTERVAL = "none: fewer than 3 independent clips"


NEEDED = {
    "image": "the input image",
    "prompt": "a prompt",
    "reference": "a reference clip",
    "fps": "a frame rate",
    "truth": "what the clip should show",
}


@dataclass(frozen=True)
class View:
    """The inputs of a metric from one case. None: the case does not have it, or the metric's card does not need it."""

    clip: Tensor  # uint8 [t 3 h w]: the clip to observe, generated or reference
    image: Tensor | None = None  # uint8 [3 h w], the input image
    prompt: str | None = None
    reference: Tensor | None = None  # uint8 [t 3 h w]
    fps: float | None = None
    truth: Mapping[str, Any] | None = None  # facts of the video from its data set, such as the scene of `shapes`

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
    groups: list[str] | None = None  # the source video of each generated clip, for the interval


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

    version: ClassVar[int] = 1  # increase it when the code gives other numbers
    extractor_options: ClassVar[tuple[str, ...]] = ()  # options that the identity of dcbench's extractor covers
    in_workers: ClassVar[bool] = False  # `observe` may run in several threads at once

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

    def lacks(self, view: View) -> str | None:
        """A message that names the first input that the metric needs and the case does not have. None: it has all."""
        for name in self.card.needs:
            if getattr(view, name) is None:
                return f"{self.card.name} needs {NEEDED[name]}, which this clip does not have"
        return None

    def observe(self, view: View) -> Any:
        """The observation of one case: a tensor, or a dict of JSON values. UserError if the case cannot be observed."""
        raise NotImplementedError

    def score(self, seen: Observations) -> Score:
        raise NotImplementedError

    def difference(self, first: Observations, second: Observations) -> Comparison:
        """The score of `first` minus the score of `second`: two models on the same cases."""
        raise NotImplementedError


class SetMetric(Metric):
    """A metric that compares two sets of clips, for example FVD. An observation is a row of features, float32 [d]."""

    extractor: FeatureExtractor
    extractor_options = ("preprocessing",)
    in_workers = True

    @property
    def observes_reference(self) -> bool:
        return True

    @cached_property
    def observation_key(self) -> str:
        """For dcbench's own extractors, the key is that of the extractor: all its set metrics share their features."""
        own = {type(self.extractor).__module__.split(".")[0], type(self).observe.__module__.split(".")[0]}
        return digest(self.extractor.identity, 32) if own == {"dcbench"} else super().observation_key

    def observe(self, view: View) -> Tensor:
        features = self.extractor.extract([view.clip])[0]
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"the features of {self.extractor.identity['name']} have NaN or infinity")
        return features

    def statistic(self, real: Tensor, generated: Tensor) -> float:
        """Features [n d] and [m d] -> the value alone, without its interval."""
        raise NotImplementedError

    def difference(self, first: Observations, second: Observations) -> Comparison:
        real, a, b = (torch.stack(rows).double() for rows in (first.reference, first.generated, second.generated))
        return compare_sets(self.statistic, real, a, b, first.groups)


class ClipMetric(Metric):
    """A metric with a value per clip, averaged over the set, such as PIC. An observation is a dict with a "value"."""

    def observe(self, view: View) -> dict[str, Any]:
        raise NotImplementedError

    def score(self, seen: Observations) -> Score:
        return score_values(seen.generated, seen.groups)

    def difference(self, first: Observations, second: Observations) -> Comparison:
        values = [[row["value"] for row in seen.generated] for seen in (first, second)]
        return compare_paired(values[0], values[1], first.groups)

    def check(self, clip: Tensor, min_frames: int = 1) -> Tensor:
        """Return the clip if it is uint8 [t 3 h w] with at least `min_frames` frames. Otherwise raise UserError."""
        check_clip(clip, f"{self.card.name}: clip")
        if len(clip) < min_frames:
            raise UserError(f"{self.card.name} compares consecutive frames: a clip needs at least {min_frames} frames")
        return clip


def score_values(values: Sequence[dict[str, Any]], groups: Sequence[str] | None = None, n_reference: int = 0) -> Score:
    """Mean of "value" over clips, with a BCa interval over source videos. `details` has the means of other numbers."""
    if not values:
        raise UserError("no clips to average over")
    numbers = [float(value["value"]) for value in values]
    if not np.isfinite(numbers).all():
        bad = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise UserError(f"the value of clip {bad} is {numbers[bad]}; expected a finite number")
    interval = mean_interval(numbers, groups)
    details: dict[str, Any] = {}
    for key, first in sorted(values[0].items()):  # sorted, because rows from the cache are sorted too
        column = [value[key] for value in values]
        if key != "value" and isinstance(first, float):
            details[key] = float(np.mean(column))
        elif isinstance(first, list) and len({len(row) for row in column}) == 1:
            details[key] = [float(mean) for mean in np.mean(column, axis=0)]
    return Score(
        value=float(np.mean(numbers)),
        ci95=interval,
        ci_method="BCa bootstrap over source videos" if interval else NO_INTERVAL,
        n_reference=n_reference,
        n_generated=len(values),
        details=details,
    )


Scorer = Callable[[Tensor, Tensor, Sequence[str] | None], Score]  # [n d], [m d], source videos -> Score


class SetDistance(SetMetric):
    """A set metric made from two functions: `score` with interval, and `statistic`, the value alone for comparisons."""

    def __init__(
        self,
        card: MetricCard,
        extractor: FeatureExtractor,
        score: Scorer,
        statistic: Callable[[Tensor, Tensor], float] | None = None,
    ) -> None:
        super().__init__(card, extractor)
        self._score, self._statistic = score, statistic

    def score(self, seen: Observations) -> Score:
        return self._score(torch.stack(seen.reference), torch.stack(seen.generated), seen.groups)

    def statistic(self, real: Tensor, generated: Tensor) -> float:
        if self._statistic is not None:
            return self._statistic(real, generated)
        value = self._score(real, generated, None).value
        assert value is not None
        return value
