"""Several models on several datasets, from one command to one table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dcbench import video
from dcbench.cli import main
from dcbench.errors import UserError
from dcbench.record import read_cost, read_record
from dcbench.runs import grid

GREY = torch.full((1, 3, 48, 48), 128, dtype=torch.uint8)


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three real video files: a square that moves."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        clip = GREY.repeat(20, 1, 1, 1)
        for k in range(20):
            clip[k, number, 8 : 8 + 2 * k, 4:20] = 255
        video.write_lossless(folder / f"v{number}.mkv", clip, 8)
    return folder


def dcbench(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["dcbench", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_a_grid_plans_runs_and_ends_in_one_table(videos, in_tmp, monkeypatch, capsys, cheap_metric):
    models = [part for name in ("zoom", "still", "noise") for part in ("--model", name)]
    data = ["--dataset", "shapes", "--dataset", "folder", "--data", f"folder={videos}"]
    options = ["--limit", "2", "--metrics", cheap_metric, "--out", "grid", "--device", "cpu"]
    arguments = ["run", *models, *data, *options, "--set", "zoom:options.factor=1.5"]
    assert dcbench(monkeypatch, *arguments, "--dry-run") == 0
    assert capsys.readouterr().out.count("fingerprint") == 6
    assert not Path("grid").exists()
    assert dcbench(monkeypatch, *arguments) == 0
    said = capsys.readouterr().out
    runs = sorted(path.name for path in Path("grid").iterdir() if (path / "record.json").is_file())
    assert runs == [f"{m}-{d}" for m in ("noise", "still", "zoom") for d in ("folder", "shapes")]
    table = Path("grid/report/table.md").read_text()
    for text in (said, table):
        for name in ("Noise", "Still image", "Slow zoom", "folder", "shapes"):
            assert name in text, name
    plan = read_record(Path("grid/zoom-shapes")).plan
    assert plan.model["options"]["factor"] == 1.5
    assert plan.fingerprint == read_record(Path("grid/noise-shapes")).plan.fingerprint


@pytest.mark.slow
def test_every_run_of_a_grid_has_a_whole_cost(videos, in_tmp, cheap_metric):
    greedy = Path("greedy.py")
    greedy.write_text(
        "import torch\n"
        "class Greedy:\n"
        "    conditions_on = frozenset({'image'})\n"
        "    def __init__(self, card, runtime): self.card, self.held = card, torch.ones(60_000_000)\n"
        "    def generate(self, requests): return [r.image.expand(16, -1, -1, -1).clone() for r in requests]\n"
    )
    models = ["--model", "greedy.py:Greedy", "--model", "still"]
    options = ["--limit", "2", "--metrics", cheap_metric, "--out", "grid", "--device", "cpu"]
    program = "from dcbench.cli import main; main()"  # a process of its own: this one's memory has been larger before
    subprocess.run([sys.executable, "-c", program, "run", *models, "--dataset", "shapes", *options], check=True)
    costs = {name: read_cost(Path("grid") / f"{name}-shapes") for name in ("greedy", "still")}
    peaks = {}
    for name, cost in costs.items():
        assert cost is not None
        assert cost.seconds_per_clip is not None and cost.seconds_per_clip > 0
        assert (cost.device, cost.dtype) == ("cpu", "float32")
        assert cost.hardware
        assert "steps" in cost.details
        assert cost.peak_memory_mb is not None
        peaks[name] = cost.peak_memory_mb
    if Path("/proc/self/clear_refs").exists():  # a model does not pay for its neighbour
        assert peaks["greedy"] > peaks["still"] + 100


def test_one_run_that_fails_does_not_keep_the_others_from_running(in_tmp, monkeypatch, capsys, cheap_metric):
    Path("broken.toml").write_text(
        'name = "broken"\ntitle = "Broken"\nsummary = "x"\nentry_point = "dcbench.models.baselines.videos:load"\n'
        '[options]\nfolder = "nowhere"\npattern = ""\ntemporal = "first"\ntitle = ""\n'
    )
    models = ["--model", "broken.toml", "--model", "still"]
    options = ["--limit", "2", "--metrics", cheap_metric, "--out", "grid", "--device", "cpu"]
    assert dcbench(monkeypatch, "run", *models, "--dataset", "shapes", *options) == 2
    said = capsys.readouterr()
    assert "broken on shapes: the model 'videos' needs a folder" in said.err
    assert "Still image" in said.out
    assert json.loads(Path("grid/still-shapes/record.json").read_text())["n_scored"] == 2


def cells(**changes: Any) -> list[grid.Cell]:
    given: dict[str, Any] = {"models": ["zoom", "still"], "datasets": ["ucf101", "msrvtt"], "data": [], "settings": []}
    given |= {"out": None, "manifest": None, **changes}
    return grid.cells(**given)


def test_a_grid_is_each_model_on_each_dataset():
    found = cells(data=["ucf101=/a", "msrvtt=/b"], out=Path("x"), settings=["zoom:options.factor=2", "clip.fps=8"])
    assert [(c.model, c.dataset, str(c.data)) for c in found] == [
        ("zoom", "ucf101", "/a"), ("still", "ucf101", "/a"), ("zoom", "msrvtt", "/b"), ("still", "msrvtt", "/b"),
    ]  # fmt: skip
    assert found[0].settings == ("options.factor=2", "clip.fps=8")
    assert found[1].settings == ("clip.fps=8",)
    assert found[1].out == Path("x/still-ucf101")
    assert cells(models=["zoom"], datasets=["ucf101"], data=["/a"], out=Path("x"))[0].out == Path("x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["zoom", "zoom"]}, "--model zoom is given twice"),
        ({"data": ["/a"]}, "NAME=DIR for each"),
        ({"data": ["ucf10=/a", "msrvtt=/b"]}, 'Did you mean "ucf101"'),
        ({"settings": ["zom:options.factor=2"]}, 'Did you mean "zoom"'),
        ({"manifest": Path("m.jsonl")}, "clips of one dataset"),
        ({"models": ["zom"]}, 'Did you mean "zoom"'),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        cells(**changes)
