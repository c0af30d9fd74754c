"""Protocols: all choices that decide which clips are scored and how their pixels are made.

A protocol is a TOML file in `dcbench/protocols/`. Other values of its fields give the same model other numbers on the
same data. `plan_clips` makes the manifest from a protocol and a dataset; directory order does not matter.
"""

import hashlib
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal
from typing import Protocol as Interface

from pydantic import Field, model_validator

from dcbench.catalogue import CODE_OPTIONS, ClipShape, cards, find_metric
from dcbench.errors import UserError
from dcbench.facts import Facts, find_toml, read_facts, validate
from dcbench.files import digest
from dcbench.record import Case, Excluded, check_clip_id
from dcbench.seeding import clip_seed
from dcbench.totals import Total

FOLDER = Path(__file__).parent / "protocols"
METRIC_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(\([^()]*\))?")  # no path


def _later(default: Any, **limits: Any) -> Any:
    """A field that older protocols do not have. It is not written while it has its default: fingerprints stay."""
    return Field(default=default, exclude_if=lambda value: value == default, **limits)


class Protocol(Facts):
    """The choices that an evaluation must fix."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    version: int = Field(ge=1)
    title: str
    summary: str
    # which videos
    split: str
    num_clips: int = Field(ge=1)
    selection: Literal["random", "by_class", "first", "all", "published"] = "random"  # published: by Item.place
    selection_seed: int = 0
    # which frames
    num_frames: int = Field(ge=1)
    frame_stride: int = Field(ge=1)
    fps: float | None = _later(None, gt=0, le=1000)  # videos are read at this rate, by time; None: each at its own
    # model: as many frames as the model makes, at its own rate; above are those of models that make any number
    frames: Literal["protocol", "model"] = _later("protocol")
    seconds: float | None = _later(None, gt=0)  # with frames = "model": only so much of each clip counts
    start: Literal["random", "first", "middle"] = "random"
    short_videos: Literal["drop", "shrink_stride"] = "drop"
    chunks: Literal["one", "all"] = _later("one")  # all: each complete chunk of num_frames frames is a clip
    cuts: Literal["keep", "drop"] = _later("keep")  # drop: a video whose clip has a cut inside is replaced
    condition: Literal["first", "random", "ends"] = "first"  # which frame is the input image; ends: first and last
    decoder: Literal["auto", "decord", "pyav"] = "auto"  # auto: decord, or PyAV if decord fails; the record names it
    # which pixels
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    size: Literal["protocol", "model"] = _later("protocol")  # model: its own; above is that of models of any size
    resize: Literal["crop", "squash"] = "crop"
    interpolation: Literal["bilinear", "bicubic", "nearest", "area_linear_light"] = "bilinear"
    antialias: bool = True
    # which text
    caption: Literal["first", "random", "none"] = "first"
    samples_per_item: int = _later(1, ge=1, le=1000)  # clips of each input, with seeds of their own
    # what the clips are compared with. "none": the data set has pictures, or its films are not used. "takes": the
    # item is a picture, and its data set has two recordings of what happened next
    reference: Literal["clip", "none", "takes"] = _later("clip")
    reference_videos: Literal["paired", "disjoint"] = _later("paired")  # disjoint: videos that are not animated
    scored_frames: Literal["all", "without_condition", "between"] = _later("all")  # of both sides; between: no end
    # its table where the command line names none: names, or name(option=value); (): the usual metrics. No clip and no
    # score depends on it, so the fingerprint does not cover it
    metrics: tuple[str, ...] = _later(())
    total: tuple[Total, ...] = _later(())  # scores made from others; like `metrics`, not in the fingerprint
    dataset_options: dict[str, Any] = {}
    # values for single datasets: any field above
    datasets: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _frames_are_enough(self) -> "Protocol":
        needed = {
            'scored_frames = "without_condition"': 2 if self.scored_frames == "without_condition" else 1,
            'scored_frames = "between"': 3 if self.scored_frames == "between" else 1,
            'condition = "ends"': 2 if self.condition == "ends" else 1,
        }
        for value, number in needed.items():
            if self.num_frames < number:
                raise ValueError(f"{value} needs num_frames >= {number}, got {self.num_frames}")
        if self.of_pictures and self.fps is None:
            raise ValueError(f'reference = "{self.reference}" needs fps: a picture has no frame rate of its own')
        if self.frames == "model" and self.fps is None:
            raise ValueError('frames = "model" needs fps, for models that make clips of any rate')
        if self.seconds is not None and self.frames != "model":
            raise ValueError('seconds needs frames = "model"')
        if self.cuts == "drop" and self.num_frames == 1:
            raise ValueError('cuts = "drop" needs num_frames >= 2, got 1')
        return self

    @model_validator(mode="after")
    def _metrics_are_names(self) -> "Protocol":
        """A protocol comes with a run that others made, and the file of a card may name code."""
        for name in self.metrics:
            given, _, options = name.partition("(")
            code = CODE_OPTIONS & {setting.partition("=")[0].strip() for setting in options.split(",")}
            if METRIC_NAME.fullmatch(name) is None or given.endswith(".toml") or code:
                raise ValueError(
                    f'metrics: "{name}" is no name of a metric; expected name or name(option=value). A card of your '
                    "own is given on the command line: --metrics CARD.toml"
                )
        return self

    @model_validator(mode="after")
    def _totals_have_names(self) -> "Protocol":
        """A total is made of metrics and of totals above it, so there is no circle."""
        names = [total.name for total in self.total]
        for place, total in enumerate(self.total):
            parts = [part.score for part in total.parts]
            if twice := [name for name, count in Counter(names).items() if count > 1]:
                raise ValueError(f'total: the name "{twice[0]}" is there twice')
            if twice := [name for name, count in Counter(parts).items() if count > 1]:
                raise ValueError(f'total {total.name}: the part "{twice[0]}" is there twice')
            if later := [name for name in parts if name in names[place:]]:
                raise ValueError(
                    f'total {total.name}: its part "{later[0]}" is no earlier total; put that one above it'
                )
        return self

    @model_validator(mode="after")
    def _choices_fit(self) -> "Protocol":
        """The clip has both ends, and chunks leave nothing to choose within a video."""
        if self.condition == "ends" and self.reference == "none":
            raise ValueError('condition = "ends" needs reference = "clip": a picture has no last frame')
        if self.condition == "ends" and self.scored_frames == "without_condition":
            raise ValueError('scored_frames: condition = "ends" gives two frames; use "between" to leave out both')
        fixed = {"start": "first", "short_videos": "drop", "reference": "clip", "reference_videos": "paired"}
        for name, value in fixed.items():
            if self.chunks == "all" and (given := getattr(self, name)) != value:
                raise ValueError(f'chunks = "all" needs {name} = "{value}", got "{given}"')
        return self

    @property
    def of_pictures(self) -> bool:
        """Whether an item is a picture: its only source frame is the input image."""
        return self.reference != "clip"

    @property
    def span(self) -> int:
        """Number of source frames from the first to the last of a clip."""
        return (self.num_frames - 1) * self.frame_stride + 1

    def resolved(self, dataset: str) -> "Protocol":
        """The protocol with the values for one dataset."""
        own = self.datasets.get(dataset, {})
        data = self.model_dump() | own | {"datasets": {}}
        return validate(data, Protocol, f"protocol {self.name} for {dataset}")

    def for_model(self, name: str, shape: ClipShape) -> "Protocol":
        """The protocol with the length, rate and size of a model's clips, where it leaves these to the model.

        UserError if the model makes fewer seconds than the protocol scores.
        """
        changed: dict[str, Any] = {}
        if self.size == "model" and shape.height and shape.width:
            changed |= {"height": shape.height, "width": shape.width}
        if self.frames == "model":
            fps = shape.fps or self.fps
            assert fps is not None  # see _frames_are_enough
            count = round(self.seconds * fps) if self.seconds else shape.frames or self.num_frames
            if self.seconds and shape.frames and shape.frames < count:
                raise UserError(
                    f"{name} makes {shape.frames} frames at {fps:g} fps, which is {shape.frames / fps:.2f} seconds; "
                    f"protocol {self.name} scores the first {self.seconds:g} seconds of each clip. If the model can "
                    f"make more, ask for them: --set clip.frames={count}. Or give a folder of longer clips: --model DIR"
                )
            changed |= {"num_frames": count, "fps": fps}
        return self.model_copy(update=changed)

    def with_samples(self, count: int) -> "Protocol":
        """The protocol with so many clips of each input, on every dataset."""
        own = {name: {**values, "samples_per_item": count} for name, values in self.datasets.items()}
        changed = self.model_dump() | {"samples_per_item": count, "datasets": own}
        return validate(changed, Protocol, f"protocol {self.name} with {count} clips of each input")

    @property
    def compared(self) -> str:
        """What is scored, in words. "" for the usual: one clip an input, every frame, with the animated videos."""
        return compared(self.model_dump())

    def identity(self) -> dict[str, Any]:
        """The fields that the fingerprint covers: those that decide clips and pixels, but not what a model decides."""
        left_out = {"title", "summary", "metrics", "total", "datasets"}
        left_out |= {"num_frames", "fps"} if self.frames == "model" else set()
        left_out |= {"height", "width"} if self.size == "model" else set()
        return self.model_dump(mode="json", exclude=left_out)


def compared(fields: Mapping[str, Any]) -> str:
    """`Protocol.compared` of the fields of a protocol, or of those that a record has."""
    count, others = fields.get("samples_per_item", 1), fields.get("reference_videos") == "disjoint"
    samples = f"{count} clips of each input" if isinstance(count, int) and count > 1 else ""
    alone = {"none": "" if others else "without reference clips", "takes": "with two takes of the real event"}
    videos = "with videos that are not animated" if others else ""
    left_out = {"without_condition": "without the condition frame", "between": "without the first and last frame"}
    frames = left_out.get(str(fields.get("scored_frames")), "")
    return ", ".join(filter(None, (samples, alone.get(str(fields.get("reference"))), videos, frames)))


class ProbedVideo(Interface):
    @property
    def num_frames(self) -> int: ...
    @property
    def fps(self) -> float: ...


ItemT = Any  # an item of a dataset; id, path, captions, label, group, film and place are used
Probe = Callable[[Sequence[ItemT]], Iterable[ProbedVideo | UserError]]
FindCut = Callable[[ItemT, Case], int | UserError | None]  # the frame of a clip that begins another shot, if any


def protocols() -> dict[str, Protocol]:
    """The protocols that come with dcbench, by name."""
    found = [read_facts(path, Protocol) for path in sorted(FOLDER.glob("*.toml"))]
    return {protocol.name: protocol for protocol in found}


@cache
def shipped_totals() -> dict[str, Total]:
    """The totals of the protocols that come with dcbench, by name."""
    return {total.name: total for protocol in protocols().values() for total in protocol.total}


def find_protocol(name: str) -> Protocol:
    """A protocol by name, or by the path of a TOML file. UserError if it names a metric that is not known here."""
    path = find_toml("protocol", name, FOLDER)
    protocol: Protocol = read_facts(path, Protocol)
    for dataset in (None, *protocol.datasets):
        try:
            chosen = protocol.resolved(dataset) if dataset else protocol
            for metric in chosen.metrics:
                find_metric(metric)
            if taken := [total.name for total in chosen.total if total.name in cards("metrics")]:
                raise UserError(f'the total "{taken[0]}" has the name of a metric; choose another')
        except UserError as error:
            raise UserError(f"{path}, metrics{f' for {dataset}' if dataset else ''}: {error}") from error
    return protocol


def _rank(seed: int, item_id: str) -> int:
    """A video's place in the seeded order. It depends on seed and id, not on the other videos."""
    return int.from_bytes(hashlib.blake2b(f"select/{seed}/{item_id}".encode(), digest_size=8).digest(), "big")


