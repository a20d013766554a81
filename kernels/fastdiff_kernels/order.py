"""Token orders: the slots of one side of a plan, so that a block of slots is a compact piece of the grid.

Row-major blocks are thin strips that touch many half-empty neighbours. `snake_order` cuts a frame into horizontal
bands and walks each column by column, every other band backwards: any run of slots is then a compact patch, for
every size of frame and block, and only the end of a frame is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from .errors import InvalidInputError
from .layout import Grid, Span
from .on_cpu import on_cpu

GridOrder = Callable[[Grid, int], tuple[torch.Tensor, torch.Tensor]]
"""(grid, block) -> the token of each slot, int `[slots]` with -1 for padding, and its coordinates `[slots, 3]`."""


# Where 132 blocks run at a time and the cache holds 400 of keys: more read less on 21 frames, and more on 30.
_FRAMES_OF_A_WAVE = 5


def natural_order(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-major tokens, nothing padded between frames."""
    return torch.arange(grid.tokens), grid.coordinates()


def raster_order(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row-major tokens with every frame padded to whole blocks; coordinates are (t, raster index, 0)."""
    raster = torch.arange(grid.frame_tokens, dtype=torch.int32)
    flat = torch.stack([raster, torch.zeros_like(raster)], dim=-1)
    return _frame_by_frame(grid, block, raster.long(), flat)


def snake_order(grid: Grid, block: int, rows: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Compact patches inside each frame, every frame padded to whole blocks; coordinates are (t, y, x).

    `rows` is about how high a band is; left out, as high as makes patches square.
    """
    bands = max(1, round(grid.height / (rows or block**0.5)))
    edges = [grid.height * band // bands for band in range(bands + 1)]
    y, x = torch.meshgrid(torch.arange(grid.height), torch.arange(grid.width), indexing="ij")
    pieces = []
    for band, (top, bottom) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        columns = torch.stack([y[top:bottom], x[top:bottom]], dim=-1).transpose(0, 1)
        pieces.append((columns.flip(0) if band % 2 else columns).reshape(-1, 2))
    place = torch.cat(pieces)
    return _frame_by_frame(grid, block, place[:, 0] * grid.width + place[:, 1], place.to(torch.int32))


def centred(grid_order: GridOrder) -> GridOrder:
    """The same order with the centre of its block as every token's coordinates: a rule then keeps or skips whole
    blocks, by the distance between their centres."""

    def order_with_centres(grid: Grid, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        order, coordinates = grid_order(grid, block)
        low, high = _boxes(coordinates.unflatten(0, (-1, block)), (order < 0).unflatten(0, (-1, block)))
        return order, ((low + high) // 2).repeat_interleave(block, dim=0)

    return order_with_centres


def _boxes(coordinates: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowest and highest coordinates of the tokens of each block, each `[blocks, 3]`."""
    limits = torch.iinfo(coordinates.dtype)
    low = coordinates.masked_fill(padding[..., None], limits.max).amin(1)
    high = coordinates.masked_fill(padding[..., None], limits.min).amax(1)
    return low, high


def _frame_by_frame(grid: Grid, block: int, inside: torch.Tensor, place: torch.Tensor):
    slots = -(-grid.frame_tokens // block) * block
    order = torch.full((grid.frames, slots), -1)
    order[:, : grid.frame_tokens] = torch.arange(grid.frames)[:, None] * grid.frame_tokens + inside
    coordinates = torch.zeros(grid.frames, slots, 3, dtype=torch.int32)
    coordinates[:, :, 0] = torch.arange(grid.frames)[:, None]
    coordinates[:, : grid.frame_tokens, 1:] = place
    return order.reshape(-1), coordinates.reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class Side:
    """The query or key side of a plan.

    Attributes:
        tokens: How many tokens the caller's tensor has on this side.
        block: Slots in a block.
        order: The token of each slot, int32 `[1 or heads, slots]`, -1 for padding.
        table: What the in-block rules read of each slot (see rule.py), int32 `[1 or heads, slots, 5]`.
    """

    tokens: int
    block: int
    order: torch.Tensor
    table: torch.Tensor

    @classmethod
    @on_cpu
    def arrange(
        cls, spans: tuple[Span, ...], block: int, bits: torch.Tensor, grid_order: GridOrder, aligned: bool = True
    ) -> Side:
        """Lays spans out one behind the other.

        Args:
            spans: The spans of this side, in token order.
            block: Slots in a block.
            bits: Columns 3 and 4 of the table for each span, int32 `[spans, 2]`.
            grid_order: Order of the tokens of spans that lie on a grid; the others keep theirs.
            aligned: Pad every span to whole blocks, not only the end, so that no block holds two spans.

        Raises:
            InvalidInputError: If the block size is below 1.
        """
        if block < 1:
            raise InvalidInputError(f"blocks of {block} tokens were asked for; give 1 at least.")
        orders, tables, start = [], [], 0
        for span, span_bits in zip(spans, bits, strict=True):
            if span.grid is None:
                order, coordinates = torch.arange(span.tokens), torch.zeros(span.tokens, 3, dtype=torch.int32)
            else:
                order, coordinates = grid_order(span.grid, block)
            valid = order >= 0
            order = torch.where(valid, order + start, -1)
            table = torch.cat([coordinates, valid[:, None] * span_bits], dim=1)
            order, table = _pad(order, table, block) if aligned else (order, table)
            orders.append(order)
            tables.append(table)
            start += span.tokens
        order, table = _pad(torch.cat(orders), torch.cat(tables), block)
        return cls(start, block, order.to(torch.int32)[None], table.to(torch.int32)[None])

    @property
    def slots(self) -> int:
        return self.order.shape[-1]

    @property
    def blocks(self) -> int:
        return self.slots // self.block

    @cached_property
    def in_token_order(self) -> bool:
        """Whether slots hold the tokens as they come, with padding behind the last alone."""
        tokens = torch.arange(self.tokens, dtype=torch.int32, device=self.order.device)
        return self.order.shape[0] == 1 and torch.equal(self.order[0, : self.tokens], tokens)

    def to(self, device) -> Side:
        return Side(self.tokens, self.block, self.order.to(device), self.table.to(device))

    def boxes(self) -> torch.Tensor:
        """Lowest and highest coordinates of the tokens of each block, int32 `[blocks, 2, 3]`; shared orders only."""
        blocks = (self.blocks, self.block)
        return torch.stack(
            _boxes(self.table[0, :, :3].unflatten(0, blocks), (self.order[0] < 0).unflatten(0, blocks)), 1
        )

    def in_waves(self) -> torch.Tensor:
        """Blocks in an order in which neighbours see much the same keys, so that a GPU's cache holds what the blocks
        that it computes at a time need; int64 `[blocks]`.

        That is as they stand, but where a block is a piece of one frame the same pieces of a few frames follow each
        other: methods look at the same place of other frames.
        """
        natural = torch.arange(self.blocks, device=self.order.device)
        if self.order.shape[0] > 1:
            return natural
        first, last = self.boxes()[..., 0].clamp(0, self.table[0, :, 0].max()).long().unbind(1)
        if float((last - first).float().mean()) >= 0.5:
            return natural
        by_frame = first.argsort(stable=True)
        sizes = torch.bincount(first)
        piece = torch.empty_like(first)
        piece[by_frame] = natural - (sizes.cumsum(0) - sizes)[first[by_frame]]
        group = first // _FRAMES_OF_A_WAVE
        return ((group * self.blocks + piece) * len(sizes) + first).argsort(stable=True)

    def padded_blocks(self) -> torch.Tensor:
        """Which key blocks hold padding or tokens of a pad span, bool `[1 or heads, blocks]`."""
        return (self.table[..., 3] == 0).unflatten(1, (self.blocks, self.block)).any(-1)


def _pad(order: torch.Tensor, table: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    missing = -len(order) % block
    pad = torch.nn.functional.pad
    return pad(order, (0, missing), value=-1), pad(table, (0, 0, 0, missing))
