"""Block-sparse attention in plain torch, forward and backward: skips what the plan skips, on any device."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .order import Side
from .plan import BlockPlan

# Biases of rows with partial blocks are kept between calls only while they are small.
_KEPT_BYTES = 256 * 2**20
# Scores that are made at a time: those of a few heads, or of one head of a long row.
_SCORES = 8 * 2**20
_kept: weakref.WeakKeyDictionary[BlockPlan, dict] = weakref.WeakKeyDictionary()


class _Row(NamedTuple):
    """One query block: its key blocks, an additive bias `[block_q, keys]` and its queries without keys, or None."""

    blocks: torch.Tensor
    bias: torch.Tensor | None
    empty: torch.Tensor | None


def portable(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One dense call for each query block and the key blocks of its row; see `attention` for the arguments.

    Returns:
        Output `[batch, query tokens, heads, head_dim]` and, where asked for, the natural log-sum-exp
        `[batch, heads, query tokens]` (else None).
    """
    queries, keys, values = _to_slots(q, k, v, plan)
    out = torch.zeros_like(queries)
    lse = queries.new_full(queries.shape[:-1], float("-inf"), dtype=torch.float32) if return_lse else None
    # Fresh memory costs page faults, on the CPU more than the copying: all rows share what the longest needs.
    room = keys.new_empty(2, plan.longest_row * keys[:, :, 0].numel())
    scores = None
    if _by_products(q) and not return_lse:
        longest = plan.longest_row * plan.key.block * plan.query.block
        scores = keys.new_empty(min(max(_SCORES, longest), q.shape[2] * longest))
    for heads, index, row in _rows(plan, q.dtype, key_mask):
        query = queries[:, heads, index]
        key, value = (_row_blocks(x[:, heads], row, part) for x, part in zip((keys, values), room, strict=True))
        if return_lse:
            weights, row_lse = _softmax(query, key, row, scale)
            out[:, heads, index] = (weights @ value.to(weights.dtype)).to(q.dtype)
            lse[:, heads, index] = row_lse
            continue
        if scores is None:
            result = F.scaled_dot_product_attention(query, key, value, attn_mask=row.bias, scale=scale)
        else:
            result = _products(query, key, value, row.bias, scale, scores)
        out[:, heads, index] = result if row.empty is None else result.masked_fill(row.empty, 0)
    place = _inverse(plan.query.order, plan.query_tokens)
    if return_lse:
        lse = _pick(lse.flatten(2)[..., None], place)[..., 0]
    return _pick(out.flatten(2, 3), place).transpose(1, 2), lse


def portable_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, row by row, with the softmax computed anew.

    Args:
        grad: Gradient of the output `[batch, query tokens, heads, head_dim]`.
        grad_lse: Gradient of the log-sum-exp `[batch, heads, query tokens]`, or None.
        q, k, v, plan, scale, key_mask: As in the forward call.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = _to_slots(q, k, v, plan)
    # Padding queries repeat token 0; without a gradient they leave no trace.
    padding = (plan.query.order < 0).unflatten(1, (-1, plan.query.block))[None, ..., None]
    grads = _gather(grad, plan.query).masked_fill(padding, 0)
    grads_lse = None
    if grad_lse is not None:
        grads_lse = _gather(grad_lse.transpose(1, 2)[..., None], plan.query).masked_fill(padding, 0)
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=exact) for x in (queries, keys, values))
    for heads, index, row in _rows(plan, q.dtype, key_mask):
        query, upstream = (x[:, heads, index].to(exact) for x in (queries, grads))
        key, value = (_row_blocks(x[:, heads], row).to(exact) for x in (keys, values))
        weights, _ = _softmax(query, key, row, scale)
        slope = upstream @ value.transpose(-1, -2)
        slope = slope - (slope * weights).sum(-1, keepdim=True)
        if grads_lse is not None:
            slope = slope + grads_lse[:, heads, index]
        slope = slope * weights * scale
        blocks = (len(row.blocks), plan.key.block)
        grad_q[:, heads, index] = slope @ key
        grad_k[:, heads].index_add_(2, row.blocks, (slope.transpose(-1, -2) @ query).unflatten(2, blocks))
        grad_v[:, heads].index_add_(2, row.blocks, (weights.transpose(-1, -2) @ upstream).unflatten(2, blocks))
    sides = (plan.query, plan.key, plan.key)
    tokens = (
        _pick(x.flatten(2, 3), _inverse(side.order, side.tokens)).transpose(1, 2)
        for x, side in zip((grad_q, grad_k, grad_v), sides, strict=True)
    )
    return tuple(x.to(q.dtype) for x in tokens)


def _by_products(q: torch.Tensor) -> bool:
    """Whether two products with the scores between them are faster than SDPA, which takes few queries 32 at a time."""
    return q.device.type == "cpu" and q.dtype == torch.float32


def _products(query, key, value, bias, scale, room):
    """What SDPA gives, for as many heads at a time as `room` has space for their scores."""
    batch, heads, rows, keys = *query.shape[:3], key.shape[2]
    some = room.numel() // (rows * keys)
    out = torch.empty_like(query)
    for sample in range(batch):
        hides = bias if bias is None or bias.dim() == 2 else bias[sample, 0]
        for first in range(0, heads, some):
            q, k, v, result = (x[sample, first : first + some] for x in (query, key, value, out))
            scores = room[: len(q) * rows * keys].view(-1, rows, keys)
            start, weight = (scores, 0) if hides is None else (hides, 1)
            torch.baddbmm(start, q, k.transpose(1, 2), beta=weight, alpha=scale, out=scores)
            torch.softmax(scores, -1, out=scores)
            torch.bmm(scores, v, out=result)
    return out


