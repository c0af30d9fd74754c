"""The inputs of a protocol as files: how a closed system is given the same images and prompts as every other model."""

from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image
from torch import Tensor

from dcbench import video
from dcbench.catalogue import ClipShape, DatasetCard, find_model
from dcbench.datasets.images import Picture
from dcbench.errors import UserError
from dcbench.files import atomic_write, canonical, write_text
from dcbench.progress import track
from dcbench.protocol import Protocol
from dcbench.record import Case, write_manifest
from dcbench.runs import planning
from dcbench.runs.run import Run


def write_inputs(
    dataset: DatasetCard,
    protocol: Protocol,
    out: Path,
    data: Path | None = None,
    seed: int = 123,
    limit: int | None = None,
    quiet: bool = False,
    shape: ClipShape | None = None,
) -> int:
    """Write images/, inputs.jsonl and manifest.jsonl. Returns the number of clips.

    A line of inputs.jsonl has `clip_id file image prompt num_frames fps width height seed`, and `end_image` with
    condition = "ends"; pictures are relative to the folder, `file` is the name that the clip should have.
    What the protocol leaves to the model is left out of a line, and its pictures are those of the data set in full
    size. `shape`: the size of the system's clips, where pictures depend on it. UserError if the folder is not empty,
    if the protocol has a size of its own, or a video cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another: --out DIR")
    resolved = protocol.resolved(dataset.name)
    if shape and resolved.size == "protocol":
        raise UserError(
            f"protocol {protocol.name} makes clips of {resolved.width}x{resolved.height}, so leave out --size"
        )
    model = find_model("hold" if resolved.condition == "ends" else "still")
    model = model.model_copy(update={"clip": shape}) if shape else model
    run = planning.plan(model, dataset, protocol, data, out, seed, limit, quiet=quiet, write=False)
    write = _write_sources if resolved.size == "model" else _write_resized
    lines = []
    pictures = video.in_order(lambda case: write(run, case, out), run.cases, workers=2)
    for case, named in zip(run.cases, track(pictures, len(run.cases), "writing inputs", quiet=quiet), strict=True):
        if isinstance(named, UserError):
            raise named
        lines.append(
            {"clip_id": case.id, "file": _file(run, case), **named, "prompt": case.prompt, **_asked(run, case)}
        )
    write_manifest(out / "manifest.jsonl", run.cases)
    write_text(out / "inputs.jsonl", "".join(canonical(line) + "\n" for line in lines))
    return len(lines)


def _asked(run: Run, case: Case) -> dict[str, Any]:
    """Length, rate, size and seed of a clip, without those that are the model's own."""
    p, asked = run.protocol, dict[str, Any]()
    if p.frames == "protocol":
        asked |= {"num_frames": p.num_frames, "fps": case.fps}
    elif p.seconds is not None:
        asked |= {"seconds": p.seconds}
    if p.size == "protocol":
        asked |= {"width": p.width, "height": p.height}
    return asked | {"seed": case.seed}


def _file(run: Run, case: Case) -> str:
    """The name of the clip's file: the benchmark's own, or its id."""
    name = run.item(case).clip_name
    sample = "" if case.sample is None else f"-{case.sample}"
    return f"{name}{sample}.mp4" if name else f"{case.id}.mp4"


def _write_resized(run: Run, case: Case, out: Path) -> dict[str, str]:
    """Write the input image, and the last one if the protocol has both ends, in the protocol's size."""
    request, name, end_name = run.request(case), f"images/{case.item_id}.png", f"images/{case.item_id}-end.png"
    _write_picture(out / name, request.image)
    if request.end_image is None:
        return {"image": name}
    _write_picture(out / end_name, request.end_image)
    return {"image": name, "end_image": end_name}


def _write_sources(run: Run, case: Case, out: Path) -> dict[str, str]:
    """Write the picture as the data set has it, once for all its prompts; a frame of a video as PNG."""
    source = run.item(case).video
    if isinstance(source, Picture):
        name = f"images/{PurePosixPath(case.video).name}"
        if not (out / name).is_file():
            data = source.data()
            with atomic_write(out / name) as temporary:
                temporary.write_bytes(data)
        return {"image": name}
    name = f"images/{case.item_id}.png"
    if case.is_first:
        _write_picture(out / name, video.read(source, [case.frames[case.condition_frame]])[0][0])
    return {"image": name}


def _write_picture(path: Path, image: Tensor) -> None:
    """uint8 [3 h w] -> a PNG file."""
    with atomic_write(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, "PNG")
