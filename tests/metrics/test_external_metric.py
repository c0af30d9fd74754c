"""A metric that is a program: the example, caching, resuming, and every way in which a program fails."""

import json
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dcbench import video
from dcbench.analysis.compare import compare_runs
from dcbench.catalogue import find_dataset, find_metric, find_model, load_entry_point
from dcbench.errors import UserError
from dcbench.facts import validate
from dcbench.files import cache_dir
from dcbench.metrics.base import MetricFailed, View
from dcbench.models.base import Runtime
from dcbench.protocol import Protocol, find_protocol
from dcbench.runs import metrics, planning, scoring
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "my_metric.py"
QUIET = Options(device="cpu", quiet=True)
# Answers the mean of each clip. `fault.json` beside it: which request goes wrong, and how
PROGRAM = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from PIL import Image

here = Path(sys.argv[0]).parent
fault = json.loads((here / "fault.json").read_text())
with (here / "starts").open("a") as file:
    file.write(f"{os.getpid()}\\n")
print("loading a network", flush=True)
with open(sys.argv[1]) as requests, open(sys.argv[2], "w", buffering=1) as output:
    for number, line in enumerate(requests):
        request = json.loads(line)
        with (here / "asked").open("a") as file:
            file.write(line)
        if number == fault.get("at"):
            if fault["kind"] == "exit":
                sys.exit("CUDA error: out of imagination")
            if fault["kind"] == "silent":
                time.sleep(600)
            output.write(fault["line"].replace("ID", request["id"]) + "\\n")
            continue
        frames = np.stack([np.asarray(Image.open(path)) for path in sorted(Path(request["clip"]).iterdir())])
        answer = {"value": float(frames.mean()), "frames": len(frames)}
        if "set" in sys.argv:
            features = frames.reshape(-1, 3).mean(0)
            answer = {"features": features.tolist()}
            if number % 2:
                np.save(here / "row.npy", features)
                answer = {"features": str(here / "row.npy")}
        output.write(json.dumps({"id": request["id"], **answer}) + "\\n")
    (here / "ended").write_text("by itself")
