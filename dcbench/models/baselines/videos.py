"""A folder of clips that some other program made, as a model: how Gen-2, PikaLabs or any closed system is scored."""

import re
import string
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dcbench import video
from dcbench.catalogue import ClipShape, ModelCard
from dcbench.clips import choose_in_time
from dcbench.errors import UserError, near_match
from dcbench.models.base import Request, Runtime, shaped_by
from dcbench.video_files import find_videos, make_ids

LEADING = re.compile(r"(\d+)_.+")  # names of Physics-IQ's clips begin with the number of their input


class Videos:
    """Finds each clip by `pattern`, or by a file whose name without suffix is the clip's id.

    A folder with the names of the data set `folder` fits it: its files have the ids that they have there. A clip whose
    id is a number may have any name that begins with this number and "_". The only clip of an input may end in "-0".
    """

    conditions_on: frozenset[str] = frozenset()

    def __init__(self, card: ModelCard, folder: Path, pattern: str, temporal: str):
        self.card, self.folder, self.pattern, self.temporal = card, folder, pattern, temporal
        whole = [path for path in find_videos(folder) if (folder / path).is_file()]  # no broken link
        self.by_id = {name: folder / path for path, name in make_ids(whole).items()}
        self.by_stem: dict[str, list[Path]] = {}
        self.by_number: dict[str, list[Path]] = {}
        for path in self.by_id.values():
            self.by_stem.setdefault(path.stem, []).append(path)
            if number := LEADING.fullmatch(path.stem):
                self.by_number.setdefault(number[1], []).append(path)

    def find(self, clip_id: str) -> Path | None:
        if self.pattern:
            path = self.folder / self.pattern.format(id=clip_id)
            return path if path.is_file() else None
        names = (self.by_stem.get(clip_id), self.by_number.get(clip_id), self.by_stem.get(f"{clip_id}-0"))
        paths = next(filter(None, names), [])
        if len(paths) > 1:
            raise UserError(f"clip {clip_id}: both {paths[0]} and {paths[1]} match; keep one, or set options.pattern")
        return paths[0] if paths else self.by_id.get(clip_id)

    def check(self, clip_ids: Sequence[str]) -> None:
        """Every clip must have its file; otherwise name what is missing and what lies there instead."""
        missing = [clip_id for clip_id in clip_ids if self.find(clip_id) is None]
        if not missing:
            return
        usual = f"{missing[0]}_NAME.mp4" if missing[0].isdigit() and self.by_number else f"{missing[0]}.mp4"
        expected = self.pattern.format(id=missing[0]) if self.pattern else usual
        found = {self.find(clip_id) for clip_id in clip_ids}
        unused = sorted({path.stem for path in self.by_id.values() if path not in found})
        there = f" Files that match no clip: {', '.join(unused[:3])} ({len(unused)} in all)." if unused else ""
        raise UserError(
            f"{self.folder}: {len(missing)} of {len(clip_ids)} clips have no file, for example {missing[0]!r}; "
            f"expected {expected!r}.{there}{near_match(missing[0], unused)} If the names follow a rule, give it: "
            "--set options.pattern='{id}_seed1.mp4'. To score only some clips, replay a manifest: --manifest FILE"
        )

    def generate(self, requests: Sequence[Request]) -> list[Tensor]:
        return [self._read(request) for request in requests]

    def _read(self, request: Request) -> Tensor:
        path = self.find(request.clip_id)
        if path is None:
            raise UserError(f"{self.folder} has no file for clip {request.clip_id}")
        clip, fps = video.read_clip(path)
        try:
            return clip[choose_in_time(self.temporal, len(clip), fps, request.num_frames, request.fps)]  # type: ignore[arg-type]
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def find_shape(card: ModelCard, seconds: float | None) -> ClipShape:
    """The rate and size that all clips of the folder have, and the fewest frames.

    UserError if they differ, or if a clip is not `seconds` long, to a thousandth of a second. `seconds` None: whole
    clips count, and all must have as many frames.
    """
    folder = _folder(card)
    paths = [folder / name for name in find_videos(folder)]
    if not paths:
        raise UserError(f"{folder} holds no video")
    infos = {path.name: video.probe(path) for path in paths}
    lengths = {name: info.num_frames / info.fps for name, info in infos.items()}
    if seconds is not None and (wrong := [name for name in lengths if abs(lengths[name] - seconds) > 1e-3]):
        some = ", ".join(f"{name} ({lengths[name]:.3f} s)" for name in wrong[:3])
        raise UserError(
            f"{folder}: {len(wrong)} of {len(paths)} clips are not {seconds:g} seconds long: {some}"
            f"{' ...' if len(wrong) > 3 else ''}. Make clips of this length; longer ones may be cut: "
            f"ffmpeg -i IN.mp4 -t {seconds:g} OUT.mp4"
        )
    same = {
        "frames per second": {name: f"{info.fps:g}" for name, info in infos.items()},
        "pixels": {name: f"{info.width}x{info.height}" for name, info in infos.items()},
    }
    if seconds is None:
        same["frames"] = {name: str(info.num_frames) for name, info in infos.items()}
    for what, facts in same.items():
        (first, usual), *others = facts.items()
        if other := next((name for name, value in others if value != usual), None):
            raise UserError(
                f"{folder}: the clips of one model must have one rate and size{'' if seconds else ', and one length'}, "
                f"but {first} has {usual} {what} and {other} has {facts[other]}"
            )
    any_of = next(iter(infos.values()))
    return ClipShape(
        frames=min(info.num_frames for info in infos.values()),
        fps=any_of.fps,
        height=any_of.height,
        width=any_of.width,
    )


def _folder(card: ModelCard) -> Path:
    folder = Path(card.options["folder"]).expanduser()
    if not card.options["folder"] or not folder.is_dir():
        raise UserError(
            f"the model 'videos' needs a folder of clips, given {str(folder)!r}: "
            "--model DIR, or --set options.folder=DIR"
        )
    return folder


@shaped_by(find_shape)
def load(card: ModelCard, runtime: Runtime) -> Videos:
    """Entry point of the card `videos`."""
    folder = _folder(card)
    pattern = card.options["pattern"]
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UserError(f"options.pattern {pattern!r}: {error}; for example '{{id}}_seed1.mp4'") from error
    if pattern and set(fields) != {"id"}:
        raise UserError(
            f"options.pattern {pattern!r} must name {{id}} and nothing else, for example '{{id}}_seed1.mp4'"
        )
    return Videos(card, folder, pattern, card.options["temporal"])