def _dice(seed: int, use: str, item_id: str) -> random.Random:
    return random.Random(hashlib.blake2b(f"{use}/{seed}/{item_id}".encode(), digest_size=8).digest())


def ordered(items: Sequence[ItemT], protocol: Protocol) -> list[ItemT]:
    """Items in the protocol's order. The first `num_clips` usable ones are chosen."""
    by_id = sorted(items, key=lambda item: item.id)
    if protocol.selection in ("first", "all"):
        return by_id
    if protocol.selection == "published":
        if without := [item.id for item in by_id if item.place is None]:
            raise UserError(f'protocol {protocol.name}: selection = "published", but {without[0]} has no place in one')
        return sorted(by_id, key=lambda item: item.place)
    shuffled = sorted(by_id, key=lambda item: (_rank(protocol.selection_seed, item.id), item.id))
    if protocol.selection == "random":
        return shuffled
    # by_class: the k-th of a class's n videos is at (k + 1/2) / n, so every prefix has the class distribution
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
    """(prompt, index of the caption); ("", -1) if there is no caption or the protocol uses none."""
    if protocol.caption == "none" or not captions:
        return "", -1
    index = 0
    if protocol.caption == "random":
        index = _dice(protocol.selection_seed, "caption", item_id).randrange(len(captions))
    return captions[index], index


