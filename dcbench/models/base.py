"""The one interface of every image-to-video model."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from dcbench.catalogue import ClipShape, ModelCard, cards, load_entry_point
from dcbench.errors import UserError


@dataclass(frozen=True)
class Request:
    """One clip to make. A model may use what it says it `conditions_on`, and nothing else."""

    clip_id: str
    image: Tensor  # uint8 [3, h, w]
    prompt: str
    num_frames: int
    fps: float  # frames per second of the clip to make
    frame_stride: int | None  # source frames between two frames of the clip; None when there is no source
    seed: int
    end_image: Tensor | None = None  # uint8 [3, h, w]
    reference: Tensor | None = None  # uint8 [t, 3, h, w]; only for models that condition on "reference"


@dataclass(frozen=True)
class Wanted:
    """What a request will ask for, known before the model is loaded and before a picture is read."""

    clip_id: str
    num_frames: int | None  # None: as many as the model makes
    fps: float
    frame_stride: int | None = None
    motion: int | Literal["clip"] | None = "clip"  # "clip": that of the clip to make; None: the model's usual one


CardCheck = Callable[[ModelCard, Sequence[Wanted]], None]


def checks_with(check: CardCheck) -> Callable[[Callable[..., Any]], Any]:
    """Decorator of an entry point: `check` raises UserError if a model of this card cannot make what is wanted."""

    def mark(load: Callable[..., Any]) -> Any:
        setattr(load, "check_wanted", check)  # noqa: B010 (a function has no such attribute for a type checker)
        return load

    return mark


def check_wanted(card: ModelCard, wanted: Sequence[Wanted]) -> None:
    """Raise UserError for what the model of a card cannot make: cheap, so it comes before the weights are read."""
    check: CardCheck | None = getattr(load_entry_point(card), "check_wanted", None)
    if check is not None:
        check(card, wanted)


def check_ends(card: ModelCard, has_end: bool, what: str, how: str = "give --end-image or --loop") -> None:
    """Raise UserError if an end image is given to a model without one, or missing; it names models that fit.

    `what` gives the end image, or does not; `how` is the way to give one. A class of your own may say in its attribute
    `conditions_on` that it takes one.
    """
    can = "end_image" in card.conditions_on
    if has_end == can or (has_end and card.available and "end_image" in _of_class(card)):
        return
    fitting = [
        other.name
        for other in cards("models").values()
        if isinstance(other, ModelCard) and other.available and ("end_image" in other.conditions_on) == has_end
    ]
    if has_end:
        needs = f"{what} needs a model that conditions on an end image, which {card.name} does not"
    else:
        needs = f"{card.name} fills in between two pictures: {how}"
        fitting = [name for name in fitting if name.startswith("dynamicrafter")]
    raise UserError(f"{needs}. Models that can: {', '.join(fitting)}.")


def _of_class(card: ModelCard) -> Iterable[str]:
    """What the class of a model says that it conditions on; nothing for an entry point that is a function."""
    return getattr(load_entry_point(card), "conditions_on", ())


def conditions_on(card: ModelCard) -> frozenset[str]:
    """What a card and the class of its model say that the model conditions on."""
    return frozenset(card.conditions_on) | frozenset(_of_class(card))


ShapeOf = Callable[[ModelCard, float | None], ClipShape]


def shaped_by(find: ShapeOf) -> Callable[[Callable[..., Any]], Any]:
    """Decorator of an entry point: `find(card, seconds)` gives the shape of the model's clips, where its card cannot.

    UserError if they are not `seconds` long; None: any length.
    """

    def mark(load: Callable[..., Any]) -> Any:
        setattr(load, "clip_shape", find)  # noqa: B010 (a function has no such attribute for a type checker)
        return load

    return mark


def clip_shape(card: ModelCard, seconds: float | None) -> ClipShape:
    """The length, rate and size of a model's clips; None where it makes any."""
    find: ShapeOf | None = getattr(load_entry_point(card), "clip_shape", None)
    return find(card, seconds) if find else card.clip


