"""torchrun data parallelism: two processes learn what one does from the batches of both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcbench.training.run import train
from dcbench.weights import load_tensors

WORKER = """
import sys
from pathlib import Path
import pytest
import torch
torch.set_num_threads(1)
from dcbench.training.recipe import Recipe
from dcbench.training.run import train
recipe = Recipe.model_validate_json(Path(sys.argv[1]).read_text())
assert train(recipe, Path(sys.argv[2]), device="cpu")
"""


@pytest.mark.slow
def test_two_processes_train_one_model(make_recipe, tmp_path):
    stage = {"name": "joint", "train": ("context", "spatial"), "steps": 3, "ema": 0.9}
    recipe = make_recipe({"name": "autoencoder", "objective": "autoencoder"}, stage)
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, tmp_path / "worker.py", tmp_path / "recipe.json", tmp_path / "two"],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert train(recipe, tmp_path / "one", device="cpu")
    lines = (tmp_path / "two" / "joint" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]
    one, two = (load_tensors(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert all(torch.isfinite(value).all() for value in two.values())
    moved = "model.diffusion_model.out.2.weight"
    assert not torch.equal(one[moved], two[moved])  # other draws: each process has its own
    assert set(one) == set(two)
