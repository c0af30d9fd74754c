"""Loss on held-out clips at fixed noise, and its growth when one condition is that of another clip.

Two arms of an ablation are compared on the same clips, time steps and noise, so their difference varies little. That
takes seconds; FVD needs hundreds of samples.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dcbench.files import read_json
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.training.directory import Training
from dcbench.training.networks import with_latents
from dcbench.training.objective import Conditions, DiffusionTask
from dcbench.training.recipe import DiffusionStage, Recipe

TIMES = (50, 200, 400, 600, 800, 950)
SWAPS = ("text", "context", "vdg")
ALL_SHOWN = {name: 0.0 for name in Conditions.model_fields if name.startswith("drop_")}


@dataclass(frozen=True)
class HeldOut:
    """Mean loss, its standard error over clips, and the mean loss when one condition is that of another clip.

    sampled: loss of each clip with its first frame as the condition, as when it is sampled. growth: for each condition,
    by how much the loss of each clip grows when the condition is another clip's. Both are empty in older files.
    """

    loss: float
    error: float
    swapped: dict[str, float]
    sampled: tuple[float, ...] = ()
    growth: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def reliance(self, condition: str) -> float:
        """Relative growth of the loss when this condition is another clip's; 0 when the network does not use it."""
        return self.swapped[condition] / self.loss - 1


def read_held_out(training: Training) -> HeldOut | None:
    """What was measured before, if it was."""
    return HeldOut(**read_json(training.held_out)) if training.held_out.is_file() else None


@torch.no_grad()
def held_out(
    networks: Networks,
    recipe: Recipe,
    stage: DiffusionStage,
    clips: int = 64,
    batch: int = 16,
    data_root: Path | None = None,
) -> HeldOut:
    """Measure the U-Net of `networks` on the test split, under the conditions of `stage`; none of them is left out.

    `loss` has another meaning for an arm that was trained on other condition frames. `sampled` has the same meaning for
    all arms: the condition is the first frame.
    """
    data = recipe.data.model_copy(update={"split": "test", "clips": clips, "seed": 0})
    pool = data.pool(networks.cfg, data_root)
    parts = {
        start: with_latents(
            networks, pool.batch(range(start, min(start + batch, clips)), torch.Generator().manual_seed(start))
        )
        for start in range(0, clips, batch)
    }

    def losses(condition_frame: Literal["random", "first"], swap: str = "") -> Tensor:
        """The loss of each clip, a mean over TIMES: [clips]."""
        conditions = stage.model_copy(update={**ALL_SHOWN, "condition_frame": condition_frame})
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
