import pytest
import torch
import torch.nn.functional as F

from dcbench.clips import check_clip, crop_window, resize, to_float, to_uint8
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
