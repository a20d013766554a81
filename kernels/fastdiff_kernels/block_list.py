"""Compressed lists of blocks: the key blocks of each query block, and the other way round."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .order import Side


@dataclass(frozen=True, eq=False)
class BlockList:
    """For each head (or once for all) and query block its key blocks, ascending, as compressed rows.

    Attributes:
        offsets: Where each row starts in `indices`, int32 `[lists, query blocks + 1]`.
        indices: Key blocks of all rows, int32 `[entries]`.
    """

    offsets: torch.Tensor
    indices: torch.Tensor

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> BlockList:
        """The lists of a bool mask `[lists, query blocks, key blocks]`."""
        lists, rows, _ = mask.shape
        counts = mask.sum(-1)
        ends = counts.flatten().cumsum(0).reshape(lists, rows)
        offsets = torch.cat([(ends[:, :1] - counts[:, :1]), ends], dim=1)
        return cls(offsets.to(torch.int32), mask.nonzero()[:, 2].to(torch.int32))

    def transposed(self, columns: int) -> tuple[BlockList, torch.Tensor]:
        """The rows of each column as a list, and where each of its entries stands in this one, int32 `[entries]`."""
        counts = self.counts.long()
        lists, rows = counts.shape
        row = torch.repeat_interleave(counts.flatten())
        column = row // rows * columns + self.indices
        # Entries stand row by row, so a stable sort keeps the rows of a column in order.
        place = column.argsort(stable=True)
        ends = torch.bincount(column, minlength=lists * columns).cumsum(0).reshape(lists, columns)
        starts = torch.cat([ends.new_zeros(1), ends[:-1, -1]])[:, None]
        offsets = torch.cat([starts, ends], dim=1)
        return BlockList(offsets.to(torch.int32), (row % rows)[place].to(torch.int32)), place.to(torch.int32)

    def to(self, device) -> BlockList:
        return BlockList(self.offsets.to(device), self.indices.to(device))

    @property
    def counts(self) -> torch.Tensor:
        """Entries of each row, int32 `[lists, query blocks]`."""
        return self.offsets.diff(dim=1)

    def mask(self, key_blocks: int) -> torch.Tensor:
        """bool `[lists, query blocks, key blocks]`."""
        lists, rows = self.counts.shape
        row = torch.repeat_interleave(self.counts.flatten().long())
        mask = torch.zeros(lists * rows, key_blocks, dtype=torch.bool, device=self.indices.device)
        mask[row, self.indices.long()] = True
        return mask.reshape(lists, rows, key_blocks)


@dataclass(frozen=True, eq=False)
class Columns:
    """A plan's lists by key block: which query blocks compute it, for the gradients of keys and values.

    Attributes:
        full, partial: Query blocks of each key block.
        bit_place: Where the bitmap of each partial entry stands in `BlockPlan.bits`, int32 `[entries]`.
        launch_order: Key blocks in the order to start them, int32 `[lists, key blocks]`.
    """

    full: BlockList
    partial: BlockList
    bit_place: torch.Tensor
    launch_order: torch.Tensor

    @cached_property
    def heavy(self) -> int:
        """How many places at the head of the launch order hold columns over three times as long as the mean."""
        return heavy_places(self.full, self.partial)


def launch_order(side: Side, full: BlockList, partial: BlockList) -> torch.Tensor:
    """Blocks of the side that the lists are for in the order to start them, int32 `[lists, blocks]`.

    Those with lists over three times as long as the mean come first, the longest of them first, so that none is left
    at the end; all others as `side.in_waves()` has them.
    """
    counts = full.counts + partial.counts
    rank = side.in_waves().argsort()
    return torch.where(_heavy(counts), -counts, rank).argsort(dim=1, stable=True).to(torch.int32)


def heavy_places(full: BlockList, partial: BlockList) -> int:
    """How many places at the head of the launch order hold lists over three times as long as the mean."""
    return int(_heavy(full.counts + partial.counts).sum(1).max())


def _heavy(counts: torch.Tensor) -> torch.Tensor:
    return counts > 3 * counts.float().mean()
