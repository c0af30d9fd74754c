"""Sampling, the first half of a run: make every missing clip. After an interruption, the same call continues."""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from dcbench import machine, video
from dcbench.catalogue import ModelCard, load_entry_point
from dcbench.clips import pixels_sha256
from dcbench.errors import SharedError, UserError
from dcbench.escape import screen
from dcbench.files import sha256_file
from dcbench.models.base import (
    ChecksFirst,
    ImageToVideo,
    PreparesFirst,
    Request,
    Runtime,
    Wanted,
    check_generated,
    check_wanted,
)
from dcbench.progress import track
from dcbench.ranks import gather, held_by_first_rank, join_ranks, on_first_rank, rank, together, world_size
from dcbench.record import Case
from dcbench.runs.run import Options, Run


def sample(run: Run, options: Options) -> None:
    """Make every missing clip; each rank makes its share.

    UserError if the disk is too full, a clip is wrong, or, in the end, if a video could not be read for a reason that
    may pass.
    """
    if run.model is None:
        return
    join_ranks()
    with held_by_first_rank(run.directory.locked):
        on_first_rank(run.directory.mend)
        finished = run.directory.finished_samples()
        missing = [case for case in run.cases if case.id not in finished]
        lost: list[str] = []
        if missing:
            lost = together(lambda: _make(run, options, missing))
        raise_lost([reason for part in gather(lost) for reason in part], "generated")


def raise_lost(reasons: Sequence[str], what: str) -> None:
    """UserError if there are clips that the same command may still get."""
    if reasons:
        raise SharedError(
            f"{len(reasons)} clips were not {what}, for a reason that may pass: {reasons[0]}. Give the same command "
            "again; what is finished is kept. If this stays so, remove or replace the file"
        )


def _make(run: Run, options: Options, missing: Sequence[Case]) -> list[str]:
    """Make this rank's share of the missing clips. Returns why videos could not be read, where that may pass."""
    assert run.model is not None
    _check_room(run, missing)
    runtime = options.runtime()
    number = run.protocol.num_frames
    check_wanted(run.model, [Wanted(case.id, number, case.fps, case.frame_stride) for case in missing])
    machine.forget_peak_memory()
    model: ImageToVideo = _load(run.model, runtime)
    if isinstance(model, ChecksFirst):
        model.check([case.id for case in missing])
    mine = missing[rank() :: world_size()]
    batches = [mine[i : i + options.batch_size] for i in range(0, len(mine), options.batch_size)]
    done = len(run.cases) - len(missing)
    spent = _prepare(run, model, mine)
    facts = {
        "device": runtime.device,
        "dtype": runtime.dtype or "float32",
        "hardware": machine.hardware(runtime.device),
    }
    facts |= getattr(model, "facts", {})  # from the model itself: its precision, its weights
    lost: list[str] = []
    made = _sample_batches(run, model, batches, facts, spent, lost)
    quiet = options.quiet or rank() > 0
    for _ in track(made, len(mine) + done, "generating", done, quiet, whole=len(run.cases)):
        pass
    return lost


def _load(card: ModelCard, runtime: Runtime) -> ImageToVideo:
    try:
        return load_entry_point(card)(card, runtime)
    except SystemExit as error:  # it would end dcbench without a word
        raise UserError(f"{card.name}: its code ends the program (exit code {error.code}) when it is loaded") from error


def _prepare(run: Run, model: ImageToVideo, cases: Sequence[Case]) -> dict[str, float]:
    """Give all requests to a model with `prepare`. Returns the seconds that it spent, by clip id."""
    if not isinstance(model, PreparesFirst):
        return {}

    def requests() -> Iterator[Request]:
        for case in cases:
            with contextlib.suppress(UserError):  # _sample_batches reports a video that cannot be read
                yield run.request(case, "reference" in model.conditions_on)

    return model.prepare(requests(), run.directory.path / "work")


def _check_room(run: Run, missing: Sequence[Case]) -> None:
    """Raise UserError if the disk is too full. This check is cheap, so it comes before the model loads."""
    free = shutil.disk_usage(run.directory.path).free
    needed = len(missing) * run.protocol.num_frames * run.protocol.height * run.protocol.width  # about raw bytes / 3
    if free < needed:
        raise UserError(
            f"{run.directory.path}: {free / 1e9:.2f} GB free, about {needed / 1e9:.2f} GB needed for "
            f"{len(missing)} clips. Free some room, or choose another disk: --out DIR"
        )


def _sample_batches(
    run: Run,
    model: ImageToVideo,
    batches: Sequence[Sequence[Case]],
    facts: dict[str, Any],
    spent: dict[str, float],
    lost: list[str],
) -> Iterator[str]:
    """Make and store the clips of each batch. Yields the id of each case, also if its video could not be read.

    `lost` collects why videos could not be read, where the reason may pass.
    """

    def read(batch: Sequence[Case]) -> list[Request | UserError]:
        requests: list[Request | UserError] = []
        for case in batch:
            try:
                requests.append(run.request(case, "reference" in model.conditions_on))
            except UserError as error:
                requests.append(error)
        return requests

    for batch, got in zip(batches, video.in_order(read, batches), strict=True):
        if isinstance(got, UserError):
            raise got
        for case, request in zip(batch, got, strict=True):
            if isinstance(request, UserError):
                print(screen(f"cannot read {case.video} for clip {case.id}: {request}"), file=sys.stderr, flush=True)
                if isinstance(request, video.PassingError):
                    lost.append(f"clip {case.id}, {request}")
        requests = [request for request in got if isinstance(request, Request)]
        start = time.perf_counter()
        made = model.generate(requests) if requests else []
        seconds = time.perf_counter() - start
        if len(made) != len(requests):
            raise UserError(f"model {run.name} returned {len(made)} clips for {len(requests)} requests")
        for request, clip in zip(requests, made, strict=True):
            clip = check_generated(clip, request, run.name).cpu()
            file = run.directory.clip(request.clip_id)
            video.write_lossless(file, clip, request.fps)
            run.directory.append_sample(
                {
                    "id": request.clip_id,
                    "sha256": pixels_sha256(clip),
                    "file_sha256": sha256_file(file),  # of the file, to find damage without decoding
                    "shape": list(clip.shape),
                    "seconds": round(seconds / len(requests) + spent.get(request.clip_id, 0), 4),
                    "peak_memory_mb": round(machine.peak_memory_mb(), 1),
                    **facts,
                    **getattr(model, "clip_facts", {}).get(request.clip_id, {}),
                }
            )
        yield from (case.id for case in batch)
