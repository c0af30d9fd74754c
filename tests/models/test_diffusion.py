"""Schedules, guidance and DDIM: against the recording, by independent arithmetic, and the repaired quirks."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dcbench.errors import UserError
from dcbench.models import diffusion
from dcbench.models.diffusion import Guidance, ddim, ddim_steps, ddim_timesteps, make_schedule

DATA = Path(__file__).parents[1] / "data" / "parity"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def released_512():
    return make_schedule("v", zero_terminal_snr=True, dynamic_rescale=0.7)


def test_schedules_equal_the_recorded_ones():
    recorded = load_file(DATA / "schedule.safetensors")
    assert torch.equal(make_schedule().alphas_cumprod, recorded["zsnr0.eps.alphas_cumprod"])
    assert torch.equal(make_schedule(zero_terminal_snr=True).alphas_cumprod, recorded["zsnr1.eps.alphas_cumprod"])
    assert torch.equal(diffusion.dynamic_scale(0.7, 1000), recorded["scale_arr"])


def test_ddim_constants_equal_the_recorded_ones():
    recorded = load_file(DATA / "ddim_constants.safetensors")
    seen = 0
    for key in recorded:
        if not key.endswith("sigmas"):
            continue
        _, spacing, snr, eta = key.removesuffix(".sigmas").split(".", 3)
        schedule = make_schedule("v", zero_terminal_snr=snr == "zsnr1")
        steps = ddim_steps(schedule, 5, spacing, float(eta.removeprefix("eta")))[::-1]
        stem = key.removesuffix("sigmas")
        for name, ours in (
            ("sigmas", [s.sigma for s in steps]),
            ("alphas", [s.alpha for s in steps]),
            ("alphas_prev", [s.alpha_prev for s in steps]),
        ):
            torch.testing.assert_close(torch.tensor(ours), recorded[stem + name], rtol=1e-6, atol=1e-7)
        seen += 1
    assert seen == 8


def test_timesteps_equal_the_recorded_ones():
    recorded = json.loads((DATA / "ddim_timesteps.json").read_text())
    assert len(recorded) == 32
    for key, theirs in recorded.items():
        spacing, steps = key.split("/")
        assert ddim_timesteps(int(steps), spacing) == [t for t in theirs if t < 1000], key


@pytest.mark.parametrize("spacing", diffusion.SPACINGS)
def test_every_number_of_steps_has_timesteps_that_exist(spacing: str):
    """Quirk 3: the released sampler reads index 1000 at 3, 9, 27 ... uniform steps, -1 at 61, 103 ... trailing ones."""
    for steps in range(1, 1001):
        times = ddim_timesteps(steps, spacing)
        assert times == sorted(set(times))
        assert times[0] >= 0 and times[-1] <= 999
        if spacing == "uniform_trailing":
            assert len(times) == steps and times[-1] == 999


@pytest.mark.parametrize(("steps", "spacing"), [(0, "uniform"), (1001, "uniform_trailing"), (5, "trailing")])
def test_impossible_steps_are_refused(steps: int, spacing: str):
    with pytest.raises(UserError, match=r"Allowed|from 1 to 1000"):
        ddim_timesteps(steps, spacing)


@pytest.mark.parametrize("steps", [*range(1, 65), 100, 250])
def test_no_step_count_makes_nan(steps: int):
    """Quirk 1: 20, 25 and others turn the whole clip into NaN in the released 512 mode."""
    schedule = released_512()
    x, clean = ddim(
        lambda x, t: 0.5 * x,
        schedule,
        random(1, 2, 3),
        ddim_steps(schedule, steps, "uniform_trailing", 1.0),
        lambda i: random(1, 2, 3, seed=i),
    )
    assert x.isfinite().all() and clean.isfinite().all()


def test_the_repair_of_nan_was_needed():
    """The remainder under the root is below zero in float32 at 20 and 25 steps, and not at the released 50."""
    bar = released_512().alphas_cumprod.double().tolist()

    def remainder(steps: int) -> float:
        times = ddim_timesteps(steps, "uniform_trailing")
        a, before = bar[times[-1]], bar[times[-2]]
        sigma = math.sqrt((1 - before) / (1 - a) * (1 - a / before))
        return float(1 - torch.tensor(before) - torch.tensor(sigma) ** 2)

    assert remainder(20) < 0 and remainder(25) < 0 and remainder(50) >= 0


def test_eps_at_zero_signal_is_refused():
    """Quirk 2: a division by zero in the released code."""
    with pytest.raises(UserError, match="divided by 0"):
        ddim_steps(make_schedule("eps", zero_terminal_snr=True), 5, "uniform_trailing", 0.0)
    assert len(ddim_steps(make_schedule("eps", zero_terminal_snr=True), 5, "uniform", 0.0)) == 5


def test_the_last_step_ends_at_alpha_0_and_keeps_its_rescale():
    """Quirks 4 and 5, kept: noise is left in the result, and it stays multiplied by the scale of the last timestep."""
    schedule = released_512()
    last = ddim_steps(schedule, 50, "uniform_trailing", 1.0)[-1]
    assert last.t == 19 and last.alpha_prev == pytest.approx(0.99915, abs=1e-6) and last.sigma > 0
    assert last.rescale == 1.0
    assert schedule.scale is not None and float(schedule.scale[19]) == pytest.approx(0.986, abs=1e-3)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_step_by_independent_arithmetic(prediction: diffusion.Prediction):
    """DDIM's Eq. 12 and the definition of v, written out in float64."""
    schedule = make_schedule(prediction, dynamic_rescale=0.5)
    step = ddim_steps(schedule, 4, "uniform", 0.6)[1]
    x, output, noise = (random(2, 3, 4, seed=i).double() for i in range(3))
    a, b = step.alpha, step.alpha_prev
    if prediction == "eps":
        eps, clean = output, (x - (1 - a) ** 0.5 * output) / a**0.5
    else:
        eps, clean = a**0.5 * output + (1 - a) ** 0.5 * x, a**0.5 * x - (1 - a) ** 0.5 * output
    assert schedule.scale is not None
    clean = clean * float(schedule.scale[251]) / float(schedule.scale[501])
    sigma = 0.6 * ((1 - b) / (1 - a)) ** 0.5 * (1 - a / b) ** 0.5
    expected = b**0.5 * clean + (1 - b - sigma**2) ** 0.5 * eps + sigma * noise
    ours, predicted = diffusion.ddim_step(prediction, step, x, output, noise)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(predicted, clean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_perfect_predictor_finds_the_clean_sample(prediction: diffusion.Prediction, eta: float):
    schedule = make_schedule(prediction)
    clean = random(1, 4, 2)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        signal, sigma = schedule.at(t, x)
        eps = (x - signal * clean) / sigma
        return eps if prediction == "eps" else signal * eps - sigma * clean

    steps = ddim_steps(schedule, 10, "uniform_trailing", eta)
    _, found = ddim(predict, schedule, random(1, 4, 2, seed=9), steps, lambda i: random(1, 4, 2, seed=i))
    torch.testing.assert_close(found, clean, rtol=1e-4, atol=1e-4)


def test_noise_is_asked_for_in_order_and_only_where_it_is_used():
    schedule, asked, told = make_schedule(), [], []

    def noise(i: int) -> Tensor:
        asked.append(i)
        return torch.zeros(1, 2)

    x = random(1, 2)
    steps = ddim_steps(schedule, 4, "uniform", 1.0)
    ddim(lambda x, t: x, schedule, x, steps, noise, lambda done, total: told.append((done, total)))
    assert asked == [0, 1, 2, 3] and told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    ddim(lambda x, t: x, schedule, x, ddim_steps(schedule, 4, "uniform", 0.0), noise)
    assert len(asked) == 4


def test_the_two_scales_weigh_text_and_image():
    full, none, image = random(3, 2, 4, seed=1), random(3, 2, 4, seed=2), random(3, 2, 4, seed=3)
    ours = diffusion.guide([full, none, image], Guidance(7.5, 2.5))
    torch.testing.assert_close(ours, none + 2.5 * (image - none) + 7.5 * (full - image))
    # equal scales: the plain formula, whatever the image branch says
    torch.testing.assert_close(
        diffusion.guide([full, none, image], Guidance(7.5, 7.5)), diffusion.guide([full, none], Guidance(7.5))
    )


def test_every_scale_of_1_works():
    """Quirk 6: the released code crashes at an image scale of 1.0, and at a text scale of 1.0 beside an image scale."""
    full, none, image = random(1, 4, seed=1), random(1, 4, seed=2), random(1, 4, seed=3)
    assert Guidance(1.0).branches == ("full",)
    assert torch.equal(diffusion.guide([full], Guidance(1.0, rescale=0.7)), full)
    torch.testing.assert_close(diffusion.guide([full, none, image], Guidance(3.0, 1.0)), image + 3 * (full - image))
    torch.testing.assert_close(
        diffusion.guide([full, none, image], Guidance(1.0, 2.0)), none + 2 * (image - none) + (full - image)
    )


def test_rescaled_guidance_has_the_spread_of_the_conditional_output():
    full, none = random(2, 4, 8, seed=1), 3 * random(2, 4, 8, seed=2)
    out = diffusion.guide([full, none], Guidance(7.5, rescale=1.0))
    torch.testing.assert_close(out.std((1, 2)), full.std((1, 2)))
    plain, half = (diffusion.guide([full, none], Guidance(7.5, rescale=share)) for share in (0.0, 0.5))
    torch.testing.assert_close(half, (plain + out) / 2)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_training_target_gives_back_noise_and_clean_sample(prediction: diffusion.Prediction):
    schedule = make_schedule(prediction, dynamic_rescale=0.3)
    clean, noise, t = random(3, 4, 2), random(3, 4, 2, seed=1), torch.tensor([0, 400, 999])
    noisy, target = diffusion.training_pair(schedule, clean, noise, t)
    signal, sigma = schedule.at(t, clean)
    eps, x0 = diffusion.to_eps_and_x0(prediction, target, noisy, signal, sigma)
    torch.testing.assert_close(eps, noise, rtol=1e-3, atol=1e-4)
    scale = torch.tensor([1.0, 0.3, 0.3])[:, None, None]
    torch.testing.assert_close(x0, clean * scale, rtol=1e-3, atol=1e-3)
    assert float(diffusion.denoising_loss(lambda x, t: target, schedule, clean, noise, t)) == 0
    loss = diffusion.denoising_loss(lambda x, t: torch.zeros_like(x), schedule, clean, noise, t)
    torch.testing.assert_close(loss, target.square().mean())


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="prediction"):
        make_schedule("x0")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="eta"):
        ddim_steps(make_schedule(), 5, "uniform", 1.5)
