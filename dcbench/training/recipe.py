"""Recipes: the stages of a training as data. An unknown key is an error."""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Discriminator, Field, Tag, model_validator

from dcbench.catalogue import Facts, read_toml, validate
from dcbench.errors import UserError, near_match
from dcbench.models.dynamicrafter.config import Config, variant
from dcbench.models.dynamicrafter.load import PACKAGE
from dcbench.training.loop import LoopConfig
from dcbench.training.objective import Conditions, Rebuilding
from dcbench.training.start import Layout

FOLDER = Path(__file__).parent / "recipes"
Role = Literal["context", "spatial", "temporal"]
Part = TypeVar("Part", LoopConfig, Conditions, Rebuilding)


class Data(Facts):
    """Where clips come from."""

    dataset: str
    split: str = "train"
    options: dict[str, Any] = {}
    clips: int = Field(ge=1)  # how many numbered clips there are to draw from
    strides: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    seed: int = 0  # of the choice of clips; a recipe's own seed is of networks and noise
    cache: bool = False  # keep clips in memory and their latents on disk; for small worlds


class Start(Facts):
    """Weights to begin with: a checkpoint file and which parts of the model to take from it."""

    file: str  # `dcbench:tiny/base.safetensors` is one that comes with dcbench
    parts: tuple[Literal["unet", "query_transformer", "autoencoder", "text", "image"], ...]
    layout: Layout = "dynamicrafter"
    keep: tuple[Role, ...] = ()  # roles of parameters that stay as the stages before have made them
    how: str = ""  # where the file comes from

    @property
    def path(self) -> Path:
        shipped = self.file.removeprefix("dcbench:")
        return Path(self.file).expanduser() if shipped == self.file else PACKAGE / shipped


