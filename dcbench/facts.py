"""Strict reading of TOML and JSON. Errors name the file, the key and the nearest allowed key."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Tag, ValidationError

from dcbench.errors import UserError, first_line, near_match
from dcbench.files import read_bytes


class Facts(BaseModel):
    """Base class of data that is read from a file. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def read_facts(path: Path, kind: type[BaseModel]) -> Any:
    """Read and validate a TOML file. UserError names the file, the key and the nearest allowed key."""
    return validate(read_toml(path), kind, str(path))


def find_toml(what: str, name: str, folder: Path, prefix: str = "") -> Path:
    """The TOML file that `name` means: a path with that ending, or a file of `folder`. UserError for another name."""
    if name.endswith(".toml"):
        return Path(name).expanduser()
    known = {path.stem.removeprefix(prefix): path for path in sorted(folder.glob(f"{prefix}*.toml"))}
    if name not in known:
        raise UserError(
            f'no {what} is called "{name}".{near_match(name, known)} Known: {", ".join(known)}. '
            "Or give the path of a TOML file."
        )
    return known[name]


def read_toml(path: Path) -> dict[str, Any]:
    data = read_bytes(path)
    try:
        return tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:  # endless nesting, a number of 5000 digits
        raise UserError(f"{path} is not valid TOML: {first_line(error)}") from error


def validate(data: Mapping[str, Any], kind: type[BaseModel], source: str) -> Any:
    """`data` as a pydantic model; ValidationError becomes one UserError with a line per problem."""
    if not isinstance(data, Mapping):
        raise UserError(f"{source}: expected an object with keys, got {_brief(data)}")
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
            elif problem["type"] == "value_error":  # of our own, which says what was given
                lines.append(f"  {where + ': ' if where else ''}{problem['msg'].removeprefix('Value error, ')}")
            else:
                lines.append(f"  {where}: {problem['msg']} (given: {_brief(problem['input'])})")
        raise UserError("\n".join(lines)) from error


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}...)"


def _fields_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """The keys that are allowed at the location of an error, found through the annotations."""
    models = [("", kind)]
    for part in loc:
        if isinstance(part, int):
            continue
        if len(models) > 1:  # a union: this part is the tag of the chosen member
            models = [found for found in models if found[0] == part] or models[:1]
        elif part in models[0][1].model_fields:
            models = _models_in(models[0][1].model_fields[part].annotation) or models
    return list(models[0][1].model_fields)


def _models_in(annotation: Any, tag: str = "") -> list[tuple[str, type[BaseModel]]]:
    """The models in an annotation, with their tags if it is a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [(tag, annotation)]
    tag = next((item.tag for item in getattr(annotation, "__metadata__", ()) if isinstance(item, Tag)), tag)
    return [found for part in get_args(annotation) for found in _models_in(part, tag)]
