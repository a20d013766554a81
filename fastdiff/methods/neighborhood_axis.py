"""One axis of a neighborhood: which run of keys each query sees, dilation groups sorted behind one another."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastdiff_kernels.box import BoxAxis


@dataclass(frozen=True)
class AxisSetting:
    """A config's settings on one axis of a grid, clipped to it; see `neighborhood_axis`."""

    length: int
    window: int | None
    stride: int
    dilation: int
    causal: bool

    def axis(self) -> BoxAxis:
        return neighborhood_axis(self.length, self.window, self.stride, self.dilation, self.causal)


def scaled(
    length: int, side: int, window: int | None, stride: int, dilation: int, causal: bool
) -> tuple[int | None, int, int, bool]:
    """Window, stride, dilation and causal, which are meant for an axis of `side` tokens, on one of `length`."""
    if length == side:
        return window, stride, dilation, causal
    share = length / side
    if window not in (None, 1):
        window = min(max(2, round(window * share)), length)
    stride = min(max(1, round(stride * share)), length if window is None else window)
    if dilation > 1:
        dilation = min(max(1, round(dilation * share)), length if window is None else length // window)
    return window, stride, dilation, causal


def neighborhood_axis(
    length: int, window: int | None, stride: int = 1, dilation: int = 1, causal: bool = False
) -> BoxAxis:
    """First and last key of every query on one axis, group after group where it is dilated.

    Args:
        length: Tokens on the axis.
        window, stride: In tokens of a dilation group; a window of None is the whole group.
        dilation: Groups; token i belongs to group i mod dilation.
        causal: Whether the window ends at the query.
    """
    first, last, natural, pieces = [], [], [], []
    for group in range(dilation):
        size, start = math.ceil((length - group) / dilation), sum(pieces)
        width = size if window is None else window
        query = torch.arange(size)
        if causal:
            leader = (query // stride * stride + stride - 1).clamp(max=size - 1)
            low, high = (leader - width + 1).clamp(min=0), query
        else:
            leader = (query // stride * stride + stride // 2).clamp(max=size - 1)
            low = (leader - width // 2).clamp(min=0).clamp(max=size - width)
            high = low + width - 1
        first.append(low + start)
        last.append(high + start)
        natural.append(group + query * dilation)
        pieces.append(size)
    return BoxAxis(torch.cat(first), torch.cat(last), torch.cat(natural), tuple(pieces))
