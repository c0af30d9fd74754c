"""`dcbench train`: learn the stages of a recipe one after the other, each resumable, into one directory.

A model card can name this directory (`options.folder`) when the training is finished. Its files: see `directory`.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dcbench import clips
from dcbench.errors import UserError
from dcbench.files import read_json, remove_leftovers, write_json
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.seeding import clip_seed
from dcbench.training.data import CachedPool
from dcbench.training.directory import Training
from dcbench.training.loop import Process, Task, agree, catch_signals, fit, plot_log, process_group
from dcbench.training.networks import PREFIXES, build, freeze, normalise_latents, save, set_scale_factor
from dcbench.training.objective import AutoencoderTask, ContrastiveTask, DiffusionTask, Pool
from dcbench.training.recipe import AutoencoderStage, ClipStage, DiffusionStage, Recipe, Stage, Start, runs_unet
from dcbench.training.start import begin, copy_text_keys
from dcbench.weights import load_tensors

Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, step, steps, the line of the log


def train(
    recipe: Recipe,
    out: Path,
    data_root: Path | None = None,
    stages: tuple[str, ...] | None = None,
    device: str = "auto",
    stop_after: float | None = None,
    progress: Progress | None = None,
    latents: Path | None = None,
) -> bool:
    """Train the recipe's stages (or those named, in the recipe's order) into `out`; True when they are finished.

    A finished stage is not trained again; an interrupted one continues. A stage stops after `stop_after` seconds, and
    the same call continues it. `latents`: the folder of cached latents, by default `out`; trainings on the same clips
    may share it.
    """
    for name in stages or ():
        recipe.stage(name)
    with process_group(device) as process, catch_signals() as caught:
        if process.first:
            for folder in {out, latents or out}:
                remove_leftovers(folder)
            for stage in recipe.stages:
                Training(out).stage(stage.name).mend()
        trainer = _Trainer(recipe, Training(out), process)
        pools = _Pools(recipe, trainer.networks, Training(latents or out), data_root, process)
        for stage in recipe.stages:
            if trainer.training.stage(stage.name).finished:
                trainer.load(stage)
            elif stages and stage.name not in stages:
                continue
            elif agree(bool(caught), process) or not trainer.learn(stage, pools, stop_after, progress, caught):
                return False
        trainer.export()
        return True


class _Trainer:
    """The networks of a recipe as trained so far, and the directory of their training."""

    def __init__(self, recipe: Recipe, training: Training, process: Process) -> None:
        self.recipe, self.training, self.process = recipe, training, process
        self.networks = build(recipe.config(), clip_seed(recipe.seed, "networks"))
        self._begin(recipe.start)
        self.networks.to(process.device)

    def learn(
        self,
        stage: Stage,
        pools: "_Pools",
        stop_after: float | None,
        progress: Progress | None,
        caught: list[int],
    ) -> bool:
        """Train one stage and save what it has learned; False when it was stopped before its last step."""
        recipe, networks, files = self.recipe, self.networks, self.training.stage(stage.name)
        self._check_earlier(stage)
        if self._first_to_see_images(stage):
            copy_text_keys(networks)
        self._begin(stage.start)
        task = make_task(stage, networks, pools.of(stage))
        # without defaults: a field that a later version adds does not change the identity of an unfinished stage
        settings = stage.model_dump(exclude_defaults=True)
        identity = {"stage": settings, "seed": recipe.seed, "config": asdict(networks.cfg)}

        def on_step(step: int, line: dict[str, float]) -> None:
            if progress:
                progress(stage.name, step, stage.steps, line)

        seed = clip_seed(recipe.seed, f"stage/{stage.name}")
        if not fit(task, stage, files, seed, self.process, stop_after, on_step, identity, caught):
            return False
        freeze(networks)
        if isinstance(stage, AutoencoderStage) and not stage.decoder_only:
            normalise_latents(networks, sample_latents(networks, pools.frames))
        if self.process.first:
            write_json(files.config, networks.cfg.to_dict())
            save(networks, files.weights, parts=stage.parts)  # last: the stage is finished when this file is there
            logs = {s.name: self.training.stage(s.name).log_lines() for s in recipe.stages}
            plot_log({name: lines for name, lines in logs.items() if lines}, self.training.loss_curves)
        if self.process.world > 1:  # the other processes must not look for these files before they are there
            dist.barrier()
        return True

    def load(self, stage: Stage) -> None:
        """Load what a finished stage has learned; UserError if it was trained for another model."""
        files = self.training.stage(stage.name)
        state = load_tensors(files.weights)
        prefixes = tuple(PREFIXES[part] for part in stage.parts)
        own = {name for name in self.networks.state_dict() if name.startswith(prefixes)}
        if differing := sorted(own ^ set(state)):
            raise UserError(
                f"{files.weights} is of another model than the recipe's: {len(differing)} tensors are in one of them "
                f"only, such as {differing[0]}; choose another --out, or remove {files.path} to train the stage anew"
            )
        begin(self.networks, state, stage.parts)
        if stage.objective == "autoencoder":
            set_scale_factor(self.networks, read_json(files.config)["autoencoder"]["scale_factor"])

    def export(self) -> None:
        """If all stages are finished, write the model's weights (float16, released names) and configuration."""
        stages, training = self.recipe.stages, self.training
        if self.process.first and all(training.stage(stage.name).finished for stage in stages):
            for stage in stages:  # again, because another process may have trained some of them meanwhile
                self.load(stage)
            write_json(training.config, self.networks.cfg.to_dict())
            save(self.networks, training.weights, torch.float16)  # last: a folder with weights is whole

    def _begin(self, starts: tuple[Start, ...]) -> None:
        for start in starts:
            if not start.path.is_file():
                raise UserError(f"{start.path} is not here, and this recipe begins with it. {start.how}")
            if self.process.first:
                self.training.remember_start(start.file, start.path)
            new = begin(self.networks, load_tensors(start.path), start.parts, start.layout, start.keep)
            if new and self.process.first:
                print(f"{start.file}: {len(new)} tensors begin as new:", *new, sep="\n  ")

    def _check_earlier(self, stage: Stage) -> None:
        """Raise UserError if the stage needs an earlier one that is not finished.

        A stage that runs the U-Net needs all earlier stages but those of the decoder alone. The autoencoder and CLIP
        need only the earlier stages of their own objective.
        """
        for earlier in self.recipe.before(stage):
            decoder_alone = isinstance(earlier, AutoencoderStage) and earlier.decoder_only
            needed = stage.objective == earlier.objective or (runs_unet(stage) and not decoder_alone)
            if needed and not self.training.stage(earlier.name).finished:
                where = self.training.path
                raise UserError(f"stage {stage.name} needs stage {earlier.name}, which is not finished in {where}")

    def _first_to_see_images(self, stage: Stage) -> bool:
        """True for the first stage with an image context, if the U-Net was trained with text only before."""
        earlier = [s for s in self.recipe.before(stage) if isinstance(s, DiffusionStage)]
        sees = isinstance(stage, DiffusionStage) and stage.context != "none"
        return sees and bool(earlier) and all(s.context == "none" for s in earlier)