def _row_blocks(x, row, room=None):
    """The key blocks of a row, `[batch, heads, keys, head_dim]`, written into `room` where it is given."""
    shape = (*x.shape[:2], len(row.blocks), *x.shape[3:])
    out = None if room is None else room[: math.prod(shape)].view(shape)
    return torch.index_select(x, 2, row.blocks, out=out).flatten(2, 3)


def _softmax(query, key, row, scale):
    """Weights `[batch, heads, block_q, keys]` and log-sum-exp of one row; 0 and -inf for queries without keys."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).transpose(-1, -2) * scale
    scores = scores if row.bias is None else scores + row.bias
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - lse[..., None]).exp()
    if row.empty is None:
        return weights, lse
    return weights.masked_fill(row.empty, 0), lse.masked_fill(row.empty[..., 0], float("-inf"))


def _rows(plan: BlockPlan, dtype: torch.dtype, key_mask: torch.Tensor | None):
    """Yields for every query block with keys the heads it is for, its index, and its _Row."""
    hidden = None if key_mask is None else _gather_mask(~key_mask, plan)
    for head in range(plan.heads or 1):
        heads = slice(None) if plan.heads is None else slice(head, head + 1)
        for index, row in enumerate(_plan_rows(plan, head, dtype)):
            if len(row.blocks) == 0:
                continue
            if hidden is not None:
                row = _hide(row, hidden[:, head % hidden.shape[1], row.blocks].flatten(1), dtype)
            yield heads, index, row


def _hide(row: _Row, hidden: torch.Tensor, dtype: torch.dtype) -> _Row:
    """The row under a key mask, hidden `[batch, keys]`; its bias then differs by sample."""
    visible = ~hidden[:, None, None, :]
    if row.bias is not None:
        # A query without keys has a bias that hides none.
        visible = visible & (row.bias == 0) & ~row.empty
    return _Row(row.blocks, *_bias(visible, dtype))


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    empty = ~visible.any(-1, keepdim=True)
    # A row of nothing would be NaN, forward and backward: it sees everything here and is zeroed afterwards.
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~(visible | empty), float("-inf")), empty


def _plan_rows(plan: BlockPlan, head: int, dtype: torch.dtype) -> Iterable[_Row]:
    rows = (_row(plan, head, row, dtype) for row in range(plan.query_blocks))
    area = (plan.full_blocks + plan.partial_blocks) * plan.query.block * plan.key.block
    if area * dtype.itemsize > _KEPT_BYTES:
        return rows
    kept = _kept.setdefault(plan, {})
    if (head, dtype) not in kept:
        kept[head, dtype] = list(rows)
    return kept[head, dtype]


def _row(plan: BlockPlan, head: int, row: int, dtype: torch.dtype) -> _Row:
    which = head % plan.lists
    full, partial = plan.row(plan.full, which, row), plan.row(plan.partial, which, row)
    blocks = torch.cat([full, partial])
    if len(partial) == 0:
        return _Row(blocks, None, None)
    ruled = plan.partial_mask(head, row)
    visible = torch.cat([ruled.new_ones(ruled.shape[0], len(full), ruled.shape[2]), ruled], dim=1).flatten(1)
    return _Row(blocks, *_bias(visible, dtype))


def _to_slots(q, k, v, plan: BlockPlan):
    return _gather(q, plan.query), _gather(k, plan.key), _gather(v, plan.key)


def _gather(x: torch.Tensor, side: Side) -> torch.Tensor:
    """Tokens to slots: `[batch, tokens, heads, head_dim]` to `[batch, heads, blocks, block, head_dim]`."""
    # Padding slots take token 0: any finite value does, since no mask lets them be seen.
    return _pick(x.transpose(1, 2), side.order.clamp(min=0).long()).unflatten(2, (side.blocks, side.block))


def _pick(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows `place`, `[1 or heads, n]`, of the third dimension of `[batch, heads, m, d]`."""
    if place.shape[0] == 1:
        return x.index_select(2, place[0])
    out = x.new_empty(x.shape[0], x.shape[1], place.shape[1], x.shape[3])
    # Head by head: an index for each element, as `gather` takes it, is several times slower.
    for head, rows in enumerate(place):
        torch.index_select(x[:, head], 1, rows, out=out[:, head])
    return out


def _gather_mask(key_mask: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """A key mask in slots, bool `[batch, 1 or heads, key blocks, block_k]`."""
    return key_mask[:, plan.key.order.clamp(min=0).long()].unflatten(2, (-1, plan.key.block))


def _inverse(order: torch.Tensor, tokens: int) -> torch.Tensor:
    """The slot of each token, int64 `[1 or heads, tokens]`."""
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order)
    inverse = order.new_zeros(order.shape[0], tokens + 1, dtype=torch.int64)
    return inverse.scatter(1, torch.where(order < 0, tokens, order).long(), slots)[:, :tokens]
