"""Trainings that begin from Stable Diffusion, VideoCrafter and open_clip files: their real layout at tiny scale."""

import re

import pytest
import torch

from dcbench.errors import UserError
from dcbench.models.dynamicrafter.config import Config, UNetConfig, variant
from dcbench.training.networks import build
from dcbench.training.start import UNET, begin, copy_text_keys

FIRST = UNET + "input_blocks.0.0.weight"


@pytest.fixture
def config():
    """Two levels with attention, so that a change of size follows a temporal transformer in the output blocks."""
    values = variant("tiny").to_dict()
    unet = UNetConfig(
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2, 1),
        head_channels=8,
        init_heads=1,
        context_dim=96,
        learnable_image_scale=True,
        norm_groups=4,
    )
    values["unet"] = vars(unet)
    return Config.from_dict(values)


def text_to_video(state):
    """VideoCrafter's layout: no image branch, no gates, four input channels."""
    kept = {k: v for k, v in state.items() if "_ip." not in k and not k.endswith(".alpha") and k.startswith(UNET)}
    return {**kept, FIRST: kept[FIRST][:, :4]}


def text_to_image(state):
    """Stable Diffusion's layout: moreover no temporal layers, and what follows them one place earlier."""
    kept = {}
    for name, value in text_to_video(state).items():
        if "init_attn" in name or "temopral_conv" in name or "fps_embedding" in name:
            continue
        if re.search(r"(input|output)_blocks\.\d+\.2\.(norm|proj|transformer)", name) or "middle_block.2." in name:
            continue
        name = name.replace("middle_block.3.", "middle_block.2.")
        kept[re.sub(r"(output_blocks\.\d+)\.3\.conv", r"\1.2.conv", name)] = value
    return kept


def test_a_text_to_video_model(config):
    source, target = build(config, 1), build(config, 2)
    state = text_to_video(source.state_dict())
    new = begin(target, state, ("unet",), "videocrafter")
    after = target.state_dict()
    assert all(torch.equal(after[name], state[name]) for name in state if name != FIRST)
    assert torch.equal(after[FIRST][:, :4], state[FIRST]) and not after[FIRST][:, 4:].any()
    assert f"{FIRST}[:, 4:]" in new and sum("_ip." in name for name in new) == 2 * len(target.unet.cross_attentions())
    assert all("_ip." in name or name.endswith("alpha") or name.startswith(FIRST) for name in new)
    for layer in target.unet.cross_attentions():
        assert torch.equal(layer.to_k_ip.weight, layer.to_k.weight) and float(layer.alpha) == 0


def test_an_image_model_makes_the_same_of_a_single_frame(config):
    """The temporal layers begin as the identity, so the video U-Net is the image U-Net on one frame."""
    source, target = build(config, 1), build(config, 2)
    state = text_to_image(source.state_dict())
    assert any(re.search(r"output_blocks\.\d+\.2\.conv", name) for name in state)
    new = begin(target, state, ("unet",), "stable-diffusion")
    assert any("middle_block.2." in name for name in new)
    assert not any("middle_block.3." in name for name in new if "temopral_conv" not in name)
    with torch.no_grad():
        for module in source.modules():  # the source's outputs are zero as built; give both something to say
            if isinstance(module, torch.nn.Conv2d) and not module.weight.any():
                torch.nn.init.normal_(module.weight, std=0.1)
    begin(target, text_to_image(source.state_dict()), ("unet",), "stable-diffusion")
    x = torch.randn(1, 8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, 4:] = 0
    inputs = (x, torch.tensor([500]), torch.randn(1, 77, 96), torch.tensor([3]))
    ours, theirs = target.unet(*inputs), source.unet(*inputs)
    assert theirs.abs().max() > 0.01 and torch.allclose(ours, theirs, atol=1e-5)


def test_open_clip_files_have_both_towers(config):
    source, target = build(config, 1), build(config, 2)
    state = {k.removeprefix("embedder.model."): v for k, v in source.state_dict().items() if k.startswith("embedder.")}
    begin(target, state, ("image",), "open-clip")
    after = target.state_dict()
    assert all(torch.equal(after["embedder.model." + name], state[name]) for name in state)


def test_what_was_learned_before_is_kept(config):
    source, target = build(config, 1), build(config, 2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    begin(target, text_to_video(source.state_dict()), ("unet",), "videocrafter", keep=("context",))
    after = target.state_dict()
    images = [name for name in after if "_ip." in name]
    assert images and all(torch.equal(before[name], after[name]) for name in images)


def test_text_keys_are_copied(config):
    networks = build(config, 1)
    copy_text_keys(networks)
    assert all(torch.equal(a.to_v_ip.weight, a.to_v.weight) for a in networks.unet.cross_attentions())


def test_wrong_files_are_named(config):
    networks = build(config, 1)
    with pytest.raises(UserError, match="nothing of unet"):
        begin(networks, {"something": torch.zeros(1)}, ("unet",), "videocrafter")
    state = text_to_video(networks.state_dict())
    state[UNET + "out.2.weight"] = torch.zeros(4, 9, 3, 3)
    with pytest.raises(UserError, match=r"\[4, 9, 3, 3\]"):
        begin(networks, state, ("unet",), "videocrafter")
