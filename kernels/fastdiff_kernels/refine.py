"""Pairs of blocks whose bounding boxes touch, but of whose tokens none sees another: found without testing them all."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

from .order import Side
from .rule import Rule

# A block is split into so many parts at a time at most, and so many pairs of parts are looked at together.
_PARTS, _TOGETHER = 4, 1 << 17


def really_touched(rule: Rule, query: Side, key: Side, unsure: torch.Tensor) -> torch.Tensor:
    """Which pairs of blocks have a pair of tokens for which a BOX rule holds.

    Two blocks that fill their bounding boxes surely have. Where they do not, a pair of tokens at corners of the boxes
    mostly settles it; if not, the blocks are split into parts, and so on down to tokens.

    Args:
        rule: A BOX rule.
        query, key: The two sides, with one order for all heads.
        unsure: Pairs of blocks whose bounding boxes touch, bool `[query blocks, key blocks]`.

    Returns:
        `unsure` without those that turn out empty.
    """
    pairs = unsure.nonzero()
    seen = torch.zeros(len(pairs), dtype=torch.bool, device=pairs.device)
    owner, (q, k) = torch.arange(len(pairs), device=pairs.device), pairs.unbind(1)
    q_size, k_size = query.block, key.block
    while len(owner):
        q_parts, k_parts = _Parts.of(query, q_size, rule), _Parts.of(key, k_size)
        keep = []
        for some in torch.arange(len(owner), device=owner.device).split(_TOGETHER):
            touched, sure = _meet(q_parts, k_parts, q[some], k[some])
            seen[owner[some[sure]]] = True
            keep.append(some[touched])
        keep = torch.cat(keep)
        keep = keep[~seen[owner[keep]]]
        if q_size * k_size == 1:
            break
        (q, q_size), (k, k_size) = _split(q[keep], q_size), _split(k[keep], k_size)
        owner, q, k = torch.broadcast_tensors(owner[keep, None, None], q[:, :, None], k[:, None])
        owner, q, k = owner.flatten(), q.flatten(), k.flatten()
    unsure = unsure.clone()
    unsure[pairs[:, 0], pairs[:, 1]] = seen
    return unsure


@dataclass(frozen=True, eq=False)
class _Parts:
    """Blocks or parts of them: their boxes, and what the corners see or where they stand.

    Attributes:
        low, high: For both ends of the box on each axis the first and last key coordinate that is seen there; of keys
            the coordinate itself. Each int32 `[3, 2, parts]`.
        corner: Whether each corner of the box is a token, bool `[8, parts]`; the ends of t, y, x as bits 4, 2, 1.
    """

    low: torch.Tensor
    high: torch.Tensor
    corner: torch.Tensor

    @classmethod
    def of(cls, side: Side, size: int, rule: Rule | None = None) -> _Parts:
        """Parts of `size` slots; those of queries with their rule."""
        exists = (side.order[0] >= 0).unflatten(0, (-1, size))
        places = side.table[0, :, :3].unflatten(0, (-1, size))
        most = torch.iinfo(places.dtype).max
        ends = torch.stack(
            [
                places.masked_fill(~exists[..., None], most).amin(1),
                places.masked_fill(~exists[..., None], -1).amax(1),
            ]
        )
        at_end = places == ends[:, :, None]
        corner = torch.stack(
            [
                (at_end[t, :, :, 0] & at_end[y, :, :, 1] & at_end[x, :, :, 2] & exists).any(1)
                for t, y, x in itertools.product((0, 1), repeat=3)
            ]
        )
        ends = ends.permute(2, 0, 1)
        if rule is None:
            return cls(ends, ends, corner)
        # A part that is all padding reaches nothing.
        empty = ~exists.any(1)
        low, high = [], []
        for axis in range(3):
            first, last = rule.axis_tables(axis)
            # Spans that the rule has no say in may stand beyond its tables.
            at = ends[axis].masked_fill(empty, 0).clamp(max=len(first) - 1).long()
            low.append(first[at].masked_fill(empty, most))
            high.append(last[at].masked_fill(empty, -1))
        return cls(torch.stack(low), torch.stack(high), corner)


def _meet(query: _Parts, key: _Parts, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether the boxes of each pair touch, and whether tokens at their corners surely do, each bool `[pairs]`."""
    low, high, place = query.low[..., q], query.high[..., q], key.low[..., k]
    touched = ((low[:, 0] <= place[:, 1]) & (place[:, 0] <= high[:, 1])).all(0)
    # [axis, end of the query's box, end of the key's box, pairs]
    holds = (low[:, :, None] <= place[:, None]) & (place[:, None] <= high[:, :, None])
    q_corner, k_corner = query.corner[:, q], key.corner[:, k]
    sure = torch.zeros_like(touched)
    for a, ends in enumerate(itertools.product((0, 1), repeat=3)):
        for b, others in enumerate(itertools.product((0, 1), repeat=3)):
            here = q_corner[a] & k_corner[b]
            for axis, (end, other) in enumerate(zip(ends, others, strict=True)):
                here &= holds[axis, end, other]
            sure |= here
    return touched, sure


def _split(parts: torch.Tensor, size: int) -> tuple[torch.Tensor, int]:
    # As many as divide it; a prime number of slots falls apart at once.
    count = next((n for n in range(_PARTS, 1, -1) if size % n == 0), size)
    return parts[:, None] * count + torch.arange(count, device=parts.device), size // count
