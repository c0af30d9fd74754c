"""What every metric is made of: an extractor, a score, and the two kinds of metric that the runner knows."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dcbench.catalogue import MetricCard


@dataclass(frozen=True)
class Score:
    """A number with what is needed to trust it."""

    value: float
    ci95: tuple[float, float] | None
    ci_method: str  # how the interval was made, or why there is none
    n_reference: int
    n_generated: int
    warnings: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)  # JSON values


class FeatureExtractor(nn.Module):
    """Clips to features. Owns the resize, the range and the weights, which together are its identity."""

    name: str
    weights_sha256: str  # of the tensors in the network, so that every file with the same numbers has the same hash
    preprocessing: str
    num_features: int
    min_frames: int = 1
    batch_size: int = 2

    @property
    def identity(self) -> dict[str, str]:
        """What changes the features: part of every score, and of the key of every cached feature."""
        return {"name": self.name, "weights_sha256": self.weights_sha256, "preprocessing": self.preprocessing}

    def forward(self, clips: Tensor) -> Tensor:
        """uint8 [b t c h w] -> float32 [b d]"""
        raise NotImplementedError

    def extract(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [t c h w] each, sizes may differ -> float32 [len(clips), d] on the CPU."""
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


class HasIdentity(Protocol):
    @property
    def identity(self) -> dict[str, str]: ...


@runtime_checkable
class SetMetric(Protocol):
    """A distance between two sets of clips, for example FVD."""

    card: MetricCard

    @property
    def extractor(self) -> HasIdentity: ...

    def extract(self, clips: Sequence[Tensor]) -> Tensor:
        """uint8 [t c h w] each -> float32 [b d]; features of one identity serve every metric of that identity."""
        ...

    def score(self, real: Tensor, generated: Tensor, groups: Sequence[str] | None = None) -> Score:
        """[n d], [m d] -> Score. `groups`: the source video of each generated clip, for the interval."""
        ...


@runtime_checkable
class ClipMetric(Protocol):
    """A value for each clip, averaged over the set, for example PIC."""

    card: MetricCard

    @property
    def extractor(self) -> HasIdentity: ...

    def extract(
        self, clips: Sequence[Tensor], images: Sequence[Tensor] | None, prompts: Sequence[str] | None
    ) -> list[dict[str, Any]]:
        """uint8 [t c h w], uint8 [c h w], text -> one JSON-able dict a clip with at least {"value": float}."""
        ...

    def score(self, values: Sequence[dict[str, Any]], groups: Sequence[str] | None = None) -> Score: ...
