"""A program for the metric camera_motion: where CoTracker2 finds a grid of 10x10 points in the first and last frame.

    python cotracker_program.py REQUESTS OUTPUT DEVICE cotracker2.pth

It runs in a copy of github.com/facebookresearch/co-tracker, by a Python with torch, numpy, Pillow and the packages that
CoTracker asks for. It needs no dcbench. Requests and answers: docs/metrics.md, "A metric that is a program".
"""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

GRID = 10


def load(checkpoint: str, device: str) -> Any:
    """CoTracker2 for whole clips. Only tensors are read from its file."""
    sys.path.insert(0, os.getcwd())
    tracker: Any = importlib.import_module("cotracker.predictor").CoTrackerPredictor(
        checkpoint=None, window_len=8, v2=True
    )
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=True)
    tracker.model.load_state_dict(loaded.get("model", loaded))
    return tracker.to(device)


def read(folder: str) -> torch.Tensor:
    """A folder of PNG files -> float [1 t 3 h w], 0..255"""
    frames = [np.asarray(Image.open(path).convert("RGB")) for path in sorted(Path(folder).iterdir())]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None].float()


def main(requests: str, output: str, device: str, checkpoint: str) -> None:
    tracker = load(checkpoint, device)
    with open(requests) as asked, open(output, "w") as answers:
        for line in asked:
            request = json.loads(line)
            tracks = tracker(read(request["clip"]).to(device), grid_size=GRID)[0][0].cpu()  # t 100 2
            answer = {"id": request["id"], "first": tracks[0].tolist(), "last": tracks[-1].tolist()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
