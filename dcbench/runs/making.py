"""A model at work: requests in, clip files and their lines for samples.jsonl out. Every engine of a run uses it."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dcbench import machine, video
from dcbench.catalogue import ModelCard, load_entry_point
from dcbench.clips import pixels_sha256
from dcbench.errors import UserError
from dcbench.files import sha256_file
from dcbench.models.base import ChecksFirst, ImageToVideo, PreparesFirst, Request, Runtime, check_generated
from dcbench.runs.directory import Line, RunDirectory


class Maker:
    """A loaded model that puts its clips into the directory of a run."""

    def __init__(self, card: ModelCard, runtime: Runtime) -> None:
        machine.forget_peak_memory()
        self.card = card
        self.model = _load(card, runtime)
        self.facts: Line = {
            "device": runtime.device,
            "dtype": runtime.dtype or "float32",
            "hardware": machine.hardware(runtime.device),
        }
        self.facts |= getattr(self.model, "facts", {})  # from the model itself: its precision, its weights
        self.spent: Mapping[str, float] = {}  # seconds before `make`, by clip id

    def check(self, clip_ids: Sequence[str]) -> None:
        """Raise UserError if the model knows already that it cannot make one of these clips."""
        if isinstance(self.model, ChecksFirst):
            self.model.check(clip_ids)

    @property
    def prepares(self) -> bool:
        """Whether the model wants all requests before the first clip."""
        return isinstance(self.model, PreparesFirst)

    def prepare(self, requests: Iterable[Request], folder: Path) -> None:
        """Give all requests to a model that wants them before the first clip."""
        assert isinstance(self.model, PreparesFirst)
        self.spent = self.model.prepare(requests, folder)

    def make(self, requests: Sequence[Request], directory: RunDirectory) -> list[Line]:
        """Make and store a batch of clips. UserError for a clip that is not what was asked for."""
        start = time.perf_counter()
        made = self.model.generate(requests) if requests else []
        seconds = time.perf_counter() - start
        if len(made) != len(requests):
            raise UserError(f"model {self.card.name} returned {len(made)} clips for {len(requests)} requests")
        lines = []
        for request, clip in zip(requests, made, strict=True):
            clip = check_generated(clip, request, self.card.name).cpu()
            file = directory.clip(request.clip_id)
            video.write_lossless(file, clip, request.fps)
            lines.append(
                {
                    "id": request.clip_id,
                    "sha256": pixels_sha256(clip),
                    "file_sha256": sha256_file(file),  # of the file, to find damage without decoding
                    "shape": list(clip.shape),
                    "seconds": round(seconds / len(requests) + self.spent.get(request.clip_id, 0), 4),
                    "peak_memory_mb": round(machine.peak_memory_mb(), 1),
                    **self.facts,
                    **getattr(self.model, "clip_facts", {}).get(request.clip_id, {}),
                }
            )
        return lines


def _load(card: ModelCard, runtime: Runtime) -> ImageToVideo:
    try:
        return load_entry_point(card)(card, runtime)
    except SystemExit as error:  # it would end dcbench without a word
        raise UserError(f"{card.name}: its code ends the program (exit code {error.code}) when it is loaded") from error


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch uses one thread in the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
