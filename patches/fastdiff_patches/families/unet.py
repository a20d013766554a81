"""UNets: each layer has the grid of its level."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdiff_kernels import Grid, TokenLayout

from ..planner import NEEDS
from .base import Family, reads
from .reading import latent_sizes


def _picture(config: Any, inputs: Mapping[str, Any]) -> Grid:
    return Grid(*latent_sizes(inputs, "batch, channels, height, width", "sample"))


def _frames(config: Any, inputs: Mapping[str, Any]) -> Grid:
    return Grid(*latent_sizes(inputs, "batch, channels, frames, height, width", "sample"))


def _unet_level(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    part, index, *_ = name.split(".")
    level = len(config.down_block_types) - 1
    if part != "mid_block":
        level = int(index) if part == "down_blocks" else level - int(index)
    # A strided convolution with padding on one side only drops the last row of an odd number.
    rounding = 0 if getattr(config, "downsample_padding", 1) == 0 else 1
    height, width = layout.grid.height, layout.grid.width
    for _ in range(level):
        height, width = (height + rounding) // 2, (width + rounding) // 2
    return TokenLayout.self_attention(Grid(1, height, width))


_UNET = Family(
    "unet",
    re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\.\d+\.attn1"),
    reads(_picture),
    at=_unet_level,
    levels=True,
    latents="sample",
    supplies=frozenset(NEEDS),
)


FAMILIES: dict[str, Family] = {
    "UNet2DConditionModel": _UNET,
    # AnimateDiff: its motion modules attend over the frames of one place, which costs next to nothing, and stay dense.
    "UNetMotionModel": replace(_UNET, name="unet-motion", layout=reads(_frames)),
}
