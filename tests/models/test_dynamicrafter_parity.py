"""Equal to the released network: on the part of the recording that is kept here, and on a whole one where it lies."""

import os
from pathlib import Path

import parity
import pytest
import torch
from parity import Recording
from safetensors.torch import load_file, save_file

from dcbench.models.dynamicrafter.networks import Networks

PROJECT = Path(__file__).parents[2]
KEPT = PROJECT / "tests" / "data" / "parity"
WHOLE = Path(os.environ.get("DCBENCH_PARITY") or PROJECT.parent / "shared" / "parity" / "fixtures")


def check(rows: list[parity.Row], least: int) -> None:
    assert len(rows) >= least
    assert not [row for row in rows if not row.ok]


@pytest.fixture(scope="module")
def kept() -> Recording:
    """The part kept here; `gated` has the weights that are there and random ones in the other places."""
    recording = Recording(KEPT)
    networks = Networks.random(recording.gated_config)
    weights = recording.tensors("weights")
    assert not networks.load_state_dict(weights, strict=False).unexpected_keys
    recording.gated = networks
    return recording


@torch.no_grad()
def test_first_blocks_of_the_unet(kept: Recording):
    """Embeddings, first convolution, first temporal transformer, and one block of all kinds of layer with its parts."""
    unet, data = kept.gated.unet, kept.tensors("unet_blocks")
    names = [name for name in data if not name.startswith("in.")]
    inputs = [data[f"in.{name}"] for name in ("x", "timesteps", "context", "fs")]
    ours = parity.record_outputs(unet, names, lambda: unet(*inputs))
    rows = []
    for name in names:
        value = parity.as_recorded(unet, name, ours[name], 1)
        rows.append(parity.row("blocks", name, value, data[name]))
    check(rows, 10)


@torch.no_grad()
def test_query_transformer(kept: Recording):
    check(list(parity.query_transformer(kept)), 1)


@torch.no_grad()
def test_autoencoder_encodes_as_recorded(kept: Recording):
    data, network = kept.tensors("vae"), kept.gated.autoencoder
    posterior = network.encode(data["image"])
    rows = [
        parity.row("vae", "mean", posterior.mean, data["mean"]),
        parity.row("vae", "logvar", posterior.logvar, data["logvar"]),
        parity.row("vae", "sample", network.to_latents(data["image"], data["noise"]), data["scaled_sample"]),
    ]
    check(rows, 3)


@torch.no_grad()
def test_clip_text_and_preprocessing(kept: Recording):
    data = kept.tensors("clip")
    text = kept.gated.cond_stage_model(data["tokens"])
    seen = parity.conditioning.preprocess(data["image1_uint8"].float() / 255 * 2 - 1, 224)
    rows = [
        parity.row("clip", "text", text, data["text_penultimate_lnfinal"]),
        parity.row("clip", "pixels", seen[..., ::4, ::4], data["image1_preprocessed_stride4"]),
    ]
    check(rows, 2)


def test_tokens(kept: Recording):
    check(list(parity.tokens(kept)), 8)


def test_schedule_buffers(kept: Recording):
    check(list(parity.schedules(kept)), 4)


def test_timesteps(kept: Recording):
    check(list(parity.timesteps(kept)), 32)


SLOW = {"ddim"}


@pytest.mark.skipif(not WHOLE.is_dir(), reason="no whole recording here: set DCBENCH_PARITY")
@pytest.mark.parametrize(
    "group", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in parity.GROUPS]
)
def test_whole_recording(group: str):
    with torch.no_grad():
        check(list(parity.GROUPS[group](Recording(WHOLE))), 1)


def test_the_command_sees_an_error(kept: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A wrong weight exceeds the bound: exit code 1; a folder that is no recording: 2."""
    for path in KEPT.iterdir():
        if path.suffix != ".gz":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = kept.gated.state_dict()
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "weights.safetensors")
    only = [str(tmp_path), "--only", "query-transformer"]
    assert parity.main(only) == 0
    assert "1 tensors compared, 0 beyond" in capsys.readouterr().out
    changed = load_file(tmp_path / "weights.safetensors")
    changed["image_proj_model.norm_out.bias"] += 1e-3
    save_file(changed, tmp_path / "weights.safetensors")
    assert parity.main(only) == 1
    assert "EXCEEDED" in capsys.readouterr().out
    assert parity.main([str(tmp_path / "weights.safetensors")]) == 2
    assert "no recording" in capsys.readouterr().err
