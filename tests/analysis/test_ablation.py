"""Suites from end to end: sampled arms, λ arms, folders of clips, trained arms; and that they resume."""

import json
import shutil

import pytest

from dcbench.analysis.ablation import rebuild, run_suite
from dcbench.analysis.suite import Suite
from dcbench.analysis.suite_table import Point, show
from dcbench.catalogue import ModelCard, find_dataset, find_model
from dcbench.errors import UserError
from dcbench.models.dynamicrafter.pipeline import DynamiCrafter
from dcbench.protocol import find_protocol
from dcbench.runs import planning, sampling
from dcbench.runs.run import Options
from dcbench.training.arms import arm_recipe, train_arm
from dcbench.training.recipe import find_recipe
from dcbench.training.run import train
from dcbench.weights import load_tensors

QUIET = Options(device="cpu", quiet=True)
CARD = ModelCard(
    name="gates",
    title="",
    summary="",
    entry_point="dcbench.models.dynamicrafter.load:load",
    options={"variant": "tiny", "random_seed": 0},
    sampling={"steps": 1, "guidance_scale": 1.0},
    conditions_on=("image", "prompt", "frame_stride"),
)
RECIPE = """
name = "micro"
summary = "for tests"
variant = "tiny"
seed = 1
[model]
height = 16
width = 16
[model.unet]
model_channels = 8
head_channels = 8
init_heads = 1
context_dim = 16
text_tokens = 24
image_tokens = 2
norm_groups = 4
[model.autoencoder]
channels = 8
channel_mult = [1, 1]
norm_groups = 4
[model.clip]
embed_dim = 16
image_size = 16
vision_width = 16
vision_layers = 1
vision_head_width = 8
context_length = 24
text_width = 16
text_heads = 2
text_layers = 2
[model.query_transformer]
in_dim = 16
dim = 16
out_dim = 16
depth = 1
heads = 2
head_dim = 8
num_queries = 2
[data]
dataset = "shapes"
options = { size = 16, train_videos = 20, test_videos = 8 }
clips = 6
strides = [3]
cache = true
[[stages]]
name = "base"
steps = 2
batch_size = 2
lr = 1e-3
train = ["spatial", "temporal"]
context = "none"
vdg = "none"
[[stages]]
name = "adapt"
steps = 1
batch_size = 2
lr = 1e-3
vdg = "none"
[[stages]]
name = "joint"
steps = 3
batch_size = 2
lr = 1e-3
"""


def both(suite, out, **changes):
    settings = {"limit": 3, "metrics": ("motion",), "options": QUIET, **changes}
    return run_suite(suite, CARD, find_dataset("shapes"), find_protocol("smoke"), out, **settings)


