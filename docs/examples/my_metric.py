"""A metric that is a program: colourfulness of each clip (Hasler & Suesstrunk 2003). Needs numpy and Pillow alone."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def colourfulness(path):
    r, g, b = np.asarray(Image.open(path), dtype=float).transpose(2, 0, 1)
    rg, yb = r - g, (r + g) / 2 - b
    return np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean())


with open(sys.argv[1]) as requests, open(sys.argv[2], "w") as output:
    for line in requests:  # load your network before this loop: the program starts once for all clips
        request = json.loads(line)
        frames = [colourfulness(path) for path in sorted(Path(request["clip"]).iterdir())]
        print(json.dumps({"id": request["id"], "value": np.mean(frames), "first": frames[0]}), file=output, flush=True)
