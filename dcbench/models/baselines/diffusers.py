"""Pipelines of the library diffusers: one wrapper; what differs between them stands in their cards.

A pipeline works at its own size, length and frame rate. `options.resize` names how the input image comes to that size
and the clip back from it, `options.temporal` which of the frames are kept; both are part of the run's plan.
"""

import contextlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dcbench import trust
from dcbench.catalogue import ModelCard, Scalar, WeightSource
from dcbench.clips import TemporalPolicy, choose_in_time, resize, to_uint8
from dcbench.errors import UserError, first_line, near_match
from dcbench.facts import Facts, validate
from dcbench.models.base import CutPrompts, Request, Runtime, Wanted, checks_with
from dcbench.seeding import generator
from dcbench.weights import MissingWeights, check_free, describe, weights_dir

Policy = Literal["squash", "pad", "crop", "same_area"]
MINIMUM = (0, 42)  # the first that was tried; older ones overlook `dtype` and load everything in float32
# From the clone: the package dcbench of PyPI is another project, this one is dcbench-i2v.
INSTALL = "in the clone of dcbench, pip install --upgrade '.[baselines]'"
ARGUMENT = {"steps": "num_inference_steps"}  # names in [sampling] that differ from the pipelines' own
GIVEN = ("image", "height", "width", "num_frames", "generator", "output_type", "prompt", "return_dict")  # by dcbench


class PipelineOptions(Facts):
    """[options] of a card of this family."""

    pipeline: str  # the class in diffusers
    path: str = ""  # a local folder in place of the repository
    variant: str = ""  # which weight files of the repository: "fp16" reads *.fp16.safetensors
    components: dict[str, str] = {}  # parts from repositories of their own: name = class
    scheduler: dict[str, Scalar] = {}  # "class" and settings that replace the repository's
    image_argument: str = "image"
    fps_argument: str = ""
    resize: Policy
    multiple_of: int = 8  # of both sides, for "same_area"
    temporal: TemporalPolicy
    dtype: Literal["float16", "bfloat16", "float32"] = "float32"  # on a GPU; a CPU computes float16 as float32
    frames_step: int = Field(default=1, ge=1)  # it makes k x frames_step + 1 frames; 1 = any number
    keep_float32: tuple[str, ...] = ()
    offload: Literal["none", "model", "sequential"] = "none"
    vae_tiling: bool = False
    memory_gb: float = 0  # the weights alone in `dtype`; 0 = unknown


# --------------------------------------------------------------------------------------------------------------- pixels


