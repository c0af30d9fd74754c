"""Loss on held-out clips at fixed noise, and what it grows by when one condition comes from another clip.

Two arms of an ablation are compared on the same clips, time steps and noise, so the difference has little noise of its
own; it needs seconds where FVD needs hundreds of samples.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from dcbench.catalogue import find_dataset, load_entry_point
from dcbench.datasets.base import find_root
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.training.data import ClipPool
from dcbench.training.objective import Conditions, DiffusionTask
from dcbench.training.recipe import Recipe, Stage

TIMES = (50, 200, 400, 600, 800, 950)
SWAPS = ("text", "context", "vdg")


@dataclass(frozen=True)
class HeldOut:
    """Mean loss, its standard error over clips, and the loss with each condition swapped."""

    loss: float
    error: float
    swapped: dict[str, float]

    def reliance(self, condition: str) -> float:
        """Relative growth of the loss when this condition is another clip's: 0 = it is not used."""
        return self.swapped[condition] / self.loss - 1


@torch.no_grad()
def held_out(
    networks: Networks,
    recipe: Recipe,
    stage: Stage,
    split: str = "test",
    clips: int = 64,
    batch: int = 16,
    data_root: Path | None = None,
) -> HeldOut:
    """Measure the U-Net of `networks` under the conditions of `stage`, none dropped."""
    card = find_dataset(recipe.data.dataset)
    items = load_entry_point(card)(card, find_root(card, data_root), {**card.options, **recipe.data.options}).items(
        split
    )
    cfg = networks.cfg
    pool = ClipPool(items, cfg.num_frames, recipe.data.strides, cfg.height, cfg.width, clips, seed=0)
    conditions = Conditions(stage.context, stage.vdg, stage.condition_frame, 0.0, 0.0, 0.0, 0.0)
    task = DiffusionTask(networks, pool, conditions, (), stage.single_frames).eval()
    losses: dict[str, list[float]] = {name: [] for name in ("", *SWAPS)}
    for start in range(0, clips, batch):
        rng = torch.Generator().manual_seed(start)
        part = pool.batch(range(start, min(start + batch, clips)), rng)
        for swap, values in losses.items():
            for time in TIMES:
                noise = torch.Generator().manual_seed(start * 1000 + time)
                times = torch.full((len(part),), time)
                values.append(float(task.loss(part, times, noise, (swap,) if swap else ())["loss"]))
    per_time = torch.tensor(losses[""]).view(-1, len(TIMES)).mean(1)
    return HeldOut(
        sum(losses[""]) / len(losses[""]),
        float(per_time.std() / len(per_time) ** 0.5) if len(per_time) > 1 else float("nan"),
        {name: sum(losses[name]) / len(losses[name]) for name in SWAPS},
    )