def plan_clips(
    protocol: Protocol,
    items: Sequence[ItemT],
    probe: Probe,
    run_seed: int,
    limit: int | None = None,
    find_cut: FindCut | None = None,
) -> tuple[list[Case], list[Excluded]]:
    """The cases and the excluded videos, both sorted by id.

    `probe` gets the items in the protocol's order and yields a result for each. It must be lazy: only the needed
    results are taken. A video that is too short is replaced by the next one. With cuts = "drop", so is one whose clip
    has a cut inside; `find_cut` is needed then. A video that cannot be read (its result is a UserError) is not
    replaced, so the sample is smaller (with chunks = "all" by one: the number of its
    chunks is not known). UserError if two ids are equal, no video is usable, or too few are left to compare with.
    """
    ids = Counter(item.id for item in items)
    if twice := sorted(item_id for item_id, count in ids.items() if count > 1):
        raise UserError(f'the dataset has two videos with the id "{twice[0]}"; ids must be unique')
    inputs = [item for item in items if not item.film]
    every = protocol.selection == "all" and protocol.chunks == "one"
    wanted = len(inputs) if every else protocol.num_clips
    wanted = min(wanted, limit) if limit else wanted
    disjoint = protocol.reference_videos == "disjoint"
    others = len(items) - (wanted if len(inputs) == len(items) else len(inputs))
    if disjoint and wanted > others:  # found before any video is read
        raise _too_few(protocol, wanted, max(0, others))
    chosen, excluded = _choose(protocol, ordered(inputs, protocol), probe, run_seed, wanted, find_cut)
    if not chosen:
        raise UserError(
            f"protocol {protocol.name}: no usable clip among {len(inputs)} videos of split {protocol.split!r}"
            + (f"; for example {excluded[0].id}: {excluded[0].reason}" if excluded else "")
        )
    if disjoint:
        chosen, more = add_apart(protocol, chosen, items, probe, run_seed, excluded, find_cut)
        excluded += more
    cases = [sample for case in chosen for sample in samples_of(case, protocol.samples_per_item, run_seed)]
    return sorted(cases, key=Case.order), sorted(excluded, key=lambda entry: entry.id)


