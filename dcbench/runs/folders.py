"""Scores one folder of videos against another. This is an ordinary run, but no clip is sampled."""

import sys
from collections import Counter
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
from dcbench.runs.run import Options, Run
from dcbench.runs.scoring import choose_metrics, score
from dcbench.version import __version__


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
    choose_metrics(metrics)  # before the videos are read, so that an unknown name fails early
    chosen = find_protocol(protocol)
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
    if resolved.cuts == "drop":
        raise UserError(
            f'protocol {protocol.name}: cuts = "drop" replaces reference videos, but here --reference names them. Use '
            'a protocol with "keep"; the metric `cut` counts the clips with a cut inside in both folders'
        )
    name, title = as_text(generated.resolve().name), as_text(reference.resolve().name)

    def make() -> tuple[Run, list[Case]]:
        real, made = (planning.folder_items(root, resolved, groups) for root in (reference, generated))
        partners = pair(made, real)
        cases, lost = _plan(resolved, real, set(partners.values()), limit, "reference", quiet)
        own, lost_clips = _plan(resolved, made, set(partners), limit, "generated", quiet)
        clips = [(made[case.id], _renamed(case, partners, real)) for case in own]
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
        return Run(directory, plan, planning.with_partners(cases, own), resolved, real, folder=folder), own

    run, own = together(make)
    request = {"root": str(reference.resolve()), "generated": str(generated.resolve())}
    cases = [case for case in run.cases if run.has_reference(case)]
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


def _unique(items: Iterable[Item], key: Callable[[PurePosixPath], object]) -> dict[object, str]:
    """The id of each item whose key no other item has, by that key."""
    names = {item.id: key(PurePosixPath(item.path)) for item in items}
    count = Counter(names.values())
    return {name: item_id for item_id, name in names.items() if count[name] == 1}


def _renamed(case: Case, partners: Mapping[str, str], reference: Mapping[str, Item]) -> Case:
    """The case of a generated video, with the id of its partner. Without one, with an id that no reference has."""
    alone = f"{case.id}-generated" if case.id in reference else case.id
    return case.model_copy(update={"id": partners.get(case.id, alone)})


def _summary(own: Sequence[Case], cases: Sequence[Case], reference: Path) -> str:
    known = {case.id for case in cases}
    alone = [case.video for case in own if case.id not in known]
    text = f"{len(own) - len(alone)} of {len(own)} generated videos have a partner of the same name in {reference}"
    return text + (f"; {alone[0]} has none" if alone else "")
