"""VBench-I2V end to end on a made-up suite: clips in its naming, totals, result files, and what is wrong with files.

The networks of its metrics are not needed here: `Shade` stands for each of them, with numbers that differ by dimension.
"""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dcbench.catalogue import MetricCard, find_dataset, find_model
from dcbench.cli.app import app
from dcbench.datasets.base import load_dataset
from dcbench.datasets.made_events import make_suite as make_events
from dcbench.datasets.made_pictures import make_suite
from dcbench.datasets.vbench_i2v import DIMENSIONS, LIST
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, Metric, View
from dcbench.protocol import Protocol, protocols
from dcbench.record import Record, read_per_clip, read_record
from dcbench.reports import Choices, write_report
from dcbench.reports.results import load_results, with_partial
from dcbench.reports.tables import numbers
from dcbench.reports.vbench import write_results
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.inputs import write_inputs
from dcbench.runs.metrics import Metrics
from dcbench.runs.run import Options, Run
from dcbench.video import write_mp4

QUIET = Options(device="cpu", quiet=True)
CARD = find_dataset("vbench-i2v")
NINE = [name for name in DIMENSIONS if name != "temporal_flickering"]
SAMPLES = 2  # clips of each prompt in most tests


class Shade(ClipMetric):
    """The brightness of the clips of a dimension, in steps; dynamic_degree and camera_motion say yes or no."""

    def observe(self, view: View) -> dict[str, Any]:
        if self.card.name not in view.need("truth")["dimensions"]:
            raise UserError("not of this dimension")
        place = DIMENSIONS.index(self.card.name)
        steps = round(float(view.clip.double().mean()) / 10)  # no coder changes these
        if self.card.name in ("dynamic_degree", "camera_motion"):
            return {"value": float(steps % 2)}
        return {"value": 0.5 + steps / (60 + place)}


def cards(names: list[str]) -> dict[str, MetricCard]:
    common = {"summary": "s", "kind": "per_clip", "higher_is_better": True, "needs": ("truth",)}
    return {name: MetricCard(name=name, title=name, entry_point="none:none", **common) for name in names}


