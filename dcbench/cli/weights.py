"""`dcbench weights`: list, fetch and verify the weight files of models and metrics."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dcbench.catalogue import WeightSource, cards, find_metric, find_model
from dcbench.errors import UserError

weights = typer.Typer(no_args_is_help=True, help="Weight files: what is needed, fetch, verify.")
Name = Annotated[str, typer.Argument(help="A model or a metric.")]


def _find(name: str) -> Any:
    """The card of a metric, or else of a model. UserError if it has no weights."""
    metrics = {known for card in cards("metrics").values() for known in (card.name, *card.aliases)}
    card = find_metric(name) if name.lower() in metrics else find_model(name)
    if not card.weights:
        raise UserError(f"{card.name} has no weights of its own; `dcbench weights list` shows which models have")
    return card


def _is_repository(source: WeightSource) -> bool:
    """Whether it is a whole repository of the hub (a diffusers pipeline), not one file."""
    return bool(source.repository) and not source.file


def _place(source: WeightSource) -> Path | None:
    """The local path of the weights, or None. A repository may be only partly downloaded."""
    if not _is_repository(source):
        from dcbench.weights import find

        return find(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source.repository, revision=source.revision or None, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


@weights.command("list")
def list_() -> None:
    """List every weight file: its size, its licence, and whether it is here."""
    from dcbench.weights import human_size, weights_dir

    needed: dict[str, list[str]] = {}
    sources: dict[str, WeightSource] = {}
    for kind in ("models", "metrics"):
        for card in cards(kind).values():
            for source in card.weights:
                sources[source.name] = source
                needed.setdefault(source.name, []).append(card.name)
    width = max((len(name) for name in sources), default=0)
    for name, source in sources.items():
        if source.repository or source.url:
            here = "here     " if _place(source) else "missing  "
        else:  # cannot be fetched: see `source.how`; `doctor` looks for it
            here = "here     " if _place(source) else "elsewhere"
        terms = f"{source.licence or 'licence not stated'}{', gated' if source.gated else ''}"
        print(f"{here}  {name:<{width}}  {human_size(source.size):>12}  {terms}  [{', '.join(needed[name])}]")
    print("\nelsewhere = cannot be fetched: `dcbench weights fetch NAME` says how, `dcbench doctor` if it is here")
    print(f"files: {weights_dir()}   repositories: the hub's cache (HF_HOME)")


@weights.command("fetch")
def fetch(
    name: Name,
    to: Annotated[Path | None, typer.Option("--to", help="Fetch to this folder, to copy it elsewhere.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Fetch nothing: only show what is needed and what is here.")
    ] = False,
) -> None:
    """Download the weights of a model or metric. Shows size and licence first. A partial download continues."""
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # set before huggingface_hub is imported, which reads it once
    from dcbench import weights as store

    card = _find(name)
    if card.licence:
        print(f"{card.title}: {card.licence}")
    for source in card.weights:
        print(store.describe(source), flush=True)
        if _is_repository(source):
            from dcbench.models.baselines.diffusers import fetch_repository

            path = fetch_repository(source, card, offline, to)
            hint = f"; elsewhere, use it with HF_HUB_CACHE={to}" if to else ""
        else:
            path = store.fetch(source, offline, to)
            hint = f"; elsewhere, put it at {store.weights_dir() / source.name}" if to else ""
        print(f"  lies at {path}{hint}")


@weights.command("verify")
def verify(
    name: Annotated[str | None, typer.Argument(help="A model or a metric. Default: all that are here.")] = None,
    accept: Annotated[
        bool,
        typer.Option("--accept", help="Trust what is here now, in place of what was first here."),
    ] = False,
) -> None:
    """Check files against the SHA-256 of their card, or else of their first use. Exit code 1 if one is wrong."""
    if name is not None:
        sources = list(_find(name).weights)
    elif accept:
        raise UserError("--accept needs the name of a model or a metric: what is accepted is named")
    else:
        found = {s.name: s for kind in ("models", "metrics") for card in cards(kind).values() for s in card.weights}
        sources = [source for source in found.values() if _place(source) is not None]
    states = [_verified(source, accept) for source in sources]
    if not sources:
        print("no weights are here; `dcbench weights list` shows what is needed")
    print(
        "pinned = by the card; trusted = as at its first use here; CHANGED = not so: bring the first one back, or "
        "accept this one: dcbench weights verify NAME --accept"
    )
    if {"missing", "WRONG", "CHANGED"} & set(states):
        raise typer.Exit(1)


def _verified(source: WeightSource, accept: bool) -> str:
    """Print the state of one file or repository, and return its first word."""
    from dcbench import trust
    from dcbench.files import sha256_file
    from dcbench.weights import human_size, weights_dir

    path, folder = _place(source), weights_dir()
    known = trust.known(folder, source.name)
    if accept and not source.is_pinned and path is not None:
        trust.write(folder, source.name, None)
        known = {}
    if path is None:
        state, said = "missing", f"{source.name}: `dcbench weights list` says who needs it, and `fetch` gets it"
    elif path.is_dir():
        first = known.get("commit")
        state = "CHANGED" if first and first != path.name else "trusted" if first else "new"
        said = f"{source.name}: commit {path.name}{f', at first {first}' if state == 'CHANGED' else ''}"
        if not first:
            trust.write(folder, source.name, {"commit": path.name})
    else:
        found, size = sha256_file(path), human_size(path.stat().st_size)
        said = f"{source.name} ({size}): sha256 {found}"
        if not source.fits(found):
            state = "WRONG"
            said += f", expected {source.sha256}; remove {path}"
        elif source.is_pinned:
            state = "pinned"
        else:
            first = known.get("sha256")
            state = "new" if first is None else "trusted" if first == found else "CHANGED"
            said += f", at first {first}" if state == "CHANGED" else ""
            if first is None:
                trust.check(source, path, folder)
    print(f"{state:<8}  {said}{'; written down as the first one' if state == 'new' else ''}")
    return state
