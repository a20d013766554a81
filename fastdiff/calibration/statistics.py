"""Sums, peaks and small entries of the attention map block by block, without ever holding the map.

The map is computed in tiles of whole rows, so that the softmax of a tile is exact, and each tile is counted in all
token orders at once: counting it again costs a tenth of computing it again. Tiles are `[heads, keys, queries]`, so that
the keys of a block, wherever they stand, are gathered in long pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fastdiff.methods.paro_file import BLOCK

# Entries of the attention map in a tile: 4 MiB in float32 stay in a CPU's cache; a GPU wants larger ones.
TILE, TILE_ON_GPU = 2**20, 2**26


class BlockStatistics(NamedTuple):
    """Of the blocks of one token order, each `[heads, rows, blocks]`; the last block may have fewer tokens.

    Attributes:
        sums: Attention in the block. All blocks of a row and the text hold as much as the row has queries.
        peaks: Largest entry, or None where only sums were asked for.
        small: Share of the entries below epsilon, likewise.
    """

    sums: torch.Tensor
    peaks: torch.Tensor | None = None
    small: torch.Tensor | None = None


def block_statistics(
    q: torch.Tensor,
    k: torch.Tensor,
    orders: Sequence[torch.Tensor],
    scale: float,
    *,
    start: int = 0,
    hidden: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    epsilon: float | None = None,
    tile: int | None = None,
) -> list[BlockStatistics]:
    """What the blocks of the grid's part of the map hold, for each token order.

    Args:
        q: Queries of the grid, `[heads, tokens, head_dim]`, float32.
        k: Keys of the grid and of what stands around it, `[heads, keys, head_dim]`, float32.
        orders: The tokens as they follow each other, each int64 `[tokens]`.
        scale: Factor of the scores.
        start: Where the grid's keys begin.
        hidden: Keys that nobody sees, bool `[keys]`.
        rows: Query blocks to look at, ascending int64 `[rows]`. By default all, which costs no more than one order
            does; some cost their share for each order.
        epsilon: Entries below it count as small. None asks for sums alone, which is faster.
        tile: Entries computed at a time; by default what suits the device.
    """
    tile = tile or (TILE if q.device.type == "cpu" else TILE_ON_GPU)
    counter = _Counter(k, scale, start, q.shape[1], hidden, epsilon, tile)
    blocks = torch.arange(q.shape[1], device=q.device) // BLOCK
    if rows is None:
        # Where each token stands in an order, and so in which block.
        places = [torch.empty_like(order).scatter_(0, order, blocks) for order in orders]
        return counter.count(q, orders, places, int(blocks[-1]) + 1)
    found = []
    for order in orders:
        chosen = torch.isin(blocks, rows)
        place = torch.searchsorted(rows, blocks[chosen])
        found += counter.count(q[:, order[chosen]], [order], [place], len(rows))
    return found


def block_sizes(tokens: int) -> torch.Tensor:
    """Tokens in each block, int64 `[blocks]`; the last may have fewer."""
    return (tokens - torch.arange(0, tokens, BLOCK)).clamp(max=BLOCK)


class _Counter:
    def __init__(self, k, scale, start, tokens, hidden, epsilon, tile):
        self.k, self.scale, self.start, self.tokens = k, scale, start, tokens
        self.hidden, self.epsilon, self.tile = hidden, epsilon, tile

    def count(
        self, q: torch.Tensor, orders: Sequence[torch.Tensor], places: Sequence[torch.Tensor], rows: int
    ) -> list[BlockStatistics]:
        """Counts the rows of `q` in each order, where `places` tells the query block of each of them."""
        heads, queries, _ = q.shape
        blocks = -(-self.tokens // BLOCK)
        shape = (len(orders), heads, rows, blocks)
        sums = q.new_zeros(shape)
        peaks, small = (None, None) if self.epsilon is None else (q.new_zeros(shape), q.new_zeros(shape))
        for some, part in self._tiles(heads, queries):
            scores = self.k[some] @ (q[some, part] * self.scale).transpose(-1, -2)
            if self.hidden is not None:
                scores.masked_fill_(self.hidden[:, None], float("-inf"))
            weights = scores.softmax(dim=1)
            low = None if self.epsilon is None else (weights < self.epsilon).to(weights.dtype)
            for which, (order, place) in enumerate(zip(orders, places, strict=True)):
                place = place[part]
                sums[which, some].index_add_(1, place, self._by_block(weights, order, "sum"))
                if self.epsilon is not None:
                    highest = self._by_block(weights, order, "max")
                    peaks[which, some].scatter_reduce_(1, place[None, :, None].expand_as(highest), highest, "amax")
                    small[which, some].index_add_(1, place, self._by_block(low, order, "sum"))
        if self.epsilon is None:
            return [BlockStatistics(found) for found in sums]
        sizes = block_sizes(self.tokens).to(q.device)
        for which, place in enumerate(places):
            small[which] /= place.bincount(minlength=rows)[:, None] * sizes
        return [BlockStatistics(*found) for found in zip(sums, peaks, small, strict=True)]

    def _tiles(self, heads: int, queries: int) -> Iterator[tuple[slice, slice]]:
        """Heads and queries whose entries stay within the tile, where one query does."""
        keys = self.k.shape[1]
        some_queries = max(1, min(queries, self.tile // keys))
        some_heads = max(1, self.tile // (keys * some_queries))
        for head in range(0, heads, some_heads):
            for query in range(0, queries, some_queries):
                yield slice(head, head + some_heads), slice(query, query + some_queries)

    def _by_block(self, x: torch.Tensor, order: torch.Tensor, mode: str) -> torch.Tensor:
        """`[heads, keys, queries]` in one order of the grid's keys, summed up or not, `[heads, queries, blocks]`."""
        heads, keys, queries = x.shape
        first = torch.arange(heads, device=x.device)[:, None]
        bags = torch.arange(0, self.tokens, BLOCK, device=x.device) + first * self.tokens
        places = order + self.start + first * keys
        found = torch.nn.functional.embedding_bag(places.flatten(), x.flatten(0, 1), bags.flatten(), mode=mode)
        return found.view(heads, -1, queries).transpose(1, 2)
