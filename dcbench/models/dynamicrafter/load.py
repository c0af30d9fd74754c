"""`load`: from a model card to a DynamiCrafter; the entry point of its cards."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcbench import weights
from dcbench.catalogue import ModelCard
from dcbench.errors import UserError
from dcbench.models import diffusion
from dcbench.models.base import Runtime, Wanted, checks_with, clip_a_core
from dcbench.models.dynamicrafter.checkpoint import load_networks
from dcbench.models.dynamicrafter.config import Config, variant
from dcbench.models.dynamicrafter.image_scale import check_factors
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.models.dynamicrafter.pipeline import (
    DynamiCrafter,
    ModelOptions,
    Sampling,
    check_frames,
    check_motion,
    motion_of,
    settings,
)

# options that say which networks, not how they are run
PLACES = ("variant", "folder", "rest", "random_seed", "checkpoint")
PACKAGE = Path(__file__).parent
SMALL = 96  # model channels of the U-Net; the released ones have 320


def check_wanted(card: ModelCard, wanted: Sequence[Wanted]) -> None:
    """Raise UserError for more frames than the model has, or a motion that it was not trained with."""
    chosen, cfg = _options(card)
    for one in wanted:
        check_frames(cfg, card.name, one.clip_id, one.num_frames or cfg.num_frames)
        if one.motion is None or chosen.any_motion:
            continue
        if one.motion == "clip":
            check_motion(cfg, card.name, motion_of(cfg, one.fps, one.frame_stride), f"clip {one.clip_id}")
        else:
            check_motion(cfg, card.name, one.motion, "--motion")


def _options(card: ModelCard) -> tuple[ModelOptions, Config]:
    options = {key: value for key, value in card.options.items() if key not in PLACES}
    chosen: ModelOptions = settings(ModelOptions, options, "options")
    name, folder = card.options.get("variant"), card.options.get("folder")
    if (name is None) == (folder is None):
        raise UserError(f"{card.name}: give options.variant (with weights) or options.folder, one of the two")
    if "rest" in card.options and folder is None:
        raise UserError(f"{card.name}: options.rest completes the weights of options.folder; give a folder, or no rest")
    return chosen, read_config(folder) if folder is not None else variant(str(name))


def is_small(card: ModelCard) -> bool:
    """Whether the network is of the tiny kind."""
    return _options(card)[1].unet.model_channels <= SMALL


@checks_with(check_wanted)
@clip_a_core(is_small)
def load(card: ModelCard, runtime: Runtime) -> DynamiCrafter:
    """The model of a card. Everything cheap is checked before the weights are fetched and read.

    The card's options are those of `ModelOptions`, and one of these two:
    `variant`: a preset's name, with the card's [[weights]], or with `random_seed` for random weights, which make noise;
    with a variant also `checkpoint`: the path of a file in place of the card's weights;
    `folder`: of config.json and weights.safetensors, as `dcbench train` writes them; below this package, or any path;
    with a folder also `rest`: another such folder, whose weights give the tensors that those of `folder` do not have.
    """
    chosen, cfg = _options(card)
    sampling: Sampling = settings(Sampling, card.sampling, "sampling")
    folder, seed = card.options.get("folder"), card.options.get("random_seed")
    check_factors(chosen.image_scale_factors, cfg.unet.cross_attentions)
    schedule = diffusion.make_schedule(**dataclasses.asdict(cfg.diffusion))
    diffusion.ddim_steps(schedule, sampling.steps, sampling.spacing, sampling.eta)
    if seed is not None:
        networks = Networks.random(cfg, seed)
    else:
        rest = _folder_weights(card.options["rest"]) if "rest" in card.options else None
        networks, schedule = load_networks(_weights(card, folder, runtime.offline), cfg, chosen.ema, rest)
    return DynamiCrafter(card, networks, schedule, sampling, chosen, runtime)


def read_config(folder: Any) -> Config:
    """The configuration in a folder's config.json."""
    path = _folder(folder) / "config.json"
    try:
        return Config.from_dict(json.loads(path.read_text()))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}. `dcbench train` writes such a folder.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _folder(folder: Any) -> Path:
    inside = PACKAGE / str(folder)
    return inside if inside.is_dir() else Path(str(folder)).expanduser()


def _folder_weights(folder: Any) -> Path:
    return _folder(folder) / "weights.safetensors"


def _weights(card: ModelCard, folder: Any, offline: bool) -> Path:
    if folder is not None:
        return _folder_weights(folder)
    if checkpoint := card.options.get("checkpoint"):
        return Path(str(checkpoint)).expanduser()
    if not card.weights:
        raise UserError(f"{card.name}: its card names no [[weights]]; options.random_seed tries it with random ones")
    return weights.fetch(card.weights[0], offline)
