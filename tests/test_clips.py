import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dcbench.clips import centre_window, check_clip, crop_window, resize, to_float, to_uint8
from dcbench.errors import UserError
from dcbench.seeding import clip_seed, generator


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    for low in (-1.0, 0.0):
        assert torch.equal(to_uint8(to_float(levels, low), low), levels)
    assert to_float(levels).min() == -1
    assert to_float(levels).max() == 1


def test_truncation_is_the_released_code_s_rule():
    assert to_uint8(torch.tensor([0.999]), truncate=True).item() == 254
    assert to_uint8(torch.tensor([0.999])).item() == 255
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_trap_04_squash_and_crop_are_two_named_choices():
    """A 320x240 frame, white in its middle: the crop is white, the squash keeps the black sides."""
    frame = torch.zeros(1, 3, 240, 320, dtype=torch.uint8)
    frame[..., 30:290] = 255
    assert resize(frame, 64, 64, "crop").min() == 255
    assert resize(frame, 64, 64, "squash")[..., 0].max() == 0
    with pytest.raises(ValueError, match="'stretch'"):
        resize(frame, 64, 64, "stretch")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(240, 320), (321, 17), (64, 64), (1, 1), (65, 64)])
def test_any_size_becomes_the_size_asked_for(size):
    clip = torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8)
    for mode in ("crop", "squash"):
        out = resize(clip, 64, 48, mode)
        assert out.shape == (2, 3, 64, 48)
        assert out.dtype == torch.uint8


def test_the_crop_is_centred():
    assert crop_window(240, 320, 256, 256) == (256, 341, 0, 42)


def test_resize_is_torch_s_own_interpolation():
    clip = torch.rand(2, 3, 40, 40)
    expected = F.interpolate(clip, (20, 20), mode="bilinear", antialias=True, align_corners=False)
    assert torch.equal(resize(clip, 20, 20), expected)


def official(frame: np.ndarray, size: int) -> np.ndarray:
    """A DAVIS frame as VIDIM-Bench makes it, uint8 [h w 3]: centre square, linear light, OpenCV, rounded half up."""
    half = min(frame.shape[:2]) // 2
    middle = [side // 2 for side in frame.shape[:2]]
    square = frame[middle[0] - half : middle[0] + half, middle[1] - half : middle[1] + half]
    light = np.power(square.astype(np.float32) / 255, 2.2)
    how = cv2.INTER_AREA if size <= square.shape[0] else cv2.INTER_CUBIC
    scaled = np.clip(cv2.resize(light, (size, size), interpolation=how), 0, 1)
    return np.floor(np.power(scaled, 1 / 2.2) * 255 + 0.5).astype(np.uint8)


def area_weights(to: int, of: int) -> np.ndarray:
    """[to of]: the share of each old pixel in each new one, by the overlap of their intervals."""
    edges = np.arange(to + 1) * of / to
    low, high = np.maximum.outer(edges[:-1], np.arange(of)), np.minimum.outer(edges[1:], np.arange(1, of + 1))
    return np.clip(high - low, 0, None) * to / of


@pytest.mark.parametrize(("height", "width"), [(480, 854), (480, 853), (301, 333), (854, 480), (100, 180), (256, 300)])
def test_area_in_linear_light_is_opencvs_to_the_grey_level(height: int, width: int):
    clip = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    made = resize(clip, 256, 256, "crop", "area_linear_light")
    expected = np.stack([official(frame.permute(1, 2, 0).numpy(), 256) for frame in clip])
    assert np.array_equal(made.permute(0, 2, 3, 1).numpy(), expected)


def test_area_in_linear_light_is_the_mean_of_light():
    """By the overlap of pixels, in float64; and a chessboard of black and white is as bright as half its light."""
    clip = torch.randint(0, 256, (1, 3, 90, 70), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    light = (clip[0].numpy() / 255) ** 2.2
    mean = area_weights(32, 90) @ light @ area_weights(48, 70).T
    made = resize(clip, 32, 48, "squash", "area_linear_light")[0].numpy()
    assert np.abs(made - mean ** (1 / 2.2) * 255).max() < 0.501
    board = (torch.arange(64)[:, None] + torch.arange(64)).remainder(2).mul(255).to(torch.uint8).expand(1, 3, 64, 64)
    assert resize(board, 32, 32, "crop", "area_linear_light").unique().tolist() == [round(255 * 0.5 ** (1 / 2.2))]
    assert resize(board, 32, 32, "crop", "bilinear").max() <= 130  # the mean of grey levels


def test_area_in_linear_light_leaves_a_clip_of_the_right_size_and_refuses_floats():
    clip = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(resize(clip, 32, 32, "crop", "area_linear_light"), clip)
    with pytest.raises(UserError, match="area_linear_light: got float32"):
        resize(clip.float(), 16, 16, "crop", "area_linear_light")


def test_the_window_around_the_centre():
    assert centre_window(480, 854, 256, 256) == (480, 480, 0, 187)
    assert centre_window(481, 853, 256, 256) == (480, 480, 0, 186)
    assert centre_window(480, 854, 320, 512) == (480, 768, 0, 43)
    assert centre_window(854, 480, 320, 512) == (300, 480, 277, 0)


def test_a_wrong_clip_is_named():
    with pytest.raises(UserError, match=r"reference: got float32 \[2, 3, 4, 4\]"):
        check_clip(torch.zeros(2, 3, 4, 4), "reference")


def test_seeds_depend_on_run_and_clip_alone():
    assert clip_seed(123, "a") == clip_seed(123, "a") != clip_seed(123, "b")
    assert clip_seed(124, "a") != clip_seed(123, "a")
    assert 0 <= clip_seed(123, "a") < 2**63
    draws = [torch.rand(3, generator=generator(5, stream)) for stream in ("", "latents", "posterior")]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    assert torch.equal(draws[1], torch.rand(3, generator=generator(5, "latents")))