@pytest.fixture(autouse=True)
def shades(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics of the names that are asked for; those that begin with "no_" have no weights."""

    def build(chosen: list[MetricCard], runtime: Any, explicit: bool) -> Metrics:
        built: dict[str, Metric] = {card.name: Shade(card) for card in chosen if not card.name.startswith("no_")}
        found = {card.name.removeprefix("no_"): (card, "weights are missing") for card in chosen}
        return Metrics(built, {name: what for name, what in found.items() if name not in built})

    monkeypatch.setattr(scoring, "choose_metrics", lambda names: list(cards(list(names)).values()))
    monkeypatch.setattr(scoring, "build_metrics", build)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("vbench") / "suite"
    make_suite(out, 96, quiet=True)
    return out


def protocol(samples: int = SAMPLES) -> Protocol:
    small = {"num_frames": 3, "height": 32, "width": 56, "samples_per_item": samples}
    return protocols()["vbench-i2v"].model_copy(update=small)


def planned(model: str, suite: Path, out: Path, samples: int = SAMPLES, limit: int | None = None) -> Run:
    return planning.plan(find_model(model), CARD, protocol(samples), suite, out, limit=limit, quiet=True)


@pytest.fixture(scope="session")
def clips(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("made") / "clips"
    write_clips(out, suite)
    return str(out)


def finish(model: str, suite: Path, out: Path, metrics: list[str] | None = None, **how: Any) -> Record:
    run = planned(model, suite, out, **how)
    sampling.sample(run, QUIET)
    return scoring.score(run, QUIET, metrics or list(DIMENSIONS))


def write_clips(out: Path, suite: Path, samples: int = SAMPLES, frames: int = 4, fps: int = 8) -> list[Path]:
    """Clips in VBench's naming, of 32x32 pixels."""
    prompts = [row["prompt_en"] for row in json.loads((suite / LIST).read_text())]
    paths = [out / f"{prompt}-{number}.mp4" for prompt in prompts for number in range(samples)]
    for seed, path in enumerate(paths):
        write_mp4(path, torch.full((frames, 3, 32, 32), 10 * (seed * 7 % 25), dtype=torch.uint8), fps)
    return paths


# --- the protocol ---


def test_the_protocol_is_vbenchs():
    known = protocols()["vbench-i2v"]
    assert (known.samples_per_item, known.frames, known.size, known.reference) == (5, "model", "model", "none")
    assert known.seconds is None and set(known.metrics) == set(DIMENSIONS)
    assert {part.score for total in known.total[:2] for part in total.parts} == set(NINE)


def test_models_of_all_shapes_share_a_fingerprint_and_have_their_own_pictures(suite: Path, tmp_path: Path):
    wide = planned("still", suite, tmp_path / "wide")
    square = planning.plan(
        find_model("still").model_copy(update={"clip": find_model("still").clip.model_copy(
            update={"height": 48, "width": 48, "frames": 7, "fps": 24})}),
        CARD, protocol(), suite, tmp_path / "square", quiet=True,
    )  # fmt: skip
    assert wide.plan.fingerprint == square.plan.fingerprint
    assert [run.item(run.cases[0]).video.path.parent.name for run in (wide, square)] == ["7-4", "1-1"]  # type: ignore[attr-defined]
    assert wide.request(wide.cases[0]).image.shape == (3, 32, 56)
    request = square.request(square.cases[0])
    assert request.image.shape == (3, 48, 48) and (request.num_frames, request.fps) == (7, 24)
    assert wide.cases[0].id == "a calm sea under an evening sky-0"


# --- a run ---


def test_a_run_has_totals_of_the_dimensions(suite: Path, clips: str, tmp_path: Path):
    record = finish(clips, suite, tmp_path)
    values = {name: record.scores[name].value or 0.0 for name in NINE}
    i2v = values["camera_motion"] * 0.1 + (values["i2v_subject"] - 0.1462) / 0.8538
    i2v = (i2v + (values["i2v_background"] - 0.2615) / 0.7385) / 2.1
    assert record.scores["vbench_i2v_i2v"].value == pytest.approx(i2v, abs=1e-12)
    whole, quality = (record.scores[f"vbench_i2v_{name}"] for name in ("total", "quality"))
    assert whole.value == pytest.approx((i2v + (quality.value or 0)) / 2, abs=1e-12)
    assert (whole.n_generated, whole.n_groups) == (38, 5) and whole.ci95 is not None
    assert (quality.n_generated, record.scores["vbench_i2v_i2v"].n_generated) == (10, 38)
    text = write_report([tmp_path], tmp_path / "report")
    assert "VBench-I2V, total score ↑" in text and "2 clips of each input, without reference clips" in text


def test_scoring_again_makes_the_totals_again(suite: Path, clips: str, tmp_path: Path):
    first = finish(clips, suite, tmp_path, [*NINE[:8], "no_imaging_quality"])
    quality = first.scores["vbench_i2v_quality"]
    assert quality.value is None and "It lacks 1 of 6 parts: imaging_quality (no value)" in (quality.reason or "")
    assert first.scores["vbench_i2v_total"].value is None and first.scores["vbench_i2v_i2v"].value is not None
    second = scoring.score(planning.reopen(tmp_path), QUIET, ["imaging_quality"])
    assert second.scores["vbench_i2v_total"].value is not None
    assert second.scores["vbench_i2v_total"].ci95 is not None  # the values of the earlier pass are in per_clip.jsonl


def test_a_partial_total_is_marked_and_only_asked_for(suite: Path, tmp_path: Path):
    finish("noise", suite, tmp_path, ["i2v_subject", "no_camera_motion"])
    plain = write_report([tmp_path], tmp_path / "report")
    assert "(partial)" not in plain
    assert "It lacks 8 of 9 parts: camera_motion (no value), i2v_background (not scored)" in plain
    for notes in ("full", "short"):
        text = write_report([tmp_path], tmp_path / "report", Choices(partial=True, notes=notes))
        assert "VBench-I2V, total score (partial)" in text and "Partial, no official number: it lacks 8 of 9" in text
        assert "camera_motion (no value)" in text
        assert "camera_motion" in (tmp_path / "report" / "table.csv").read_text()
    (run,) = load_results([tmp_path])
    found = {number.metric: number for number in numbers([with_partial(run)], {})}
    score = found["vbench_i2v_i2v(partial)"]
    assert not score.best and score.higher_is_better is None and found["vbench_i2v_i2v"].value is None


# --- a folder of clips in VBench's naming ---


def test_clips_in_vbenchs_naming_are_matched_by_prompt(suite: Path, clips: str, tmp_path: Path):
    run = planned(clips, suite, tmp_path / "run")
    assert {case.id for case in run.cases} == {path.stem for path in Path(clips).iterdir()}
    assert (run.protocol.num_frames, run.protocol.fps, run.protocol.height, run.protocol.width) == (4, 8, 32, 32)
    sampling.sample(run, QUIET)
    record = scoring.score(run, QUIET, list(DIMENSIONS))
    assert record.n_scored == 38 and record.scores["camera_motion"].n_generated == 28
    assert record.scores["i2v_subject"].n_generated == 6 and record.scores["aesthetic_quality"].n_generated == 10


def test_missing_clips_and_wrong_names_are_counted_and_named(suite: Path, tmp_path: Path):
    paths = write_clips(tmp_path / "clips", suite)
    paths[0].unlink()
    wrong = paths[1].rename(paths[1].with_name("an orange ball lies on the grass_1.mp4"))
    run = planned(str(tmp_path / "clips"), suite, tmp_path / "run")
    with pytest.raises(UserError) as error:
        sampling.sample(run, QUIET)
    message = str(error.value)
    assert "2 of 38 clips have no file, for example 'an orange ball lies on the grass-0'" in message
    assert f"Files that match no clip: {wrong.stem} (1 in all)" in message and "Did you mean" in message


def test_half_a_suite_is_refused_and_a_part_can_be_asked_for(suite: Path, tmp_path: Path):
    for path in write_clips(tmp_path / "clips", suite):
        if path.stem.endswith("-1"):
            path.unlink()
    with pytest.raises(UserError, match="19 of 38 clips have no file"):
        sampling.sample(planned(str(tmp_path / "clips"), suite, tmp_path / "run"), QUIET)
    record = finish(str(tmp_path / "clips"), suite, tmp_path / "part", samples=1)
    assert record.n_scored == 19


def test_clips_of_other_rates_and_lengths_are_refused(suite: Path, tmp_path: Path):
    """VBench scores whole clips, so nothing may be cut to the shortest; any common length and rate is fine."""
    paths = write_clips(tmp_path / "clips", suite, samples=1, frames=49, fps=10)  # 4.9 s
    assert planned(str(tmp_path / "clips"), suite, tmp_path / "run", samples=1).protocol.num_frames == 49
    write_mp4(paths[3], torch.zeros(49, 3, 32, 32, dtype=torch.uint8), 12)
    with pytest.raises(UserError, match=r"one rate and size, and one length, but .* has .* frames per second and"):
        planned(str(tmp_path / "clips"), suite, tmp_path / "other", samples=1)
    write_mp4(paths[3], torch.zeros(48, 3, 32, 32, dtype=torch.uint8), 10)
    with pytest.raises(UserError, match=r"but .* has 49 frames and .* has 48|but .* has 48 frames and .* has 49"):
        planned(str(tmp_path / "clips"), suite, tmp_path / "other", samples=1)


# --- inputs for a system that dcbench cannot run ---


def test_inputs_are_pictures_prompts_and_names(suite: Path, tmp_path: Path):
    shape = find_model("still").clip.model_copy(update={"width": 1024, "height": 576})
    count = write_inputs(CARD, protocol(5), tmp_path / "in", suite, quiet=True, shape=shape)
    lines = [json.loads(line) for line in (tmp_path / "in" / "inputs.jsonl").read_text().splitlines()]
    assert count == len(lines) == 95 and len(list((tmp_path / "in" / "images").iterdir())) == 5
    first = lines[0]
    assert first["file"] == "a calm sea under an evening sky-0.mp4" and first["prompt"] == lines[4]["prompt"]
    assert set(first) == {"clip_id", "file", "image", "prompt", "seed"}  # length, rate and size are the system's own
    picture = suite / "data/crop/16-9" / "a calm sea under an evening sky.jpg"
    assert (tmp_path / "in" / first["image"]).read_bytes() == picture.read_bytes()
    for line in lines:
        write_mp4(tmp_path / "clips" / line["file"], torch.zeros(2, 3, 36, 64, dtype=torch.uint8), 8)
    run = planning.plan(
        find_model(str(tmp_path / "clips")), CARD, protocol(5), suite, tmp_path / "run",
        manifest=tmp_path / "in" / "manifest.jsonl", quiet=True,
    )  # fmt: skip
    sampling.sample(run, QUIET)
    assert len(run.directory.finished_samples()) == 95


def test_a_size_is_refused_where_the_protocol_has_one(tmp_path: Path):
    shape = find_model("still").clip.model_copy(update={"width": 64, "height": 64})
    with pytest.raises(UserError, match="so leave out --size"):
        write_inputs(find_dataset("shapes"), protocols()["smoke"], tmp_path / "in", quiet=True, shape=shape)


def test_physics_iq_has_its_own_names_and_whole_pictures(tmp_path: Path):
    make_events(tmp_path / "events", 36, quiet=True)
    card = find_dataset("physics-iq")
    assert write_inputs(card, protocols()["physics-iq"], tmp_path / "in", tmp_path / "events", quiet=True) == 9
    line = json.loads((tmp_path / "in" / "inputs.jsonl").read_text().splitlines()[0])
    assert line["file"] == "0001_perspective-left_trimmed-disc-falls.mp4" and line["seconds"] == 5
    switch = "0001_switch-frames_anyFPS_perspective-left_trimmed-disc-falls.jpg"
    assert line["image"] == f"images/{switch}"
    source = tmp_path / "events" / "switch-frames" / switch
    assert (tmp_path / "in" / line["image"]).read_bytes() == source.read_bytes()
    item = load_dataset(card, tmp_path / "events").items("all")[0]
    assert item.clip_name == line["file"].removesuffix(".mp4")


# --- result files ---


OFFICIAL = {
    "vbench_i2v_quality": 0.4632434542548863,
    "vbench_i2v_i2v": 0.6064181072371557,
    "vbench_i2v_total": 0.534830780746021,
}


def test_result_files_are_vbenchs(suite: Path, clips: str, tmp_path: Path):
    """scripts/cal_i2v_final_score.py of Vchitect/VBench (commit 45e79ec) read the zip of this run and printed OFFICIAL.

    The largest difference was 1.1e-16.
    """
    record = finish(clips, suite, tmp_path / "run")
    text = write_results(tmp_path / "run", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "clips_eval_results.json").read_text())
    assert list(results) == list(DIMENSIONS)
    rows = read_per_clip(tmp_path / "run")
    for name, result in results.items():
        assert result[0] == record.scores[name].value
        assert len(result[-1]) == record.scores[name].n_generated
        unit = 100 if name == "imaging_quality" else 1
        for clip in result[-1]:
            assert clip["video_results"] == unit * rows[clip["video_path"].removesuffix(".mp4")][name]["value"]
    assert {type(clip["video_results"]) for clip in results["dynamic_degree"][1]} == {bool}
    assert all(clip["image_path"].endswith(".jpg") for clip in results["i2v_subject"][1])
    _, by_motion, listed = results["camera_motion"]
    of_pan = [clip["video_results"] for clip in listed if clip["prompt_type"] == "pan_left"]
    assert len(by_motion) == 7 and len(of_pan) == 4 and by_motion["pan_left"] == sum(of_pan) / 4
    with zipfile.ZipFile(tmp_path / "out" / "clips.zip") as file:
        (name,) = file.namelist()
        assert name == "clips_eval_results.json" and list(json.loads(file.read(name))) == NINE
    assert "38 clips; the whole suite has 5590. This is no entry for the leaderboard" in text
    again = tmp_path / "again"
    write_results(tmp_path / "run", again)
    assert (again / "clips.zip").read_bytes() == (tmp_path / "out" / "clips.zip").read_bytes()
    for total, value in OFFICIAL.items():
        assert record.scores[total].value == pytest.approx(value, abs=1e-15)


