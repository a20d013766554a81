"""One axis of a neighborhood: which run of keys each query sees, dilation groups sorted behind one another."""

from __future__ import annotations

import math

import torch

from fastdiff_kernels.box import BoxAxis


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