"""


class Made:
    """A folder with the program and its card."""

    def __init__(self, folder: Path, extra: str = "", kind: str = "per_clip", options: str = "") -> None:
        self.folder, self.card = folder, str(folder / "mean.toml")
        (folder / "mean.py").write_text(PROGRAM)
        (folder / "mean.toml").write_text(
            f'name = "mean"\ntitle = "Mean"\nsummary = "s"\nkind = "{kind}"\n{extra}\n'
            f'entry_point = "dcbench.metrics.external:build"\n[options]\n'
            f'command = "{{python}} {folder}/mean.py {{requests}} {{output}}{" set" if kind == "set" else ""}"\n'
            f'python = "{sys.executable}"\ntimeout = 20.0\n{options}\n'
        )
        self.fault()

    def fault(self, at: int | None = None, kind: str = "answer", line: str = "") -> None:
        (self.folder / "fault.json").write_text(json.dumps({"at": at, "kind": kind, "line": line}))

    def lines(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines() if (self.folder / name).is_file() else []

    def metric(self) -> Any:
        return load_entry_point(find_metric(self.card))(find_metric(self.card), Runtime())


@pytest.fixture
def made(tmp_path: Path) -> Made:
    return Made(tmp_path)


def make_run(out: Path, model: str = "noise", limit: int = 4) -> Run:
    protocol = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "num_frames": 3, "datasets": {}})
    run = planning.plan(find_model(model), find_dataset("shapes"), protocol, out=out, limit=limit, quiet=True)
    sample(run, QUIET)
    return run


def clips(run: Run) -> list[Tensor]:
    return [video.read_clip(run.directory.clip(case.id))[0] for case in run.cases]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_example_is_short_stands_in_the_page_and_gives_its_values(tmp_path, monkeypatch):
    code, page = EXAMPLE.read_text(), (ROOT / "docs" / "metrics.md").read_text()
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 20
    assert code.strip() in page and EXAMPLE.with_suffix(".toml").read_text().strip() in page
    monkeypatch.chdir(ROOT)
    card = find_metric(str(EXAMPLE.with_suffix(".toml")))
    card = card.model_copy(update={"options": card.options | {"python": sys.executable}})
    metric = load_entry_point(card)(card, Runtime())
    clip = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = []
    for r, g, b in clip.double().numpy():
        rg, yb = r - g, (r + g) / 2 - b
        expected.append(np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))
    row = metric.observe(View(clip))
    metric.close()
    assert row["value"] == pytest.approx(np.mean(expected), rel=1e-12) and row["first"] == pytest.approx(expected[0])


def test_one_start_for_all_clips_and_values_that_are_there_are_not_asked_again(made, tmp_path):
    run = make_run(tmp_path / "run")
    score = scoring.score(run, QUIET, [made.card]).scores["mean"]
    assert score.value == pytest.approx(np.mean([float(clip.double().mean()) for clip in clips(run)]), rel=1e-12)
    assert score.details["frames"] == 3 and score.n_generated == 4
    assert len(made.lines("starts")) == 1 and len(made.lines("asked")) == 4
    assert made.lines("ended") == ["by itself"]  # its requests ended, so it could
    facts = json.loads((run.directory.cost).read_text())["details"]["metrics"]["mean"]
    assert facts["clips"] == 4 and facts["seconds"] > 0
    assert scoring.score(run, QUIET, [made.card]).scores["mean"] == score
    assert len(made.lines("starts")) == 1


def test_another_program_or_version_is_never_answered_from_the_cache(made, tmp_path):
    run = make_run(tmp_path / "run", limit=1)
    scoring.score(run, QUIET, [made.card])
    text = Path(made.card).read_text()
    Path(made.card).write_text(text.replace("timeout = 20.0", "timeout = 30.0"))
    scoring.score(run, QUIET, [made.card])
    assert len(made.lines("asked")) == 1  # the limit of time changes no value
    Path(made.card).write_text(text + '\nversion = "2"\n')
    scoring.score(run, QUIET, [made.card])
    assert len(made.lines("asked")) == 2
    (made.folder / "mean.py").write_text(PROGRAM.replace("frames.mean()", "frames.mean() / 2"))
    changed = scoring.score(run, QUIET, [made.card]).scores["mean"]
    assert len(made.lines("asked")) == 3
    assert changed.value == pytest.approx(float(clips(run)[0].double().mean()) / 2)


def test_a_crash_keeps_what_is_there_and_the_same_command_asks_for_the_rest(made, tmp_path):
    run = make_run(tmp_path / "run")
    made.fault(at=2, kind="exit")
    with pytest.raises(UserError) as error:
        scoring.score(run, QUIET, [made.card])
    said = str(error.value)
    assert "mean: the program ended with code 1 before it answered" in said
    assert "| loading a network" in said and "| CUDA error: out of imagination" in said and "mend the program" in said
    made.fault()
    assert scoring.score(run, QUIET, [made.card]).scores["mean"].n_generated == 4
    assert len(made.lines("asked")) == 3 + 2  # two were kept


@pytest.mark.parametrize(
    "line, message",
    [
        ("hello", "answered 'hello', which is no JSON"),
        ('{"id": "ID", "value": NaN}', 'answered nan for "value"; expected a finite number'),
        ('{"id": "ID", "value": "0.5"}', "answered '0.5' for \"value\""),
        ('{"id": "ID", "value": true}', 'answered True for "value"'),
        ('{"id": "ID", "value": null}', 'answered None for "value"'),
        ('{"id": "ID", "value": 1, "list": [1, "x"]}', "answered 'x' for \"list\""),
        ('{"id": "ID", "value": 1, "list": [[1]]}', 'answered [1] for "list"'),
        ('{"id": "ID", "score": 1}', 'answered without "value": its keys are id, score'),
        ('{"id": "other", "value": 1}', 'expected an object with "id": "000001"'),
        ('{"id": "ID", "value": 1}\\n{"id": "ID", "value": 2}', None),  # the second one is taken for the next clip's
        ("[1, 2]", "expected an object"),
        ("[" * 100_000, "which is no JSON"),
        ("\x1b[31m", r"\\x1b"),
    ],
)
def test_a_wrong_answer_stops_the_run_and_is_shown(made, line, message):
    metric = made.metric()
    clip = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    made.fault(at=0, line=line.replace("\\n", "\n"))
    if message is None:
        assert metric.observe(View(clip))["value"] == 1
        message = 'expected an object with "id": "000002"'
    with pytest.raises(MetricFailed, match=re.escape(message)) as error:
        metric.observe(View(clip))
    assert "\x1b" not in str(error.value) and "loading a network" in str(error.value)
    metric.close()


def test_a_silent_program_is_stopped(made):
    Path(made.card).write_text(Path(made.card).read_text().replace("timeout = 20.0", "timeout = 3.0"))
    metric = made.metric()
    made.fault(at=1, kind="silent")
    clip = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for _ in range(20):  # its start may take longer on a busy machine
        try:
            metric.observe(View(clip))
            break
        except MetricFailed:
            continue
    with pytest.raises(MetricFailed, match=r"no answer for 3 seconds \(options.timeout\) and was stopped\. It must"):
        metric.observe(View(clip))
    assert not alive(int(made.lines("starts")[-1]))


def test_a_clip_that_the_program_refuses_does_not_count_and_the_others_do(made, tmp_path):
    run = make_run(tmp_path / "run")
    made.fault(at=1, line='{"id": "ID", "error": "too dark"}')
    score = scoring.score(run, QUIET, [made.card]).scores["mean"]
    assert score.n_generated == 3 and score.warnings[0] == "1 clips do not count: mean: too dark"
    assert len(made.lines("starts")) == 1


def test_what_a_card_needs_is_in_the_request(tmp_path):
    made = Made(
        tmp_path, 'needs = ["image", "prompt", "fps", "reference", "siblings", "truth"]', options='clips = "mkv"'
    )
    made.fault(at=0, line='{"id": "ID", "value": 1}')
    generator = torch.Generator().manual_seed(3)
    clip = torch.randint(0, 256, (3, 3, 9, 7), dtype=torch.uint8, generator=generator)
    image = clip[1]
    metric, seen = made.metric(), {}

    def read(line: bytes, number: str) -> dict[str, Any]:  # while the files are there
        request = json.loads(made.lines("asked")[0])
        seen.update(request, clip=video.read_clip(Path(request["clip"])), image=Path(request["image"]).read_bytes())
        seen["reference"] = video.read_clip(Path(request["reference"]))[0]
        seen["siblings"] = [video.read_clip(Path(path))[0] for path in request["siblings"]]
        return json.loads(line)

    metric.extractor._read = read
    metric.observe(View(clip, image, "a cat", clip.flip(0), 12.5, [clip + 1, clip + 2], {"shape": "disc"}))
    metric.close()
    assert torch.equal(seen["clip"][0], clip) and seen["clip"][1] == 12.5  # without loss
    assert torch.equal(seen["reference"], clip.flip(0))
    assert [torch.equal(a, b) for a, b in zip(seen["siblings"], [clip + 1, clip + 2], strict=True)] == [True, True]
    assert (seen["prompt"], seen["fps"], seen["truth"]) == ("a cat", 12.5, {"shape": "disc"})
    assert seen["image"][:4] == b"\x89PNG"


def test_a_metric_of_sets_gets_features_as_lists_and_files(tmp_path):
    made = Made(tmp_path, kind="set", options="features = 3")
    runs = [make_run(tmp_path / model, model, 8) for model in ("zoom", "noise")]
    scores = [scoring.score(run, QUIET, [made.card]).scores["mean"] for run in runs]
    seen = scoring.observe_all(runs[0], [made.metric()], QUIET, None)
    rows = next(iter(seen.generated.values()))
    for case, clip in zip(runs[0].cases, clips(runs[0]), strict=True):
        assert rows[case.id].tolist() == pytest.approx(clip.double().mean((0, 2, 3)).tolist(), abs=1e-4)
    assert scores[0].value and scores[1].value and scores[0].value < scores[1].value
    assert scores[0].n_reference == scores[0].n_generated == 8 and scores[0].ci95
    assert set(compare_runs(tmp_path / "zoom", tmp_path / "noise", QUIET).found) == {"mean"}
    clip = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    for line, message in (
        ('{"id": "ID", "features": [1, 2]}', "answered 2 numbers"),
        ('{"id": "ID", "features": [1, 2, NaN]}', "some not finite"),
        ('{"id": "ID", "features": "/no/such.npy"}', "no list and no .npy file"),
        ('{"id": "ID", "value": 3}', 'answered 1 numbers for "features", some not finite'),
    ):
        made.fault(at=0, line=line)
        metric = made.metric()
        with pytest.raises(MetricFailed, match=re.escape(message)):
            metric.observe(View(clip))
        metric.close()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"command": "prog {requests}"}, "must name {requests} and {output}"),
        ({"command": ""}, "options.command is empty"),
        ({"cwd": "/no/such/folder"}, "is no folder"),
        ({"timeout": 0.0}, "must be above 0"),
        ({"features": 3}, "a metric with a value a clip has none"),
        ({"speed": 1}, "unknown key"),
    ],
)
def test_a_wrong_card_is_an_error_before_any_clip(made, options, message):
    card = find_metric(made.card)
    with pytest.raises(UserError, match=re.escape(message)):
        load_entry_point(card)(card.model_copy(update={"options": card.options | options}), Runtime())


def test_a_program_that_is_not_there_is_said(made):
    card = find_metric(made.card)
    card = card.model_copy(update={"options": card.options | {"python": "/no/such/python"}})
    metric = load_entry_point(card)(card, Runtime())
    with pytest.raises(MetricFailed, match=r"cannot start '/no/such/python': No such file.*Install the program, or"):
        metric.observe(View(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)))


def test_ctrl_c_ends_the_program_while_it_works_on_a_clip(made):
    """What else ends dcbench is tested with the supervisor, which metrics and models share (test_supervisor.py)."""
    made.fault(at=0, kind="silent")
    metric = made.metric()

    def interrupt() -> None:
        while not made.lines("asked"):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        metric.observe(View(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)))
    thread.join()
    assert not alive(int(made.lines("starts")[0]))
    made.fault()
    assert metric.observe(View(torch.ones(2, 3, 8, 8, dtype=torch.uint8)))["value"] == 1  # it starts again
    metric.close()


def test_a_record_never_gives_the_command(made, tmp_path, monkeypatch):
    """Not where the card is unknown, and not where a card of that name is installed."""
    run = make_run(tmp_path / "run", limit=1)
    score = scoring.score(run, QUIET, [made.card]).scores["mean"]
    options = {"command": "another {requests} {output}"}
    forged = score.model_copy(update={"metric": score.metric | {"options": options}})
    for path in (cache_dir() / "metrics").glob("*.json"):  # as on another machine, which was not given the card
        path.unlink()
    with pytest.raises(UserError, match=r"--metrics CARD\.toml"):
        metrics.metric_of("mean", forged, Runtime())
    known = metrics.cards("metrics") | {"mean": find_metric(made.card)}
    monkeypatch.setattr(metrics, "cards", lambda kind: known)
    with pytest.raises(UserError, match="its card or its code has changed"):
        metrics.metric_of("mean", forged, Runtime())
    assert metrics.metric_of("mean", score, Runtime()).identity == score.metric
    with pytest.raises(UserError, match="no name of a metric"):
        validate(find_protocol("smoke").model_dump() | {"metrics": ["mean(command=bad)"]}, Protocol, "plan.json")
