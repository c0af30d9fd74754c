"""Cards: the facts of each model, dataset and metric, read from TOML and validated.

A card is found by name, by alias, or by the path of a TOML file. Other packages add cards through the entry-point
groups `dcbench.models`, `dcbench.datasets` and `dcbench.metrics`: the object is the path of a TOML file or folder.
This module does not import torch, so `dcbench list` reads every card in a few milliseconds.
"""

import importlib
import importlib.metadata
import importlib.util
import re
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from pydantic import Field

from dcbench.errors import UserError, as_text, first_line, near_match
from dcbench.facts import Facts, read_facts, validate
from dcbench.files import cache_dir, digest, not_a_whole_disk, optional_cache, read_json, sha256_file, write_json

Scalar = bool | int | float | str
Condition = Literal["image", "prompt", "fps", "frame_stride", "end_image", "reference"]


class WeightSource(Facts):
    """A weight file: its source, size and licence."""

    name: str  # the file's name in the cache
    repository: str = ""  # Hugging Face repository, "owner/name"
    revision: str = ""  # commit of that repository
    file: str = ""  # path inside the repository
    url: str = ""  # for files that lie elsewhere
    sha256: str = ""  # or its first digits, as in the names of PyTorch's files; "" = not published
    size: int = 0  # bytes; 0 = unknown
    licence: str = ""
    gated: bool = False  # the repository needs an account and an agreement
    how: str = ""  # how to get it, if it cannot be fetched

    @property
    def is_pinned(self) -> bool:
        """Whether the card names the one file that fits. Otherwise its first use decides (dcbench.trust)."""
        return len(self.sha256) == 64

    def fits(self, sha256: str) -> bool:
        """Whether a file with this hash may be the file of the card."""
        return sha256.startswith(self.sha256)


class Published(Facts):
    """A published number. Compare it only within one protocol tag.

    `status`: "verified" was read in the table or the words of those who measured it. "secondary" is another's run or
    another paper's quotation. "quoted" was read in a transcription or a README, not in the paper's own table.
    """

    dataset: str
    metric: str
    value: float
    protocol: str
    status: Literal["verified", "secondary", "quoted"] = "verified"
    source: str


class ClipShape(Facts):
    """The native clip of a model."""

    frames: int | None = Field(default=None, ge=1)  # None: any number
    height: int | None = Field(default=None, ge=1)
    width: int | None = Field(default=None, ge=1)
    fps: float | None = Field(default=None, gt=0)