def samples_of(case: Case, count: int, run_seed: int) -> list[Case]:
    """The cases `<item>-0`, `<item>-1`, ... of several clips of one input. The case itself for one clip.

    A reference video of its own (`apart`) stays with the first, because metrics of sets compare with it once.
    """
    if count == 1:
        return [case]
    made = []
    for number in range(count):
        changed = {"id": check_clip_id(f"{case.id}-{number}"), "item": case.id, "sample": number}
        changed |= {"seed": clip_seed(run_seed, f"{case.id}-{number}"), "apart": None if number else case.apart}
        made.append(case.model_copy(update=changed))
    return made


def add_apart(
    protocol: Protocol,
    cases: Sequence[Case],
    items: Sequence[ItemT],
    probe: Probe,
    run_seed: int,
    excluded: Sequence[Excluded] = (),
    find_cut: FindCut | None = None,
) -> tuple[list[Case], list[Excluded]]:
    """The cases, each with the clip of a video that is not animated; and those of such videos that are excluded.

    They are the films of the data set that lie apart from its inputs; or else the next usable videos in the protocol's
    order, never of a source video that is animated. The last cases have none if a video cannot be read. UserError if
    there are too few.
    """
    animated = {case.cluster for case in cases}
    known = {entry.id for entry in excluded}
    films = [item for item in items if item.film]
    order = [
        item
        for item in ordered(films or items, protocol)
        if (item.group or item.id) not in animated and item.id not in known  # known to be unusable
    ]
    if len(order) < len(cases):
        raise _too_few(protocol, len(cases), len(order))
    whole = protocol.model_copy(update={"reference": "clip"})  # the other videos have all their frames
    others, more = _choose(whole, order, probe, run_seed, len(cases), find_cut)
    lost = sum(entry.rule == "unreadable" for entry in more)
    if len(others) + lost < len(cases):
        raise _too_few(protocol, len(cases), len(others))
    compared = [case.model_copy(update={"apart": other}) for case, other in zip(cases, others, strict=False)]
    return [*compared, *cases[len(others) :]], more


