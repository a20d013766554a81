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

    def tiles(self, side: int) -> Cut:
        """The axis in tiles of `side`, each piece padded to whole tiles."""
        slots = self.slots(side)
        return Cut(slots[:, 0].contiguous(), slots.amax(1))

    def touched(self, query: Cut, key: Cut) -> Runs:
        """The parts of `key` that each part of `query` sees at all."""
        start = torch.searchsorted(key.last, self.first[query.first])
        return start, torch.searchsorted(key.first, self.last[query.last], right=True)

    def whole(self, query: Cut, key: Cut) -> Runs:
        """The parts of `key` that every query of each part of `query` sees whole; padding is not looked at."""
        start = torch.searchsorted(key.first, self.first[query.last])
        stop = torch.searchsorted(key.last, self.last[query.first], right=True)
        return start, torch.maximum(start, stop)


@dataclass(frozen=True, eq=False)
class Cut:
    """An axis cut into parts: first and last coordinate of each, int64 `[parts]`, ascending."""

    first: torch.Tensor
    last: torch.Tensor

    @property
    def sizes(self) -> torch.Tensor:
        return self.last - self.first + 1


Runs = tuple[torch.Tensor, torch.Tensor]
"""For each part the first part it meets and one past the last: what a query sees of an axis is one run."""

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
        full_share: Share of the visited tiles whose queries all see all of its keys; padded ones among them need a
            test of bounds alone.
        flop_bound: Speed-up if only kept pairs cost time, 1 / true_density.
        bound: Speed-up of attention if the worst query tile sets the time, 1 / worst_density.
        perfect: Whether every visited tile is full, so that no pair is computed in vain.
        padding: Pairs of slots / pairs of tokens. Densities and bound are those among tiles, padded ones included;
            against dense attention without padding the bound is less by this factor.
    """

    true_density: float
    visited_density: float
    worst_density: float
    full_share: float
    flop_bound: float
    bound: float
    perfect: bool
    padding: float

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
    true = visited = worst = full = padding = 1.0
    for axis, query_side, key_side in zip(axes, query_tile, key_tile, strict=True):
        query, key = axis.tiles(query_side), axis.tiles(key_side)
        touched = _count(axis.touched(query, key))
        rows = touched / len(key.first)
        true *= float((axis.last - axis.first + 1).double().mean()) / len(axis.first)
        visited *= float(rows.mean())
        worst *= float(rows.max())
        full *= float(_count(axis.whole(query, key)).sum() / touched.sum())
        padding *= len(query.first) * query_side * len(key.first) * key_side / len(axis.first) ** 2
    return Simulation(true, visited, worst, full, 1 / true, 1 / worst, full == 1.0, padding)


def worst_share(axis: BoxAxis, query_side: int, key_side: int) -> float:
    """The axis's factor of worst density x padding, so that tiles of unlike sides compare."""
    query, key = axis.tiles(query_side), axis.tiles(key_side)
    visited = int(_count(axis.touched(query, key)).max()) * key_side
    return visited * len(query.first) * query_side / len(axis.first) ** 2


def choose_tile(axes: Axes, tokens: int) -> Tile:
    """The box of `tokens` tokens (a power of two) whose computed tiles cover least, padding included."""
    powers = [1 << n for n in range(tokens.bit_length())]
    tiles = [(t, y, tokens // (t * y)) for t in powers for y in powers if t * y <= tokens]
    # Among equals the most cubic one, whose loads are the most alike.
    return min(tiles, key=lambda tile: (touched_tiles(axes, tile), max(tile)))


def touched_tiles(axes: Axes, tile: Tile) -> int:
    """Pairs of tiles, of equal shape for queries and keys, in which anything is computed."""
    cuts = [axis.tiles(side) for axis, side in zip(axes, tile, strict=True)]
    return math.prod(int(_count(axis.touched(cut, cut)).sum()) for axis, cut in zip(axes, cuts, strict=True))


def full_tiles(axes: Axes, tile: Tile) -> int:
    """Those among them that need no test."""
    cuts = [(axis, axis.tiles(side), side) for axis, side in zip(axes, tile, strict=True)]
    return math.prod(int(_filled(axis, cut, cut, side).sum()) for axis, cut, side in cuts)


def _count(runs: Runs) -> torch.Tensor:
    return (runs[1] - runs[0]).double()


def _filled(axis: BoxAxis, query: Cut, key: Cut, side: int) -> torch.Tensor:
    """How many tiles without padding each part of `query` sees whole, float64 `[parts]`."""
    filled = torch.nn.functional.pad((key.sizes == side).cumsum(0), (1, 0))
    start, stop = axis.whole(query, key)
    return (filled[stop] - filled[start]).double()
