"""`dcbench animate`: a picture and a prompt, two pictures, a loop, or a story of scenes -> a video file.

Any image-to-video model does the first; a model that conditions on an end image does the others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from dcbench import video
from dcbench.catalogue import ModelCard, load_entry_point
from dcbench.errors import UserError, first_line, near_match
from dcbench.files import read_bytes
from dcbench.models.base import (
    ImageToVideo,
    ReportsSteps,
    Request,
    Runtime,
    TakesMotion,
    Wanted,
    check_ends,
    check_generated,
    check_wanted,
)
from dcbench.pictures import read_image
from dcbench.progress import track
from dcbench.seeding import clip_seed

FPS = 8.0  # of the released DynamiCrafter files; for a card that names no rate
DEFAULT_FRAMES = 16  # for a card that names no number
SCENE_KEYS = ("image", "prompt", "end_image", "seed")


@dataclass(frozen=True)
class Scene:
    """One clip to make. `image` None continues from the last frame of the scene before."""

    image: Tensor | None  # uint8 [3, h, w]
    prompt: str
    end_image: Tensor | None = None
    seed: int | None = None


def read_story(path: Path) -> tuple[list[Scene], float | None]:
    """A YAML file {fps: 8, scenes: [{image, prompt, end_image, seed}, ...]} -> (scenes, fps).

    Pictures lie relative to the file; a scene without an image goes on from the last frame before it.
    """
    data = read_bytes(path)
    try:
        text = data.decode()
        _check_yaml(text, path)
        story = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {first_line(error)}") from error
    if not isinstance(story, Mapping) or not isinstance(story.get("scenes"), list) or not story["scenes"]:
        raise UserError(f"{path}: expected 'scenes:' with a list of 'image:' and 'prompt:'")
    _check_keys(story, ("fps", "scenes"), str(path))
    fps = story.get("fps")
    if fps is not None and (isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps <= 240):
        raise UserError(f"{path}: fps is {fps!r}; give a number above 0, up to 240")
    return [_scene(scene, number, path) for number, scene in enumerate(story["scenes"], 1)], fps


def _check_yaml(text: str, path: Path) -> None:
    """Raise UserError for YAML that takes hours or gigabytes: nested lists, aliases of aliases."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, yaml.FlowSequenceStartToken | yaml.FlowMappingStartToken)
        depth -= isinstance(token, yaml.FlowSequenceEndToken | yaml.FlowMappingEndToken)
        if depth > 20 or isinstance(token, yaml.AliasToken):
            what = "aliases (*name) are not read" if depth <= 20 else "it is nested too deeply"
            raise UserError(f"{path}: {what}; write the values as in docs/dynamicrafter.md")


def _scene(scene: Any, number: int, path: Path) -> Scene:
    where = f"{path}, scene {number}"
    if not isinstance(scene, Mapping):
        raise UserError(f"{where}: expected 'image:' and 'prompt:', got {scene!r}")
    _check_keys(scene, SCENE_KEYS, where)
    prompt, seed = scene.get("prompt", ""), scene.get("seed")
    if not isinstance(prompt, str):
        raise UserError(f"{where}: the prompt is {prompt!r}; put it in quotes")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise UserError(f"{where}: the seed is {seed!r}; give a whole number")
    pictures: dict[str, Tensor | None] = {}
    for key in ("image", "end_image"):
        given = scene.get(key)
        if given is not None and not isinstance(given, str):
            raise UserError(f"{where}: {key} is {given!r}; give the path of a picture")
        pictures[key] = None if given is None else read_image(path.parent / given)
    if number == 1 and pictures["image"] is None:
        raise UserError(f"{where}: the first scene needs an image")
    return Scene(pictures["image"], prompt, pictures["end_image"], seed)


