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
def verify(name: Name) -> None:
    """Check files against their published SHA-256. Exit code 1 if one is wrong or missing."""
    from dcbench.files import sha256_file
    from dcbench.weights import human_size

    card, wrong = _find(name), False
    for source in card.weights:
        path = _place(source)
        if path is None:
            print(f"missing   {source.name}: dcbench weights fetch {card.name}")
            wrong = True
        elif path.is_dir():
            print(f"here      {source.name}: {path}; its publisher gives no checksum of the whole repository")
        else:
            found = sha256_file(path)
            size = human_size(path.stat().st_size)
            if not source.sha256:
                print(f"unknown   {source.name} ({size}): sha256 {found}; no checksum is published to compare with")
            elif found == source.sha256:
                print(f"right     {source.name} ({size}): sha256 {found}")
            else:
                print(f"WRONG     {source.name} ({size}): sha256 {found}, expected {source.sha256}; remove {path}")
                wrong = True
    if wrong:
        raise typer.Exit(1)
