"""Neighborhood attention: every query sees a box of its nearest keys, with stride, dilation and causal axes."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from fastdiff_kernels import BlockPlan, Grid, InvalidInputError, TokenLayout
from fastdiff_kernels.box import Axes, BoxAxis, box_order, box_rule, choose_tile

from .base import MethodConfig, check_choice, check_density, largest_within

log = logging.getLogger("fastdiff")

_AXES = ("frames", "height", "width")
_BLOCKS = (32, 64, 128)


@dataclass(frozen=True)
class NeighborhoodConfig(MethodConfig):
    """A query sees the `window` keys nearest to it on each axis; at a border the window shifts inwards.

    With a stride, neighbouring queries share the window of their group's leader, so that whole tiles see the same
    keys. With a dilation d, a query sees every d-th token. A causal axis ends at the query.

        window 5        . . # # Q # # . .        stride 3       . # # Q # # . . .
        at a border     Q # # # # . . . .        (a group)      . # # # Q # . . .
        dilation 2      # . # . Q . # . #        causal         . # # # # # Q . .

    References: Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001; Hassani et al.,
    "Generalized Neighborhood Attention", arXiv 2504.16922.

    Args:
        window: Keys on each axis of the grid (frames, height, width; a picture takes 2, a sequence 1), at least 2;
            None is the whole axis. Smaller is faster, larger is safer.
        stride: Queries that share a window, 1 to the window, one number or one for each axis. Larger is faster.
        dilation: Distance of the keys on each axis, likewise.
        causal: Whether a query sees no later key, likewise.
        block_size: Tokens in a block, 32, 64 or 128.
        small_grid: What to do on an axis shorter than window x dilation: `"warn"` clips the window to the axis,
            `"error"` raises. Axes of one token are exempt.
    """

    method: ClassVar[str] = "neighborhood"

    window: tuple[int | None, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    block_size: int = 128
    small_grid: str = "warn"

    def __post_init__(self):
        for name in ("window", "stride", "dilation", "causal"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        window = self.window
        if not isinstance(window, tuple) or not 1 <= len(window) <= 3:
            raise InvalidInputError(f"window is {window!r}; give 1 to 3 numbers, such as (18, 24, 24).")
        for width in window:
            if width is not None and not _whole(width, 2):
                raise InvalidInputError(f"window is {window!r}; each axis takes None or a whole number from 2.")
        for name, low in (("stride", 1), ("dilation", 1), ("causal", None)):
            values = self._per_axis(name)
            fits = all(isinstance(v, bool) if low is None else _whole(v, low) for v in values)
            if len(values) != len(window) or not fits:
                kind = "True or False" if low is None else "a whole number from 1"
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)!r}; give {kind}, or one for each of the {len(window)} axes."
                )
        for width, stride in zip(window, self._per_axis("stride"), strict=True):
            if width is not None and stride > width:
                raise InvalidInputError(f"stride {stride} is larger than its window {width}; give at most the window.")
        check_choice("block_size", self.block_size, _BLOCKS)
        check_choice("small_grid", self.small_grid, ("warn", "error"))

    def build_plan(self, layout: TokenLayout) -> BlockPlan:
        """The plan for one layout, on the CPU.

        Raises:
            InvalidInputError: If the window has fewer axes than the grid, or does not fit it and `small_grid` is
                `"error"`.
        """
        axes = self.axes(layout.grid)
        tile = choose_tile(axes, self.block_size)
        return BlockPlan.from_rule(
            layout,
            box_rule(axes),
            block_q=self.block_size,
            block_k=self.block_size,
            grid_order=box_order(axes, tile),
        )

    @classmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> NeighborhoodConfig:
        """The largest window, of one share of every axis, whose plan stays within a density.

        Args:
            density: Computed share of the scores, text included, above 0 and up to 1.
            grid: The token grid of the run.
            text_tokens: Text tokens in the same sequence.
            **settings: `stride`, `block_size` and the like.

        Raises:
            InvalidInputError: If the density is out of range, or below the floor of this grid, which is named.
        """
        check_density(density)
        layout = TokenLayout.self_attention(grid, text_after=text_tokens)
        longest = max(grid.frames, grid.height, grid.width)

        def config(step: int) -> NeighborhoodConfig:
            sides = (grid.frames, grid.height, grid.width)
            window = tuple(None if side < 3 else max(2, side * step // longest) for side in sides)
            return cls(window, **settings)

        def reached(step: int) -> float:
            return config(step).build_plan(layout).density()

        if reached(0) > density:
            raise InvalidInputError(
                f"density {density:g} is below the floor of neighborhood on a grid of {grid}, which is "
                f"{reached(0):.4f}; ask for that or more, or give a smaller block_size."
            )
        return config(largest_within(longest, lambda step: reached(step) <= density))

    def axes(self, grid: Grid) -> Axes:
        """What each axis of a grid sees."""
        lengths = (grid.frames, grid.height, grid.width)
        extra = 3 - len(self.window)
        if any(length > 1 for length in lengths[:extra]):
            raise InvalidInputError(
                f"window {self.window} has {len(self.window)} axes and the grid is {grid}; give one number for each "
                "axis, None for a whole one."
            )
        settings = [(None, 1, 1, False)] * extra
        settings += zip(self.window, *(self._per_axis(name) for name in ("stride", "dilation", "causal")), strict=True)
        axes = (
            self._axis(*axis, *setting)
            for axis, setting in zip(zip(_AXES, lengths, strict=True), settings, strict=True)
        )
        return tuple(axes)

    def _axis(self, name: str, length: int, width: int | None, stride: int, dilation: int, causal: bool) -> BoxAxis:
        if length == 1:
            width = stride = dilation = 1
        elif width is None:
            width = length // dilation
        elif width * dilation > length:
            message = (
                f"window {width} with dilation {dilation} spans {width * dilation} tokens and the grid has {length} on "
                f"its {name} axis"
            )
            if self.small_grid == "error":
                raise InvalidInputError(f"{message}; give a smaller window or dilation, None, or small_grid='warn'.")
            dilation = min(dilation, max(1, length // 2))
            width = length // dilation
            log.warning("%s; clipped to a window of %d with dilation %d.", message, width, dilation)
        return neighborhood_axis(length, width, min(stride, width), dilation, causal)

    def _per_axis(self, name: str) -> tuple:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.window)


def neighborhood_axis(length: int, window: int, stride: int = 1, dilation: int = 1, causal: bool = False) -> BoxAxis:
    """First and last key of every query on one axis, group after group where it is dilated.

    Args:
        length: Tokens on the axis.
        window, stride: In tokens of a dilation group.
        dilation: Groups; token i belongs to group i mod dilation.
        causal: Whether the window ends at the query.
    """
    first, last, natural, pieces = [], [], [], []
    for group in range(dilation):
        size, start = math.ceil((length - group) / dilation), sum(pieces)
        query = torch.arange(size)
        if causal:
            leader = (query // stride * stride + stride - 1).clamp(max=size - 1)
            low, high = (leader - window + 1).clamp(min=0), query
        else:
            leader = (query // stride * stride + stride // 2).clamp(max=size - 1)
            # A group may be one token longer than the shortest, which a window of the whole axis must fill too.
            low = (leader - window // 2).clamp(min=0).clamp(max=size - window)
            high = low + window - 1
        first.append(low + start)
        last.append(high + start)
        natural.append(group + query * dilation)
        pieces.append(size)
    return BoxAxis(torch.cat(first), torch.cat(last), torch.cat(natural), tuple(pieces))


def _whole(value, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
