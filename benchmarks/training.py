"""Training speed on this machine: CPU seconds per step and clips per CPU second, for each stage of a recipe.

    OMP_NUM_THREADS=1 python benchmarks/training.py --recipe tiny --steps 5

CPU seconds are the reliable unit on a shared machine. Weights are random; nothing is written.
"""

import argparse
import time
from pathlib import Path

import torch

from dcbench.seeding import clip_seed
from dcbench.training.networks import build
from dcbench.training.recipe import find_recipe
from dcbench.training.run import make_task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--data", type=Path, default=None)
    given = parser.parse_args()
    recipe = find_recipe(given.recipe)
    networks = build(recipe.config(), clip_seed(recipe.seed, "networks"))
    pool = recipe.data.pool(networks.cfg, given.data)
    print(f"{recipe.name}, {torch.get_num_threads()} thread(s)")
    print(f"{'stage':20} {'clips a step':>12} {'CPU s a step':>12} {'clips / CPU s':>13} {'parameters':>11}")
    for stage in recipe.stages:
        task = make_task(stage, networks, pool).train()
        trained = [p for p in task.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=0.0, foreach=True)
        spent = []
        for step in range(given.steps + 1):
            rng = torch.Generator().manual_seed(step)
            started = time.process_time()
            task(stage.batch_size, rng)["loss"].backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            spent.append(time.process_time() - started)
        seconds = min(spent[1:])
        size = sum(p.numel() for p in trained) / 1e6
        row = f"{stage.name:20} {stage.batch_size:12} {seconds:12.3f} {stage.batch_size / seconds:13.1f} {size:10.2f}M"
        print(row, flush=True)


if __name__ == "__main__":
    main()
