"""What a run is to make: the clips are chosen once and written down, so that the same command finds them again."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dcbench
from dcbench import machine, record, video, weights
from dcbench.catalogue import DatasetCard, ModelCard, load_entry_point, validate
from dcbench.datasets.base import Dataset, Item, find_root
from dcbench.errors import UserError, near_match
from dcbench.progress import track
from dcbench.protocol import Protocol, fingerprint, ordered, plan_clips
from dcbench.ranks import join_ranks, on_first_rank
from dcbench.record import Excluded, ManifestItem, Plan
from dcbench.rundir import RunDirectory


@dataclass
class Job:
    """A planned run: what to make and where it goes."""

    directory: RunDirectory
    plan: Plan
    manifest: list[ManifestItem]
    model: ModelCard
    protocol: Protocol
    items: dict[str, Item]


def plan(
    model: ModelCard,
    dataset: DatasetCard,
    protocol: Protocol,
    data: Path | None = None,
    out: Path | None = None,
    seed: int = 123,
    limit: int | None = None,
    manifest: Path | None = None,
    quiet: bool = False,
    write: bool = True,
) -> Job:
    """Choose the clips and write plan.json and manifest.jsonl, or read them when this run was begun before."""
    join_ranks()
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: it must be at least 1")
    resolved = protocol.resolved(dataset.name)
    root = find_root(dataset, data)
    items = load_items(dataset, root, resolved)
    request = {
        "model": model.model_dump(mode="json", exclude={"title", "summary", "published", "aliases"}),
        "dataset": dataset.model_dump(mode="json", include={"name", "options"}),
        "root": str(root.resolve()) if root else "",
        "protocol": resolved.identity(),
        "seed": seed,
        "limit": limit,
        "manifest": record.digest(record.read_jsonl(manifest)) if manifest else "",
    }
    key = record.digest(request, 8)
    directory = RunDirectory(out or Path("runs") / f"{model.name}-{dataset.name}-{protocol.name}-{key}")

    def make() -> tuple[Plan, list[ManifestItem]]:
        begun = _begun(directory, request)
        if begun:
            return begun
        if manifest:
            chosen, excluded = record.read_manifest(manifest)[:limit], []
            _check_manifest(chosen, items, resolved, manifest)
        else:
            chosen, excluded = _choose(resolved, items, seed, limit, quiet)
        made = Plan(
            dcbench=dcbench.__version__,
            model=model.model_dump(mode="json"),
            dataset=dataset.model_dump(mode="json"),
            protocol=resolved.model_dump(mode="json"),
            seed=seed,
            limit=limit,
            fingerprint=fingerprint(resolved, dataset.name, chosen),
            excluded=excluded,
            versions=machine.versions(),
        )
        if write:
            with directory.locked():
                record.write_manifest(directory.manifest, chosen)
                record.write_text(directory.path / "request.json", record.canonical(request) + "\n")
                record.write_json(directory.plan, made)  # last: a plan that is there is complete
        return made, chosen

    made, chosen = on_first_rank(make)
    return Job(directory, made, chosen, model, resolved, items)


def reopen(path: Path, data: Path | None = None) -> Job:
    """The job of a run directory, to score it again."""
    join_ranks()
    made = record.read_plan(path)
    dataset: DatasetCard = validate(made.dataset, DatasetCard, f"{path}/plan.json, dataset")
    model: ModelCard = validate(made.model, ModelCard, f"{path}/plan.json, model")
    protocol: Protocol = validate(made.protocol, Protocol, f"{path}/plan.json, protocol")
    root = find_root(dataset, data or _remembered_root(path))
    items = load_items(dataset, root, protocol)
    return Job(RunDirectory(path), made, record.read_manifest(path / "manifest.jsonl"), model, protocol, items)


def _remembered_root(path: Path) -> Path | None:
    rows = record.read_jsonl(path / "request.json") if (path / "request.json").is_file() else []
    root = rows[0].get("root") if rows else None
    return Path(root) if root and Path(root).is_dir() else None


def missing(model: ModelCard, dataset: DatasetCard, data: Path | None) -> list[str]:
    """What a run needs and does not find: the dataset's files, the model's weights; each with the way to get it."""
    problems = []
    try:
        find_root(dataset, data)
    except UserError as error:
        problems.append(str(error))
    if model.available:
        for source in model.weights:
            if source.file or source.url:  # whole repositories are the wrappers' own business
                try:
                    weights.fetch(source, offline=True)
                except UserError as error:
                    problems.append(str(error).replace("weights fetch NAME", f"weights fetch {model.name}"))
    return problems


def load_items(card: DatasetCard, root: Path | None, protocol: Protocol) -> dict[str, Item]:
    """The dataset's videos of the protocol's split, by id."""
    unknown = set(protocol.dataset_options) - set(card.options)
    if unknown:
        raise UserError(
            f"protocol {protocol.name} sets {', '.join(sorted(unknown))} for {card.name}, "
            f"whose card knows {', '.join(card.options) or 'no options'}"
        )
    source: Dataset = load_entry_point(card)(card, root, {**card.options, **protocol.dataset_options})
    if protocol.split not in source.splits():
        raise UserError(
            f'{card.name} has no split "{protocol.split}".{near_match(protocol.split, source.splits())} '
            f"It has: {', '.join(source.splits())}."
        )
    items = source.items(protocol.split)
    if not items:
        raise UserError(f"{card.name}: split {protocol.split!r} of {root} holds no video")
    return {item.id: _with_decoder(item, protocol) for item in items}


def _with_decoder(item: Item, protocol: Protocol) -> Item:
    """The item, its file read by the decoder that the protocol names."""
    if protocol.decoder == "auto" or not isinstance(item.video, video.VideoFile):
        return item
    return replace(item, video=replace(item.video, decoder=protocol.decoder))


def _choose(
    protocol: Protocol, items: dict[str, Item], seed: int, limit: int | None, quiet: bool
) -> tuple[list[ManifestItem], list[Excluded]]:
    wanted = min(protocol.num_clips, len(items), limit or len(items))
    order = ordered(list(items.values()), protocol)  # in which plan_clips asks: some are read before they are asked for
    infos = video.in_order(lambda item: item.video.info(), order, workers=min(8, os.cpu_count() or 1))
    shown = iter(track(infos, wanted, "reading videos", quiet=quiet))

    def probe(item: Item) -> Any:
        info = next(shown)
        if isinstance(info, UserError):
            raise info
        return info

    try:
        return plan_clips(protocol, order, probe, seed, limit)
    finally:
        infos.close()  # type: ignore[attr-defined]


def _check_manifest(chosen: list[ManifestItem], items: dict[str, Item], protocol: Protocol, path: Path) -> None:
    """A manifest that somebody else made must fit this dataset and this protocol."""
    unknown = [item.id for item in chosen if item.id not in items]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(chosen)} clips are not in this dataset's split {protocol.split!r}, "
            f"for example {unknown[0]!r}; here an id looks like {next(iter(items), 'nothing: it is empty')!r}"
        )
    wrong = [item.id for item in chosen if len(item.frames) != protocol.num_frames]
    if wrong:
        raise UserError(f"{path}: clip {wrong[0]} has not the protocol's {protocol.num_frames} frames")
    bad = [item.id for item in chosen if min(item.frames) < 0 or not 0 <= item.condition_frame < len(item.frames)]
    if bad:
        raise UserError(f"{path}: clip {bad[0]} names a frame that cannot exist")


def _begun(directory: RunDirectory, request: dict[str, Any]) -> tuple[Plan, list[ManifestItem]] | None:
    """The plan of a run that was begun before; an error when the directory holds another run."""
    if not directory.plan.is_file():
        if directory.path.is_dir() and any(path.name[0] != "." for path in directory.path.iterdir()):
            unfinished = {"manifest.jsonl", "request.json"}
            strange = [p.name for p in directory.path.iterdir() if p.name[0] != "." and p.name not in unfinished]
            if strange:
                raise UserError(
                    f"{directory.path} holds other files ({strange[0]} ...) and no plan.json. Choose another: --out DIR"
                )
        return None
    rows = record.read_jsonl(directory.path / "request.json")
    before = rows[0] if rows else {}
    if before != request:
        differing = [name for name in request if before.get(name) != request[name]]
        raise UserError(
            f"{directory.path} holds another run: it differs in {', '.join(differing)}. "
            "Give the options that it was begun with, or another directory: --out DIR"
        )
    return record.read_plan(directory.path), record.read_manifest(directory.manifest)
