"""The six axis orders of a grid, and sides of a plan whose heads each have one of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .layout import Grid, TokenLayout
from .order import GridOrder, Side
from .plan import visibility_bits

AXIS_ORDERS = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
"""Frames, height and width, outermost first; a token order is stored as its place in this tuple."""


def axis_order(grid: Grid, which: int) -> torch.Tensor:
    """The tokens of a grid as they follow each other in one of `AXIS_ORDERS`, int64 `[tokens]`."""
    natural = torch.arange(grid.tokens).reshape(grid.frames, grid.height, grid.width)
    return natural.permute(["FHW".index(axis) for axis in AXIS_ORDERS[which]]).flatten()


def distinct_axis_orders(grid: Grid) -> tuple[int, ...]:
    """The orders that differ on this grid: an axis of one token may stand anywhere, so a picture has two."""
    long = {axis for axis, n in zip("FHW", (grid.frames, grid.height, grid.width), strict=True) if n > 1}
    found: dict[str, int] = {}
    for which, order in enumerate(AXIS_ORDERS):
        found.setdefault("".join(axis for axis in order if axis in long), which)
    return tuple(found.values())


def sides_by_head(layout: TokenLayout, block: int, orders: Sequence[int]) -> tuple[Side, Side]:
    """The query and the key side of a plan whose heads have orders of their own; spans fill whole blocks.

    Args:
        layout: Spans of both sides and who sees whom.
        block: Slots in a block.
        orders: For each head the place of its order in `AXIS_ORDERS`. Spans without a grid keep theirs.
    """
    query_bits, key_bits = visibility_bits(layout)
    return _side(layout.query, block, query_bits, orders), _side(layout.key, block, key_bits, orders)


def _side(spans, block: int, bits: torch.Tensor, orders: Sequence[int]) -> Side:
    sides = {which: Side.arrange(spans, block, bits, _grid_order(which)) for which in set(orders)}
    first = sides[orders[0]]
    if len(sides) == 1:
        return first
    # The tables differ in nothing but coordinates, which plans of whole blocks do not read.
    return Side(first.tokens, block, torch.cat([sides[which].order for which in orders]), first.table)


def _grid_order(which: int) -> GridOrder:
    def order_along_axes(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        order = axis_order(grid, which)
        return order, grid.coordinates()[order]

    return order_along_axes
