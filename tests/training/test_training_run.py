"""Stages, roles, resuming and the files of a training."""

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dcbench import files
from dcbench.errors import UserError
from dcbench.models.dynamicrafter.unet import parameter_role
from dcbench.training import loop, run
from dcbench.training.loop import LoopConfig, Task, make_optimisers, orthogonalise
from dcbench.training.networks import build, normalise_latents, save
from dcbench.training.objective import draw_times
from dcbench.training.recipe import FOLDER, DiffusionStage, find_recipe
from dcbench.training.run import make_task, train
from dcbench.weights import load_tensors

ALL = ("context", "spatial", "temporal")
BASE = {"name": "base", "train": ("spatial", "temporal"), "context": "none", "vdg": "none"}
CONTEXT = {"name": "context", "train": ("context",), "vdg": "none", "single_frames": True, "fixed_image_scale": True}
ADAPT = {"name": "adapt", "train": ("context", "spatial"), "vdg": "none"}
JOINT = {"name": "joint", "train": ("context", "spatial")}


def weights(folder, stage):
    return load_tensors(folder / stage / "weights.safetensors")


def changed(before, after):
    """Names of the U-Net's and query transformer's tensors that differ, by role."""
    found = {role: [] for role in ALL}
    for name in before:
        if not torch.equal(before[name], after[name]):
            found[parameter_role(name)].append(name)
    return found


