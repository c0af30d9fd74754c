"""Weights to begin a training with: files of Stable Diffusion, VideoCrafter, open_clip or this repository.

DynamiCrafter's authors began stage 1 from Stable Diffusion 2.1, and stages 2 and 3 from a VideoCrafter text-to-video
model. Both have the same U-Net without the image branch; Stable Diffusion's has no temporal layers either.
"""

import re
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from dcbench.errors import UserError
from dcbench.models.dynamicrafter.checkpoint import released_name, unwrapped
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.models.dynamicrafter.unet import parameter_role
from dcbench.training.networks import PREFIXES
from dcbench.weights import check_finite

Layout = Literal["dynamicrafter", "videocrafter", "stable-diffusion", "open-clip"]
UNET = PREFIXES["unet"]


def to_released_names(state: Mapping[str, Tensor], layout: Layout, networks: Networks) -> dict[str, Tensor]:
    """The tensors of another layout under the released DynamiCrafter's names."""
    if layout == "open-clip":  # one file for both towers, no prefix
        plain = {unwrapped(name): value for name, value in state.items()}
        return {PREFIXES["image" if name.startswith("visual.") else "text"] + name: plain[name] for name in plain}
    state = {released_name(name): value for name, value in state.items()}
    if layout == "stable-diffusion":
        own = networks.state_dict()
        return {_with_temporal_places(name, own): value for name, value in state.items()}
    return state


def _with_temporal_places(name: str, own: Mapping[str, Tensor]) -> str:
    """The video U-Net's name of an image U-Net's tensor: behind a temporal transformer the number is higher by one."""
    if match := re.fullmatch(rf"({re.escape(UNET)}middle_block)\.2\.(.+)", name):
        return f"{match[1]}.3.{match[2]}"
    if match := re.fullmatch(rf"({re.escape(UNET)}output_blocks\.\d+)\.2\.(conv\..+)", name):
        moved = f"{match[1]}.3.{match[2]}"
        return moved if moved in own else name
    return name


def begin(
    networks: Networks,
    state: Mapping[str, Tensor],
    parts: tuple[str, ...] = tuple(PREFIXES),
    layout: Layout = "dynamicrafter",
    keep: tuple[str, ...] = (),
) -> list[str]:
    """Load the weights of these parts; returns the names of the tensors that `state` does not have.

    Parameters of the roles in `keep` stay as they are, because earlier stages have learned them.

    What the U-Net has and `state` has not: extra input channels are 0, so that the image latents change nothing at
    first. Image keys and values are copies of the text keys and values, so that the tokens of the query transformer can
    be used like text tokens. Gates have λ = 1, and temporal layers are the identity. Raises UserError for a tensor of
    another shape, and for a part of which `state` has nothing.
    """
    state = to_released_names(state, layout, networks)
    own = networks.state_dict()
    taken: dict[str, Tensor] = {}
    new: list[str] = []
    for part in parts:
        wanted = [name for name in own if name.startswith(PREFIXES[part])]
        if keep and part in ("unet", "query_transformer"):
            wanted = [name for name in wanted if parameter_role(name) not in keep]
        if not any(name in state for name in wanted):
            raise UserError(f"the weights hold nothing of {part}: no name starts with {PREFIXES[part]}")
        for name in wanted:
            value = state.get(name)
            if value is None:
                new.append(name)
                text = name.replace(".to_k_ip.", ".to_k.").replace(".to_v_ip.", ".to_v.")
                if text == name or text not in state:
                    continue
                value = state[text]
            if name == UNET + "input_blocks.0.0.weight" and value.shape[1] < own[name].shape[1]:
                new.append(f"{name}[:, {value.shape[1]}:]")
                value = torch.cat([value, torch.zeros_like(own[name][:, value.shape[1] :])], dim=1)
            if value.shape != own[name].shape:
                shapes = f"{list(value.shape)} in the weights and {list(own[name].shape)} in the recipe's model"
                raise UserError(f"{name} is {shapes}: they do not fit together")
            taken[name] = value
    check_finite(taken, "the weights to begin with")
    networks.load_state_dict(taken, strict=False)
    return new


def copy_text_keys(networks: Networks) -> None:
    """Set image keys and values to the text keys and values: for a model that was trained with text only."""
    for layer in networks.unet.cross_attentions():
        layer.to_k_ip.load_state_dict(layer.to_k.state_dict())
        layer.to_v_ip.load_state_dict(layer.to_v.state_dict())
