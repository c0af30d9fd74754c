"""Compare this implementation with recordings of the released one: `python tools/parity.py DIR`.

DIR holds the recorded configuration, weights, inputs and outputs (safetensors and JSON). Every recorded tensor is
compared: max |ours - theirs| must be at most 1e-5 max(1, max|theirs|) for single modules, and 5e-5 max|theirs| for
whole sampling runs. Prints a table; exit code 1 if a bound is exceeded, 2 if something could not be compared.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dcbench.catalogue import ModelCard
from dcbench.errors import UserError
from dcbench.models import diffusion
from dcbench.models.diffusion import Guidance
from dcbench.models.dynamicrafter import conditioning
from dcbench.models.dynamicrafter.attention import TemporalAttention, TemporalTransformer
from dcbench.models.dynamicrafter.checkpoint import released_buffers
from dcbench.models.dynamicrafter.config import ClipConfig, Config, DiffusionConfig
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.models.dynamicrafter.pipeline import Draws, DynamiCrafter, Sampling
from dcbench.models.dynamicrafter.unet import TemporalConvs, UNet

MODULE, RUN = 1e-5, 5e-5  # the bounds


@dataclass(frozen=True)
class Row:
    """One comparison; `error` and `bound` are absolute."""

    group: str
    name: str
    error: float
    bound: float
    largest: float  # max |theirs|

    @property
    def ok(self) -> bool:
        return self.error <= self.bound  # false for NaN


def row(group: str, name: str, ours: Tensor, theirs: Tensor, run: bool = False) -> Row:
    """Compare two tensors of one size. Equal infinities count as equal. ValueError for other sizes."""
    ours, theirs = ours.detach().double(), theirs.double()
    if ours.numel() != theirs.numel():
        raise ValueError(f"{group} {name}: {list(ours.shape)} against the recorded {list(theirs.shape)}")
    difference = (ours.reshape(theirs.shape) - theirs).abs()
    difference[ours.reshape(theirs.shape) == theirs] = 0
    largest = float(theirs[theirs.isfinite()].abs().max())
    bound = RUN * largest if run else MODULE * max(1.0, largest)
    return Row(group, name, float(difference.max()), bound, largest)


class Recording:
    """The files of a recording, and our networks with its weights: `gated` learns λ, `fixed` does not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is no recording: it holds no config.json")
        recorded = self.json("config")
        self.settings: dict[str, Any] = recorded["settings"]
        vision, text = self.settings["clip"]["vision"], self.settings["clip"]["text"]
        clip = ClipConfig(
            embed_dim=self.settings["clip"]["embed_dim"],
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            vision_width=vision["width"],
            vision_layers=vision["layers"],
            vision_head_width=vision["head_width"],
            context_length=text["context_length"],
            vocab_size=text["vocab_size"],
            text_width=text["width"],
            text_heads=text["heads"],
            text_layers=text["layers"],
        )
        height, width = self.settings["img"]
        self.gated_config, self.fixed_config = (
            Config.from_official(recorded["official_configs"][name]["params"], clip, height=height, width=width)
            for name in ("256_like", "512_like")
        )

    def json(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())

    def tensors(self, name: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{name}.safetensors")

    def networks(self, cfg: Config) -> Networks:
        networks = Networks(cfg)
        wanted = networks.state_dict()
        networks.load_state_dict({k: v for k, v in self.tensors("weights").items() if k in wanted}, strict=True)
        return networks.eval().requires_grad_(False)

    @cached_property
    def gated(self) -> Networks:
        return self.networks(self.gated_config)

    @cached_property
    def fixed(self) -> Networks:
        return self.networks(self.fixed_config)


def unet_forward(recording: Recording) -> Iterator[Row]:
    """Whole forward passes, with and without learned gates; short clips, other contexts, no frame stride."""
    data = recording.tensors("unet_forward")
    for case in sorted({key.split(".")[0] for key in data}):
        for networks, output in ((recording.gated, "y_learnable"), (recording.fixed, "y_fixed")):
            inputs = (data[f"{case}.{name}"] for name in ("x", "timesteps", "context"))
            ours = networks.unet(*inputs, data.get(f"{case}.fs"))
            yield row("U-Net forward", f"{case}.{output}", ours, data[f"{case}.{output}"])


def record_outputs(unet: UNet, names: Sequence[str], run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Outputs of the named modules during `run`, by name; "out.y" is the result of `run`."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    hooks = [unet.get_submodule(module_name(name)).register_forward_hook(keep(name)) for name in names]
    try:
        kept["out.y"] = run()
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def module_name(recorded: str) -> str:
    """Our name of a recorded module. Attentions are recorded under the name of their transformer."""
    head, _, last = recorded.rpartition(".")
    return f"{head}.transformer_blocks.0.{last}" if last.startswith("attn") else recorded


def unet_blocks(recording: Recording) -> Iterator[Row]:
    """Every block's output."""
    data = recording.tensors("unet_blocks")
    names = [key for key in data if not key.startswith(("in.", "out."))]
    inputs = (data[f"in.{name}"] for name in ("x", "timesteps", "context", "fs"))
    kept = record_outputs(recording.gated.unet, names, lambda: recording.gated.unet(*inputs))
    for name in (*names, "out.y"):
        yield row(
            "U-Net blocks", name, as_recorded(recording.gated.unet, name, kept[name], len(data["in.x"])), data[name]
        )


def as_recorded(unet: UNet, name: str, ours: Tensor, batch: int) -> Tensor:
    """Our output in the recorded layout: temporal modules [b, c, t, h, w], their attentions [(b s), t, c]."""
    if name == "out.y":
        return ours
    module = unet.get_submodule(module_name(name))
    if isinstance(module, (TemporalTransformer, TemporalConvs)):
        return ours.unflatten(0, (batch, -1)).transpose(1, 2)
    if isinstance(module, TemporalAttention):
        return ours.unflatten(0, (batch, -1)).transpose(1, 2).flatten(0, 1)
    return ours


def query_transformer(recording: Recording) -> Iterator[Row]:
    data = recording.tensors("resampler")
    yield row("query transformer", "y", recording.gated.query_transformer(data["x"]), data["y"])


def autoencoder(recording: Recording) -> Iterator[Row]:
    data, network = recording.tensors("vae"), recording.gated.autoencoder
    posterior = network.encode(data["image"])
    ours = {
        "moments": network.quant_conv(network.encoder(data["image"])),
        "mean": posterior.mean,
        "logvar": posterior.logvar,
        "mode": posterior.mean,
        "sample": posterior.sample(data["noise"]),
        "scaled_sample": network.to_latents(data["image"], data["noise"]),
        "decoded": network.decode(data["z"]),
        "decode_first_stage": network.from_latents(data["z"] * network.cfg.scale_factor),
    }
    for name, value in ours.items():
        yield row("autoencoder", name, value, data[name])


def clip(recording: Recording) -> Iterator[Row]:
    data, networks = recording.tensors("clip"), recording.gated
    yield row("CLIP", "text", networks.cond_stage_model(data["tokens"]), data["text_penultimate_lnfinal"])
    zero = torch.zeros(1, 3, *recording.settings["img"])
    yield row("CLIP", "zero_image_tokens", networks.embedder(zero), data["zero_image_tokens"])
    for name in sorted(key for key in data if "_preprocessed_stride" in key):
        image, stride = name.split("_")[0], int(name.rpartition("stride")[2])
        frames = data[f"{image}_uint8"].float() / 255 * 2 - 1
        seen = conditioning.preprocess(frames, recording.gated_config.clip.image_size)
        yield row("CLIP", name, seen[..., ::stride, ::stride], data[name])
        yield row("CLIP", f"{image}_tokens", networks.embedder(frames), data[f"{image}_tokens"])


def tokens(recording: Recording) -> Iterator[Row]:
    for path in sorted(recording.folder.glob("tokenizer_*.json")):
        for number, case in enumerate(json.loads(path.read_text())):
            ids = torch.tensor(case["ids"])
            yield row("tokens", f"prompt {number}", conditioning.tokenize([case["text"]], ClipConfig())[0], ids)


def schedules(recording: Recording) -> Iterator[Row]:
    data = recording.tensors("schedule")
    for key, theirs in data.items():
        if key == "scale_arr":
            final = recording.settings["base_scale"]
            yield row("schedules", key, diffusion.dynamic_scale(final, len(theirs) - 400), theirs)
            continue
        snr, prediction, name = key.split(".")
        cfg = DiffusionConfig(prediction=prediction, zero_terminal_snr=snr == "zsnr1")  # type: ignore[arg-type]
        yield row("schedules", key, released_buffers(cfg)[name], theirs)


def timesteps(recording: Recording) -> Iterator[Row]:
    """There is no timestep 1000; the released sampler stops there with an IndexError. Ours leaves it out."""
    for key, theirs in recording.json("ddim_timesteps").items():
        spacing, _, steps = key.partition("/")
        there = [t for t in theirs if 0 <= t < 1000]
        ours = diffusion.ddim_timesteps(int(steps), spacing)
        if len(ours) != len(there):
            yield Row("timesteps", key, float("inf"), 0.0, len(there))
        else:
            yield row("timesteps", key, torch.tensor(ours), torch.tensor(there))


def ddim(recording: Recording) -> Iterator[Row]:
    data = recording.tensors("ddim")
    frames = data["x_T"].shape[2]
    contexts = {
        "full": torch.cat([data["cond_text"], data["cond_image"]], dim=1),
        "none": torch.cat([data["uncond_text"], data["uncond_image"]], dim=1),
        "image": torch.cat([data["uncond_text"], data["cond_image"]], dim=1),
    }
    for case in recording.json("ddim_cases"):
        cfg = recording.fixed_config.diffusion
        cfg = dataclasses.replace(
            cfg,
            prediction=case["param"],
            zero_terminal_snr=bool(case["zsnr"]),
            dynamic_rescale=recording.settings["base_scale"] if case["dynamic_rescale"] else None,
        )
        schedule = diffusion.make_schedule(**dataclasses.asdict(cfg))
        unet = (recording.gated if case["learnable_alpha"] else recording.fixed).unet
        guidance = Guidance(case["cfg"], case["cfg_img"] if case["multi"] else None, case["guidance_rescale"])
        context = unet.project_context(torch.cat([contexts[name] for name in guidance.branches]), frames)

        def predict(x: Tensor, t: Tensor, unet=unet, context=context, guidance=guidance) -> Tensor:
            outputs = unet(torch.cat([x, data["c_concat"]], dim=1), t, context, data["fs"])
            return diffusion.guide(list(outputs.chunk(len(guidance.branches))), guidance)

        steps = diffusion.ddim_steps(schedule, recording.settings["ddim_steps"], case["spacing"], case["eta"])
        first, _ = diffusion.ddim(predict, schedule, data["x_T"], steps[:1], lambda i: data["noise"][i])
        last, clean = diffusion.ddim(predict, schedule, data["x_T"], steps, lambda i: data["noise"][i])
        for what, ours in (("x_first", first), ("x", last), ("pred_x0_last", clean)):
            if (key := f"{case['name']}.{what}") in data:
                yield row("DDIM", key, ours, data[key], run=True)


def end_to_end(recording: Recording) -> Iterator[Row]:
    """From pictures and tokens to the video, with the recorded draws."""
    data = recording.tensors("e2e")
    first, second = (data[f"image{k}_uint8"][None].float() / 255 * 2 - 1 for k in (1, 2))
    for case in recording.json("e2e_cases"):
        name, args = case["name"], case["args"]
        networks = recording.fixed if case["model"]["v"] else recording.gated
        sampling = Sampling(
            steps=case["ddim_steps"],
            eta=case["eta"],
            guidance_scale=case["cfg"],
            image_guidance_scale=args.get("cfg_img") if args.get("multiple_cond_cfg") else None,
            guidance_rescale=args.get("guidance_rescale", 0.0),
            spacing=args.get("timestep_spacing", "uniform"),
        )
        schedule = diffusion.make_schedule(**dataclasses.asdict(networks.cfg.diffusion))
        model = DynamiCrafter(ModelCard(name="recorded", title="", summary=""), networks, schedule, sampling)
        model.empty_tokens = data["tokens_empty"]
        prompt = data["tokens_prompt" if args["text_input"] else "tokens_empty"]
        steps = data[f"{name}.step_noise"]
        draws = Draws(data[f"{name}.vae_noise"][None, [0, -1]], data[f"{name}.x_T"], lambda i, steps=steps: steps[i])
        end = second if args.get("interp") else first if args.get("loop") else None
        video = model.sample(first, prompt, torch.tensor([case["fs"]]), draws, end)
        with torch.inference_mode():
            yield row("end to end", f"{name}.context", model.context(first, prompt)[0], data[f"{name}.cond_crossattn"])
            concat = model.concat_latents(first, draws.posterior, end)
            yield row("end to end", f"{name}.concat", concat, data[f"{name}.c_concat"])
        yield row("end to end", f"{name}.video", video, data[f"{name}.video"][:, 0], run=True)


def training(recording: Recording) -> Iterator[Row]:
    """The loss and its gradients, for eps and v."""
    data = recording.tensors("train_loss")
    for prediction, networks in (("eps", recording.gated), ("v", recording.fixed)):
        unet, schedule = networks.unet, diffusion.make_schedule(**dataclasses.asdict(networks.cfg.diffusion))
        noisy, _ = diffusion.training_pair(schedule, data["z"], data["noise"], data["t"])
        yield row("training", f"{prediction}.x_noisy", noisy, data[f"{prediction}.x_noisy"])

        def predict(x: Tensor, t: Tensor, unet: nn.Module = unet) -> Tensor:
            return unet(torch.cat([x, data["c_concat"]], dim=1), t, data["context"], data["fs"])

        parameters = {name: p.requires_grad_(True) for name, p in unet.named_parameters()}
        with torch.enable_grad():
            loss = diffusion.denoising_loss(predict, schedule, data["z"], data["noise"], data["t"])
            gradients = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))
        unet.requires_grad_(False)
        yield row("training", f"{prediction}.loss", loss, data[f"{prediction}.loss"])
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        yield row("training", f"{prediction}.grad_global_norm", norm, data[f"{prediction}.grad_global_norm"])
        start = f"{prediction}.grad.model.diffusion_model."
        for key in (key for key in data if key.startswith(start)):
            yield row("training", key, gradients[key.removeprefix(start)], data[key], run=True)  # gradients are small


