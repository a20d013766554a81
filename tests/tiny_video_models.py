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
