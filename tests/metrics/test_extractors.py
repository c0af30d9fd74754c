"""Preprocessing is part of a metric's identity: each way of resizing equals its definition, spelt out slowly."""

import math

import numpy as np
import pytest
import torch

from dcbench.errors import UserError
from dcbench.metrics.extractors import I3DExtractor, to_square


def line(values: np.ndarray, size: int, half_pixel: bool, antialias: bool = False) -> np.ndarray:
    """One row resized by the textbook: a weighted mean of the inputs near each output's position."""
    old = len(values)
    scale = old / size
    out = []
    for i in range(size):
        centre = (i + 0.5) * scale - 0.5 if half_pixel else i * scale
        reach = max(scale, 1.0) if antialias else 1.0
        near = range(math.floor(centre - reach), math.ceil(centre + reach) + 1)
        weights, total = {}, 0.0
        for j in near:
            weight = max(0.0, 1 - abs(j - centre) / reach)
            if antialias and not 0 <= j < old:
                continue
            weights[min(max(j, 0), old - 1)] = weights.get(min(max(j, 0), old - 1), 0.0) + weight
            total += weight
        out.append(sum(values[j] * w for j, w in weights.items()) / total)
    return np.array(out)


def image(array: np.ndarray, height: int, width: int, half_pixel: bool, antialias: bool = False) -> np.ndarray:
    rows = np.stack([line(column, height, half_pixel, antialias) for column in array.T], 1)
    return np.stack([line(row, width, half_pixel, antialias) for row in rows])


@pytest.mark.parametrize(("height", "width"), [(30, 40), (12, 9), (24, 24)])
@pytest.mark.parametrize("mode", ["squash", "aa", "tf1", "crop"])
def test_resizes_equal_their_definition(mode: str, height: int, width: int) -> None:
    array = np.random.default_rng(0).uniform(0, 255, (height, width))
    size = 16
    if mode == "crop":
        scale = size / min(height, width)
        tall, wide = (size, math.ceil(width * scale)) if height < width else (math.ceil(height * scale), size)
        whole = image(array, tall, wide, half_pixel=True)
        top, left = (tall - size) // 2, (wide - size) // 2
        expected = whole[top : top + size, left : left + size]
    else:
        expected = image(array, size, size, half_pixel=mode != "tf1", antialias=mode == "aa")
    got = to_square(torch.from_numpy(array).float()[None, None], mode, size)[0, 0].numpy()  # type: ignore[arg-type]
    assert np.abs(got - expected).max() < 1e-3


def test_range_is_minus_one_to_one(i3d: I3DExtractor) -> None:
    clip = torch.zeros(1, 9, 3, 20, 20, dtype=torch.uint8)
    assert float(i3d.prepare(clip).max()) == -1.0
    assert float(i3d.prepare(clip + 255).min()) == pytest.approx(1.0, abs=1e-6)


def test_features_do_not_depend_on_the_batch_or_on_neighbours(i3d: I3DExtractor, moving_clip: torch.Tensor) -> None:
    """Measured: 1e-5 or less between batch sizes, for clips of other sizes in the same list."""
    clips = [moving_clip[:9], moving_clip[7:], moving_clip[:9, :, :48]]
    together = i3d.extract(clips)
    assert together.shape == (3, 400) and together.dtype == torch.float32
    alone = torch.cat([i3d.extract([clip]) for clip in reversed(clips)]).flip(0)
    assert float((together - alone).abs().max()) < 2e-4


def test_constant_frames_are_scored(i3d: I3DExtractor) -> None:
    clip = torch.full((1, 9, 3, 16, 16), 128, dtype=torch.uint8)
    assert bool(torch.isfinite(i3d(clip)).all())


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(1, 9, 1, 16, 16, dtype=torch.uint8), r"expected uint8 \[t, 3, h, w\]"),
        (torch.zeros(1, 9, 3, 16, 16), "float32"),
        (torch.zeros(9, 3, 16, 16, dtype=torch.uint8), r"expected uint8 \[b, t, 3, h, w\]"),
    ],
)
def test_grayscale_floats_and_missing_batch_are_refused(i3d: I3DExtractor, clip: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        i3d(clip)


def test_an_unknown_preprocessing_names_the_nearest() -> None:
    with pytest.raises(UserError, match='Did you mean "squash"'):
        I3DExtractor("sqash")  # type: ignore[arg-type]


def test_identity_names_what_changes_the_numbers(i3d: I3DExtractor) -> None:
    assert i3d.identity == {
        "name": "i3d-kinetics400",
        "weights_sha256": "99281fd6f3c3a06dea2b6e539ca6ae59313b1b7a045ee8ca20bd2f49f1608e15",
        "preprocessing": "squash",
    }


def test_trap_05_the_range_and_the_least_number_of_frames_are_the_extractor_s_own(i3d: I3DExtractor) -> None:
    clips = (
        torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 1, 2).expand(1, 9, 3, 224, 2).repeat(1, 1, 1, 1, 112)
    )
    prepared = i3d.prepare(clips)
    assert (float(prepared.min()), float(prepared.max())) == (-1, 1)
    with pytest.raises(UserError, match="at least 9 frames, got 8"):
        i3d(clips[:, :8])
