"""Protocols: everything that decides which clips are scored and how their pixels are made, named and fingerprinted.

A protocol is a TOML file in `dcbench/protocols/`. Its fields are the causes of different numbers for the same model on
the same data; `plan_clips` turns it and a dataset into the manifest, independently of directory order.
"""

import hashlib
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

from pydantic import Field

from dcbench.catalogue import Facts, read_facts, validate
from dcbench.errors import UserError, near_match
from dcbench.record import Excluded, ManifestItem, check_clip_id, digest
from dcbench.seeding import clip_seed


class Protocol(Facts):
    """Field by field: what an evaluation must fix."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    version: int = Field(ge=1)
    title: str
    summary: str
    # which videos
    split: str
    num_clips: int = Field(ge=1)
    selection: Literal["random", "by_class", "first", "all"] = "random"
    selection_seed: int = 0
    # which frames
    num_frames: int = Field(ge=1)
    frame_stride: int = Field(ge=1)
    start: Literal["random", "first", "middle"] = "random"
    short_videos: Literal["drop", "shrink_stride"] = "drop"
    condition: Literal["first", "random"] = "first"  # which frame of the clip is the input image
    decoder: Literal["auto", "decord", "pyav"] = "auto"  # auto: decord, PyAV where decord fails; recorded either way
    # which pixels
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    resize: Literal["crop", "squash"] = "crop"
    interpolation: Literal["bilinear", "bicubic", "nearest"] = "bilinear"
    antialias: bool = True
    # which text
    caption: Literal["first", "random", "none"] = "first"
    dataset_options: dict[str, Any] = {}
    # what differs by dataset: any field above
    datasets: dict[str, dict[str, Any]] = {}

    @property
    def span(self) -> int:
        """Source frames that a clip covers."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def resolved(self, dataset: str) -> "Protocol":
        """The protocol with its dataset's own values in place."""
        own = self.datasets.get(dataset, {})
        data = self.model_dump() | own | {"datasets": {}}
        return validate(data, Protocol, f"protocol {self.name} for {dataset}")

    def identity(self) -> dict[str, Any]:
        """What the fingerprint covers of the protocol: all but its prose."""
        return self.model_dump(mode="json", exclude={"title", "summary", "datasets"})


class ProbedVideo(Interface):
    @property
    def num_frames(self) -> int: ...
    @property
    def fps(self) -> float: ...