def working_size(policy: Policy, image: tuple[int, int], native: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The (height, width) that a pipeline works at: its native one, or one of equal area and the image's shape."""
    if policy != "same_area":
        return native
    ratio = (native[0] * native[1] / (image[0] * image[1])) ** 0.5
    height, width = (max(multiple, round(side * ratio / multiple) * multiple) for side in image)
    return height, width


def _window(image: tuple[int, int], working: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest part of `working` that has the image's shape: (height, width, top, left)."""
    scale = min(working[0] / image[0], working[1] / image[1])
    height, width = (max(1, min(round(image[k] * scale), working[k])) for k in (0, 1))
    return height, width, (working[0] - height) // 2, (working[1] - width) // 2


def to_working(image: Tensor, height: int, width: int, policy: Policy) -> Tensor:
    """uint8 [3 h w] -> uint8 [3 height width]"""
    if policy == "crop":
        return resize(image[None], height, width, "crop")[0]
    if policy != "pad":
        return resize(image[None], height, width, "squash")[0]
    h, w, top, left = _window((image.shape[1], image.shape[2]), (height, width))
    inner = resize(image[None], h, w, "squash").float()
    borders = (left, width - w - left, top, height - h - top)
    return F.pad(inner, borders, mode="replicate")[0].to(torch.uint8)


def from_working(clip: Tensor, height: int, width: int, policy: Policy) -> Tensor:
    """uint8 [t 3 h w] -> uint8 [t 3 height width]: the way back of `to_working`; "crop" keeps what it shows."""
    if policy == "crop":
        return resize(clip, height, width, "crop")
    if policy == "pad":
        h, w, top, left = _window((height, width), (clip.shape[2], clip.shape[3]))
        clip = clip[:, :, top : top + h, left : left + w]
    return resize(clip, height, width, "squash")


def frames_to_uint8(frames: Any, what: str) -> Tensor:
    """One clip of a pipeline with output_type "np" or "pt" -> uint8 [t 3 h w]; NaN is an error, not black."""
    clip = torch.as_tensor(frames).float()
    if clip.ndim == 4 and clip.shape[-1] == 3:
        clip = clip.permute(0, 3, 1, 2)
    if clip.ndim != 4 or clip.shape[1] != 3:
        raise UserError(f"{what} returned {list(clip.shape)}; expected [t, h, w, 3] or [t, 3, h, w]")
    if not bool(torch.isfinite(clip).all()):
        raise UserError(
            f"{what} returned NaN or infinity; half precision overflows in some pipelines: "
            "--set options.dtype=bfloat16 or float32"
        )
    return to_uint8(clip, low=0).contiguous()


# ---------------------------------------------------------------------------------------------------------------- model


class Diffusers:
    """One pipeline behind the one interface. `facts` goes into each sample's line of the run."""

    def __init__(self, card: ModelCard, options: PipelineOptions, pipeline: Any, device: str, facts: dict[str, str]):
        self.card, self.options, self.pipeline, self.device, self.facts = card, options, pipeline, device, facts
        self.conditions_on: frozenset[str] = frozenset(card.conditions_on)
        self.arguments = sampling_arguments(card, options, type(pipeline))
        self._cut = CutPrompts()
        self.clip_facts = self._cut.clip_facts

    def generate(self, requests: Sequence[Request]) -> list[Tensor]:
        return [self._make(request) for request in requests]

    def _make(self, request: Request) -> Tensor:
        shape = self.card.clip
        assert shape.frames and shape.height and shape.width  # `load` has seen to it
        fps = _rate(self.card, request.fps)
        _frames(self.card, self.options, shape.frames, request.num_frames, request.fps)  # before the expensive part
        size = (request.image.shape[1], request.image.shape[2])
        height, width = working_size(self.options.resize, size, (shape.height, shape.width), self.options.multiple_of)
        image = to_working(request.image, height, width, self.options.resize)
        arguments = self.arguments | {
            self.options.image_argument: _pil(image),
            "height": height,
            "width": width,
            "num_frames": shape.frames,
            "generator": generator(request.seed),
            "output_type": "np",
        }
        if "prompt" in self.conditions_on:
            arguments["prompt"] = request.prompt
            if window := self._window():
                tokens = len(self.pipeline.tokenizer(request.prompt, truncation=False, verbose=False).input_ids)
                self._cut.note(self.card.name, request.clip_id, tokens, window, "its text encoder")
        if self.options.fps_argument:
            arguments[self.options.fps_argument] = fps
        what = f"{self.options.pipeline} on clip {request.clip_id}"
        with _own_randomness(request.seed, self.device):
            try:
                made = self.pipeline(**arguments).frames[0]
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{what}: out of memory. Keep less on the GPU: --set options.offload=model (or sequential), "
                    "--set options.vae_tiling=true, or make fewer frames: --set clip.frames=N"
                ) from error
            except ValueError as error:
                raise UserError(f"{what}: {first_line(error)}") from error
        clip = frames_to_uint8(made, what)
        kept = _frames(self.card, self.options, len(clip), request.num_frames, request.fps)
        return from_working(clip[kept], *size, self.options.resize)

    def _window(self) -> int | None:
        """Tokens of a prompt that the pipeline's first text encoder reads; None without a limit."""
        tokenizer = getattr(self.pipeline, "tokenizer", None)
        taken = inspect.signature(type(self.pipeline).__call__).parameters
        if tokenizer is None:
            return None
        if "max_sequence_length" in taken:
            return self.arguments.get("max_sequence_length", taken["max_sequence_length"].default)
        return tokenizer.model_max_length


def _rate(card: ModelCard, asked: float) -> float:
    """Frames per second of what the model makes for a request at `asked`."""
    return max(1, round(asked)) if "fps" in card.conditions_on else card.clip.fps or asked


def _frames(card: ModelCard, options: PipelineOptions, have: int, want: int, fps: float) -> list[int]:
    """Which of `have` frames of the model make a clip of `want` frames at `fps`. UserError if they are too few."""
    try:
        return choose_in_time(options.temporal, have, _rate(card, fps), want, fps)
    except UserError as error:
        raise UserError(
            f"{card.name}: {error}. Ask the model for more (--set clip.frames=N; now "
            f"{card.clip.frames}), or take the other policy (--set options.temporal=first)"
        ) from error


def sampling_arguments(card: ModelCard, options: PipelineOptions, pipeline: type) -> dict[str, Any]:
    """[sampling] under the pipeline's own names. UserError for a name that its call does not take."""
    parameters = inspect.signature(pipeline.__call__).parameters.values()  # type: ignore[operator]
    taken = {p.name for p in parameters if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    own = {*GIVEN, options.image_argument, options.fps_argument, *ARGUMENT.values()}
    allowed = [*ARGUMENT, *sorted(taken - own)]
    for name in card.sampling:
        if ARGUMENT.get(name, name) not in taken or name in own:
            raise UserError(
                f"{card.name}: {options.pipeline} takes no {name!r}.{near_match(name, allowed)} "
                f"Allowed in [sampling]: {', '.join(allowed)}"
            )
    for name in filter(None, (options.image_argument, options.fps_argument)):
        if name not in taken:
            raise UserError(f"{card.name}: {options.pipeline} takes no {name!r}.{near_match(name, taken)}")
    return {ARGUMENT.get(name, name): value for name, value in card.sampling.items()}


def check_wanted(card: ModelCard, wanted: Sequence[Wanted]) -> None:
    """Raise UserError if the card's number of frames is none that the pipeline makes, or too small for a clip."""
    options: PipelineOptions = validate(card.options, PipelineOptions, f"{card.name}, options")
    frames, step = card.clip.frames, options.frames_step
    if frames is None:
        return  # `load` says that the card must name it
    if (frames - 1) % step:
        below = (frames - 1) // step * step + 1
        raise UserError(
            f"{card.name}: clip.frames = {frames}, but its pipeline makes {step}k + 1 frames: "
            f"--set clip.frames={below}, or {below + step}"
        )
    for one in wanted:
        if isinstance(one.motion, int):
            raise UserError(f"--motion: {card.name} has no such condition")
        _frames(card, options, frames, one.num_frames or frames, one.fps)


def _pil(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


@contextlib.contextmanager
def _own_randomness(seed: int, device: str) -> Iterator[None]:
    """Seed the global generators for one clip and put them back: some pipelines draw from them (the encoder of
    I2VGen-XL, SparseCtrl's condition) beside the generator that they are given."""
    devices = [torch.device(device)] if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        torch.manual_seed(seed)
        yield


# -------------------------------------------------------------------------------------------------------------- loading


@checks_with(check_wanted)
def load(card: ModelCard, runtime: Runtime) -> Diffusers:
    """Entry point of every card of this family."""
    options: PipelineOptions = validate(card.options, PipelineOptions, f"{card.name}, options")
    if not (card.clip.frames and card.clip.height and card.clip.width):
        raise UserError(f"{card.name}: its card must name [clip] frames, height and width")
    if not (options.path or card.weights):
        raise UserError(f"{card.name}: its card names no [[weights]] repository; give a local folder: options.path")
    if options.temporal == "nearest_time" and not card.clip.fps:
        raise UserError(f"{card.name}: the temporal policy 'nearest_time' needs [clip] fps")
    for name in ("diffusers", "transformers", "accelerate"):
        if not _installed(name):
            raise UserError(f"{card.name} needs the package {name}, which is not installed: {INSTALL}")
    dtype = runtime.dtype or options.dtype
    if runtime.device == "cpu" and dtype == "float16":
        dtype = "float32"
    if not options.path:  # the card's figure is the repository's; a local folder may hold a smaller one
        check_memory(card.name, options, dtype, runtime.device)
    diffusers = _library()
    if tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < MINIMUM:
        wanted = ".".join(str(part) for part in MINIMUM)
        raise UserError(f"{card.name} needs diffusers {wanted} or later, here is {diffusers.__version__}: {INSTALL}")
    kind = getattr(diffusers, options.pipeline, None)
    if kind is None:
        raise UserError(
            f"{card.name}: diffusers {diffusers.__version__} has no {options.pipeline}."
            f"{near_match(options.pipeline, dir(diffusers))} Another version may: {INSTALL}"
        )
    sampling_arguments(card, options, kind)  # before the weights
    if "class" in options.scheduler:
        _scheduler_kind(card.name, str(options.scheduler["class"]), options.scheduler)
    folder = (
        Path(options.path).expanduser() if options.path else fetch_repository(card.weights[0], card, runtime.offline)
    )
    listed = _listed(folder)
    check_tokenizers(card.name, folder)
    by_part: dict[str, Any] = {name: torch.float32 for name in options.keep_float32}
    if not sys.stderr.isatty():
        for library in (diffusers, importlib.import_module("transformers")):
            library.utils.logging.disable_progress_bar()
    with _quiet():
        parts: dict[str, Any] = {}
        for name, class_name in options.components.items():
            if options.path and name in listed:
                continue  # a folder that holds the whole pipeline brings its own
            source = folder / name
            if not (options.path and source.is_dir()):
                source = fetch_repository(_part_source(card, name), card, runtime.offline)
            part_kind = getattr(diffusers, class_name)
            parts[name] = _read(part_kind, source, dtype=by_part.get(name, getattr(torch, dtype)))
        variant = options.variant if options.variant and any(folder.rglob(f"*.{options.variant}.*")) else None
        dtypes = by_part | {"default": getattr(torch, dtype)}
        pipeline = _read(kind, folder, dtype=dtypes, variant=variant, **parts)
        if options.scheduler:
            pipeline.scheduler = _scheduler(card.name, pipeline.scheduler, options.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    _alias_text_model(pipeline)
    if options.vae_tiling:
        pipeline.vae.enable_tiling()
    _place(pipeline, options.offload, runtime.device)
    return Diffusers(card, options, pipeline, runtime.device, {"dtype": dtype, "weights": _identity(card, folder)})


def _library() -> Any:
    """diffusers, which fills in its names lazily, so that no type checker knows them."""
    return importlib.import_module("diffusers")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def check_tokenizers(name: str, folder: Path) -> None:
    """T5 tokenizers that are stored as a sentencepiece model alone (CogVideoX, LTX-Video) need two more packages."""
    alone = [path for path in folder.glob("tokenizer*/*.model") if not (path.parent / "tokenizer.json").is_file()]
    missing = [p for p, module in (("sentencepiece",) * 2, ("protobuf", "google.protobuf")) if not _installed(module)]
    if alone and missing:
        raise UserError(
            f"{name}: reading {alone[0].name} needs {' and '.join(missing)}: pip install {' '.join(missing)}"
        )


def check_memory(name: str, options: PipelineOptions, dtype: str, device: str) -> None:
    """Refuse, before anything is read, weights that cannot fit; what the computation needs comes on top."""
    if device.startswith("cuda"):
        if options.offload != "none":
            return
        have, where = torch.cuda.get_device_properties(device).total_memory / 1e9, "the GPU"
        hint = "--set options.offload=model, or sequential"
    else:
        have, where = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, "this machine"
        hint = "a machine with more memory, or a smaller model (`dcbench list models`)"
    needed = options.memory_gb * (2 if dtype == "float32" and options.dtype != "float32" else 1)
    if needed > have:
        raise UserError(
            f"{name}: its weights alone take about {needed:.0f} GB in {dtype}, and {where} has {have:.0f} GB. "
            f"Try {hint}"
        )


def fetch_repository(source: WeightSource, card: ModelCard, offline: bool, to: Path | None = None) -> Path:
    """The local folder of a pipeline's repository; downloaded first (only the files that are needed) where allowed."""
    from huggingface_hub import constants, snapshot_download

    cache = to or Path(constants.HF_HUB_CACHE)
    options: PipelineOptions = validate(card.options, PipelineOptions, f"{card.name}, options")
    whole = source is card.weights[0]

    def get(local_files_only: bool) -> Path:
        where = {"revision": first or source.revision or None, "cache_dir": cache, "local_files_only": local_files_only}
        if whole and not local_files_only:  # diffusers knows which of a repository's files its pipeline reads
            pipeline = _library().DiffusionPipeline
            return Path(pipeline.download(source.repository, variant=options.variant or None, **where))
        return Path(snapshot_download(source.repository, allow_patterns=["*.json", "*.safetensors"], **where))

    first = trust.known(weights_dir(), source.name).get("commit")  # "main" moves; a first use stays what it was
    cached = None
    with _quiet(), contextlib.suppress(Exception):  # the hub raises dozens of types for "not in the cache"
        cached = get(local_files_only=True)
    place = (
        f"Fetch them: dcbench weights fetch {card.name}, or run with --download. "
        "Or give a local copy: --set options.path=FOLDER"
    )
    if offline or constants.HF_HUB_OFFLINE:
        if cached is None:
            at = f" of commit {first}, which was used first," if first else ""
            raise MissingWeights(f"weights{at} are missing and this run is offline.\n  {describe(source)}\n  {place}")
        return _remembered(cached, source)
    if cached is None:
        check_free(source, cache)
    try:
        with _quiet():
            # it continues what was interrupted; the hub falls back to its cache
            return _remembered(get(local_files_only=False), source)
    except Exception as error:
        raise MissingWeights(
            f"could not download {source.repository}: {type(error).__name__}: {first_line(error)}\n"
            f"  {describe(source)}\n  {place}"
        ) from error


def _remembered(folder: Path, source: WeightSource) -> Path:
    """The folder of a repository in the hub's cache; its commit is written down at the first use."""
    known = trust.known(weights_dir(), source.name)
    if folder.parent.name == "snapshots" and "commit" not in known:
        trust.write(weights_dir(), source.name, {"commit": folder.name})
    return folder


def _part_source(card: ModelCard, part: str) -> WeightSource:
    for source in card.weights:
        if source.name.rpartition("/")[2] == part:
            return source
    raise UserError(f"{card.name}: no [[weights]] of its card is named '.../{part}' for the component {part!r}")


def _listed(folder: Path) -> set[str]:
    """The parts that a saved pipeline names in its model_index.json."""
    path = folder / "model_index.json"
    if not path.is_file():
        raise UserError(f"{folder} holds no saved pipeline (no model_index.json); options.path must name such a folder")
    try:
        return {name for name, value in json.loads(path.read_text()).items() if isinstance(value, list) and value[0]}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def _read(kind: Any, folder: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} cannot be read as {kind.__name__}: {first_line(error)}") from error


def _alias_text_model(pipeline: Any) -> None:
    """I2VGen-XL reads `text_encoder.text_model`, which transformers 5 merged into the encoder itself."""
    encoder = getattr(pipeline, "text_encoder", None)
    if type(encoder).__name__ == "CLIPTextModel" and not hasattr(encoder, "text_model"):
        encoder.__dict__["text_model"] = encoder  # not as a submodule: it would contain itself


def _scheduler(name: str, current: Any, settings: dict[str, Scalar]) -> Any:
    kind = _scheduler_kind(name, str(settings.get("class", type(current).__name__)), settings)
    return kind.from_config(current.config, **{key: value for key, value in settings.items() if key != "class"})


def _scheduler_kind(name: str, class_name: str, settings: dict[str, Scalar]) -> Any:
    """The class of a scheduler; UserError if there is none, or if it does not know one of the settings."""
    kind = getattr(_library(), class_name, None)
    if kind is None:
        raise UserError(f"{name}: diffusers has no scheduler {class_name}")
    unknown = set(settings) - {"class"} - set(inspect.signature(kind).parameters)
    if unknown:
        raise UserError(f"{name}: {class_name} knows no {', '.join(sorted(unknown))}")
    return kind


def _place(pipeline: Any, offload: str, device: str) -> None:
    if device == "cpu" or offload == "none":  # on a CPU there is nothing to offload from
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_sequential_cpu_offload(device=device)


def _identity(card: ModelCard, folder: Path) -> str:
    """Which weights these are: repository@commit, as the hub's cache names its folders, or the local folder's name."""
    in_cache = folder.parent.name == "snapshots" and card.weights
    return f"{card.weights[0].repository}@{folder.name}" if in_cache else folder.name


class _NoDeprecation(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "has been deprecated and will not receive bug fixes" not in record.getMessage()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the one notice that a deprecated pipeline (I2VGen-XL, PIA) gives of itself: its card says so already."""
    logger, notice = logging.getLogger("diffusers.pipelines.pipeline_utils"), _NoDeprecation()
    logger.addFilter(notice)
    try:
        yield
    finally:
        logger.removeFilter(notice)
