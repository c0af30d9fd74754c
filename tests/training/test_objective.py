"""What a diffusion stage shows its network, measured on what the network is given."""

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from dcbench import clips
from dcbench.datasets.shapes import Shapes
from dcbench.models.diffusion import make_schedule
from dcbench.training.data import ClipPool
from dcbench.training.held_out import held_out
from dcbench.training.networks import build, text_tokens
from dcbench.training.objective import AutoencoderTask, Conditions, ContrastiveTask, DiffusionTask, Rebuilding
from dcbench.training.recipe import DiffusionStage, Recipe

ROLES = ("context", "spatial")


@pytest.fixture
def networks(make_recipe):
    return build(make_recipe({"name": "joint"}).config(), 0)


@pytest.fixture
def pool():
    return ClipPool(Shapes(size=16, train_videos=20).items("train"), 4, (1, 3), 16, 16, clips=20, seed=0)


class Seen:
    """Records what the U-Net is called with."""

    def __init__(self, task: DiffusionTask) -> None:
        self.calls: list[tuple[Tensor, ...]] = []
        task.unet.register_forward_pre_hook(lambda module, inputs: self.calls.append(inputs))


def run(task, pool, size=64, seed=0):
    """What the U-Net is given for `size` clips; it makes nothing of them, because hundreds of clips take seconds."""
    seen = Seen(task)
    task.unet.forward = lambda x, *given: x[:, :4]
    rng = torch.Generator().manual_seed(seed)
    batch = pool.random_batch(size, rng)
    losses = task.loss(batch, torch.full((size,), 500), rng)
    x, _, context, fs = seen.calls[-1]
    return batch, losses, x, context, fs


def latents(networks, batch):
    from dcbench.training.networks import scaled_latents

    return scaled_latents(networks, batch, torch.device("cpu"))


def test_conditions_are_dropped_at_the_published_rates(networks, pool):
    task = DiffusionTask(networks, pool, Conditions(), ROLES)
    _, _, _, context, _ = run(task, pool, size=600)
    empty = text_tokens(networks, [""], torch.device("cpu"))
    no_text = (context[:, :24] - empty).abs().amax((1, 2)) < 1e-5
    grey = context[:, 24:] - context[:, 24:].mode(0).values
    no_image = grey.abs().amax((1, 2)) < 1e-5
    rates = [float(share.float().mean()) for share in (no_text & ~no_image, no_text & no_image, ~no_text & no_image)]
    assert rates == pytest.approx([0.05, 0.05, 0.05], abs=0.03)


def test_the_image_latents_are_those_of_one_frame_and_are_never_dropped(networks, pool):
    task = DiffusionTask(networks, pool, Conditions(drop_text=0, drop_image=1.0, drop_both=0), ROLES)
    batch, _, x, _, fs = run(task, pool)
    z, vdg = latents(networks, batch), x[:, 4:]
    assert torch.equal(vdg, vdg[:, :, :1].expand_as(vdg))
    distances = (z - vdg).abs().amax((1, 3, 4))  # b t
    assert (distances.amin(1) < 1e-6).all()
    assert set(distances.argmin(1).tolist()) == {0, 1, 2, 3}
    assert torch.equal(fs, batch.strides)
    first = DiffusionTask(networks, pool, Conditions(condition_frame="first"), ROLES)
    batch, _, x, _, _ = run(first, pool)
    assert torch.allclose(x[:, 4:, 0], latents(networks, batch)[:, :, 0])


def test_ends_without_and_hidden_latents(networks, pool):
    batch, _, x, _, _ = run(DiffusionTask(networks, pool, Conditions(vdg="ends"), ROLES), pool)
    z = latents(networks, batch)
    assert torch.equal(x[:, 4:, 0], z[:, :, 0]) and torch.equal(x[:, 4:, -1], z[:, :, -1])
    assert not x[:, 4:, 1:-1].any()
    _, _, x, _, _ = run(DiffusionTask(networks, pool, Conditions(vdg="none"), ROLES), pool)
    assert not x[:, 4:].any()
    _, _, x, _, _ = run(DiffusionTask(networks, pool, Conditions(drop_vdg=0.33), ROLES), pool, size=300)
    hidden = float((x[:, 4:].abs().amax((1, 2, 3, 4)) == 0).float().mean())
    assert hidden == pytest.approx(0.33, abs=0.09)


def test_single_frames_and_text_alone(networks, pool):
    task = DiffusionTask(networks, pool, Conditions(vdg="none"), ("context",), single_frames=True)
    _, _, x, context, _ = run(task, pool)
    assert x.shape[2] == 1 and context.shape[1] == 24 + 2
    _, _, _, context, _ = run(DiffusionTask(networks, pool, Conditions(context="none"), ROLES), pool)
    assert context.shape[1] == 24


