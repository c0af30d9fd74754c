"""Planning a run: its clips are chosen once and stored, so that the same command continues with the same clips."""

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcbench import machine, record, video, weights
from dcbench.catalogue import DatasetCard, ModelCard, find_dataset, find_metric, known_card, load_entry_point
from dcbench.datasets.base import Item, Shaped, find_root, load_dataset
from dcbench.errors import UserError, near_match
from dcbench.facts import validate
from dcbench.files import canonical, digest, not_a_whole_disk, read_jsonl, write_json, write_text
from dcbench.metrics.base import View
from dcbench.models.base import Runtime, check_ends, clip_shape
from dcbench.progress import track
from dcbench.protocol import FindCut, Protocol, add_apart, find_protocol, fingerprint, plan_clips
from dcbench.ranks import join_ranks, on_first_rank, together
from dcbench.record import Case, Plan, with_apart
from dcbench.runs.directory import RunDirectory
from dcbench.runs.run import Options, Run, to_size
from dcbench.version import __version__

Chosen = tuple[Plan, list[Case]]


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
    fresh: bool = False,
) -> Run:
    """Choose the clips and write plan.json and manifest.jsonl. If this run was started before, read them instead.

    `write` False: nothing is written. `fresh`: what an earlier run left in its directory is removed first. UserError
    for unusable data, or if the directory holds another run.
    """
    join_ranks()
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: it must be at least 1")
    resolved = _of_model(protocol.resolved(dataset.name), model)
    if resolved.reference == "none" and "reference" in model.conditions_on:
        raise UserError(f"{model.name} is given the reference clip, and protocol {resolved.name} has none")
    if model.conditions_on and "reference" not in model.conditions_on:  # else its clips are made elsewhere, or real
        ends, how = resolved.condition == "ends", 'take a protocol with condition = "ends", such as vidim-davis-7'
        check_ends(model, ends, f'protocol {resolved.name} (condition = "ends")', how)
    if data is not None and dataset.needs_files:
        not_a_whole_disk(data.expanduser())
    items = together(lambda: load_items(dataset, find_root(dataset, data), resolved))
    request = request_of(model, dataset, protocol, data, seed, limit, manifest)
    key = digest(request, 8)
    directory = RunDirectory(out or Path("runs") / f"{model.name}-{dataset.name}-{protocol.name}-{key}")

    def make() -> Chosen:
        if fresh:
            _remove_run(directory)
        begun = _begun(directory, request)
        if begun:
            return begun
        if manifest:
            cases, excluded = _first_items(_given_cases(manifest, resolved), limit), []
            _check_manifest(cases, items, resolved, manifest)
        else:
            wanted = min(resolved.num_clips, len(items), limit or len(items))
            probe = prober(wanted, "reading videos", quiet)
            cases, excluded = plan_clips(resolved, list(items.values()), probe, seed, limit, cut_finder(resolved))
        made = Plan(
            dcbench=__version__,
            model=model.model_dump(mode="json"),
            dataset=dataset.model_dump(mode="json"),
            protocol=resolved.model_dump(mode="json"),
            seed=seed,
            limit=limit,
            fingerprint=fingerprint(resolved, dataset.name, cases),
            excluded=excluded,
            versions=machine.versions(),
        )
        if write:
            write_plan(directory, made, cases, request)
        return made, cases

    made, cases = on_first_rank(make)
    _check_shape(directory, made, resolved)
    return Run(directory, made, cases, resolved, items, model)


def plan_named(
    model: ModelCard, dataset: str, protocol: str | None, samples: int | None, options: Options, **how: Any
) -> Run:
    """`plan` on a data set and with a protocol by name (None: the data set's own), with so many clips of each input.

    `how`: further arguments of `plan`. UserError, with all that is missing, if weights or data are not here.
    """
    source = find_dataset(dataset)
    chosen = find_protocol(protocol or source.protocol)
    if samples is not None:
        chosen = chosen.with_samples(samples)
    problems = missing(model, source, how.get("data")) if options.offline else []
    if problems:
        problems.append("This works right now: dcbench run --model dynamicrafter-tiny --dataset shapes")
        raise UserError("\n\n".join(problems))
    return plan(model, source, chosen, quiet=options.quiet, **how)


def _remove_run(directory: RunDirectory) -> None:
    """Remove an earlier run. UserError if the directory is in use, or holds something else."""
    if not directory.path.is_dir() or not any(directory.path.iterdir()):
        return
    record.read_plan(directory.path)
    with directory.locked():
        shutil.rmtree(directory.path)


