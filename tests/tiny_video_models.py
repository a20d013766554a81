"""Video models whose self-attention sees the video alone: random weights, and the arguments of one forward of each.

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


def tiny_wan_vace(control_channels: int = 6) -> nn.Module:
    return wan_relative("WanVACETransformer3DModel", vace_layers=[0, 1], vace_in_channels=control_channels)


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


def tiny_cosmos(**config: Any) -> nn.Module:
    """Cosmos 1.0; `img_context_dim_in=8, img_context_dim_out=32` makes it Predict 2.5."""
    return build(
        "CosmosTransformer3DModel",
        **{
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "text_embed_dim": 32,
            "adaln_lora_dim": 4,
            "max_size": (4, 24, 24),
            "concat_padding_mask": False,
        }
        | config,
    )


def cosmos_inputs(*grid: int, image: bool = False) -> dict[str, Any]:
    inputs = {"hidden_states": latents(grid), **common()}
    if image:
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"], noise(1, 4, 8, seed=2)
    return inputs


def tiny_allegro() -> nn.Module:
    return build(
        "AllegroTransformer3DModel",
        patch_size=2,
        patch_size_t=1,
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=48,
        sample_height=6,
        sample_width=10,
        sample_frames=3,
        caption_channels=32,
    )


def allegro_inputs(*grid: int) -> dict[str, Any]:
    axes = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    positions = tuple(axis.reshape(1, -1) for axis in axes)
    angles = [torch.outer(torch.arange(size + 1.0), torch.tensor([1.0, 0.5, 0.1, 0.01])) for size in grid]
    tables = tuple(tuple(turn(angle).repeat(1, 2) for turn in (torch.cos, torch.sin)) for angle in angles)
    return {"hidden_states": latents(grid), "image_rotary_emb": (tables, positions), **common()}


def tiny_latte(out_channels: int = 4) -> nn.Module:
    """For 3 frames, or one. Its temporal blocks, which mix the frames of one place, add nothing."""
    model = build(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=out_channels,
        num_layers=2,
        cross_attention_dim=32,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=32,
        video_length=3,
    )
    for block in model.temporal_transformer_blocks:
        for parameter in block.attn1.to_out.parameters():
            parameter.data.zero_()
    return model


def video_inputs(*grid: int) -> dict[str, Any]:
    return {"hidden_states": latents(grid), **common()}


def tiny_ltx() -> nn.Module:
    return build(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=32,
    )


def ltx_inputs(frames: int, height: int, width: int, clip: int = 0) -> dict[str, Any]:
    """`clip` frames that condition the video, from its frame 5 on, stand in front; then coordinates tell the grid."""
    inputs = {
        "hidden_states": noise(1, (clip + frames) * height * width, 4),
        "encoder_attention_mask": torch.ones(1, 8),
        **common(),
    }
    if not clip:
        return inputs | {"num_frames": frames, "height": height, "width": width}
    clips = [video_coordinates(clip, height, width, start=5), video_coordinates(frames, height, width)]
    return inputs | {"video_coords": torch.cat(clips, dim=1)[None]}


def video_coordinates(frames: int, height: int, width: int, start: int = 0) -> torch.Tensor:
    """(time in seconds, row, column) as LTX pipelines make them, `[3, tokens]`."""
    axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
    time, row, column = (axis.reshape(-1).float() for axis in axes)
    return torch.stack([((8 * time - 7).clamp(min=0) + start) / 25, 32 * row, 32 * column])


def tiny_ltx2() -> nn.Module:
    return build(
        "LTX2VideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=2,
        caption_channels=32,
    )


def ltx2_inputs(frames: int, height: int, width: int, keyframes: int = 0) -> dict[str, Any]:
    """`keyframes` frames stand behind the video."""
    tokens, more = frames * height * width, keyframes * height * width
    inputs = {
        "hidden_states": noise(1, tokens + more, 4),
        "audio_hidden_states": noise(1, 5, 4, seed=2),
        "audio_encoder_hidden_states": noise(1, 8, 32, seed=3),
        "audio_num_frames": 5,
        "num_frames": frames,
        "height": height,
        "width": width,
        **common(),
    }
    if keyframes:
        clips = [video_coordinates(frames, height, width), video_coordinates(keyframes, height, width, start=9)]
        inputs["video_coords"] = torch.stack([torch.cat(clips, dim=1)[None]] * 2, dim=-1)
    return inputs


def tiny_kandinsky5() -> nn.Module:
    """One block: queries and keys are rounded to bfloat16, and a float32 rounding in the block before may tip that."""
    model = build(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=4,
        in_text_dim=32,
        in_text_dim2=8,
        time_dim=16,
        out_visual_dim=4,
        model_dim=32,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
    )
    # An untrained one has gates of zero.
    for name, part in model.named_modules():
        if name.endswith("modulation.out_layer"):
            nn.init.normal_(part.weight, std=0.1)
    return model


def kandinsky5_inputs(frames: int, height: int, width: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(1, frames, 2 * height, 2 * width, 4),
        "pooled_projections": noise(1, 8, seed=2),
        "visual_rope_pos": [torch.arange(size) for size in (frames, height, width)],
        "text_rope_pos": torch.arange(8),
        **common(),
        "timestep": torch.tensor([500.0]),
    }


def tiny_animatediff() -> nn.Module:
    """Its motion modules, which mix the frames of one place, add nothing."""
    model = build(
        "UNetMotionModel",
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        num_attention_heads=2,
        motion_num_attention_heads=2,
    )
    for name, part in model.named_modules():
        if "motion_modules" in name and name.endswith("proj_out"):
            for parameter in part.parameters():
                parameter.data.zero_()
    return model


def animatediff_inputs(*grid: int) -> dict[str, Any]:
    """The text is repeated for each frame."""
    inputs = {"sample": noise(1, 4, *grid), **common(), "timestep": torch.tensor(500)}
    return inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"].expand(grid[0], -1, -1)}
