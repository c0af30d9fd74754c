"""The front door of Python: evaluate, score, compare, and what a notebook shows."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dcbench
from dcbench import files, video
from dcbench.errors import UserError
from dcbench.files import read_jsonl

PROTOCOL = (Path(__file__).parent.parent / "dcbench" / "protocols" / "smoke.toml").read_text().split("[datasets")[0]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder with a protocol of 32x32 pixels."""
    (tmp_path / "small.toml").write_text(PROTOCOL.replace("256", "32"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(model, **how):
    how = {"protocol": "small.toml", "limit": 4, "metrics": ["motion", "first_frame_psnr"], "device": "cpu"} | how
    return dcbench.evaluate(model, "shapes", quiet=True, **how)


def motion(model, **how) -> float:
    value = evaluate(model, **how).scores["motion"].value
    assert value is not None
    return value


def repeat(image, prompt, num_frames, fps, seed):
    assert image.dtype == torch.uint8
    assert isinstance(prompt, str)
    assert fps > 0
    return image[None].repeat(num_frames, 1, 1, 1)


def test_a_model_by_name_is_the_run_of_the_command_line(here):
    found = evaluate("zoom")
    assert found.scores["motion"].value == found.record.scores["motion"].value
    again = evaluate("zoom", fresh=False)
    assert again.path == found.path
    assert again.record == found.record
    frame = found.to_frame()
    assert list(frame.index) == ["first_frame_psnr", "motion"]
    assert frame.loc["motion", "value"] == found.scores["motion"].value
    row: dict[str, Any] = frame.to_dict("index")["motion"]
    assert (row["low"], row["high"]) == found.scores["motion"].ci95
    clips = found.per_clip()
    assert list(clips.index) == [row["id"] for row in read_jsonl(found.path / "manifest.jsonl")]
    assert float(np.mean(clips["motion"].tolist())) == pytest.approx(found.scores["motion"].value)


def test_a_function_is_a_model_and_gives_what_still_gives(here):
    still, own = evaluate("still"), evaluate(repeat)
    assert own.record.plan.model["name"] == "repeat"
    assert own.scores == still.scores
    assert (
        evaluate(lambda *request: repeat(*request).numpy(), name="Step 1000").record.plan.model["title"] == "Step 1000"
    )


def test_the_clips_of_a_function_are_made_again(here):
    """Its weights may have changed, and nobody can see that."""
    level = 10

    def model(image, prompt, num_frames, fps, seed):
        return np.full((num_frames, 3, 32, 32), level, np.uint8)

    first = evaluate(model).record.clips_sha256
    assert evaluate(model).record.clips_sha256 == first
    level = 20
    assert evaluate(model).record.clips_sha256 != first
    assert len(list(here.glob("runs/*"))) == 1


def test_an_object_with_generate_is_a_model(here):
    model = dcbench.load_model("zoom", ["options.factor=2"], device="cpu")
    assert motion(model, name="zoom-2") > motion("zoom")


WRONG = {
    "no model": (lambda: evaluate(3), "a int is no model; expected a name, an object with `generate`"),
    "no clip": (lambda: evaluate(lambda *request: None, name="none"), "returned NoneType for clip .*, not a tensor"),
    "a wrong clip": (
        lambda: evaluate(lambda *request: torch.zeros(2, 3, 32, 32, dtype=torch.uint8), name="short"),
        "returned 2 frames for clip .*; 16 were asked for",
    ),
    "an unknown name": (lambda: evaluate("zooom"), 'Did you mean "zoom"'),
    "a foreign folder": (lambda: evaluate(repeat, out="full"), "plan.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_evaluated_is_told(case, here):
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=WRONG[case][1]):
        WRONG[case][0]()
    assert (here / "full" / "thesis.tex").read_text() == "years of work"


def test_a_run_of_a_function_can_be_scored_and_shown_later_but_not_continued(here):
    out = evaluate(repeat, out="run").path
    call = f"dcbench.score({str(out)!r}, ['motion'], device='cpu', quiet=True)"
    code = f"import dcbench; print({call}.scores['motion'].value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert float(done.stdout) == 0.0, done.stderr


def test_two_results_are_compared(here):
    still, zoom = evaluate("still"), evaluate("zoom")
    frame = dcbench.compare(zoom, still.path)
    assert frame.loc["motion", "difference"] == pytest.approx(motion("zoom") - motion("still"))
    assert frame.loc["motion", "clips"] == 4
    with pytest.raises(UserError, match="different clips"):
        dcbench.compare(still, evaluate("zoom", limit=3))


def test_two_folders_are_scored(here):
    first, second = evaluate("still"), evaluate("zoom")
    found = dcbench.score(
        second.path / "clips", ["motion"], reference=first.path / "clips", device="cpu", quiet=True, out="folders"
    )
    assert found.scores["motion"].n_generated == 4
    assert found.path == Path("folders")


def test_a_notebook_shows_the_table_and_playable_clips(here):
    shown = evaluate(repeat, name="<script>alert(1)</script>")._repr_html_()
    assert "<script>" not in shown
    assert shown.count('<video src="data:video/mp4;base64,') == 3
    assert "first_frame_psnr" in shown


@pytest.mark.slow
def test_many_calls_keep_no_memory(here):
    """Twenty evaluations of a function, as in a training: what stays in memory does not grow."""
    import tracemalloc

    sizes = []
    tracemalloc.start()
    for _ in range(20):
        evaluate(repeat, limit=2, metrics=["motion"])
        sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert sizes[-1] < sizes[4] + 1e6


PROGRAM = """
import dcbench, sys, torch, torch.distributed as dist
dist.init_process_group("gloo")
def model(image, prompt, num_frames, fps, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 255, (num_frames, 3, 32, 32), dtype=torch.uint8, generator=generator)
how = {"protocol": "small.toml", "limit": 4, "metrics": ["motion"], "device": "cpu", "quiet": True}
both = dcbench.evaluate(model, "shapes", name="both", **how).scores["motion"].value
mine = None
if dist.get_rank() == 0:
    mine = dcbench.evaluate(model, "shapes", name="mine", all_ranks=False, **how).scores["motion"].value
dist.barrier()
if dist.get_rank() == 0:
    print(both, mine, dcbench.score([*__import__("pathlib").Path("runs").glob("both*")][0], ["motion"], device="cpu",
          all_ranks=False).scores["motion"].value)
"""


@pytest.mark.slow
def test_on_all_processes_of_a_training_or_on_one(here):
    (here / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "program.py"]
    done = subprocess.run(launch, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    values = set(done.stdout.split())
    assert len(values) == 1


def test_the_lines_of_the_documentation_run(here):
    """The first block of docs/python.md, and its model as a function, on smaller clips."""
    text = (Path(__file__).parent.parent / "docs" / "python.md").read_text()
    block = text.partition("# From Python\n")[2].partition("\n\n`import dcbench`")[0]
    assert block.count("dcbench.evaluate(") == 2
    for name in ("my_clips", "real_clips"):
        (here / name).mkdir()
        clip = torch.randint(0, 255, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
        video.write_lossless(here / name / "a.mkv", clip, 8)
    lines = [line.strip() for line in block.replace("limit=8", 'limit=3, protocol="small.toml"').splitlines()]
    exec("\n".join(lines), {})
    assert {path.name.split("-")[0] for path in here.glob("runs/*")} >= {"zoom", "still"}


def test_a_report_removes_what_a_killed_one_left(here):
    run = evaluate("still", limit=2, metrics=["motion"])
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = here / "report" / f".frames-1.png-{files._HOST}-{ended.pid}-abcdefgh.png"
    left.parent.mkdir()
    left.touch()
    dcbench.report([run.path], here / "report")
    assert not left.exists()
    assert (here / "report" / "table.md").exists()
