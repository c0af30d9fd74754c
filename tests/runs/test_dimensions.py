"""A suite with dimensions: a metric of one counts the clips that list it, and its record says how many these are."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dcbench.catalogue import MetricCard, find_dataset, find_model
from dcbench.datasets.made_pictures import make_suite
from dcbench.metrics.base import ClipMetric, View
from dcbench.protocol import find_protocol, protocols
from dcbench.record import read_per_clip
from dcbench.runs import planning, scoring
from dcbench.runs.run import Options, Run
from dcbench.runs.sampling import sample

QUIET = Options(device="cpu", quiet=True)
NAMES = ["flicker", "temporal_flickering"]


def made_run(out: Path, listed: list[list[str] | None]) -> Run:
    """A run of as many clips; the data set lists these dimensions for each. None: no list."""
    protocol = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    run = planning.plan(find_model("noise"), find_dataset("shapes"), protocol, out=out, limit=len(listed), quiet=True)
    for case, names in zip(run.cases, listed, strict=True):
        item = run.items[case.source_id]
        known = dict(item.truth or {}) | ({} if names is None else {"dimensions": names})
        run.items[case.source_id] = dataclasses.replace(item, truth=known)
    sample(run, QUIET)
    return run


def test_a_dimension_is_of_its_own_clips(tmp_path: Path) -> None:
    run = made_run(tmp_path, [["temporal_flickering", "i2v_subject"], ["camera_motion"], ["temporal_flickering"], []])
    scores = scoring.score(run, QUIET, NAMES).scores
    rows = list(read_per_clip(tmp_path).values())
    assert ["temporal_flickering" in row for row in rows] == [True, False, True, False]
    whole, part = scores["flicker"], scores["temporal_flickering"]
    assert (whole.n_generated, part.n_generated) == (4, 2)
    assert part.value == pytest.approx((rows[0]["flicker"]["value"] + rows[2]["flicker"]["value"]) / 2, abs=1e-12)
    assert part.details["subset"] == {"dimension": "temporal_flickering", "clips": 2, "other_clips": 2}
    assert part.details["reference_value"] != whole.details["reference_value"]
    assert not part.warnings and "subset" not in whole.details


def test_where_no_dimensions_are_listed_all_clips_count(tmp_path: Path) -> None:
    scores = scoring.score(made_run(tmp_path, [None, None, None]), QUIET, NAMES).scores
    assert scores["temporal_flickering"].value == scores["flicker"].value
    assert "subset" not in scores["temporal_flickering"].details


def test_no_clip_of_a_dimension_is_no_score(tmp_path: Path) -> None:
    score = scoring.score(made_run(tmp_path, [["camera_motion"]] * 3), QUIET, NAMES).scores["temporal_flickering"]
    assert score.value is None and score.reason == (
        "none of the 3 clips is of the dimension temporal_flickering: their data set lists others"
    )


def test_a_clip_without_a_value_is_missing_and_no_other_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clip of the dimension that cannot be observed is a warning; a clip of another dimension is none."""
    run = made_run(tmp_path, [["temporal_flickering"], ["temporal_flickering"], ["camera_motion"]])
    short = run.cases[0]
    first = run.generated(short)
    monkeypatch.setattr(run, "generated", lambda case: first[:1] if case is short else Run.generated(run, case))
    score = scoring.score(run, QUIET, NAMES).scores["temporal_flickering"]
    assert score.n_generated == 1 and score.details["subset"]["other_clips"] == 1
    assert score.warnings == [
        "1 clips do not count: temporal_flickering compares consecutive frames: a clip needs at least 2 frames"
    ]


class Sees(ClipMetric):
    """The number of pixels of the picture, and of the input image."""

    def observe(self, view: View) -> dict[str, Any]:
        return {"value": float(view.need("picture")[0].numel()), "image": float(view.need("image")[0].numel())}


def test_a_metric_may_need_the_picture_at_the_size_of_its_file(tmp_path: Path) -> None:
    """VBench embeds the file, not the input image that the model was given. A frame of a video is no picture."""
    make_suite(tmp_path / "suite", 96, quiet=True)
    small = protocols()["vbench-i2v"].model_copy(update={"num_frames": 3, "height": 32, "width": 56})
    card = MetricCard(
        name="sees", title="s", summary="s", entry_point="none:none", kind="per_clip", needs=("image", "picture")
    )
    run = planning.plan(
        find_model("still"), find_dataset("vbench-i2v"), small.with_samples(1), tmp_path / "suite", tmp_path / "run",
        limit=2, quiet=True,
    )  # fmt: skip
    sample(run, QUIET)
    seen = scoring.observe_all(run, [Sees(card)], QUIET, None)
    for case in run.cases:
        picture = run.items[case.source_id].video.read([0])[0]
        row = seen.generated[Sees(card).observation_key][case.id]
        assert row == {"value": float(picture[0].numel()), "image": 32.0 * 56.0}
        assert row["value"] != row["image"]
    of_video = made_run(tmp_path / "shapes", [None])
    lacking = scoring.observe_all(of_video, [Sees(card)], QUIET, None).lacking[Sees(card).observation_key]
    assert "needs a picture file" in next(iter(lacking.values()))