def _of_model(protocol: Protocol, model: ModelCard) -> Protocol:
    """The protocol with what it leaves to the model. UserError if the model's clips do not fit it."""
    if "model" not in (protocol.frames, protocol.size):
        return protocol
    return protocol.for_model(model.name, clip_shape(model, protocol.seconds))


def _given_cases(manifest: Path, protocol: Protocol) -> list[Case]:
    """The cases of a manifest; with frames = "model", at this model's rate: another model may have written it."""
    cases = record.read_manifest(manifest)
    if protocol.frames == "protocol":
        return cases
    return [case.model_copy(update={"fps": protocol.fps}) for case in cases]


def _check_shape(directory: RunDirectory, made: Plan, protocol: Protocol) -> None:
    """Raise UserError if a run is continued with clips of another length, rate or size than it began with."""
    for name, value in protocol.model_dump(mode="json", include={"num_frames", "fps", "height", "width"}).items():
        if made.protocol.get(name) != value:
            raise UserError(
                f"{directory.path} was begun with {name} = {made.protocol.get(name)}, and the model's clips now have "
                f"{value}. Put the old clips back, or start another run: --out DIR"
            )


def request_of(
    model: ModelCard,
    dataset: DatasetCard,
    protocol: Protocol,
    data: Path | None = None,
    seed: int = 123,
    limit: int | None = None,
    manifest: Path | None = None,
) -> dict[str, Any]:
    """The settings that decide the clips, as JSON values. Two runs with the same request make the same clips."""
    root = find_root(dataset, data)
    return {
        "model": model.model_dump(mode="json", exclude={"title", "summary", "published", "aliases"}),
        "dataset": dataset.model_dump(mode="json", include={"name", "options"}),
        "root": str(root.resolve()) if root else "",
        "protocol": protocol.resolved(dataset.name).identity(),
        "seed": seed,
        "limit": limit,
        "manifest": digest(read_jsonl(manifest)) if manifest else "",
    }


def with_partners(cases: Sequence[Case], own: Sequence[Case]) -> list[Case]:
    """The cases of the reference videos, one for each clip, and cases without frames for clips without a reference."""
    known, paired = {case.id: case for case in cases}, {case.item_id for case in own if case.sample is not None}
    found = [case for case in cases if case.id not in paired]
    for case in own:
        if case.item is not None and case.item in known:
            of_sample = {"id": case.id, "item": case.item, "sample": case.sample}
            found.append(known[case.item].model_copy(update=of_sample))
        elif case.id not in known:
            found.append(case.model_copy(update={"video": "", "frames": []}))
    return sorted(found, key=Case.order)


def recorded_cases(path: Path) -> list[Case]:
    """The cases of a run, from its files alone: neither its data set nor its clips have to be there."""
    directory = RunDirectory(path)
    cases = record.read_manifest(directory.manifest)
    return with_partners(cases, record.read_manifest(directory.folder)) if directory.folder.is_file() else cases


def folder_items(folder: Path, protocol: Protocol, groups: Path | None = None) -> dict[str, Item]:
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; expected a folder of videos ({', '.join(video.SUFFIXES)})")
    not_a_whole_disk(folder)
    card = find_dataset("folder")
    options = card.options | ({"groups": str(groups)} if groups else {})
    return load_items(card.model_copy(update={"options": options}), folder, protocol)


def write_plan(
    directory: RunDirectory,
    made: Plan,
    cases: Sequence[Case],
    request: dict[str, Any],
    clips: Sequence[Case] | None = None,
) -> None:
    with directory.shared("planning"):  # others that begin this run at the same moment write the same bytes
        record.write_manifest(directory.manifest, cases)
        if clips is not None:
            record.write_manifest(directory.folder, clips)
        write_text(directory.request, canonical(request) + "\n")
        write_json(directory.plan, made.model_dump(mode="json"))  # last, so that an existing plan is complete
        directory.note(f"planned {len(cases)} clips, fingerprint {made.fingerprint}, dcbench {made.dcbench}")


def reopen(path: Path, data: Path | None = None, dataset: DatasetCard | None = None) -> Run:
    """Load a run and its data set, to score it again. `data`: the folder of the data set, if it was moved.

    `dataset`: the card of the data set, if this machine does not know it. A run is data, so code that its plan names is
    not run.
    """
    join_ranks()
    run = open_run(path, record.read_plan(path))
    remembered = Path(str(run.directory.remembered().get("root") or ""))
    root = data or (remembered if remembered.name and remembered.exists() else None)
    card = _recorded_dataset(run.plan, path, dataset)
    return replace(run, items=load_items(card, find_root(card, root), run.protocol))


