"""Features of several clips at once, as on a GPU: the same values within rounding, and errors stay with their clip."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dcbench import video
from dcbench.catalogue import MetricCard, find_dataset, find_metric, find_model
from dcbench.errors import UserError
from dcbench.metrics.base import FeatureExtractor, SetDistance, SetMetric
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.distances import score_frechet
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling, scoring
from dcbench.runs.folders import plan_folders
from dcbench.runs.run import Options, Run

QUIET = Options(device="cpu", quiet=True)
BATCH = 4


class Small(FeatureExtractor):
    """A convolution: its rounding may depend on the batch, as that of I3D does."""

    name, weights_sha256, preprocessing, num_features, batch_size = "small", "none", "", 6, BATCH

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv3d(3, 6, 3)
        self.sizes: list[int] = []

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        if clips.shape[1] < 16:
            raise UserError("too short")
        self.sizes.append(len(clips))
        made = self.layer(clips.float().transpose(1, 2) / 255).mean((2, 3, 4))
        return torch.where((clips == 255).flatten(1).all(1)[:, None], torch.inf, made)


class Twice(SetMetric):
    """A metric that observes a clip in its own way: it stays one clip at a time."""

    def observe(self, view) -> Tensor:
        return super().observe(view) * 2


def metric() -> SetDistance:
    return SetDistance(find_metric("fvd"), Small(), score_frechet)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`batch` as where the extractor's weights are on a GPU."""
    monkeypatch.setattr(SetMetric, "batch", property(lambda self: self.extractor.batch_size))


def make_run(out: Path, limit: int = 7, **fields) -> Run:
    chosen = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}, **fields})
    run = planning.plan(find_model("zoom"), find_dataset("shapes"), chosen, out=out, limit=limit, quiet=True)
    sampling.sample(run, QUIET)
    return run


def merged(run: Run, own: SetMetric, cache: FeatureCache | None = None) -> scoring.Seen:
    return scoring.observe_all(run, [own], QUIET, cache)


@pytest.mark.parametrize("fields", [{}, {"scored_frames": "without_condition", "num_frames": 17}])
def test_batches_give_the_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict):
    run, single, several = make_run(tmp_path / "run", **fields), metric(), metric()
    alone = merged(run, single)
    assert single.batch == 1 and set(single.extractor.sizes) == {1}  # type: ignore[attr-defined]
    monkeypatch.setattr(SetMetric, "batch", property(lambda self: BATCH))
    together = merged(run, several)
    assert several.extractor.sizes == [4, 4, 4, 2]  # type: ignore[attr-defined]  (4 cases and then 3, two clips each)
    key = single.observation_key
    for side, other in ((alone.generated, together.generated), (alone.reference, together.reference)):
        assert side[key].keys() == other[key].keys() == {case.id for case in run.cases}
        for case_id in side[key]:
            assert torch.allclose(side[key][case_id], other[key][case_id], atol=1e-6)  # 6e-8 measured
    assert [case.id for case in run.cases] == list(together.pixels)


@pytest.mark.usefixtures("on_a_gpu")
def test_what_is_cached_is_not_made_again(tmp_path: Path):
    run, cache = make_run(tmp_path / "run", 5), FeatureCache()
    first, second = metric(), metric()
    one, two = merged(run, first, cache), merged(run, second, cache)
    assert first.extractor.sizes and not second.extractor.sizes  # type: ignore[attr-defined]
    key = first.observation_key
    assert all(torch.equal(one.generated[key][i], two.generated[key][i]) for i in one.generated[key])


@pytest.mark.usefixtures("on_a_gpu")
def test_errors_stay_with_their_clip(tmp_path: Path):
    """A white clip has features that are not finite, a broken file cannot be read; the clips beside them count."""
    for name in "abcdef":
        clip = torch.full((16, 3, 40, 40), 255 if name == "b" else 40 + ord(name), dtype=torch.uint8)
        video.write_lossless(tmp_path / "made" / f"{name}.mkv", clip, 8)
        video.write_lossless(tmp_path / "real" / f"{name}.mkv", clip // 2, 8)
    run = plan_folders(tmp_path / "made", tmp_path / "real", find_protocol("folders"), tmp_path / "run", quiet=True)
    (tmp_path / "made" / "d.mkv").write_bytes(b"broken")
    seen, own = merged(run, small := metric()), small.observation_key
    assert list(seen.generated[own]) == ["a", "c", "e", "f"]
    assert [failure.id for failure in seen.failures] == ["d"]
    assert "NaN or infinity" in seen.lacking[own]["b"]


@pytest.mark.usefixtures("on_a_gpu")
def test_a_clip_that_the_network_refuses_does_not_spoil_its_batch():
    found = metric().observe_batch([torch.zeros(16, 3, 8, 8).byte(), torch.zeros(9, 3, 8, 8).byte()])
    assert isinstance(found[0], Tensor) and isinstance(found[1], UserError)


def test_the_score_says_the_batch_and_own_observers_have_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, small = make_run(tmp_path / "run", 5), metric()
    assert Twice(MetricCard(**find_metric("fvd").model_dump()), Small()).batch == 1
    assert "batch" not in scoring._score(small, merged(run, small), run.cases).details
    monkeypatch.setattr(SetMetric, "batch", property(lambda self: BATCH))
    assert scoring._score(small, merged(run, small), run.cases).details["batch"] == BATCH
