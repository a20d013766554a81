"""AgentPlan: which grid tokens share an agent, and who stands beside the grid. It is no mask."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .agent_spans import AgentSpans
from .errors import InvalidInputError, UnsupportedError
from .layout import Grid, TokenLayout
from .on_cpu import on_cpu


@dataclass(frozen=True, eq=False, repr=False)
class AgentPlan:
    """What agent attention has to do: see `agent_attention`.

    The grid is cut into cells, one agent each. Agents stand between the grid's queries and all keys. What stands
    beside the grid (text, reference pictures) has no agents: its queries are ordinary rows, its keys are seen by
    the agents and by the grid's queries directly.

    Attributes:
        spans: The grid, what stands beside it, and how many tokens were merged away.
        cell_grid: Cells on each axis of the grid.
        cells: The agent of each grid token, int32 `[grid tokens]`.
        corners: The first grid token of each cell, int32 `[agents]`.
        sizes: Tokens of each cell on each axis, int32 `[agents, 3]`.
        centres: The query token in the middle of each cell (of an even side the earlier one), int32 `[agents]`.
        axes: For each axis which of its tokens lie in which cell, float32 `[cells, tokens]`: 0, or a power of two so
            small that no sum over a cell is larger than what is summed.
        shares: What the sums along all axes are to be divided by, float32 `[agents]`.
    """

    spans: AgentSpans
    cell_grid: Grid
    cells: torch.Tensor
    corners: torch.Tensor
    sizes: torch.Tensor
    centres: torch.Tensor
    axes: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    shares: torch.Tensor

    @classmethod
    # Autograd saves the axes, which it could not if the plan was first wanted in inference mode.
    @torch.inference_mode(False)
    @on_cpu
    def from_cells(cls, layout: TokenLayout, cell_grid: Grid, *, merged: int = 0) -> AgentPlan:
        """A plan of cells as equal as the grid allows: on each axis they differ by one token at most.

        Args:
            layout: Spans of both sides and who sees whom.
            cell_grid: Cells on each axis; the number of agents is their product. Fewer are faster.
            merged: Grid tokens that were merged into others before the call. More are faster.

        Raises:
            InvalidInputError: If an axis has more cells than tokens, or fewer tokens than agents are kept.
            UnsupportedError: If a side has no grid span or several, the two differ, grid tokens do not see each
                other, the method should rule elsewhere, or tokens are merged where others stand beside the grid.
        """
        spans = AgentSpans(layout, merged)
        grid = spans.grid
        sides, counts = (_sides(some) for some in (grid, cell_grid))
        if any(count > side for side, count in zip(sides, counts, strict=True)):
            raise InvalidInputError(f"{cell_grid} cells do not fit a grid of {grid}; give at most one for each token.")
        if merged and (len(layout.query) > 1 or len(layout.key) > 1):
            raise UnsupportedError(
                "tokens can be merged only where the grid stands alone in its sequence, and this layout has "
                f"{', '.join(span.kind for span in layout.key)}; merge none."
            )
        if not 0 <= merged <= grid.tokens - cell_grid.tokens:
            raise InvalidInputError(
                f"merged is {merged}; {cell_grid.tokens} of the {grid.tokens} tokens must be kept, so give 0 to "
                f"{grid.tokens - cell_grid.tokens}."
            )
        edges = [
            (torch.arange(count + 1) * side + count - 1) // count for side, count in zip(sides, counts, strict=True)
        ]
        size = [edge.diff() for edge in edges]
        cell = [torch.arange(count).repeat_interleave(some) for count, some in zip(counts, size, strict=True)]
        weights = [2.0 ** -int(some.max() - 1).bit_length() for some in size]
        axes = tuple(
            (torch.arange(count)[:, None] == index).to(torch.float32) * weight
            for count, index, weight in zip(counts, cell, weights, strict=True)
        )
        first = [edge[:-1] for edge in edges]
        middle = [edge + (some - 1) // 2 for edge, some in zip(first, size, strict=True)]
        sizes = torch.cartesian_prod(*size)
        tensors = (
            _numbers(cell, counts),
            _numbers(first, sides),
            sizes,
            _numbers(middle, sides) + spans.query_grid[0],
        )
        shares = sizes.prod(-1).to(torch.float32) * math.prod(weights)
        return cls(spans, cell_grid, *(tensor.to(torch.int32) for tensor in tensors), axes, shares)

    def __repr__(self) -> str:
        merged = f", {self.merged} merged" if self.merged else ""
        return f"AgentPlan({self.cell_grid} agents on {self.grid}{merged}, density {self.density():.4f})"

    def __deepcopy__(self, memo) -> AgentPlan:
        return self

    @torch.inference_mode(False)
    def to(self, device) -> AgentPlan:
        """The same plan on another device (itself, if it is there)."""
        if torch.device(device) == self.device:
            return self
        moved = {name: getattr(self, name).to(device) for name in ("cells", "corners", "sizes", "centres", "shares")}
        return replace(self, **moved, axes=tuple(axis.to(device) for axis in self.axes))

    @property
    def device(self) -> torch.device:
        return self.cells.device

    @property
    def grid(self) -> Grid:
        return self.spans.grid

    @property
    def merged(self) -> int:
        """Grid tokens that a call lacks, because they were merged into others before it."""
        return self.spans.merged

    @property
    def agents(self) -> int:
        """Number of agents."""
        return self.cell_grid.tokens

    @property
    def heads(self) -> None:
        """The plan fits any number of heads."""
        return None

    @property
    def query_tokens(self) -> int:
        """Query tokens of a call."""
        return self.spans.layout.query_tokens - self.merged

    @property
    def key_tokens(self) -> int:
        """Key tokens of a call."""
        return self.spans.layout.key_tokens - self.merged

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.cells, self.corners, self.sizes, self.centres, *self.axes, self.shares))

    def density(self) -> float:
        """Computed scores / (query tokens x key tokens), text included; tokens merged away have no scores."""
        return self.spans.density(self.agents)


def _sides(grid: Grid) -> tuple[int, int, int]:
    return grid.frames, grid.height, grid.width


def _numbers(places: list[torch.Tensor], sides: tuple[int, int, int]) -> torch.Tensor:
    """Raster numbers of all combinations of places on three axes, the last axis fastest."""
    t, y, x = places
    return ((t[:, None, None] * sides[1] + y[:, None]) * sides[2] + x).flatten()
