"""The tasks that stages learn: to rebuild frames, to match pictures and captions, to remove noise from clips."""

from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dcbench import clips
from dcbench.facts import Facts
from dcbench.models.diffusion import make_schedule, to_eps_and_x0, training_pair
from dcbench.models.dynamicrafter.networks import Networks
from dcbench.models.dynamicrafter.unet import parameter_role
from dcbench.training.data import Batch
from dcbench.training.loop import Task
from dcbench.training.networks import PooledClip, scaled_latents, text_tokens, visual_tokens


class Pool(Protocol):
    """Clips to draw batches from."""

    def random_batch(self, size: int, rng: torch.Generator) -> Batch: ...


class Rebuilding(Facts):
    """How an autoencoder learns to rebuild frames: the weights of its loss, and what its decoder is given.

    detail_weight: a pixel has the weight 1 + detail_weight * its distance to the frame's mean colour, so that small
    objects on large flat grounds are learned too. edge_weight: weight of the mean |difference between neighbouring
    pixels of x - y|, for sharp edges and even grounds. latent_noise: standard deviation of noise that is added to the
    decoder's input, beside the noise of the posterior. decoder_only: encoder and latents stay as they are.
    predicted_latents: share of the frames that are rebuilt from the U-Net's prediction of their noisy latents; so the
    decoder learns to correct the errors of the U-Net.
    """

    kl_weight: float = 1e-6
    detail_weight: float = 0.0
    edge_weight: float = 0.0
    latent_noise: float = 0.0
    decoder_only: bool = False
    predicted_latents: float = Field(default=0.0, ge=0, le=1)


FRAMES_OF_A_PREDICTION = 4  # frames that are rebuilt of each clip that the U-Net predicts; few, so that clips vary


