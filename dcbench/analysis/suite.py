"""Suites: several arms of a model on the same clips, in one table with the paper's numbers.

An arm changes how a checkpoint is sampled (knock-outs, λ, sampling settings), or is a folder of finished clips, or is
trained from a shared base. Suites are TOML files; those of dcbench are in the folder of this module.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dcbench.catalogue import ModelCard
from dcbench.errors import UserError, near_match
from dcbench.facts import Facts, find_toml, read_facts

FOLDER = Path(__file__).parent


class Arm(Facts):
    """One row of the table."""

    name: str
    group: str = ""
    meaning: str = ""
    x: float | None = None  # position on the x axis of the suite's curves
    options: dict[str, Any] = {}  # that differ from those of the model's card
    sampling: dict[str, Any] = {}  # settings that differ from those of the card
    image_scale: dict[str, float] = {}  # layer group or number -> factor on its λ
    frame_stride: int | None = Field(default=None, ge=1)
    clips: str = ""  # a folder of clips that some other program made
    stages: dict[str, dict[str, Any]] = {}  # training: changed fields of the recipe's stages
    without: tuple[str, ...] = ()  # training: stages left out
    published: dict[str, float] = {}


class Suite(Facts):
    """Arms and their common settings."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str
    kind: Literal["inference", "training"] = "inference"
    note: str = ""  # printed above the table: what the arms show and do not show
    published: str = ""  # the heading of the paper's columns
    x_label: str = ""
    recipe: str = ""  # training: the recipe that the arms vary
    shared: str = ""  # training: the last stage that all arms share; "": they share the recipe's start files only
    stages: dict[str, dict[str, Any]] = {}  # training: changed fields of the recipe's stages, for every arm
    held_out_clips: int = Field(default=64, ge=1)
    metrics: tuple[str, ...] = ("fvd", "pic", "ssim_image", "motion")  # ssim_image needs no weights, PIC does
    arms: tuple[Arm, ...] = Field(min_length=1)
    baseline: str = ""  # the arm that the others are compared with, clip by clip; "": the first

    @property
    def baseline_arm(self) -> str:
        return self.baseline or self.arms[0].name


def suites() -> dict[str, Path]:
    return {path.stem.removeprefix("suite-"): path for path in sorted(FOLDER.glob("suite-*.toml"))}


def find_suite(name: str) -> Suite:
    """A suite by name, or by the path of a TOML file."""
    return _checked(read_facts(find_toml("suite", name, FOLDER, prefix="suite-"), Suite))


def _checked(suite: Suite) -> Suite:
    names = [arm.name for arm in suite.arms]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"suite {suite.name}: two arms are called {', '.join(double)}")
    if suite.baseline_arm not in names:
        hint = near_match(suite.baseline, names)
        raise UserError(f"suite {suite.name}: baseline {suite.baseline!r} is unknown.{hint} Arms: {', '.join(names)}")
    if suite.kind == "training" and not suite.recipe:
        raise UserError(f"suite {suite.name}: a training suite needs a `recipe`")
    if suite.kind == "training" and (scaled := [arm.name for arm in suite.arms if arm.image_scale]):
        raise UserError(f"suite {suite.name}: arm {scaled[0]!r} is trained, so it cannot have `image_scale`")
    return suite


# ---- arms that change how a checkpoint is sampled


def arm_card(card: ModelCard, arm: Arm) -> ModelCard:
    """The model's card with the arm's options, sampling and λ factors, so that the plan of the run contains them.

    UserError for λ factors of a model that is not a DynamiCrafter.
    """
    options = {**card.options, **arm.options}
    if factors := {group: factor for group, factor in arm.image_scale.items() if factor != 1}:
        if not card.entry_point.startswith("dcbench.models.dynamicrafter."):
            raise UserError(f"{card.name} has no λ to change: it is not a DynamiCrafter")
        options["image_scale_factors"] = factors  # no factors of 1: arms that change nothing share one request
    return card.model_copy(update={"options": options, "sampling": {**card.sampling, **arm.sampling}})
