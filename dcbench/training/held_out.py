"""Loss on held-out clips at fixed noise, and what it grows by when one condition comes from another clip.

Two arms of an ablation are compared on the same clips, time steps and noise, so the difference has little noise of its
own; it needs seconds where FVD needs hundreds of samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dcbench.catalogue import find_dataset, load_entry_point
from dcbench.datasets.base import find_root
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.training.data import ClipPool
from dcbench.training.objective import Conditions, DiffusionTask
from dcbench.training.recipe import DiffusionStage, Recipe

TIMES = (50, 200, 400, 600, 800, 950)
SWAPS = ("text", "context", "vdg")


@dataclass(frozen=True)
class HeldOut:
    """Mean loss, its standard error over clips, and the loss with each condition swapped.

    sampled: the loss of each clip with its first frame as the condition, as when it is sampled. growth: by how much
    the loss of each clip grows with a condition swapped. Both are empty in older files.
    """

    loss: float
    error: float
    swapped: dict[str, float]
    sampled: tuple[float, ...] = ()
    growth: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def reliance(self, condition: str) -> float:
        """Relative growth of the loss when this condition is another clip's: 0 = it is not used."""
        return self.swapped[condition] / self.loss - 1


@torch.no_grad()
def held_out(
    networks: Networks,
    recipe: Recipe,
    stage: DiffusionStage,
    split: str = "test",
    clips: int = 64,
    batch: int = 16,
    data_root: Path | None = None,
) -> HeldOut:
    """Measure the U-Net of `networks` under the conditions of `stage`, none dropped.

    Arms that were trained on different condition frames have losses of different tasks; `sampled` is of one task for
    all: the condition is the first frame.
    """
    card = find_dataset(recipe.data.dataset)
    items = load_entry_point(card)(card, find_root(card, data_root), {**card.options, **recipe.data.options}).items(
        split
    )
    cfg = networks.cfg
    pool = ClipPool(items, cfg.num_frames, recipe.data.strides, cfg.height, cfg.width, clips, seed=0)
    parts = {
        start: pool.batch(range(start, min(start + batch, clips)), torch.Generator().manual_seed(start))
        for start in range(0, clips, batch)
    }

    def losses(condition_frame: Literal["random", "first"], swap: str = "") -> Tensor:
        """Of each clip, over all times: [clips]."""
        conditions = Conditions(stage.context, stage.vdg, condition_frame, 0.0, 0.0, 0.0, 0.0)
        task = DiffusionTask(networks, pool, conditions, (), stage.single_frames).eval()
        found = []
        for start, part in parts.items():
            of_times = []
            for time in TIMES:
                noise = torch.Generator().manual_seed(start * 1000 + time)
                times = torch.full((len(part),), time)
                of_times.append(task.clip_errors(part, times, noise, (swap,) if swap else ()))
            found.append(torch.stack(of_times).double().mean(0).cpu())
        return torch.cat(found)

    own = losses(stage.condition_frame)
    sampled = own if stage.condition_frame == "first" else losses("first")
    swapped = {swap: losses(stage.condition_frame, swap) for swap in SWAPS}
    return HeldOut(
        float(own.mean()),
        float(own.std() / clips**0.5) if clips > 1 else float("nan"),
        {swap: float(loss.mean()) for swap, loss in swapped.items()},
        tuple(sampled.tolist()),
        {swap: tuple((loss - own).tolist()) for swap, loss in swapped.items()},
    )