def test_sampled_arms_share_their_clips_and_resume(tmp_path):
    still = planning.plan(
        find_model("still"), find_dataset("shapes"), find_protocol("smoke"), out=tmp_path / "still", limit=3
    )
    sampling.sample(still, QUIET)
    arms = (
        {"name": "ours", "published": {"fvd": 234.66}},
        {"name": "λ off", "group": "all", "x": 0, "image_scale": {"all": 0.0}},
        {"name": "λ twice", "group": "all", "x": 2, "image_scale": {"all": 2.0}},
        {"name": "folder", "clips": str(tmp_path / "still" / "clips")},
    )
    suite = Suite.model_validate(
        {"name": "own", "title": "Own", "x_label": "factor", "baseline": "λ twice", "arms": arms}
    )
    rows = both(suite, tmp_path / "out")
    manifests = {(path / "manifest.jsonl").read_text() for path in (tmp_path / "out").glob("*/seed-123")}
    assert len(manifests) == 1 and [row.clips for row in rows] == [3, 3, 3, 3]
    assert all({"motion", "judge_motion", "judge_colour"} <= set(row.scores) for row in rows)
    assert rows[3].scores["judge_colour"][0].value == 1.0
    assert not rows[2].gaps and set(rows[3].gaps) == {"motion", *find_dataset("shapes").metrics}
    gap = rows[3].gaps["motion"][0]
    assert gap.value == pytest.approx(rows[3].scores["motion"][0].value - rows[2].scores["motion"][0].value, rel=1e-6)
    assert gap.value < 0 and gap.interval is not None  # nothing moves in the folder's clips
    assert gap.interval[0] <= gap.value <= gap.interval[1] and gap.p_value is not None
    clips = {p.parent.parent.parent.name: p.read_bytes() for p in (tmp_path / "out").glob("*/*/clips/test-*.mkv")}
    assert clips["lambda-off"] != clips["lambda-twice"]
    table = (tmp_path / "out" / "table.md").read_text()
    shown = show(rows[3].gap("motion"))
    line = next(line for line in table.splitlines()[::-1] if "| folder |" in line)
    assert f" {shown} |" in line.replace("*", "")
    assert "234.66" in table and "λ off" in table and (tmp_path / "out" / "curves-motion.png").is_file()
    pictures = {path.name for path in (tmp_path / "out").glob("frames-*")}
    assert pictures == {f"frames-{group}-{number}.png" for group in ("all", "own") for number in (1, 2)}
    shutil.copytree(tmp_path / "out", tmp_path / "kept", ignore=shutil.ignore_patterns("clips", "table.*", "*.png"))
    assert rebuild(tmp_path / "kept") == table  # from the records alone
    for file in ("table.md", "table.csv", "curves-motion.png"):
        assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    kept = [*(tmp_path / "out").glob("*/*/clips/*.mkv"), *(tmp_path / "out").glob("*/*/gap.json")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    both(suite, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_arms_that_ask_for_the_same_are_sampled_once(tmp_path, monkeypatch):
    arms = (
        {"name": "ours"},
        {"name": "steps 1", "sampling": {"steps": 1}},
        {"name": "λ as learned", "image_scale": {"all": 1.0}},
        {"name": "λ off", "image_scale": {"all": 0.0}},
    )
    sampled = []
    generate = DynamiCrafter.generate
    monkeypatch.setattr(DynamiCrafter, "generate", lambda *given: sampled.append(1) or generate(*given))
    rows = both(Suite.model_validate({"name": "own", "title": "Own", "arms": arms}), tmp_path)
    assert len(sampled) == 2 * 3  # two settings, three clips
    places = json.loads((tmp_path / "suite.json").read_text())["runs"]
    runs = [tmp_path / places[arm["name"]]["123"] for arm in arms]
    assert runs[0] == runs[1] == runs[2] != runs[3] and len(list(tmp_path.glob("*/seed-123"))) == 2
    assert (runs[0] / "samples.jsonl").read_text() != (runs[3] / "samples.jsonl").read_text()
    assert rows[1].scores == rows[0].scores and rows[1].gaps["motion"] == [Point(0.0, None)]
    assert rebuild(tmp_path) == (tmp_path / "table.md").read_text()


@pytest.mark.slow
def test_trained_arms_share_their_base_and_differ_by_what_they_say(tmp_path):
    (tmp_path / "micro.toml").write_text(RECIPE)
    arms = (
        {"name": "ours"},
        {"name": "entire", "stages": {"joint": {"train": ("context", "spatial", "temporal")}}},
        {"name": "first", "stages": {"adapt": {"condition_frame": "first"}}},
    )
    suite = Suite.model_validate(
        {
            "name": "own",
            "title": "Own",
            "kind": "training",
            "recipe": str(tmp_path / "micro.toml"),
            "shared": "base",
            "held_out_clips": 4,
            "stages": {"joint": {"steps": 2}},
            "arms": arms,
        }
    )
    rows = both(suite, tmp_path / "out", seeds=(1, 2))
    base = load_tensors(tmp_path / "out" / "shared" / "base" / "weights.safetensors")
    temporal = next(name for name in base if "temopral_conv.conv1" in name and name.endswith("conv1.2.weight"))
    for name, same in (("ours", True), ("entire", False)):
        for seed in (1, 2):
            folder = tmp_path / "out" / name / f"training-{seed}"
            after = load_tensors(folder / "joint" / "weights.safetensors")
            assert (after[temporal] == base[temporal]).all() == same
            assert json.loads((folder / "held_out.json").read_text())["loss"] > 0
    folder_of_two = tmp_path / "out" / "entire" / "training-2"
    stages = sorted(path.name.split("-")[0] for path in (tmp_path / "out" / "stages").iterdir())
    assert stages == ["adapt"] * 4 + ["joint"] * 6  # "ours" and "entire" share theirs, for each of two seeds
    recipe = arm_recipe(find_recipe(suite.recipe).varied(suite.stages), suite.arms[1].stages, (), 2)
    assert [stage.steps for stage in recipe.stages] == [2, 1, 2]
    shutil.copytree(tmp_path / "out" / "shared", tmp_path / "whole")
    assert train(recipe, tmp_path / "whole", device="cpu")  # in one go, nothing taken over from another arm
    one, other = (load_tensors(path / "joint" / "weights.safetensors") for path in (tmp_path / "whole", folder_of_two))
    assert one.keys() == other.keys() and all((one[name] == other[name]).all() for name in one)
    assert all(len(row.scores["held_out_loss"]) == 2 and len(row.scores["swap_text"]) == 2 for row in rows)
    assert not rows[0].gaps and len(rows[1].gaps["motion"]) == 2
    assert rows[1].gaps["first_frame_loss"][0].value == pytest.approx(
        rows[1].scores["first_frame_loss"][0].value - rows[0].scores["first_frame_loss"][0].value
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert "seeds 1, 2" in table and rebuild(tmp_path / "out") == table


def test_arms_may_share_the_files_that_their_recipe_begins_with(tmp_path):
    """No stage in common: what they have in common is trained already, and latents are computed once."""
    micro = tmp_path / "micro.toml"
    micro.write_text(RECIPE)
    assert train(find_recipe(str(micro)).varied({}, ("adapt", "joint")), tmp_path / "base", device="cpu")
    begins = f"""
extends = "{micro}"
name = "further"
summary = "from the base"
without = ["base"]
[[start]]
file = "{tmp_path / "base" / "weights.safetensors"}"
parts = ["autoencoder", "text", "image", "unet"]
"""
    (tmp_path / "further.toml").write_text(begins)
    further, out = find_recipe(str(tmp_path / "further.toml")), tmp_path / "out"
    arms = {
        "ours": arm_recipe(further, {}),
        "none": arm_recipe(further, {}, ("joint",)),
        "short": arm_recipe(further, {"joint": {"steps": 1}}),
    }
    folders = [train_arm(further, recipe, out, out / name).path for name, recipe in arms.items()]
    base, *trained = (load_tensors(path / "weights.safetensors") for path in (tmp_path / "base", *folders))
    temporal = next(name for name in base if "temopral_conv.conv1" in name and name.endswith("conv1.2.weight"))
    assert all((weights[temporal] == base[temporal]).all() for weights in trained)
    assert sorted(path.name.split("-")[0] for path in (out / "stages").iterdir()) == ["adapt", "joint", "joint"]
    latents = list(out.rglob("latents*"))
    assert [path.parent for path in latents] == [out / "shared"] and not (out / "shared" / "base").exists()


def test_arms_on_other_clips_are_not_compared_and_the_table_says_so(tmp_path):
    arms = ({"name": "ours"}, {"name": "slower", "frame_stride": 2}, {"name": "faster", "options": {"factor": 2.0}})
    suite = Suite.model_validate({"name": "own", "title": "Own", "arms": arms})
    rows = run_suite(
        suite,
        find_model("zoom"),
        find_dataset("shapes"),
        find_protocol("smoke"),
        tmp_path,
        QUIET,
        limit=1,
        metrics=("motion",),
    )
    strides = [planning.reopen(tmp_path / arm / "seed-123").cases[0].frame_stride for arm in ("ours", "slower")]
    assert strides == [3, 2]  # though the protocol has a stride of its own for this dataset
    assert not rows[1].gaps and not rows[2].gaps
    table = (tmp_path / "table.md").read_text()
    assert "Not compared: slower: other clips than the baseline's" in table
    assert "Not compared: faster: a paired comparison needs at least 2 clips" in table


def test_arms_without_a_stage_that_can_be_compared_are_refused(tmp_path):
    clip = 'name = "clip"\nobjective = "clip"\nsteps = 1\nbatch_size = 2\nlr = 1e-3\n'
    recipe, arms = tmp_path / "micro.toml", ({"name": "ours", "stages": {"jiont": {"steps": 1}}}, {"name": "ours"})
    without_diffusion = RECIPE.split("[[stages]]")[0] + "[[stages]]\n" + clip
    common = {"name": "own", "title": "", "kind": "training", "recipe": str(recipe), "shared": "base"}
    for text, arm, said in ((RECIPE, arms[0], "joint"), (without_diffusion, arms[1], "no diffusion")):
        recipe.write_text(text)
        with pytest.raises(UserError, match=said):
            both(Suite.model_validate({**common, "arms": [arm]}), tmp_path / "out")
