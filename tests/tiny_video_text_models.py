"""Video models whose self-attention sees text in the same sequence; see `tiny_video_models.py`."""

from __future__ import annotations

from typing import Any

import torch
from tiny_video_models import build, common, latents, noise
from torch import nn


def hunyuan_relative(name: str, **config: Any) -> nn.Module:
    """2 dual and 2 single blocks, patches of 1x2x2."""
    return build(
        name,
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 2,
            "patch_size_t": 1,
            "text_embed_dim": 32,
            "rope_axes_dim": (4, 6, 6),
        }
        | config,
    )


def tiny_hunyuan_video(**config: Any) -> nn.Module:
    return hunyuan_relative(
        "HunyuanVideoTransformer3DModel", num_refiner_layers=1, pooled_projection_dim=8, guidance_embeds=False, **config
    )


def hunyuan_video_inputs(*grid: int) -> dict[str, Any]:
    """8 tokens of text of which the last 3 are padding."""
    return {
        "hidden_states": latents(grid),
        "pooled_projections": noise(1, 8, seed=2),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]),
        **common(),
    }


def tiny_framepack() -> nn.Module:
    return hunyuan_relative(
        "HunyuanVideoFramepackTransformer3DModel",
        num_refiner_layers=1,
        pooled_projection_dim=8,
        guidance_embeds=False,
        image_condition_type="latent_concat",
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
    )


def framepack_inputs(frames: int, height: int, width: int) -> dict[str, Any]:
    """2 frames of the past as they are, 2 at half and 5 at a quarter of the resolution, odd sizes rounded up."""

    def past(frames: int) -> torch.Tensor:
        return latents((frames, height, width))

    return hunyuan_video_inputs(frames, height, width) | {
        "image_embeds": noise(1, 3, 8, seed=3),
        "indices_latents": torch.arange(9, 9 + frames),
        "latents_clean": past(2),
        "indices_latents_clean": torch.tensor([0, 8]),
        "latents_history_2x": past(2),
        "indices_latents_history_2x": torch.tensor([6, 7]),
        "latents_history_4x": past(5),
        "indices_latents_history_4x": torch.arange(1, 6),
    }


def motif_video_inputs(*grid: int) -> dict[str, Any]:
    """2 tokens of an image, and 8 of text of which the last 3 are padding."""
    inputs = hunyuan_video_inputs(*grid)
    del inputs["pooled_projections"]
    return inputs | {"image_embeds": noise(1, 2, 8, seed=3)}


def tiny_hunyuan_video15(in_channels: int = 4) -> nn.Module:
    model = build(
        "HunyuanVideo15Transformer3DModel",
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=32,
        text_embed_2_dim=8,
        image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    )
    # 2048 channels wide in all configurations.
    model.context_embedder_2 = type(model.context_embedder_2)(8, 16, 32).eval()
    return model


def hunyuan_video15_inputs(*grid: int, image: bool = True, text: int = 8, batch: int = 1) -> dict[str, Any]:
    """`text` tokens, 5 of the first sample no padding; 6 glyph tokens, 2 no padding; 4 of an image, zeros if none."""
    valid = torch.arange(text) < torch.arange(5, 5 + batch)[:, None]
    glyphs = (torch.arange(6) < 2).expand(batch, -1)
    return {
        "hidden_states": noise(batch, 4, *grid),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": noise(batch, text, 32, seed=1),
        "encoder_attention_mask": valid.long(),
        "encoder_hidden_states_2": noise(batch, 6, 8, seed=2),
        "encoder_attention_mask_2": glyphs.long(),
        "image_embeds": noise(batch, 4, 8, seed=3) * image,
        "return_dict": False,
    }


def tiny_mochi() -> nn.Module:
    return build(
        "MochiTransformer3DModel",
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=4,
        text_embed_dim=32,
        time_embed_dim=16,
        max_sequence_length=8,
    )


def mochi_inputs(*grid: int, batch: int = 1) -> dict[str, Any]:
    """8 tokens of text, of which 5 are no padding in the first sample, 6 in the second."""
    return {
        "hidden_states": latents(grid).expand(batch, -1, -1, -1, -1),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": noise(batch, 8, 32, seed=1),
        "encoder_attention_mask": torch.arange(8) < torch.arange(5, 5 + batch)[:, None],
        "return_dict": False,
    }


def tiny_cogvideox(name: str = "CogVideoXTransformer3DModel", **config: Any) -> nn.Module:
    """CogVideoX 1.0 of 2 billion parameters; `patch_size_t=2` and RoPE make it 1.5."""
    return build(
        name,
        **{
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": 10,
            "sample_height": 6,
            "sample_frames": 9,
            "patch_size": 2,
            "max_text_seq_length": 8,
        }
        | config,
    )


def cogvideox_inputs(frames: int, height: int, width: int, frames_in_token: int = 1) -> dict[str, Any]:
    """Frames come before channels; with 2 frames in a token there is a table of RoPE too."""
    inputs = {"hidden_states": noise(1, frames * frames_in_token, 4, 2 * height, 2 * width), **common()}
    if frames_in_token == 1:
        return inputs
    angle = noise(frames * height * width, 8, seed=4).repeat_interleave(2, dim=1)
    return inputs | {"image_rotary_emb": (angle.cos(), angle.sin())}


def tiny_easyanimate(**config: Any) -> nn.Module:
    return build(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        patch_size=2,
        time_embed_dim=8,
        text_embed_dim=32,
        text_embed_dim_t5=8,
        num_layers=2,
        mmdit_layers=1,
    )


def easyanimate_inputs(*grid: int) -> dict[str, Any]:
    return {"hidden_states": latents(grid), "encoder_hidden_states_t5": noise(1, 3, 8, seed=2), **common()}
