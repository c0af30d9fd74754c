"""Times one Muon step for the matrices of a recipe's U-Net: PyTorch's Muon against dcbench's.

    OMP_NUM_THREADS=1 python benchmarks/muon.py --recipe tiny --rounds 3

CPU seconds; the two take turns. Gradients are noise: the cost does not depend on them.
"""

import argparse
import time

import torch
from torch import nn

from dcbench.training.loop import Muon
from dcbench.training.networks import build
from dcbench.training.objective import Conditions, DiffusionTask
from dcbench.training.recipe import find_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    networks = build(find_recipe(given.recipe).config(), 0)
    task = DiffusionTask(networks, None, Conditions(), ("spatial", "temporal"))  # type: ignore[arg-type]
    chosen = task.matrices()
    kernels = [p for name, p in task.named_parameters() if p.requires_grad and name in chosen]
    flat = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in kernels]
    for kernel, matrix in zip(kernels, flat, strict=True):
        kernel.grad = torch.randn_like(kernel)
        matrix.grad = kernel.grad.flatten(1).clone()
    optimisers = {"torch.optim.Muon": torch.optim.Muon(flat, 0.01, 0.0), "dcbench": Muon(kernels, 0.01)}
    count = sum(kernel.numel() for kernel in kernels)
    print(f"{len(kernels)} matrices, {count:,} parameters, {torch.get_num_threads()} thread(s)")
    for _ in range(given.rounds):
        for name, optimiser in optimisers.items():
            started = time.process_time()
            optimiser.step()
            print(f"{name:18} {time.process_time() - started:.3f} s")


if __name__ == "__main__":
    main()