def open_run(path: Path, made: Plan) -> Run:
    """Load a run without its data set. Its generated clips can be read, its reference clips cannot."""
    directory = RunDirectory(path)
    protocol: Protocol = validate(made.protocol, Protocol, f"{path}, protocol")
    cases = record.read_manifest(directory.manifest)
    _check_fingerprint(directory, made, protocol, cases)
    if not directory.folder.is_file():
        model = validate(made.model, ModelCard, f"{path}, model")
        return Run(directory, made, cases, protocol, {}, model)
    own = record.read_manifest(directory.folder)
    clips = folder_items(Path(str(directory.remembered().get("generated", ""))), protocol)
    by_path = {item.path: item for item in clips.values()}
    folder = {case.id: (by_path[case.video], case) for case in own if case.video in by_path}
    return Run(directory, made, with_partners(cases, own), protocol, {}, folder=folder)


def _check_fingerprint(directory: RunDirectory, made: Plan, protocol: Protocol, cases: Sequence[Case]) -> None:
    """Raise UserError if plan.json or manifest.jsonl was edited: the fingerprint covers both."""
    found = fingerprint(protocol, made.dataset["name"], cases)
    if found != made.fingerprint:
        raise UserError(
            f"{directory.path}: plan.json or manifest.jsonl was changed after the run began. Their fingerprint is "
            f"{found}, the plan says {made.fingerprint}. Put the old files back, or start another run: --out DIR"
        )


def _recorded_dataset(made: Plan, path: Path, given: DatasetCard | None) -> DatasetCard:
    """The given card of the data set or this machine's, with the recorded options. UserError if there is none."""
    name = made.dataset["name"]
    card = given or known_card("datasets", made.dataset)
    if card is None:
        raise UserError(
            f"{path} was made on the data set {name!r}, which this machine does not know. The plan of a run may name "
            "code, so its card is not used. Give your own: dcbench score RUN --dataset CARD.toml"
        )
    if card.name != name:
        raise UserError(f"{path} was made on the data set {name!r}, but --dataset gives {card.name!r}")
    title, options = made.dataset.get("title", card.title), {**card.options, **made.dataset.get("options", {})}
    return card.model_copy(update={"title": title, "options": options})


def missing(model: ModelCard, dataset: DatasetCard, data: Path | None) -> list[str]:
    """A message for each missing input of a run (the dataset's files, the model's weights): how to get it."""
    problems = []
    try:
        find_root(dataset, data)
    except UserError as error:
        problems.append(str(error))
    if model.available:
        for source in model.weights:
            if source.file or source.url:  # not whole repositories: the model loads these itself
                try:
                    weights.fetch(source, offline=True)
                except UserError as error:
                    problems.append(str(error).replace("weights fetch NAME", f"weights fetch {model.name}"))
    return problems


def load_items(card: DatasetCard, root: Path | None, protocol: Protocol) -> dict[str, Item]:
    """The dataset's videos of the protocol's split, by id. UserError if there are none."""
    source = load_dataset(card, root, protocol.dataset_options)
    if protocol.split not in source.splits():
        raise UserError(
            f'{card.name} has no split "{protocol.split}".{near_match(protocol.split, source.splits())} '
            f"It has: {', '.join(source.splits())}."
        )
    if isinstance(source, Shaped):
        source = source.for_shape(protocol.height, protocol.width)
    items = source.items(protocol.split)
    if not items:
        raise UserError(f"{card.name}: split {protocol.split!r} of {root} holds no video")
    return {item.id: _with_decoder(item, protocol) for item in items}


def _with_decoder(item: Item, protocol: Protocol) -> Item:
    """The item, with the protocol's decoder for its file."""
    if protocol.decoder == "auto" or not isinstance(item.video, video.VideoFile):
        return item
    return replace(item, video=replace(item.video, decoder=protocol.decoder))


def prober(wanted: int, what: str, quiet: bool) -> Callable[[Sequence[Item]], Iterator[Any]]:
    """For `plan_clips`: a function that yields the facts of videos in order. A few are read ahead in parallel."""

    def infos(order: Sequence[Item]) -> Iterator[Any]:
        found = video.in_order(lambda item: item.video.info(), order, workers=min(8, os.cpu_count() or 1))
        for info in track(found, wanted, what, quiet=quiet):
            if isinstance(info, video.PassingError):  # the plan would be without this video for ever
                raise _not_planned(info)
            yield info

    return infos


def _first_items(cases: list[Case], limit: int | None) -> list[Case]:
    """The cases of the first `limit` items; None: all."""
    kept = set(list(dict.fromkeys(case.item_id for case in cases))[:limit])
    return [case for case in cases if case.item_id in kept]


