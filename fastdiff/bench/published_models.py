"""Published models as their configs on the Hub describe them, and the inputs of one denoising forward of each.

Sizes are those at which the authors show them. Text is as long as the pipeline pads it to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastdiff_kernels import Grid

Inputs = dict[str, Any]


class Draw:
    """Random inputs on one device; every model gets the same numbers in every run."""

    def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16):
        self.device, self.dtype = device, dtype
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

    def __call__(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._generator, device=self.device, dtype=self.dtype)

    def number(self, value: float, dtype: torch.dtype | None = None) -> torch.Tensor:
        """One for the one sample of the batch."""
        return torch.tensor([value], device=self.device, dtype=dtype or self.dtype)

    def first(self, count: int, of: int) -> torch.Tensor:
        """A mask of the words of a prompt among those it is padded to, bool `[1, of]`."""
        return (torch.arange(of, device=self.device) < count)[None]


# Words of an ordinary prompt; the rest is padding.
WORDS = 77


def wan_inputs(grid: Grid) -> Callable[[Draw], Inputs]:
    def inputs(draw: Draw) -> Inputs:
        return {
            "hidden_states": draw(1, 16, grid.frames, 2 * grid.height, 2 * grid.width),
            "timestep": draw.number(500, torch.int64),
            "encoder_hidden_states": draw(1, 512, 4096),
        }

    return inputs


def hunyuan_inputs(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 16, 33, 90, 160),
        "timestep": draw.number(500, torch.int64),
        "encoder_hidden_states": draw(1, 256, 4096),
        "encoder_attention_mask": draw.first(WORDS, 256),
        "pooled_projections": draw(1, 768),
        "guidance": draw.number(6000),
    }


def cogvideox_inputs(draw: Draw) -> Inputs:
    angles = draw(13 * 30 * 45, 64).float()
    return {
        "hidden_states": draw(1, 13, 16, 60, 90),
        "timestep": draw.number(500, torch.int64),
        "encoder_hidden_states": draw(1, 226, 4096),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def mochi_inputs(draw: Draw) -> Inputs:
    return {
        "hidden_states": draw(1, 12, 28, 60, 106),
        "timestep": draw.number(500, torch.int64),
        "encoder_hidden_states": draw(1, 256, 4096),
        "encoder_attention_mask": draw.first(WORDS, 256),
    }


def flux_inputs(grid: Grid) -> Callable[[Draw], Inputs]:
    def inputs(draw: Draw) -> Inputs:
        # bfloat16 would round positions beyond 256.
        places = grid.coordinates().to(draw.device, torch.float32)
        return {
            "hidden_states": draw(1, grid.tokens, 64),
            "timestep": draw.number(0.5),
            "encoder_hidden_states": draw(1, 512, 4096),
            "pooled_projections": draw(1, 768),
            "guidance": draw.number(3.5),
            "img_ids": places,
            "txt_ids": torch.zeros(512, 3, device=draw.device),
        }

    return inputs


def sdxl_inputs(draw: Draw) -> Inputs:
    return {
        "sample": draw(1, 4, 128, 128),
        "timestep": draw.number(500, torch.int64),
        "encoder_hidden_states": draw(1, 77, 2048),
        "added_cond_kwargs": {"text_embeds": draw(1, 1280), "time_ids": draw(1, 6)},
    }


_WAN = {
    "patch_size": (1, 2, 2),
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
WAN_14B = _WAN | {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
WAN_1B = _WAN | {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
HUNYUAN = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
    "rope_theta": 256.0,
    "rope_axes_dim": (16, 56, 56),
}
COGVIDEOX = {
    "num_attention_heads": 48,
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "time_embed_dim": 512,
    "text_embed_dim": 4096,
    "num_layers": 42,
    "sample_width": 90,
    "sample_height": 60,
    "sample_frames": 49,
    "max_text_seq_length": 226,
    "use_rotary_positional_embeddings": True,
}
MOCHI = {
    "patch_size": 2,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 48,
    "pooled_projection_dim": 1536,
    "in_channels": 12,
    "text_embed_dim": 4096,
    "time_embed_dim": 256,
    "max_sequence_length": 256,
}
FLUX = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    # The number of heads of each level; the published file calls it so too.
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
