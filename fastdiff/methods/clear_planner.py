"""CLEAR at work: the plan that knows where the image stands, the trainable pooling of keys, the attention call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from fastdiff_kernels import BlockPlan, Grid, InvalidInputError, Span, TokenLayout, UnsupportedError, attention

from .planner import Planner


def pooled_layout(layout: TokenLayout, factor: int) -> TokenLayout:
    """A layout with pooled keys behind its own; those see them who see the grid by the method's rule.

    Raises:
        InvalidInputError: If the factor does not divide the grid.
        UnsupportedError: If there is not one grid.
    """
    grids = [span.grid for span in layout.key if span.kind == "grid"]
    if len(grids) != 1:
        raise UnsupportedError(
            f"pooled keys are of one grid and this layout has {len(grids)} on its key side; use pool_factor=None."
        )
    (grid,) = grids
    if grid.height % factor or grid.width % factor:
        raise InvalidInputError(
            f"pool_factor {factor} does not divide a grid of {grid}; height and width must be multiples of it. Choose "
            "another size, another pool_factor, or None."
        )
    pooled = Span("pooled", grid.tokens // factor**2)
    visibility = tuple((*row, "all" if "rule" in row else "none") for row in layout.visibility)
    return TokenLayout(layout.query, (*layout.key, pooled), visibility)


@dataclass(frozen=True, eq=False, repr=False)
class ClearPlan(BlockPlan):
    """A block plan that knows what to pool and how to scale.

    Attributes:
        start: First token of the grid among the keys.
        grid: The grid that is pooled, None without pooled keys.
        pool_factor: Side of a pooled tile, 0 without pooled keys.
        sharpening: Factor on the scale of the scores.
    """

    start: int = 0
    grid: Grid | None = None
    pool_factor: int = 0
    sharpening: float = 1.0

    def belonging(self, layout: TokenLayout, factor: int | None, sharpening: float) -> ClearPlan:
        """The same plan for calls of a layout (without its pooled keys)."""
        if factor is None:
            return replace(self, sharpening=sharpening)
        kinds = [span.kind for span in layout.key]
        place = kinds.index("grid")
        start = sum(span.tokens for span in layout.key[:place])
        return replace(self, start=start, grid=layout.key[place].grid, pool_factor=factor, sharpening=sharpening)

    @property
    def pooled_tokens(self) -> int:
        """Pooled keys at the end of the key side."""
        return 0 if self.grid is None else self.grid.tokens // self.pool_factor**2

    def density(self) -> float:
        """Area of the computed tiles / (query tokens x key tokens), the pooled keys only among the computed: the
        yardstick is dense attention, which has none."""
        return super().density() * self.key_tokens / (self.key_tokens - self.pooled_tokens)


class KeyPooling(nn.Module):
    """One f x f grid of weights, shared by heads, channels, keys and values; it starts as the mean."""

    def __init__(self, factor: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((factor, factor), 1 / factor**2))

    def forward(self, x: torch.Tensor, grid: Grid) -> torch.Tensor:
        """Weighted sums over tiles: `[batch, tokens, heads, head_dim]` to `[batch, tokens / f^2, heads, head_dim]`."""
        factor = self.weight.shape[0]
        shape = (grid.frames, grid.height // factor, factor, grid.width // factor, factor)
        tiles = x.unflatten(1, shape) * self.weight[:, None, :, None, None]
        return tiles.sum(dim=(3, 5)).flatten(1, 3).to(x.dtype)


class ClearPlanner(Planner):
    """Appends pooled keys, if the config has them, and scales the scores."""

    def parameters(self, *, layer: int, heads: int, head_dim: int) -> KeyPooling | None:
        """The pooling weights of one layer."""
        return None if self.config.pool_factor is None else KeyPooling(self.config.pool_factor)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: ClearPlan, extras) -> torch.Tensor:
        """Attention of one call; keys are pooled as they come, after RoPE."""
        scale = q.shape[-1] ** -0.5 if extras.scale is None else extras.scale
        key_mask = extras.key_mask
        if plan.grid is not None:
            end = plan.start + plan.grid.tokens
            pooled = (extras.parameters(x[:, plan.start : end], plan.grid) for x in (k, v))
            k, v = (torch.cat([x, more], dim=1) for x, more in zip((k, v), pooled, strict=True))
            if key_mask is not None:
                key_mask = torch.cat([key_mask, _whole_tiles(key_mask[:, plan.start : end], plan)], dim=1)
        return attention(q, k, v, plan, scale=scale * plan.sharpening, key_mask=key_mask, backend=extras.backend)


def _whole_tiles(key_mask: torch.Tensor, plan: ClearPlan) -> torch.Tensor:
    """Which pooled keys exist, bool `[batch, pooled keys]`: those of which no key is hidden, so that none leaks."""
    grid, factor = plan.grid, plan.pool_factor
    shape = (grid.frames, grid.height // factor, factor, grid.width // factor, factor)
    return key_mask.unflatten(1, shape).all(5).all(3).flatten(1)
