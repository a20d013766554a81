"""The attention calls that `fastdiff bench kernels` times, and the methods on each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastdiff.methods import AgentConfig, ClearConfig, MethodConfig, NeighborhoodConfig, RadialConfig
from fastdiff.methods.paro import paro_plan
from fastdiff.methods.paro_file import blocks_of
from fastdiff_kernels import FULL, BlockPlan, Grid, Rule, TokenLayout, arrange_sides
from fastdiff_kernels.axis_order import AXIS_ORDERS


@dataclass(frozen=True)
class RandomParo:
    """A plan of PARO's form without a calibration: blocks chosen at random for each head, in all of its orders."""

    heads: int
    kept: float

    def build_plan(self, layout: TokenLayout) -> BlockPlan:
        blocks = blocks_of(layout.grid)
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(self.heads, blocks, blocks, generator=generator) < self.kept
        return paro_plan(layout, [head % len(AXIS_ORDERS) for head in range(self.heads)], mask)


@dataclass(frozen=True)
class RandomBlocks:
    """Blocks of 128 tokens in their own order, chosen at random for each head and computed whole."""

    heads: int
    kept: float

    def build_plan(self, layout: TokenLayout) -> BlockPlan:
        query, key = arrange_sides(layout, (128, 128))
        generator = torch.Generator().manual_seed(0)
        kept = torch.rand(self.heads, query.blocks, key.blocks, generator=generator) < self.kept
        return BlockPlan.from_states(query, key, kept * FULL, Rule.none())


@dataclass(frozen=True)
class EveryBlock:
    """All blocks of 128 tokens in their own order, text and grid without padding between them: dense attention."""

    def build_plan(self, layout: TokenLayout) -> BlockPlan:
        query, key = arrange_sides(layout, (128, 128), aligned=False)
        return BlockPlan.from_states(query, key, torch.full((1, query.blocks, key.blocks), FULL), Rule.none())


_Config = MethodConfig | RandomParo | RandomBlocks | EveryBlock


@dataclass(frozen=True)
class Shape:
    """One attention call.

    Attributes:
        name: What `--shape` takes and records carry.
        what: Where such a call comes from.
        configs: Makes the methods to time; called late, since solving for a density takes a while.
        text: Text tokens before the grid.
        backward: Whether gradients are timed too.
        reorder: Whether the reorder of the tokens is timed by itself, in the order of the first method.
    """

    name: str
    what: str
    grid: Grid
    heads: int
    head_dim: int
    configs: Callable[[], tuple[_Config, ...]]
    dtype: torch.dtype = torch.bfloat16
    text: int = 0
    backward: bool = False
    reorder: bool = False

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout.self_attention(self.grid, text_before=self.text)

    @property
    def tokens(self) -> int:
        return self.grid.tokens + self.text


_WAN, _HUNYUAN, _COG = Grid(21, 45, 80), Grid(30, 48, 80), Grid(13, 30, 45)
_PICTURE_4K, _PICTURE_8K = Grid(1, 256, 256), Grid(1, 512, 512)


def _on_wan() -> tuple[_Config, ...]:
    tiled, reference = (RadialConfig.for_density(0.2, _WAN, mode=mode) for mode in ("tiled", "reference"))
    return tiled, RadialConfig(decay_factor=0.2), reference, RandomBlocks(40, 0.2), EveryBlock()


def _boxes(window: tuple[int, ...], stride: tuple[int, ...]) -> tuple[MethodConfig, ...]:
    return NeighborhoodConfig(window), NeighborhoodConfig(window, stride=stride)


GPU_SHAPES: tuple[Shape, ...] = (
    Shape("W", "Wan2.1-14B, 81 frames of 1280x720", _WAN, 40, 128, _on_wan),
    Shape(
        "W-8-heads",
        "the same with fewer heads, and its gradients",
        _WAN,
        8,
        128,
        lambda: (RadialConfig.for_density(0.2, _WAN), RadialConfig(decay_factor=0.2)),
        backward=True,
    ),
    Shape(
        "W-509-frames",
        "the same fewer heads, 509 frames",
        Grid(128, 45, 80),
        8,
        128,
        lambda: (RadialConfig(decay_factor=0.2),),
    ),
    Shape(
        "wan-1.3b",
        "Wan2.1-1.3B, 81 frames of 832x480",
        Grid(21, 30, 52),
        12,
        128,
        lambda: (RadialConfig(decay_factor=0.2),),
    ),
    Shape(
        "hunyuan",
        "117 frames of 1280x768, without text",
        _HUNYUAN,
        24,
        128,
        lambda: _boxes((18, 24, 24), (16, 8, 8)),
        reorder=True,
    ),
    Shape("flux-4k", "4096x4096, without text", _PICTURE_4K, 24, 128, lambda: _boxes((80, 80), (16, 16))),
    Shape("flux-8k", "8192x8192 and its text", _PICTURE_8K, 24, 128, lambda: (ClearConfig(8),), text=512),
    Shape(
        "cogvideox",
        "49 frames of 720x480 and its text",
        _COG,
        48,
        64,
        lambda: (RadialConfig.for_density(0.3, _COG, text_tokens=226), RandomParo(48, 0.3), EveryBlock()),
        text=226,
    ),
    Shape(
        "sd-1.5",
        "the finest level at 1024x1024",
        Grid(1, 128, 128),
        8,
        40,
        lambda: (AgentConfig((32, 32), steps=(0.0, 1.0)),),
    ),
    *(
        Shape(f"head-dim-{dim}", "another head dim", _COG, 24, dim, lambda: (EveryBlock(),))
        for dim in (40, 48, 80, 96, 256)
    ),
)

_SMALL = Grid(32, 16, 16)

CPU_SHAPES: tuple[Shape, ...] = tuple(
    Shape(
        f"portable-{head_dim}",
        "for the portable backend",
        _SMALL,
        heads,
        head_dim,
        lambda: (RadialConfig.for_density(0.25, _SMALL),),
        torch.float32,
    )
    for heads, head_dim in ((8, 64), (12, 128))
)
