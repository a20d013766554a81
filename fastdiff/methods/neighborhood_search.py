"""Which strides and tiles of a neighborhood are worth using: those that raise the bound of its speed-up."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastdiff_kernels import Grid
from fastdiff_kernels.box import BoxAxis, Simulation, Tile, simulate, worst_share

from .neighborhood import NeighborhoodConfig
from .neighborhood_axis import AxisSetting

# Up to here every stride is tried, beyond it multiples of 8 and the window itself.
_ALL_STRIDES = 64


@dataclass(frozen=True)
class Found:
    """One setting worth using.

    Attributes:
        stride: For each axis of the config's window.
        query_tile, key_tile: Tiles under which it reaches its bound, in (frames, height, width).
        simulation: What it costs there.
    """

    stride: tuple[int, ...]
    query_tile: Tile
    key_tile: Tile
    simulation: Simulation


def default_tiles(grid: Grid) -> tuple[Tile, Tile]:
    """Query and key tile of the published kernels, 256 and 128 tokens, for a grid of as many axes."""
    if grid.frames > 1:
        return (4, 8, 8), (2, 8, 8)
    return ((1, 16, 16), (1, 16, 8)) if grid.height > 1 else ((1, 1, 256), (1, 1, 128))


def tiles_of(tokens: int, grid: Grid) -> list[Tile]:
    """Boxes of so many tokens (a power of two) whose sides are powers of two and less than twice the grid's.

    On a grid with fewer tokens than that there is one, the box that pads it least.
    """
    sides = (grid.frames, grid.height, grid.width)
    powers = [1 << n for n in range(tokens.bit_length())]
    boxes = [(t, y, tokens // (t * y)) for t in powers for y in powers if t * y <= tokens]
    fitting = [box for box in boxes if all(side == 1 or side < 2 * n for side, n in zip(box, sides, strict=True))]
    padded = [math.prod(-(-n // side) * side for side, n in zip(box, sides, strict=True)) for box in boxes]
    return fitting or [boxes[padded.index(min(padded))]]


def search(
    config: NeighborhoodConfig, grid: Grid, query_tiles: Sequence[Tile], key_tiles: Sequence[Tile]
) -> list[Found]:
    """Strides and tiles that raise the bound, less padding, over all that share a window among no more queries.

    Fewer queries that share a window are safer: the first of the list is as exact as can be, the last the fastest.

    Args:
        config: Window, dilation and causal axes; its stride is not looked at.
        grid: The token grid.
        query_tiles, key_tiles: Tiles to try, every pair of them.

    Returns:
        By rising bound / padding.
    """
    settings = config.axis_settings(grid)
    ladders = [_Ladder(setting) for setting in settings]
    best: dict[tuple[int, ...], tuple[float, Tile, Tile]] = {}
    for query, key in itertools.product(query_tiles, key_tiles):
        steps = [ladder.steps(*sides) for ladder, *sides in zip(ladders, query, key, strict=True)]
        for combined in itertools.product(*steps):
            stride = tuple(step for step, _ in combined)
            worst = math.prod(share for _, share in combined)
            if stride not in best or worst < best[stride][0]:
                best[stride] = (worst, query, key)
    found, lowest = [], math.inf
    for stride in sorted(best, key=lambda stride: (math.prod(stride), best[stride][0], stride)):
        worst, query, key = best[stride]
        # Products of floats: equal ones may differ in the last digit.
        if worst < lowest * (1 - 1e-9):
            axes = tuple(ladder.axis(step) for ladder, step in zip(ladders, stride, strict=True))
            found.append(Found(stride[-len(config.window) :], query, key, simulate(axes, query, key)))
            lowest = worst
    return found


class _Ladder:
    """The strides of one axis that lower the cost of its worst query tile."""

    def __init__(self, setting: AxisSetting):
        self._setting = setting
        self._axes: dict[int, BoxAxis] = {}
        self._steps: dict[tuple[int, int], list[tuple[int, float]]] = {}

    def axis(self, stride: int) -> BoxAxis:
        if stride not in self._axes:
            self._axes[stride] = replace(self._setting, stride=stride).axis()
        return self._axes[stride]

    def steps(self, query_side: int, key_side: int) -> list[tuple[int, float]]:
        """Stride and `worst_share`, the latter falling."""
        sides = (query_side, key_side)
        if sides not in self._steps:
            found: list[tuple[int, float]] = []
            for stride in self._strides():
                share = worst_share(self.axis(stride), *sides)
                if not found or share < found[-1][1]:
                    found.append((stride, share))
            self._steps[sides] = found
        return self._steps[sides]

    def _strides(self) -> list[int]:
        window = self._setting.window
        if window is None or window == self._setting.length:
            return [1]
        return sorted({*range(1, min(window, _ALL_STRIDES) + 1), *range(_ALL_STRIDES, window + 1, 8), window})
