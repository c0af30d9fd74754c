"""Small runs for tests: a few clips of 32x32 pixels, and a model of its own that takes its time."""

from pathlib import Path

from dcbench.catalogue import find_dataset, find_model
from dcbench.protocol import find_protocol
from dcbench.runs import planning
from dcbench.runs.run import Run

KEPT = ["plan.json", "manifest.jsonl", "record.json", "per_clip.jsonl", "clips/*"]  # what depends on no process

SLOW = """
import os, time
from pathlib import Path

class Slow:
    conditions_on = frozenset({"image"})
    def __init__(self, card, runtime):
        self.card = card
    def generate(self, requests):
        time.sleep(float(os.environ.get("SLOW", "0")))
        with open("made", "a") as file:
            file.write("".join(f"{request.clip_id}\\n" for request in requests))
        return [request.image[None].repeat(request.num_frames, 1, 1, 1) for request in requests]
"""


def plan(out: Path, model: str = "zoom", limit: int = 4) -> Run:
    """A run of a model on the shapes world."""
    small = find_protocol("smoke").model_copy(update={"height": 32, "width": 32, "datasets": {}})
    return planning.plan(find_model(model), find_dataset("shapes"), small, out=out, limit=limit, quiet=True)


def world(folder: Path) -> Path:
    """The folder, with model.py and small.toml, a protocol of 32x32 pixels."""
    folder.mkdir(exist_ok=True)
    smoke = (Path(__file__).parents[2] / "dcbench" / "protocols" / "smoke.toml").read_text().split("[datasets")[0]
    (folder / "small.toml").write_text(smoke.replace("256", "32"))
    (folder / "model.py").write_text(SLOW)
    return folder


def kept(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for name in KEPT for path in sorted(out.glob(name))}
