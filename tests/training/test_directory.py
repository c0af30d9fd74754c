"""The files of a training: what is taken from another one, and what is not."""

import json
import subprocess
import sys

import pytest
import torch

from dcbench.errors import UserError
from dcbench.files import atomic_write, remove_leftovers
from dcbench.training.data import CachedPool
from dcbench.training.directory import StageFolder, Training
from dcbench.training.networks import build
from dcbench.training.run import train
from dcbench.weights import load_tensors

AUTOENCODER = {"name": "autoencoder", "objective": "autoencoder"}
JOINT = {"name": "joint"}


def test_a_stage_is_taken_only_when_it_is_finished_and_only_once(tmp_path):
    source, target = StageFolder(tmp_path / "a"), StageFolder(tmp_path / "b")
    source.add_to_log({"step": 1})
    source.state.write_bytes(b"state")
    target.take(source)
    assert not target.path.exists()
    source.weights.write_bytes(b"weights")
    target.take(source)
    assert not target.path.exists()  # weights without their config.json are no finished stage
    source.config.write_text("{}")
    target.take(source)
    assert target.finished and target.log_lines() == [{"step": 1}] and not target.state.exists()
    source.weights.write_bytes(b"other")
    target.take(source)
    assert target.weights.read_bytes() == b"weights"


def test_a_log_that_a_crash_cut_off_goes_on(tmp_path):
    files = StageFolder(tmp_path)
    for step in (1, 2, 3):
        files.add_to_log({"step": step, "loss": 1 / step})
    with files.log.open("a") as file:
        file.write('{"step": 4, "lo')
    assert [line["step"] for line in files.log_lines()] == [1, 2, 3]
    before = files.log.read_text().splitlines()[:2]
    files.trim_log(2)
    assert files.log.read_text().splitlines() == before


def test_a_damaged_log_is_mended_and_no_step_stands_twice(tmp_path, capsys):
    files = StageFolder(tmp_path)
    files.add_to_log({"step": 1, "loss": 1.0})
    with files.log.open("ab") as file:
        file.write(b'\0\0\0\xff\n[1]\n{"step": 2, "loss": 5}{"st\n{"loss": 3}\n')
    for loss in (0.5, 0.4):
        files.add_to_log({"step": 2, "loss": loss})
    assert files.log_lines() == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.4}]
    files.trim_log(2)
    assert [json.loads(line)["step"] for line in files.log.read_text().splitlines()] == [1, 2]
    assert "5 damaged or doubled lines are removed" in capsys.readouterr().err


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    write = (
        "import os, sys; from pathlib import Path; from dcbench.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temporary: temporary.write_bytes(b'part'); os._exit(9)"
    )
    for name in ("state.pt", "n" * 200, "no.suffix-here"):
        subprocess.run([sys.executable, "-c", write, str(tmp_path / name)], check=False)
    (tmp_path / ".other-file").write_text("kept")
    with atomic_write(tmp_path / "mine.txt") as temporary:
        temporary.write_text("whole")
        assert len(list(tmp_path.iterdir())) == 5
        assert len(remove_leftovers(tmp_path)) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other-file", "mine.txt"]


def test_a_start_file_is_known_by_its_hash(tmp_path):
    training, file = Training(tmp_path / "out"), tmp_path / "begin.pt"
    file.write_bytes(b"one")
    training.remember_start("begin.pt", file)
    training.remember_start("begin.pt", file)
    assert list(json.loads((tmp_path / "out" / "start.json").read_text())) == ["begin.pt"]
    file.write_bytes(b"two")
    with pytest.raises(UserError, match=r"was begun with another begin\.pt"):
        training.remember_start("begin.pt", file)


def test_latents_belong_to_the_tensors_that_decide_them(make_recipe, tmp_path):
    training, autoencoder = Training(tmp_path), build(make_recipe(JOINT).config(), 0).autoencoder
    first = training.latents(autoencoder)
    for name, parameter in autoencoder.named_parameters():
        parameter.data.add_(1e-3)
        if name.startswith(("decoder.", "post_quant_conv.")):
            assert training.latents(autoencoder) == first
        else:
            assert training.latents(autoencoder) != first
        parameter.data.sub_(1e-3)
        first = training.latents(autoencoder)
    assert training.latents(build(make_recipe(JOINT).config(), 1).autoencoder) != first


def test_latents_of_another_autoencoder_are_not_read(make_recipe, tmp_path):
    """Two recipes share a folder of latents; their autoencoders differ, then they do not."""
    for seed in (0, 1):
        recipe = make_recipe({**AUTOENCODER, "steps": 1}, {**JOINT, "steps": 1}, seed=seed)
        for out in ("alone", "shared"):
            folder = tmp_path / f"{out}-{seed}"
            assert train(recipe, folder, device="cpu", latents=tmp_path / "latents" if out == "shared" else None)
        one, two = (load_tensors(tmp_path / f"{out}-{seed}" / "weights.safetensors") for out in ("alone", "shared"))
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert len(list((tmp_path / "latents").iterdir())) == seed + 1
    other = make_recipe({**AUTOENCODER, "steps": 1}, {**JOINT, "steps": 2}, seed=1)
    assert train(other, tmp_path / "other", device="cpu", latents=tmp_path / "latents")
    assert len(list((tmp_path / "latents").iterdir())) == 2


def test_latents_of_other_clips_are_refused(make_recipe, tmp_path):
    recipe = make_recipe(JOINT)
    pool = recipe.data.pool(recipe.config(), None)
    few = CachedPool(recipe.data.model_copy(update={"clips": 3}).pool(recipe.config(), None))
    file = tmp_path / "latents.safetensors"
    few.with_latents(file, lambda frames: frames.float())
    with pytest.raises(UserError, match=r"not 12 clips of 4 frames; remove the file"):
        CachedPool(pool).with_latents(file, lambda frames: frames.float())
