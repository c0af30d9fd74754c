"""FID of frames equals torch-fidelity's, on the network too, through the real loading code.

tests/data/inception.json holds torch-fidelity 0.4.0's features for weights drawn by name (`seeded`).
"""

import json
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dcbench import load_metric
from dcbench.catalogue import find_metric
from dcbench.errors import UserError
from dcbench.metrics import Observations
from dcbench.metrics import functional as fn
from dcbench.metrics.cache import FeatureCache
from dcbench.metrics.design import Design
from dcbench.metrics.fid import (
    FrameDistance,
    FrameExtractor,
    Frames,
    build_fid,
    build_inception,
    frame_extractor,
    load_inception,
    score_frames,
)
from dcbench.models.base import Runtime
from dcbench.runs import scoring
from dcbench.weights import MissingWeights


def seeded(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor drawn from the hash of its own name, with sizes that keep the activations alive."""
    made = {}
    for name, value in state.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(value.shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            made[name] = value
        elif value.ndim == 4:
            made[name] = drawn * (2 / value[0].numel()) ** 0.5
        else:
            made[name] = 1 + 0.2 * drawn if name.endswith(("bn.weight", "running_var")) else 0.1 * drawn
            made[name] = made[name].clamp_(min=0.3) if name.endswith("running_var") else made[name]
    return made


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the released layout: the classifier of 1008 classes is there too."""
    state = seeded(build_inception().state_dict())
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}, path)
    return path


@pytest.fixture(scope="module")
def network(weights: Path) -> nn.Module:
    return load_inception(weights)


@pytest.fixture(scope="module")
def clips() -> Tensor:
    """uint8 [1 2 3 60 80]: smooth colours."""
    coarse = torch.rand(2, 3, 5, 6, generator=torch.Generator().manual_seed(3))
    frames = nn.functional.interpolate(coarse, (60, 80), mode="bilinear", align_corners=True)
    return (frames * 255).to(torch.uint8)[None]


def test_legacy_features_equal_torch_fidelitys(network: nn.Module, clips: Tensor) -> None:
    """Measured: 4e-6 of features up to 12."""
    golden = json.loads((Path(__file__).parents[1] / "data" / "inception.json").read_text())
    features = FrameExtractor(network, resize="legacy").extract(list(clips))[0]
    expected = torch.tensor(golden["features"])
    assert features.shape == (2, 2048) and float(expected.std()) > 0.1
    assert float((features[:, :: golden["every"]] - expected).abs().max()) < 1e-4
    assert float((features.mean(1) - torch.tensor(golden["means"])).abs().max()) < 1e-4


