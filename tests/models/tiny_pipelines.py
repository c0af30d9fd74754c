"""Every pipeline class of the cards, with random weights of a few thousand parameters and tokenizers built here.

The classes, their configurations and `save_pretrained` are the libraries' own; only the sizes are small, and the
tokenizers know few words. `build(name, folder)` leaves what `from_pretrained` of that class reads.
"""

import importlib
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch

diffusers: Any = importlib.import_module("diffusers")  # both fill their names in lazily: no types to check against
transformers: Any = importlib.import_module("transformers")

WIDTH = 32  # of every text and image embedding
NORM = {"norm_num_groups": 8}


# ------------------------------------------------------------------------------------------------- text and image parts


def clip_tokenizer() -> Any:
    letters = list(string.ascii_lowercase + string.digits)
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocabulary = {word: index for index, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_lowercase]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def llama_tokenizer() -> Any:
    """Words, and the markers of HunyuanVideo's prompt template as single tokens, `<image>` the sixth of a prompt."""
    marks = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "\n\n", "<image>"]
    words = ["<unk>", "<s>", "<pad>", "system", "user", "assistant", *string.ascii_lowercase]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    core = tokenizers.Tokenizer(model)
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.add_special_tokens(marks)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", pad_token="<pad>"
    )


def clip_text(**changes: Any) -> Any:
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 100, "bos_token_id": 0}
    size = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "projection_dim": WIDTH}
    text = {"eos_token_id": 1, "pad_token_id": 1}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**(settings | size | text | changes)))


def clip_vision(projected: bool = True, size: int = 32) -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, projection_dim=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        image_size=size, patch_size=size // 4,
    )  # fmt: skip
    kind = transformers.CLIPVisionModelWithProjection if projected else transformers.CLIPVisionModel
    return kind(config)


def clip_images(size: int = 32) -> Any:
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, resample=2
    )


def t5_encoder() -> Any:
    config = transformers.T5Config(
        vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, relative_attention_num_buckets=8
    )
    return transformers.T5EncoderModel(config)


def umt5_encoder() -> Any:
    config = transformers.UMT5Config(
        vocab_size=100, d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2, relative_attention_num_buckets=8
    )
    return transformers.UMT5EncoderModel(config)


def autoencoder() -> Any:
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=down, up_block_types=up, latent_channels=4, sample_size=32, **NORM
    )


def wan_autoencoder() -> Any:
    return diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


# ------------------------------------------------------------------------------------------------------------ pipelines


def stable_diffusion_unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8, **NORM,
    )  # fmt: skip


def motion_adapter(**changes: Any) -> Any:
    return diffusers.MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2,
        **changes,
    )  # fmt: skip


def stable_diffusion_parts() -> dict[str, Any]:
    return {
        "vae": autoencoder(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": stable_diffusion_unet(),
        "scheduler": diffusers.DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1),
        "feature_extractor": clip_images(),
        "image_encoder": clip_vision(),
    }


def i2vgen_xl() -> Any:
    unet = diffusers.I2VGenXLUNet(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8, **NORM,
    )  # fmt: skip
    return diffusers.I2VGenXLPipeline(**stable_diffusion_parts() | {"unet": unet})


def stable_video_diffusion() -> Any:
    blocks = {
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=WIDTH,
        addition_time_embed_dim=32, projection_class_embeddings_input_dim=96, num_attention_heads=(2, 4), **blocks,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"), sample_size=32
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", prediction_type="v_prediction", timestep_type="continuous",
        timestep_spacing="leading", sigma_min=0.002, sigma_max=700.0, use_karras_sigmas=True,
    )  # fmt: skip
    return diffusers.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=clip_vision(size=224), unet=unet, scheduler=scheduler, feature_extractor=clip_images(224)
    )


def pia() -> Any:
    adapter = motion_adapter(conv_in_channels=9)  # noise, image and mask: what makes PIA's adapter another one
    return diffusers.PIAPipeline(**stable_diffusion_parts(), motion_adapter=adapter)