class Card(Facts):
    """The fields that all cards have."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    summary: str
    aliases: tuple[str, ...] = ()
    url: str = ""
    licence: str = ""
    entry_point: str = ""  # "module:function"; "" = not available, `unavailable` says why
    unavailable: str = ""
    options: dict[str, Any] = {}  # the entry point's options and their defaults
    settable: tuple[
        str, ...
    ] = ()  # other keys that `--set` accepts: "options.vdg", "sampling.*"; the entry point checks
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

    protocol: str = "smoke"  # the default protocol of `dcbench run`
    needs_files: bool = True
    takes_list: bool = False  # --data may be a list of the items, not only the folder
    videos: int = 0
    size: str = ""  # of the download
    layout: str = ""  # the files that dcbench expects in the dataset's root
    metrics: tuple[str, ...] = ()  # metrics that need this dataset's `truth`; suites add them


class MetricCard(Card):
    """A metric. `entry_point(card, runtime)` builds a `Metric`; see metrics/base.py."""

    kind: Literal["set", "per_clip"]
    higher_is_better: bool | None = None  # None (in TOML: left out): neither
    extractor: str = ""
    needs: tuple[
        Literal["image", "picture", "prompt", "reference", "fps", "siblings", "truth", "takes"], ...
    ] = ()  # of a case
    of_reference: bool = False  # per clip: also measured on the reference clips, for comparison
    default: bool = True  # used if a run names no metrics
    dimension: str = ""  # of a suite such as VBench: see `Metric.counts`


ENTRY_POINT = re.compile(r"([A-Za-z_]\w*(\.[A-Za-z_]\w*)*|[^\0]+\.py):[A-Za-z_]\w*")
WITH_OPTIONS = re.compile(r"(?P<name>[^()]+)\((?P<options>[^()]*)\)")
CODE_OPTIONS = frozenset({"command", "python", "cwd", "environment"})  # they say what is run: never from a record
NO_MODULES = frozenset(sys.stdlib_module_names)  # os:system and builtins:eval are no models

CardT = TypeVar("CardT", bound=Card)
Kind = Literal["models", "datasets", "metrics"]
_TYPES: dict[str, type[Card]] = {"models": ModelCard, "datasets": DatasetCard, "metrics": MetricCard}
_PACKAGE = Path(__file__).parent


def _card_folder(kind: Kind) -> Path:
    if kind == "metrics":
        return _PACKAGE / "metrics" / "cards"
    installed = _PACKAGE / "_catalogue" / kind  # in a wheel; a checkout has the folder at its top
    return installed if installed.is_dir() else _PACKAGE.parent / kind


@cache
def cards(kind: Kind) -> dict[str, Card]:
    """Every card of a kind by name, sorted. UserError if two cards share a name or alias."""
    paths = sorted(_card_folder(kind).glob("*.toml"))
    for entry in sorted(importlib.metadata.entry_points(group=f"dcbench.{kind}"), key=lambda entry: entry.name):
        given = Path(str(entry.load()))
        paths += sorted(given.glob("*.toml")) if given.is_dir() else [given]
    found: dict[str, Card] = {}
    claimed: dict[str, Path] = {}
    for path in paths:
        card = _read_card(path, kind)
        for name in (card.name, *card.aliases):
            if name.lower() in claimed:
                raise UserError(f'{path}: the name "{name}" is taken by {claimed[name.lower()]}; choose another')
            claimed[name.lower()] = path
        found[card.name] = card
    return dict(sorted(found.items()))


def _read_card(path: Path, kind: Kind) -> Any:
    """The card in a file. The path of an entry point `file.py:name` is relative to the card, or absolute."""
    card: Card = read_facts(path, _TYPES[kind])
    module, _, attribute = card.entry_point.rpartition(":")
    beside = (path.parent / module).resolve()
    if module.endswith(".py") and beside.is_file():
        card = card.model_copy(update={"entry_point": f"{beside}:{attribute}"})
    return card


def _find(kind: Kind, name: str) -> Any:
    if name.endswith(".toml"):
        return _read_card(Path(name).expanduser(), kind)
    known = cards(kind)
    wanted = name.lower()
    for card in known.values():
        if wanted in {card.name.lower(), *(alias.lower() for alias in card.aliases)}:
            return card
    names = [alias.lower() for card in known.values() for alias in (card.name, *card.aliases)]
    raise UserError(
        f'no {kind.removesuffix("s")} is called "{name}".{near_match(name, names)} '
        f"Known: {', '.join(known)}. The path of a TOML card works too."
    )


def find_model(name: str) -> ModelCard:
    """A card by name, alias or path. A folder of clips, or `file.py:Class`, gives a new card."""
    if not name or "\0" in name:
        raise UserError(f"--model {name!r}: give a name, a card.toml, file.py:Class, or a folder of clips")
    path, _, attribute = name.rpartition(":")
    if path.endswith(".py"):
        return _own_model(Path(path).expanduser(), attribute)
    if Path(name).expanduser().is_dir() and name not in cards("models"):
        folder = not_a_whole_disk(Path(name).expanduser())
        card: ModelCard = _find("models", "videos")
        options = card.options | {"folder": str(folder.resolve())}
        return card.model_copy(
            update={"name": slug(folder.resolve().name), "title": as_text(folder.name), "options": options}
        )
    return _find("models", name)


def _own_model(path: Path, attribute: str) -> ModelCard:
    """A card for a class in the user's own file. It contains the file's hash, so a changed file is another run."""
    if not path.is_file():
        raise UserError(f"--model {path}:{attribute}: there is no such file")
    return ModelCard(
        name=slug(attribute),
        title=attribute,
        summary=f"{attribute} in {path.name}",
        entry_point=f"{path.resolve()}:{attribute}",
        options={"source_sha256": sha256_file(path)},
    )


def slug(text: str) -> str:
    """Turn text into a name that is valid in a card, a file name and a URL."""
    kept = "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in text.lower())
    return kept.strip("._-") or "model"


def find_dataset(name: str) -> DatasetCard:
    """A card by name, alias or path. A path was given on the command line: its card is remembered, see `known_card`."""
    card = _find("datasets", name)
    if name.endswith(".toml"):
        _remember(card, Path(name))
    return card


def find_metric(name: str) -> MetricCard:
    """A card by name, alias or path; with other options: "lpips(net=vgg, frames=middle)"."""
    given = WITH_OPTIONS.fullmatch(name)
    if given is None:
        return _find("metrics", name)
    settings = [setting.strip() for setting in given["options"].split(",") if setting.strip()]
    if wrong := [setting for setting in settings if "=" not in setting]:
        raise UserError(f'"{name}": {wrong[0]} is no option; expected name(option=value)')
    return with_overrides(_find("metrics", given["name"].strip()), [f"options.{setting}" for setting in settings], "")


def known_card(kind: Kind, recorded: dict[str, Any]) -> Any:
    """This machine's card of the name that a record contains, or None. Code that a record names is not run.

    Known are the installed cards, and the files that an earlier command line of this user named.
    """
    name = str(recorded.get("name"))
    if name in cards(kind):
        return cards(kind)[name]
    file = _memory(recorded)
    path = Path(str(read_json(file).get("card"))) if file.is_file() else None
    return _read_card(path, kind) if path and path.is_file() else None


def _remember(card: Card, path: Path) -> None:
    """Store the path of a user's card on this machine."""
    with optional_cache():
        write_json(_memory(card.model_dump(mode="json")), {"card": str(path.expanduser().resolve())})


