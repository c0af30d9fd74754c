"""Videos with a cut in their clip are replaced while a run is planned, and named; the default protocol keeps them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from dcbench import video
from dcbench.catalogue import find_dataset, find_model
from dcbench.cli import app
from dcbench.protocol import find_protocol
from dcbench.runs import planning
from dcbench.weights import MissingWeights

PROTOCOL = """
name = "no-cuts"
version = 1
title = "t"
summary = "s"
split = "all"
num_clips = 2
num_frames = 12
frame_stride = 1
start = "first"
selection = "first"
height = 64
width = 64
cuts = "drop"
"""


def shot(frames: int, seed: int) -> Tensor:
    """uint8 [t 3 64 64]: coloured squares that move 1 px right a frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 8, 8)).astype(np.uint8)
    squares = torch.from_numpy(coarse.repeat(8, 1).repeat(12, 2))
    return torch.stack([squares[:, :, frames - k : frames - k + 64] for k in range(frames)])


@pytest.fixture
def world(tmp_path: Path) -> tuple[Path, Path]:
    """A folder of three videos, of which the first has a cut before frame 5; and a protocol that drops it."""
    clips, protocol = tmp_path / "clips", tmp_path / "no-cuts.toml"
    clips.mkdir()
    for name, frames in (("a", torch.cat([shot(5, 1), shot(7, 2)])), ("b", shot(12, 3)), ("c", shot(12, 4))):
        video.write_lossless(clips / f"{name}.mkv", frames, 8)
    protocol.write_text(PROTOCOL)
    return clips, protocol


def test_a_video_with_a_cut_is_replaced_and_named(world: tuple[Path, Path], in_tmp: Path) -> None:
    clips, protocol = world
    options = ["--model", "still", "--dataset", "folder", "--data", str(clips), "--protocol", str(protocol)]
    done = CliRunner().invoke(app, ["run", *options, "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "0 too short, 0 unreadable\n             1 with a cut inside: a\n" in done.output
    run = planning.plan(find_model("still"), find_dataset("folder"), find_protocol(str(protocol)), clips, quiet=True)
    assert [case.id for case in run.cases] == ["b", "c"]
    assert [(e.id, e.reason, e.rule) for e in run.plan.excluded] == [("a", "a cut before frame 5 of its clip", "cut")]
    again = planning.plan(find_model("still"), find_dataset("folder"), find_protocol(str(protocol)), clips, quiet=True)
    assert again.plan == run.plan


def test_cuts_are_kept_by_default_and_need_no_network(
    world: tuple[Path, Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, protocol = world
    monkeypatch.setattr(
        "dcbench.metrics.cut.shared", lambda device: (_ for _ in ()).throw(MissingWeights("no weights"))
    )
    with pytest.raises(MissingWeights, match="no weights"):
        planning.plan(find_model("still"), find_dataset("folder"), find_protocol(str(protocol)), clips, quiet=True)
    protocol.write_text(PROTOCOL.replace('cuts = "drop"\n', ""))
    run = planning.plan(find_model("still"), find_dataset("folder"), find_protocol(str(protocol)), clips, quiet=True)
    assert [case.id for case in run.cases] == ["a", "b"] and "cuts" not in run.plan.protocol