GROUPS: Mapping[str, Callable[[Recording], Iterator[Row]]] = {
    "tokens": tokens,
    "schedules": schedules,
    "timesteps": timesteps,
    "clip": clip,
    "query-transformer": query_transformer,
    "autoencoder": autoencoder,
    "unet-blocks": unet_blocks,
    "unet-forward": unet_forward,
    "ddim": ddim,
    "end-to-end": end_to_end,
    "training": training,
}


def table(rows: Sequence[Row], every: bool) -> str:
    """A Markdown table: one line per comparison, or only the worst of each group."""
    lines = ["| what | compared | max abs error | bound | largest value | |", "|---|---|---|---|---|---|"]
    for group in dict.fromkeys(r.group for r in rows):
        members = [r for r in rows if r.group == group]
        worst = max(members, key=lambda r: r.error / r.bound if r.bound else r.error)
        for r in members if every else [worst]:
            what = r.name if every else f"{len(members)} tensors; nearest to its bound: {r.name}"
            verdict = "ok" if r.ok else "EXCEEDED"
            lines.append(f"| {group} | {what} | {r.error:.1e} | {r.bound:.1e} | {r.largest:.3g} | {verdict} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the recording")
    parser.add_argument("--only", choices=list(GROUPS), action="append", help="a group; may be repeated")
    parser.add_argument("--all", action="store_true", help="a line for every tensor")
    given = parser.parse_args(arguments)
    try:
        recording = Recording(given.folder)
        with torch.inference_mode(False), torch.no_grad():
            rows = [r for name in given.only or GROUPS for r in GROUPS[name](recording)]
    except (UserError, OSError, KeyError, RuntimeError, ValueError) as error:
        print(f"{given.folder} cannot be compared: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    print(table(rows, given.all))
    failed = sum(not r.ok for r in rows)
    print(f"\n{len(rows)} tensors compared, {failed} beyond the bound.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