def _memory(card: dict[str, Any]) -> Path:
    return cache_dir() / "cards" / f"{digest(card, 32)}.json"


def load_entry_point(card: Card) -> Callable[..., Any]:
    """Import the object `card.entry_point`. UserError if it cannot be loaded.

    This runs code. Call it only with a card of this machine, or with one that was given on the command line.
    """
    if not card.available:
        raise UserError(f"{card.name} is not available: {card.unavailable or 'its card names no entry_point'}")
    module, _, attribute = card.entry_point.rpartition(":")
    named = f'{card.name}: entry_point "{card.entry_point}"'
    if not ENTRY_POINT.fullmatch(card.entry_point) or module.split(".")[0] in NO_MODULES:
        raise UserError(f"{named} is not allowed; expected package.module:name or file.py:name, code of your own")
    try:
        found = getattr(
            _import_file(Path(module)) if module.endswith(".py") else importlib.import_module(module), attribute
        )
    except Exception as error:  # the code of a user may raise anything
        raise UserError(f"{named} cannot be loaded: {type(error).__name__}: {first_line(error)}") from error
    if not callable(found):
        raise UserError(f"{named} is a {type(found).__name__}; expected a function or a class")
    return found


def source_sha256(card: Card) -> str:
    """sha256 of the file with a card's code; "" for dcbench's own code, or without a file."""
    module = card.entry_point.rpartition(":")[0]
    if not module or module.split(".")[0] == "dcbench":
        return ""
    if module.endswith(".py"):
        return sha256_file(Path(module))
    spec = importlib.util.find_spec(module)
    return sha256_file(Path(spec.origin)) if spec and spec.origin and Path(spec.origin).is_file() else ""


def _import_file(path: Path) -> ModuleType:
    name = f"dcbench_own_{path.stem}"  # a file may be called json.py or torch.py
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look their module up there
    spec.loader.exec_module(module)
    return module


def with_overrides(card: CardT, settings: list[str], how: str = "--set ") -> CardT:
    """The card with `key.path=value` applied (`--set sampling.steps=25`). UserError for a key that the card lacks.

    `how`: the word of the command line that gave them, for errors.
    """
    data = card.model_dump()
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise UserError(f'--set takes key=value, for example "sampling.steps=25"; got "{setting}"')
        *parents, last = key.strip().split(".")
        table = data
        for parent in parents:
            table = table.get(parent) if isinstance(table, dict) else None
        open_table = ".".join([*parents, "*"])
        if isinstance(table, dict) and last not in table and {key.strip(), open_table} & {*card.settable}:
            table[last] = None
        if not isinstance(table, dict) or last not in table:
            allowed = [f"{name}.{inner}" for name in ("sampling", "options", "clip") for inner in data.get(name) or {}]
            allowed += card.settable
            raise UserError(
                f"{how}{key}: {card.name} has no such key.{near_match(key, allowed)} "
                f"Its keys: {', '.join(allowed) or 'none'}."
            )
        table[last] = _like(table[last], text.strip(), f"{how}{key}")
    return validate(data, type(card), f"{card.name} with {', '.join(settings)}")


def _like(old: Any, text: str, key: str) -> Any:
    """Read the text as a TOML value of the type of `old`. A string needs no quotes. UserError for another type."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if isinstance(old, str):
        return value if isinstance(value, str) else text
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if old is not None and type(value) is not type(old):
        raise UserError(f"{key}={text}: expected {type(old).__name__}, such as {old!r}")
    return value
