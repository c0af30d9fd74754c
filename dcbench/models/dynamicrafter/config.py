"""The shapes and constants of every DynamiCrafter variant: frozen dataclasses, and the presets in `VARIANTS`.

`Config.from_official` maps the released code's yaml (`model.params`) to them:

    unet_config.params -> UNetConfig
        num_head_channels -> head_channels, image_cross_attention_scale_learnable -> learnable_image_scale
    first_stage_config.params -> AutoencoderConfig
        ddconfig.{ch, ch_mult, num_res_blocks, z_channels, in_channels, out_ch}, embed_dim -> latent_channels
    image_proj_stage_config.params -> QueryTransformerConfig
        embedding_dim -> in_dim, output_dim -> out_dim, video_length -> num_frames, dim_head -> head_dim
    linear_start, parameterization, rescale_betas_zero_snr, use_dynamic_rescale, base_scale -> DiffusionConfig
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dcbench.errors import UserError, near_match

Prediction = Literal["eps", "v"]


@dataclass(frozen=True)
class UNetConfig:
    """The 3-D U-Net. Channels at level i are `model_channels * channel_mult[i]`."""

    in_channels: int = 8  # noisy latent + concatenated image latent
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (4, 2, 1)  # downsampling factors that have transformers
    head_channels: int = 64
    init_heads: int = 8  # heads of the temporal transformer after the first convolution
    transformer_depth: int = 1
    context_dim: int = 1024
    text_tokens: int = 77
    image_tokens: int = 16  # per frame; a context of text_tokens + image_tokens * t is split by frame
    learnable_image_scale: bool = False
    default_fs: int = 24  # frame stride (256) or frames per second (the others) when none is given
    norm_groups: int = 32
    dropout: float = 0.1

    @property
    def cross_attentions(self) -> int:
        """How many layers have a λ: those of the input blocks, of the middle and of the output blocks."""
        levels = sum(2**level in self.attention_resolutions for level in range(len(self.channel_mult)))
        return self.transformer_depth * ((2 * self.num_res_blocks + 1) * levels + 1)


@dataclass(frozen=True)
class AutoencoderConfig:
    """The KL autoencoder; it reduces each side by `factor`."""

    in_channels: int = 3
    out_channels: int = 3
    channels: int = 128
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    patch_size: int = 1  # squares of so many pixels a side enter as channels: a small network on a coarse grid
    decoder_channel_mult: tuple[float, ...] = ()  # of a decoder with other levels than the encoder; () = the same
    num_res_blocks: int = 2
    z_channels: int = 4  # width inside the encoder and decoder
    latent_channels: int = 4  # width of the latents themselves
    scale_factor: float = 0.18215  # latents are multiplied by it after encoding
    norm_groups: int = 32
    dropout: float = 0.0

    @property
    def factor(self) -> int:
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)

    @property
    def decoder_patch_size(self) -> int:
        """More levels of upsampling leave smaller squares to the decoder's last convolution."""
        return self.factor // 2 ** (len(self.decoder_channel_mult or self.channel_mult) - 1)


@dataclass(frozen=True)
class QueryTransformerConfig:
    """The network that turns CLIP's visual tokens into `num_queries` context tokens for each frame."""

    in_dim: int = 1280  # width of a visual token
    dim: int = 1024
    out_dim: int = 1024
    depth: int = 4
    heads: int = 12
    head_dim: int = 64
    num_queries: int = 16  # per frame
    num_frames: int = 16
    ff_mult: int = 4


@dataclass(frozen=True)
class ClipConfig:
    """Both towers, in open_clip's own words; `image_size` squares are what the visual tower sees."""

    embed_dim: int = 1024
    image_size: int = 224
    patch_size: int = 14
    vision_width: int = 1280
    vision_layers: int = 32
    vision_head_width: int = 80
    context_length: int = 77
    vocab_size: int = 49408
    text_width: int = 1024
    text_heads: int = 16
    text_layers: int = 24
    token_ids: tuple[int, ...] = ()  # the byte pairs that a small text tower knows, ascending; () = all 49408


@dataclass(frozen=True)
class DiffusionConfig:
    """The noise schedule and what the network predicts."""

    num_timesteps: int = 1000
    linear_start: float = 0.00085
    linear_end: float = 0.012
    prediction: Prediction = "eps"
    zero_terminal_snr: bool = False
    dynamic_rescale: float | None = None  # the final scale of the clean latents; None = no rescaling