@pytest.mark.parametrize(("height", "width"), [(60, 80), (320, 400)])
def test_clean_resize_equals_pillows(height: int, width: int) -> None:
    """clean-fid resizes each channel as a float image, bicubic, and clips. Measured: 0.004 of 255."""
    extractor = FrameExtractor(nn.Conv2d(3, 1, 1))
    frame = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    planes = [
        Image.fromarray(plane.numpy().astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
        for plane in frame
    ]
    expected = np.stack([np.asarray(plane).clip(0, 255) for plane in planes])
    got = extractor.prepare(frame[None])[0].numpy() * 128 + 128
    assert np.abs(got - expected).max() < 0.01
    assert float(got.min()) >= 0 and float(got.max()) <= 255


class Planes(nn.Module):
    """Three numbers a frame, in place of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) * self.scale


def test_the_frames_that_count() -> None:
    clip = (torch.arange(5) * 20).to(torch.uint8).view(1, 5, 1, 1, 1).expand(1, 5, 3, 8, 8)
    found = {frames: FrameExtractor(Planes(), frames)(clip)[0, :, 0] * 128 + 128 for frames in get_args(Frames)}  # type: ignore[arg-type]
    assert [[round(float(value)) for value in rows] for rows in found.values()] == [
        [0, 20, 40, 60, 80], [40], [0], [20, 40, 60],
    ]  # fmt: skip
    with pytest.raises(UserError, match="a clip of 2 frames has none between its ends"):
        FrameExtractor(Planes(), "between")(clip[:, :2])
    many = torch.randint(0, 256, (1, 40, 3, 8, 8), dtype=torch.uint8)
    assert FrameExtractor(Planes())(many).shape == (1, 40, 3)  # in several batches


def planted(clips: int, frames: int, d: int, shift: float, seed: int) -> list[Tensor]:
    """Clips whose frames resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(clips, 1, d, generator=generator)
    return list(shift + base + 0.3 * torch.randn(clips, frames, d, generator=generator))


def test_value_is_the_distance_of_all_frames() -> None:
    real, made = planted(40, 4, 12, 0.0, 0), planted(40, 4, 12, 0.5, 1)
    score = score_frames(real, made)
    x, y = torch.cat(real).double(), torch.cat(made).double()
    assert score.value == pytest.approx(fn.frechet_distance(x, y), rel=1e-9)
    root = np.sqrt(np.linalg.eigvals(np.cov(x.numpy().T) @ np.cov(y.numpy().T)).real).sum()
    mean = float((x.mean(0) - y.mean(0)).square().sum())
    assert score.value == pytest.approx(mean + np.trace(np.cov(x.numpy().T) + np.cov(y.numpy().T)) - 2 * root, rel=1e-9)
    assert (score.n_reference, score.n_generated, score.n_groups) == (40, 40, 40)
    assert score.details["frames"] == [160, 160] and score.value and score.ci95
    assert score.ci95[0] < score.value < score.ci95[1]


def test_blocks_are_of_clips_not_of_frames() -> None:
    """With frames as if independent, the standard error would be far too small."""
    real, made = planted(48, 8, 3, 0.0, 2), planted(48, 8, 3, 0.4, 3)
    score = score_frames(real, made)
    loose = score_frames([frame[None] for clip in real for frame in clip], [f[None] for clip in made for f in clip])
    assert loose.value == pytest.approx(score.value)
    assert score.details["standard_error"] > 1.8 * loose.details["standard_error"]
    names = [f"video {k // 2}" for k in range(48)]
    assert score_frames(real, made, Design.of(names, names)).n_groups == 24


def test_identical_sets_are_at_zero_and_order_changes_nothing() -> None:
    real, made = planted(20, 3, 6, 0.0, 4), planted(20, 3, 6, 1.0, 5)
    assert score_frames(real, real).value == 0
    names = [str(k) for k in range(20)]
    first = score_frames(real, made, Design.of(names, names))
    assert first.model_dump() == score_frames(real[::-1], made[::-1], Design.of(names[::-1], names[::-1])).model_dump()


@pytest.mark.parametrize(("rows", "d"), [(30, 64), (300, 40)])
def test_fast_singular_values_are_good_enough(rows: int, d: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    real, made = (torch.randn(rows, d, generator=generator).exp() * (1 + k) for k in range(2))
    assert fn.frechet_distance(real, made, fast=True) == pytest.approx(fn.frechet_distance(real, made), rel=1e-7)


def test_warnings_and_comparisons() -> None:
    real = planted(20, 3, 64, 0.0, 6)
    score = score_frames(real, planted(18, 3, 64, 0.0, 7))
    assert score.warnings[0].startswith("20 reference and 18 generated clips")
    assert score.warnings[1].startswith("54 frames span fewer than the 64 feature dimensions")
    assert score.warnings[2].startswith("54 frames of 18 clips")
    metric = FrameDistance(find_metric("fid"), FrameExtractor(Planes()))
    names = [str(k) for k in range(20)]
    near, far = (Observations(planted(20, 3, 3, shift, 8), planted(20, 3, 3, 0.0, 9), names) for shift in (0.2, 2.0))
    assert metric.difference(near, far).difference < 0 and metric.difference(near, far).p_value < 0.01
    with pytest.raises(UserError, match="0 reference and 20 generated clips: nothing to compare"):
        score_frames([], real)


def test_wrong_files_and_options_are_named(weights: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    torch.save({name: value for name, value in state.items() if "Mixed_7c" not in name}, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"does not fit: \d+ tensors differ, first Mixed_7c"):
        load_inception(tmp_path / "less.pth")
    with pytest.raises(UserError, match=r'options\.frames is "midle"; allowed: all, middle, first, between\. Did you'):
        FrameExtractor(Planes(), "midle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r'options\.resize is "pil"; allowed: clean, legacy'):
        FrameExtractor(Planes(), "all", "pil")  # type: ignore[arg-type]


def test_the_card_names_the_released_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    card = find_metric("fid")
    assert card.weights[0].sha256.startswith("6726825d")
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path))
    with pytest.raises(MissingWeights, match=r"95\.6 MB"):
        load_metric("fid", device="cpu")
    (tmp_path / card.weights[0].name).write_bytes(b"another file")
    with pytest.raises(UserError, match="expected 6726825d"):
        build_fid(card, Runtime(offline=True))
    extractors = {frame_extractor(weights, *options, "cpu") for options in (("all", "clean"), ("all", "legacy"))}  # type: ignore[arg-type]
    assert len({json.dumps(extractor.identity) for extractor in extractors}) == 2


def test_cached_features_keep_their_frames(tmp_path: Path) -> None:
    """A clip's rows come from the cache; a clip of another number of frames has other pixels, so another key."""
    metric, cache = FrameDistance(find_metric("fid"), FrameExtractor(Planes())), FeatureCache(tmp_path)
    clip = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    assert metric.observation_shape(clip) == (6, 2048)
    metric.extractor.num_features = 3
    view = scoring.View(clip)
    key = f"{metric.observation_key}-{'0' * 64}"
    cache.put(key, {"features": metric.observe(view)})
    found = cache.get(key, {"features": metric.observation_shape(clip)})
    assert found is not None and torch.equal(found["features"], metric.observe(view))
    assert cache.get(key, {"features": (3,)}) is None
