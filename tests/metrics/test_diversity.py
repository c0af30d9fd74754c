"""How different the clips of one input are: exact ends, the formula, and runs with several clips."""

from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dcbench.catalogue import find_dataset, find_metric, find_model, load_entry_point
from dcbench.errors import UserError
from dcbench.metrics.base import ClipMetric, View
from dcbench.metrics.st_lpips import st_lpips
from dcbench.models.base import Runtime
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.run import Options


@pytest.fixture(scope="module")
def metric() -> ClipMetric:
    return load_entry_point(find_metric("diversity"))(find_metric("diversity"), Runtime())


def clip(seed: int, frames: int = 3) -> Tensor:
    return torch.randint(0, 256, (frames, 3, 32, 40), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_it_is_the_mean_distance_of_all_pairs(metric: ClipMetric):
    clips = [clip(0), clip(1), clip(2)]
    clips[1][0] = clips[0][0]
    row = metric.observe(View(clips[0], siblings=clips[1:]))
    pairs = torch.stack([st_lpips().distances(a, b) for a, b in combinations(clips, 2)])
    assert row["per_frame"] == pytest.approx(pairs.mean(0).tolist(), rel=1e-12)
    assert row["value"] == pytest.approx(float(pairs.mean()), rel=1e-12) and row["clips"] == 3
    assert metric.observe(View(clips[0], siblings=[clips[0]]))["value"] == 0


def test_what_it_refuses(metric: ClipMetric):
    assert "another clip of the same input (--samples 2 or more)" in str(metric.lacks(View(clip(0))))
    with pytest.raises(UserError, match=r"different shapes: \[3, 3, 32, 40\], \[2, 3, 32, 40\]"):
        metric.observe(View(clip(0), siblings=[clip(1, 2)]))


def test_models_from_none_to_much(tmp_path: Path):
    protocol = find_protocol("smoke").resolved("shapes").model_copy(update={"num_frames": 3, "height": 32, "width": 32})
    options, found = Options(device="cpu", quiet=True), {}
    for model in ("still", "zoom", "noise"):
        out, card, data = tmp_path / model, find_model(model), find_dataset("shapes")
        run = planning.plan(card, data, protocol.with_samples(3), out=out, limit=4, quiet=True)
        sampling.sample(run, options)
        found[model] = scoring.score(run, options, ["diversity"]).scores["diversity"]
    assert found["still"].value == found["zoom"].value == 0
    assert found["noise"].value and found["noise"].value > 0.01
    assert (found["noise"].n_generated, found["noise"].n_groups) == (4, 4)  # one value an input
    run = planning.plan(find_model("still"), data, protocol, out=tmp_path / "one", limit=4, quiet=True)
    sampling.sample(run, options)
    score = scoring.score(run, options, ["diversity"]).scores["diversity"]
    assert score.value is None and "--samples 2 or more" in str(score.reason)
