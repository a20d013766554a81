"""Tiles of a METRIC rule: which token order makes the fewest of them, counted before any plan is built."""

from __future__ import annotations

import functools

import torch

from .box import BoxAxis, Tile, box_order
from .layout import Grid, Span
from .order import GridOrder, Side, snake_order
from .rule import Rule, classify

# Snakes are counted block by block; on grids of more blocks their gain, less padding, is nothing.
_SNAKE_BLOCKS = 1024


def choose_order(rule: Rule, grid: Grid, block: int, other_blocks: int = 0) -> GridOrder:
    """The token order under which a rule touches the fewest tiles: boxes of some shape, or a snake.

    Boxes are the more compact, snakes leave less padding: on large grids boxes win, on odd small ones snakes.

    Args:
        rule: A METRIC rule whose limits never rise with the distance in frames.
        grid: The grid of queries and keys.
        block: Slots in a block, a power of two.
        other_blocks: Blocks of text and the like, query and key side together, that each block of the grid meets.
    """
    powers = [1 << n for n in range(block.bit_length())]
    # A tile twice as long as the grid is half padding, whatever the rule.
    ts, ys = ([n for n in powers if n < 2 * length] for length in (grid.frames, grid.height))
    tiles = [(t, y, block // (t * y)) for t in ts for y in ys if t * y <= block]
    costs = {tile: _box_tiles(rule, grid, tile, other_blocks) for tile in tiles}
    best = min(tiles, key=lambda tile: (costs[tile], max(tile)))
    order, cost = box_tiles_order(best), costs[best]
    if grid.tokens <= _SNAKE_BLOCKS * block:
        for rows in [n for n in powers if block <= 16 * n * n <= 64 * block] + [None]:
            snake = functools.partial(snake_order, rows=rows)
            tiles_here = _counted_tiles(rule, grid, block, snake, other_blocks)
            if tiles_here < cost:
                order, cost = snake, tiles_here
    return order


def box_tiles_order(tile: Tile) -> GridOrder:
    """Tokens in boxes of `tile` on any grid, in natural coordinates."""

    def order(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        return box_order(tuple(_plain_axis(n) for n in (grid.frames, grid.height, grid.width)), tile)(grid, block)

    return order


def _plain_axis(length: int) -> BoxAxis:
    place = torch.arange(length)
    return BoxAxis(place, place, place, (length,))


def _box_tiles(rule: Rule, grid: Grid, tile: Tile, other_blocks: int) -> int:
    """Tiles that a rule touches where blocks are boxes: pairs of boxes so far apart, times whether that is near."""
    a, b = rule.parameters[:2].long()
    nearest, pairs, blocks = [], [], 1
    for length, side in zip((grid.frames, grid.height, grid.width), tile, strict=True):
        count = -(-length // side)
        apart = torch.arange(count)
        nearest.append(((apart - 1) * side + 1).clamp(min=0))
        pairs.append((count - apart) * torch.where(apart > 0, 2, 1))
        blocks *= count
    t, y, x = nearest
    near = a * y[:, None] ** 2 + b * x[None] ** 2 < rule.limits()[t][:, None, None]
    touched = (near * pairs[0][:, None, None] * pairs[1][:, None] * pairs[2]).sum()
    return int(touched) + blocks * other_blocks


def _counted_tiles(rule: Rule, grid: Grid, block: int, order: GridOrder, other_blocks: int) -> int:
    span = Span("grid", grid.tokens, grid)
    side = Side.arrange((span,), block, torch.zeros(1, 2, dtype=torch.int32), order)
    boxes = side.boxes()
    return int(classify(rule, boxes, boxes)[0].sum()) + side.blocks * other_blocks
