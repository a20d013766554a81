"""Video transformers with random weights in a few hundred kilobytes, and the arguments of one forward of each.

Grids are (frames, height, width) in tokens. The installed diffusers may lack a class, so each is looked up when built.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn


def build(name: str, **config: Any) -> nn.Module:
    return getattr(diffusers, name)(**config).eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_relative(name: str, head_dim: int = 16, **config: Any) -> nn.Module:
    """A model of Wan's shape: 4 latent channels, patches of 1x2x2, text of 32 channels."""
    return build(
        name,
        **{
            "patch_size": (1, 2, 2),
            "num_attention_heads": 2,
            "attention_head_dim": head_dim,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 32,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        }
        | config,
    )


def latents(grid: tuple[int, int, int], channels: int = 4, patch: tuple[int, int, int] = (1, 2, 2)) -> torch.Tensor:
    """`[1, channels, frames, height, width]`."""
    return noise(1, channels, *(size * step for size, step in zip(grid, patch, strict=True)))


def common(text: int = 8, width: int = 32) -> dict[str, Any]:
    """What every forward takes."""
    return {
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, text, width, seed=1),
        "return_dict": False,
    }


def tiny_wan_vace() -> nn.Module:
    return wan_relative("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=6)


def wan_vace_inputs(*grid: int) -> dict[str, Any]:
    return {"hidden_states": latents(grid), "control_hidden_states": latents(grid, channels=6), **common()}


def tiny_wan_animate() -> nn.Module:
    return wan_relative(
        "WanAnimateTransformer3DModel",
        in_channels=12,
        latent_channels=4,
        image_dim=8,
        added_kv_proj_dim=32,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
        face_encoder_hidden_dim=16,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


def wan_animate_inputs(frames: int, height: int, width: int) -> dict[str, Any]:
    """The first of the frames is the reference."""
    return {
        "hidden_states": latents((frames, height, width), channels=12),
        "pose_hidden_states": latents((frames - 1, height, width)),
        "face_pixel_values": noise(1, 3, 4 * frames - 7, 16, 16),
        "encoder_hidden_states_image": noise(1, 4, 8),
        **common(text=512),
    }


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


def motif_video_inputs(*grid: int) -> dict[str, Any]:
    """2 tokens of an image, and 8 of text of which the last 3 are padding."""
    inputs = hunyuan_video_inputs(*grid)
    del inputs["pooled_projections"]
    return inputs | {"image_embeds": noise(1, 2, 8, seed=3)}


def tiny_hunyuan_video15() -> nn.Module:
    model = build(
        "HunyuanVideo15Transformer3DModel",
        in_channels=4,
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
