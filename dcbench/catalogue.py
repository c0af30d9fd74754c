"""Cards: what dcbench knows of each model, dataset and metric, read from TOML and validated.

A card is found by name, by alias, or by the path of any TOML file; other packages add cards through the entry-point
groups `dcbench.models`, `dcbench.datasets` and `dcbench.metrics` (an object that is the path of a TOML file or folder).
No torch here: `dcbench list` reads every card in a few milliseconds.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, Tag, ValidationError

from dcbench.errors import UserError, near_match

Scalar = bool | int | float | str
Condition = Literal["image", "prompt", "fps", "frame_stride", "end_image", "reference"]


class Facts(BaseModel):
    """Base of everything read from a file: an unknown key is an error, never ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightSource(Facts):
    """A file of weights: where it comes from, how large it is, and what its licence allows."""

    name: str  # the file's name in the cache
    repository: str = ""  # Hugging Face repository, "owner/name"
    revision: str = ""  # commit of that repository
    file: str = ""  # path inside the repository
    url: str = ""  # for files that lie elsewhere
    sha256: str = ""  # "" = not published
    size: int = 0  # bytes; 0 = unknown
    licence: str = ""
    gated: bool = False  # the repository asks for an account and an agreement
    how: str = ""  # how to get it, where it cannot be fetched


class Published(Facts):
    """A number that somebody printed. Compare only within one protocol tag."""

    dataset: str
    metric: str
    value: float
    protocol: str
    status: Literal["verified", "secondary"] = "verified"
    source: str


class ClipShape(Facts):
    """What a model makes natively."""

    frames: int | None = Field(default=None, ge=1)  # None: as many as asked for
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0)


class Card(Facts):
    """What every card says."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    summary: str
    aliases: tuple[str, ...] = ()
    url: str = ""
    licence: str = ""
    entry_point: str = ""  # "module:function"; "" = not available, `unavailable` says why
    unavailable: str = ""
    options: dict[str, Any] = {}  # what the entry point understands, with defaults
    settable: tuple[str, ...] = ()  # further keys that `--set` may give, such as "options.vdg"; the entry point checks
    weights: tuple[WeightSource, ...] = ()

    @property
    def available(self) -> bool:
        return bool(self.entry_point)


class ModelCard(Card):
    """An image-to-video model. `entry_point(card, runtime) -> ImageToVideo`."""

    conditions_on: tuple[Condition, ...] = ("image", "prompt")
    clip: ClipShape = ClipShape()
    sampling: dict[str, Scalar] = {}  # steps, guidance_scale, ...: defaults, with their published source in a comment
    published: tuple[Published, ...] = ()


class DatasetCard(Card):
    """A dataset. `entry_point(card, root, options) -> Dataset`."""

    protocol: str = "smoke"  # the protocol that `dcbench run` takes when none is named
    needs_files: bool = True
    videos: int = 0
    size: str = ""  # of the download
    layout: str = ""  # what dcbench expects below the dataset's root


class MetricCard(Card):
    """A metric. `entry_point(card, runtime)` builds it; see metrics/base.py."""

    kind: Literal["set", "per_clip"]
    higher_is_better: bool | None = None  # None (TOML: left out): neither; a value to read beside others
    extractor: str = ""
    needs: tuple[Literal["image", "prompt", "reference"], ...] = ()
    default: bool = True  # part of a run that names no metrics


CardT = TypeVar("CardT", bound=Card)
Kind = Literal["models", "datasets", "metrics"]
_TYPES: dict[str, type[Card]] = {"models": ModelCard, "datasets": DatasetCard, "metrics": MetricCard}
_PACKAGE = Path(__file__).parent


def read_facts(path: Path, kind: type[BaseModel]) -> Any:
    """A validated TOML file; errors name the file, the key and the nearest allowed key."""
    return validate(read_toml(path), kind, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}") from error


def validate(data: Mapping[str, Any], kind: type[BaseModel], source: str) -> Any:
    """`data` as a pydantic model; ValidationError becomes one UserError with a line per problem."""
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        lines = [f"{source}: {len(error.errors())} problem(s)"]
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                allowed = _fields_at(kind, problem["loc"][:-1])
                hint = near_match(str(problem["loc"][-1]), allowed)
                lines.append(f"  {where}: unknown key.{hint} Allowed here: {', '.join(sorted(allowed))}.")
            else:
                lines.append(f"  {where}: {problem['msg']} (given: {problem['input']!r})")
        raise UserError("\n".join(lines)) from error


def _fields_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that a nested model allows, found by walking the annotations along an error's location."""
    models = [("", kind)]
    for part in loc:
        if isinstance(part, int):
            continue
        if len(models) > 1:  # a union: this part is the tag of the member that was chosen
            models = [found for found in models if found[0] == part] or models[:1]
        elif part in models[0][1].model_fields:
            models = _models_in(models[0][1].model_fields[part].annotation) or models
    return list(models[0][1].model_fields)


