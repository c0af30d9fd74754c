"""Quality of a model on the shapes world, as the analytic judge sees it: one table, one picture.

python -m dcbench.analysis.quality --model dynamicrafter-tiny --clips 256 --fvd --jobs 2 --out quality

`--fvd` adds the FVD of the clips, of the same images standing still, and of the model with empty prompts.
`--curve FILE.csv` draws what was measured during a training, quality against core-hours, and does nothing else.
"""

import argparse
import csv
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from dcbench.analysis.judge import ASPECTS, judge
from dcbench.catalogue import find_model, load_entry_point, with_overrides
from dcbench.clips import resize
from dcbench.datasets.base import Item
from dcbench.datasets.shapes import Shapes, ShapesVideo
from dcbench.models.base import ImageToVideo, Request, Runtime
from dcbench.seeding import clip_seed

BATCH = 16  # clips sampled at a time
Case = tuple[Item, Tensor, Tensor]  # a video, its real clip and the generated one


def requests(
    items: Sequence[Item], size: int, stride: int, seed: int, prompts: bool = True
) -> Iterator[tuple[Request, Tensor]]:
    """A request for each item, and its real clip uint8 [16, 3, size, size]; from the video's first frame on."""
    for item in items:
        info = item.video.info()
        real = resize(item.video.read([i * stride for i in range(16)]), size, size)
        fps = info.fps / stride
        yield (
            Request(item.id, real[0], item.captions[0] if prompts else "", 16, fps, stride, clip_seed(seed, item.id)),
            real,
        )


def generate(
    model: ImageToVideo, items: Sequence[Item], size: int, stride: int = 3, seed: int = 0, prompts: bool = True
) -> list[Case]:
    """What the model makes of each video's first frame and caption."""
    pairs = list(requests(items, size, stride, seed, prompts))
    cases: list[Case] = []
    for start in range(0, len(pairs), BATCH):
        part = pairs[start : start + BATCH]
        made = model.generate([request for request, _ in part])
        cases += [
            (item, real, resize(clip, size, size))
            for item, (_, real), clip in zip(items[start : start + BATCH], part, made, strict=True)
        ]
    return cases


