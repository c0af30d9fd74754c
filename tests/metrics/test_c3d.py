"""C3D is TGANv2's network: read from .npz files of its layout, and computed by its definition spelt out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcbench.catalogue import find_metric
from dcbench.errors import UserError
from dcbench.metrics.c3d import C3D, MEAN_SHAPE, C3DExtractor, load_c3d
from dcbench.metrics.inception_score import build_is_c3d
from dcbench.models.base import Runtime


def small(weights: Path, mean: Path, device: str = "cpu") -> C3DExtractor:
    return load_c3d(weights, mean, device, width=2, hidden=12, classes=7)


def arrays(seed: int = 0) -> dict[str, Any]:
    """Random weights with the names of TGANv2's file."""
    random = np.random.default_rng(seed)
    made = {}
    for name, value in C3D(width=2, hidden=12, classes=7).state_dict().items():
        layer, part = name.split(".")
        scale = 1.4 / np.sqrt(max(1, value[0].numel())) if part == "weight" else 0.1
        made[f"{layer}/{'W' if part == 'weight' else 'b'}"] = random.normal(0, scale, value.shape).astype(np.float32)
    return made


def mean_clip() -> np.ndarray:
    return np.random.default_rng(1).uniform(80, 120, MEAN_SHAPE).astype(np.float32)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    np.savez(tmp_path / "network.npz", **arrays())
    np.savez(tmp_path / "mean.npz", mean=mean_clip())
    return tmp_path / "network.npz", tmp_path / "mean.npz"


@pytest.fixture
def clips() -> Tensor:
    return torch.randint(0, 256, (2, 16, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def aligned(frame: np.ndarray, size: int = 112) -> np.ndarray:
    """[h w] -> [size size]: linear between the pixels, the corners on the corners."""
    for axis in (0, 1):
        old = frame.shape[axis]
        at = np.linspace(0, old - 1, size)
        low = np.minimum(at.astype(int), old - 2)
        share = np.expand_dims(at - low, 1 - axis)
        frame = frame.take(low, axis) * (1 - share) + frame.take(low + 1, axis) * share
    return frame


def spelt_out(clip: Tensor, weights: dict[str, np.ndarray], mean: np.ndarray) -> Tensor:
    """uint8 [16 3 h w] -> [classes], from TGANv2's description, layer after layer."""
    pixels = clip.numpy()[:, ::-1].astype(np.float64) / 127.5 - 1  # BGR in [-1, 1]
    frames = np.stack([[aligned(plane * 128) for plane in frame] for frame in pixels], 1)  # 3 16 112 112
    x = torch.from_numpy(frames + 128 - mean[:, :, 8:120, 8:120].astype(np.float64))[None]
    w = {name: torch.from_numpy(array).double() for name, array in weights.items()}
    for names, kernel in (("1a", (1, 2, 2)), ("2a", 2), ("3a 3b", 2), ("4a 4b", 2), ("5a 5b", 2)):
        for name in names.split():
            x = F.conv3d(x, w[f"conv{name}/W"], w[f"conv{name}/b"], padding=1).clamp(min=0)
        if x.shape[-1] % 2:  # 7 pixels: the last window has one
            x = F.pad(x, (0, 1, 0, 1), value=-torch.inf)
        x = F.max_pool3d(x, kernel)
    x = x.flatten(1)
    for name in ("fc6", "fc7"):
        x = (x @ w[f"{name}/W"].T + w[f"{name}/b"]).clamp(min=0)
    return (x @ w["fc8/W"].T + w["fc8/b"])[0]


def test_logits_equal_the_definition(files: tuple[Path, Path], clips: Tensor) -> None:
    """Measured: 1.6e-6 of the largest logit; against TGANv2's layers in Chainer, 1.2e-6."""
    extractor = small(*files)
    logits = extractor.extract(list(clips))
    expected = torch.stack([spelt_out(clip, arrays(), mean_clip()) for clip in clips])
    assert logits.shape == (2, 7) and float(expected.std()) > 0.1
    assert float((logits - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_the_real_network_has_the_published_sizes() -> None:
    with torch.device("meta"):
        network = C3D()
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes["conv5b.weight"] == (512, 512, 3, 3, 3) and shapes["fc6.weight"] == (4096, 8192)
    assert shapes["fc8.weight"] == (101, 4096) and len(shapes) == 22


def test_identity_covers_weights_and_mean(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = small(*files)
    np.savez(tmp_path / "other.npz", mean=mean_clip() + 1)
    assert first.identity != small(files[0], tmp_path / "other.npz").identity
    assert first.identity == small(*files).identity and first.num_features == 7


def test_wrong_files_are_named(files: tuple[Path, Path], tmp_path: Path) -> None:
    weights, mean = files
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays().items() if k != "fc7/b"})
    with pytest.raises(UserError, match=r"does not hold TGANv2's C3D: 1 arrays differ, first fc7.bias \(missing\)"):
        small(tmp_path / "less.npz", mean)
    np.savez(tmp_path / "odd.npz", **{**arrays(), "fc7/b": np.zeros(13)})
    with pytest.raises(UserError, match=r"first fc7.bias \(\[13\]\)"):
        small(tmp_path / "odd.npz", mean)
    with pytest.raises(UserError, match="holds no array 'mean'"):
        small(weights, weights)
    np.savez(tmp_path / "objects.npz", mean=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"objects\.npz is not an \.npz file of arrays"):
        small(weights, tmp_path / "objects.npz")
    (tmp_path / "cut.npz").write_bytes(weights.read_bytes()[:900])
    (tmp_path / "text.npz").write_text("<html>")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name in ("cut", "text", "array"):
        with pytest.raises(UserError, match=rf"{name}\.npz is not an \.npz file of arrays"):
            small(tmp_path / f"{name}.npz", mean)
    np.savez(tmp_path / "nan.npz", **{**arrays(), "fc8/b": np.full(7, np.nan)})
    with pytest.raises(UserError, match=r"fc8\.bias holds 7 values that are NaN"):
        small(tmp_path / "nan.npz", mean)


def test_a_clip_has_sixteen_frames(files: tuple[Path, Path], clips: Tensor) -> None:
    with pytest.raises(UserError, match="reads clips of 16 frames, got 9"):
        small(*files)(clips[:, :9])


def test_the_card_reads_its_two_files(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = find_metric("is_c3d")
    for source, path in zip(card.weights, files, strict=True):
        path.rename(tmp_path / source.name)
    monkeypatch.setenv("DCBENCH_WEIGHTS", str(tmp_path))
    monkeypatch.setattr("dcbench.metrics.c3d.load_c3d", small)
    metric = build_is_c3d(card, Runtime(offline=True))
    assert isinstance(metric.extractor, C3DExtractor) and metric.splits == 10
    assert metric.identity["name"] == "is_c3d" and metric.extractor.identity["name"] == "c3d-ucf101"
