"""The example of the documentation, copied as it is, runs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dcbench.catalogue import find_dataset, find_model, load_entry_point
from dcbench.cli import main
from dcbench.models.base import Request, Runtime, check_generated
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling
from dcbench.runs.run import Options

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


OWN = """
import torch

class Told:
    conditions_on = frozenset({"image", "prompt"})
    def __init__(self, card, runtime):
        self.card, self.clip_facts = card, {}
    def generate(self, requests):
        self.clip_facts |= {r.clip_id: {"prompt_cut": r.clip_id} for r in requests[:1]}
        return [torch.zeros(r.num_frames, *r.image.shape, dtype=torch.uint8) for r in requests]
"""


def test_facts_of_single_clips_stand_in_their_lines(in_tmp):
    (in_tmp / "told.py").write_text(OWN)
    protocol = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    card = find_model("./told.py:Told")
    job = planning.plan(card, find_dataset("shapes"), protocol, out=in_tmp / "run", limit=2, quiet=True)
    sampling.sample(job, Options(device="cpu", quiet=True, batch_size=2))
    rows = job.directory.finished_samples()
    assert [rows[case.id].get("prompt_cut") for case in job.cases] == [job.cases[0].id, None]


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
