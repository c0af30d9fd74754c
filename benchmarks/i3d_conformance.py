"""Compares I3D features of real clips with those of the original network, recorded in golden files.

    uv run python benchmarks/i3d_conformance.py --clips DIR --golden DIR

`--golden` holds i3d_clips.npz (names, sha256 of the first 16 frames, logits under four preprocessings) and
kinetics400_labels.json; `--clips` is searched for files of those names. Prints the largest logit error of each clip and
preprocessing, and the class; exits with 1 when an error exceeds 1e-3 or no clip is found.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np

from dcbench import video
from dcbench.metrics.extractors import I3DExtractor, Preprocessing

LIMIT = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--golden", type=Path, required=True)
    given = parser.parse_args()
    golden = np.load(given.golden / "i3d_clips.npz")
    labels = json.loads((given.golden / "kinetics400_labels.json").read_text())["labels"]
    extractors = {mode: I3DExtractor(mode) for mode in get_args(Preprocessing)}
    worst, found = 0.0, 0
    for index, name in enumerate(golden["names"].tolist()):
        path = next(iter(sorted(given.clips.rglob(name))), None)
        if path is None:
            print(f"{name}: not in {given.clips}")
            continue
        found += 1
        clip, decoder = video.read_frames(path, range(16))
        pixels = np.ascontiguousarray(clip.permute(0, 2, 3, 1).numpy())
        same = hashlib.sha256(pixels.tobytes()).hexdigest() == golden["sha256_frames"][index]
        cells = []
        for mode, extractor in extractors.items():
            logits = extractor(clip[None])[0].numpy()
            error = float(np.abs(logits - golden[f"logits_{mode}"][index]).max())
            worst = max(worst, error)
            cells.append(f"{mode} {error:.1e}")
            label = labels[int(logits.argmax())]
        print(f"{name}: frames {'equal' if same else 'differ'} ({decoder}); {', '.join(cells)}; {label}", flush=True)
    print(f"{found} clips, largest error {worst:.1e}, limit {LIMIT:g}")
    sys.exit(0 if found and worst <= LIMIT else 1)


if __name__ == "__main__":
    main()
