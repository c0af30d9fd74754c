"""Requests become clips: alone or in company, in any order; knock-outs; other devices, precisions and mistakes."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dcbench.catalogue import ModelCard
from dcbench.errors import UserError
from dcbench.models.base import ImageToVideo, Request, Runtime, check_generated
from dcbench.models.diffusion import make_schedule
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.models.dynamicrafter.pipeline import DynamiCrafter, ModelOptions, Sampling, spread

RequestOf = Callable[..., Request]


def build(
    card: ModelCard, networks: Networks, sampling: Sampling | None = None, runtime: Runtime | None = None, **options
):
    for layer in range(1, len(networks.image_scale) + 1):
        del networks.image_scale[layer]
    schedule = make_schedule(**dataclasses.asdict(networks.cfg.diffusion))
    return DynamiCrafter(card, networks, schedule, sampling or Sampling(steps=3), ModelOptions(**options), runtime)


def far(a: Tensor, b: Tensor) -> int:
    return int((a.int() - b.int()).abs().max())


def test_a_clip_is_what_the_interface_promises(card: ModelCard, networks: Networks, request_of: RequestOf):
    model = build(card, networks)
    assert isinstance(model, ImageToVideo)
    (clip,) = model.generate([request_of()])
    check_generated(clip, request_of(), "small")
    assert clip.shape == (4, 3, 16, 16) and clip.float().std() > 1
    assert model.generate([]) == []


def test_a_clip_depends_on_its_own_request_alone(card: ModelCard, networks: Networks, request_of: RequestOf):
    """Alone, in another order, by another model object: identical bytes. In a batch: at most one level."""
    requests = [request_of(k) for k in range(3)]
    alone = [build(card, networks).generate([request])[0] for request in requests]
    model = build(card, networks)
    reverse = [model.generate([request])[0] for request in reversed(requests)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(alone, reverse, strict=True))
    together = model.generate(requests)
    assert max(far(a, b) for a, b in zip(alone, together, strict=True)) <= 1
    assert far(alone[0], alone[1]) > 8


def test_noise_is_a_clips_own_in_any_batch(card: ModelCard, networks: Networks):
    model = build(card, networks)
    alone, batch = model.draws([7]), model.draws([5, 7, 9])
    assert torch.equal(alone.latents[0], batch.latents[1])
    assert torch.equal(alone.posterior[0], batch.posterior[1])
    for _ in range(2):  # each step draws anew, in order
        a, b = alone.step(0), batch.step(0)
        assert torch.equal(a[0], b[1]) and not torch.equal(b[0], b[1])


@pytest.mark.parametrize("change", ["prompt", "image", "seed", "frame_stride"])
def test_every_condition_matters(card: ModelCard, networks: Networks, request_of: RequestOf, change: str):
    model = build(card, networks)
    other = {"prompt": "a red car", "image": request_of(9).image, "seed": 7, "frame_stride": 6}[change]
    assert far(model.generate([request_of()])[0], model.generate([request_of(**{change: other})])[0]) > 1


def test_trap_09_fps_and_frame_stride_are_two_things(card: ModelCard, networks: Networks, request_of: RequestOf):
    model = build(card, networks)
    assert model.fs(request_of(fps=24.0, frame_stride=2)) == 2
    assert model.fs(request_of(frame_stride=None)) == 3
    networks.cfg = model.cfg = dataclasses.replace(networks.cfg, fs_meaning="fps")
    assert model.fs(request_of(fps=24.0, frame_stride=2)) == 24
    assert model.fs(request_of(fps=25 / 3, frame_stride=3)) == 8  # the integer part, as in training


def test_progress_is_reported(card: ModelCard, networks: Networks, request_of: RequestOf):
    told: list[tuple[int, int]] = []
    model = build(card, networks)
    model.on_step = lambda done, total: told.append((done, total))
    model.generate([request_of()])
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_guidance_branches_in_one_batch_or_one_by_one(card: ModelCard, networks: Networks, request_of: RequestOf):
    for sampling in (Sampling(steps=3), Sampling(steps=3, image_guidance_scale=1.0, guidance_rescale=0.7)):
        together = build(card, networks, sampling).generate([request_of()])[0]
        singly = build(card, networks, sampling, batch_guidance=False).generate([request_of()])[0]
        assert far(together, singly) <= 1


def test_the_unconditional_context_is_computed_once(card: ModelCard, networks: Networks, request_of: RequestOf):
    model, calls = build(card, networks), []
    networks.embedder.register_forward_hook(lambda *_: calls.append(1))
    model.generate([request_of()])
    model.generate([request_of(1)])
    assert len(calls) == 3  # two pictures and one grey one


def test_knockouts_do_what_they_say(card: ModelCard, networks: Networks, request_of: RequestOf):
    networks.unet.cross_attentions()[1].alpha.fill_(0.8)
    plain = build(card, networks).generate([request_of()])[0]
    seen: dict[str, Tensor] = {}
    networks.query_transformer.register_forward_pre_hook(lambda _, inputs: seen.__setitem__("tokens", inputs[0]))
    clips = {}
    knockouts: tuple[tuple[str, Any], ...] = (
        ("context", "none"),
        ("context", "class_token"),
        ("vdg", False),
        ("image_scale", 1.0),
    )
    for option, value in knockouts:
        seen.clear()
        options: dict[str, Any] = {option: value}
        clips[str(value)] = build(card, networks, **options).generate([request_of()])[0]
        if option == "context":
            assert ("tokens" in seen) == (value == "class_token")
        if value == "class_token":
            assert seen["tokens"].shape[1] == 1
    assert all(far(plain, clip) > 1 for clip in clips.values())
    # without its context and without VDG, the picture does not matter at all
    blind = build(card, networks, context="none", vdg=False)
    assert torch.equal(blind.generate([request_of()])[0], blind.generate([request_of(image=request_of(5).image)])[0])
    # λ = 1 in every layer is the fixed variant of the network
    assert build(card, networks, image_scale=1.0).image_scale.values() == [1.0] * 7


def test_both_ends_of_an_interpolating_model(card: ModelCard, networks: Networks, request_of: RequestOf):
    networks.cfg = dataclasses.replace(networks.cfg, interpolates=True)
    model = build(card, networks)
    with pytest.raises(UserError, match=r"needs an end image.*dynamicrafter-512"):
        model.generate([request_of()])
    clips = [model.generate([request_of(end_image=request_of(k).image)])[0] for k in (1, 2)]
    assert far(*clips) > 1
    images = torch.zeros(1, 3, 16, 16)
    concat = model.concat_latents(images, model.draws([1]).posterior, images + 1)
    assert concat[:, :, 1:3].abs().max() == 0 and concat[:, :, 0].abs().max() > 0
    assert not torch.equal(concat[:, :, 0], concat[:, :, -1])
    both = request_of(end_image=request_of(1).image)
    whole, (fewer,) = clips[0], model.generate([dataclasses.replace(both, num_frames=3)])
    assert torch.equal(fewer, whole[[0, 2, 3]])  # of 4 frames: the ends, and the one nearest to the middle
    assert (
        spread(9, 16) == [0, 2, 4, 6, 8, 9, 11, 13, 15] and spread(16, 16) == list(range(16)) and spread(1, 16) == [0]
    )


@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (301, 203), (16, 16)])
def test_any_size_of_picture(card: ModelCard, networks: Networks, request_of: RequestOf, shape: tuple[int, int]):
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert build(card, networks).generate([request_of(image=image)])[0].shape == (4, 3, 16, 16)


def test_prompts_of_any_length(card: ModelCard, networks: Networks, request_of: RequestOf):
    model = build(card, networks)
    assert model.generate([request_of(prompt="")])[0].shape == (4, 3, 16, 16)
    with pytest.warns(UserWarning, match="502 tokens; CLIP reads the first 77"):
        long = model.generate([request_of(prompt="word " * 500)])[0]
    longer = model.generate([request_of(1, image=request_of().image, seed=100, prompt="word " * 600)])[0]  # warned once
    assert torch.equal(long, longer)
    said = {clip_id: facts["prompt_cut"] for clip_id, facts in model.clip_facts.items()}
    assert said == {"clip0": "CLIP read 77 of 502 tokens", "clip1": "CLIP read 77 of 602 tokens"}


def test_frames(card: ModelCard, networks: Networks, request_of: RequestOf):
    model = build(card, networks)
    assert torch.equal(model.generate([request_of(num_frames=3)])[0], model.generate([request_of()])[0][:3])
    with pytest.raises(UserError, match="5 frames were asked for; small makes up to 4"):
        model.generate([request_of(num_frames=5)])


def test_nan_is_an_error(card: ModelCard, networks: Networks, request_of: RequestOf):
    networks.unet.get_parameter("out.2.bias").fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        build(card, networks).generate([request_of()])


def test_autocast_is_near_float32(card: ModelCard, networks: Networks, request_of: RequestOf):
    plain = build(card, networks).generate([request_of()])[0]
    half = build(card, networks, runtime=Runtime(dtype="bfloat16")).generate([request_of()])[0]
    assert 0 < far(plain, half) < 64
    with pytest.raises(UserError, match="allowed are float16, bfloat16"):
        build(card, networks, runtime=Runtime(dtype="int8"))


def test_offloaded_networks_visit_the_device_one_at_a_time(
    card: ModelCard, networks: Networks, request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
):
    plain = build(card, networks).generate([request_of()])[0]
    model = build(card, networks, offload=True)
    moves: list[tuple[str, str]] = []
    names = {id(m): n for n, m in (("vae", networks.autoencoder), ("unet", networks.unet), ("clip", networks.embedder))}
    original = nn.Module.to

    def to(self: nn.Module, *args, **kwargs):
        if id(self) in names:
            moves.append((names[id(self)], "in" if args[0] != "cpu" else "out"))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", to)
    assert torch.equal(model.generate([request_of()])[0], plain)
    assert [move for _, move in moves] == ["in", "out"] * (len(moves) // 2)  # never two at once
    assert {name for name, _ in moves} == {"vae", "unet", "clip"}


@pytest.mark.slow
def test_the_network_compiles_without_a_break(
    card: ModelCard, networks: Networks, request_of: RequestOf, monkeypatch: pytest.MonkeyPatch
):
    """Dynamo traces the whole forward as one graph; on a GPU the same option adds code generation and CUDA graphs."""
    original = torch.compile
    modes: list[str | None] = []

    def eager(module: nn.Module, mode: str | None = None):
        modes.append(mode)
        return original(module, backend="eager", fullgraph=True)

    plain = build(card, networks).generate([request_of()])[0]
    monkeypatch.setattr(torch, "compile", eager)
    compiled = build(card, networks, compile=True)
    assert far(compiled.generate([request_of()])[0], plain) <= 1
    assert modes == [None]
    with contextlib.suppress(AttributeError):
        torch._dynamo.reset()