class AutoencoderTask(Task):
    """Rebuild single frames: |x - y| + (x - y)^2 + kl_weight * KL per value of the frame."""

    def __init__(
        self,
        networks: Networks,
        pool: Pool,
        rebuilding: Rebuilding,
        predict: Callable[[Batch, torch.Generator], Tensor] | None = None,
    ) -> None:
        """`predict`: b clips -> their latents as the U-Net predicts them: [b, t, c, h/f, w/f], unscaled."""
        super().__init__()
        self.autoencoder = networks.autoencoder.requires_grad_(True)
        if rebuilding.decoder_only:
            self.autoencoder.encoder.requires_grad_(False)
            self.autoencoder.quant_conv.requires_grad_(False)
        self.pool, self.rebuilding, self.predict = pool, rebuilding, predict

    def forward(self, batch_size: int, rng: torch.Generator) -> dict[str, Tensor]:
        device, r = next(self.autoencoder.parameters()).device, self.rebuilding
        each = FRAMES_OF_A_PREDICTION if self.predict else 1
        batch = self.pool.random_batch(-(-batch_size // each), rng)
        clip = torch.arange(batch_size) // each
        pick = torch.randint(batch.frames.shape[1], (batch_size,), generator=rng)
        x = clips.to_float(batch.frames[clip, pick]).to(device)
        posterior = self.autoencoder.encode(x)
        latents = posterior.sample(torch.randn(posterior.mean.shape, generator=rng).to(device))
        if self.predict:
            predicted = self.predict(batch, rng)[clip.to(device), pick.to(device)]
            chosen = (torch.rand(batch_size, generator=rng) < r.predicted_latents).to(device)
            latents = torch.where(chosen[:, None, None, None], predicted, latents)
        if r.latent_noise:
            latents = latents + r.latent_noise * torch.randn(latents.shape, generator=rng).to(device)
        error = self.autoencoder.decode(latents) - x
        weight = 1 + r.detail_weight * (x - x.mean((2, 3), keepdim=True)).abs().mean(1, keepdim=True)
        mse, kl = error.square().mean(), posterior.kl().mean() / x[0].numel()
        loss = (weight * (error.abs() + error.square())).mean() + r.kl_weight * kl
        if r.edge_weight:
            loss = loss + r.edge_weight * (error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean())
        return {"loss": loss, "psnr": -10 * torch.log10(mse.detach() / 4), "kl": kl}


class ContrastiveTask(Task):
    """CLIP's symmetric loss between one frame of each clip and its caption.

    `last_frames`: share of the clips whose last frame is taken, because it shows where the motion led. Of the other
    clips any frame is taken.
    """

    def __init__(self, networks: Networks, pool: Pool, last_frames: float = 0.0) -> None:
        super().__init__()
        self.clip, self.pool, self.last_frames = PooledClip(networks).requires_grad_(True), pool, last_frames

    def matrices(self) -> set[str]:
        """Without embeddings: their rows are words and places. They do not map one layer to another."""
        return {name for name in super().matrices() if "embedding" not in name}

    def forward(self, batch_size: int, rng: torch.Generator) -> dict[str, Tensor]:
        device = next(self.clip.parameters()).device
        batch = self.pool.random_batch(batch_size, rng)
        pick = torch.randint(batch.frames.shape[1], (batch_size,), generator=rng)
        if self.last_frames:
            pick[torch.rand(batch_size, generator=rng) < self.last_frames] = batch.frames.shape[1] - 1
        frames = batch.frames[torch.arange(batch_size), pick].to(device)
        images, texts, scale = self.clip(frames, batch.captions)
        logits = scale * F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
        target = torch.arange(batch_size, device=device)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"loss": loss, "accuracy": (logits.argmax(1) == target).float().mean()}


class Conditions(Facts):
    """Which conditions the U-Net is given in a stage, and how often they are left out.

    context: "none" (text only), "frame" (tokens that the query transformer makes of the condition frame), "class_token"
    (the same from CLIP's global token only). vdg: "none", "frame" (the latents of the condition frame beside the noise
    of every frame), "ends" (the latents of the first and the last frame beside their own noise, zeros between: for
    interpolation and looping). drop_*: shares of clips, 0 to 1.
    """

    context: Literal["none", "frame", "class_token"] = "frame"
    vdg: Literal["none", "frame", "ends"] = "frame"
    condition_frame: Literal["random", "first"] = "random"
    drop_text: float = 0.05
    drop_image: float = 0.05  # the image of the context becomes grey; the concatenated latents stay
    drop_both: float = 0.05
    drop_vdg: float = 0.0  # not in the paper: zeros in place of the concatenated latents, so that the context is needed
    time_shift: float = Field(default=1.0, gt=0)  # not in the paper: > 1 draws more noisy steps, see `draw_times`


def draw_times(size: int, num_timesteps: int, shift: float, rng: torch.Generator) -> Tensor:
    """int64 [size] time steps; uniform u becomes shift * u / (1 + (shift - 1) * u) (Esser et al. 2024, eq. 23)."""
    if shift == 1:
        return torch.randint(num_timesteps, (size,), generator=rng)
    u = torch.rand(size, generator=rng, dtype=torch.float64)
    return (num_timesteps * shift * u / (1 + (shift - 1) * u)).long().clamp(max=num_timesteps - 1)


class DiffusionTask(Task):
    """Mean squared error of the predicted noise or velocity of clips. Conditions are left out at random."""

    networks: Networks

    def __init__(
        self,
        networks: Networks,
        pool: Pool,
        conditions: Conditions,
        roles: tuple[str, ...],
        single_frames: bool = False,
        fixed_image_scale: bool = False,
        min_snr: float = 0.0,
    ) -> None:
        """Train the parameters of these roles ("context", "spatial", "temporal").

        single_frames: one frame of each clip, as with images. fixed_image_scale: λ is not trained. min_snr > 0: weights
        the loss so that the squared error of the clean latents has the factor min(SNR, min_snr) (Hang et al. 2023).
        """
        super().__init__()
        object.__setattr__(self, "networks", networks)  # no submodule, so that parameters() are only those below
        self.pool, self.conditions = pool, conditions
        self.schedule = make_schedule(**asdict(networks.cfg.diffusion))
        self.unet, self.query_transformer = networks.unet, networks.query_transformer
        self.single_frames, self.min_snr = single_frames, min_snr
        parts: dict[str, nn.Module] = {"": self.unet, "image_proj_model.": self.query_transformer}
        for prefix, part in parts.items():
            for name, parameter in part.named_parameters():
                role = parameter_role(prefix + name)
                used = role != "context" or conditions.context != "none"
                gate = name.endswith("attn2.alpha")
                parameter.requires_grad_(role in roles and used and not (gate and fixed_image_scale))

    def matrices(self) -> set[str]:
        """Without the first and last convolution and the embeddings of time: they are not between hidden layers."""
        ends = ("unet.input_blocks.0.0.", "unet.out.", "unet.time_embed.", "unet.fps_embedding.")
        return {name for name in super().matrices() if not name.startswith(ends) and ".emb_layers." not in name}

    def context(self, batch: Batch, index: Tensor, rng: torch.Generator, swap: Collection[str] = ()) -> Tensor:
        """Text tokens, then the tokens of each clip's condition frame (its number: `index` [b]): [b, tokens, d].

        Conditions are left out at random. `swap`: see `predict`.
        """
        c, networks, size = self.conditions, self.networks, len(batch)
        # one number a clip decides what is left out, as in the released trainer: text, both, the image, or nothing
        r = torch.rand(size, generator=rng)
        no_text = r < c.drop_text + c.drop_both
        no_image = (r >= c.drop_text) & (r < c.drop_text + c.drop_both + c.drop_image)
        captions = ["" if drop else caption for drop, caption in zip(no_text.tolist(), batch.captions, strict=True)]
        device = next(self.unet.parameters()).device
        text = text_tokens(networks, captions, device)
        if "text" in swap:
            text = text.roll(1, 0)
        if c.context == "none":
            return text
        frames = batch.frames[torch.arange(size), index].to(device)
        tokens = visual_tokens(networks, frames, grey=no_image.to(device))
        if c.context == "class_token":
            tokens = tokens[:, :1]
        image = self.query_transformer(tokens)
        if "context" in swap:
            image = image.roll(1, 0)
        if self.single_frames:
            image = image[:, : networks.cfg.unet.image_tokens]
        return torch.cat([text, image], dim=1)

    def forward(self, batch_size: int, rng: torch.Generator) -> dict[str, Tensor]:
        """One time step for each clip; one condition frame for each clip."""
        batch = self.pool.random_batch(batch_size, rng)
        return self.loss(batch, self.draw_times(batch_size, rng), rng)

    def draw_times(self, size: int, rng: torch.Generator) -> Tensor:
        return draw_times(size, self.networks.cfg.diffusion.num_timesteps, self.conditions.time_shift, rng)

    def predict(
        self, batch: Batch, times: Tensor, rng: torch.Generator, swap: Collection[str] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(noisy latents, the network's output, its target), each [b, c, t, h, w], of these clips at these steps [b].

        `rng` draws the noise and the conditions. A condition in `swap` ("text", "context", "vdg") is that of the
        previous clip of the batch.
        """
        networks, c, size = self.networks, self.conditions, len(batch)
        device = next(self.unet.parameters()).device
        z = scaled_latents(networks, batch, device)  # b c t h w
        frames = z.shape[2]
        index = torch.randint(frames, (size,), generator=rng)
        if c.condition_frame == "first":
            index = torch.zeros_like(index)
        if self.single_frames:  # the condition is the exact frame
            z = z[torch.arange(size), :, index][:, :, None]
        vdg = torch.zeros_like(z)
        if c.vdg == "frame" and not self.single_frames:
            vdg = z[torch.arange(size), :, index][:, :, None].expand_as(z)
        elif c.vdg == "ends":
            vdg[:, :, 0], vdg[:, :, -1] = z[:, :, 0], z[:, :, -1]
        if c.drop_vdg:
            vdg = vdg * (torch.rand(size, generator=rng) >= c.drop_vdg).to(z)[:, None, None, None, None]
        if "vdg" in swap:
            vdg = vdg.roll(1, 0)
        context = self.context(batch, index, rng, swap)
        noise = torch.randn(z.shape, generator=rng).to(device)
        times = times.to(device)
        noisy, target = training_pair(self.schedule, z, noise, times)
        fs = batch.strides if networks.cfg.fs_meaning == "frame_stride" else batch.fps
        return noisy, self.unet(torch.cat([noisy, vdg], dim=1), times, context, fs.to(device)), target

    @torch.no_grad()
    def predicted_latents(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """Latents of the clips as the network predicts them, each at its own random step: [b, t, c, h, w], unscaled."""
        times = self.draw_times(len(batch), rng)
        noisy, output, _ = self.predict(batch, times, rng)
        times = times.to(noisy.device)
        signal, sigma = self.schedule.at(times, noisy)
        _, clean = to_eps_and_x0(self.schedule.prediction, output.float(), noisy, signal, sigma)
        if self.schedule.scale is not None:
            clean = clean / self.schedule.scale.to(noisy.device)[times][:, None, None, None, None]
        return clean.transpose(1, 2) / self.networks.cfg.autoencoder.scale_factor

    def clip_errors(self, batch: Batch, times: Tensor, rng: torch.Generator, swap: Collection[str] = ()) -> Tensor:
        """Mean squared error of the network's output for each of these clips, at these steps [b]: [b]."""
        _, output, target = self.predict(batch, times, rng, swap)
        return (output.float() - target).square().mean(dim=(1, 2, 3, 4))

    def loss(self, batch: Batch, times: Tensor, rng: torch.Generator) -> dict[str, Tensor]:
        """The mean over these clips at these steps [b]; "unweighted" is the same without min_snr."""
        error = self.clip_errors(batch, times, rng)
        if not self.min_snr:
            return {"loss": error.mean()}
        alpha = self.schedule.alphas_cumprod.to(error.device)[times.to(error.device)]
        snr = alpha / (1 - alpha)
        scale = snr + 1 if self.schedule.prediction == "v" else snr
        weight = snr.clamp(max=self.min_snr) / scale.clamp(min=1e-8)
        return {"loss": (weight * error).mean(), "unweighted": error.mean()}
