"""Complete pipelines for pictures, Flux and Stable Diffusion, with random weights in a few hundred kilobytes."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from tiny_models import PROMPT, WORDS, tiny_scheduler, tiny_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel


def tiny_clip() -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return CLIPTextModel(config).eval()


def tiny_picture_vae() -> AutoencoderKL:
    """4 latent channels, 2x in space."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def tiny_flux(layers: int = 1, single_layers: int = 1, heads: int = 2, in_channels: int = 16) -> FluxTransformer2DModel:
    """A FluxTransformer2DModel of dual and single blocks."""
    model = FluxTransformer2DModel(
        in_channels=in_channels,
        num_layers=layers,
        num_single_layers=single_layers,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return model.eval()


def flux_inputs(
    height: int = 5,
    width: int = 7,
    text: int = 3,
    batch: int = 1,
    reference: tuple[int, int] = (),
    seed: int = 0,
    channels: int = 16,
    **more,
) -> dict:
    """Arguments of one forward of `tiny_flux` on height x width tokens, with a reference image behind if asked."""
    generator = torch.Generator().manual_seed(seed)
    ids = [image_ids(0, height, width)] + ([image_ids(1, *reference)] if reference else [])
    tokens = sum(map(len, ids))
    return {
        "hidden_states": torch.randn(batch, tokens, channels, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 32, generator=generator),
        "pooled_projections": torch.randn(batch, 32, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cat(ids),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
        **more,
    }


def image_ids(image: int, height: int, width: int) -> torch.Tensor:
    """Positions of packed tokens as Flux pipelines make them, `[tokens, 3]`."""
    axes = torch.meshgrid(torch.tensor([image]), torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(axes, dim=-1).reshape(-1, 3).float()


def tiny_flux_pipeline(*, seed: int = 0, **model) -> FluxPipeline:
    """A whole Flux pipeline; 4 pixels make a token, `model` is for `tiny_flux`."""
    torch.manual_seed(seed)
    t5 = T5Config(vocab_size=len(WORDS) + 3, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    pipe = FluxPipeline(
        scheduler=tiny_scheduler("euler"),
        vae=tiny_picture_vae(),
        text_encoder=tiny_clip(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tiny_tokenizer(),
        transformer=tiny_flux(**model),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(levels: int = 3, heads: int = 2, **options) -> UNet2DConditionModel:
    """A UNet whose self-attention runs on all levels and in the middle; the deepest of 3 levels has it there only."""
    last = ["DownBlock2D"] if levels > 2 else []
    down = ["CrossAttnDownBlock2D"] * (levels - len(last)) + last
    model = UNet2DConditionModel(
        block_out_channels=(16,) * levels,
        down_block_types=tuple(down),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=heads,
        norm_num_groups=4,
        **options,
    )
    return model.eval()


def unet_inputs(height: int = 9, width: int = 13, batch: int = 1, seed: int = 0, **more) -> dict:
    """Arguments of one forward of `tiny_unet`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, height, width, generator=generator),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, 8, 32, generator=generator),
        "return_dict": False,
        **more,
    }


def tiny_sd_pipeline(*, seed: int = 0, **model) -> StableDiffusionPipeline:
    """A whole Stable Diffusion pipeline; 2 pixels make a latent, `model` is for `tiny_unet`."""
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae=tiny_picture_vae(),
        text_encoder=tiny_clip(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(**model),
        scheduler=EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, seed: int = 0, **more) -> torch.Tensor:
    """Latents of a run of 3 steps of 40x56 pixels (Flux: 10x14 tokens, Stable Diffusion: 20x28 latents)."""
    settings = {"prompt": PROMPT, "height": 40, "width": 56, "num_inference_steps": 3, "output_type": "latent"}
    if isinstance(pipe, FluxPipeline):
        settings["max_sequence_length"] = 8
    return pipe(**settings | more, generator=torch.Generator().manual_seed(seed)).images