def _not_planned(error: video.PassingError) -> UserError:
    return UserError(f"{error}. This may pass, so nothing was planned: give the same command again")


def cut_finder(protocol: Protocol) -> FindCut | None:
    """For `plan_clips`: finds cuts as the metric `cut` does. None: the protocol keeps them. MissingWeights."""
    if protocol.cuts == "keep":
        return None
    card = find_metric("cut")
    metric = load_entry_point(card)(card, Runtime())

    def find_cut(item: Item, case: Case) -> int | UserError | None:
        try:
            clip, _ = video.read(item.video, case.frames)
        except video.PassingError as error:
            raise _not_planned(error) from error
        except UserError as error:
            return error
        seen = metric.observe(View(to_size(clip, protocol)))
        return seen["frame"] if seen["value"] else None

    return find_cut


def _check_manifest(cases: list[Case], items: dict[str, Item], protocol: Protocol, path: Path) -> None:
    """Raise UserError if a given manifest does not fit this dataset and this protocol."""
    listed = with_apart(cases)
    unknown = [case.source_id for case in listed if case.source_id not in items]
    if unknown:
        raise UserError(
            f"{path}: {len(unknown)} of {len(listed)} clips are not in this dataset's split {protocol.split!r}, "
            f"for example {unknown[0]!r}; the split has ids such as {next(iter(items), 'nothing: it is empty')!r}"
        )
    number = 1 if protocol.of_pictures else protocol.num_frames  # of a picture; the videos apart have all
    for some, count in ((cases, number), (listed[len(cases) :], protocol.num_frames)):
        if wrong := [case.id for case in some if len(case.frames) != count]:
            raise UserError(f"{path}: clip {wrong[0]} does not have the protocol's {count} frames")
    for item_id, count in Counter(case.item_id for case in cases).items():
        if count != protocol.samples_per_item:
            raise UserError(
                f"{path}: {count} clips of {item_id!r}, but the protocol asks for {protocol.samples_per_item} of each "
                f"input. Give --samples {count}, or another manifest"
            )
    _check_apart(cases, protocol, path)


def _check_apart(cases: Sequence[Case], protocol: Protocol, path: Path) -> None:
    """Raise UserError if a given manifest does not compare with the videos that the protocol says."""
    apart = [case.apart for case in cases if case.apart]
    if bool(apart) != (protocol.reference_videos == "disjoint"):
        lists, fitting = ("lists", "disjoint") if apart else ("does not list", "paired")
        raise UserError(
            f"{path} {lists} videos apart to compare with, but protocol {protocol.name} has reference_videos = "
            f'"{protocol.reference_videos}". Give the manifest of another run, or a protocol with "{fitting}"'
        )
    animated = {case.cluster for case in cases}
    if tied := [case.id for case in apart if case.cluster in animated]:
        raise UserError(f"{path}: {tied[0]} is to be compared with, but its source video is animated")


def choose_apart(run: Run, cases: Sequence[Case], quiet: bool) -> list[Case]:
    """Cases of a "paired" run with the clips apart that "disjoint" chooses. UserError if there are too few videos."""
    probe = prober(len(cases), "reading videos", quiet)
    items = list(run.items.values())
    find_cut = cut_finder(run.protocol)
    return add_apart(run.protocol, cases, items, probe, run.plan.seed, run.plan.excluded, find_cut)[0]


def _begun(directory: RunDirectory, request: dict[str, Any]) -> Chosen | None:
    """The plan of a run that was started before, or None. UserError if the directory holds something else."""
    if not directory.plan.is_file():
        if directory.path.is_dir() and any(path.name[0] != "." for path in directory.path.iterdir()):
            unfinished = {"manifest.jsonl", "request.json"}
            strange = [p.name for p in directory.path.iterdir() if p.name[0] != "." and p.name not in unfinished]
            if strange:
                raise UserError(
                    f"{directory.path} holds other files ({strange[0]} ...) and no plan.json. Choose another: --out DIR"
                )
        return None
    before = directory.remembered()
    if before != request:
        differing = [name for name in request if before.get(name) != request[name]]
        raise UserError(
            f"{directory.path} holds another run: it differs in {', '.join(differing)}. "
            "Give the options that it was started with, or another directory: --out DIR"
        )
    made, cases = record.read_plan(directory.path), record.read_manifest(directory.manifest)
    _check_fingerprint(directory, made, validate(made.protocol, Protocol, f"{directory.path}, protocol"), cases)
    return made, cases
