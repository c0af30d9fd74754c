"""Physics-IQ: masks equal to those of its own code, the measures of planted motion, the score's arithmetic."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics import Observations, View
from dcbench.metrics.physics_iq import COLUMNS, PARTS, Motion, compare, masks, motion_of, score_of
from dcbench.models.base import Runtime
from dcbench.takes import Take, Takes, blended
from dcbench.video import VideoError, write_lossless

OFFICIAL = json.loads((Path(__file__).parent.parent / "data" / "physics_iq.json").read_text())


def movie(number: int, height: int = 48, width: int = 72, frames: int = 20) -> np.ndarray:
    """uint8 [t h w 3]: a square and a bar move before coarse noise, and the light changes a little. No floats."""
    random = np.random.default_rng(number)
    wall = random.integers(60, 180, (height // 8, width // 8, 3)).repeat(8, 0).repeat(8, 1)
    found = []
    for k in range(frames):
        frame = wall + 2 * (k // 5)
        top, left = (5 + 2 * k + number) % (height - 12), (3 * k + 7 * number) % (width - 12)
        frame[top : top + 12, left : left + 10] = 20 + 10 * number
        frame[:, (2 * k) % width : (2 * k) % width + 3] = 240
        found.append(frame)
    return np.stack(found).astype(np.uint8)


def build(name: str):
    return load_entry_point(find_metric(name))(find_metric(name), Runtime())


@pytest.mark.parametrize("number", [0, 1, 2])
def test_masks_equal_those_of_the_official_code(number: int):
    """What its generate_mask gives to its video writer, before the video is compressed."""
    found = np.stack(list(masks(movie(number))))
    expected = OFFICIAL["masks"][number]
    assert [int((mask > 0).sum()) for mask in found] == expected["white"]
    assert hashlib.sha256(found.tobytes()).hexdigest() == expected["sha256"]
    assert found.shape == (20, 48, 72) and set(np.unique(found)) == {0, 255} and not found[0].any()


def planted(boxes: list[tuple[int, int]], level: int = 0) -> Motion:
    """A clip of 8x16 pixels whose mask k covers the columns boxes[k]."""
    moving = np.zeros((len(boxes), 8, 16), bool)
    for k, (left, right) in enumerate(boxes):
        moving[k, :, left:right] = True
    return Motion(np.full((len(boxes), 8, 16, 3), level, np.uint8), moving)


def test_measures_of_planted_motion():
    one, other = planted([(0, 0), (0, 4), (4, 8)]), planted([(0, 0), (2, 6), (12, 16)], level=51)
    found = compare(one, other)
    assert found["per_frame"]["spatiotemporal_iou"] == [1, pytest.approx(2 / 6), 0]  # both empty: 1
    assert found["spatiotemporal_iou"] == pytest.approx((1 + 1 / 3) / 3)
    assert found["spatial_iou"] == pytest.approx(4 / 12)  # columns 0-7 and 2-5, 12-15
    assert found["weighted_iou"] == pytest.approx(4 / 12)  # each column moves in one frame of three
    assert found["mse"] == pytest.approx(0.04)  # 51 / 255 squared


def test_weights_are_the_time_that_something_moves():
    one, other = planted([(0, 4), (0, 4), (0, 0)]), planted([(0, 4), (0, 0), (0, 0)])
    found = compare(one, other)
    assert (found["spatial_iou"], found["weighted_iou"]) == (1, pytest.approx(1 / 2))


def test_clips_without_motion_are_alike():
    still = planted([(0, 0)] * 3)
    assert [compare(still, still)[part] for part in PARTS] == [1, 1, 1, 0]


def test_motion_is_resized_after_the_masks_are_made():
    frames = movie(0, 96, 144)
    motion = motion_of(iter(frames), (24, 36))
    assert motion.frames.shape == (20, 24, 36, 3) and motion.masks.shape == (20, 24, 36)
    whole = np.stack([mask > 0 for mask in masks(frames)]).mean()
    assert motion.masks.mean() == pytest.approx(whole, rel=0.1) and motion.masks.any()


def row(spatiotemporal: float, spatial: float, weighted: float, mse: float, variance=(0.5, 0.8, 0.4, 0.01), of=""):
    view, category, scenario = (of or "left solid fall").split()
    values = dict(zip(COLUMNS, (spatiotemporal, spatial, weighted, mse, *variance), strict=True))
    return values | {"view": view, "category": category, "scenario": scenario}


def table(*rows: dict) -> torch.Tensor:
    return torch.tensor([[values[name] for name in COLUMNS] for values in rows], dtype=torch.float64)


def test_the_score_is_a_function_of_means():
    rows = table(row(0.1, 0.4, 0.2, 0.02), row(0.3, 0.4, 0.2, 0.04))
    assert score_of(rows) == pytest.approx(100 * ((0.2 / 0.5 + 0.4 / 0.8 + 0.2 / 0.4) / 3 - (0.03 - 0.01)))
    assert score_of(table(row(0.5, 0.8, 0.4, 0.01))) == 100
    assert score_of(table(row(0.6, 0.9, 0.5, 0.0))) == 100  # not above
    assert score_of(table(row(0, 0, 0, 0.5))) == 0
    with pytest.raises(UserError, match=r"never overlap \(spatial_iou is 0\)"):
        score_of(table(row(0.1, 0.1, 0.1, 0.1, variance=(0.5, 0, 0.4, 0.01))))


def test_the_interval_leaves_out_whole_scenarios_and_parts_have_values_of_their_own():
    scenarios = ("fall", "roll", "swing", "melt")
    rows = [
        row(0.1 + 0.05 * k + 0.01 * j, 0.4, 0.2, 0.02, of=f"{view} {'fluid' if name == 'melt' else 'solid'} {name}")
        for k, name in enumerate(scenarios)
        for j, view in enumerate(("left", "center", "right"))
    ]
    groups = [str(values["scenario"]) for values in rows]
    score = build("physics_iq").score(Observations(rows, groups=groups, reference_groups=[]))
    assert score.value == pytest.approx(score_of(table(*rows))) and score.n_groups == 4 and score.ci95 is not None
    assert score.ci95[0] < score.value < score.ci95[1] and "4 blocks of source videos" in score.ci_method
    alone = build("physics_iq").score(Observations(rows))
    assert alone.ci95 is not None and alone.ci95[1] - alone.ci95[0] < score.ci95[1] - score.ci95[0]
    of_left = [values for values in rows if values["view"] == "left"]
    assert score.details["by_view"]["left"] == {"value": pytest.approx(score_of(table(*of_left))), "n": 4}
    assert {name: part["n"] for name, part in score.details["by_category"].items()} == {"fluid": 3, "solid": 9}
    assert list(score.details["by_scenario"]) == sorted(scenarios)
    assert score.details["spatial_iou_variance"] == pytest.approx(0.8)


def test_other_rates_are_blended_from_the_first_to_the_last_frame(tmp_path: Path):
    clip = torch.from_numpy(movie(1, frames=30)).permute(0, 3, 1, 2).contiguous()
    write_lossless(tmp_path / "a.mkv", clip, 30)
    found = list(blended(tmp_path / "a.mkv", 30, 12))
    source = clip.permute(0, 2, 3, 1).numpy().astype(np.float64)
    for k, frame in enumerate(found):
        place = k * 29 / 11
        low, share = int(place), place - int(place)
        mean = (1 - share) * source[low] + share * source[min(low + 1, 29)]
        difference = mean - frame  # cut off, not rounded
        assert difference.min() > -1e-4 and difference.max() < 1 + 1e-4
    assert (found[0] == source[0]).all() and (found[-1] == source[29]).all()


@pytest.fixture
def takes(tmp_path: Path) -> Takes:
    for number in (1, 2):
        clip = torch.from_numpy(movie(number, frames=50)).permute(0, 3, 1, 2).contiguous()
        write_lossless(tmp_path / f"{number}.mkv", clip, 10)
    return Takes(Take({10: tmp_path / "1.mkv"}), Take({10: tmp_path / "2.mkv"}))


def test_the_second_take_scores_as_the_variance_does(takes: Takes):
    truth = {"view": "left", "category": "solid", "scenario": "fall"}
    for fps in (10.0, 4.0):
        view = View(takes.second.clip(fps, 5), fps=fps, truth=truth, takes=takes)
        seen = build("physics_iq").observe(view)
        assert all(seen[part] == seen[f"{part}_variance"] for part in PARTS)
        assert score_of(table(seen)) == 100
        for part in PARTS:
            value = build(f"physics_iq_{part}").observe(view)
            assert value["value"] == value["variance"] == seen[part] and value["scenario"] == "fall"


def test_a_clip_of_another_length_is_no_observation(takes: Takes):
    clip = takes.second.clip(10, 5)
    truth = {"view": "left", "category": "solid", "scenario": "fall"}
    with pytest.raises(UserError, match=r"clips of 5 seconds; this one has 49 frames at 10 fps, which is 4\.900"):
        build("physics_iq").observe(View(clip[:49], fps=10.0, truth=truth, takes=takes))


def test_a_take_that_is_too_short_names_its_file(takes: Takes):
    with pytest.raises(VideoError, match=r"1\.mkv: 50 frames at 10 fps; 60 are needed for 6 seconds"):
        takes.first.clip(10, 6)
    with pytest.raises(VideoError, match=r"1\.mkv: 50 frames at 10 fps; 60 are needed for 6 seconds"):
        takes.first.clip(7, 6)
