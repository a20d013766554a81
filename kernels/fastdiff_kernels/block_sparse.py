"""Block-sparse attention in Triton: the forward kernel and its launcher. Truth: reference.py.

For query block i, with full blocks F(i), partial blocks P(i) and the in-block rule R,

    out_i = sum_j softmax_j(scale q_i k_j) v_j    over j in F(i), and over the pairs of P(i) where R holds,

by an online softmax in base 2. Queries are read and outputs written through the plan's token order; keys and values
are brought into that order once, so that each key block is one contiguous piece.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .kernel_rule import BOX_PARAMETERS, DISC, MIXED_BITS
from .plan import BlockPlan
from .reorder import gather
from .rule import METRIC_HEADER, RuleKind
from .tuning import forward_tile, interpreted, power_of_two, shared_memory_of

# Triton captures module globals as compile-time constants only in this type.
_METRIC, _BOX, BITS = (tl.constexpr(int(kind)) for kind in (RuleKind.METRIC, RuleKind.BOX, RuleKind.BITS))
_DISC, _MIXED_BITS = tl.constexpr(DISC), tl.constexpr(MIXED_BITS)
_METRIC_HEADER, _BOX_PARAMETERS = tl.constexpr(METRIC_HEADER), tl.constexpr(BOX_PARAMETERS)
_LN2, _SIGN = tl.constexpr(math.log(2)), tl.constexpr(-(2**31))
# What differs from call to call. Triton would compile a kernel anew for counts of 1, multiples of 16, and others.
COUNTS = ("heads", "q_tokens", "q_blocks", "list_step")


@triton.jit
def _of_queries(x, KEYS_FIRST: tl.constexpr):
    return x[None, :] if KEYS_FIRST else x[:, None]


@triton.jit
def _of_keys(x, KEYS_FIRST: tl.constexpr):
    return x[:, None] if KEYS_FIRST else x[None, :]


@triton.jit
def word_of(bits, entry, RULE: tl.constexpr):
    """The bitmap of a partial entry; 0 for rules without."""
    has_word: tl.constexpr = (RULE == BITS) | (RULE == _MIXED_BITS)
    return tl.load(bits + entry) if has_word else 0


@triton.jit
def pairs_hidden(
    q_table, k_table, q_slots, k_slots, block, rule, word,
    RULE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEYS_FIRST: tl.constexpr = False,
):  # fmt: skip
    """0 where a pair of a tile of the partial key block `block` is computed, int32 [queries, keys]; see kernel_rule.py.

    With KEYS_FIRST the tile is [keys, queries].
    """
    if RULE == _BOX:
        guards = tl.load(rule)
        sees_all = (tl.load(q_table + q_slots * 3 + 2) & tl.load(rule + _BOX_PARAMETERS + block)) != 0
        first = _of_queries(tl.where(sees_all, 0 - guards, tl.load(q_table + q_slots * 3)), KEYS_FIRST)
        last = _of_queries(tl.where(sees_all, tl.load(rule + 1), tl.load(q_table + q_slots * 3 + 1)), KEYS_FIRST)
        key = _of_keys(tl.load(k_table + k_slots), KEYS_FIRST)
        return ((key - first) & (last - key) & guards) ^ guards
    elif RULE >= _DISC:
        axes: tl.constexpr = RULE - _DISC + 2
        q_table += q_slots * (axes + 2)
        column = tl.multiple_of(tl.load(rule), 16)
        sees_all = (tl.load(q_table + axes + 1) & tl.load(rule + 1 + block)) != 0
        # Between any place on the grid and padding.
        limit = tl.where(sees_all, 1e20, tl.load(q_table + axes).to(tl.float32, bitcast=True))
        excess = _of_keys(tl.load(k_table + k_slots).to(tl.float32, bitcast=True), KEYS_FIRST)
        excess = excess - _of_queries(limit, KEYS_FIRST)
        for axis in tl.static_range(axes):
            place = tl.where(sees_all, 0.0, tl.load(q_table + axis).to(tl.float32, bitcast=True))
            k_place = tl.load(k_table + (1 + axis) * column + k_slots).to(tl.float32, bitcast=True)
            excess = excess + _of_queries(place, KEYS_FIRST) * _of_keys(k_place, KEYS_FIRST)
        return (excess.to(tl.int32, bitcast=True) ^ -1) & _SIGN
    elif RULE == BITS:
        span = tl.load(rule + block)
        ruled = tl.where((tl.load(q_table + q_slots * 3 + 1) & span) != 0, word >> tl.load(q_table + q_slots * 3), 0)
        seen = tl.where((tl.load(q_table + q_slots * 3 + 2) & span) != 0, -1, ruled)
        # The highest bit is that of padding.
        hidden = (seen & 0x7FFFFFFF) ^ -1
        return _of_queries(hidden, KEYS_FIRST) & _of_keys(tl.load(k_table + k_slots), KEYS_FIRST)
    else:
        span = _of_keys(tl.load(k_table + k_slots * 5 + 3), KEYS_FIRST)
        whole = (_of_queries(tl.load(q_table + q_slots * 5 + 3), KEYS_FIRST) & span) != 0
        holds = (_of_queries(tl.load(q_table + q_slots * 5 + 4), KEYS_FIRST) & span) != 0
        if RULE == _METRIC:
            q_t = _of_queries(tl.load(q_table + q_slots * 5), KEYS_FIRST)
            k_t = _of_keys(tl.load(k_table + k_slots * 5), KEYS_FIRST)
            q_y = _of_queries(tl.load(q_table + q_slots * 5 + 1), KEYS_FIRST)
            q_x = _of_queries(tl.load(q_table + q_slots * 5 + 2), KEYS_FIRST)
            dy = q_y - _of_keys(tl.load(k_table + k_slots * 5 + 1), KEYS_FIRST)
            dx = q_x - _of_keys(tl.load(k_table + k_slots * 5 + 2), KEYS_FIRST)
            limit = tl.load(rule + _METRIC_HEADER + tl.abs(q_t - k_t))
            near = tl.load(rule) * dy * dy + tl.load(rule + 1) * dx * dx < limit
            holds = holds & (near | (k_t < tl.load(rule + 2)))
        elif RULE == _MIXED_BITS:
            query_side = tl.load(rule)
            key_side = tl.load(rule + 1)
            columns = tl.load(rule + 2)
            place = _of_queries((q_slots % BLOCK_Q) // query_side * columns, KEYS_FIRST)
            place += _of_keys((k_slots % BLOCK_K) // key_side, KEYS_FIRST)
            holds = holds & (((word >> place) & 1) != 0)
        return tl.where(whole | holds, 0, 1)


@triton.jit
def pairs_seen(
    q_table, k_table, q_slots, k_slots, block, rule, word,
    RULE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, KEYS_FIRST: tl.constexpr = False,
):  # fmt: skip
    """The pairs that are computed, as bool."""
    hidden = pairs_hidden(
        q_table, k_table, q_slots, k_slots, block, rule, word, RULE, BLOCK_Q, BLOCK_K, KEYS_FIRST
    )  # fmt: skip
    return hidden == 0


@triton.jit
def _accumulate(
    acc, row_max, row_sum, q, q_slots, k, v, key_mask, q_table, k_table, rule, bits, indices, start, end,
    k_stride, v_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr, RULE: tl.constexpr, PARTIAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds the key blocks indices[start:end] of one list to the online softmax."""
    dims = tl.arange(0, BLOCK_D)
    tiles: tl.constexpr = BLOCK_K // TILE_K
    for step in range(start * tiles, end * tiles):
        entry = step // tiles
        block = tl.load(indices + entry)
        k_slots = block * BLOCK_K + (step % tiles) * TILE_K + tl.arange(0, TILE_K)
        rows = k_slots.to(tl.int64)[:, None]
        if BLOCK_D == HEAD_DIM:
            key = tl.load(k + rows * k_stride + dims[None, :])
            value = tl.load(v + rows * v_stride + dims[None, :])
        else:
            key = tl.load(k + rows * k_stride + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)
            value = tl.load(v + rows * v_stride + dims[None, :], mask=dims[None, :] < HEAD_DIM, other=0.0)
        if EXACT:
            key = key.to(tl.float32)
            value = value.to(tl.float32)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale_log2
        if PARTIAL:
            word = word_of(bits, entry, RULE)
            visible = pairs_seen(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, BLOCK_Q, BLOCK_K)
            scores = tl.where(visible, scores, float("-inf"))
        if HAS_KEY_MASK:
            exists = tl.load(key_mask + k_slots) != 0
            scores = tl.where(exists[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # A row that has seen no key yet has no maximum: any finite one keeps its weights at 0 instead of NaN.
        finite_max = tl.where(new_max == float("-inf"), 0.0, new_max) if PARTIAL or HAS_KEY_MASK else new_max
        weights = tl.exp2(scores - finite_max[:, None])
        shrink = tl.exp2(row_max - finite_max)
        row_sum = row_sum * shrink + tl.sum(weights, 1)
        acc = tl.dot(weights.to(value.dtype), value, acc * shrink[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    q, k, v, out, lse, key_mask,
    q_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    out_stride_b, out_stride_n, out_stride_h,
    heads, q_tokens, q_blocks, q_order_step, q_table_step, k_table_step, k_slots_in_all, list_step, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, RULE: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, KEY_MASK_OF_HEAD: tl.constexpr, WRITE_LSE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    which = head * list_step
    row = tl.load(launch_order + which * q_blocks + tl.program_id(0) // tiles)

    q_slots = row * BLOCK_Q + (tl.program_id(0) % tiles) * TILE_Q + tl.arange(0, TILE_Q)
    tokens = tl.load(q_order + head * q_order_step + q_slots)
    exists = tokens >= 0
    rows = tokens.to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_D)[None, :]
    inside = exists[:, None] & (dims < HEAD_DIM)
    batch64 = batch.to(tl.int64)
    head64 = head.to(tl.int64)
    query = tl.load(q + batch64 * q_stride_b + head64 * q_stride_h + rows * q_stride_n + dims, mask=inside, other=0.0)
    if EXACT:
        query = query.to(tl.float32)

    k += batch64 * k_stride_b + head64 * k_stride_h
    v += batch64 * v_stride_b + head64 * v_stride_h
    q_table += head64 * q_table_step
    k_table += head64 * k_table_step
    if HAS_KEY_MASK:
        key_mask += (
            batch64 * (heads if KEY_MASK_OF_HEAD else 1) + (head64 if KEY_MASK_OF_HEAD else 0)
        ) * k_slots_in_all
    acc = tl.zeros([TILE_Q, BLOCK_D], dtype=tl.float32)
    row_max = tl.full([TILE_Q], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([TILE_Q], dtype=tl.float32)
    offset = which * (q_blocks + 1) + row
    acc, row_max, row_sum = _accumulate(
        acc, row_max, row_sum, query, q_slots, k, v, key_mask, q_table, k_table, rule, bits,
        full_indices, tl.load(full_offsets + offset), tl.load(full_offsets + offset + 1),
        k_stride_n, v_stride_n, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, RULE, False, HAS_KEY_MASK, EXACT,
    )  # fmt: skip
    acc, row_max, row_sum = _accumulate(
        acc, row_max, row_sum, query, q_slots, k, v, key_mask, q_table, k_table, rule, bits,
        partial_indices, tl.load(partial_offsets + offset), tl.load(partial_offsets + offset + 1),
        k_stride_n, v_stride_n, scale_log2,
        HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, RULE, True, HAS_KEY_MASK, EXACT,
    )  # fmt: skip

    # Queries without keys: output 0, log-sum-exp -inf (their maximum still is).
    row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)
    result = acc / row_sum[:, None]
    place = out + batch64 * out_stride_b + head64 * out_stride_h + rows * out_stride_n + dims
    tl.store(place, result.to(out.dtype.element_ty), mask=inside)
    if WRITE_LSE:
        row_lse = (row_max + tl.log2(row_sum)) * _LN2
        tl.store(lse + (batch64 * heads + head64) * q_tokens + tokens, row_lse, mask=exists)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the forward kernel; arguments as in `attention`.

    Returns:
        Output `[batch, query tokens, heads, head_dim]` and log-sum-exp `[batch, heads, query tokens]`, the latter
        unwritten unless `return_lse`.
    """
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens) if return_lse else (1,), dtype=torch.float32, device=q.device)
    k, v = gather((k, plan.key.order), (v, plan.key.order))
    if key_mask is not None:
        key_mask = mask_in_order(key_mask, plan.key.order)

    block_d = max(16, power_of_two(head_dim))
    block_q, block_k = plan.query.block, plan.key.block
    rule = plan.kernel_rule
    tile = forward_tile(block_q, block_k, block_d, q.dtype, shared_memory_of(q.device))
    grid = (plan.query_blocks * (block_q // tile.queries), batch * heads)
    _forward_kernel[grid](
        q, k, v, out, lse, out if key_mask is None else key_mask,
        plan.query.order, rule.query, rule.key, plan.launch_order,
        plan.full.offsets, plan.full.indices, plan.partial.offsets, plan.partial.indices,
        rule.parameters, plan.bits,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, tokens, plan.query_blocks,
        head_step(plan.query.order), head_step(rule.query), head_step(rule.key),
        plan.key.slots, int(plan.lists > 1), scale / math.log(2),
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_Q=block_q, BLOCK_K=block_k,
        TILE_Q=tile.queries, TILE_K=tile.keys, RULE=rule.kind,
        HAS_KEY_MASK=key_mask is not None, KEY_MASK_OF_HEAD=plan.key.order.shape[0] > 1, WRITE_LSE=return_lse,
        EXACT=interpreted(),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, lse


def mask_in_order(key_mask: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Which slots hold a key that exists: bool `[batch, tokens]` to int8 `[batch, 1 or heads, slots]`."""
    return (key_mask[:, order.clamp(min=0).long()] & (order >= 0)).to(torch.int8).contiguous()


def head_step(x: torch.Tensor) -> int:
    """How far apart the rows of two heads lie, 0 where all share one."""
    return x.stride(0) if x.shape[0] > 1 else 0