def test_there_is_no_zip_without_all_nine_dimensions(suite: Path, tmp_path: Path):
    finish("noise", suite, tmp_path / "run", ["i2v_subject", "no_camera_motion"])
    text = write_results(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out" / "noise.zip").exists() and (tmp_path / "out" / "noise_eval_results.json").is_file()
    assert "no zip: the leaderboard's script counts a missing dimension as 0, and i2v_background, camera_mo" in text
    text = write_results(tmp_path / "run", tmp_path / "out", partial=True)
    assert (tmp_path / "out" / "noise.zip").is_file() and "counts as 0: i2v_background, camera_motion" in text


def test_the_command_line_writes_them(suite: Path, clips: str, tmp_path: Path):
    finish(clips, suite, tmp_path / "run")

    def call(*words: str) -> Any:
        return CliRunner().invoke(app, ["report", str(tmp_path / "run"), *words])

    done = call("--vbench", str(tmp_path / "out"))
    assert done.exit_code == 0 and "clips.zip: for the leaderboard" in done.output
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clips.zip", "clips_eval_results.json"]
    refused = call("--vbench", str(tmp_path / "out"), "--out", str(tmp_path))
    assert "--out cannot be used with --vbench" in str(refused.exception)
    assert "--partial cannot be used with --compare" in str(call("--partial", "--compare").exception)
    twice = CliRunner().invoke(app, ["report", *[str(tmp_path / "run")] * 2, "--vbench", str(tmp_path / "out")])
    assert "two of the runs are of clips" in str(twice.exception)


def test_lost_clips_are_said(suite: Path, tmp_path: Path):
    finish("noise", suite, tmp_path / "run", limit=3)
    run = planning.reopen(tmp_path / "run")
    run.directory.clip(run.cases[0].id).unlink()
    run.directory.mend()
    scoring.score(run, QUIET, list(DIMENSIONS))
    assert "WARNING: 1 clips are lost and not counted, for example a calm sea" in write_results(
        tmp_path / "run", tmp_path / "out"
    )


def test_runs_that_have_no_such_files_are_refused(suite: Path, tmp_path: Path):
    finish("noise", suite, tmp_path / "run", ["i2v_subject"], limit=1)
    record = read_record(tmp_path / "run")
    with pytest.raises(UserError, match="has no score of a dimension of VBench-I2V"):
        write_results(tmp_path / "run", tmp_path / "out")  # its only clip is of other dimensions
    assert record.scores["i2v_subject"].value is None
    shutil.copy(tmp_path / "run" / "record.json", tmp_path / "record.json")
    with pytest.raises(UserError, match="takes the directory of a run"):
        write_results(tmp_path / "record.json", tmp_path / "out")
