"""How much of an I2V FVD is the tie between a clip and its own reference? Measured with I3D, on real clips alone.

    uv run python benchmarks/copying_models.py [--clips 128] [--videos DIR] [--figure FILE]

Every 'model' here returns real clips of the same world, so its true FVD and KVD are 0. They differ in the tie alone:
clips of other videos (no tie), later frames of the own reference's video, and exact copies of a share of the
references. `--videos DIR` does the same with your own videos: the first and the last frames of each.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dcbench.clips import resize
from dcbench.datasets.shapes import Shapes
from dcbench.metrics.distances import score_frechet, score_frechet_infinity, score_kernel
from dcbench.metrics.extractors import i3d_extractor
from dcbench.reports.figures import Curve, curves
from dcbench.video import VideoFile, read
from dcbench.video_files import find_videos

FRAMES = 16
COPIED = (0.25, 0.5, 0.75, 1.0)


def features(clips: list[Tensor]) -> Tensor:
    return i3d_extractor("squash", "cpu").extract(clips).double()


def shapes_clips(count: int) -> dict[str, Tensor]:
    """Features of `count` references, of later frames of the same videos, and of as many other videos."""
    items = Shapes().items("test")[: 2 * count]
    start = range(FRAMES), range(24, 24 + FRAMES)
    return {
        "reference": features([item.video.read(list(start[k % 2])) for k, item in enumerate(items[:count])]),
        "other time": features([item.video.read(list(start[1 - k % 2])) for k, item in enumerate(items[:count])]),
        "other video": features([item.video.read(list(start[k % 2])) for k, item in enumerate(items[count:])]),
    }


def models_of(sides: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each model's features, in the order of its references."""
    count = len(sides["reference"])
    rank = torch.from_numpy(np.random.default_rng(0).permutation(count))
    copies = {
        f"copies {share:.0%} of the references": torch.where(
            (rank < share * count)[:, None], sides["reference"], sides["other video"]
        )
        for share in COPIED
    }
    return {"other videos: no tie": sides["other video"], "the same videos, other frames": sides["other time"]} | copies


def subsets(count: int, size: int) -> list[Tensor]:
    order = torch.from_numpy(np.random.default_rng(1).permutation(count))
    return [order[k : k + size] for k in range(0, count - size + 1, size)]


def table_of_shapes(count: int, figure: Path | None) -> None:
    sides = shapes_clips(count)
    sizes, lines = [count // 8, count // 4, count // 2, count], dict[str, Curve]()
    names = [str(k) for k in range(count)]
    print(f"\nMoving shapes, true FVD and KVD 0. FVD at N clips: mean over disjoint subsets of {count} pairs.\n")
    print("| model | " + " | ".join(f"FVD, N = {n}" for n in sizes) + " | without bias | FVD∞ | KVD | KVD, all pairs |")
    print("|:--|" + "--:|" * (len(sizes) + 4))
    for model, made in models_of(sides).items():
        values = []
        for size in sizes:
            found = [score_frechet(sides["reference"][s], made[s], interval=False).value for s in subsets(count, size)]
            values.append(float(np.mean([value or 0.0 for value in found])))
        whole, limit, kernel = (
            score(sides["reference"], made, names) for score in (score_frechet, score_frechet_infinity, score_kernel)
        )
        last = [whole.details.get("bias_corrected", 0.0), limit.value or 0.0]
        cells = [*(f"{value:.1f}" for value in values), *(f"{value:.1f}" for value in last)]
        cells += [f"{kernel.value:.2f}", f"{kernel.details['all_pairs']:.2f}"]
        print(f"| {model} | " + " | ".join(cells) + " |", flush=True)
        lines[model] = Curve(list(map(float, sizes)), values)
    if figure:
        curves(figure, lines, "clips (N)", "FVD", title="Models with a true FVD of 0 (moving shapes, I3D)")


def table_of_videos(folder: Path) -> None:
    """The first frames of half of the films, against their own last frames and against those of the other half."""
    films = [VideoFile(folder / path) for path in find_videos(folder)]
    films = [film for film in films if film.info().num_frames >= 2 * FRAMES]
    ends = []
    for film in films:
        last = film.info().num_frames - FRAMES
        windows = [read(film, range(start, start + FRAMES))[0] for start in (0, last)]
        ends.append([resize(clip, 256, 256, "crop", "bilinear", True) for clip in windows])
    first, later = (features([pair[side] for pair in ends]) for side in (0, 1))
    half, tied, apart = len(films) // 2, [], []
    for draw in range(200):
        order = torch.from_numpy(np.random.default_rng(draw).permutation(len(films)))
        one, two = order[:half], order[half : 2 * half]
        tied.append(score_frechet(first[one], later[one], interval=False).value)
        apart.append(score_frechet(first[one], later[two], interval=False).value)
    print(f"\n{len(films)} real films; FVD of {half} first windows, mean of 200 random halves:\n")
    print("| against | FVD |\n|:--|--:|")
    print(f"| last windows of the same {half} films | {np.mean([v or 0 for v in tied]):.0f} |")
    print(f"| last windows of {half} other films | {np.mean([v or 0 for v in apart]):.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=128, help="pairs of shapes clips; 0: none")
    parser.add_argument("--videos", type=Path, help="a folder of your own videos")
    parser.add_argument("--figure", type=Path, help="draw FVD against the number of clips")
    given = parser.parse_args()
    if given.clips:
        table_of_shapes(given.clips, given.figure)
    if given.videos:
        table_of_videos(given.videos)


if __name__ == "__main__":
    main()
