"""The example of the documentation, copied as it is, runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dcbench.catalogue import find_model, load_entry_point
from dcbench.cli import main
from dcbench.models.base import Request, Runtime, check_generated

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "my_model.py"


def test_the_example_is_short_and_stands_in_the_page():
    code = EXAMPLE.read_text()
    page = (EXAMPLE.parents[1] / "baselines.md").read_text()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    assert code.strip() in page


def test_a_copy_of_the_example_runs_from_the_command_line(in_tmp, monkeypatch, cheap_metric):
    shutil.copy(EXAMPLE, in_tmp / "my_model.py")
    command = ["run", "--model", "./my_model.py:MyModel", "--dataset", "shapes", "--limit", "2", "--out", "run"]
    monkeypatch.setattr(sys, "argv", ["dcbench", *command, "--metrics", cheap_metric, "--device", "cpu"])
    with pytest.raises(SystemExit, match="0"):
        main()
    record = json.loads(Path("run/record.json").read_text())
    assert record["n_scored"] == 2
    assert record["plan"]["model"]["title"] == "MyModel"
    assert Path("run/report/table.md").is_file()


def test_the_example_makes_a_clip_of_its_request():
    card = find_model(f"{EXAMPLE}:MyModel")
    model = load_entry_point(card)(card, Runtime())
    image = torch.randint(0, 256, (3, 24, 32), dtype=torch.uint8)
    requests = [Request(f"c{k}", image, "", 16, 8.0, 3, seed) for k, seed in enumerate((1, 1, 2))]
    clips = [check_generated(clip, r, "example") for r, clip in zip(requests, model.generate(requests), strict=True)]
    assert torch.equal(clips[0], clips[1])
    assert not torch.equal(clips[0], clips[2])
    drift = (clips[0][4].float() - image.roll(4, dims=-1).float()).abs().mean()
    assert drift < 12