def test_the_stages_train_what_they_say_and_leave_the_rest_bit_unchanged(make_recipe, tmp_path):
    entire = {"name": "entire", "train": ALL}
    recipe = make_recipe(
        {"name": "autoencoder", "objective": "autoencoder"},
        {"name": "clip", "objective": "clip"},
        *(BASE, CONTEXT, ADAPT, JOINT, entire),
    )
    assert train(recipe, tmp_path, device="cpu")
    base, context, adapt, joint, all_of_it = (
        weights(tmp_path, name) for name in ("base", "context", "adapt", "joint", "entire")
    )
    first = changed(base, context)
    assert first["context"] and not first["spatial"] and not first["temporal"]
    assert not any(name.endswith("alpha") for name in first["context"])
    for before, after in ((context, adapt), (adapt, joint)):
        found = changed(before, after)
        assert found["context"] and found["spatial"] and not found["temporal"]
        assert any(name.endswith("alpha") for name in found["context"])
    assert all(changed(joint, all_of_it).values())

    state = load_tensors(tmp_path / "weights.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float16}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["autoencoder"]["scale_factor"] == 1  # it lies in the convolutions around the latents
    assert (tmp_path / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("muon_lr", [0.0, 0.01])
def test_a_run_that_was_killed_ends_with_the_same_bits(make_recipe, tmp_path, muon_lr):
    stage = {"steps": 6, "ema": 0.9, "accumulate": 2, "warmup": 2, "final_lr": 1e-4, "muon_lr": muon_lr}
    recipe = make_recipe({**JOINT, **stage})
    assert train(recipe, tmp_path / "whole", device="cpu")

    class Killed(Exception):
        pass

    def kill(stage, step, steps, line):
        if step == 5:  # the last checkpoint is that of step 4
            raise Killed

    with pytest.raises(Killed):
        train(recipe, tmp_path / "parts", device="cpu", progress=kill)
    assert not (tmp_path / "parts" / "joint" / "weights.safetensors").exists()
    assert train(recipe, tmp_path / "parts", device="cpu")
    whole, parts = weights(tmp_path / "whole", "joint"), weights(tmp_path / "parts", "joint")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    logs = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "joint" / "log.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_a_stopped_run_continues(make_recipe, tmp_path):
    recipe = make_recipe({**JOINT, "steps": 3})
    assert not train(recipe, tmp_path, device="cpu", stop_after=0)
    assert torch.load(tmp_path / "joint" / "state.pt", weights_only=True)["step"] == 1
    assert train(recipe, tmp_path, device="cpu")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_stages_stops_and_later_ones_do_what_they_did(make_recipe, tmp_path, monkeypatch, number):
    """At the end of the first stage, while its files are written."""
    recipe = make_recipe({**BASE, "steps": 1}, {**CONTEXT, "steps": 1})
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def plot(logs, target):
        os.kill(os.getpid(), number)

    monkeypatch.setattr(run, "plot_log", plot)
    assert not train(recipe, tmp_path, device="cpu")
    assert (tmp_path / "base" / "weights.safetensors").is_file() and not (tmp_path / "context").exists()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    monkeypatch.undo()
    assert train(recipe, tmp_path, device="cpu")


def test_a_training_that_was_killed_between_two_files_goes_on(make_recipe, tmp_path, capsys):
    """Weights without config.json, as after a crash between them, at the end of a stage and of the whole."""
    recipe = make_recipe({"name": "autoencoder", "objective": "autoencoder", "steps": 1}, {**BASE, "steps": 1})
    assert train(recipe, tmp_path / "a", device="cpu")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    whole = load_tensors(tmp_path / "a" / "weights.safetensors")
    for damage in (Path.unlink, lambda path: path.write_text('{"unet": {')):
        for config in ("autoencoder/config.json", "config.json"):
            damage(tmp_path / "b" / config)
        assert train(recipe, tmp_path / "b", device="cpu")
        assert "the stage is finished again from its state" in capsys.readouterr().err
        for config in ("autoencoder/config.json", "config.json"):
            assert (tmp_path / "b" / config).read_text() == (tmp_path / "a" / config).read_text()
        again = load_tensors(tmp_path / "b" / "weights.safetensors")
        assert all(torch.equal(whole[name], again[name]) for name in whole)
    (tmp_path / "b" / "base" / "config.json").unlink()
    (tmp_path / "b" / "base" / "state.pt").unlink()
    with pytest.raises(UserError, match=r"base/config\.json is missing or damaged.* train the stage anew"):
        train(recipe, tmp_path / "b", device="cpu")


def test_the_whole_models_config_is_written_before_its_weights(make_recipe, tmp_path, monkeypatch):
    recipe = make_recipe({**BASE, "steps": 1})

    def killed(networks, path, *rest, **named):
        assert (path.parent / "config.json").is_file()
        save(networks, path, *rest, **named)

    monkeypatch.setattr(run, "save", killed)
    assert train(recipe, tmp_path, device="cpu")


@pytest.mark.parametrize("damage", [b"", b"\x80\x02}q", b"PK\x03\x04 cut", None])
def test_a_damaged_state_is_told_kept_and_the_stage_begins_anew(make_recipe, tmp_path, capsys, damage):
    recipe = make_recipe({**BASE, "steps": 2})
    assert not train(recipe, tmp_path, device="cpu", stop_after=0)
    state = tmp_path / "base" / "state.pt"
    if damage is None:
        torch.save({"step": 1}, state)
    else:
        state.write_bytes(damage)
    leftover = tmp_path / "base" / f".state.pt-{files._HOST}-{2**22 + 1}-abcdefgh.pt"
    leftover.write_bytes(b"10 GB")
    assert train(recipe, tmp_path, device="cpu")
    said = capsys.readouterr().err
    assert "It is kept as state.damaged, and the stage begins anew" in said and "weights_only" not in said
    assert (tmp_path / "base" / "state.damaged").is_file() and not leftover.exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "base" / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2]


def test_other_settings_do_not_continue_a_run(make_recipe, tmp_path):
    train(make_recipe({**JOINT, "steps": 3}), tmp_path, device="cpu", stop_after=0)
    with pytest.raises(UserError, match="other settings"):
        train(make_recipe({**JOINT, "steps": 3, "lr": 1e-4}), tmp_path, device="cpu")


def test_independent_stages_may_lie_in_one_directory(make_recipe, tmp_path):
    """CLIP before the autoencoder, and the decoder's own stage by another process while the U-Net learns."""
    autoencoder = {"name": "autoencoder", "objective": "autoencoder"}
    sharpen = {"name": "sharpen", "objective": "autoencoder", "decoder_only": True}
    recipe = make_recipe(autoencoder, sharpen, {"name": "clip", "objective": "clip"}, JOINT)

    def meanwhile(stage, step, steps, line):
        if stage == "joint" and step == 1:
            train(recipe, tmp_path / "a", device="cpu", stages=("sharpen",))

    train(recipe, tmp_path / "a", device="cpu", stages=("clip",))
    train(recipe, tmp_path / "a", device="cpu", stages=("autoencoder", "joint"), progress=meanwhile)
    train(recipe, tmp_path / "b", device="cpu")
    a, b = (load_tensors(tmp_path / name / "weights.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_finished_stage_of_another_model_is_refused(make_recipe, tmp_path):
    recipe = make_recipe({"name": "autoencoder", "objective": "autoencoder"})
    train(recipe, tmp_path, device="cpu")
    deeper = {**recipe.model, "autoencoder": {**recipe.model["autoencoder"], "num_res_blocks": 3}}
    with pytest.raises(UserError, match="of another model than the recipe's"):
        train(recipe.model_copy(update={"model": deeper}), tmp_path, device="cpu")


def test_a_stage_of_the_decoder_alone_leaves_the_latents(make_recipe, tmp_path):
    whole = {"name": "autoencoder", "objective": "autoencoder"}
    sharpen = {"name": "sharpen", "objective": "autoencoder", "decoder_only": True, "latent_noise": 0.1}
    assert train(make_recipe(whole, sharpen), tmp_path, device="cpu")
    before, after = weights(tmp_path, "autoencoder"), weights(tmp_path, "sharpen")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    decoder = ("first_stage_model.decoder.", "first_stage_model.post_quant_conv.")
    assert changed and changed == {name for name in before if name.startswith(decoder)}


def test_the_decoder_learns_from_what_the_u_net_predicts(make_recipe, tmp_path):
    """Only the decoder changes, and it does so differently than from the encoder's latents."""
    whole = {"name": "autoencoder", "objective": "autoencoder"}
    sharpen = {"name": "sharpen", "objective": "autoencoder", "decoder_only": True}
    predicted = {**sharpen, "predicted_latents": 0.75, "condition_frame": "first"}
    with pytest.raises(UserError, match="sharpen needs stage joint"):
        train(make_recipe(whole, JOINT, predicted), tmp_path, device="cpu", stages=("autoencoder", "sharpen"))
    for name, stage in (("predicted", predicted), ("plain", sharpen)):
        assert train(make_recipe(whole, JOINT, stage), tmp_path / name, device="cpu")
    before, after = weights(tmp_path / "predicted", "joint"), load_tensors(tmp_path / "predicted/weights.safetensors")
    assert all(torch.equal(before[name].half(), after[name]) for name in before)
    decoder = ("first_stage_model.decoder.", "first_stage_model.post_quant_conv.")
    old, new = (weights(tmp_path / "predicted", stage) for stage in ("autoencoder", "sharpen"))
    assert {name for name in old if not torch.equal(old[name], new[name])} == {n for n in old if n.startswith(decoder)}
    plain = weights(tmp_path / "plain", "sharpen")
    assert any(not torch.equal(plain[name], new[name]) for name in new)
    for wrong, said in (
        ({"decoder_only": False}, "needs decoder_only = true"),
        ({"predicted_latents": 0.0}, "condition_frame: without predicted_latents"),
    ):
        with pytest.raises(ValueError, match=said):
            make_recipe({**predicted, **wrong})


def test_training_starts_from_a_checkpoint_and_says_what_was_new(make_recipe, tmp_path, capsys):
    train(make_recipe(BASE), tmp_path / "base", device="cpu")
    state = load_tensors(tmp_path / "base" / "weights.safetensors")
    before = {name: value for name, value in state.items() if "_ip." not in name and not name.endswith("alpha")}
    torch.save(before, tmp_path / "t2v.pt")
    start = ({"file": str(tmp_path / "t2v.pt"), "parts": ("unet", "autoencoder", "text", "image")},)
    train(make_recipe(CONTEXT, start=start), tmp_path / "next", device="cpu")
    said = capsys.readouterr().out
    assert "to_k_ip" in said and "begin as new" in said
    after = load_tensors(tmp_path / "next" / "weights.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(after[name], state[name])
    wrong = ({"file": str(tmp_path / "t2v.pt"), "parts": ("query_transformer",)},)
    torch.save({name: state[name]}, tmp_path / "t2v.pt")
    with pytest.raises(UserError, match="nothing of query_transformer"):
        train(make_recipe(CONTEXT, start=wrong), tmp_path / "wrong", device="cpu")


def test_the_learning_rate_warms_up_and_falls():
    config = loop.LoopConfig(steps=100, batch_size=1, lr=1.0, final_lr=0.1, warmup=10)
    rates = [config.lr_at(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_batches_that_do_not_divide_are_refused(make_recipe, tmp_path):
    with pytest.raises(UserError, match="multiple of 3"):
        train(make_recipe({**JOINT, "accumulate": 3}), tmp_path, device="cpu")


def test_accumulation_is_the_mean_of_its_parts(make_recipe, tmp_path):
    """One step of plain gradient descent on two parts of two clips equals the mean of the two gradients."""
    recipe = make_recipe({**JOINT, "steps": 1, "accumulate": 2})
    assert train(recipe, tmp_path, device="cpu")
    line = json.loads((tmp_path / "joint" / "log.jsonl").read_text())
    assert line["loss"] > 0 and line["grad_norm"] > 0


def test_a_training_does_not_go_on_from_another_file_of_the_same_name(make_recipe, tmp_path):
    """Frozen parameters would come from the new file, trained ones from the old."""
    file = tmp_path / "begin.safetensors"
    recipe = make_recipe({**JOINT, "steps": 2}, start=[{"file": str(file), "parts": ["unet"]}])
    save(build(recipe.config(), 5), file)
    assert not train(recipe, tmp_path / "out", device="cpu", stop_after=0)
    save(build(recipe.config(), 6), file)
    with pytest.raises(UserError, match=r"begun with another .*begin\.safetensors; choose another --out"):
        train(recipe, tmp_path / "out", device="cpu")
    save(build(recipe.config(), 5), file)
    assert train(recipe, tmp_path / "out", device="cpu")


def test_every_shipped_recipe_is_valid():
    names = sorted(path.stem for path in FOLDER.glob("*.toml"))
    assert "tiny" in names
    for name in names:
        recipe = find_recipe(name)
        assert recipe.name == name
        assert type(recipe).model_validate_json(recipe.model_dump_json()) == recipe
        recipe.config()
    with pytest.raises(UserError, match="tiny"):
        find_recipe("tinny")


def test_a_recipe_may_say_what_differs_from_another(tmp_path):
    tiny = find_recipe("tiny")
    file = tmp_path / "mine.toml"
    head = 'extends = "tiny"\nname = "mine"\nsummary = "shorter"\nwithout = ["joint"]\n'
    file.write_text(head + "[data]\nclips = 7\n[stages.base]\nsteps = 3\n")
    mine = find_recipe(str(file))
    assert (mine.name, mine.data.clips, mine.stage("base").steps) == ("mine", 7, 3)
    assert mine.data.options == tiny.data.options and mine.model == tiny.model
    assert mine.stage("base").model_copy(update={"steps": tiny.stage("base").steps}) == tiny.stage("base")
    assert [stage.name for stage in mine.stages] == [stage.name for stage in tiny.stages if stage.name != "joint"]
    assert mine.start == tiny.start == ()
    assert find_recipe("tiny-refine").start[0].path == Path("tiny.safetensors")
    shipped = [start.path.name for start in find_recipe("tiny-from-base").start if start.path.is_absolute()]
    assert shipped == ["weights.safetensors", "base.safetensors"]
    for wrong, message in (
        ("[stages.bse]\nsteps = 3\n", "no stage 'bse'"),
        ("[stages.base]\nstep = 3\n", "step: unknown key"),
        ("[data]\nclip = 3\n", "clip: unknown key"),
        ("[stages.base]\nlast_frames = 0.5\n", r"diffusion.last_frames: unknown key.*Allowed here: .*time_shift"),
        ("[stages.clip]\ntime_shift = 4.0\n", r"clip.time_shift: unknown key.*Allowed here: .*last_frames"),
        ("[stages.autoencoder]\ntime_shift = 4.0\n", "time_shift: without predicted_latents the U-Net is not asked"),
        ('[stages.base]\nobjective = "gan"\n', "objective must be diffusion, autoencoder or clip"),
    ):
        file.write_text(head + wrong)
        with pytest.raises(UserError, match=message):
            find_recipe(str(file))


def test_a_recipe_may_extend_another_one_for_another_variant():
    """Both ends beside the noise, from the shipped weights; what is not trained is not changed."""
    recipe, tiny = find_recipe("tiny-interp"), find_recipe("tiny-finish")
    assert recipe.config() == replace(tiny.config(), interpolates=True)
    (stage,) = recipe.stages
    assert isinstance(stage, DiffusionStage) and stage.train == ("context", "temporal")
    assert (stage.vdg, stage.condition_frame, stage.drop_vdg) == ("ends", "first", 0.0)
    assert [start.path.is_file() for start in recipe.start] == [True]


def test_muon_turns_matrices_by_their_gradient_alone():
    """A kernel moves like the matrix it is, as PyTorch's own Muon moves it in bfloat16; biases are AdamW's.

    Measured: 1.7 % of the way that three steps go, which is bfloat16's rounding.
    """
    torch.manual_seed(0)
    task = Task()
    task.conv, task.linear = nn.Conv3d(4, 6, (3, 1, 1)), nn.Linear(5, 7)
    copies = {name: nn.Parameter(p.detach().reshape(len(p), -1).clone()) for name, p in task.named_parameters()}
    trained = dict(task.named_parameters())
    before = {name: p.detach().clone() for name, p in trained.items()}
    adamw, muon = make_optimisers(task, trained, LoopConfig(steps=1, batch_size=1, lr=1e-3, muon_lr=0.01))
    assert [len(made.param_groups[0]["params"]) for made in (adamw, muon)] == [2, 2]
    reference = torch.optim.Muon([copies["conv.weight"], copies["linear.weight"]], lr=0.01, weight_decay=0.0)
    for _ in range(3):
        for name, p in trained.items():
            p.grad = torch.randn_like(p)
            copies[name].grad = p.grad.reshape(len(p), -1)
        adamw.step()
        muon.step()
        reference.step()
    for name in ("conv.weight", "linear.weight"):
        off, way = trained[name].flatten(1) - copies[name], trained[name] - before[name]
        assert off.norm() < 0.03 * way.norm()


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (7, 7)])
def test_orthogonalise_moves_singular_values_alone(shape):
    """Against the polynomial on the singular values, in float64. Measured: 1.1e-6 of the norm."""
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    for matrix, found in zip(matrices.double(), orthogonalise(matrices), strict=True):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        s = s / matrix.norm()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        wanted = u @ torch.diag(s) @ vh
        assert (found - wanted).norm() < 5e-6 * wanted.norm()


def test_muon_leaves_the_ends_and_embeddings_of_the_network_to_adamw(make_recipe):
    recipe = make_recipe({**JOINT, "train": ALL})
    task = make_task(recipe.stages[0], build(recipe.config(), 0), None)  # type: ignore[arg-type]
    matrices = task.matrices()
    assert "unet.middle_block.0.in_layers.2.weight" in matrices and "unet.input_blocks.1.1.proj_in.weight" in matrices
    for name in (
        "input_blocks.0.0.weight",
        "out.2.weight",
        "time_embed.0.weight",
        "middle_block.0.emb_layers.1.weight",
    ):
        assert f"unet.{name}" not in matrices and f"unet.{name}" in dict(task.named_parameters())


def test_latents_are_normalised_and_frames_stay(make_recipe):
    networks = build(make_recipe(JOINT).config(), 0)
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(64, 3, 16, 16, generator=generator) * 2 - 1
    with torch.no_grad():
        before = networks.autoencoder.encode(frames)
        expected = networks.autoencoder.decode(before.mean)
        noise = torch.randn(before.mean.shape, generator=generator)
        samples = before.sample(noise)
        normalise_latents(networks, samples)
        after = networks.autoencoder.encode(frames)
        mean, std = (f((0, 2, 3))[:, None, None] for f in (samples.mean, samples.std))
        assert torch.allclose(after.mean, (before.mean - mean) / std, atol=1e-5)
        assert torch.allclose(after.sample(noise), after.mean, atol=3e-4)  # what sampling sees is what was learned
        error = float(
            (networks.autoencoder.from_latents(networks.autoencoder.to_latents(frames)) - expected).abs().max()
        )
    assert error < 1e-5, error  # measured: 6e-7


def test_a_shift_draws_more_of_the_noisy_steps():
    rng = torch.Generator().manual_seed(0)
    for shift in (1.0, 4.0):
        times = draw_times(20000, 1000, shift, rng)
        assert times.min() >= 0 and times.max() == 999
        quartiles = torch.quantile(times.double(), torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
        expected = [1000 * shift * u / (1 + (shift - 1) * u) for u in (0.25, 0.5, 0.75)]
        assert quartiles.tolist() == pytest.approx(expected, abs=12)
