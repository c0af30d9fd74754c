"""Arms of an ablation by training: the stages that all arms share are trained once, then each arm's own stages.

<out>/shared/                  the training of the shared stages, and cached latents of all arms
<out>/stages/<stage>-<hash>/   finished stages, for other arms that begin with the same stages
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dcbench.errors import UserError
from dcbench.files import digest, sha256_file, write_text
from dcbench.models.dynamicrafter.load import read_config
from dcbench.training.directory import StageFolder, Training
from dcbench.training.held_out import HeldOut, held_out, read_held_out
from dcbench.training.networks import build
from dcbench.training.recipe import DiffusionStage, Recipe
from dcbench.training.run import train
from dcbench.training.start import begin
from dcbench.weights import load_tensors


def arm_recipe(
    whole: Recipe, stages: Mapping[str, Mapping[str, Any]], without: Collection[str] = (), seed: int = 0
) -> Recipe:
    """The recipe of an arm: `whole` with changed fields of its `stages`, `without` some, and `seed` added to its own.

    Raises UserError for an unknown stage or field, and when no diffusion stage is left.
    """
    recipe = whole.varied(stages, without, seed=whole.seed + seed)
    if not any(isinstance(stage, DiffusionStage) for stage in recipe.stages):
        raise UserError(f"{whole.name}: no diffusion stage is left, so no loss can be compared")
    return recipe


def train_arm(
    whole: Recipe, recipe: Recipe, out: Path, target: Path, shared: str = "", data: Path | None = None
) -> Training:
    """Train an arm into `target`. A stage that it has in common with another arm in `out` is copied from there.

    The stages of `whole` up to `shared` ("" = none) are trained once for all arms and seeds. The arm's own stages are
    the others of `recipe`; two arms have one in common if it and all stages before it have the same settings and seed.
    """
    common, training = Training(out / "shared"), Training(target)
    first = tuple(stage.name for stage in (*whole.before(whole.stage(shared)), whole.stage(shared))) if shared else ()
    if first:
        train(whole, common.path, data, first, device="cpu")
    for name in first:
        training.stage(name).take(common.stage(name))
    begun = {start.file: sha256_file(start.path) for start in recipe.start if start.path.is_file()}
    for stage in recipe.stages:
        if stage.name not in first:
            so_far = recipe.model_copy(update={"stages": (*recipe.before(stage), stage), "summary": ""})
            key = digest([so_far.model_dump(mode="json"), begun])
            kept, files = StageFolder(out / "stages" / f"{stage.name}-{key}"), training.stage(stage.name)
            files.take(kept)
            if not files.finished:
                train(recipe, target, data, (stage.name,), device="cpu", latents=common.path)
            kept.take(files)
    train(recipe, target, data, device="cpu", latents=common.path)  # writes the files of the whole model
    return training


def held_out_of(recipe: Recipe, training: Training, clips: int, data: Path | None = None) -> HeldOut:
    """Loss on held-out clips under the conditions of the last diffusion stage. Measured once, then read from disk."""
    found = read_held_out(training)
    if found is None:
        networks = build(read_config(training.path), 0)
        begin(networks, load_tensors(training.weights))
        last = [stage for stage in recipe.stages if isinstance(stage, DiffusionStage)][-1]
        found = held_out(networks, recipe, last, clips=clips, data_root=data)
        # not write_json: the error of a single clip is NaN
        write_text(training.held_out, json.dumps(vars(found), indent=1) + "\n")
    return found
