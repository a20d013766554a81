"""The plan of some heads, cut out of one that says something else for each head."""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import torch

from .block_list import BlockList
from .errors import InvalidInputError
from .order import Side
from .plan import BlockPlan

# Plans are looked up by their handles and carry what was derived from them, so each is cut once.
_cut: WeakKeyDictionary[BlockPlan, dict[tuple[int, int], BlockPlan]] = WeakKeyDictionary()


def of_heads(plan: BlockPlan, first: int, count: int) -> BlockPlan:
    """The plan of `count` heads from `first` on: the plan itself where all heads share it.

    Raises:
        InvalidInputError: If the plan has not so many heads.
    """
    if plan.heads is None:
        return plan
    if not 0 <= first < first + count <= plan.heads:
        raise InvalidInputError(
            f"heads {first} to {first + count - 1} are asked for; the plan has {plan.heads}, counted from 0."
        )
    known = _cut.setdefault(plan, {})
    if (first, count) not in known:
        known[first, count] = _cut_out(plan, slice(first, first + count))
    return known[first, count]


def _cut_out(plan: BlockPlan, heads: slice) -> BlockPlan:
    changed = {"query": _side(plan.query, heads), "key": _side(plan.key, heads)}
    if plan.lists > 1:
        changed |= {"full": _rows(plan.full, heads), "partial": _rows(plan.partial, heads)}
        start, end = _entries(plan.partial, heads)
        changed["bits"] = plan.bits[start:end]
    return replace(plan, **changed)


def _side(side: Side, heads: slice) -> Side:
    order, table = (x if x.shape[0] == 1 else x[heads] for x in (side.order, side.table))
    return replace(side, order=order, table=table)


def _rows(blocks: BlockList, heads: slice) -> BlockList:
    start, end = _entries(blocks, heads)
    return BlockList(blocks.offsets[heads] - start, blocks.indices[start:end])


def _entries(blocks: BlockList, heads: slice) -> tuple[int, int]:
    start, end = torch.stack([blocks.offsets[heads.start, 0], blocks.offsets[heads.stop - 1, -1]]).tolist()
    return start, end
