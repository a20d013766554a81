"""A plan as a picture: what is computed, and what it means for one query, frame by frame."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fastdiff_kernels import Grid, TokenLayout

STATES = (("empty", "#f2f2f2"), ("partial", "#f4a259"), ("full", "#2f6690"))
HIDDEN, SEEN, QUERY = (242, 242, 242), (47, 102, 144), (220, 50, 47)
# Cells that touch differ: a colour for each parity of row and column and frame.
CELLS = ((166, 206, 227), (31, 120, 180), (178, 223, 138), (51, 160, 44), (253, 191, 111), (255, 127, 0))
CELLS += ((202, 178, 214), (106, 61, 154))
MOST_FRAMES = 40


def draw(built: Any, *, layout: TokenLayout, where: tuple[int, int, int], head: int, title: str) -> Figure:
    """The figure; save it with `savefig`.

    Args:
        built: A plan of blocks, or one of cells that share an agent.
        layout: The layout that it was built for.
        where: Frame, row and column of the query.
        head: Whose blocks, where heads differ.
        title: What stands above.
    """
    figure = Figure(figsize=(14, 7), dpi=120, layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    query = f"the query at frame {where[0]}, row {where[1]}, column {where[2]} (red)"
    if hasattr(built, "cells"):
        _show(left, _cells(built, layout.grid), where, "Cells of tokens that share an agent")
        _show(right, _own_cell(built, layout.grid, where), where, f"The cell of {query}")
        return figure
    _blocks(left, built, head)
    _show(right, _seen(built, layout, where, head), where, f"Keys seen by {query}")
    return figure


def _blocks(axes: Axes, built: Any, head: int) -> None:
    colors = ListedColormap([color for _, color in STATES])
    axes.imshow(np.asarray(built.draw(head)), cmap=colors, vmin=0, vmax=2, aspect="auto")
    of = f" of head {head}" if built.lists > 1 else ""
    axes.set(xlabel="key block", ylabel="query block", title=f"Blocks{of}, in the order in which they are computed")
    axes.legend(
        handles=[Patch(color=color, label=name) for name, color in STATES], loc="upper center", ncols=3,
        bbox_to_anchor=(0.5, -0.08),
    )  # fmt: skip


def _seen(built: Any, layout: TokenLayout, where: tuple[int, int, int], head: int) -> np.ndarray:
    grid = layout.grid
    start = sum(span.tokens for span in layout.query[: [span.kind for span in layout.query].index("grid")])
    token = start + np.ravel_multi_index(where, (grid.frames, grid.height, grid.width))
    seen = np.asarray(built.visible_keys(int(token), head).cpu())[start : start + grid.tokens]
    return _marked(seen, grid, where)


def _own_cell(built: Any, grid: Grid, where: tuple[int, int, int]) -> np.ndarray:
    cells = np.asarray(built.cells.cpu())
    own = cells[np.ravel_multi_index(where, (grid.frames, grid.height, grid.width))]
    return _marked(cells == own, grid, where)


def _marked(tokens: np.ndarray, grid: Grid, where: tuple[int, int, int]) -> np.ndarray:
    video = np.where(tokens.reshape(grid.frames, grid.height, grid.width)[..., None], SEEN, HIDDEN).astype(np.uint8)
    video[where] = QUERY
    return video


def _cells(built: Any, grid: Grid) -> np.ndarray:
    rows, columns = built.cell_grid.height, built.cell_grid.width
    cells = np.asarray(built.cells.cpu()).reshape(grid.frames, grid.height, grid.width)
    t, y, x = cells // (rows * columns), cells // columns % rows, cells % columns
    return np.asarray(CELLS, dtype=np.uint8)[t % 2 * 4 + y % 2 * 2 + x % 2]


def _show(axes: Axes, video: np.ndarray, where: tuple[int, int, int], title: str) -> None:
    sheet, (y, x) = _sheet(video, where)
    axes.imshow(sheet, interpolation="nearest")
    # One token of a large grid would hardly be seen.
    axes.plot(x, y, "o", markersize=12, markerfacecolor="none", markeredgecolor=np.divide(QUERY, 255))
    axes.set(title=title)
    axes.set_axis_off()


def _sheet(video: np.ndarray, where: tuple[int, int, int]) -> tuple[np.ndarray, tuple[int, int]]:
    """The frames around one, side by side, uint8 `[height, width, 3]`, and where a token stands on it."""
    frame, row, column = where
    first = max(0, min(frame - MOST_FRAMES // 2, len(video) - MOST_FRAMES))
    video = video[first : first + MOST_FRAMES]
    _, height, width, _ = video.shape
    columns = max(1, round(math.sqrt(len(video) * height / width)))
    rows = -(-len(video) // columns)
    gap = max(1, height // 16)
    sheet = np.full((rows * (height + gap), columns * (width + gap), 3), 255, dtype=np.uint8)
    for index, picture in enumerate(video):
        y, x = index // columns * (height + gap), index % columns * (width + gap)
        sheet[y : y + height, x : x + width] = picture
        if first + index == frame:
            place = (y + row, x + column)
    return sheet, place
