"""Scores one folder of videos against another. This is an ordinary run, but no clip is sampled."""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from dcbench import machine
from dcbench.catalogue import slug
from dcbench.datasets.base import Item
from dcbench.errors import UserError, as_text
from dcbench.files import digest
from dcbench.protocol import Protocol, find_protocol, fingerprint, ordered, plan_clips
from dcbench.ranks import join_ranks, on_first_rank, rank, together
from dcbench.record import Case, Excluded, Plan
from dcbench.runs import planning
from dcbench.runs.directory import RunDirectory
from dcbench.runs.metrics import choose_metrics
from dcbench.runs.run import Options, Run
from dcbench.runs.scoring import score
from dcbench.version import __version__

NUMBERED = re.compile(r"(?P<name>.+)-(?P<number>\d{1,4})")  # one of several clips of an input


def score_folders(
    generated: Path,
    reference: Path,
    protocol: str,
    options: Options,
    metrics: Sequence[str] | None = None,
    out: Path | None = None,
    groups: Path | None = None,
    limit: int | None = None,
    fps: float | None = None,
) -> Path:
    """Score every video of `generated` against those of `reference`. Returns the run's directory.

    See `plan_folders`. Metrics that compare a clip with its input image or caption need pairs.
    """
    chosen = find_protocol(protocol)
    choose_metrics(metrics or chosen.resolved("folder").metrics)  # before the videos are read: a wrong name fails early
    if fps is not None:
        if not 0 < fps <= 1000:
            raise UserError(f"--fps {fps:g}: give a number above 0, up to 1000")
        chosen = chosen.model_copy(update={"fps": fps})
    run = plan_folders(generated, reference, chosen, out, options.quiet, groups, limit)
    score(run, options, metrics)
    return run.directory.path


def plan_folders(
    generated: Path,
    reference: Path,
    protocol: Protocol,
    out: Path | None = None,
    quiet: bool = False,
    groups: Path | None = None,
    limit: int | None = None,
) -> Run:
    """A run whose generated clips are the videos of one folder, and whose reference clips are those of another.

    The protocol applies to both. See `pair` for what belongs together; a video without a partner is its own case.
    Several clips of one input are called `<name of the reference video>-<number>`.
    `groups`: a file that names the source video or input image of videos of both folders; else each folder's own.
    `limit`: at most so many videos of each folder, pairs first.
    """
    join_ranks()
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: it must be at least 1")
    resolved = protocol.resolved("folder")
    if resolved.reference_videos == "disjoint":
        raise UserError(
            f'protocol {protocol.name}: reference_videos = "disjoint" chooses reference videos, but here --reference '
            'names them. Use a protocol with "paired", and put the videos that you want to compare with in that folder'
        )
    if resolved.chunks == "all":
        raise UserError(
            f'protocol {protocol.name}: chunks = "all" makes several clips of a video, but here a file is a clip. Give '
            "the folder of generated clips as a model: dcbench run --model DIR --dataset NAME"
        )
    if resolved.cuts == "drop":
        raise UserError(
            f'protocol {protocol.name}: cuts = "drop" replaces reference videos, but here --reference names them. Use '
            'a protocol with "keep"; the metric `cut` counts the clips with a cut inside in both folders'
        )
    name, title = as_text(generated.resolve().name), as_text(reference.resolve().name)

    def make() -> tuple[Run, list[Case], list[Case]]:
        real, made = (planning.folder_items(root, resolved, groups) for root in (reference, generated))
        partners = pair(made, real)
        samples = find_samples(made, real, partners)
        paired = {*partners.values(), *(item for item, _ in samples.values())}
        cases, lost = _plan(resolved, real, paired, limit, "reference", quiet)
        own, lost_clips = _plan(resolved, made, {*partners, *samples}, limit, "generated", quiet)
        clips = [(made[video_id], case) for video_id, case in _renamed(own, partners, samples, real)]
        plan = Plan(
            dcbench=__version__,
            model={"name": slug(name), "title": name},
            dataset={"name": "folder", "title": title},
            protocol=resolved.model_dump(mode="json"),
            seed=0,
            limit=limit,
            fingerprint=fingerprint(resolved, "folder", cases),
            excluded=[*lost, *lost_clips],
            versions=machine.versions(),
        )
        own = [case for _, case in clips]
        chosen = [[case.model_dump(mode="json") for case in side] for side in (cases, own)]
        key = digest([resolved.identity(), *chosen], 8)
        directory = RunDirectory(out or Path("runs") / f"{slug(name)}-against-{slug(title)}-{key}")
        folder = {case.id: (item, case) for item, case in clips}
        return Run(directory, plan, planning.with_partners(cases, own), resolved, real, folder=folder), cases, own

    run, cases, own = together(make)
    request = {"root": str(reference.resolve()), "generated": str(generated.resolve())}
    on_first_rank(lambda: planning.write_plan(run.directory, run.plan, cases, request, own))
    if not quiet and rank() == 0:
        print(_summary(own, cases, reference), file=sys.stderr, flush=True)
    return run


