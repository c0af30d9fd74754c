"""Arms of a training suite: what they share is trained once, or comes with the recipe; then its own stages."""

import json
import shutil
from pathlib import Path

from dcbench.analysis.suite import Arm, Suite
from dcbench.errors import UserError
from dcbench.models.dynamicrafter.load import read_config
from dcbench.record import digest
from dcbench.training.held_out import HeldOut, held_out
from dcbench.training.networks import PREFIXES, build
from dcbench.training.recipe import AutoencoderStage, DiffusionStage, Recipe, find_recipe, trains_decoder_alone
from dcbench.training.run import run as train
from dcbench.training.start import begin
from dcbench.weights import atomic_write, load_tensors, sha256_file


def arm_recipe(suite: Suite, arm: Arm, seed: int) -> Recipe:
    """The suite's recipe with the suite's and the arm's changes and this seed; unknown stages and fields are errors."""
    whole = find_recipe(suite.recipe)
    recipe = whole.varied(suite.stages).varied(arm.stages, arm.without, seed=whole.seed + seed)
    if not any(isinstance(stage, DiffusionStage) for stage in recipe.stages):
        raise UserError(f"suite {suite.name}, arm {arm.name!r}: no diffusion stage is left, so no loss can be compared")
    return recipe


def train_arm(suite: Suite, arm: Arm, out: Path, folder: Path, seed: int, data: Path | None) -> Path:
    """Train what all arms share once, then this arm's own stages from there; returns the trained folder.

    A stage that another arm has trained from the same beginning, with the same settings and seed, is taken over.
    """
    whole, recipe = find_recipe(suite.recipe), arm_recipe(suite, arm, seed)
    names = [stage.name for stage in whole.stages]
    shared = tuple(names[: names.index(whole.stage(suite.shared).name) + 1]) if suite.shared else ()
    common, target = out / "shared", folder / f"training-{seed}"
    if shared:
        train(whole, common, data, shared, device="cpu")
    for name in shared:
        _take_stage(common / name, target / name)
    begun = {start.file: sha256_file(start.path) for start in recipe.start if start.path.is_file()}
    own = [stage for stage in recipe.stages if stage.name not in shared]
    same_latents = all(trains_decoder_alone(stage) or not isinstance(stage, AutoencoderStage) for stage in own)
    if same_latents:
        _take_latents(common, target)
    for stage in own:
        so_far = recipe.model_copy(update={"stages": recipe.stages[: recipe.stages.index(stage) + 1], "summary": ""})
        kept = out / "stages" / f"{stage.name}-{digest([so_far.model_dump(mode='json'), begun])}"
        _take_stage(kept, target / stage.name)
        train(recipe, target, data, (stage.name,), device="cpu")
        _take_stage(target / stage.name, kept)
    train(recipe, target, data, device="cpu")  # writes the model's files
    if same_latents:
        _take_latents(target, common)
    return target


def _take_latents(source: Path, target: Path) -> None:
    """The cached latents of one autoencoder, copied to where they are missing."""
    name = "latents.safetensors"
    if (source / name).is_file() and not (target / name).is_file():
        target.mkdir(parents=True, exist_ok=True)
        with atomic_write(target / name) as temporary:
            shutil.copyfile(source / name, temporary)


def _take_stage(source: Path, target: Path) -> None:
    """Copy a finished stage to where it is not finished yet; its weights last, for they say that it is finished."""
    if not (source / "weights.safetensors").is_file() or (target / "weights.safetensors").is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir(), key=lambda path: path.name == "weights.safetensors"):
        if file.name != "state.pt":  # for resuming, and the largest
            with atomic_write(target / file.name) as temporary:
                shutil.copyfile(file, temporary)


def held_out_of(suite: Suite, arm: Arm, trained: Path, seed: int, data: Path | None) -> HeldOut:
    """Loss on held-out clips under the arm's own last conditions; kept beside the training."""
    path = trained / "held_out.json"
    if not path.is_file():
        recipe = arm_recipe(suite, arm, seed)
        networks = build(read_config(trained), 0)
        begin(networks, load_tensors(trained / "weights.safetensors"), tuple(PREFIXES), "dynamicrafter")
        last = [stage for stage in recipe.stages if isinstance(stage, DiffusionStage)][-1]
        measured = held_out(networks, recipe, last, clips=suite.held_out_clips, data_root=data)
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(vars(measured), indent=1))
    return HeldOut(**json.loads(path.read_text()))