def sparse_control() -> Any:
    controlnet = diffusers.SparseControlNetModel(
        block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), motion_num_attention_heads=2, **NORM,
    )  # fmt: skip
    parts = stable_diffusion_parts() | {"motion_adapter": motion_adapter(), "controlnet": controlnet}
    return diffusers.AnimateDiffSparseControlNetPipeline(**parts)


def cogvideox() -> Any:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2, num_layers=1,
        text_embed_dim=WIDTH, sample_width=4, sample_height=4, sample_frames=17, max_text_seq_length=226,
        use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    return diffusers.CogVideoXImageToVideoPipeline(
        tokenizer=t5_tokenizer(), text_encoder=t5_encoder(), vae=vae, transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    )  # fmt: skip


def ltx() -> Any:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=1, caption_channels=WIDTH,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
    )  # fmt: skip
    return diffusers.LTXImageToVideoPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae,
        text_encoder=t5_encoder(), tokenizer=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def hunyuan_video() -> Any:
    tokenizer = llama_tokenizer()
    text = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=3, num_attention_heads=2, vocab_size=100,
        max_position_embeddings=2048, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(  # 24 x 24 patches: the 576 image tokens that the pipeline counts on
        hidden_size=16, intermediate_size=16, projection_dim=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=336, patch_size=14,
    )  # fmt: skip
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token)
    config.pad_token_id = tokenizer.pad_token_id
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=WIDTH, pooled_projection_dim=WIDTH, rope_axes_dim=(2, 4, 4),
        image_condition_type="token_replace",
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    )
    return diffusers.HunyuanVideoImageToVideoPipeline(
        text_encoder=transformers.LlavaForConditionalGeneration(config), tokenizer=tokenizer, transformer=transformer,
        vae=vae, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder_2=clip_text(),
        tokenizer_2=clip_tokenizer(), image_processor=clip_images(336),
    )  # fmt: skip


def _wan_transformer(kind: Any, image_dim: int | None = WIDTH) -> Any:
    return kind(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=WIDTH, freq_dim=32,
        ffn_dim=32, num_layers=1, image_dim=image_dim, rope_max_seq_len=32,
    )  # fmt: skip


def wan() -> Any:
    return diffusers.WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5_encoder(), vae=wan_autoencoder(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        image_processor=clip_images(), image_encoder=clip_vision(projected=False),
        transformer=_wan_transformer(diffusers.WanTransformer3DModel),
    )  # fmt: skip


def wan22() -> Any:
    """The second generation: two transformers that share the noise levels, and no image encoder."""
    pipeline = wan()
    parts = pipeline.components | {"image_encoder": None, "image_processor": None}
    for name in ("transformer", "transformer_2"):
        parts[name] = _wan_transformer(diffusers.WanTransformer3DModel, image_dim=None)
    return diffusers.WanImageToVideoPipeline(**parts, boundary_ratio=0.9)


def stable_diffusion() -> Any:
    """A base on which motion adapters sit."""
    parts = stable_diffusion_parts() | {"safety_checker": None}
    return diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)


def skyreels() -> Any:
    return diffusers.SkyReelsV2ImageToVideoPipeline(
        tokenizer=t5_tokenizer(), text_encoder=umt5_encoder(), vae=wan_autoencoder(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
        image_processor=clip_images(), image_encoder=clip_vision(),
        transformer=_wan_transformer(diffusers.SkyReelsV2Transformer3DModel),
    )  # fmt: skip


BUILDERS: dict[str, Callable[[], Any]] = {
    "I2VGenXLPipeline": i2vgen_xl,
    "StableVideoDiffusionPipeline": stable_video_diffusion,
    "PIAPipeline": pia,
    "AnimateDiffSparseControlNetPipeline": sparse_control,
    "CogVideoXImageToVideoPipeline": cogvideox,
    "LTXImageToVideoPipeline": ltx,
    "HunyuanVideoImageToVideoPipeline": hunyuan_video,
    "WanImageToVideoPipeline": wan,
    "SkyReelsV2ImageToVideoPipeline": skyreels,
    "Wan2.2": wan22,
    "StableDiffusionPipeline": stable_diffusion,
}


def build(name: str, folder: Path) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BUILDERS[name]().save_pretrained(folder, safe_serialization=True)
    return folder
