"""The inputs of a protocol as files: how a closed system is given the same images and prompts as every other model."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from dcbench import video
from dcbench.catalogue import DatasetCard, find_model
from dcbench.errors import UserError
from dcbench.files import atomic_write, canonical, write_text
from dcbench.progress import track
from dcbench.protocol import Protocol
from dcbench.record import write_manifest
from dcbench.runs import planning


def write_inputs(
    dataset: DatasetCard,
    protocol: Protocol,
    out: Path,
    data: Path | None = None,
    seed: int = 123,
    limit: int | None = None,
    quiet: bool = False,
) -> int:
    """Write images/<item>.png, inputs.jsonl and manifest.jsonl. Returns the number of clips.

    A line of inputs.jsonl has `clip_id image prompt num_frames fps width height seed`, and `end_image` with
    condition = "ends"; pictures are relative to the folder. UserError if the folder is not empty, or a video cannot be
    read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another: --out DIR")
    ends = protocol.resolved(dataset.name).condition == "ends"
    model = find_model("hold" if ends else "still")
    run = planning.plan(model, dataset, protocol, data, out, seed, limit, quiet=quiet, write=False)
    lines = []
    requests = video.in_order(run.request, run.cases, workers=2)
    for case, request in zip(run.cases, track(requests, len(run.cases), "writing inputs", quiet=quiet), strict=True):
        if isinstance(request, UserError):
            raise request
        name, end_name = f"images/{case.item_id}.png", f"images/{case.item_id}-end.png"
        _write_picture(out / name, request.image)
        if request.end_image is not None:
            _write_picture(out / end_name, request.end_image)
        lines.append(
            {
                "clip_id": case.id,
                "image": name,
                **({"end_image": end_name} if ends else {}),
                "prompt": case.prompt,
                "num_frames": run.protocol.num_frames,
                "fps": case.fps,
                "width": run.protocol.width,
                "height": run.protocol.height,
                "seed": case.seed,
            }
        )
    write_manifest(out / "manifest.jsonl", run.cases)
    write_text(out / "inputs.jsonl", "".join(canonical(line) + "\n" for line in lines))
    return len(lines)


def _write_picture(path: Path, image: Tensor) -> None:
    """uint8 [3 h w] -> a PNG file."""
    with atomic_write(path) as temporary:
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, "PNG")
