"""Block-sparse attention in plain torch: skips what the plan skips, on any device, with ordinary autograd."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .plan import BlockPlan

# Biases of rows with partial blocks are kept between calls only while they are small.
_KEPT_BYTES = 256 * 2**20
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
    queries = _gather(q, plan.query.order, plan.query.block)
    keys = _gather(k, plan.key.order, plan.key.block)
    values = _gather(v, plan.key.order, plan.key.block)
    hidden = None if key_mask is None else _gather_mask(~key_mask, plan)

    outs, lses = [], []
    for head in range(plan.heads or 1):
        group = slice(None) if plan.heads is None else slice(head, head + 1)
        group_hidden = None if hidden is None else hidden[:, head % hidden.shape[1]]
        rows = _plan_rows(plan, head, q.dtype)
        parts = (queries[:, group], keys[:, group], values[:, group])
        out, lse = _attend_rows(*parts, rows, scale, group_hidden, return_lse)
        outs.append(out)
        lses.append(lse)
    place = _inverse(plan.query.order, plan.query_tokens)
    out = _pick(torch.cat(outs, dim=1), place).transpose(1, 2)
    lse = _pick(torch.cat(lses, dim=1)[..., None], place)[..., 0] if return_lse else None
    return out, lse


def _attend_rows(queries, keys, values, rows, scale, hidden, return_lse):
    """All rows of heads that share a list; tensors `[batch, heads, blocks, block, head_dim]`."""
    outs, lses = [], []
    for index, row in enumerate(rows):
        query = queries[:, :, index]
        if len(row.blocks) == 0:
            outs.append(torch.zeros_like(query))
            lses.append(query.new_full(query.shape[:-1], float("-inf"), dtype=torch.float32))
            continue
        key, value = (x.index_select(2, row.blocks).flatten(2, 3) for x in (keys, values))
        bias, empty = row.bias, row.empty
        if hidden is not None:
            bias, empty = _hide(query, bias, hidden[:, row.blocks].flatten(1))
        out, lse = _dense(query, key, value, bias, scale, return_lse)
        outs.append(out if empty is None else out.masked_fill(empty, 0))
        if return_lse:
            lses.append(lse if empty is None else lse.masked_fill(empty[..., 0], float("-inf")))
    return torch.cat(outs, dim=2), torch.cat(lses, dim=2) if return_lse else None


def _dense(query, key, value, bias, scale, return_lse):
    if not return_lse:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale), None
    exact = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(exact) @ key.to(exact).transpose(-1, -2) * scale
    scores = scores if bias is None else scores + bias
    lse = torch.logsumexp(scores, dim=-1)
    return ((scores - lse[..., None]).exp() @ value.to(exact)).to(query.dtype), lse


def _hide(query, bias, hidden):
    """Adds a key mask to a row's bias; the result differs by sample, `[batch, 1, block_q, keys]`."""
    visible = ~hidden[:, None, None, :].expand(-1, 1, query.shape[2], -1)
    return _bias(visible if bias is None else visible & (bias == 0), query.dtype)


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


def _gather(x: torch.Tensor, order: torch.Tensor, block: int) -> torch.Tensor:
    """Tokens to slots: `[batch, tokens, heads, head_dim]` to `[batch, heads, blocks, block, head_dim]`."""
    # Padding slots take token 0: any finite value does, since no mask lets them be seen.
    order, x = order.clamp(min=0).long(), x.transpose(1, 2)
    return _pick(x, order).unflatten(2, (-1, block))


def _pick(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows `place`, `[1 or heads, n]`, of the third dimension of `[batch, heads, m, d]`."""
    if place.shape[0] == 1:
        return x.index_select(2, place[0])
    return x.gather(2, place[None, :, :, None].expand(x.shape[0], -1, -1, x.shape[3]))


def _gather_mask(key_mask: torch.Tensor, plan: BlockPlan) -> torch.Tensor:
    """A key mask in slots, bool `[batch, 1 or heads, key blocks, block_k]`."""
    return key_mask[:, plan.key.order.clamp(min=0).long()].unflatten(2, (-1, plan.key.block))


def _inverse(order: torch.Tensor, tokens: int) -> torch.Tensor:
    """The slot of each token, int64 `[1 or heads, tokens]`."""
    slots = torch.arange(order.shape[1], device=order.device).expand_as(order)
    inverse = order.new_zeros(order.shape[0], tokens + 1, dtype=torch.int64)
    return inverse.scatter(1, torch.where(order < 0, tokens, order).long(), slots)[:, :tokens]