def judged(cases: Sequence[Case], stride: int = 3) -> dict[str, float]:
    """Shares of clips that show what their caption says, PSNR of the first frame."""
    agreed = []
    for item, real, made in cases:
        assert isinstance(item.video, ShapesVideo)
        row = judge(made, item.video.fps / stride).agrees(item.video.scene)
        agreed.append({**row, "all": all(row.values()), "psnr": psnr(made[0], real[0])})
    table = {aspect: sum(row[aspect] for row in agreed) / len(agreed) for aspect in (*ASPECTS, "all")}
    psnrs = sorted(row["psnr"] for row in agreed)
    return {
        "clips": float(len(cases)),
        **table,
        "first_frame_psnr": sum(psnrs) / len(psnrs),
        "first_frame_psnr_median": psnrs[len(psnrs) // 2],
    }


@dataclass(frozen=True)
class Part:
    """What one process did: its cases, processor seconds of their sampling, I3D features of each set of clips."""

    cases: list[Case]
    seconds: float
    features: dict[str, Tensor]  # [n, 400] each


def measure_part(
    name: str, settings: Sequence[str], items: Sequence[Item], stride: int = 3, seed: int = 0, fvd: bool = False
) -> Part:
    """The model by its card's name on these videos; with `fvd` also with empty prompts, and features of all."""
    card = with_overrides(find_model(name), list(settings))
    model = load_entry_point(card)(card, Runtime())
    size = card.clip.height or 64
    started = time.process_time()
    cases = generate(model, items, size, stride, seed=seed)
    seconds, features = time.process_time() - started, {}
    if fvd:
        from dcbench.metrics.extractors import i3d_extractor

        silent = generate(model, items, size, stride, seed=seed, prompts=False)
        sets = {
            "real": [real for _, real, _ in cases],
            "model": [made for *_, made in cases],
            "without_prompt": [made for *_, made in silent],
            "still": [real[:1].expand_as(real) for _, real, _ in cases],
        }
        extractor = i3d_extractor()
        features = {name: extractor.extract(clips) for name, clips in sets.items()}
    return Part(cases, seconds, features)


def measure(
    name: str,
    settings: Sequence[str],
    items: Sequence[Item],
    stride: int = 3,
    seed: int = 0,
    fvd: bool = False,
    jobs: int = 1,
) -> tuple[dict[str, float], list[Case]]:
    """The table and the cases, computed by `jobs` processes; the same numbers whatever their number is."""
    share = BATCH * math.ceil(len(items) / BATCH / jobs)  # whole batches, the same as of one process
    slices = [items[start : start + share] for start in range(0, len(items), share)]
    work = partial(measure_part, name, settings, stride=stride, seed=seed, fvd=fvd)
    if jobs == 1:
        parts = [work(items)]
    else:
        with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
            parts = list(pool.map(work, slices))
    cases = [case for part in parts for case in part.cases]
    table = judged(cases, stride)
    table["cpu_seconds_per_clip"] = sum(part.seconds for part in parts) / len(cases)
    if fvd:
        features = {key: torch.cat([part.features[key] for part in parts]) for key in parts[0].features}
        table |= distances(features)
    return table, cases


def distances(features: Mapping[str, Tensor]) -> dict[str, float]:
    """FVD of each set of features against `real`, with its 95 % interval; as every score of dcbench."""
    from dcbench.metrics.distances import score_frechet

    found: dict[str, float] = {}
    for name in features:
        if name != "real":
            score = score_frechet(features["real"], features[name])
            found[f"fvd_{name}"] = score.value
            if score.ci95:
                found[f"fvd_{name}_low"], found[f"fvd_{name}_high"] = score.ci95
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between two uint8 frames; 100 for equal ones."""
    mse = float((a.float() - b.float()).square().mean())
    return min(100.0, 10 * math.log10(255**2 / mse)) if mse else 100.0


def grid(cases: Sequence[Case], path: Path, frames: Sequence[int] = (0, 3, 6, 9, 12, 15)) -> None:
    """A row a case: input, generated frames, the real last frame; the caption above."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.1 * (len(frames) + 2), 1.3 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), len(frames) + 2, squeeze=False)
    for row, (item, real, made) in zip(axes, cases, strict=True):
        pictures = [real[0], *(made[i] for i in frames), real[-1]]
        names = ["input", *(f"{i + 1}" for i in frames), "real, last"]
        for axis, picture, name in zip(row, pictures, names, strict=True):
            axis.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
            axis.text(0.5, -0.04, name, fontsize=5, ha="center", va="top", transform=axis.transAxes)
        row[0].set_title(item.captions[0], fontsize=6, loc="left")
    figure.savefig(path, dpi=110)


def draw_curve(source: Path) -> Path:
    """Shares of right clips against core-hours, of a CSV with the columns core_hours, clips, shape and motion."""
    from dcbench.analysis.statistics import wilson
    from dcbench.reports.figures import Curve, curves

    with source.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = {}
    for aspect in ("shape", "motion"):
        points = []
        for row in rows:
            if row[aspect]:  # not every aspect was measured every time
                count = int(row["clips"])
                points.append((float(row["core_hours"]), *wilson(round(float(row[aspect]) * count), count)))
        hours, shares, intervals = zip(*points, strict=True)
        lines[aspect] = Curve(hours, shares, [low for low, _ in intervals], [high for _, high in intervals])
    target = source.with_suffix(".png")
    curves(target, lines, "core-hours", "share of clips", title="Tiny weights: quality against training time")
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynamicrafter-tiny")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="settings")
    parser.add_argument("--clips", type=int, default=256)
    parser.add_argument(
        "--split", choices=("test", "train"), default="test", help="train: the first videos, learned by heart?"
    )
    parser.add_argument("--stride", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fvd", action="store_true", help="four I3D passes and a second sampling: slow")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with one thread and a model of its own")
    parser.add_argument("--curve", type=Path, metavar="CSV")
    parser.add_argument("--out", type=Path, default=Path("quality"))
    given = parser.parse_args()
    if given.curve:
        print(draw_curve(given.curve))
        return
    if given.clips < 1 or given.jobs < 1:
        parser.error("--clips and --jobs: expected at least 1")
    size = with_overrides(find_model(given.model), given.settings).clip.height or 64
    items = Shapes(size=size, train_videos=given.clips, test_videos=given.clips).items(given.split)
    table, cases = measure(given.model, given.settings, items, given.stride, given.seed, given.fvd, given.jobs)
    given.out.mkdir(parents=True, exist_ok=True)
    grid(cases[:12], given.out / "cases.png")
    (given.out / "quality.json").write_text(json.dumps(table, indent=1))
    for name, value in table.items():
        print(f"{name:26} {value:.3f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
