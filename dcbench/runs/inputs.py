"""The inputs of a protocol as files: how a closed system is given the same images and prompts as every other model."""

from pathlib import Path

from PIL import Image

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

    A line of inputs.jsonl has `clip_id image prompt num_frames fps width height seed`; `image` is relative to the
    folder. UserError if the folder is not empty, or a video cannot be read.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose another: --out DIR")
    run = planning.plan(find_model("still"), dataset, protocol, data, out, seed, limit, quiet=quiet, write=False)
    lines = []
    images = video.in_order(run.image, run.cases, workers=2)
    for case, image in zip(run.cases, track(images, len(run.cases), "writing inputs", quiet=quiet), strict=True):
        if isinstance(image, UserError):
            raise image
        name = f"images/{case.item_id}.png"
        with atomic_write(out / name) as temporary:
            Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(temporary, "PNG")
        lines.append(
            {
                "clip_id": case.id,
                "image": name,
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