def test_the_loss_is_the_squared_error_of_the_prediction(networks, pool):
    task = DiffusionTask(networks, pool, Conditions(), ROLES).eval()
    rng = torch.Generator().manual_seed(3)
    batch = pool.random_batch(8, rng)
    high, low = (float(task.loss(batch, torch.full((8,), t), rng)["loss"].detach()) for t in (999, 0))
    z = latents(networks, batch)
    # the U-Net begins at 0, so its error is the target: noise at t = 0; at 999 clean latents (v) or noise (eps)
    kind = task.schedule.prediction
    assert low == pytest.approx(1.0, rel=0.1)
    assert high == pytest.approx(1.0 if kind == "eps" else float(z.square().mean()), rel=0.1)


def test_min_snr_weights_the_loss(networks, pool):
    plain = DiffusionTask(networks, pool, Conditions(), ROLES).eval()
    weighted = DiffusionTask(networks, pool, Conditions(), ROLES, min_snr=5.0).eval()
    for time in (10, 900):
        values = []
        for task in (plain, weighted):
            rng = torch.Generator().manual_seed(1)
            values.append(task.loss(pool.random_batch(4, rng), torch.full((4,), time), rng))
        assert torch.equal(values[0]["loss"], values[1]["unweighted"])
        alpha = float(plain.schedule.alphas_cumprod[time])
        snr = alpha / (1 - alpha)
        scale = snr + 1 if plain.schedule.prediction == "v" else snr
        assert float((values[1]["loss"] / values[0]["loss"]).detach()) == pytest.approx(min(snr, 5) / scale, rel=1e-4)


def test_swaps_exchange_one_condition(networks, pool):
    task = DiffusionTask(networks, pool, Conditions(drop_text=0, drop_image=0, drop_both=0), ROLES)
    seen = Seen(task)
    batch = pool.random_batch(4, torch.Generator().manual_seed(0))
    for swap in ((), ("text",), ("context",), ("vdg",)):
        task.clip_errors(batch, torch.full((4,), 500), torch.Generator().manual_seed(1), swap)
    plain, text, context, vdg = seen.calls
    assert torch.equal(text[0], plain[0]) and torch.equal(text[2][:, :24], plain[2][:, :24].roll(1, 0))
    assert torch.equal(text[2][:, 24:], plain[2][:, 24:])
    assert torch.equal(context[2][:, 24:], plain[2][:, 24:].roll(1, 0))
    assert torch.equal(vdg[0][:, :4], plain[0][:, :4]) and torch.equal(vdg[0][:, 4:], plain[0][:, 4:].roll(1, 0))


def test_held_out_loss_is_fixed_and_an_unused_condition_costs_nothing(networks, make_recipe):
    recipe: Recipe = make_recipe({"name": "joint"})
    stage = recipe.stages[0]
    assert isinstance(stage, DiffusionStage)
    one, two = (held_out(networks, recipe, stage, clips=8, batch=4) for _ in range(2))
    assert one == two and one.error > 0
    assert one.reliance("text") == 0 and one.reliance("vdg") == 0  # the U-Net begins at 0 and uses nothing
    assert len(one.sampled) == 8 and one.loss == pytest.approx(sum(one.sampled) / 8)
    assert one.growth["text"] == one.growth["vdg"] == (0.0,) * 8


def test_held_out_asks_every_arm_the_same_question(networks, make_recipe):
    """Trained on a random condition frame or on the first: `sampled` is under the first one, `loss` under its own."""
    for parameter in networks.unet.parameters():
        parameter.data.add_(0.02)  # a U-Net that uses its conditions
    found = {}
    for frame in ("random", "first"):
        recipe: Recipe = make_recipe({"name": "joint", "condition_frame": frame})
        stage = recipe.stages[0]
        assert isinstance(stage, DiffusionStage)
        found[frame] = held_out(networks, recipe, stage, clips=8, batch=4)
    assert found["random"].sampled == found["first"].sampled
    assert found["first"].loss == pytest.approx(sum(found["first"].sampled) / 8)
    assert found["random"].loss != pytest.approx(found["first"].loss, rel=1e-6)
    for swap, growth in found["first"].growth.items():
        assert sum(growth) / 8 == pytest.approx(found["first"].reliance(swap) * found["first"].loss, abs=1e-9)
    assert any(found["first"].growth["vdg"])


