"""Block-sparse attention in plain torch, forward and backward: skips what the plan skips, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .order import Side
from .plan import BlockPlan

# Keys and values that are gathered for one call: more rows in a call cost less overhead, and leave the cache.
_CALL_BYTES = 4 * 2**20
# What is prepared of a plan is kept between calls only while it is small.
_KEPT_BYTES = 256 * 2**20
_kept: weakref.WeakKeyDictionary[BlockPlan, dict] = weakref.WeakKeyDictionary()


class _Rows(NamedTuple):
    """Query blocks with equally many key blocks, computed in one call.

    Attributes:
        queries: The query blocks, int64 `[rows]`.
        keys: Their key blocks, int64 `[rows, n]`.
        bias: What is added to the scores, `[1 or batch x heads, rows, block_q, n x block_k]`, or None.
        empty: Queries without keys, bool of the shape of `bias` with 1 key, or None.
    """

    queries: torch.Tensor
    keys: torch.Tensor
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
    """A dense call for every few query blocks and the key blocks of their rows; arguments as in `attention`.

    Returns:
        Output `[batch, query tokens, heads, head_dim]` and, where asked for, the natural log-sum-exp
        `[batch, heads, query tokens]` (else None).
    """
    queries, keys, values = _to_slots(q, k, v, plan)
    out = torch.zeros_like(queries)
    lse = queries.new_full(queries.shape[:-1], float("-inf"), dtype=torch.float32) if return_lse else None
    for heads, rows in _calls(plan, q, key_mask):
        query, key, value = _select(queries, keys, values, heads, rows)
        if return_lse:
            weights, rows_lse = _softmax(query, key, rows, scale)
            result = (weights @ value.to(weights.dtype)).to(q.dtype)
            _put(lse[..., None], heads, rows.queries, rows_lse[..., None])
        else:
            result = F.scaled_dot_product_attention(query, key, value, attn_mask=rows.bias, scale=scale)
            result = result if rows.empty is None else result.masked_fill(rows.empty, 0)
        _put(out, heads, rows.queries, result)
    lse = _to_tokens(lse[..., None], plan.query)[..., 0].transpose(1, 2) if return_lse else None
    return _to_tokens(out, plan.query), lse


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
    """Gradients of q, k and v, with the softmax computed anew.

    Args:
        grad: Gradient of the output `[batch, query tokens, heads, head_dim]`.
        grad_lse: Gradient of the log-sum-exp `[batch, heads, query tokens]`, or None.
        q, k, v, plan, scale, key_mask: As in the forward call.
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(exact) for x in _to_slots(q, k, v, plan))
    # Padding queries repeat token 0; without a gradient they leave no trace.
    padding = (plan.query.order < 0).unflatten(1, (-1, plan.query.block))[None, ..., None]
    grads = _gather(grad.to(exact), plan.query).masked_fill(padding, 0)
    if grad_lse is not None:
        grads_lse = _gather(grad_lse.transpose(1, 2)[..., None].to(exact), plan.query).masked_fill(padding, 0)
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (queries, keys, values))
    for heads, rows in _calls(plan, q, key_mask):
        query, key, value = _select(queries, keys, values, heads, rows)
        upstream = _of_heads(grads, heads).index_select(1, rows.queries)
        weights, _ = _softmax(query, key, rows, scale)
        slope = upstream @ value.transpose(-1, -2)
        slope = slope - (slope * weights).sum(-1, keepdim=True)
        if grad_lse is not None:
            slope = slope + _of_heads(grads_lse, heads).index_select(1, rows.queries)
        slope = slope * weights * scale
        _put(grad_q, heads, rows.queries, slope @ key)
        for total, part in ((grad_k, slope.mT @ query), (grad_v, weights.mT @ upstream)):
            blocks = part.unflatten(2, (-1, plan.key.block)).flatten(1, 2)
            _of_heads(total, heads).index_add_(1, rows.keys.flatten(), blocks)
    sides = (plan.query, plan.key, plan.key)
    return tuple(_to_tokens(x, s).to(q.dtype) for x, s in zip((grad_q, grad_k, grad_v), sides, strict=True))


def _softmax(query, key, rows, scale):
    """Weights `[batch x heads, rows, block_q, keys]` and log-sum-exp; 0 and -inf for queries without keys."""
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).mT * scale
    scores = scores if rows.bias is None else scores + rows.bias
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - lse[..., None]).exp()
    if rows.empty is None:
        return weights, lse
    return weights.masked_fill(rows.empty, 0), lse.masked_fill(rows.empty[..., 0], float("-inf"))


def _calls(plan: BlockPlan, q: torch.Tensor, key_mask: torch.Tensor | None) -> Iterator[tuple[slice, _Rows]]:
    """The calls that make up one attention: the heads and the rows of each."""
    batch, _, heads, dim = q.shape
    hidden = None
    if key_mask is not None:
        slots = ~key_mask[:, plan.key.order.clamp(min=0).long()].unflatten(2, (-1, plan.key.block))
        hidden = slots.expand(-1, heads, -1, -1)
    for head in range(plan.heads or 1):
        group = slice(None) if plan.heads is None else slice(head, head + 1)
        together = batch * (heads if plan.heads is None else 1)
        for rows in _plan_rows(plan, head, q.dtype, 2 * together * dim * q.dtype.itemsize):
            if hidden is not None:
                rows = _hide(rows, _of_heads(hidden, group)[:, rows.keys].flatten(2), q.dtype)
            yield group, rows


