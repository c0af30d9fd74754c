"""imaging_quality: our MUSIQ is pyiqa's, beside numbers of VBench's own function with the same random weights."""

import json
from pathlib import Path

import pytest
import torch
from made_weights import made_clip, made_weights
from observing import scored
from torch import Tensor

from dcbench.catalogue import find_metric, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import View
from dcbench.metrics.vbench.musiq import ImagingQuality, Musiq, Rater, prepared, tokens
from dcbench.models.base import Runtime
from dcbench.weights import MissingWeights

RECORDED = json.loads((Path(__file__).parents[1] / "data" / "vbench.json").read_text())["imaging_quality"]


@pytest.fixture(scope="module")
def metric(tmp_path_factory: pytest.TempPathFactory) -> ImagingQuality:
    """The whole network, random, loaded as the real file is. Ratings lie around 50 and differ by frame."""
    state = made_weights(Musiq().state_dict(), 6)
    state["head.weight"] *= 30
    state["head.bias"] += 50
    path = tmp_path_factory.mktemp("musiq") / "musiq.pth"
    torch.save(state, path)
    return ImagingQuality(find_metric("imaging_quality"), Rater(path))


def large() -> Tensor:
    """One frame of 360x640, which is made smaller."""
    return made_clip("a")[:1].repeat_interleave(5, 2).repeat_interleave(5, 3)


def test_equals_vbenchs_own_function(metric: ImagingQuality) -> None:
    """pyiqa's class and VBench's resize. Measured: at most 1.6e-7, of ratings / 100 between -0.23 and 0.05."""
    rows = [metric.observe(View(clip)) for clip in (made_clip("a"), large())]
    first, _, third = RECORDED["clips"]
    assert [row["value"] for row in rows] == pytest.approx([first / 100, third / 100], abs=1e-6)
    assert len(rows[0]["per_frame"]) == 3 and max(rows[0]["per_frame"]) - min(rows[0]["per_frame"]) > 0.02
    assert scored(metric, rows).value == pytest.approx((first + third) / 200, abs=1e-6)


def test_large_frames_are_made_smaller() -> None:
    assert prepared(large()[0]).shape == (3, 288, 512)
    assert prepared(torch.zeros(3, 700, 333, dtype=torch.uint8)).shape == (3, 512, 243)  # 243.6, cut
    assert torch.equal(prepared(made_clip("a")[0]), made_clip("a")[0].float() / 255)


def test_three_sizes_in_patches() -> None:
    """A frame of 72x128: 126x224, 216x384, and itself. Rows and columns of patches are spread over ten places."""
    patches, places, sizes = tokens(made_clip("a")[:1].float() / 255)
    assert [int((sizes == size).sum()) for size in range(3)] == [4 * 7, 7 * 12, 3 * 4]
    assert patches.shape == (124, 3, 32, 32) and places.shape == sizes.shape == (124,)
    own = places[sizes == 2].tolist()
    assert own == [row * 10 + column for row in (0, 3, 6) for column in (0, 2, 5, 7)]


def test_missing_and_wrong_files(tmp_path: Path) -> None:
    card = find_metric("imaging_quality")
    with pytest.raises(MissingWeights, match=r"musiq_spaq_ckpt-358bb6af\.pth is missing"):
        load_entry_point(card)(card, Runtime(offline=True))
    torch.save({"head.weight": torch.zeros(10, 384), "head.bias": torch.zeros(10)}, tmp_path / "ava.pth")
    with pytest.raises(UserError, match="is not MUSIQ trained on SPAQ"):
        Rater(tmp_path / "ava.pth")
