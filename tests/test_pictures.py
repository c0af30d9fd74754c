"""Pictures of every kind: the colours that they show, or a refusal that says why."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dcbench.errors import UserError
from dcbench.pictures import read_image

RAMP = np.linspace(0, 255, 16).astype(np.uint8)[None].repeat(4, 0)  # 4 x 16
SUFFIX = {"CMYK": ".tif", "YCbCr": ".jpg", "LAB": ".tif", "F": ".tif"}


def ramp(mode: str) -> Image.Image:
    grey = Image.fromarray(RAMP)
    if mode == "F":
        return Image.fromarray(RAMP.astype(np.float32) / 255)
    if mode.startswith("I;16"):
        return Image.fromarray(RAMP.astype(np.uint16) * 257)
    if mode == "LAB":
        return Image.merge("LAB", [grey, Image.new("L", grey.size, 128), Image.new("L", grey.size, 128)])
    return grey.convert("RGB").convert(mode) if mode in ("CMYK", "YCbCr") else grey.convert(mode)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "F"])
def test_a_ramp_is_a_ramp_in_every_mode(tmp_path, mode):
    path = tmp_path / f"ramp{SUFFIX.get(mode, '.png')}"
    ramp(mode).save(path)
    read = read_image(path)
    assert read.dtype == torch.uint8 and read.shape == (3, 4, 16)
    if mode == "LAB":  # lightness is no grey level, but it grows with it
        assert read[:, :, 0].max() < 8 and read[:, :, -1].min() > 247 and (read.int().diff(dim=2) > 0).all()
    else:
        allowed = 4 if mode == "YCbCr" else 0
        assert (read.int() - torch.from_numpy(RAMP.astype(int))).abs().max() <= allowed


def test_black_and_white_is_black_and_white(tmp_path):
    Image.fromarray(RAMP > 100).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "1"
    assert read_image(tmp_path / "a.png").unique().tolist() == [0, 255]


def test_16_bits_of_the_other_byte_order_and_in_32_bits(tmp_path):
    wide = RAMP.astype(np.uint16) * 257
    (tmp_path / "big.pgm").write_bytes(b"P5 16 4 65535\n" + wide.astype(">u2").tobytes())
    Image.fromarray(wide.astype(np.int32)).save(tmp_path / "wide.tif")
    Image.frombytes("I;16B", (16, 4), wide.astype(">u2").tobytes()).save(tmp_path / "other.tif")
    (tmp_path / "dark.pgm").write_bytes(b"P5 2 1 65535\n\0\0\0\xff")
    for name in ("big.pgm", "wide.tif", "other.tif"):
        assert torch.equal(read_image(tmp_path / name)[0], torch.from_numpy(RAMP)), name
    assert read_image(tmp_path / "dark.pgm").unique().tolist() == [0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.float32), "floats from 0 to 255; expected 0 .black. to 1 .white."),
        (RAMP.astype(np.float32) / 255 - 0.5, "floats from -0.5 to 0.5"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
        (RAMP.astype(np.int32), "32-bit integers from 0 to 255, of which white is not known"),
        (RAMP.astype(np.int32) * 2**20, "32-bit integers from 0 to 267386880"),
        (RAMP.astype(np.int32) * 100 - 5, "32-bit integers from -5 to 25495"),
    ],
)
def test_numbers_without_a_known_white_are_refused(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"a\.tif: {message}"):
        read_image(tmp_path / "a.tif")


def test_what_is_transparent_is_white_in_every_mode(tmp_path):
    grey = Image.fromarray(RAMP)
    palette = grey.convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    grey.save(tmp_path / "grey.png", transparency=0)
    grey.convert("RGB").save(tmp_path / "colour.png", transparency=(0, 0, 0))
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(tmp_path / "wide.png", transparency=0)
    for name, picture in (("la.png", grey.convert("LA")), ("rgba.png", grey.convert("RGBA"))):
        picture.putalpha(Image.fromarray(np.where(RAMP == 0, 0, 255).astype(np.uint8)))
        picture.save(tmp_path / name)
    expected = torch.from_numpy(np.where(RAMP == 0, 255, RAMP))
    for path in sorted(Path(tmp_path).glob("*.png")):
        assert torch.equal(read_image(path)[1], expected), path.name