def _plan_rows(plan: BlockPlan, head: int, dtype: torch.dtype, bytes_per_key: int) -> Iterable[_Rows]:
    per_block = max(1, _CALL_BYTES // (bytes_per_key * plan.key.block))
    rows = _group_rows(plan, head, dtype, per_block)
    area = (plan.full_blocks + plan.partial_blocks) * plan.query.block * plan.key.block
    if plan.partial_blocks and area * dtype.itemsize > _KEPT_BYTES:
        return rows
    kept = _kept.setdefault(plan, {})
    key = (head, dtype, per_block)
    if key not in kept:
        kept[key] = list(rows)
    return kept[key]


def _group_rows(plan: BlockPlan, head: int, dtype: torch.dtype, per_call: int) -> Iterator[_Rows]:
    """Neighbouring rows of equal length, at most `per_call` key blocks at once; rows without keys are left out."""
    which = head % plan.lists
    full, partial = plan.full.counts[which].tolist(), plan.partial.counts[which].tolist()
    start = 0
    while start < plan.query_blocks:
        length = full[start] + partial[start]
        end = start + 1
        fits = start + max(1, per_call // max(1, length))
        while end < min(fits, plan.query_blocks) and (full[end], partial[end]) == (full[start], partial[start]):
            end += 1
        if length:
            yield _rows(plan, head, range(start, end), dtype)
        start = end


def _rows(plan: BlockPlan, head: int, rows: range, dtype: torch.dtype) -> _Rows:
    which = head % plan.lists
    full = torch.stack([plan.row(plan.full, which, row) for row in rows])
    partial = torch.stack([plan.row(plan.partial, which, row) for row in rows])
    queries, keys = torch.arange(rows.start, rows.stop, device=full.device), torch.cat([full, partial], dim=1)
    if partial.shape[1] == 0:
        return _Rows(queries, keys, None, None)
    ruled = torch.stack([plan.partial_mask(head, row) for row in rows])
    whole = ruled.new_ones(*ruled.shape[:2], full.shape[1], ruled.shape[3])
    visible = torch.cat([whole, ruled], dim=2).flatten(2)
    return _Rows(queries, keys, *_bias(visible[None], dtype))


def _hide(rows: _Rows, hidden: torch.Tensor, dtype: torch.dtype) -> _Rows:
    """The rows under a key mask, hidden `[batch x heads, rows, keys]`."""
    visible = ~hidden[:, :, None, :]
    return _Rows(rows.queries, rows.keys, *_bias(visible if rows.bias is None else visible & (rows.bias == 0), dtype))


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    empty = ~visible.any(-1, keepdim=True)
    # A row of nothing would be NaN, forward and backward: it sees everything here and is zeroed afterwards.
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~(visible | empty), float("-inf")), empty


def _of_heads(x: torch.Tensor, heads: slice) -> torch.Tensor:
    """Slots of some heads as `[batch x heads, blocks, ...]`, a view."""
    return x.flatten(0, 1) if heads == slice(None) else x[:, heads.start]


def _select(queries, keys, values, heads, rows):
    """Query, key and value of a call, each `[batch x heads, rows, tokens, head_dim]`."""
    query = _of_heads(queries, heads).index_select(1, rows.queries)
    shape = (*rows.keys.shape, -1)
    key, value = (
        _of_heads(x, heads).index_select(1, rows.keys.flatten()).unflatten(1, shape[:2]).flatten(2, 3)
        for x in (keys, values)
    )
    return query, key, value


def _put(target: torch.Tensor, heads: slice, queries: torch.Tensor, value: torch.Tensor) -> None:
    _of_heads(target, heads).index_copy_(1, queries, value)


def _to_slots(q, k, v, plan: BlockPlan):
    return _gather(q, plan.query), _gather(k, plan.key), _gather(v, plan.key)


def _gather(x: torch.Tensor, side: Side) -> torch.Tensor:
    """Tokens to slots: `[batch, tokens, heads, head_dim]` to `[batch, heads, blocks, block, head_dim]`."""
    # Padding slots take token 0: any finite value does, since no mask lets them be seen.
    slots = _pick(x.transpose(1, 2), side.order.clamp(min=0).long())
    return slots.contiguous().unflatten(2, (side.blocks, side.block))


def _to_tokens(x: torch.Tensor, side: Side) -> torch.Tensor:
    """Slots to tokens: `[batch, heads, blocks, block, head_dim]` to `[batch, tokens, heads, head_dim]`."""
    slots = torch.arange(side.slots, device=x.device).expand_as(side.order)
    place = side.order.new_zeros(side.order.shape[0], side.tokens + 1, dtype=torch.int64)
    # Padding slots all write to a last place that is cut off.
    place.scatter_(1, torch.where(side.order < 0, side.tokens, side.order).long(), slots)
    return _pick(x.flatten(2, 3), place[:, :-1]).transpose(1, 2)


def _pick(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows `place`, `[1 or heads, n]`, of the third dimension of `[batch, heads, m, d]`."""
    if place.shape[0] == 1:
        return x.index_select(2, place[0])
    return x.gather(2, place[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))