def _plan(
    protocol: Protocol, items: Mapping[str, Item], paired: set[str], limit: int | None, side: str, quiet: bool
) -> tuple[list[Case], list[Excluded]]:
    chosen = list(items.values())
    if limit:
        chosen = sorted(ordered(chosen, protocol), key=lambda item: item.id not in paired)[:limit]
    return plan_clips(protocol, chosen, planning.prober(len(chosen), f"reading {side} videos", quiet), run_seed=0)


def pair(generated: Mapping[str, Item], reference: Mapping[str, Item]) -> dict[str, str]:
    """The id of the reference video of each generated video that has one, by id.

    They have the same path in their folders, or the same path without the ending. If their folders differ, the same
    name without the ending, which no other video on its side has.
    """
    keys: tuple[Callable[[PurePosixPath], object], ...] = (
        lambda path: path,
        lambda path: path.with_suffix(""),
        lambda path: path.stem,
    )
    pairs: dict[str, str] = {}
    for key in keys:
        made, real = _unique(generated.values(), key), _unique(reference.values(), key)
        taken = set(pairs.values())
        pairs = {made[name]: real[name] for name in made if name in real and real[name] not in taken} | pairs
    return pairs


def find_samples(
    generated: Mapping[str, Item], reference: Mapping[str, Item], partners: Mapping[str, str]
) -> dict[str, tuple[str, int]]:
    """Generated videos called `<name>-<number>`, by id: the id of the reference video `<name>`, and the number.

    Only if neither the generated video nor the reference video has a partner of the same name. The names are compared
    as in `pair`.
    """
    found: dict[str, tuple[str, int]] = {}
    free = [item for item in reference.values() if item.id not in partners.values()]
    keys: tuple[Callable[[PurePosixPath], object], ...] = (lambda path: path.with_suffix(""), lambda path: path.stem)
    for key in keys:
        names = _unique(free, key)
        for item in generated.values():
            path = PurePosixPath(item.path)
            named = NUMBERED.fullmatch(path.stem)
            if named is None or item.id in partners or item.id in found:
                continue
            name = key(path.with_name(named["name"] + path.suffix))
            if name in names:
                found[item.id] = names[name], int(named["number"])
    if twice := [of for of, count in Counter(found.values()).items() if count > 1]:
        files = [generated[video_id].path for video_id, of in found.items() if of == twice[0]]
        raise UserError(f"{files[0]} and {files[1]} are both clip {twice[0][1]} of {twice[0][0]}; rename or remove one")
    return found


def _unique(items: Iterable[Item], key: Callable[[PurePosixPath], object]) -> dict[object, str]:
    """The id of each item whose key no other item has, by that key."""
    names = {item.id: key(PurePosixPath(item.path)) for item in items}
    count = Counter(names.values())
    return {name: item_id for item_id, name in names.items() if count[name] == 1}


def _renamed(
    own: Sequence[Case],
    partners: Mapping[str, str],
    samples: Mapping[str, tuple[str, int]],
    reference: Mapping[str, Item],
) -> list[tuple[str, Case]]:
    """(id of the generated video, its case), with the id of its partner, or that of a clip of an input.

    A video without a partner has an id that no reference has.
    """
    numbers: dict[str, list[int]] = defaultdict(list)
    for case in own:
        if case.id in samples:
            numbers[samples[case.id][0]].append(samples[case.id][1])
    found = []
    for case in own:
        changed = {"id": partners.get(case.id, f"{case.id}-generated" if case.id in reference else case.id)}
        if case.id in samples:
            item, number = samples[case.id]
            name = f"{item}-{number}"
            changed = {"id": f"{name}-generated" if name in reference else name, "item": item}
            changed |= {"sample": sorted(numbers[item]).index(number)}
        found.append((case.id, case.model_copy(update=changed)))
    return found


def _summary(own: Sequence[Case], cases: Sequence[Case], reference: Path) -> str:
    known = {case.id for case in cases}
    alone = [case.video for case in own if case.item_id not in known]
    text = f"{len(own) - len(alone)} of {len(own)} generated videos have a partner of the same name in {reference}"
    if several := {case.item for case in own if case.item}:
        text += f"; {len(several)} inputs have several clips (NAME-0, NAME-1, ...)"
    return text + (f"; {alone[0]} has none" if alone else "")