def _too_few(protocol: Protocol, wanted: int, found: int) -> UserError:
    return UserError(
        f'protocol {protocol.name}: reference_videos = "disjoint" compares {wanted} animated videos with as many '
        f"others, and split {protocol.split!r} has only {found} usable ones of other source videos. Animate fewer "
        'videos (--limit), or set reference_videos = "paired"'
    )


def _choose(
    protocol: Protocol,
    order: Sequence[ItemT],
    probe: Probe,
    run_seed: int,
    wanted: int,
    find_cut: FindCut | None,
) -> tuple[list[Case], list[Excluded]]:
    """The cases of the first `wanted` videos in `order`, and the videos that are excluded. See `plan_clips`."""
    if protocol.cuts == "drop" and find_cut is None:
        raise ValueError('cuts = "drop" needs find_cut')
    chosen: list[Case] = []
    excluded: list[Excluded] = []
    lost = 0
    for item, info in zip(order, probe(order), strict=False):
        for made in _usable(protocol, item, info, run_seed, find_cut):
            if isinstance(made, Case):
                chosen.append(made)
            else:
                excluded.append(made)
                lost += made.rule == "unreadable"
            if len(chosen) + lost >= wanted:
                return chosen, excluded
    return chosen, excluded


def _usable(
    protocol: Protocol, item: ItemT, info: ProbedVideo | UserError, run_seed: int, find_cut: FindCut | None
) -> Iterator[Case | Excluded]:
    """The cases of a video; or why it, or a chunk of it, is replaced by the next one, or cannot be read."""
    if isinstance(info, UserError):
        yield Excluded(id=item.id, reason=str(info), rule="unreadable")
        return
    made = make_case(protocol, item, info, run_seed) if protocol.chunks == "one" else None
    cases = make_chunks(protocol, item, info, run_seed) if protocol.chunks == "all" else [made] if made else []
    if not cases:
        needed = protocol.span if protocol.short_videos == "drop" else protocol.num_frames
        read = (f" at {info.fps:g} fps", f" at {protocol.fps:g} fps") if protocol.fps else ("", "")
        reason = f"{info.num_frames} frames{read[0]}; {needed}{read[1]} are needed"
        yield Excluded(id=item.id, reason=reason, rule="short")
    for case in cases:
        frame = None
        if protocol.cuts == "drop" and find_cut is not None and len(case.frames) > 1:  # a picture has no cut
            frame = find_cut(item, case)
        if isinstance(frame, int):
            yield Excluded(id=case.id, reason=f"a cut before frame {frame} of its clip", rule="cut")
        elif frame is not None:
            yield Excluded(id=case.id, reason=str(frame), rule="unreadable")
        else:
            yield case


