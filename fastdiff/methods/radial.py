"""Radial attention: near frames whole, far frames in a band that halves as the distance in time doubles."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from fastdiff_kernels import BlockPlan, Grid, InvalidInputError, Rule, TokenLayout, centred, raster_order, snake_order
from fastdiff_kernels.on_cpu import on_cpu

from .base import (
    BLOCK_SIZES,
    MethodConfig,
    below_floor,
    block_on,
    check_choice,
    check_density,
    check_number,
    check_unknowns,
    largest_within,
    smaller_blocks,
)
from .radial_reference import reference_plan

MODES = ("tiled", "raster", "reference")

# The METRIC rule squares distances in int32.
_FARTHEST = 46_340

# In such steps for_density solves its settings.
_STEPS = 1024


@dataclass(frozen=True)
class RadialConfig(MethodConfig):
    """Attention energy decays with the distance in time, so a query looks at fewer places of farther frames.

    Frames at a distance d share the width `decay_factor * S / 2^floor(log2 d)` of their S tokens; frame 0 is a
    sink that all see. Compute grows as n log n with the number of frames.

        query frame 3    frame 0    1         2         3         4         5         6         7
                         #######    ..###..   #######   #######   #######   ..###..   ..###..   ...#...
                         sink       d = 2     near      own       near      d = 2     d = 3     d = 4

    Reference: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video
    Generation", arXiv 2506.19852.

    Args:
        decay_factor: Width of the bands at distance 2 and more, 0 to 1. Smaller is faster, larger is safer.
        near_width: Share of the neighbouring frames (distance 1) that is seen, 0 to 1. Smaller is faster.
        sink: Whether all queries see the whole first frame. True is safer (Wan), False faster (HunyuanVideo).
        block_size: Tokens in a block, 32, 64 or 128; small grids take 32 or 64 at most, except in `reference`.
            Smaller follows the bands more closely, larger runs faster for each block.
        mode: `"tiled"`: blocks are compact 2-D patches, and a disc of them around the query's is computed, of as
            many pairs as the raster band has. `"raster"`: blocks are runs of raster tokens, as in the paper.
            Both take any size, fit blocks to frames, and compute each chosen block whole. `"reference"`:
            bit-exact with the released code, whose widths jump at powers of two and whose blocks cross frames.

    Raises:
        InvalidInputError: If a value is of the wrong kind or out of its range; it says which.
    """

    method: ClassVar[str] = "radial"

    decay_factor: float = 1.0
    near_width: float = 1.0
    sink: bool = True
    block_size: int = 128
    mode: str = "tiled"

    def __post_init__(self):
        check_number("decay_factor", self.decay_factor, 0, 1)
        check_number("near_width", self.near_width, 0, 1)
        check_choice("sink", self.sink, (True, False))
        check_choice("block_size", self.block_size, BLOCK_SIZES)
        check_choice("mode", self.mode, MODES)

    @on_cpu
    def build_plan(self, layout: TokenLayout) -> BlockPlan:
        """The plan for one layout, on the CPU.

        Raises:
            InvalidInputError: If a frame has too many tokens for `raster`, or is too long for `tiled`.
            UnsupportedError: If `reference` meets text before the video.
        """
        grid = layout.grid
        if self.mode == "reference":
            return reference_plan(self, layout)
        block = self.block_for(grid)
        tiled = self.mode == "tiled"
        if not tiled and grid.frame_tokens > _FARTHEST:
            raise InvalidInputError(
                f"frames of {grid.height}x{grid.width} have {grid.frame_tokens} tokens; mode 'raster' takes "
                f"{_FARTHEST} at most. Use mode 'tiled'."
            )
        if tiled and math.hypot(grid.height, grid.width) > _FARTHEST:
            raise InvalidInputError(
                f"frames of {grid.height}x{grid.width} are too long: mode 'tiled' takes a diagonal of {_FARTHEST} "
                "tokens at most. Use mode 'reference'."
            )
        widths = self.widths(grid)
        limits = disc_limits(grid, widths) if tiled else torch.where(widths < 0, -1, widths * widths)
        rule = Rule.metric(limits, b=int(tiled), sink_frames=int(self.sink))
        order = snake_order if tiled else raster_order
        return BlockPlan.from_rule(layout, rule, block_q=block, block_k=block, grid_order=centred(order))

    def block_for(self, grid: Grid) -> int:
        """The block size on this grid: below 8,192 tokens at most 64, below 4,096 at most 32, but in mode reference."""
        return self.block_size if self.mode == "reference" else block_on(grid, self.block_size)

    def widths(self, grid: Grid) -> torch.Tensor:
        """For each distance in frames the width w, int64 `[frames]`: blocks fewer than w tokens apart are computed.

        -1 skips the frame: where a band would be thinner than a block it saves nothing more, so that of every
        few frames only one is kept.
        """
        tokens, block = grid.frame_tokens, self.block_for(grid)
        widths = [tokens, max(1, round(self.near_width * tokens))]
        for distance in range(2, grid.frames):
            halvings = distance.bit_length() - 1
            period = -(-block * 2**halvings // tokens)
            width = max(1, round(self.decay_factor * tokens / 2**halvings))
            widths.append(width if distance % period == 0 else -1)
        return torch.tensor(widths[: grid.frames])

    @classmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> RadialConfig:
        """The least sparse config whose plan stays within a density; whole blocks may leave it well below.

        It lowers the decay factor first, then `near_width`, and gives up the sink last, unless `sink` is given.

        Args:
            density: Computed share of the scores, text included, above 0 and up to 1.
            grid: The token grid of the run.
            text_tokens: Text tokens in the same sequence.
            **settings: `block_size`, `mode` and `sink`, if they are not the defaults.

        Raises:
            InvalidInputError: If the density is out of range, or below the floor of this grid, which is named.
        """
        check_density(density)
        check_unknowns(settings, "decay_factor", "near_width")
        layout = TokenLayout.self_attention(grid, text_after=text_tokens)

        def reached(config: RadialConfig) -> float:
            return config.build_plan(layout).density()

        config = cls(**settings)
        for sink in (settings["sink"],) if "sink" in settings else (True, False):
            config = replace(config, decay_factor=1.0, near_width=1.0, sink=sink)
            for name in ("decay_factor", "near_width"):
                lowest = replace(config, **{name: 0.0})
                if reached(lowest) <= density:

                    def within(step: int, config=config, name=name) -> bool:
                        return reached(replace(config, **{name: step / _STEPS})) <= density

                    return replace(config, **{name: largest_within(_STEPS, within) / _STEPS})
                config = lowest
        floor = reached(config)
        block = config.block_for(grid)
        if grid.frames == 1:
            instead = "radial leaves out nothing within a frame: take neighborhood, clear, paro or agent"
        else:
            instead = f"use more frames or {smaller_blocks(block, 'more tokens a frame')}"
        raise below_floor(cls.method, density, grid, floor, f"with blocks of {block}", instead)


def disc_limits(grid: Grid, widths: torch.Tensor) -> torch.Tensor:
    """Squared radii whose discs hold as many pairs of a frame's tokens as the raster bands do, int32 `[frames]`."""
    dy, dx = torch.arange(grid.height), torch.arange(grid.width)
    # Each offset stands for itself and its mirror images; at 0 an image is the offset itself.
    pairs_y = (grid.height - dy) * torch.where(dy > 0, 2, 1)
    pairs_x = (grid.width - dx) * torch.where(dx > 0, 2, 1)
    squares = (dy[:, None] ** 2 + dx[None] ** 2).flatten()
    squares, place = squares.unique(return_inverse=True)
    pairs = (pairs_y[:, None] * pairs_x[None]).flatten().double()
    within = torch.zeros(len(squares), dtype=torch.float64).index_add_(0, place, pairs).cumsum(0)
    reach = widths - 1
    band = grid.frame_tokens * (2 * reach + 1) - reach * (reach + 1)
    limits = squares[torch.searchsorted(within, band.double()).clamp(max=len(squares) - 1)] + 1
    return torch.where(widths < 0, -1, limits).to(torch.int32)