class _Stage(Facts):
    """What every stage says: its name, where it begins, how long and how fast it learns (LoopConfig)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    source: str = ""  # what the paper prints about this stage
    start: tuple[Start, ...] = ()  # files to begin this stage with
    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0)
    muon_lr: float = Field(0.0, ge=0)
    final_lr: float | None = None
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float = 1.0
    accumulate: int = Field(1, ge=1)
    ema: float = Field(0.0, ge=0, lt=1)
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    save_every: int = 500
    log_every: int = 20

    def loop(self) -> LoopConfig:
        return _as(LoopConfig, self)


class _Conditioned(_Stage):
    """A stage in which the U-Net runs: what it is shown (Conditions)."""

    context: Literal["none", "frame", "class_token"] = "frame"
    vdg: Literal["none", "frame", "ends"] = "frame"
    condition_frame: Literal["random", "first"] = "random"
    drop_text: float = 0.05
    drop_image: float = 0.05
    drop_both: float = 0.05
    drop_vdg: float = 0.0
    time_shift: float = Field(1.0, gt=0)

    def conditions(self) -> Conditions:
        return _as(Conditions, self)


class DiffusionStage(_Conditioned):
    """The U-Net or the query transformer learns to remove noise; `train` says which parameters."""

    objective: Literal["diffusion"] = "diffusion"
    train: tuple[Role, ...] = ("context", "spatial")
    single_frames: bool = False
    fixed_image_scale: bool = False
    min_snr: float = 0.0


class AutoencoderStage(_Conditioned):
    """The autoencoder learns to rebuild frames (Rebuilding); conditions are those under which latents are predicted."""

    objective: Literal["autoencoder"]
    kl_weight: float = 1e-6
    detail_weight: float = 0.0
    edge_weight: float = 0.0
    latent_noise: float = 0.0
    decoder_only: bool = False
    predicted_latents: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _predictions_fit(self) -> "AutoencoderStage":
        if self.predicted_latents and not self.decoder_only:
            raise ValueError("predicted_latents needs decoder_only = true: the U-Net knows the latents as they are")
        names = [field.name for field in dataclasses.fields(Conditions)]
        conditions = [name for name in names if getattr(self, name) != type(self).model_fields[name].default]
        if conditions and not self.predicted_latents:
            raise ValueError(f"{', '.join(conditions)}: without predicted_latents the U-Net is not asked")
        return self

    def rebuilding(self) -> Rebuilding:
        return _as(Rebuilding, self)


class ClipStage(_Stage):
    """The two towers of CLIP learn to match frames and captions."""

    objective: Literal["clip"]
    last_frames: float = Field(0.0, ge=0, le=1)


Stage = DiffusionStage | AutoencoderStage | ClipStage


def runs_unet(stage: Stage) -> bool:
    """True for a stage that needs cached latents and the U-Net as trained so far."""
    return isinstance(stage, DiffusionStage) or (isinstance(stage, AutoencoderStage) and stage.predicted_latents > 0)


def trains_decoder_alone(stage: Stage) -> bool:
    return isinstance(stage, AutoencoderStage) and stage.decoder_only


def _as(kind: type[Part], stage: _Stage) -> Part:
    """The fields that a dataclass has, under their names."""
    return kind(**{field.name: getattr(stage, field.name) for field in dataclasses.fields(kind)})


def _objective(stage: Any) -> str:
    return stage.get("objective", "diffusion") if isinstance(stage, Mapping) else stage.objective


AnyStage = Annotated[
    Annotated[DiffusionStage, Tag("diffusion")]
    | Annotated[AutoencoderStage, Tag("autoencoder")]
    | Annotated[ClipStage, Tag("clip")],
    Discriminator(
        _objective,
        custom_error_type="objective",
        custom_error_message="objective must be diffusion, autoencoder or clip",
    ),
]


class Recipe(Facts):
    """A whole training."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    summary: str
    variant: str = "256"
    model: dict[str, Any] = {}  # fields of Config that differ from the variant, nested as there
    seed: int = 0
    data: Data
    start: tuple[Start, ...] = ()
    stages: tuple[AnyStage, ...] = Field(min_length=1)

    def config(self) -> Config:
        values = variant(self.variant).to_dict()
        for name, value in self.model.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
        return Config.from_dict(values)

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise UserError(f"{self.name} has no stage {name!r}.{near_match(name, names)} Its stages: {', '.join(names)}")

    def varied(self, stages: Mapping[str, Mapping[str, Any]], without: Collection[str] = (), **fields: Any) -> "Recipe":
        """This recipe with other `fields`, with changed fields of its stages by name, and `without` some of them."""
        for name in (*stages, *without):
            self.stage(name)
        kept = [stage.model_dump() for stage in self.stages if stage.name not in without]
        changed = [{**stage, **stages.get(stage["name"], {})} for stage in kept]
        return validate({**self.model_dump(), "stages": changed, **fields}, Recipe, str(fields.get("name", self.name)))


class Variation(Facts):
    """A recipe told by what differs from another one."""

    extends: str
    name: str
    summary: str
    start: tuple[Start, ...] | None = None
    data: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    without: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        whole = find_recipe(self.extends)
        data = {**whole.data.model_dump(), **self.data}
        start = whole.start if self.start is None else self.start
        fields = {"name": self.name, "summary": self.summary, "start": start, "data": data}
        return whole.varied(self.stages, self.without, **fields)


def find_recipe(name: str) -> Recipe:
    """A recipe by name, or by the path of a TOML file."""
    if name.endswith(".toml"):
        return _read(Path(name).expanduser())
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    if name not in names:
        raise UserError(
            f"no recipe is called {name!r}.{near_match(name, names)} Known: {', '.join(names)}. "
            "A path of a TOML file works too."
        )
    return _read(FOLDER / f"{name}.toml")


def _read(path: Path) -> Recipe:
    data = read_toml(path)
    if "extends" in data:
        variation: Variation = validate(data, Variation, str(path))
        return variation.recipe()
    return validate(data, Recipe, str(path))
