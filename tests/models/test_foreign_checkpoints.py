"""Checkpoints as others save them: in half precision, wrapped, in parts, with an average; and files that are none."""

import dataclasses
import gzip
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dcbench.errors import UserError
from dcbench.models.dynamicrafter import checkpoint
from dcbench.models.dynamicrafter.config import Config, DiffusionConfig
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.training.start import begin
from dcbench.weights import load_tensors

OUT = "model.diffusion_model.out.2.bias"
V = DiffusionConfig(prediction="v", zero_terminal_snr=True, dynamic_rescale=0.3)


@pytest.fixture
def released(networks: Networks) -> dict[str, Tensor]:
    _, optional = checkpoint.layout(networks.cfg)
    buffers = checkpoint.released_buffers(networks.cfg.diffusion)
    return networks.state_dict() | {key: buffers.get(key, torch.zeros(shape)) for key, shape in optional.items()}


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("diffusion", [DiffusionConfig(), V], ids=["eps", "v"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn])
@pytest.mark.parametrize("back", [False, True], ids=["stored", "stored as float32 later"])
def test_a_schedule_in_half_precision_is_the_variants_own(dtype: torch.dtype, back: bool, diffusion: DiffusionConfig):
    own = checkpoint.make_schedule(**dataclasses.asdict(diffusion))
    tensors = {"alphas_cumprod": own.alphas_cumprod.to(dtype)}
    if own.scale is not None:
        tensors["scale_arr"] = own.scale.to(dtype)
    tensors = {key: value.float() if back else value for key, value in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.schedule_of(tensors, diffusion, "model.ckpt")
    assert torch.equal(found.alphas_cumprod, own.alphas_cumprod)
    assert own.scale is None or (found.scale is not None and torch.equal(found.scale, own.scale))


def test_a_file_in_bfloat16_samples(released: dict[str, Tensor], cfg: Config, tmp_path: Path):
    path = saved({key: value.bfloat16() for key, value in released.items()}, tmp_path / "model.ckpt")
    _, schedule = checkpoint.load_networks(path, cfg)
    assert float(schedule.alphas_cumprod[0]) < 1


def test_a_schedule_that_cannot_be_sampled_is_an_error_and_another_one_is_a_warning(cfg: Config):
    own = checkpoint.make_schedule().alphas_cumprod
    with pytest.raises(UserError, match=r"alphas_cumprod goes from 1 to .* must fall from below 1"):
        checkpoint.schedule_of({"alphas_cumprod": (own * 1.01).clamp(max=1)}, cfg.diffusion, "model.ckpt")
    with pytest.warns(UserWarning, match="the file's is used"):
        found = checkpoint.schedule_of({"alphas_cumprod": (own * 0.9).bfloat16()}, cfg.diffusion, "model.ckpt")
    assert torch.equal(found.alphas_cumprod, (own * 0.9).bfloat16().float())


def test_the_scale_of_another_variant_is_told_in_half_precision_too():
    tensors = {"scale_arr": torch.full((1400,), 0.3).bfloat16()}
    assert checkpoint._near(0.3, tensors["scale_arr"][-1]) and not checkpoint._near(0.7, tensors["scale_arr"][-1])


def under(*prefixes: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {"".join(prefixes) + key: value for key, value in state.items()}


def compiled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torch.compile of the U-Net alone names it."""
    return {key.replace("diffusion_model.", "diffusion_model._orig_mod."): value for key, value in state.items()}


WRAPPED = {
    "module": under("module."),
    "model": under("model."),
    "compile": under("_orig_mod."),
    "nested": under("module.", "_orig_mod.", "model."),
    "inside": compiled,
    "section model": lambda state: {"model": state, "optimizer": {"state": {}}, "step": 3},
    "two sections": lambda state: {"state_dict": {"module": state}},
}


@pytest.mark.parametrize("layout", WRAPPED)
def test_what_wrappers_put_before_names_is_taken_off(
    layout: str, released: dict[str, Tensor], networks: Networks, tmp_path: Path
):
    path = saved(WRAPPED[layout](released), tmp_path / "model.ckpt")
    loaded, _ = checkpoint.load_networks(path, networks.cfg)
    own = networks.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in loaded.state_dict().items())
    other = Networks.random(networks.cfg, seed=1)
    begin(other, load_tensors(path))  # a training begins with the same files
    assert torch.equal(other.state_dict()[OUT], own[OUT])


def test_two_tensors_for_one_weight_are_an_error(released: dict[str, Tensor], cfg: Config, tmp_path: Path):
    path = saved(released | {f"module.{OUT}": torch.ones(3)}, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=rf"two tensors for {OUT}, one of them as module\.{OUT}"):
        checkpoint.load_networks(path, cfg)


def test_what_training_code_stores_beside_the_model_is_not_asked_for(
    released: dict[str, Tensor], networks: Networks, tmp_path: Path
):
    extra = {
        "logvar": torch.zeros(1000),
        "lvlb_weights": torch.full((1000,), float("inf")),
        "cond_stage_model.model.attn_mask": torch.zeros(77, 77),
        "embedder.model.attn_mask": torch.zeros(77, 77),
        "first_stage_model.loss.logvar": torch.zeros(()),
        "first_stage_model.loss.discriminator.main.0.weight": torch.zeros(4),
    }
    path = saved({"state_dict": released | extra}, tmp_path / "model.ckpt")
    loaded, _ = checkpoint.load_networks(path, networks.cfg)
    assert torch.equal(loaded.state_dict()[OUT], networks.state_dict()[OUT])
    path = saved({"logvar": torch.zeros(1), "first_stage_model.lost": torch.zeros(1)}, tmp_path / "model.ckpt")
    with pytest.raises(UserError) as error:
        checkpoint.load_networks(path, networks.cfg)
    assert "unexpected (1): first_stage_model.lost" in str(error.value)


def dotless(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """latent-diffusion's moving average of the U-Net: names without dots, and two counters."""
    unet = {key: value for key, value in state.items() if key.startswith("model.diffusion_model.")}
    average = {"model_ema." + key.removeprefix("model.").replace(".", ""): value + 1 for key, value in unet.items()}
    return state | average | {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(7)}


AVERAGED = {
    "beside": dotless,
    "beside, wrapped": lambda state: under("module.")(dotless(state)),
    "section": lambda state: {"model": state, "ema": {key: value + 1 for key, value in state.items()}},
    "sections, wrapped": lambda state: {
        "module": under("module.")(state),
        "ema_state_dict": under("module.")({key: value + 1 for key, value in state.items()}),
    },
}


@pytest.mark.parametrize("layout", AVERAGED)
def test_the_moving_average_is_taken_by_choice(
    layout: str, released: dict[str, Tensor], networks: Networks, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    weights = {key: value for key, value in released.items() if key not in checkpoint.BUFFERS}
    path = saved(AVERAGED[layout](weights), tmp_path / "model.ckpt")
    loaded, _ = checkpoint.load_networks(path, networks.cfg)
    assert torch.equal(loaded.state_dict()[OUT], networks.state_dict()[OUT])
    assert "options.ema = true" in capsys.readouterr().err
    loaded, _ = checkpoint.load_networks(path, networks.cfg, ema=True)
    assert torch.equal(loaded.state_dict()[OUT], networks.state_dict()[OUT] + 1)


def test_an_average_that_is_not_there_or_not_of_the_weights_is_an_error(
    released: dict[str, Tensor], cfg: Config, tmp_path: Path
):
    with pytest.raises(UserError, match=r"no moving average.*leave out options\.ema"):
        checkpoint.load_networks(saved(released, tmp_path / "a.ckpt"), cfg, ema=True)
    path = saved({"model": released, "ema": {"shadow.0": torch.ones(2)}}, tmp_path / "b.ckpt")
    with pytest.raises(
        UserError, match=r"1 tensors of its moving average are of no weight, first model_ema\.shadow\.0"
    ):
        checkpoint.load_networks(path, cfg, ema=True)
    path = saved({"model": released, "ema": {"decay": 0.9, "shadow_params": [torch.ones(2)]}}, tmp_path / "c.ckpt")
    with pytest.raises(UserError, match="its moving average 'ema' is not a plain dictionary"):
        checkpoint.load_networks(path, cfg, ema=True)


@pytest.fixture
def index(networks: Networks, tmp_path: Path) -> Path:
    """A model in two safetensors files with their index."""
    state, places = {key: value.contiguous() for key, value in networks.state_dict().items()}, {}
    for number, keys in enumerate((list(state)[::2], list(state)[1::2]), 1):
        name = f"model-{number:05d}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, tmp_path / name)
        places |= dict.fromkeys(keys, name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path / "model.safetensors.index.json"


def test_a_model_in_parts_loads_by_its_index_or_by_one_of_the_parts(index: Path, networks: Networks):
    for path in (index, index.with_name("model-00002-of-00002.safetensors")):
        loaded, _ = checkpoint.load_networks(path, networks.cfg)
        assert torch.equal(loaded.state_dict()[OUT], networks.state_dict()[OUT])


def test_parts_that_are_missing_or_lie_elsewhere_are_named(index: Path):
    part = index.with_name("model-00002-of-00002.safetensors")
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(UserError, match=r"names the part model-00002-of-00002\.safetensors, which is not beside it"):
        load_tensors(index)
    part.write_bytes(kept)
    whole = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"more": part.name}}))
    with pytest.raises(UserError, match="names 1 tensors that no part holds, first more"):
        load_tensors(index)
    index.write_text(json.dumps({"weight_map": {"x": "../other.safetensors"}}))
    with pytest.raises(UserError, match="must lie beside their index"):
        load_tensors(index)
    index.unlink()
    with pytest.raises(UserError, match=r"is one of 2 parts; put model\.safetensors\.index\.json"):
        load_tensors(part)


