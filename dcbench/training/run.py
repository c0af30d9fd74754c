"""`dcbench train`: the stages of a recipe one after the other, each resumable, into one directory.

<out>/<stage>/{state.pt, log.jsonl, weights.safetensors}  <out>/loss.png  <out>/start.json
<out>/weights.safetensors  <out>/config.json      what a model card's `variant` and `weights` can name
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dcbench import clips
from dcbench.catalogue import find_dataset, load_entry_point
from dcbench.datasets.base import find_root
from dcbench.errors import UserError
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.record import write_text
from dcbench.seeding import clip_seed
from dcbench.training.data import CachedPool, ClipPool
from dcbench.training.loop import Process, Task, fit, plot_log, process_group
from dcbench.training.networks import PREFIXES, build, freeze, normalise_latents, save, set_scale_factor
from dcbench.training.objective import AutoencoderTask, ContrastiveTask, DiffusionTask, Pool
from dcbench.training.recipe import (
    AutoencoderStage,
    ClipStage,
    DiffusionStage,
    Recipe,
    Stage,
    Start,
    runs_unet,
    trains_decoder_alone,
)
from dcbench.training.start import begin, copy_text_keys
from dcbench.weights import atomic_write, load_tensors, sha256_file

LEARNED = {"autoencoder": ("autoencoder",), "clip": ("text", "image"), "diffusion": ("unet", "query_transformer")}
Progress = Callable[[str, int, int, dict[str, float]], None]  # stage, step, steps, the log's line


def run(
    recipe: Recipe,
    out: Path,
    data_root: Path | None = None,
    stages: tuple[str, ...] | None = None,
    device: str = "auto",
    stop_after: float | None = None,
    progress: Progress | None = None,
) -> bool:
    """Train the recipe's stages (or those named, in the recipe's order) into `out`; True when they are finished.

    A stage that is finished is not done again; one that was interrupted continues. Stops, resumable, after
    `stop_after` seconds.
    """
    for name in stages or ():
        recipe.stage(name)
    with process_group(device) as process:
        networks = build(recipe.config(), clip_seed(recipe.seed, "networks"))
        _begin(networks, recipe.start, out, process)
        networks.to(process.device)
        pools = _Pools(recipe, networks, out, data_root, process)
        for stage in recipe.stages:
            done = _weights(out, stage)
            if done.is_file():
                _load_stage(networks, done, stage)
                continue
            if stages and stage.name not in stages:
                continue
            _check_earlier(recipe, stage, out)
            if _first_to_see_images(recipe, stage):
                copy_text_keys(networks)
            _begin(networks, stage.start, out, process)
            task = make_task(stage, networks, pools.get(stage))
            settings = stage.model_dump(exclude_defaults=True)  # a field that a later version gains is no other setting
            identity = {"stage": settings, "seed": recipe.seed, "config": asdict(networks.cfg)}

            def report(step: int, line: dict[str, float], stage: Stage = stage) -> None:
                if progress:
                    progress(stage.name, step, stage.steps, line)

            seed = clip_seed(recipe.seed, f"stage/{stage.name}")
            if not fit(task, stage.loop(), done.parent, seed, process, stop_after, report, identity):
                return False
            freeze(networks)
            if stage.objective == "autoencoder" and not trains_decoder_alone(stage):
                normalise_latents(networks, sample_latents(networks, pools.plain()))
            if process.first:
                _save_stage(networks, done, stage)
                logs = {
                    s.name: out / s.name / "log.jsonl" for s in recipe.stages if (out / s.name / "log.jsonl").is_file()
                }
                plot_log(logs, out / "loss.png")
            if process.world > 1:  # nobody asks for the stage's files before they are there
                dist.barrier()
        if process.first and all(_weights(out, stage).is_file() for stage in recipe.stages):
            for stage in recipe.stages:  # some of them another process may have trained meanwhile
                _load_stage(networks, _weights(out, stage), stage)
            export(networks, out)
        return True


def _weights(out: Path, stage: Stage) -> Path:
    """What a stage has learned; the file is there when the stage is finished."""
    return out / stage.name / "weights.safetensors"


def _begin(networks: Networks, starts: tuple[Start, ...], out: Path, process: Process) -> None:
    for start in starts:
        state = _read(start)
        if process.first:
            _remember(start, out)
        new = begin(networks, state, start.parts, start.layout, start.keep)
        if new and process.first:
            print(f"{start.file}: {len(new)} tensors begin as new:", *new, sep="\n  ")


def _remember(start: Start, out: Path) -> None:
    """Note the file's sha256 in <out>/start.json; an error if this training began with another one of that name."""
    path, sha256 = out / "start.json", sha256_file(start.path)
    known = json.loads(path.read_text()) if path.is_file() else {}
    if known.setdefault(start.file, sha256) != sha256:
        raise UserError(f"{out} was begun with another {start.file}; choose another --out, or bring that file back")
    write_text(path, json.dumps(known, indent=1) + "\n")


def _read(start: Start) -> dict[str, Tensor]:
    if not start.path.is_file():
        raise UserError(f"{start.path} is not here, and this recipe begins with it. {start.how}")
    return load_tensors(start.path)