def test_details_weigh_more_and_the_latents_may_stay(networks, pool):
    rng = torch.Generator().manual_seed(0)
    flat = AutoencoderTask(networks, pool, Rebuilding(kl_weight=0.0))(8, rng.manual_seed(0))
    detail = AutoencoderTask(networks, pool, Rebuilding(kl_weight=0.0, detail_weight=10.0))(8, rng.manual_seed(0))
    assert detail["loss"] > flat["loss"] and torch.equal(detail["psnr"], flat["psnr"])
    edges = AutoencoderTask(networks, pool, Rebuilding(kl_weight=0.0, edge_weight=1.0))(8, rng.manual_seed(0))
    assert edges["loss"] > flat["loss"] and torch.equal(edges["psnr"], flat["psnr"])
    noisy = AutoencoderTask(networks, pool, Rebuilding(kl_weight=0.0, latent_noise=1.0))(8, rng.manual_seed(0))
    assert not torch.equal(noisy["loss"], flat["loss"]) and torch.equal(noisy["kl"], flat["kl"])
    task = AutoencoderTask(networks, pool, Rebuilding(kl_weight=0.0, decoder_only=True))
    trained = {name for name, p in task.named_parameters() if p.requires_grad}
    assert trained and all(".decoder." in name or ".post_quant_conv." in name for name in trained)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_perfect_u_net_predicts_the_latents_themselves(networks, pool, monkeypatch, prediction):
    """Measured: 1.5e-6 for v and 5.5e-6 for eps, which divides by the signal, of latents up to 1.2."""
    task = DiffusionTask(networks, pool, Conditions(), ROLES)
    task.schedule = make_schedule(prediction=prediction)
    right = DiffusionTask.predict

    def perfect(self, batch, times, rng, swap=()):
        noisy, _, target = right(self, batch, times, rng, swap)
        return noisy, target, target

    monkeypatch.setattr(DiffusionTask, "predict", perfect)
    batch = pool.random_batch(8, torch.Generator().manual_seed(0))
    found = task.predicted_latents(batch, torch.Generator().manual_seed(1))
    frames = clips.to_float(batch.frames)
    wanted = torch.stack([networks.autoencoder.encode(clip).mean for clip in frames])
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    shrinking = replace(networks.cfg.diffusion, prediction=prediction, dynamic_rescale=0.7)
    task.schedule = make_schedule(**asdict(shrinking))
    found = task.predicted_latents(batch, torch.Generator().manual_seed(1))
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


def test_frames_are_rebuilt_from_the_predictions_of_their_own_clip(networks, pool, monkeypatch):
    """A prediction that is right to the digit: the decoder gets exactly the latents of the frame that it shall show."""
    autoencoder, asked, seen = networks.autoencoder, [], []
    encode, decode = autoencoder.encode, autoencoder.decode

    def predict(batch, rng):
        asked.append(len(batch))
        return torch.stack([encode(clip).mean for clip in clips.to_float(batch.frames)]).detach()

    monkeypatch.setattr(autoencoder, "encode", lambda x: seen.append(x) or encode(x))
    monkeypatch.setattr(autoencoder, "decode", lambda z: seen.append(z) or decode(z))
    rebuilding = Rebuilding(kl_weight=0.0, decoder_only=True, predicted_latents=1.0)
    AutoencoderTask(networks, pool, rebuilding, predict)(10, torch.Generator().manual_seed(0))
    frames, latents = seen
    assert asked == [3]  # ten frames of three clips
    torch.testing.assert_close(latents, encode(frames).mean, atol=1e-5, rtol=0)


def test_a_share_of_the_pictures_are_last_frames(networks, pool, monkeypatch):
    """CLIP learns the motion from where it led to; all other frames stay equally likely."""
    seen = []
    task = ContrastiveTask(networks, pool, last_frames=0.5)
    forward = task.clip.forward
    monkeypatch.setattr(task.clip, "forward", lambda frames, captions: seen.append(frames) or forward(frames, captions))
    rng = torch.Generator().manual_seed(0)
    drawn = pool.random_batch(400, torch.Generator().manual_seed(0)).frames
    task(400, rng)
    places = [(drawn[i] == frame).flatten(1).all(1).nonzero()[-1] for i, frame in enumerate(seen[0])]
    last = sum(int(place) == drawn.shape[1] - 1 for place in places) / 400
    assert 0.5 < last < 0.75  # half, a quarter of the rest, and what stands still


def test_a_clip_is_the_same_whatever_is_drawn_around_it(pool):
    again = ClipPool(pool.items, 4, (1, 3), 16, 16, clips=20, seed=0)
    one, two = pool.batch([3, 5], torch.Generator()), again.batch([5], torch.Generator())
    assert torch.equal(one.frames[1], two.frames[0]) and one.strides[1] == two.strides[0]
    assert {int(pool.draw(i)[2]) for i in range(20)} == {1, 3}
