"""Radial attention as the authors' released code builds it: the same blocks, bit for bit, for comparisons.

Reference: the repository mit-han-lab/radial-attention, commit 72788d4, of arXiv 2506.19852.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from fastdiff_kernels import (
    EMPTY,
    FULL,
    BlockPlan,
    Grid,
    Rule,
    TokenLayout,
    UnsupportedError,
    arrange_sides,
)

if TYPE_CHECKING:
    from .radial import RadialConfig

# Bands thinner than this skip frames, whatever the block size.
_DECIMATION_TOKENS = 128


def reference_plan(config: RadialConfig, layout: TokenLayout) -> BlockPlan:
    """A plan of whole blocks; text and the tokens beyond the last whole block are a dense row and column.

    Raises:
        UnsupportedError: If text stands before the video, or does not see all and is seen by all.
    """
    usual = TokenLayout(layout.query, layout.key)
    if layout.query[0].kind != "grid" or layout.query != layout.key or layout.visibility != usual.visibility:
        raise UnsupportedError(
            "radial's mode 'reference' knows video alone or video before text, in self-attention where all see the "
            f"text; this layout is {', '.join(span.kind for span in layout.query)}. Use mode 'tiled' or 'raster'."
        )
    block = config.block_size
    query, key = arrange_sides(layout, (block, block), aligned=False)
    video = block_mask(config, layout.grid)
    state = torch.full((query.blocks, key.blocks), FULL, dtype=torch.uint8)
    state[: len(video), : len(video)] = torch.where(video, FULL, EMPTY)
    return BlockPlan.from_states(query, key, state[None], Rule.none())


def block_mask(config: RadialConfig, grid: Grid) -> torch.Tensor:
    """The released block mask, bool `[n // block, n // block]` for n video tokens."""
    tokens, block = grid.frame_tokens, config.block_size
    blocks = grid.tokens // block
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(grid.frames):
        row, row_rest = divmod(i * tokens, block)
        for j in range(grid.frames):
            width = _half_width(config, tokens, i, j)
            if width is None:
                continue
            column, column_rest = divmod(j * tokens, block)
            pair = _frame_pair(tokens, block, row_rest, column_rest, min(width, tokens))
            target = mask[row : row + len(pair), column : column + len(pair)]
            target |= pair[: target.shape[0], : target.shape[1]]
    return mask


def _half_width(config: RadialConfig, tokens: int, i: int, j: int) -> int | None:
    """Tokens on either side of the diagonal, or None where the frame is skipped."""
    distance = abs(i - j)
    if distance == 0 or (config.sink and j == 0):
        return tokens
    if distance == 1:
        return int(config.near_width * tokens)
    length = 2 ** tokens.bit_length() / 2 ** distance.bit_length()
    if length < _DECIMATION_TOKENS and distance % int(_DECIMATION_TOKENS // length):
        return None
    return int(max(config.decay_factor * length, config.block_size))


@lru_cache(maxsize=1024)
def _frame_pair(tokens: int, block: int, row_rest: int, column_rest: int, width: int) -> torch.Tensor:
    """Blocks of one frame pair on a canvas shifted to the global block grid, after the strict shrink.

    A block stays if more than 60 % of its columns that hold anything are more than a third full.
    """
    side = -(-tokens // block)
    key = torch.arange(tokens)
    edge = torch.arange(side)[:, None] * block - row_rest
    top = torch.maximum(edge.clamp(min=0), key - width)
    bottom = torch.minimum((edge + block).clamp(max=tokens), key + width + 1)
    canvas = torch.zeros(side, side * block + block, dtype=torch.int64)
    canvas[:, column_rest : column_rest + tokens] = (bottom - top).clamp(min=0)
    counts = canvas[:, : side * block].unflatten(1, (side, block))
    filled, any_filled = (3 * counts > block).sum(-1), (counts > 0).sum(-1)
    return 5 * filled > 3 * any_filled