def _check_earlier(recipe: Recipe, stage: Stage, out: Path) -> None:
    """Where the U-Net runs, all but the decoder's own stages are needed; else the autoencoder and CLIP learn alone."""
    for earlier in recipe.stages[: recipe.stages.index(stage)]:
        needed = stage.objective == earlier.objective or (runs_unet(stage) and not trains_decoder_alone(earlier))
        if needed and not _weights(out, earlier).is_file():
            raise UserError(f"stage {stage.name} needs stage {earlier.name}, which is not finished in {out}")


def _first_to_see_images(recipe: Recipe, stage: Stage) -> bool:
    """True for the first stage with an image context after stages that saw text alone."""
    earlier = [s for s in recipe.stages[: recipe.stages.index(stage)] if isinstance(s, DiffusionStage)]
    seen = isinstance(stage, DiffusionStage) and stage.context != "none"
    return seen and bool(earlier) and all(s.context == "none" for s in earlier)


def make_task(stage: Stage, networks: Networks, pool: Pool) -> Task:
    """The stage's objective over `pool`, with exactly its parameters trainable."""
    freeze(networks)
    if isinstance(stage, AutoencoderStage):
        predict = None
        if stage.predicted_latents:
            unet = DiffusionTask(networks, pool, stage.conditions(), roles=())
            predict = unet.predicted_latents
        return AutoencoderTask(networks, pool, stage.rebuilding(), predict)
    if isinstance(stage, ClipStage):
        return ContrastiveTask(networks, pool, stage.last_frames)
    return DiffusionTask(
        networks, pool, stage.conditions(), stage.train, stage.single_frames, stage.fixed_image_scale, stage.min_snr
    )


class _Pools:
    """The recipe's clips, read once; latents are cached when the first diffusion stage needs them."""

    def __init__(self, recipe: Recipe, networks: Networks, out: Path, root: Path | None, process: Process) -> None:
        self.recipe, self.networks, self.out, self.process = recipe, networks, out, process
        card = find_dataset(recipe.data.dataset)
        dataset = load_entry_point(card)(card, find_root(card, root), {**card.options, **recipe.data.options})
        items = dataset.items(recipe.data.split)
        if not items:
            raise UserError(f"{card.name}: the split {recipe.data.split!r} is empty")
        config = networks.cfg
        self.pool = ClipPool(
            items,
            config.num_frames,
            recipe.data.strides,
            config.height,
            config.width,
            recipe.data.clips,
            recipe.data.seed,
        )
        self.cached: dict[bool, CachedPool] = {}

    def plain(self) -> Pool:
        return self._cached(latents=False) if self.recipe.data.cache else self.pool

    def get(self, stage: Stage) -> Pool:
        if not self.recipe.data.cache:
            return self.pool
        return self._cached(latents=runs_unet(stage))

    def _cached(self, latents: bool) -> CachedPool:
        if latents not in self.cached:
            encode = self._encode if latents else None
            if not self.process.first:  # the first process writes the latents, the others read them
                dist.barrier()
            self.cached[latents] = CachedPool(self.pool, self.out / "latents.safetensors", encode)
            if self.process.first and self.process.world > 1:
                dist.barrier()
        return self.cached[latents]

    @torch.no_grad()
    def _encode(self, frames: Tensor) -> Tensor:
        return self.networks.autoencoder.encode(clips.to_float(frames).to(self.process.device)).mean.cpu()


@torch.no_grad()
def sample_latents(networks: Networks, pool: Pool) -> Tensor:
    """Samples of the posterior of 1024 frames, one of each of as many clips: [1024, c, h / f, w / f]."""
    rng = torch.Generator().manual_seed(0)
    device = next(networks.autoencoder.parameters()).device
    latents = []
    for _ in range(16):
        frames = pool.random_batch(64, rng).frames
        pick = torch.randint(frames.shape[1], (64,), generator=rng)
        posterior = networks.autoencoder.encode(clips.to_float(frames[torch.arange(64), pick]).to(device))
        latents.append(posterior.sample(torch.randn(posterior.mean.shape, generator=rng).to(device)))
    return torch.cat(latents)


def _save_stage(networks: Networks, path: Path, stage: Stage) -> None:
    """The parts that this stage's objective can change: independent stages may run side by side into one directory."""
    save(networks, path, parts=LEARNED[stage.objective])
    with atomic_write(path.with_name("config.json")) as temporary:
        temporary.write_text(json.dumps(networks.cfg.to_dict(), indent=1))


def _load_stage(networks: Networks, path: Path, stage: Stage) -> None:
    parts = LEARNED[stage.objective]
    state = load_tensors(path)
    own = {name for name in networks.state_dict() if name.startswith(tuple(PREFIXES[part] for part in parts))}
    if differing := sorted(own ^ set(state)):
        raise UserError(
            f"{path} is of another model than the recipe's: {len(differing)} tensors are in one of them only, such as "
            f"{differing[0]}; choose another --out, or remove {path.parent} to train the stage anew"
        )
    begin(networks, state, parts, "dynamicrafter")
    if stage.objective == "autoencoder":
        config = json.loads(path.with_name("config.json").read_text())
        set_scale_factor(networks, config["autoencoder"]["scale_factor"])


def export(networks: Networks, out: Path) -> None:
    """The finished model: weights in half precision under the released names, and its configuration."""
    save(networks, out / "weights.safetensors", torch.float16)
    with atomic_write(out / "config.json") as temporary:
        temporary.write_text(json.dumps(networks.cfg.to_dict(), indent=1))
