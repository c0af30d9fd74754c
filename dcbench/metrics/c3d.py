"""C3D (Tran et al., arXiv 1412.0767), fine-tuned on UCF-101: the classifier of the Inception Score of videos.

The numbers are those of TGANv2's evaluation: its weights and its mean clip, as arrays in two .npz files. StyleGAN-V's
c3d_ucf101.pt is a copy of this network as TorchScript, which is code. dcbench does not run it, and reads the arrays.
"""

import zipfile
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.clips import check_clip
from dcbench.errors import UserError, first_line
from dcbench.metrics.base import FeatureExtractor
from dcbench.weights import check_finite, fill, tensors_sha256

FRAMES, SIZE, CLASSES = 16, 112, 101
MEAN_SHAPE = (3, FRAMES, 128, 171)  # the mean of the training clips, in BGR
CORNER = 8  # TGANv2 takes rows and columns 8 ... 119 of the mean clip, also of its 171 columns

# name: outputs in units of `width`; None: a max pool, of space alone in the first one
LAYERS = {
    "conv1a": 1, "pool1": None,
    "conv2a": 2, "pool2": None,
    "conv3a": 4, "conv3b": 4, "pool3": None,
    "conv4a": 8, "conv4b": 8, "pool4": None,
    "conv5a": 8, "conv5b": 8, "pool5": None,
}  # fmt: skip


class C3D(nn.Module):
    """float [b 3 16 112 112], BGR, 0 ... 255 minus the mean clip -> logits [b classes]. Smaller sizes are for tests."""

    def __init__(self, width: int = 64, hidden: int = 4096, classes: int = CLASSES) -> None:
        super().__init__()
        channels = 3
        for name, outputs in LAYERS.items():
            if outputs is None:  # the last pool makes 4 of 7 pixels: a part of a window counts
                kernel = (1 if name == "pool1" else 2, 2, 2)
                self.add_module(name, nn.MaxPool3d(kernel, ceil_mode=True))
            else:
                self.add_module(name, nn.Conv3d(channels, outputs * width, 3, padding=1))
                channels = outputs * width
        self.fc6 = nn.Linear(channels * 4 * 4, hidden)
        self.fc7 = nn.Linear(hidden, hidden)
        self.fc8 = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        for name in LAYERS:
            x = getattr(self, name)(x)
            x = x.relu_() if name.startswith("conv") else x
        return self.fc8(self.fc7(self.fc6(x.flatten(1)).relu_()).relu_())


class C3DExtractor(FeatureExtractor):
    """101 logits of a clip of 16 frames, no softmax."""

    name = "c3d-ucf101"
    preprocessing = "squash to 112 with aligned corners, BGR, minus the mean clip"
    min_frames = FRAMES

    def __init__(self, network: C3D, mean: Tensor, device: str = "cpu") -> None:
        """`mean`: the mean clip, float [3 16 128 171], BGR, 0 ... 255."""
        super().__init__()
        self.num_features = network.fc8.out_features
        self.network = network.to(device).eval().requires_grad_(False)
        cut = mean[:, :, CORNER : CORNER + SIZE, CORNER : CORNER + SIZE].to(device)
        self.register_buffer("mean", cut, persistent=False)
        self.weights_sha256 = tensors_sha256({**network.state_dict(), "mean": cut})

    def prepare(self, clips: Tensor) -> Tensor:
        """uint8 [b 16 3 h w], RGB -> float32 [b 3 16 112 112], BGR, minus the mean clip."""
        frames = (clips.flatten(0, 1).flip(1).float() / 127.5 - 1) * 128
        frames = F.interpolate(frames, (SIZE, SIZE), mode="bilinear", align_corners=True)
        return frames.unflatten(0, clips.shape[:2]).transpose(1, 2) + (128 - cast(Tensor, self.mean))

    @torch.inference_mode()
    def forward(self, clips: Tensor) -> Tensor:
        check_clip(clips.flatten(0, 1), "clips")
        if clips.shape[1] != FRAMES:
            raise UserError(f"C3D reads clips of {FRAMES} frames, got {clips.shape[1]}; use another protocol")
        x = self.prepare(clips.to(cast(Tensor, self.mean).device))
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            return self.network(x).float()


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz file as float32. UserError for another file. Pickled objects are not read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(np.asarray(arrays[name], dtype=np.float32)) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not an .npz file of arrays ({first_line(error)}); fetch it again") from error


def load_c3d(
    weights: Path, mean: Path, device: str = "cpu", width: int = 64, hidden: int = 4096, classes: int = CLASSES
) -> C3DExtractor:
    """From TGANv2's conv3d_deepnetA_ucf.npz and mean2.npz. UserError if the arrays do not fit."""
    network = C3D(width, hidden, classes)
    renamed = {"W": "weight", "b": "bias"}  # Chainer's names: conv1a/W
    state = {}
    for name, array in read_arrays(weights).items():
        layer, _, part = name.rpartition("/")
        state[f"{layer}.{renamed.get(part, part)}"] = array
    fill(network, state, weights, problem="does not hold TGANv2's C3D: {} arrays differ")
    clip = read_arrays(mean).get("mean")
    if clip is None or tuple(clip.shape) != MEAN_SHAPE:
        found = "no array 'mean'" if clip is None else f"an array of shape {list(clip.shape)}"
        raise UserError(f"{mean} holds {found}; expected the mean clip 'mean' of shape {list(MEAN_SHAPE)}")
    check_finite({"mean": clip}, mean)
    return C3DExtractor(network, clip, device)


@cache
def c3d_extractor(weights: Path, mean: Path, device: str = "cpu") -> C3DExtractor:
    """The extractor, shared by all metrics of this process."""
    return load_c3d(weights, mean, device)
