"""Suites: a model in several arms on the same clips, one table beside the paper's column.

An arm changes how a checkpoint is sampled (knock-outs, λ, sampling settings), names a folder of finished clips, or is
trained from a shared base. Suites are TOML files; the shipped ones lie beside this module.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dcbench.catalogue import Facts, ModelCard, load_entry_point, read_facts
from dcbench.errors import UserError, near_match
from dcbench.models.base import ImageToVideo, Runtime

FOLDER = Path(__file__).parent


class Arm(Facts):
    """One row of the table."""

    name: str
    group: str = ""
    meaning: str = ""
    x: float | None = None  # place on the axis of the suite's curves
    options: dict[str, Any] = {}  # of the model's card
    sampling: dict[str, Any] = {}
    image_scale: dict[str, float] = {}  # layer group or number -> factor on its λ
    frame_stride: int | None = Field(default=None, ge=1)
    clips: str = ""  # a folder of clips that some other program made
    stages: dict[str, dict[str, Any]] = {}  # training: fields of the recipe's stages that differ
    without: tuple[str, ...] = ()  # training: stages left out
    published: dict[str, float] = {}


class Suite(Facts):
    """Arms and what they share."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    kind: Literal["inference", "training"] = "inference"
    note: str = ""  # stands above the table: what the arms are, and what they are not
    published: str = ""  # the heading of the paper's columns
    x_label: str = ""
    recipe: str = ""  # training: the recipe that the arms vary
    shared: str = ""  # training: its last stage that all arms have in common; none: they share the files it begins with
    stages: dict[str, dict[str, Any]] = {}  # training: fields of the recipe's stages that differ in every arm
    held_out_clips: int = Field(default=64, ge=1)
    metrics: tuple[str, ...] = ("fvd", "pic", "ssim_image", "motion")  # SSIM where DreamSim's weights are missing
    arms: tuple[Arm, ...] = Field(min_length=1)
    baseline: str = ""  # the arm that the others are compared with, clip by clip; none: the first

    @property
    def baseline_arm(self) -> str:
        return self.baseline or self.arms[0].name


def suites() -> dict[str, Path]:
    return {path.stem.removeprefix("suite-"): path for path in sorted(FOLDER.glob("suite-*.toml"))}


def find_suite(name: str) -> Suite:
    """A suite by name, or by the path of a TOML file."""
    if name.endswith(".toml"):
        return _checked(read_facts(Path(name).expanduser(), Suite))
    known = suites()
    if name not in known:
        raise UserError(
            f"no suite is called {name!r}.{near_match(name, known)} Known: {', '.join(known)}. "
            "A path of a TOML file works too."
        )
    return _checked(read_facts(known[name], Suite))


def _checked(suite: Suite) -> Suite:
    names = [arm.name for arm in suite.arms]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"suite {suite.name}: two arms are called {', '.join(double)}")
    if suite.baseline_arm not in names:
        hint = near_match(suite.baseline, names)
        raise UserError(f"suite {suite.name}: baseline {suite.baseline!r} is no arm.{hint} Arms: {', '.join(names)}")
    if suite.kind == "training" and not suite.recipe:
        raise UserError(f"suite {suite.name}: a training suite names its `recipe`")
    return suite


# ---- arms that change how a checkpoint is sampled

GROUPS = ("all", "ends", "intermediate")


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


def arm_card(card: ModelCard, arm: Arm) -> ModelCard:
    """The model's card with the arm's options; λ factors ride in the card too, so that a run's plan records them."""
    options = {**card.options, **arm.options}
    changes: dict[str, Any] = {"options": options, "sampling": {**card.sampling, **arm.sampling}}
    factors = {group: factor for group, factor in arm.image_scale.items() if factor != 1}
    if factors:  # all 1: the model as it is, and one run for every such arm
        changes["options"] = {**options, "probed": card.entry_point, "image_scale_factors": factors}
        changes["entry_point"] = f"{__name__}:load_scaled"
    return card.model_copy(update=changes)


def load_scaled(card: ModelCard, runtime: Runtime) -> ImageToVideo:
    """Entry point: the model of `options.probed` with λ multiplied by `options.image_scale_factors`."""
    options = dict(card.options)
    factors, entry_point = options.pop("image_scale_factors"), options.pop("probed")
    inner = card.model_copy(update={"options": options, "entry_point": entry_point})
    model = load_entry_point(inner)(inner, runtime)
    scale = getattr(model, "image_scale", None)
    if scale is None:
        raise UserError(f"{card.name} has no λ to change: it is no DynamiCrafter")
    learned = scale.values()
    for group, factor in factors.items():
        for layer in layer_group(group, len(scale)):
            scale[layer] = learned[layer - 1] * factor
    return model