def test_a_safetensors_file_loads_under_any_name_and_the_other_way_round_the_error_says_so(tmp_path: Path):
    save_file({"a": torch.arange(3)}, tmp_path / "model.ckpt")
    assert torch.equal(load_tensors(tmp_path / "model.ckpt")["a"], torch.arange(3))
    saved({"a": torch.arange(3)}, tmp_path / "zip.ckpt").rename(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="is a zip archive, as PyTorch writes it"):
        load_tensors(tmp_path / "model.safetensors")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 10437000000\n" % (b"a" * 64)


class Something:
    pass


@pytest.mark.parametrize("name", ["model.ckpt", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (POINTER, "is a Git-LFS pointer, which stands for a file of 10.44 GB"),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "is a web page (HTML), not weights"),
        (b'{"error": "not found"}', "is a text file (JSON)"),
        (gzip.compress(b"tensors", mtime=0), "is a gzip archive, not weights: unpack it"),
        (b"", "is empty"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(content: bytes, said: str, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_tensors(tmp_path / name)
    assert said in str(error.value) and str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickled_objects_are_refused_without_torchs_advice_to_load_unsafely(protocol: int, tmp_path: Path):
    torch.save({"state_dict": {"a": Something()}}, tmp_path / "zip.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"a": Something()}, protocol))
    for path in (tmp_path / "zip.ckpt", tmp_path / "plain.ckpt"):
        with pytest.raises(UserError) as error:
            load_tensors(path)
        assert "object" in str(error.value)
        assert not any(word in str(error.value) for word in ("weights_only", "add_safe_globals", "trust"))
        assert error.value.__suppress_context__
    with pytest.raises(UserError, match=r"holds a Python object \(.*Something\)"):
        load_tensors(tmp_path / "zip.ckpt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_weight_that_is_not_finite_is_refused_with_its_name(
    value: float, released: dict[str, Tensor], networks: Networks, tmp_path: Path
):
    released[OUT] = torch.tensor([0.0, value, 0.0])
    path = saved(released, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=rf"{OUT} holds 1 values that are NaN or infinity, of 3"):
        checkpoint.load_networks(path, networks.cfg)
    with pytest.raises(UserError, match=f"{OUT} holds 1 values"):
        begin(networks, load_tensors(path))
