"""Recipes: the stages of a training, read from TOML. An unknown key is an error."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from dcbench.catalogue import find_dataset
from dcbench.datasets.base import find_root, load_dataset
from dcbench.errors import UserError, near_match
from dcbench.facts import Facts, find_toml, read_toml, validate
from dcbench.models.dynamicrafter.config import Config, variant
from dcbench.models.dynamicrafter.load import PACKAGE
from dcbench.training.data import ClipPool
from dcbench.training.loop import LoopConfig
from dcbench.training.objective import Conditions, Rebuilding
from dcbench.training.start import Layout

FOLDER = Path(__file__).parent / "recipes"
Role = Literal["context", "spatial", "temporal"]


class Data(Facts):
    """The data set, and the clips to draw from it."""

    dataset: str
    split: str = "train"
    options: dict[str, Any] = {}
    clips: int = Field(ge=1)  # number of clips to draw from
    strides: tuple[int, ...] = (1, 2, 3, 4, 5, 6)
    seed: int = 0  # chooses the clips; the seed of the recipe is that of networks and noise
    cache: bool = False  # keep clips in memory and their latents on disk; for small data sets

    def pool(self, cfg: Config, root: Path | None) -> ClipPool:
        """The clips, at the size and length that a model takes. `root`: where the data set lies, see `find_root`."""
        card = find_dataset(self.dataset)
        items = load_dataset(card, find_root(card, root), self.options).items(self.split)
        if not items:
            raise UserError(f"{card.name}: the split {self.split!r} is empty")
        return ClipPool(items, cfg.num_frames, self.strides, cfg.height, cfg.width, self.clips, self.seed)


class Start(Facts):
    """Weights to begin with: a checkpoint file, and the parts of the model to take from it."""

    file: str  # a path; `dcbench:tiny/base.safetensors` comes with dcbench
    parts: tuple[Literal["unet", "query_transformer", "autoencoder", "text", "image"], ...]
    layout: Layout = "dynamicrafter"
    keep: tuple[Role, ...] = ()  # roles of parameters that stay as earlier stages have learned them
    how: str = ""  # where to get the file; shown when it is missing

    @property
    def path(self) -> Path:
        shipped = self.file.removeprefix("dcbench:")
        return Path(self.file).expanduser() if shipped == self.file else PACKAGE / shipped


class _Stage(LoopConfig):
    """What every stage has beside the fields of LoopConfig."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    source: str = ""  # what the paper prints about this stage
    start: tuple[Start, ...] = ()  # files to begin this stage with
    parts: ClassVar[tuple[str, ...]] = ()  # parts of the model that the stage can change


class DiffusionStage(_Stage, Conditions):
    """The U-Net or the query transformer learns to remove noise; `train` says which parameters."""

    objective: Literal["diffusion"] = "diffusion"
    train: tuple[Role, ...] = ("context", "spatial")
    single_frames: bool = False  # images in place of clips
    fixed_image_scale: bool = False  # λ is not trained
    min_snr: float = 0.0  # > 0: weight of the loss, see DiffusionTask
    parts: ClassVar[tuple[str, ...]] = ("unet", "query_transformer")


class AutoencoderStage(_Stage, Conditions, Rebuilding):
    """The autoencoder learns to rebuild frames. The conditions are those under which the U-Net predicts latents."""

    objective: Literal["autoencoder"]
    parts: ClassVar[tuple[str, ...]] = ("autoencoder",)

    @model_validator(mode="after")
    def _predictions_fit(self) -> "AutoencoderStage":
        if self.predicted_latents and not self.decoder_only:
            raise ValueError("predicted_latents needs decoder_only = true: the U-Net knows the latents as they are")
        conditions = [name for name, field in Conditions.model_fields.items() if getattr(self, name) != field.default]
        if conditions and not self.predicted_latents:
            raise ValueError(f"{', '.join(conditions)}: without predicted_latents the U-Net is not asked")
        return self


class ClipStage(_Stage):
    """The two towers of CLIP learn to match frames and captions."""

    objective: Literal["clip"]
    last_frames: float = Field(default=0.0, ge=0, le=1)  # share of clips whose last frame is shown
    parts: ClassVar[tuple[str, ...]] = ("text", "image")


Stage = DiffusionStage | AutoencoderStage | ClipStage


def runs_unet(stage: Stage) -> bool:
    """True for a stage that needs latents, and the U-Net as trained so far."""
    return isinstance(stage, DiffusionStage) or (isinstance(stage, AutoencoderStage) and stage.predicted_latents > 0)


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
    """A whole training: a model, its data, and the stages in their order."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    summary: str
    variant: str = "256"
    model: dict[str, Any] = {}  # fields of Config that differ from the variant, nested as there
    seed: int = 0
    data: Data
    start: tuple[Start, ...] = ()
    stages: tuple[AnyStage, ...] = Field(min_length=1)

    def config(self) -> Config:
        """The configuration of the model, before the first stage."""
        values = variant(self.variant).to_dict()
        for name, value in self.model.items():
            values[name] = {**values[name], **value} if isinstance(value, dict) and name in values else value
        return Config.from_dict(values)

    def stage(self, name: str) -> Stage:
        """The stage of this name; UserError with a near match if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [stage.name for stage in self.stages]
        raise UserError(f"{self.name} has no stage {name!r}.{near_match(name, names)} Its stages: {', '.join(names)}")

    def before(self, stage: Stage) -> tuple[Stage, ...]:
        """The stages that come earlier than this one."""
        return self.stages[: self.stages.index(stage)]

    def varied(self, stages: Mapping[str, Mapping[str, Any]], without: Collection[str] = (), **fields: Any) -> "Recipe":
        """This recipe with other `fields`, with changed fields of the named stages, `without` some of its stages.

        Raises UserError for a stage that the recipe does not have, and for an unknown or wrong field.
        """
        for name in (*stages, *without):
            self.stage(name)
        kept = [stage.model_dump() for stage in self.stages if stage.name not in without]
        changed = [{**stage, **stages.get(stage["name"], {})} for stage in kept]
        return validate({**self.model_dump(), "stages": changed, **fields}, Recipe, str(fields.get("name", self.name)))


class Variation(Facts):
    """A recipe file that says only what differs from another recipe (`extends`)."""

    extends: str
    name: str
    summary: str
    variant: str | None = None
    start: tuple[Start, ...] | None = None
    data: dict[str, Any] = {}
    stages: dict[str, dict[str, Any]] = {}
    without: tuple[str, ...] = ()

    def recipe(self) -> Recipe:
        whole = find_recipe(self.extends)
        data = {**whole.data.model_dump(), **self.data}
        start = whole.start if self.start is None else self.start
        fields = {"name": self.name, "summary": self.summary, "start": start, "data": data}
        fields["variant"] = whole.variant if self.variant is None else self.variant
        return whole.varied(self.stages, self.without, **fields)


def find_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one by the path of a TOML file. Raises UserError for an unknown name or field."""
    path = find_toml("recipe", name, FOLDER)
    data = read_toml(path)
    if "extends" in data:
        variation: Variation = validate(data, Variation, str(path))
        return variation.recipe()
    return validate(data, Recipe, str(path))
