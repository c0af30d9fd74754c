"""A made-up suite in VBench-I2V's official layout: three pictures with a subject, two backgrounds, 19 prompts.

With it, the loader, the protocol and the metrics of VBench-I2V can be tried without a download. The same arguments
give the same bytes.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dcbench.camera import PHRASES
from dcbench.datasets.make import claim
from dcbench.datasets.vbench_i2v import BOXES, CROPS, LIST, ORIGINS, RATIOS, Cut, find_box
from dcbench.errors import UserError
from dcbench.files import atomic_write, write_json
from dcbench.progress import track

SIDE = 360  # pixels of the short side of an original picture; the long one is half as long again
SUBJECT = (
    "i2v_subject",
    "subject_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "temporal_flickering",
)
BACKGROUND = ("i2v_background", "background_consistency", "aesthetic_quality", "imaging_quality", "temporal_flickering")
Array = np.ndarray


@dataclass(frozen=True)
class Scene:
    prompt: str
    kind: str
    upright: bool
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]  # above, below
    discs: tuple[tuple[float, float, float], ...] = ()  # across, down, radius; 0 to 1 of the content's square

    @property
    def dimensions(self) -> tuple[str, ...]:
        return SUBJECT if self.discs else BACKGROUND


SCENES = (
    Scene("an orange ball lies on the grass", "other", False, ((150, 190, 230), (70, 130, 60)), ((0.5, 0.6, 0.2),)),
    Scene(
        "two plums on a wooden table",
        "food",
        True,
        ((120, 90, 70), (170, 120, 70)),
        ((0.3, 0.6, 0.15), (0.7, 0.6, 0.15)),
    ),
    Scene("a child's balloon in the sky", "other", True, ((90, 140, 220), (200, 220, 250)), ((0.5, 0.4, 0.25),)),
    Scene("a calm sea under an evening sky", "scenery", False, ((230, 150, 110), (40, 70, 120))),
    Scene("a well-lit corridor with tiles", "indoor", True, ((235, 230, 220), (110, 100, 95))),
)


def make_suite(out: Path, side: int = SIDE, quiet: bool = False) -> int:
    """Write the suite to a folder: the list, originals with their boxes, pictures of four ratios.

    Returns the number of prompts. The same call continues. UserError if the folder holds something else.
    """
    if side < 64 or side % 2:
        raise UserError(f"--size {side}: expected an even number, 64 or more")
    claim(out, {"dataset": "vbench-i2v", "side": side})
    boxes = []
    for scene in track(SCENES, len(SCENES), "writing vbench-i2v pictures", quiet=quiet):
        origin, facts = out / ORIGINS / f"{scene.prompt}.jpg", boxes_of(scene, side)
        boxes.append(facts)
        picture = io.BytesIO()
        Image.fromarray(paint(scene, side, facts)).save(picture, "JPEG", quality=95)
        _write(origin, picture.getvalue())
        for ratio in RATIOS:
            _write(out / CROPS / ratio / origin.name, Cut(origin, find_box(facts, ratio)).data())
    write_json(out / BOXES, boxes)
    entries = [entry for scene in SCENES for entry in entries_of(scene)]
    write_json(out / LIST, entries)
    return len(entries)


def entries_of(scene: Scene) -> list[dict[str, Any]]:
    """The entries of a picture: one of its dimensions, and seven with a motion of the camera for a background."""
    common = {"image_type": scene.kind, "image_name": f"{scene.prompt}.jpg"}
    made = [{"prompt_en": scene.prompt, "dimension": list(scene.dimensions), **common}]
    for words in PHRASES if not scene.discs else ():
        made.append({"prompt_en": f"{scene.prompt}, {words}", "dimension": ["camera_motion"], **common})
    return made


def boxes_of(scene: Scene, side: int) -> dict[str, Any]:
    """The entry of a picture in the list of boxes: of 16:9 and then the content's square, or the other way round."""
    long = side * 3 // 2
    width, height = (side, long) if scene.upright else (long, side)
    if scene.upright:
        fits = min(width // across * down for across, down in (map(int, ratio.split("-")) for ratio in RATIOS))
        first = [0, (height - width) // 2, width, width]
        second = [0, (width - fits) // 2, width // 16 * 16, fits]
    else:
        low = width * 9 // 16  # the height of 16:9 in full width
        first, second = [0, (height - low) // 2, width, low], [(width - low) // 2, 0, low, low]
    inside = {"width": first[2], "height": first[3], "second_bbox": second}
    facts = {"file_name": f"{scene.prompt}.jpg", "type": scene.kind, "origin_width": width, "origin_height": height}
    facts |= {"first_crop": {"width": width, "height": height, "first_bbox": first}, "second_crop": inside}
    return facts | {"diff_ratio_crop": {ratio: list(find_box(facts, ratio)) for ratio in RATIOS}}


def paint(scene: Scene, side: int, facts: dict[str, Any]) -> Array:
    """Two colours with fine waves, and discs inside the content's box: uint8 [height width 3]."""
    width, height = facts["origin_width"], facts["origin_height"]
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    above, below = (np.array(colour, dtype=np.float64) for colour in scene.colours)
    share = np.clip((y / height - 0.5) * 12 + 0.5, 0, 1)[..., None]
    waves = 12 * np.sin(x / side * 40) * np.sin(y / side * 33) + 6 * np.sin((x + 2 * y) / 3)
    picture = above + share * (below - above) + waves[..., None]
    left, top, *_ = facts["first_crop"]["first_bbox"]
    inner_left, inner_top, inner_width, inner_height = facts["second_crop"]["second_bbox"]
    unit = min(inner_width, inner_height)
    for number, (across, down, radius) in enumerate(scene.discs):
        centre = left + inner_left + across * inner_width, top + inner_top + down * inner_height
        inside = np.clip(radius * unit - np.hypot(x - centre[0], y - centre[1]) + 0.5, 0, 1)[..., None]
        picture += inside * (np.array([230.0, 120.0 - 60 * number, 40.0 + 90 * number]) - picture)
    return np.clip(np.round(picture), 0, 255).astype(np.uint8)


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(data)
