"""A plan as a picture: the block map, and what one query in the middle of the video sees, frame by frame."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastdiff_kernels import BlockPlan, Grid

STATES = (("empty", "#f2f2f2"), ("partial", "#f4a259"), ("full", "#2f6690"))
HIDDEN, SEEN, QUERY = (242, 242, 242), (47, 102, 144), (220, 50, 47)
MOST_FRAMES = 40


def draw(built: BlockPlan, grid: Grid, text: int, title: str) -> Figure:
    """The figure; save it with `savefig`."""
    figure = Figure(figsize=(14, 7), dpi=120, layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.imshow(
        np.asarray(built.draw()), cmap=ListedColormap([color for _, color in STATES]), vmin=0, vmax=2, aspect="auto"
    )
    left.set(xlabel="key block", ylabel="query block", title="Blocks, in the order in which they are computed")
    left.legend(
        handles=[Patch(color=color, label=name) for name, color in STATES], loc="upper center", ncols=3,
        bbox_to_anchor=(0.5, -0.08),
    )  # fmt: skip
    where = (grid.frames // 2, grid.height // 2, grid.width // 2)
    right.imshow(_frames(built, grid, text, where), interpolation="nearest")
    right.set(title=f"Keys seen by the query at frame {where[0]}, row {where[1]}, column {where[2]} (red)")
    right.set_axis_off()
    return figure


def _frames(built: BlockPlan, grid: Grid, text: int, where: tuple[int, int, int]) -> np.ndarray:
    frame, row, column = where
    token = text + (frame * grid.height + row) * grid.width + column
    seen = np.asarray(built.visible_keys(token).cpu())[text : text + grid.tokens]
    video = np.where(seen.reshape(grid.frames, grid.height, grid.width)[..., None], SEEN, HIDDEN).astype(np.uint8)
    video[where] = QUERY
    first = max(0, min(frame - MOST_FRAMES // 2, grid.frames - MOST_FRAMES))
    video = video[first : first + MOST_FRAMES]
    columns = max(1, round(math.sqrt(len(video) * grid.height / grid.width)))
    rows = -(-len(video) // columns)
    gap = max(1, grid.height // 16)
    sheet = np.full((rows * (grid.height + gap), columns * (grid.width + gap), 3), 255, dtype=np.uint8)
    for index, picture in enumerate(video):
        y, x = index // columns * (grid.height + gap), index % columns * (grid.width + gap)
        sheet[y : y + grid.height, x : x + grid.width] = picture
    return sheet
