"""Neighborhood attention: every query sees a box of its nearest keys, with stride, dilation and causal axes."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch

from fastdiff_kernels import BlockPlan, Grid, InvalidInputError, TokenLayout, UnsupportedError
from fastdiff_kernels.box import Axes, box_rule
from fastdiff_kernels.on_cpu import on_cpu
from fastdiff_kernels.order import GridOrder
from fastdiff_kernels.walk import choose_order

from .base import (
    BLOCK_SIZES,
    MethodConfig,
    below_floor,
    check_choice,
    check_density,
    check_unknowns,
    is_whole,
    largest_within,
    smaller_blocks,
)
from .neighborhood_axis import AxisSetting, scaled

log = logging.getLogger("fastdiff")

_AXES = ("frames", "height", "width")


@dataclass(frozen=True)
class NeighborhoodConfig(MethodConfig):
    """A query sees the `window` keys nearest to it on each axis; at a border the window shifts inwards.

    With a stride, neighbouring queries share the window of their group's leader, so that whole tiles see the same
    keys. With a dilation d, a query sees every d-th token. A causal axis ends at the query.

        window 5        . . # # Q # # . .        stride 3       . . # Q # # # . .
        at a border     Q # # # # . . . .        (a group)      . . # # # Q # . .
        dilation 2      # . # . Q . # . #        causal         . . # # # # Q . .

    The usual shapes have names: `sliding`, `blocked`, `tiled`, `axial`, `dilated`; `preset` knows published settings.

    References: Hassani and Shi, "Dilated Neighborhood Attention Transformer", arXiv 2209.15001; Hassani et al.,
    "Generalized Neighborhood Attention", arXiv 2504.16922.

    Args:
        window: Keys on each axis of the grid (frames, height, width; a picture takes 2, a sequence 1); 1 is the
            query's own place, None the whole axis. Smaller is faster, larger is safer.
        stride: Queries that share a window, 1 to the window, one number or one for each axis. Larger is faster.
        dilation: Distance of the keys on each axis, likewise.
        causal: Whether a query sees no later key, likewise.
        block_size: Tokens in a block, 32, 64 or 128. Smaller follows the window more closely, larger runs faster for
            each block.
        small_grid: What to do on an axis shorter than window x dilation: `"warn"` clips the window to the axis,
            `"error"` raises. Axes of one token are exempt.
        base_grid: The grid (frames x height x width, such as `"24x44x80"`) that window, stride and dilation are meant
            for; on another they grow and shrink with its sides, as in the code of Cosmos-Predict2, but a dilation of
            1 stays. None: they are tokens on every grid.

    Raises:
        InvalidInputError: If a value is of the wrong kind or out of its range; it says which.
    """

    method: ClassVar[str] = "neighborhood"

    window: tuple[int | None, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    causal: bool | tuple[bool, ...] = False
    block_size: int = 128
    small_grid: str = "warn"
    base_grid: str | None = None

    def __post_init__(self):
        for name in ("window", "stride", "dilation", "causal"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        window = self.window
        if not isinstance(window, tuple) or not 1 <= len(window) <= 3:
            raise InvalidInputError(f"window is {window!r}; give 1 to 3 numbers, such as (18, 24, 24).")
        for width in window:
            if width is not None and not is_whole(width, 1):
                raise InvalidInputError(f"window is {window!r}; each axis takes None or a whole number from 1.")
        for name, low in (("stride", 1), ("dilation", 1), ("causal", None)):
            values = self._per_axis(name)
            fits = all(isinstance(v, bool) if low is None else is_whole(v, low) for v in values)
            if len(values) != len(window) or not fits:
                kind = "True or False" if low is None else "a whole number from 1"
                raise InvalidInputError(
                    f"{name} is {getattr(self, name)!r}; give {kind}, or one for each of the {len(window)} axes."
                )
        for width, stride in zip(window, self._per_axis("stride"), strict=True):
            if width is not None and stride > width:
                raise InvalidInputError(f"stride {stride} is larger than its window {width}; give at most the window.")
        check_choice("block_size", self.block_size, BLOCK_SIZES)
        check_choice("small_grid", self.small_grid, ("warn", "error"))
        if self.base_grid is not None:
            object.__setattr__(self, "base_grid", str(Grid.parse(str(self.base_grid))))

    @classmethod
    def sliding(cls, window: tuple[int | None, ...], **settings) -> NeighborhoodConfig:
        """Every query has a window of its own: neighborhood attention proper. The safest shape, and the slowest."""
        return cls(window, **settings)

    @classmethod
    def blocked(cls, window: tuple[int | None, ...], **settings) -> NeighborhoodConfig:
        """Stride = window: blocks that see nothing but themselves. The fastest shape, with seams between blocks."""
        return cls(window, stride=tuple(width or 1 for width in window), **settings)

    @classmethod
    def tiled(cls, tile: tuple[int | None, ...], tiles: int | tuple[int, ...] = 3, **settings) -> NeighborhoodConfig:
        """Tiles that see themselves and their neighbours, as Sliding Tile Attention (arXiv 2502.04507) does.

        Args:
            tile: Sides of a tile; None is the whole axis. The paper has (6, 8, 8) for HunyuanVideo.
            tiles: Tiles in a window, one number or one for each axis; odd ones are symmetric. More are safer.
            **settings: Further settings of the config.
        """
        counts = tiles if isinstance(tiles, tuple) else (tiles,) * len(tile)
        if len(counts) != len(tile) or not all(is_whole(count, 1) for count in counts):
            raise InvalidInputError(f"tiles is {tiles!r}; give a whole number from 1, or {len(tile)} of them.")
        window = tuple(side and side * count for side, count in zip(tile, counts, strict=True))
        return cls(window, stride=tuple(side or 1 for side in tile), **settings)

    @classmethod
    def axial(cls, axis: str, **settings) -> NeighborhoodConfig:
        """Every query sees its line along one axis (`"frames"`, `"height"` or `"width"`), and nothing else."""
        check_choice("axis", axis, _AXES)
        return cls(tuple(None if name == axis else 1 for name in _AXES), **settings)

    @classmethod
    def dilated(cls, window: tuple[int | None, ...], grid: Grid, **settings) -> NeighborhoodConfig:
        """As far apart as the grid allows, so that a few keys span all of it (DiNA, arXiv 2209.15001).

        The paper alternates layers of this shape with `sliding` ones.
        """
        window = cls(window, **settings).window
        lengths = (grid.frames, grid.height, grid.width)[-len(window) :]
        dilation = tuple(max(1, length // (width or length)) for length, width in zip(lengths, window, strict=True))
        return cls(window, dilation=dilation, **settings)

    @classmethod
    def preset(cls, name: str, **settings) -> NeighborhoodConfig:
        """Published settings by name, such as `"hunyuanvideo-18x24x24-s16x8x8"`.

        Args:
            name: One of `neighborhood_presets()`.
            **settings: What should differ from the preset.

        Raises:
            InvalidInputError: If there is no such preset.
        """
        from .neighborhood_presets import neighborhood_presets

        presets = neighborhood_presets()
        if not isinstance(name, str) or name not in presets:
            raise InvalidInputError(f"neighborhood has no preset {name!r}; it has {', '.join(presets)}.")
        return replace(presets[name].config, **settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> NeighborhoodConfig:
        """The inverse of `to_dict`; `"preset"` may name settings that the other keys change.

        Raises:
            InvalidInputError: If a key or preset is unknown, a value out of range, or the version another.
        """
        values = dict(data)
        if "preset" in values:
            values = cls.preset(values.pop("preset")).to_dict() | values
        return super().from_dict(values)

    @on_cpu
    def build_plan(self, layout: TokenLayout) -> BlockPlan:
        """The plan for one layout, on the CPU.

        Raises:
            InvalidInputError: If the window has fewer axes than the grid, or does not fit it and `small_grid` is
                `"error"`.
            UnsupportedError: If tokens of unlike grids should see each other by the rule.
        """
        _check_grids(layout)
        axes = self.axes(layout.grid)
        others = [span.tokens for span in (*layout.query, *layout.key) if span.kind != "grid"]
        order = choose_order(axes, self.block_size, sum(-(-tokens // self.block_size) for tokens in others))
        return BlockPlan.from_rule(
            layout,
            box_rule(axes),
            block_q=self.block_size,
            block_k=self.block_size,
            grid_order=_only_on(layout.grid, order),
        )

    @classmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> NeighborhoodConfig:
        """About the largest window, of one share of every axis, whose plan stays within a density.

        Args:
            density: Computed share of the scores, text included, above 0 and up to 1.
            grid: The token grid of the run.
            text_tokens: Text tokens in the same sequence.
            **settings: `stride`, `block_size` and the like.

        Raises:
            InvalidInputError: If the density is out of range, or below the floor of this grid, which is named.
        """
        check_density(density)
        check_unknowns(settings, "window")
        layout = TokenLayout.self_attention(grid, text_after=text_tokens)
        sides = (grid.frames, grid.height, grid.width)
        longest = max(sides)
        whole = cls((None,) * 3, **settings)
        if whole.base_grid not in (None, str(grid)):
            raise InvalidInputError(
                f"base_grid is {whole.base_grid} and the window is solved for a grid of {grid}; leave it out."
            )
        least = [max(2, stride) for stride in whole._per_axis("stride")]
        most = [side // dilation for side, dilation in zip(sides, whole._per_axis("dilation"), strict=True)]

        def config(step: int) -> NeighborhoodConfig:
            shares = [max(low, high * step // longest) for low, high in zip(least, most, strict=True)]
            window = tuple(None if high < low else share for share, low, high in zip(shares, least, most, strict=True))
            return replace(whole, window=window)

        def reached(step: int) -> float:
            return config(step).build_plan(layout).density()

        if reached(0) > density:
            kept, advice = "with the smallest window", smaller_blocks(whole.block_size, "more tokens")
            raise below_floor(cls.method, density, grid, reached(0), kept, f"use {advice}")
        return config(largest_within(longest, lambda step: reached(step) <= density))

    def axes(self, grid: Grid) -> Axes:
        """What each axis of a grid sees."""
        return tuple(setting.axis() for setting in self.axis_settings(grid))

    def axis_settings(self, grid: Grid) -> tuple[AxisSetting, ...]:
        """The settings of the axes (frames, height, width) of a grid, windows that do not fit clipped."""
        lengths = (grid.frames, grid.height, grid.width)
        extra = 3 - len(self.window)
        if any(length > 1 for length in lengths[:extra]):
            raise InvalidInputError(
                f"window {self.window} has {len(self.window)} axes and the grid is {grid}; give one number for each "
                "axis, None for a whole one."
            )
        settings = [(None, 1, 1, False)] * extra
        settings += zip(self.window, *(self._per_axis(name) for name in ("stride", "dilation", "causal")), strict=True)
        if self.base_grid is not None:
            base = Grid.parse(self.base_grid)
            meant = zip(lengths, (base.frames, base.height, base.width), settings, strict=True)
            settings = [scaled(length, side, *setting) for length, side, setting in meant]
        return tuple(
            self._fitted(*axis, *setting)
            for axis, setting in zip(zip(_AXES, lengths, strict=True), settings, strict=True)
        )

    def _fitted(
        self, name: str, length: int, width: int | None, stride: int, dilation: int, causal: bool
    ) -> AxisSetting:
        if length == 1:
            width = stride = dilation = 1
        elif width is None or width == 1:
            # One key spans one token, and a whole axis all, whatever their dilation.
            dilation = min(dilation, length)
        elif width * dilation > length:
            message = (
                f"window {width} with dilation {dilation} spans {width * dilation} tokens and the grid has {length} on "
                f"its {name} axis"
            )
            if self.small_grid == "error":
                raise InvalidInputError(f"{message}; give a smaller window or dilation, None, or small_grid='warn'.")
            dilation = min(dilation, max(1, length // 2))
            width = min(width, length // dilation)
            stride = min(stride, width)
            _warn_once(f"{message}; clipped to a window of {width} with dilation {dilation}.")
        return AxisSetting(length, width, stride, dilation, causal)

    def _per_axis(self, name: str) -> tuple:
        value = getattr(self, name)
        return value if isinstance(value, tuple) else (value,) * len(self.window)


def _check_grids(layout: TokenLayout) -> None:
    for query, cells in zip(layout.query, layout.visibility, strict=True):
        for key, cell in zip(layout.key, cells, strict=True):
            if cell == "rule" and not query.grid == key.grid == layout.grid:
                raise UnsupportedError(
                    f"neighborhood needs one grid for queries and keys; here {query.kind} queries on "
                    f"{query.grid or 'no grid'} should see {key.kind} keys on {key.grid or 'no grid'} by its rule."
                )


def _only_on(grid: Grid, grid_order: GridOrder) -> GridOrder:
    """The order for one grid; tokens on others, reference pictures, stay as they are, since no rule reads them."""

    def order(other: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        if other == grid:
            return grid_order(other, block)
        return torch.arange(other.tokens), torch.zeros(other.tokens, 3, dtype=torch.int32)

    return order


@lru_cache(maxsize=1024)
def _warn_once(message: str) -> None:
    # Every layer and every length of text builds a plan; one line for all of them is enough.
    log.warning(message)
