"""Physics-IQ end to end on a made-up suite: the official numbers, the upper bound, and what is wrong with files."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from physics_iq_clips import write_clips

from dcbench.analysis.compare import compare_runs
from dcbench.catalogue import ModelCard, find_dataset, find_model
from dcbench.datasets.base import load_dataset
from dcbench.datasets.made_events import make_suite
from dcbench.errors import UserError
from dcbench.protocol import find_protocol
from dcbench.record import Record, read_per_clip
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.run import Options
from dcbench.video import probe, write_mp4

OFFICIAL = json.loads((Path(__file__).parent.parent / "data" / "physics_iq.json").read_text())
HEIGHT = OFFICIAL["height"]
QUIET = Options(device="cpu", quiet=True)


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("physics") / "suite"
    assert make_suite(out, HEIGHT, quiet=True) == 18
    return out


def finish(model: str | ModelCard, suite: Path, out: Path, limit: int | None = None, **fields) -> Record:
    card = find_model(model) if isinstance(model, str) else model
    chosen = find_protocol("physics-iq").model_copy(update=fields)
    run = planning.plan(card, find_dataset("physics-iq"), chosen, suite, out, limit=limit, quiet=True)
    sampling.sample(run, QUIET)
    return scoring.score(run, QUIET)


def test_the_suite_has_the_official_layout(suite: Path):
    items = load_dataset(find_dataset("physics-iq"), suite).items("all")
    assert [item.id for item in items] == [f"{number:04d}" for number in range(1, 10)]
    assert {item.group for item in items} == {
        "trimmed-disc-falls",
        "trimmed-disc-rolls-into-disc",
        "trimmed-spot-of-light",
    }
    item = items[4]
    assert (item.label, item.truth) == (
        "Solid Mechanics",
        {"view": "perspective-center", "category": "Solid Mechanics", "scenario": "trimmed-disc-rolls-into-disc"},
    )
    assert item.takes and item.takes.first.files[30].name.startswith("0005_testing-videos_30FPS_perspective-center_")
    assert item.takes.second.files[30].name.startswith("0014_testing-videos_30FPS_perspective-center_take-2_")
    info = probe(item.takes.first.files[30])
    assert (info.num_frames, info.fps, info.height) == (150, 30, HEIGHT)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name.startswith("late") else name
        for name in sorted(OFFICIAL["scores"])
    ],
)
def test_scores_are_those_of_the_official_code(suite: Path, tmp_path: Path, name: str):
    """It rounds each frame's value to four decimals. As it is, its masks go through a compressed video: at this size,
    with thin edges, that moves the score by up to 0.6."""
    kind, fps = name.split("-")
    write_clips(tmp_path / "clips", kind, int(fps), HEIGHT)
    record = finish(str(tmp_path / "clips"), suite, tmp_path / "run")
    expected = OFFICIAL["scores"][name]
    score = record.scores["physics_iq"]
    assert record.n_scored == 9 and score.n_groups == 3 and score.ci95 is not None
    # at other rates than 30, it compresses the real videos again too
    assert score.value == pytest.approx(OFFICIAL["compressed"][name], abs=0.05 if fps == "30" else 1.0)
    parts = ("spatiotemporal_iou", "spatial_iou", "weighted_iou", "mse")
    names = ["physics_iq(masks=exact)", *(f"physics_iq_{part}(masks=exact)" for part in parts)]
    exact = scoring.score(planning.reopen(tmp_path / "run", suite), QUIET, names).scores
    assert exact["physics_iq(masks=exact)"].value == pytest.approx(expected["score"], abs=0.02)
    assert exact["physics_iq(masks=exact)"].value == pytest.approx(OFFICIAL["compressed"][name], abs=0.7)
    for part in parts:
        found = exact[f"physics_iq_{part}(masks=exact)"]
        assert found.value == pytest.approx(expected[part], abs=1e-5)
        assert found.details["variance"] == pytest.approx(expected[f"{part}_variance"], abs=1e-5)


def test_the_second_take_scores_100_and_rates_share_a_fingerprint(suite: Path, tmp_path: Path):
    real = finish("real", suite, tmp_path / "real")
    assert real.scores["physics_iq"].value == 100
    slow = finish("still", suite, tmp_path / "still")
    value = slow.scores["physics_iq"].value
    assert value is not None and 0 < value < 60
    fast = find_protocol("physics-iq").model_copy(update={"fps": 10, "num_frames": 50})
    planned = planning.plan(find_model("still"), find_dataset("physics-iq"), fast, suite, tmp_path / "10", quiet=True)
    assert {case.fps for case in planned.cases} == {10}
    assert real.plan.fingerprint == slow.plan.fingerprint == planned.plan.fingerprint
    assert set(real.scores) == set(find_protocol("physics-iq").metrics)
    assert "value" not in read_per_clip(tmp_path / "real")["0001"]["physics_iq"]
    compared = compare_runs(tmp_path / "real", tmp_path / "still", QUIET)
    assert set(compared.found) == set(real.scores)
    assert compared.found["physics_iq"].difference == pytest.approx(100 - value)


def test_part_of_the_suite_says_how_many_clips(suite: Path, tmp_path: Path):
    record = finish("still", suite, tmp_path / "run", limit=3)
    score = record.scores["physics_iq"]
    assert (record.n_scored, score.n_generated, score.n_groups, score.ci95) == (3, 3, 1, None)
    assert [part["n"] for part in score.details["by_view"].values()] == [1, 1, 1]


def wrong(folder: Path, suite: Path, tmp_path: Path) -> str:
    with pytest.raises(UserError) as caught:
        finish(str(folder), suite, tmp_path / "run")
    return str(caught.value)


def test_clips_that_do_not_fit_are_named(suite: Path, tmp_path: Path):
    good = tmp_path / "good"
    clips = write_clips(good, "still", 8, HEIGHT)
    short = shutil.copytree(good, tmp_path / "short")
    write_clips(tmp_path / "49", "still", 10, HEIGHT, seconds=4.9)
    shutil.copy(tmp_path / "49" / clips[2].name, short)
    message = wrong(short, suite, tmp_path)
    assert "1 of 9 clips are not 5 seconds long: 0003_still.mp4 (4.900 s)" in message and "-t 5" in message

    half = shutil.copytree(good, tmp_path / "half")
    for path in clips[4:]:
        (half / path.name).unlink()
    message = wrong(half, suite, tmp_path)
    assert "5 of 9 clips have no file, for example '0005'; expected '0005_NAME.mp4'" in message

    named = shutil.copytree(good, tmp_path / "named")
    (named / "0009_still.mp4").rename(named / "ninth.mp4")
    message = wrong(named, suite, tmp_path / "b")
    assert "1 of 9 clips have no file, for example '0009'" in message and "ninth" in message

    double = shutil.copytree(good, tmp_path / "double")
    shutil.copy(double / "0009_still.mp4", double / "0009_again.mp4")
    assert "0009_again.mp4" in wrong(double, suite, tmp_path / "c")

    rates = shutil.copytree(good, tmp_path / "rates")
    write_clips(tmp_path / "ten", "still", 10, HEIGHT)
    shutil.copy(tmp_path / "ten" / "0004_still.mp4", rates)
    message = wrong(rates, suite, tmp_path / "d")
    assert "0001_still.mp4 has 8 frames per second and 0004_still.mp4 has 10" in message


def test_a_run_goes_on_with_the_clips_that_it_began_with(suite: Path, tmp_path: Path):
    write_clips(tmp_path / "clips", "still", 8, HEIGHT)
    card, protocol, data = find_model(str(tmp_path / "clips")), find_protocol("physics-iq"), find_dataset("physics-iq")
    first = planning.plan(card, data, protocol, suite, tmp_path / "run", quiet=True)
    write_clips(tmp_path / "clips", "still", 10, HEIGHT)
    with pytest.raises(UserError, match="was begun with num_frames = 40, and the model's clips now have 50"):
        planning.plan(card, data, protocol, suite, tmp_path / "run", quiet=True)
    manifest = first.directory.manifest  # of another rate: its inputs are used, at the rate of these clips
    again = planning.plan(card, data, protocol, suite, tmp_path / "again", manifest=manifest, quiet=True)
    assert {case.fps for case in again.cases} == {10} and again.plan.fingerprint == first.plan.fingerprint


def test_a_model_that_makes_less_than_five_seconds_is_told(suite: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"makes 16 frames at 8 fps, which is 2\.00 seconds; .* first 5 seconds"):
        finish("dynamicrafter-tiny", suite, tmp_path / "run")


def test_a_longer_model_is_cut_at_five_seconds():
    shape = find_model("wan2.1-i2v-480p").clip  # 81 frames at 16 fps
    chosen = find_protocol("physics-iq").for_model("wan", shape)
    assert (chosen.num_frames, chosen.fps, chosen.height, chosen.width) == (80, 16, 480, 832)
    assert chosen.identity() == find_protocol("physics-iq").identity()


def test_half_a_suite_is_an_error_that_names_a_file(suite: Path, tmp_path: Path):
    part = shutil.copytree(suite, tmp_path / "part")
    removed = sorted((part / "split-videos" / "testing-videos" / "30FPS").glob("001*"))
    for path in removed:
        path.unlink()
    with pytest.raises(UserError, match=r"9 of 27 files that descriptions\.csv names are missing, .*0010_testing"):
        load_dataset(find_dataset("physics-iq"), part)
    with (part / "descriptions.csv").open() as file:
        rows = list(csv.DictReader(file))
    for kept, message in (
        (rows[:9], "trimmed-disc-falls, perspective-left has no take-2; both takes are needed"),
        ([*rows, rows[0]], "has take-1 twice"),
        ([{**rows[0], "scenario": "0001_left.mp4"}], "line 2: '0001_left.mp4' is no recording"),
    ):
        with (part / "descriptions.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(kept)
        with pytest.raises(UserError, match=message):
            load_dataset(find_dataset("physics-iq"), part)


def test_a_stored_file_of_the_models_rate_is_used(suite: Path, tmp_path: Path):
    """Files of 8 fps lie beside those of 30: here they are black, so that the score shows which were read."""
    copy = shutil.copytree(suite, tmp_path / "copy")
    item = load_dataset(find_dataset("physics-iq"), copy).items("all")[0]
    assert item.takes
    black = item.takes.first.clip(8, 5) * 0
    for path in (copy / "split-videos" / "testing-videos" / "30FPS").iterdir():
        write_mp4(path.parent.parent / "8FPS" / path.name.replace("30FPS", "8FPS"), black, 8)
    record = finish("real", copy, tmp_path / "run", limit=1)
    assert record.scores["physics_iq_mse"].value == 0  # both takes are black
    assert record.scores["physics_iq_spatial_iou"].value == 1