def _models_in(annotation: Any, tag: str = "") -> list[tuple[str, type[BaseModel]]]:
    """The models that an annotation is made of, with their tags in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(tag, annotation)]
    tag = next((item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)), tag)
    return [found for part in get_args(annotation) for found in _models_in(part, tag)]


def _card_folder(kind: Kind) -> Path:
    if kind == "metrics":
        return _PACKAGE / "metrics" / "cards"
    installed = _PACKAGE / "_catalogue" / kind  # in a wheel; a checkout has the folder at its top
    return installed if installed.is_dir() else _PACKAGE.parent / kind


@cache
def cards(kind: Kind) -> dict[str, Card]:
    """Every card of a kind by name, sorted; two cards that claim one name or alias are an error."""
    paths = sorted(_card_folder(kind).glob("*.toml"))
    for entry in sorted(importlib.metadata.entry_points(group=f"dcbench.{kind}"), key=lambda entry: entry.name):
        given = Path(str(entry.load()))
        paths += sorted(given.glob("*.toml")) if given.is_dir() else [given]
    found: dict[str, Card] = {}
    claimed: dict[str, Path] = {}
    for path in paths:
        card: Card = read_facts(path, _TYPES[kind])
        for name in (card.name, *card.aliases):
            if name.lower() in claimed:
                raise UserError(f'{path}: the name "{name}" is taken by {claimed[name.lower()]}; choose another')
            claimed[name.lower()] = path
        found[card.name] = card
    return dict(sorted(found.items()))


def _find(kind: Kind, name: str) -> Any:
    if name.endswith(".toml"):
        return read_facts(Path(name).expanduser(), _TYPES[kind])
    known = cards(kind)
    wanted = name.lower()
    for card in known.values():
        if wanted in {card.name.lower(), *(alias.lower() for alias in card.aliases)}:
            return card
    names = [alias.lower() for card in known.values() for alias in (card.name, *card.aliases)]
    raise UserError(
        f'no {kind.removesuffix("s")} is called "{name}".{near_match(name, names)} '
        f"Known: {', '.join(known)}. A path of a TOML card works too."
    )


def find_model(name: str) -> ModelCard:
    """A card by name, alias or path; a folder of clips, or `file.py:Class`, gives a card of its own."""
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _own_model(Path(path).expanduser(), attribute)
    if Path(name).expanduser().is_dir() and name not in cards("models"):
        folder = Path(name).expanduser()
        card: ModelCard = _find("models", "videos")
        options = card.options | {"folder": str(folder.resolve())}
        return card.model_copy(update={"name": slug(folder.resolve().name), "title": folder.name, "options": options})
    return _find("models", name)


def _own_model(path: Path, attribute: str) -> ModelCard:
    """A card for a class in the user's own file; the file's hash is in it, so a changed model is another run."""
    if not path.is_file():
        raise UserError(f"--model {path}:{attribute}: there is no such file")
    return ModelCard(
        name=slug(attribute),
        title=attribute,
        summary=f"{attribute} in {path.name}",
        entry_point=f"{path.resolve()}:{attribute}",
        options={"source_sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
    )


def slug(text: str) -> str:
    """A name that a card, a file and a URL can carry."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in text.lower())
    return kept.strip("._-") or "model"


def find_dataset(name: str) -> DatasetCard:
    return _find("datasets", name)


def find_metric(name: str) -> MetricCard:
    return _find("metrics", name)


def published_rows(dataset: str, metrics: list[str]) -> Iterator[tuple[ModelCard, Published]]:
    """Published numbers of every model card on one dataset."""
    for card in cards("models").values():
        assert isinstance(card, ModelCard)
        for row in card.published:
            if row.dataset == dataset and row.metric in metrics:
                yield card, row


def load_entry_point(card: Card) -> Callable[..., Any]:
    """Import what `card.entry_point` names."""
    if not card.available:
        raise UserError(f"{card.name} is not available: {card.unavailable or 'its card names no entry_point'}")
    module, _, attribute = card.entry_point.rpartition(":")
    try:
        return getattr(
            _import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), attribute
        )
    except (ImportError, AttributeError, ValueError, SyntaxError) as error:
        raise UserError(f'{card.name}: entry_point "{card.entry_point}" cannot be loaded: {error}') from error


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickles look their module up there
    spec.loader.exec_module(module)
    return module


def with_overrides(card: CardT, settings: list[str]) -> CardT:
    """The card with `key.path=value` applied (`--set sampling.steps=25`); only keys that the card has may be set."""
    data = card.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f'--set takes key=value, for example "sampling.steps=25"; got "{setting}"')
        *parents, last = key.strip().split(".")
        table = data
        for parent in parents:
            table = table.get(parent) if isinstance(table, dict) else None
        if isinstance(table, dict) and last not in table and key.strip() in card.settable:
            table[last] = None
        if not isinstance(table, dict) or last not in table:
            allowed = [f"{name}.{inner}" for name in ("sampling", "options", "clip") for inner in data.get(name) or {}]
            allowed += card.settable
            raise UserError(
                f"--set {key}: {card.name} has no such key.{near_match(key, allowed)} "
                f"Its keys: {', '.join(allowed) or 'none'}."
            )
        table[last] = _like(table[last], text.strip(), key)
    return validate(data, type(card), f"{card.name} with --set")


def _like(old: Any, text: str, key: str) -> Any:
    """The text as a TOML value of the same type as the card's own; a string needs no quotes."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if isinstance(old, str):
        return value if isinstance(value, str) else text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if old is not None and type(value) is not type(old):
        raise UserError(f"--set {key}={text}: expected {type(old).__name__}, such as {old!r}")
    return value
