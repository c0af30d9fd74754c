"""Models that exist only in a running Python program: an object, or a function from picture and prompt to a clip."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dcbench.catalogue import ModelCard, slug
from dcbench.errors import UserError
from dcbench.models.base import ImageToVideo, Request, Runtime

Function = Callable[..., Any]  # (image uint8 [3 h w], prompt, num_frames, fps, seed) -> uint8 [t 3 h w]
_LIVE: dict[str, ImageToVideo] = {}  # by name


class FromFunction:
    """A model that calls a function for each clip."""

    conditions_on = frozenset({"image", "prompt"})

    def __init__(self, card: ModelCard, function: Function) -> None:
        self.card, self.function = card, function

    def generate(self, requests: Sequence[Request]) -> list[Tensor]:
        return [self._clip(request) for request in requests]

    def _clip(self, request: Request) -> Any:
        made = self.function(request.image, request.prompt, request.num_frames, request.fps, request.seed)
        return torch.as_tensor(made) if hasattr(made, "__array__") else made  # `check_generated` tells what is wrong


def card_of(model: Any, name: str | None = None) -> ModelCard:
    """A card for an object with `generate`, or for a function, of this program. UserError for anything else."""
    given = name or getattr(model, "name", None) or getattr(model, "__name__", None) or type(model).__name__
    title = str(given)
    card = ModelCard(
        name=slug(title),
        title=title,
        summary="A model of a Python program.",
        entry_point="dcbench.models.live:load",
        options={"live": slug(title)},
    )
    if isinstance(model, ImageToVideo):
        conditions = tuple(sorted(model.conditions_on))
        card = card.model_copy(update={"conditions_on": conditions})
        _LIVE[card.name] = model
    elif callable(model):
        _LIVE[card.name] = FromFunction(card, model)
    else:
        raise UserError(
            f"a {type(model).__name__} is no model; expected a name, an object with `generate` and `conditions_on`, or "
            "a function (image, prompt, num_frames, fps, seed) -> clip"
        )
    return card


def load(card: ModelCard, runtime: Runtime) -> ImageToVideo:
    """Entry point of the cards that `card_of` makes."""
    name = str(card.options.get("live"))
    if name not in _LIVE:
        raise UserError(f"{name} was a model of a Python program, which has ended: dcbench.evaluate(model, ...) there")
    return _LIVE[name]
