"""Walks through a grid: a token order without padding in which every run of slots is a compact piece.

Boxes of fixed sides pad every axis that they do not divide, and the padding is computed: on 13x30x45 it costs half of
the work. A walk cuts two axes into bands of nearly equal width and follows the third, one cross-section of two bands
at a time, up one column and down the next. Only its very end is padded. A block is classified by its bounding box.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from .box import Axes, BoxAxis, Cut, box_order, box_rule, choose_tile, full_tiles, touched_tiles
from .layout import Grid
from .order import GridOrder
from .rule import classify

Bands = tuple[tuple[tuple[int, int], ...], ...]
"""An axis in bands, (start, width) each, piece by piece."""

_WIDTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128)
# So many walks, the best by estimate, are counted block by block, on so many query blocks.
_COUNTED, _ROWS = 10, 512


@dataclass(frozen=True)
class Walk:
    """One way through the grid: the axis that is followed, and the bands of the other two in their order."""

    axis: int
    bands: tuple[Bands, Bands]


def walk_order(axes: Axes, walk: Walk) -> GridOrder:
    """The tokens along a walk; coordinates are those of the axes."""

    def order(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = walk_places(axes, walk)
        t, y, x = (axis.natural[column] for axis, column in zip(axes, places.unbind(1), strict=True))
        return (t * grid.height + y) * grid.width + x, places.to(torch.int32)

    return order


def walk_places(axes: Axes, walk: Walk) -> torch.Tensor:
    """Coordinates (t, y, x) of all tokens along a walk, int64 `[tokens, 3]`."""
    columns = [
        (*along, *a, *b)
        for (along,), *bands in _back_and_forth([_bands(axes[walk.axis], 0), *walk.bands])
        for a, b in _back_and_forth(bands)
    ]
    table = torch.tensor(columns)
    sizes = table[:, 1] * table[:, 3] * table[:, 5]
    column = torch.repeat_interleave(sizes)
    start, steps, a_start, a_width, b_start, b_width, ends = (
        values.index_select(0, column) for values in (*table.t(), sizes.cumsum(0))
    )
    # Backwards in every other column.
    place = torch.arange(len(column)) - ends + steps * a_width * b_width
    section = place // b_width
    step = section // a_width
    found = [a_start + section - step * a_width, b_start + place - section * b_width]
    found.insert(walk.axis, start + torch.where(column % 2 == 0, step, steps - 1 - step))
    return torch.stack(found, dim=1)


def choose_order(axes: Axes, block: int, beside: int = 0) -> GridOrder:
    """The token order under which a box rule computes the fewest blocks: boxes of some shape, or a walk.

    Args:
        axes: The axes of the rule.
        block: Slots in a block, a power of two.
        beside: Blocks of text and the like, query and key side together, that every block of the grid meets.
    """
    tile = choose_tile(axes, block)
    blocks = math.prod(len(axis.tiles(side).first) for axis, side in zip(axes, tile, strict=True))
    touched = touched_tiles(axes, tile)
    order, cost = box_order(axes, tile), (touched + blocks * beside, touched - full_tiles(axes, tile))
    if cost[1] > 0:
        for walk in candidates(axes, block)[:_COUNTED]:
            other = _counted(axes, walk, block, beside)
            if other < cost:
                order, cost = walk_order(axes, walk), other
    return order


def candidates(axes: Axes, block: int) -> list[Walk]:
    """Walks worth counting, the cheapest by a rough estimate first."""
    options = [[(bands, _share(axis, _cut(bands))) for bands in _choices(axis, block)] for axis in axes]
    found = []
    longest = max(len(axis.first) for axis in axes)
    for along, axis in enumerate(axes):
        if len(axis.first) == 1 < longest:
            continue
        runs: dict[int, float] = {}
        a, b = (options[other] for other in range(3) if other != along)
        for (a_bands, a_share), (b_bands, b_share) in itertools.product(a, b):
            section = _mean_width(a_bands) * _mean_width(b_bands)
            # A block that begins inside a section reaches into one more.
            run = block / section + (block % section != 0)
            if run not in runs:
                runs[run] = _share_of_runs(axis, run)
            found.append((a_share * b_share * runs[run], len(found), Walk(along, (a_bands, b_bands))))
    return [walk for _, _, walk in sorted(found, key=lambda entry: entry[:2])]


def _counted(axes: Axes, walk: Walk, block: int, beside: int) -> tuple[float, float]:
    """Pairs of blocks that are computed under a walk, and those among the grid's that need a test."""
    places = walk_places(axes, walk).to(torch.int32)
    places = torch.cat([places, places[-1:].expand(-len(places) % block, 3)]).unflatten(0, (-1, block))
    boxes = torch.stack([places.amin(1), places.amax(1)], 1)
    rows = boxes[torch.linspace(0, len(boxes) - 1, min(len(boxes), _ROWS)).long()]
    touched, whole = classify(box_rule(axes), rows, boxes)
    scale = len(boxes) / len(rows)
    return int(touched.sum()) * scale + len(boxes) * beside, int((touched & ~whole).sum()) * scale


def _choices(axis: BoxAxis, block: int) -> list[Bands]:
    return list(dict.fromkeys(_bands(axis, width, equal) for width in _WIDTHS if width <= block for equal in (1, 0)))


def _bands(axis: BoxAxis, width: int, equal: bool = True) -> Bands:
    """Bands of about a width, all alike or all but the last exact (as strides like it); 0 is the whole piece."""
    pieces, start = [], 0
    for length in axis.pieces:
        count = max(1, round(length / width)) if width else 1
        edges = [length * i // count if equal else min(length, i * width) for i in range(count)] + [length]
        pieces.append(tuple((start + low, high - low) for low, high in itertools.pairwise(edges)))
        start += length
    return tuple(pieces)


def _cut(bands: Bands) -> Cut:
    start, width = torch.tensor([band for piece in bands for band in piece]).t()
    return Cut(start.contiguous(), start + width - 1)


def _mean_width(bands: Bands) -> float:
    widths = [width for piece in bands for _, width in piece]
    return sum(widths) / len(widths)


def _share(axis: BoxAxis, cut: Cut) -> float:
    """Share of the pairs of coordinates that lie in parts of which one sees some of the other."""
    sizes = cut.sizes
    ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
    start, stop = axis.touched(cut, cut)
    return float((sizes * (ends[stop] - ends[start])).sum()) / int(ends[-1]) ** 2


def _share_of_runs(axis: BoxAxis, run: float) -> float:
    """The same for runs of a mean length."""
    shorter = max(1, int(run))
    low, high = (_share(axis, axis.tiles(min(length, len(axis.first)))) for length in (shorter, shorter + 1))
    return low + (high - low) * max(0, run - shorter)


def _back_and_forth(lists: Sequence[Sequence]) -> Iterator[tuple]:
    """The product of lists, each walked backwards every other time, so that neighbours differ in one place."""
    if not lists:
        yield ()
        return
    inner = list(_back_and_forth(lists[1:]))
    for index, item in enumerate(lists[0]):
        for rest in reversed(inner) if index % 2 else inner:
            yield (item, *rest)
