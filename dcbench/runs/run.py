"""A run: its plan, its directory, and the pixels of its cases. All code reads the clips of a run through `Run`.

A model on a data set, two folders of videos and an arm of a suite are all runs.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dcbench import video
from dcbench.catalogue import ModelCard
from dcbench.clips import pixels_sha256, resize
from dcbench.datasets.base import Item
from dcbench.errors import UserError
from dcbench.models.base import Request, Runtime
from dcbench.protocol import Protocol
from dcbench.ranks import world_size
from dcbench.record import Case, Plan
from dcbench.runs.directory import RunDirectory


@dataclass(frozen=True)
class OnRay:
    """How clips are made on a Ray cluster. None: see `runs/actors.py`."""

    address: str | None = None
    workers: int | None = None
    gpus: float | None = None  # of each worker


@dataclass(frozen=True)
class Options:
    """How to execute a plan. These options change a clip only by rounding (device, dtype, batch size)."""

    device: str = "auto"
    dtype: str | None = None
    batch_size: int = 1
    offline: bool = True  # True: missing weights are an error, and are not downloaded
    quiet: bool = False
    shard: tuple[int, int] | None = None  # (3, 16): this process makes the third of sixteen parts of the clips
    join: bool = False  # this process makes clips that no other process makes
    ray: OnRay | None = None  # clips are made by workers on a Ray cluster

    def runtime(self) -> Runtime:
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        elif device.startswith("cuda") and not torch.cuda.is_available():
            raise UserError(f"--device {device}: PyTorch finds no GPU. Use --device cpu or --device auto")
        if device == "cuda" and world_size() > 1:
            device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            torch.device(device)
        except RuntimeError as error:
            raise UserError(
                f"--device {device}: {str(error).splitlines()[0]}. For example: auto, cpu, cuda, cuda:1"
            ) from error
        return Runtime(device=device, dtype=self.dtype, offline=self.offline)


@dataclass
class Run:
    """A planned run. `cases` are sorted by id."""

    directory: RunDirectory
    plan: Plan
    cases: list[Case]
    protocol: Protocol
    items: dict[str, Item]  # of the data set, by id
    model: ModelCard | None = None  # None: nothing is sampled, the clips are in a folder
    folder: Mapping[str, tuple[Item, Case]] = field(default_factory=dict)  # its videos and their cases, by id

    @property
    def name(self) -> str:
        return str(self.plan.model["name"])

    def missing(self, cases: Sequence[Case] | None = None) -> list[Case]:
        """Of these cases (None: of all), those whose clip is not finished."""
        finished = self.directory.finished_samples()
        return [case for case in (self.cases if cases is None else cases) if case.id not in finished]

    def item(self, case: Case) -> Item:
        """The data set's item of a case. VideoError if the data set does not have it any more."""
        if case.source_id not in self.items:
            raise video.VideoError(f"{case.video or case.source_id} is not in the dataset any more")
        return self.items[case.source_id]

    def has_reference(self, case: Case) -> bool:
        """False for a clip of a folder without a reference video, and for an input that is a picture."""
        is_picture = self.protocol.of_pictures and len(case.frames) == 1  # a video apart has all its frames
        return bool(case.frames) and not is_picture

    def has_generated(self, case: Case) -> bool:
        """False for a reference video without a clip in the folder."""
        return self.model is not None or case.id in self.folder

    def reference(self, case: Case, frames: Sequence[int] | None = None) -> tuple[Tensor, str]:
        """The reference clip, and the name of the decoder that read it. `frames`: other source frames of its video.

        uint8 [t 3 height width], with the protocol's size. VideoError if it cannot be read.
        """
        clip, decoder = video.read(self.item(case).video, case.frames if frames is None else frames)
        return self.to_size(clip), decoder

    def image(self, case: Case) -> Tensor:
        """The input image, uint8 [3 height width], with the protocol's size."""
        return self.reference(case, [case.frames[case.condition_frame]])[0][0]

    def end_image(self, case: Case) -> Tensor:
        """The last frame of the reference clip, uint8 [3 height width], with the protocol's size."""
        return self.reference(case, case.frames[-1:])[0][0]

    def request(self, case: Case, with_reference: bool = False) -> Request:
        """The request to the model for this case. It has an end image if the protocol's condition is "ends"."""
        has_end = self.protocol.condition == "ends"
        return Request(
            clip_id=case.id,
            image=self.image(case),
            prompt=case.prompt,
            num_frames=self.protocol.num_frames,
            fps=case.fps,
            frame_stride=case.frame_stride,
            seed=case.seed,
            end_image=self.end_image(case) if has_end else None,
            reference=self.real(case) if with_reference else None,
        )

    def real(self, case: Case) -> Tensor:
        """What the model `real` returns: the reference clip; or the second take, in its own size."""
        if self.protocol.reference != "takes":
            return self.reference(case)[0]
        takes = self.item(case).takes
        if takes is None:
            raise video.VideoError(f"{case.id}: its data set has no takes of the real event")
        return takes.second.clip(case.fps, self.protocol.num_frames / case.fps)

    def clip(self, case: Case) -> Tensor:
        """The generated clip in its own size, uint8 [t 3 h w]. Its pixels are not checked."""
        if case.id in self.folder:
            item, own = self.folder[case.id]
            return video.read(item.video, own.frames)[0]
        return video.read_clip(self.directory.clip(case.id))[0]

    def generated(self, case: Case) -> Tensor:
        """The clip to score, uint8 [t 3 height width]; with size = "model", in its own size.

        UserError if it was changed; VideoError if there is none.
        """
        if case.id in self.folder:
            return self._as_scored(self.clip(case))
        row = self.directory.finished_sample(case.id)
        if row is None:
            reason = f"its video {case.video} could not be read, or its file was removed"
            raise video.VideoError(f"there is no clip for {case.id}: {reason}")
        clip = self.clip(case)
        if pixels_sha256(clip) != row["sha256"]:
            raise UserError(
                f"{self.directory.clip(case.id)} was changed after sampling (its pixels changed). "
                "Remove it and run the same command again"
            )
        return self._as_scored(clip)

    def _as_scored(self, clip: Tensor) -> Tensor:
        return clip if self.protocol.size == "model" else self.to_size(clip)

    def to_size(self, clip: Tensor) -> Tensor:
        """Resize as in the protocol: uint8 [t 3 h w] -> uint8 [t 3 height width]."""
        return to_size(clip, self.protocol)


def to_size(clip: Tensor, protocol: Protocol) -> Tensor:
    """Resize as in a protocol: uint8 [t 3 h w] -> uint8 [t 3 height width]."""
    p = protocol
    return resize(clip, p.height, p.width, p.resize, p.interpolation, p.antialias)
