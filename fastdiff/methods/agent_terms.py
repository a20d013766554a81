"""What agent attention may learn in one layer: biases of both softmaxes, and a convolution of the values."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff_kernels import AgentBias, Grid

# Points on each axis (frames, height, width) of the map of an agent, and of its vector along each axis.
_MAP, _VECTOR = (4, 7, 7), 32


class AgentTerms(nn.Module):
    """The learned terms of one layer. At the start they change nothing.

    A bias has three parts for each head and agent, all stretched to the grid of the call: a coarse map, and a fine
    vector along each axis. The convolution is depth-wise over 3 tokens on each axis; pictures use its middle plane.

    Args:
        heads, head_dim: Of the layer.
        cells: The agents on each axis, (height, width) or (frames, height, width), or None for no biases.
        centre: The centre tap that the convolution starts with, or None for no convolution.
    """

    def __init__(self, heads: int, head_dim: int, cells: tuple[int, ...] | None, centre: float | None):
        super().__init__()
        self.axes = 0 if cells is None else len(cells)
        if cells is not None:
            agents = Grid(*((1,) * (3 - len(cells)) + cells)).tokens
            rank = torch.Size(_MAP[-self.axes :]).numel() + self.axes * _VECTOR
            self.first = nn.Parameter(torch.zeros(heads, agents, rank))
            self.second = nn.Parameter(torch.zeros(heads, agents, rank))
        self.convolved = centre is not None
        if self.convolved:
            channels = heads * head_dim
            taps = torch.zeros(channels, 1, 3, 3, 3)
            taps[:, :, 1, 1, 1] = centre
            self.taps, self.offset = nn.Parameter(taps), nn.Parameter(torch.zeros(channels))

    def bias(self, grid: Grid, like: torch.Tensor) -> AgentBias | None:
        """The biases on a grid, in the dtype and on the device of `like`; None without."""
        if not self.axes:
            return None
        return AgentBias(self.first, self.second, stretched(grid, self.axes, like))

    def convolve(self, values: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The convolution of the grid's values, `[batch, grid tokens, heads, head_dim]`."""
        shape = values.shape
        x = values.flatten(2).transpose(1, 2)
        taps, offset = (part.to(values.dtype) for part in (self.taps, self.offset))
        if grid.frames == 1:
            x = x.unflatten(2, (grid.height, grid.width))
            x = F.conv2d(x, taps[:, :, 1], offset, padding=1, groups=x.shape[1])
        else:
            x = x.unflatten(2, (grid.frames, grid.height, grid.width))
            x = F.conv3d(x, taps, offset, padding=1, groups=x.shape[1])
        return x.flatten(2).transpose(1, 2).reshape(shape)


def stretched(grid: Grid, axes: int, like: torch.Tensor) -> torch.Tensor:
    """Weights that stretch the map and the vectors of an agent to a grid, `[grid tokens, rank]`."""
    sides = (grid.frames, grid.height, grid.width)
    maps = [_weights(side, points, like) for side, points in zip(sides, _MAP, strict=True)]
    if axes == 2:
        maps[0] = like.new_ones(grid.frames, 1)
    parts = [torch.einsum("ta,yb,xc->tyxabc", *maps).flatten(3)]
    for axis in range(3 - axes, 3):
        shape = [1, 1, 1, _VECTOR]
        shape[axis] = sides[axis]
        parts.append(_weights(sides[axis], _VECTOR, like).reshape(shape).expand(*sides, -1))
    return torch.cat(parts, dim=-1).flatten(0, 2)


def _weights(side: int, points: int, like: torch.Tensor) -> torch.Tensor:
    """Linear interpolation of some points to the tokens of an axis, `[side, points]`."""
    exact = torch.promote_types(like.dtype, torch.float32)
    at = (torch.arange(side, device=like.device, dtype=exact) + 0.5) * (points / side) - 0.5
    distance = (at.clamp(0, points - 1)[:, None] - torch.arange(points, device=like.device)).abs()
    return (1 - distance).clamp(min=0).to(like.dtype)
