"""The networks: the released layouts, the roles of parameters, what depends on what, training."""

import dataclasses
import gzip
import importlib
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dcbench.errors import UserError
from dcbench.models.diffusion import dynamic_scale
from dcbench.models.dynamicrafter import checkpoint
from dcbench.models.dynamicrafter.autoencoder import Autoencoder
from dcbench.models.dynamicrafter.config import VARIANTS, AutoencoderConfig, Config, variant
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.models.dynamicrafter.unet import UNet, parameter_role

MANIFESTS = Path(__file__).parents[1] / "data" / "parity" / "manifests.json.gz"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(cfg: Config, batch: int = 1, frames: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    context = random(batch, 77 + 16 * frames, cfg.unet.context_dim, seed=seed + 1)
    x = random(batch, cfg.unet.in_channels, frames, 8, 8, seed=seed)
    return x, torch.arange(batch) + 7, context, torch.arange(batch) + 3


@pytest.mark.parametrize("name", ["256", "512", "1024", "interp-512"])
def test_released_manifests_load_strictly(name: str):
    manifest = {k: tuple(v) for k, v in json.loads(gzip.decompress(MANIFESTS.read_bytes()))[name].items()}
    assert len(manifest) == (2535 if name == "256" else 2520)
    needed, optional = checkpoint.layout(VARIANTS[name])
    assert needed | optional == manifest  # 0 missing, 0 unexpected, every shape equal
    tensors = {key: torch.empty(shape, device="meta") for key, shape in manifest.items()}
    if (final := VARIANTS[name].diffusion.dynamic_rescale) is not None:
        tensors["scale_arr"] = dynamic_scale(final, 1000)
    checkpoint.check(tensors, VARIANTS[name], "manifest")
    with torch.device("meta"):
        networks = Networks(VARIANTS[name])
    networks.load_state_dict({key: tensors[key] for key in needed}, strict=True, assign=True)
    parameters = sum(p.numel() for p in networks.unet.parameters())
    assert parameters == (1_438_854_996 if name == "256" else 1_438_854_980)


def test_every_parameter_has_one_role():
    with torch.device("meta"):
        networks = Networks(VARIANTS["256"])
    names = [n for n in networks.state_dict() if n.startswith(("model.diffusion_model.", "image_proj_model."))]
    roles = {name: parameter_role(name) for name in names}
    assert set(roles.values()) == {"context", "spatial", "temporal"}
    assert sum(role == "context" for role in roles.values()) == 51 + 16 * 3  # P, and keys, values and gate of 16 layers
    assert all(role == "temporal" for name, role in roles.items() if "temopral" in name or "init_attn" in name)
    # 17 temporal transformers of 26 tensors each, 22 temporal convolutions of 16
    assert sum(role == "temporal" for role in roles.values()) == 17 * 26 + 22 * 16
    assert parameter_role("input_blocks.1.2.norm.weight") == "temporal"  # names inside the U-Net work too
    with pytest.raises(ValueError, match="first_stage"):
        parameter_role("first_stage_model.quant_conv.weight")


@torch.no_grad()
def test_without_its_temporal_parts_the_unet_sees_each_frame_alone(networks: Networks):
    """The roles are right: with the last layer of each temporal part at zero, permuting frames permutes the output."""
    x, t, context, fs = inputs(networks.cfg)
    text = context[:, :77]  # the same for each frame
    order = torch.tensor([2, 0, 3, 1])
    assert not torch.allclose(networks.unet(x[:, :, order], t, text, fs), networks.unet(x, t, text, fs)[:, :, order])
    for name, parameter in networks.unet.named_parameters():
        if parameter_role(name) == "temporal" and ("proj_out" in name or "conv4.3" in name):
            parameter.zero_()
    torch.testing.assert_close(networks.unet(x[:, :, order], t, text, fs), networks.unet(x, t, text, fs)[:, :, order])


@torch.no_grad()
def test_guidance_branches_share_their_beginning_and_nothing_else(networks: Networks):
    x, t, context, fs = inputs(networks.cfg, batch=2)
    other = random(*context.shape, seed=5)
    both = networks.unet(x, t, torch.cat([context, other]), fs)
    torch.testing.assert_close(both[:2], networks.unet(x, t, context, fs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[2:], networks.unet(x, t, other, fs), rtol=1e-5, atol=1e-5)
    projected = networks.unet.project_context(torch.cat([context, other]), 4)
    assert torch.equal(networks.unet(x, t, projected, fs), both)


@torch.no_grad()
def test_each_frame_reads_its_own_image_tokens_only_at_the_full_length(networks: Networks):
    """Frames mix only in temporal layers: look at one cross-attention."""
    layer = networks.unet.cross_attentions()[0]
    x, context = random(4, 5, 16), random(1, 77 + 64, 24)
    changed = context.clone()
    changed[:, 77 + 16 * 2] += 1  # a token of frame 2
    delta = layer(x, layer.project(changed, 4)) - layer(x, layer.project(context, 4))
    assert [bool(d.abs().max() > 1e-6) for d in delta] == [False, False, True, False]
    # any other length: every frame reads all of them
    delta = layer(x, layer.project(changed[:, :-1], 4)) - layer(x, layer.project(context[:, :-1], 4))
    assert [bool(d.abs().max() > 1e-6) for d in delta] == [True] * 4


@torch.no_grad()
def test_image_scale_reads_and_sets_lambda_by_layer(networks: Networks):
    scale, unet = networks.image_scale, networks.unet
    assert len(scale) == 7 == networks.cfg.unet.cross_attentions
    assert scale.values() == [1.0] * 7  # zero gates: tanh(0) + 1
    unet.cross_attentions()[2].alpha.fill_(0.5)
    assert scale[3] == pytest.approx(1 + 0.46212, abs=1e-4)
    x, t, context, fs = inputs(networks.cfg)
    learned = unet(x, t, context, fs)
    scale[3] = 1.0
    assert scale[3] == 1.0 and not torch.allclose(unet(x, t, context, fs), learned)
    del scale[3]
    assert torch.equal(unet(x, t, context, fs), learned)
    for layer in range(1, 8):
        scale[layer] = 0.0
    text_only = unet(x, t, context[:, :77], fs)
    torch.testing.assert_close(unet(x, t, context, fs), text_only)  # λ = 0 is no image at all
    for layer in range(1, 8):
        del scale[layer]
    assert torch.equal(unet(x, t, context, fs), learned)
    with pytest.raises(UserError, match="layers 1 to 7"):
        scale[8] = 1.0


def test_the_sixteen_layers_are_numbered_as_in_the_paper():
    """Input blocks 1, 2, 4, 5, 7, 8; middle; output blocks 3 to 11."""
    with torch.device("meta"):
        unet = UNet(VARIANTS["256"].unet)
    names = {id(module): name for name, module in unet.named_modules()}
    blocks = [names[id(layer)].split(".transformer_blocks")[0] for layer in unet.cross_attentions()]
    inputs = [f"input_blocks.{k}.1" for k in (1, 2, 4, 5, 7, 8)]
    assert blocks == [*inputs, "middle_block.1", *(f"output_blocks.{k}.1" for k in range(3, 12))]
    assert len(blocks) == VARIANTS["256"].unet.cross_attentions


def test_the_unet_trains(networks: Networks):
    """Gradients reach every parameter, and a few steps lower the loss."""
    unet = networks.unet.train().requires_grad_(True)
    x, t, context, fs = inputs(networks.cfg, batch=2)
    target = random(2, 3, 4, 8, 8, seed=9)
    optimiser = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        loss = (unet(x, t, context, fs) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in unet.parameters())
    assert not [n for n, p in unet.named_parameters() if p.grad is not None and not p.grad.any()]
    assert losses[-1] < 0.8 * losses[0]


def test_the_autoencoder_trains_with_any_number_of_latent_channels():
    cfg = AutoencoderConfig(channels=8, channel_mult=(1, 2, 2), num_res_blocks=1, latent_channels=6, norm_groups=4)
    network = Autoencoder(cfg)
    frames = random(2, 3, 16, 16).clamp(-1, 1)
    posterior = network.encode(frames)
    assert posterior.mean.shape == (2, 6, 4, 4) and cfg.factor == 4
    loss = (
        network.decode(posterior.sample(random(2, 6, 4, 4))) - frames
    ).square().mean() + 1e-6 * posterior.kl().mean()
    loss.backward()
    assert all(p.grad is not None for p in network.parameters())


@torch.no_grad()
def test_the_plain_form_of_the_network_agrees(networks: Networks, monkeypatch: pytest.MonkeyPatch):
    """A second implementation without any of the savings; benchmarks/dynamicrafter_step.py times the two."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    plain = importlib.import_module("dynamicrafter_plain")
    x, t, context, fs = inputs(networks.cfg, batch=2)
    torch.testing.assert_close(
        networks.unet(x, t, context, fs), plain.forward(networks.unet, x, t, context, fs), rtol=1e-5, atol=1e-5
    )


def test_the_kl_is_that_of_two_gaussians():
    from torch.distributions import Normal, kl_divergence

    from dcbench.models.dynamicrafter.autoencoder import Posterior

    mean, logvar = random(2, 3, 2, 2), random(2, 3, 2, 2, seed=1)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    torch.testing.assert_close(Posterior(mean, logvar).kl(), expected)


@pytest.mark.parametrize(("decoder", "patch"), [((), 8), ((1, 2), 4), ((0.5, 1), 4), ((1, 1, 1, 1), 1)])
def test_a_patched_autoencoder_works_on_the_coarse_grid_and_trains(decoder, patch):
    torch.manual_seed(0)
    cfg = AutoencoderConfig(
        channels=8, channel_mult=(1,), patch_size=8, decoder_channel_mult=decoder, num_res_blocks=1, norm_groups=2
    )
    assert cfg.decoder_patch_size == patch
    autoencoder, frames = Autoencoder(cfg), torch.rand(2, 3, 32, 48) * 2 - 1
    latents = autoencoder.encode(frames).mean
    assert cfg.factor == 8
    assert latents.shape == (2, 4, 4, 6)
    rebuilt = autoencoder.decode(latents)
    assert rebuilt.shape == frames.shape
    (rebuilt - frames).square().mean().backward()
    assert all(p.grad is not None for name, p in autoencoder.named_parameters())
    moved = frames.clone()
    moved[..., 0, 0] += 0.5  # one pixel: its patch alone sees it first
    first = [autoencoder.encoder.conv_in(F.pixel_unshuffle(x, 8)) for x in (frames, moved)]
    changed = (first[0] != first[1]).any(1)[0].nonzero()
    assert changed.max() <= 1


@torch.no_grad()
def test_decoding_in_chunks_changes_nothing(networks: Networks):
    latents = random(4, 3, 8, 8)
    whole = networks.autoencoder.from_latents(latents)
    torch.testing.assert_close(networks.autoencoder.from_latents(latents, 3), whole, rtol=1e-5, atol=1e-5)


def test_configurations_survive_json_and_name_mistakes(cfg: Config):
    for each in (*VARIANTS.values(), cfg):
        assert Config.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    with pytest.raises(UserError, match=r"config\.unet: unknown field 'model_channel'.*model_channels"):
        Config.from_dict({"unet": {"model_channel": 32}})
    with pytest.raises(UserError, match=r'Did you mean "interp-512"'):
        variant("interp512")


def test_an_official_configuration_that_is_not_built_is_refused():
    recorded = json.loads((MANIFESTS.parent / "config.json").read_text())["official_configs"]["256_like"]["params"]
    cfg = Config.from_official(recorded)
    assert cfg.unet.head_channels == 8 and cfg.query_transformer.num_frames == 4
    assert dataclasses.replace(cfg.diffusion, prediction="v").prediction == "v"
    recorded["unet_config"]["params"]["use_causal_attention"] = True
    with pytest.raises(UserError, match="use_causal_attention"):
        Config.from_official(recorded)
