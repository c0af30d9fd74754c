"""A folder of clips that some other program made, as a model: how Gen-2, PikaLabs or any closed system is scored."""

import string
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dcbench import video
from dcbench.catalogue import ModelCard
from dcbench.clips import choose_in_time
from dcbench.errors import UserError, near_match
from dcbench.models.base import Request, Runtime
from dcbench.video_files import find_videos, make_ids


class Videos:
    """Finds each clip by `pattern`, or by a file whose name without suffix is the clip's id.

    A folder with the names of the data set `folder` fits it: its files have the ids that they have there.
    """

    conditions_on: frozenset[str] = frozenset()

    def __init__(self, card: ModelCard, folder: Path, pattern: str, temporal: str):
        self.card, self.folder, self.pattern, self.temporal = card, folder, pattern, temporal
        whole = [path for path in find_videos(folder) if (folder / path).is_file()]  # no broken link
        self.by_id = {name: folder / path for path, name in make_ids(whole).items()}
        self.by_stem: dict[str, list[Path]] = {}
        for path in self.by_id.values():
            self.by_stem.setdefault(path.stem, []).append(path)

    def find(self, clip_id: str) -> Path | None:
        if self.pattern:
            path = self.folder / self.pattern.format(id=clip_id)
            return path if path.is_file() else None
        paths = self.by_stem.get(clip_id, [])
        if len(paths) > 1:
            raise UserError(f"clip {clip_id}: both {paths[0]} and {paths[1]} match; keep one, or set options.pattern")
        return paths[0] if paths else self.by_id.get(clip_id)

    def check(self, clip_ids: Sequence[str]) -> None:
        """Every clip must have its file; otherwise name what is missing and what lies there instead."""
        missing = [clip_id for clip_id in clip_ids if self.find(clip_id) is None]
        if not missing:
            return
        expected = self.pattern.format(id=missing[0]) if self.pattern else f"{missing[0]}.mp4"
        unused = sorted(set(self.by_stem) - set(clip_ids))
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


def load(card: ModelCard, runtime: Runtime) -> Videos:
    """Entry point of the card `videos`."""
    folder = Path(card.options["folder"]).expanduser()
    pattern = card.options["pattern"]
    if not card.options["folder"] or not folder.is_dir():
        raise UserError(
            f"the model 'videos' needs a folder of clips, given {str(folder)!r}: "
            "--model DIR, or --set options.folder=DIR"
        )
    try:
        fields = [name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None]
    except ValueError as error:
        raise UserError(f"options.pattern {pattern!r}: {error}; for example '{{id}}_seed1.mp4'") from error
    if pattern and set(fields) != {"id"}:
        raise UserError(
            f"options.pattern {pattern!r} must name {{id}} and nothing else, for example '{{id}}_seed1.mp4'"
        )
    return Videos(card, folder, pattern, card.options["temporal"])
