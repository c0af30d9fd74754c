"""Picture files of every kind -> uint8 RGB. A kind whose white is not known is refused, and never guessed."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dcbench.errors import UserError, first_line
from dcbench.files import read_bytes


def read_image(path: Path) -> Tensor:
    """A picture file -> uint8 [3, h, w]; turned as its camera says, transparency over white."""
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, path: Path) -> Tensor:
    """`read_image` of the content of a file. `path`: its name for errors."""
    try:
        with without_bombs(), Image.open(io.BytesIO(data)) as file:
            picture = ImageOps.exif_transpose(file)
            if picture.mode.startswith(("I", "F")):
                picture = _grey(picture, file.format)
            elif picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            array = np.array(picture.convert("RGB"))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # depends on the damage
        raise UserError(f"{path} is no picture that can be read: {first_line(error)}") from error
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


@contextlib.contextmanager
def without_bombs() -> Iterator[None]:
    """A picture of more than 89 million pixels is an error; Pillow only warns up to twice as many."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def _grey(picture: Image.Image, kind: str | None) -> Image.Image:
    """Modes of one number a pixel that Pillow would cut off at 255: 16 bits (0 to 65535), floats (0 to 1).

    32-bit integers are read if they hold 16 bits, as Pillow's own for PGM; UserError for other ranges.
    """
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if picture.mode == "F":
        if not (low >= 0 and high <= 1):  # also if one is not a number
            raise UserError(
                f"floats from {low:g} to {high:g}; expected 0 (black) to 1 (white). Scale them, or save 8 or 16 bits"
            )
        levels = (values * 255).round()
    else:
        if picture.mode == "I" and kind != "PPM" and not (low >= 0 and 255 < high <= 65535):
            raise UserError(
                f"32-bit integers from {low:.0f} to {high:.0f}, of which white is not known. Save the picture with "
                "8 or 16 bits, or as floats from 0 to 1"
            )
        levels = values / 257
    levels = levels.astype(np.uint8)
    if isinstance(clear := picture.info.get("transparency"), int):  # of a PNG: the level that is not painted
        levels = np.where(values == clear, np.uint8(255), levels)
    return Image.fromarray(levels)