class Candidate(Interface):
    """What planning needs to know of a dataset's item."""

    @property
    def id(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def captions(self) -> tuple[str, ...]: ...
    @property
    def label(self) -> str | None: ...
    @property
    def group(self) -> str | None: ...


ItemT = Any  # a Candidate; dataset items carry more


@cache
def protocols() -> dict[str, Protocol]:
    """The protocols that come with dcbench, by name."""
    found = [read_facts(path, Protocol) for path in sorted((Path(__file__).parent / "protocols").glob("*.toml"))]
    return {protocol.name: protocol for protocol in found}


def find_protocol(name: str) -> Protocol:
    if name.endswith(".toml"):
        return read_facts(Path(name).expanduser(), Protocol)
    known = protocols()
    if name not in known:
        raise UserError(
            f'no protocol is called "{name}".{near_match(name, known)} Known: {", ".join(known)}. '
            "A path of a TOML file works too."
        )
    return known[name]


def _rank(seed: int, item_id: str) -> int:
    """A video's place in the seeded order: depends on its id alone, not on which other videos exist."""
    return int.from_bytes(hashlib.blake2b(f"select/{seed}/{item_id}".encode(), digest_size=8).digest(), "big")


def _dice(seed: int, use: str, item_id: str) -> random.Random:
    return random.Random(hashlib.blake2b(f"{use}/{seed}/{item_id}".encode(), digest_size=8).digest())


def ordered(items: Sequence[ItemT], protocol: Protocol) -> list[ItemT]:
    """Items in the order in which the protocol wants them; the first usable `num_clips` are its choice."""
    by_id = sorted(items, key=lambda item: item.id)
    if protocol.selection in ("first", "all"):
        return by_id
    shuffled = sorted(by_id, key=lambda item: (_rank(protocol.selection_seed, item.id), item.id))
    if protocol.selection == "random":
        return shuffled
    # by_class: the k-th video of a class with n videos stands at (k + 1/2) / n, so prefixes keep proportions
    places: dict[str, list[ItemT]] = defaultdict(list)
    for item in shuffled:
        places[item.label or ""].append(item)
    ranked = [
        ((k + 0.5) / len(group), _rank(protocol.selection_seed, item.id), item)
        for group in places.values()
        for k, item in enumerate(group)
    ]
    return [item for _, _, item in sorted(ranked, key=lambda entry: entry[:2])]


def choose_frames(protocol: Protocol, item_id: str, num_frames: int) -> tuple[list[int], int] | None:
    """(source frame indices, stride) of an item's clip; None when the video is too short for the protocol."""
    stride = protocol.frame_stride
    if num_frames < protocol.span:
        if protocol.short_videos == "drop" or num_frames < protocol.num_frames:
            return None
        stride = (num_frames - 1) // (protocol.num_frames - 1) if protocol.num_frames > 1 else 1
    span = (protocol.num_frames - 1) * stride + 1
    room = num_frames - span
    if protocol.start == "first":
        start = 0
    elif protocol.start == "middle":
        start = room // 2
    else:
        start = _dice(protocol.selection_seed, "start", item_id).randint(0, room)
    return [start + stride * k for k in range(protocol.num_frames)], stride


def choose_caption(protocol: Protocol, item_id: str, captions: tuple[str, ...]) -> tuple[str, int]:
    """(prompt, index of the caption); ("", -1) where there is none or the protocol wants none."""
    if protocol.caption == "none" or not captions:
        return "", -1
    index = 0
    if protocol.caption == "random":
        index = _dice(protocol.selection_seed, "caption", item_id).randrange(len(captions))
    return captions[index], index


def plan_clips(
    protocol: Protocol,
    items: Sequence[ItemT],
    probe: Callable[[ItemT], ProbedVideo],
    run_seed: int,
    limit: int | None = None,
) -> tuple[list[ManifestItem], list[Excluded]]:
    """The manifest, sorted by id, and the videos that could not be used.

    A video that the rule for short videos drops is replaced by the next in order; one that cannot be read (`probe`
    raises UserError) is not: it is listed, and the sample is smaller.
    """
    ids = [item.id for item in items]
    if len(set(ids)) != len(ids):
        twice = next(item_id for item_id in sorted(ids) if ids.count(item_id) > 1)
        raise UserError(f'the dataset has two videos with the id "{twice}"; ids must be unique')
    wanted = len(items) if protocol.selection == "all" else protocol.num_clips
    wanted = min(wanted, limit) if limit else wanted
    chosen: list[ManifestItem] = []
    excluded: list[Excluded] = []
    lost = 0
    for item in ordered(items, protocol):
        if len(chosen) + lost >= wanted:
            break
        try:
            info = probe(item)
        except UserError as error:
            excluded.append(Excluded(id=item.id, reason=str(error), rule="unreadable"))
            lost += 1
            continue
        frames = choose_frames(protocol, item.id, info.num_frames)
        if frames is None:
            needed = protocol.span if protocol.short_videos == "drop" else protocol.num_frames
            reason = f"{info.num_frames} frames; {needed} are needed"
            excluded.append(Excluded(id=item.id, reason=reason, rule="short"))
            continue
        indices, stride = frames
        prompt, caption_index = choose_caption(protocol, item.id, item.captions)
        condition = 0
        if protocol.condition == "random":
            condition = _dice(protocol.selection_seed, "condition", item.id).randrange(protocol.num_frames)
        chosen.append(
            ManifestItem(
                id=check_clip_id(item.id),
                video=item.path,
                frames=indices,
                condition_frame=condition,
                fps=info.fps / stride,
                frame_stride=stride,
                prompt=prompt,
                caption_index=caption_index,
                label=item.label,
                group=item.group,
                seed=clip_seed(run_seed, item.id),
            )
        )
    if not chosen:
        raise UserError(
            f"protocol {protocol.name} finds no usable clip among {len(items)} videos of split {protocol.split!r}"
            + (f"; for example {excluded[0].id}: {excluded[0].reason}" if excluded else "")
        )
    return sorted(chosen, key=lambda entry: entry.id), sorted(excluded, key=lambda entry: entry.id)


def fingerprint(protocol: Protocol, dataset: str, manifest: Sequence[ManifestItem]) -> str:
    """16 hex digits over the resolved protocol, the dataset's name and the chosen clips; not over the sampling seed.

    Two numbers may be compared when their fingerprints are equal.
    """
    clips = [item.model_dump(mode="json", exclude={"seed"}) for item in manifest]
    return digest({"protocol": protocol.identity(), "dataset": dataset, "clips": clips})
