"""λ, the weight of the image in each cross-attention: read it, set it, or multiply it by groups of layers."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dcbench.errors import UserError, near_match
from dcbench.models.dynamicrafter.attention import DualCrossAttention
from dcbench.models.dynamicrafter.unet import UNet

GROUPS = ("all", "ends", "intermediate")


class ImageScale:
    """λ of the U-Net's layers by number, 1-16 as in the paper's Fig. 2 (at a smaller configuration: 1-n).

    `scale[7]` reads it, `scale[7] = 0.5` fixes it, `del scale[7]` gives the learned value back.
    """

    def __init__(self, unet: UNet) -> None:
        self._layers: list[DualCrossAttention] = unet.cross_attentions()

    def _layer(self, number: int) -> DualCrossAttention:
        if not 1 <= number <= len(self._layers):
            raise UserError(f"layer {number}: this network has layers 1 to {len(self._layers)}")
        return self._layers[number - 1]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, number: int) -> float:
        gate = self._layer(number).gate
        return float(gate.detach()) if isinstance(gate, Tensor) else gate

    def __setitem__(self, number: int, value: float) -> None:
        self._layer(number).image_scale = float(value)

    def __delitem__(self, number: int) -> None:
        self._layer(number).image_scale = None

    def values(self) -> list[float]:
        """λ of layers 1, 2, ..."""
        return [self[number] for number in range(1, len(self) + 1)]

    def multiply(self, factors: Mapping[str, float]) -> None:
        """Multiply λ by the factor of each layer group. In two groups, a layer takes the factor of the later one."""
        before = self.values()
        for group, factor in factors.items():
            for layer in layer_group(group, len(self)):
                self[layer] = before[layer - 1] * factor


def layer_group(name: str, layers: int) -> tuple[int, ...]:
    """Layer numbers of a group: a number, "3,5", "all", "intermediate" or "ends".

    Intermediate are the low bars of the paper's Fig. 2 (its text names no layers): of 16, numbers 3-6 and 10-11; in a
    network of another depth, the layers at the same relative depth. Ends are the others.
    """
    if name == "all":
        return tuple(range(1, layers + 1))
    if name in ("ends", "intermediate"):
        depth = [1 + round((layer - 1) * 15 / max(1, layers - 1)) for layer in range(1, layers + 1)]
        middle = tuple(layer for layer, place in enumerate(depth, 1) if place in (3, 4, 5, 6, 10, 11))
        return middle if name == "intermediate" else tuple(n for n in range(1, layers + 1) if n not in middle)
    try:
        numbers = tuple(int(part) for part in name.split(","))
    except ValueError:
        hint = near_match(name, GROUPS)
        raise UserError(f"layers {name!r}: give {', '.join(GROUPS)}, or numbers as 3,4,5.{hint}") from None
    if wrong := [number for number in numbers if not 1 <= number <= layers]:
        raise UserError(f"layer {wrong[0]}: this network has layers 1 to {layers}")
    return numbers


def check_factors(factors: Mapping[str, Any], layers: int) -> None:
    """Raise UserError unless each key of `options.image_scale_factors` names layers and each value is a number."""
    for group, factor in factors.items():
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            raise UserError(f"options.image_scale_factors: {group} = {factor!r}; give a number to multiply λ by")
        try:
            layer_group(group, layers)
        except UserError as error:
            raise UserError(f"options.image_scale_factors: {error}") from None
