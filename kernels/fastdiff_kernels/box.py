"""Tiles of a BOX rule, axis by axis: token order in boxes, which box suits a grid, and what it will cost.

A box rule is an AND over the axes t, y, x, and so is everything about its tiles: counts multiply over the axes, so
that the cost of a setting is known without building its plan.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .errors import InvalidInputError
from .layout import Grid
from .order import GridOrder
from .rule import Rule

Tile = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class BoxAxis:
    """One axis: the keys that each coordinate sees, and the pieces that tiles do not cross.

    Coordinates are sorted by piece (dilation group), so that what a query sees is always one run.

    Attributes:
        first, last: First and last key coordinate of every query coordinate, int64 `[length]`, never decreasing.
        natural: Place on the grid's axis of every coordinate, int64 `[length]`.
        pieces: Lengths of the pieces, in order.
    """

    first: torch.Tensor
    last: torch.Tensor
    natural: torch.Tensor
    pieces: tuple[int, ...]

    def slots(self, side: int) -> torch.Tensor:
        """Coordinates in tiles of `side`, each piece padded with -1 to whole tiles, int64 `[tiles, side]`."""
        parts, start = [], 0
        for length in self.pieces:
            part = torch.arange(start, start + length)
            parts.append(torch.nn.functional.pad(part, (0, -length % side), value=-1))
            start += length
        return torch.cat(parts).unflatten(0, (-1, side))

    def pairs(self, query_side: int, key_side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which key tiles each query tile touches, and which of them every query sees whole, bool `[tiles, tiles]`."""
        query, key = self.slots(query_side), self.slots(key_side)
        low, high = query[:, 0], query.amax(1)
        k_low, k_high = key[None, :, 0], key.amax(1)[None]
        touched = (k_low <= self.last[high][:, None]) & (k_high >= self.first[low][:, None])
        whole = (k_low >= self.first[high][:, None]) & (k_high <= self.last[low][:, None])
        return touched, touched & whole & (key >= 0).all(1)[None]


Axes = tuple[BoxAxis, BoxAxis, BoxAxis]


def box_rule(axes: Axes) -> Rule:
    """The rule of three axes."""
    return Rule.box(tuple(axis.first for axis in axes), tuple(axis.last for axis in axes))


def box_order(axes: Axes, tile: Tile) -> GridOrder:
    """Tokens in boxes of `tile`, so that each block is one box; coordinates are those of the axes."""

    def order(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        if block != math.prod(tile):
            raise InvalidInputError(f"a tile of {tile} has {math.prod(tile)} tokens; the block has {block}.")
        places = [axis.slots(side) for axis, side in zip(axes, tile, strict=True)]
        shape = [n for place in places for n in place.shape]
        t, y, x = (
            place.reshape([n if i // 2 == axis else 1 for i, n in enumerate(shape)]).expand(shape)
            for axis, place in enumerate(places)
        )
        coordinates = torch.stack([t, y, x], dim=-1).permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, 3)
        exists = (coordinates >= 0).all(1)
        coordinates = coordinates.clamp(min=0)
        on_grid = [axis.natural[column] for axis, column in zip(axes, coordinates.unbind(1), strict=True)]
        token = (on_grid[0] * grid.height + on_grid[1]) * grid.width + on_grid[2]
        return torch.where(exists, token, -1), coordinates.to(torch.int32)

    return order


@dataclass(frozen=True)
class Simulation:
    """What a box rule costs on a grid with given tiles.

    Attributes:
        true_density: Share of pairs that the rule keeps.
        visited_density: Computed tiles / tiles of dense attention, over all query tiles.
        worst_density: The same of the query tile that visits most.
        full_share: Share of the visited tiles that need no test.
        flop_bound: Speed-up if only kept pairs cost time, 1 / true_density.
        bound: Speed-up of attention if the worst query tile sets the time, 1 / worst_density.
        perfect: Whether every visited tile is full: nothing is wasted and nothing tested.
    """

    true_density: float
    visited_density: float
    worst_density: float
    full_share: float
    flop_bound: float
    bound: float
    perfect: bool

    def end_to_end(self, attention_share: float) -> float:
        """Speed-up of a model that spends this share of its time in attention.

        Raises:
            InvalidInputError: If the share is not between 0 and 1.
        """
        if not 0 <= attention_share <= 1:
            raise InvalidInputError(f"attention share is {attention_share!r}; it must be from 0 to 1.")
        return 1 / (1 - attention_share + attention_share / self.bound)


def simulate(axes: Axes, query_tile: Tile, key_tile: Tile) -> Simulation:
    """Counts tiles axis by axis (arXiv 2504.16922 calls this the analytical model; its tool is not public)."""
    true = visited = worst = full = 1.0
    for axis, query_side, key_side in zip(axes, query_tile, key_tile, strict=True):
        touched, whole = axis.pairs(query_side, key_side)
        rows = touched.double().mean(1)
        true *= float((axis.last - axis.first + 1).double().mean()) / len(axis.first)
        visited *= float(rows.mean())
        worst *= float(rows.max())
        full *= float(whole.sum() / touched.sum())
    return Simulation(true, visited, worst, full, 1 / true, 1 / worst, full == 1.0)


def choose_tile(axes: Axes, tokens: int) -> Tile:
    """The box of `tokens` tokens (a power of two) whose computed tiles cover least, padding included."""
    powers = [1 << n for n in range(tokens.bit_length())]
    tiles = [(t, y, tokens // (t * y)) for t in powers for y in powers if t * y <= tokens]

    def cost(tile: Tile) -> tuple[float, int]:
        area = math.prod(int(axis.pairs(side, side)[0].sum()) * side**2 for axis, side in zip(axes, tile, strict=True))
        # Among equals the most cubic one, whose loads are the most alike.
        return area, max(tile)

    return min(tiles, key=cost)