def make_case(protocol: Protocol, item: ItemT, info: ProbedVideo, run_seed: int) -> Case | None:
    """The case of one video, or of one picture. None if the video is too short."""
    if protocol.of_pictures:
        protocol = protocol.model_copy(update={"num_frames": 1})  # of the source: the input image alone
    frames = choose_frames(protocol, item.id, _number_of_frames(protocol, info))
    return _case(protocol, item, info, run_seed, item.id, *frames) if frames else None


def make_chunks(protocol: Protocol, item: ItemT, info: ProbedVideo, run_seed: int) -> list[Case]:
    """A case `<item>-<its first frame>` for each complete chunk of num_frames frames, at the stride, in their order.

    The first chunk begins at the first frame, and no frame is in two chunks. The chunks of a video are one group.
    """
    frames = range(0, _number_of_frames(protocol, info), protocol.frame_stride)
    number, made = protocol.num_frames, []
    for start in range(0, len(frames) - number + 1, number):
        chunk = list(frames[start : start + number])
        clip_id = f"{item.id}-{_source_frame(protocol, info, chunk[0]):05d}"
        case = _case(protocol, item, info, run_seed, clip_id, chunk, protocol.frame_stride)
        made.append(case.model_copy(update={"source": item.id, "group": item.group or item.id}))
    return made


def _number_of_frames(protocol: Protocol, info: ProbedVideo) -> int:
    """How many frames a video has at the protocol's rate."""
    step = info.fps / (protocol.fps or info.fps)  # source frames from one frame to the next at this rate
    return math.floor((info.num_frames - 1) / step + 1e-6) + 1


def _source_frame(protocol: Protocol, info: ProbedVideo, index: int) -> int:
    """The frame of the file that is nearest in time to a frame at the protocol's rate."""
    step = info.fps / (protocol.fps or info.fps)
    return index if step == 1 else min(info.num_frames - 1, math.floor(index * step + 0.5))


def _case(
    protocol: Protocol, item: ItemT, info: ProbedVideo, run_seed: int, clip_id: str, frames: list[int], stride: int
) -> Case:
    """The case of chosen frames, which are counted at the protocol's rate."""
    prompt, caption_index = choose_caption(protocol, item.id, item.captions)
    condition = 0
    if protocol.condition == "random":
        condition = _dice(protocol.selection_seed, "condition", item.id).randrange(protocol.num_frames)
    return Case(
        id=check_clip_id(clip_id),
        video=item.path,
        frames=[_source_frame(protocol, info, index) for index in frames],
        condition_frame=condition,
        fps=(protocol.fps or info.fps) / stride,
        frame_stride=stride,
        prompt=prompt,
        caption_index=caption_index,
        label=item.label,
        group=item.group,
        seed=clip_seed(run_seed, clip_id),
    )


def fingerprint(protocol: Protocol, dataset: str, cases: Sequence[Case]) -> str:
    """16 hex digits over the resolved protocol, the dataset's name and the chosen clips, but not the sampling seed.

    Two numbers may be compared when their fingerprints are equal.
    """
    left_out: Any = {"seed": True, "apart": {"seed"}} | ({"fps": True} if protocol.frames == "model" else {})
    clips = [case.model_dump(mode="json", exclude=left_out) for case in cases]
    return digest({"protocol": protocol.identity(), "dataset": dataset, "clips": clips})