def _check_keys(given: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in allowed:
            raise UserError(
                f"{where}: unknown key {key!r}.{near_match(str(key), allowed)} Allowed: {', '.join(allowed)}"
            )


def animate(
    card: ModelCard,
    image: Path,
    prompt: str,
    out: Path,
    *,
    runtime: Runtime | None = None,
    end_image: Path | None = None,
    loop: bool = False,
    seed: int = 123,
    num: int = 1,
    fps: float | None = None,
    motion: int | None = None,
    quiet: bool = False,
) -> list[Path]:
    """Write `num` videos of one picture, each from its own noise; returns their paths (out, or out-1, out-2, ...).

    `fps` is the speed of playing; None = that of the model's card. `motion` is the model's own condition: the frame
    stride of the 256 model (1-6, more is more motion), frames per second of the others (fewer is more motion); None =
    the released value.
    """
    if loop and end_image is not None:
        raise UserError("--loop ends where it began: leave out --end-image, or --loop")
    if num < 1:
        raise UserError(f"--num {num}: give 1 or more")
    first = read_image(image)
    last = first if loop else None if end_image is None else read_image(end_image)
    fps = fps if fps is not None else card.clip.fps or FPS
    _check_out(out, fps)
    check_ends(card, last is not None, "a loop" if loop else "a clip between two pictures")
    _check_card(card, fps, motion)
    names = [out] if num == 1 else [out.with_stem(f"{out.stem}-{k}") for k in range(1, num + 1)]
    model = load_entry_point(card)(card, runtime or Runtime())
    for number, path in enumerate(names):
        scene = Scene(first, prompt, last, clip_seed(seed, str(number)))
        clip = make(model, scene, first, fps, motion, None if quiet else path.name)
        video.write_preview(path, clip[:-1] if loop else clip, fps)
    return names


def tell(
    card: ModelCard,
    story: Path,
    out: Path,
    *,
    runtime: Runtime | None = None,
    seed: int = 123,
    fps: float | None = None,
    motion: int | None = None,
    quiet: bool = False,
) -> Path:
    """Write one video of a story's scenes, one after another; `fps` goes before the story's own."""
    scenes, own_fps = read_story(story)
    fps = fps if fps is not None else own_fps if own_fps is not None else card.clip.fps or FPS
    _check_out(out, fps)
    for number, scene in enumerate(scenes, 1):
        check_ends(card, scene.end_image is not None, f"scene {number}")
    _check_card(card, fps, motion)
    model = load_entry_point(card)(card, runtime or Runtime())
    clips: list[Tensor] = []
    for number, scene in enumerate(scenes):
        start = clips[-1][-1] if scene.image is None else scene.image
        own = scene.seed if scene.seed is not None else clip_seed(seed, str(number))
        what = None if quiet else f"scene {number + 1} of {len(scenes)}"
        clips.append(make(model, Scene(start, scene.prompt, scene.end_image, own), start, fps, motion, what))
    video.write_preview(out, torch.cat(clips), fps)
    return out


def _check_card(card: ModelCard, fps: float, motion: int | None) -> None:
    """Raise UserError for what the model cannot make, before its weights are read."""
    check_wanted(card, [Wanted("animation", None, fps, motion=motion)])


def make(model: ImageToVideo, scene: Scene, image: Tensor, fps: float, motion: int | None, what: str | None) -> Tensor:
    """The clip of a scene that begins with `image`; uint8 [t, 3, h, w]. `what` names it in the progress shown."""
    request = Request(
        "animation",
        image,
        scene.prompt,
        model.card.clip.frames or DEFAULT_FRAMES,
        fps,
        None,
        scene.seed or 0,
        scene.end_image,
    )
    if isinstance(model, TakesMotion):
        request = model.with_motion(request, motion)
    elif motion is not None:
        raise UserError(f"--motion: {model.card.name} has no such condition")
    if isinstance(model, ReportsSteps):
        model.on_step = _Steps(what) if what else None
    (clip,) = model.generate([request])
    return check_generated(clip, request, model.card.name)


class _Steps:
    """A progress callback that drives the project's bar."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.bar: Iterator[int] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None:
            self.bar = iter(track(range(total), total, self.what))
            next(self.bar)
        next(self.bar, None)


def _check_out(out: Path, fps: float) -> None:
    """Raise UserError for a speed or a file that cannot be written."""
    if not 0 < fps <= 240:
        raise UserError(f"--fps {fps}: give a number above 0, up to 240")
    if out.suffix.lower() not in video.WRITERS:
        raise UserError(
            f"{out}: cannot write {out.suffix or 'a file without an ending'}; use {', '.join(video.WRITERS)}"
        )
    if out.is_dir():
        raise UserError(f"{out} is a folder; give a file name")