@dataclass(frozen=True)
class Config:
    """A whole model. `fs_meaning` says what the `fs` input of the U-Net was trained as."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    query_transformer: QueryTransformerConfig = field(default_factory=QueryTransformerConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    height: int = 256
    width: int = 256
    fs_meaning: Literal["frame_stride", "fps"] = "fps"
    fs: int = 24  # the released run script's value
    fs_range: tuple[int, int] = (1, 30)
    interpolates: bool = False  # trained with the first and the last frame

    @property
    def num_frames(self) -> int:
        return self.query_transformer.num_frames

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; `from_dict` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Config":
        """The configuration in `values`; absent fields keep their default, unknown ones raise UserError."""
        return _build(cls, values, "config")

    @classmethod
    def from_official(cls, params: Mapping[str, Any], clip: ClipConfig | None = None, **changes: Any) -> "Config":
        """The configuration of a released yaml's `model.params` (CLIP's sizes do not stand there)."""
        unet, dd = params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
        queries = params["image_proj_stage_config"]["params"]
        for name, needed in _OFFICIAL_SWITCHES.items():
            if unet.get(name, needed) != needed:
                raise UserError(f"unet_config.{name} = {unet[name]}: only {needed} is built, as in every release")
        if dd.get("attn_resolutions"):
            raise UserError(
                f"ddconfig.attn_resolutions = {dd['attn_resolutions']}: only [] is built (middle attention)"
            )
        return cls(
            unet=UNetConfig(
                **{k: _tuple(unet[k]) for k in _SAME_IN_UNET if k in unet},
                head_channels=unet["num_head_channels"],
                learnable_image_scale=unet.get("image_cross_attention_scale_learnable", False),
            ),
            autoencoder=AutoencoderConfig(
                in_channels=dd["in_channels"],
                out_channels=dd["out_ch"],
                channels=dd["ch"],
                channel_mult=tuple(dd["ch_mult"]),
                num_res_blocks=dd["num_res_blocks"],
                z_channels=dd["z_channels"],
                latent_channels=params["first_stage_config"]["params"]["embed_dim"],
                scale_factor=params.get("scale_factor", 1.0),
                dropout=dd.get("dropout", 0.0),
            ),
            query_transformer=QueryTransformerConfig(
                in_dim=queries["embedding_dim"],
                dim=queries["dim"],
                out_dim=queries["output_dim"],
                depth=queries["depth"],
                heads=queries["heads"],
                head_dim=queries["dim_head"],
                num_queries=queries["num_queries"],
                num_frames=queries["video_length"],
                ff_mult=queries["ff_mult"],
            ),
            clip=clip or ClipConfig(),
            diffusion=DiffusionConfig(
                num_timesteps=params.get("timesteps", 1000),
                linear_start=params["linear_start"],
                linear_end=params["linear_end"],
                prediction=params.get("parameterization", "eps"),
                zero_terminal_snr=params.get("rescale_betas_zero_snr", False),
                dynamic_rescale=params.get("base_scale", 0.7) if params.get("use_dynamic_rescale") else None,
            ),
            **changes,
        )


_SAME_IN_UNET = (
    *("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions"),
    *("transformer_depth", "context_dim", "default_fs", "dropout"),
)
_OFFICIAL_SWITCHES: dict[str, Any] = {
    **{"use_linear": True, "temporal_conv": True, "temporal_attention": True, "temporal_selfatt_only": True},
    **{"use_relative_position": False, "use_causal_attention": False, "addition_attention": True},
    **{"image_cross_attention": True, "fs_condition": True, "tempspatial_aware": False},
    **{"resblock_updown": False, "use_scale_shift_norm": False, "conv_resample": True, "dims": 2},
}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _build(cls: Any, values: Mapping[str, Any], where: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"{where}: unknown field {name!r}.{near_match(name, fields)} Allowed: {', '.join(fields)}")
    made = {}
    for name, value in values.items():
        nested = isinstance(value, Mapping)
        made[name] = _build(_PARTS[name], value, f"{where}.{name}") if nested else _tuple(value)
    return cls(**made)


_PARTS: dict[str, Any] = {
    "unet": UNetConfig,
    "autoencoder": AutoencoderConfig,
    "query_transformer": QueryTransformerConfig,
    "clip": ClipConfig,
    "diffusion": DiffusionConfig,
}

_V = DiffusionConfig(prediction="v", zero_terminal_snr=True, dynamic_rescale=0.7)

VARIANTS: dict[str, Config] = {
    "256": Config(
        unet=UNetConfig(learnable_image_scale=True, default_fs=3), fs_meaning="frame_stride", fs=3, fs_range=(1, 6)
    ),
    "512": Config(unet=UNetConfig(default_fs=24), diffusion=_V, height=320, width=512, fs=24, fs_range=(15, 30)),
    "1024": Config(
        unet=UNetConfig(default_fs=10),
        diffusion=dataclasses.replace(_V, dynamic_rescale=0.3),
        height=576,
        width=1024,
        fs=10,
        fs_range=(5, 15),
    ),
    "interp-512": Config(
        unet=UNetConfig(default_fs=24), diffusion=_V, height=320, width=512, fs=5, fs_range=(5, 30), interpolates=True
    ),
    # The same classes at a size that two processor cores train and sample: 16 frames of 64x64, 8x8 latents.
    "tiny": Config(
        unet=UNetConfig(
            model_channels=48,
            channel_mult=(1, 2),
            num_res_blocks=1,
            attention_resolutions=(2, 1),
            head_channels=24,
            init_heads=2,
            context_dim=96,
            learnable_image_scale=True,
            default_fs=3,
            norm_groups=8,
            dropout=0.0,
        ),
        autoencoder=AutoencoderConfig(channels=32, channel_mult=(1, 1, 2, 2), num_res_blocks=1, norm_groups=8),
        query_transformer=QueryTransformerConfig(in_dim=96, dim=96, out_dim=96, depth=2, heads=3, head_dim=32),
        clip=ClipConfig(
            embed_dim=64,
            image_size=64,
            patch_size=8,
            vision_width=96,
            vision_layers=4,
            vision_head_width=32,
            text_width=96,
            text_heads=3,
            text_layers=3,
        ),
        height=64,
        width=64,
        fs_meaning="frame_stride",
        fs=3,
        fs_range=(1, 6),
    ),
}
VARIANTS["tiny-interp"] = dataclasses.replace(VARIANTS["tiny"], interpolates=True)


def variant(name: str) -> Config:
    """The preset `name`; raises UserError with the nearest name otherwise."""
    if name not in VARIANTS:
        raise UserError(f"variant {name!r} is unknown.{near_match(name, VARIANTS)} Allowed: {', '.join(VARIANTS)}")
    return VARIANTS[name]