def make_task(stage: Stage, networks: Networks, pool: Pool) -> Task:
    """The task of a stage on the clips of `pool`. Only the parameters that the stage trains require gradients."""
    freeze(networks)
    if isinstance(stage, AutoencoderStage):
        predict = DiffusionTask(networks, pool, stage, ()).predicted_latents if stage.predicted_latents else None
        return AutoencoderTask(networks, pool, stage, predict)
    if isinstance(stage, ClipStage):
        return ContrastiveTask(networks, pool, stage.last_frames)
    return DiffusionTask(
        networks, pool, stage, stage.train, stage.single_frames, stage.fixed_image_scale, stage.min_snr
    )


class _Pools:
    """The clips of a recipe. With `data.cache` they are read once, and latents are kept in `folder`."""

    def __init__(
        self, recipe: Recipe, networks: Networks, folder: Training, data_root: Path | None, process: Process
    ) -> None:
        self.networks, self.folder, self.process = networks, folder, process
        self.pool, self.cache = recipe.data.pool(networks.cfg, data_root), recipe.data.cache

    @cached_property
    def frames(self) -> Pool:
        """The clips without latents."""
        return CachedPool(self.pool) if self.cache else self.pool

    def of(self, stage: Stage) -> Pool:
        """The clips for a stage, with latents of the autoencoder as trained so far if it runs the U-Net."""
        if not (isinstance(self.frames, CachedPool) and runs_unet(stage)):
            return self.frames
        if not self.process.first:  # the first process writes the latents, then the others read them
            dist.barrier()
        pool = self.frames.with_latents(self.folder.latents(self.networks.autoencoder), self._encode)
        if self.process.first and self.process.world > 1:
            dist.barrier()
        return pool

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        return self.networks.autoencoder.encode(clips.to_float(frames).to(self.process.device)).mean.cpu()


@torch.no_grad()
def sample_latents(networks: Networks, pool: Pool) -> Tensor:
    """Samples of the posterior for 1024 frames, one from each of 1024 clips: [1024, c, h/f, w/f]."""
    rng = torch.Generator().manual_seed(0)
    device = next(networks.autoencoder.parameters()).device
    latents = []
    for _ in range(16):
        frames = pool.random_batch(64, rng).frames
        pick = torch.randint(frames.shape[1], (64,), generator=rng)
        posterior = networks.autoencoder.encode(clips.to_float(frames[torch.arange(64), pick]).to(device))
        latents.append(posterior.sample(torch.randn(posterior.mean.shape, generator=rng).to(device)))
    return torch.cat(latents)