def clip_a_core(is_small: Callable[[ModelCard], bool]) -> Callable[[Callable[..., Any]], Any]:
    """Decorator of an entry point: for cards with `is_small`, a CPU makes one clip a core, each with one thread.

    For a small network this is faster than all cores on one clip. The card alone decides it, so that clips do not
    depend on the number of cores.
    """

    def mark(load: Callable[..., Any]) -> Any:
        setattr(load, "clip_a_core", is_small)  # noqa: B010 (a function has no such attribute for a type checker)
        return load

    return mark


def is_clip_a_core(card: ModelCard) -> bool:
    """Whether a CPU makes one clip a core with the model of a card."""
    is_small: Callable[[ModelCard], bool] | None = getattr(load_entry_point(card), "clip_a_core", None)
    return is_small is not None and is_small(card)


@dataclass(frozen=True)
class Runtime:
    """Where and how a model runs. Settings of its output stand in its card."""

    device: str = "cpu"
    dtype: str | None = None  # autocast dtype ("float16", "bfloat16"); None = float32
    offline: bool = False


@runtime_checkable
class ImageToVideo(Protocol):
    """A model: `generate` turns requests into clips, each uint8 [num_frames, 3, h, w], in their order.

    A clip depends on its own request alone: never on its place in a batch, the rank or the number of ranks.
    """

    card: ModelCard
    conditions_on: frozenset[str]

    def generate(self, requests: Sequence[Request]) -> list[Tensor]: ...


@runtime_checkable
class PreparesFirst(Protocol):
    """A model that wants all requests before the first clip, such as a program that loads its weights once."""

    def prepare(self, requests: Iterable[Request], folder: Path) -> dict[str, float]:
        """Do the work in `folder`, which outlives an interruption. Returns seconds spent, by clip id."""
        ...


@runtime_checkable
class ChecksFirst(Protocol):
    """A model that knows before the first clip whether a clip cannot be made."""

    def check(self, clip_ids: Sequence[str]) -> None:
        """Raise UserError when a clip cannot be made."""
        ...


@runtime_checkable
class TakesMotion(Protocol):
    """A model with a motion condition of its own, such as a frame stride; `dcbench animate --motion` gives it."""

    def with_motion(self, request: Request, motion: int | None) -> Request:
        """The request with this motion (None: the usual one) and all frames of the model.

        Raises UserError for a motion that the model was not trained with.
        """
        ...


@runtime_checkable
class ReportsSteps(Protocol):
    """A model that calls `on_step(done, all)` after each sampling step, unless it is None."""

    on_step: Callable[[int, int], None] | None


class CutPrompts:
    """Prompts that a text encoder does not read to their end: the first one is warned of, each is kept for the record.

    `clip_facts`, by clip id, is added to the line of a clip.
    """

    def __init__(self) -> None:
        self.clip_facts: dict[str, dict[str, str]] = {}

    def note(self, model: str, clip_id: str, tokens: int, window: int, reader: str) -> None:
        """Note a prompt of `tokens` tokens, of which `reader` reads the first `window`."""
        if tokens <= window:
            return
        if not self.clip_facts:
            warnings.warn(
                f"{model}: the prompt of clip {clip_id} has {tokens} tokens; {reader} reads the first {window}. "
                "The lines of the clips (`prompt_cut`) name all such prompts",
                stacklevel=2,
            )
        self.clip_facts[clip_id] = {"prompt_cut": f"{reader} read {window} of {tokens} tokens"}


def check_generated(clip: Tensor, request: Request, model: str) -> Tensor:
    """Return the clip if it is uint8 [num_frames, 3, h, w]; UserError says what is wrong with another."""
    if not isinstance(clip, Tensor):
        raise UserError(f"model {model} returned {type(clip).__name__} for clip {request.clip_id}, not a tensor")
    if clip.is_floating_point() and not bool(torch.isfinite(clip).all()):
        raise UserError(f"model {model} returned NaN or infinity for clip {request.clip_id}")
    if clip.dtype != torch.uint8 or clip.ndim != 4 or clip.shape[1] != 3:
        raise UserError(
            f"model {model} returned {str(clip.dtype).removeprefix('torch.')} {list(clip.shape)} for clip "
            f"{request.clip_id}; expected uint8 [{request.num_frames}, 3, h, w]"
        )
    if clip.shape[0] != request.num_frames:
        raise UserError(
            f"model {model} returned {clip.shape[0]} frames for clip {request.clip_id}; "
            f"{request.num_frames} were asked for"
        )
    return clip
