"""Block-sparse attention in Triton: the backward kernels and their launcher. Truth: autograd through reference.py.

With the weights P = exp(scale q k - lse) of the pairs that the plan computes, dO the output's gradient, and
delta_i = dO_i . O_i minus the gradient of the log-sum-exp,

    dV_j = sum_i P_ij dO_i,           dS_ij = P_ij (dO_i . v_j - delta_i),
    dQ_i = scale sum_j dS_ij k_j,     dK_j = scale sum_i dS_ij q_i.

One kernel walks the plan's rows for dQ, the other its columns for dK and dV. Both compute the weights anew, so
nothing is summed by atomics and the result is the same in every run.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .block_sparse import head_step, mask_in_order, pairs_seen, word_of
from .order import Side
from .plan import BlockPlan
from .reorder import gather, key_limits
from .tuning import BackwardTile, backward_tile, hopper_backward, interpreted, power_of_two, shared_memory_of

# Slots that one program turns into row terms.
_TILE = 32
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def _load(x, slots, stride, dims, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EXACT: tl.constexpr):
    place = x + slots.to(tl.int64)[:, None] * stride + dims[None, :]
    value = tl.load(place) if BLOCK_D == HEAD_DIM else tl.load(place, mask=dims[None, :] < HEAD_DIM, other=0.0)
    return value.to(tl.float32) if EXACT else value


@triton.jit
def _walk_keys(
    grad_q, q, upstream, lse, delta, q_slots, k, v, key_mask, q_table, k_table, rule, bits, indices, start, end,
    k_stride, v_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_K: tl.constexpr, RULE: tl.constexpr, PARTIAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds the key blocks indices[start:end] of one query block to its dQ / scale."""
    dims = tl.arange(0, BLOCK_D)
    tiles: tl.constexpr = BLOCK_K // TILE_K
    for step in range(start * tiles, end * tiles):
        entry = step // tiles
        block = tl.load(indices + entry)
        k_slots = block * BLOCK_K + (step % tiles) * TILE_K + tl.arange(0, TILE_K)
        key = _load(k, k_slots, k_stride, dims, HEAD_DIM, BLOCK_D, EXACT)
        value = _load(v, k_slots, v_stride, dims, HEAD_DIM, BLOCK_D, EXACT)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale_log2 - lse[:, None]
        if PARTIAL:
            word = word_of(bits, entry, RULE)
            visible = pairs_seen(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, BLOCK_Q, BLOCK_K)
            scores = tl.where(visible, scores, float("-inf"))
        if HAS_KEY_MASK:
            scores = tl.where((tl.load(key_mask + k_slots) != 0)[None, :], scores, float("-inf"))
        weights = tl.exp2(scores)
        slope = weights * (tl.dot(upstream, tl.trans(value), input_precision="ieee") - delta[:, None])
        grad_q = tl.dot(slope.to(key.dtype), key, grad_q, input_precision="ieee")
    return grad_q


@triton.jit
def _walk_queries(
    grad_k, grad_v, key, value, key_exists, k_slots, block, q, upstream, lse, delta, q_table, k_table, rule, bits,
    bit_place, indices, start, end, q_stride, upstream_stride, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, RULE: tl.constexpr, PARTIAL: tl.constexpr, HAS_KEY_MASK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Adds the query blocks indices[start:end] of one key block to its dK / scale and dV; tiles are [keys, queries]."""
    dims = tl.arange(0, BLOCK_D)
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    for step in range(start * tiles, end * tiles):
        entry = step // tiles
        q_slots = tl.load(indices + entry) * BLOCK_Q + (step % tiles) * TILE_Q + tl.arange(0, TILE_Q)
        query = _load(q, q_slots, q_stride, dims, HEAD_DIM, BLOCK_D, EXACT)
        grad = _load(upstream, q_slots, upstream_stride, dims, HEAD_DIM, BLOCK_D, EXACT)
        row_lse, row_delta = tl.load(lse + q_slots), tl.load(delta + q_slots)
        scores = tl.dot(key, tl.trans(query), input_precision="ieee") * scale_log2 - row_lse[None, :]
        if PARTIAL:
            word = word_of(bits, tl.load(bit_place + entry), RULE)
            visible = pairs_seen(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, BLOCK_Q, BLOCK_K, True)
            scores = tl.where(visible, scores, float("-inf"))
        if HAS_KEY_MASK:
            scores = tl.where(key_exists[:, None], scores, float("-inf"))
        weights = tl.exp2(scores)
        grad_v = tl.dot(weights.to(grad.dtype), grad, grad_v, input_precision="ieee")
        slope = weights * (tl.dot(value, tl.trans(grad), input_precision="ieee") - row_delta[None, :])
        grad_k = tl.dot(slope.to(query.dtype), query, grad_k, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def _grad_q_kernel(
    q, k, v, upstream, lse, delta, grad_q, key_mask, q_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    up_stride_b, up_stride_n, up_stride_h, out_stride_b, out_stride_n, out_stride_h,
    heads, blocks, q_slots_in_all, order_step, q_table_step, k_table_step, k_slots_in_all, list_step,
    scale_log2, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, RULE: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, KEY_MASK_OF_HEAD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = BLOCK_Q // TILE_Q
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    which = head * list_step
    row = tl.load(launch_order + which * blocks + tl.program_id(0) // tiles)
    q_slots = row * BLOCK_Q + (tl.program_id(0) % tiles) * TILE_Q + tl.arange(0, TILE_Q)
    dims = tl.arange(0, BLOCK_D)
    query = _load(q + batch * q_stride_b + head * q_stride_h, q_slots, q_stride_n, dims, HEAD_DIM, BLOCK_D, EXACT)
    grad = _load(
        upstream + batch * up_stride_b + head * up_stride_h, q_slots, up_stride_n, dims, HEAD_DIM, BLOCK_D, EXACT
    )
    rows = (batch * heads + head) * q_slots_in_all + q_slots
    row_lse, row_delta = tl.load(lse + rows), tl.load(delta + rows)
    k += batch * k_stride_b + head * k_stride_h
    v += batch * v_stride_b + head * v_stride_h
    q_table += head * q_table_step
    k_table += head * k_table_step
    if HAS_KEY_MASK:
        key_mask += (batch * (heads if KEY_MASK_OF_HEAD else 1) + (head if KEY_MASK_OF_HEAD else 0)) * k_slots_in_all
    offset = which * (blocks + 1) + row
    total = tl.zeros([TILE_Q, BLOCK_D], dtype=tl.float32)
    total = _walk_keys(
        total, query, grad, row_lse, row_delta, q_slots, k, v, key_mask, q_table, k_table, rule, bits,
        full_indices, tl.load(full_offsets + offset), tl.load(full_offsets + offset + 1), k_stride_n, v_stride_n,
        scale_log2, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, RULE, False, HAS_KEY_MASK, EXACT,
    )  # fmt: skip
    total = _walk_keys(
        total, query, grad, row_lse, row_delta, q_slots, k, v, key_mask, q_table, k_table, rule, bits,
        partial_indices, tl.load(partial_offsets + offset), tl.load(partial_offsets + offset + 1), k_stride_n,
        v_stride_n, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_K, RULE, True, HAS_KEY_MASK, EXACT,
    )  # fmt: skip
    tokens = tl.load(q_order + head * order_step + q_slots)
    place = grad_q + batch * out_stride_b + head * out_stride_h + tokens.to(tl.int64)[:, None] * out_stride_n
    inside = (tokens >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(place + dims[None, :], (total * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def _grad_kv_kernel(
    q, k, v, upstream, lse, delta, grad_k, grad_v, key_mask, k_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits, bit_place,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    up_stride_b, up_stride_n, up_stride_h, out_stride_b, out_stride_n, out_stride_h,
    heads, blocks, q_slots_in_all, order_step, q_table_step, k_table_step, k_slots_in_all, list_step,
    scale_log2, scale,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, RULE: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, KEY_MASK_OF_HEAD: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tiles: tl.constexpr = BLOCK_K // TILE_K
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    which = head * list_step
    column = tl.load(launch_order + which * blocks + tl.program_id(0) // tiles)
    k_slots = column * BLOCK_K + (tl.program_id(0) % tiles) * TILE_K + tl.arange(0, TILE_K)
    dims = tl.arange(0, BLOCK_D)
    key = _load(k + batch * k_stride_b + head * k_stride_h, k_slots, k_stride_n, dims, HEAD_DIM, BLOCK_D, EXACT)
    value = _load(v + batch * v_stride_b + head * v_stride_h, k_slots, v_stride_n, dims, HEAD_DIM, BLOCK_D, EXACT)
    key_exists = k_slots >= 0
    if HAS_KEY_MASK:
        key_mask += (batch * (heads if KEY_MASK_OF_HEAD else 1) + (head if KEY_MASK_OF_HEAD else 0)) * k_slots_in_all
        key_exists = tl.load(key_mask + k_slots) != 0
    q += batch * q_stride_b + head * q_stride_h
    upstream += batch * up_stride_b + head * up_stride_h
    lse += (batch * heads + head) * q_slots_in_all
    delta += (batch * heads + head) * q_slots_in_all
    q_table += head * q_table_step
    k_table += head * k_table_step
    offset = which * (blocks + 1) + column
    total_k = tl.zeros([TILE_K, BLOCK_D], dtype=tl.float32)
    total_v = tl.zeros([TILE_K, BLOCK_D], dtype=tl.float32)
    total_k, total_v = _walk_queries(
        total_k, total_v, key, value, key_exists, k_slots, column, q, upstream, lse, delta, q_table, k_table, rule,
        bits, bit_place, full_indices, tl.load(full_offsets + offset), tl.load(full_offsets + offset + 1), q_stride_n,
        up_stride_n, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_Q, RULE, False, HAS_KEY_MASK, EXACT,
    )  # fmt: skip
    total_k, total_v = _walk_queries(
        total_k, total_v, key, value, key_exists, k_slots, column, q, upstream, lse, delta, q_table, k_table, rule,
        bits, bit_place, partial_indices, tl.load(partial_offsets + offset), tl.load(partial_offsets + offset + 1),
        q_stride_n, up_stride_n, scale_log2, HEAD_DIM, BLOCK_D, BLOCK_Q, BLOCK_K, TILE_Q, RULE, True, HAS_KEY_MASK,
        EXACT,
    )  # fmt: skip
    tokens = tl.load(k_order + head * order_step + k_slots)
    place = batch * out_stride_b + head * out_stride_h + tokens.to(tl.int64)[:, None] * out_stride_n + dims[None, :]
    inside = (tokens >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(grad_k + place, (total_k * scale).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + place, total_v.to(grad_v.dtype.element_ty), mask=inside)


@triton.jit
def _row_terms_kernel(
    grad, out, lse, grad_lse, q_order, rows, delta,
    grad_stride_b, grad_stride_n, grad_stride_h, out_stride_b, out_stride_n, out_stride_h,
    heads, tokens_in_all, slots_in_all, order_step,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, HAS_GRAD_LSE: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp in base 2 and delta of each slot."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    slots = tl.program_id(0) * TILE + tl.arange(0, TILE)
    tokens = tl.load(q_order + head * order_step + slots, mask=slots < slots_in_all, other=-1)
    exists = tokens >= 0
    dims = tl.arange(0, BLOCK_D)
    inside = exists[:, None] & (dims < HEAD_DIM)[None, :]
    place = tokens.to(tl.int64)[:, None]
    grad += batch * grad_stride_b + head * grad_stride_h
    out += batch * out_stride_b + head * out_stride_h
    up = tl.load(grad + place * grad_stride_n + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    result = tl.load(out + place * out_stride_n + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    row_delta = tl.sum(up * result, 1)
    row = (batch * heads + head) * tokens_in_all + tokens
    if HAS_GRAD_LSE:
        row_delta -= tl.load(grad_lse + row, mask=exists, other=0.0)
    row_lse = tl.load(lse + row, mask=exists, other=float("-inf"))
    # Queries that see no key, and padding, get weights of 0 from an infinite log-sum-exp.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse / _LN2)
    place = (batch * heads + head) * slots_in_all + slots
    tl.store(rows + place, row_lse, mask=slots < slots_in_all)
    tl.store(delta + place, row_delta, mask=slots < slots_in_all)


def backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; arguments as in `attention`, and what its forward call returned.

    Args:
        grad: Gradient of the output `[batch, query tokens, heads, head_dim]`.
        grad_lse: Gradient of the log-sum-exp `[batch, heads, query tokens]`, or None.
        out, lse: Output and log-sum-exp of the forward call.
    """
    # The gradient of a sum has strides of 0.
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    terms = _row_terms(grad, grad_lse, out, lse, plan)
    queries, keys = plan.query.order, plan.key.order
    query, *others = gather((q, queries), (grad, queries), (k, keys), (v, keys))
    tensors = (query, *others, *terms)
    hopper = hopper_backward(q.device)
    if hopper is not None and hopper.fits(query, plan, scale):
        limits = None if key_mask is None else key_limits(key_mask, keys, plan.key.block)
        hopper.walk_rows(*tensors, grad_q, plan, scale, limits)
        hopper.walk_columns(*tensors, grad_k, grad_v, plan, scale, limits)
    else:
        if key_mask is not None:
            key_mask = mask_in_order(key_mask, plan.key.order)
        _walk_rows(*tensors, grad_q, plan, scale, key_mask)
        _walk_columns(*tensors, grad_k, grad_v, plan, scale, key_mask)
    return grad_q, grad_k, grad_v


def _walk_rows(query, upstream, key, value, lse, delta, grad_q, plan, scale, key_mask) -> None:
    batch, _, heads, head_dim = query.shape
    block = plan.query.block
    tile = _tile(block, plan.key.block, query)
    _grad_q_kernel[(plan.query_blocks * (block // tile.held), batch * heads)](
        query, key, value, upstream, lse, delta, grad_q, lse if key_mask is None else key_mask,
        plan.query.order, plan.kernel_rule.query, plan.kernel_rule.key, plan.launch_order,
        plan.full.offsets, plan.full.indices, plan.partial.offsets, plan.partial.indices,
        plan.kernel_rule.parameters, plan.bits, *_strides(query, key, value, upstream, grad_q),
        heads, plan.query_blocks, *_sizes(plan, plan.query, scale),
        TILE_Q=tile.held, TILE_K=tile.walked, num_warps=tile.warps, num_stages=tile.stages,
        **_constants(plan, head_dim, key_mask),
    )  # fmt: skip


def _walk_columns(query, upstream, key, value, lse, delta, grad_k, grad_v, plan, scale, key_mask) -> None:
    batch, _, heads, head_dim = query.shape
    block, columns = plan.key.block, plan.transposed
    tile = _tile(block, plan.query.block, query)
    _grad_kv_kernel[(plan.key_blocks * (block // tile.held), batch * heads)](
        query, key, value, upstream, lse, delta, grad_k, grad_v, lse if key_mask is None else key_mask,
        plan.key.order, plan.kernel_rule.query, plan.kernel_rule.key, columns.launch_order,
        columns.full.offsets, columns.full.indices, columns.partial.offsets, columns.partial.indices,
        plan.kernel_rule.parameters, plan.bits, columns.bit_place, *_strides(query, key, value, upstream, grad_k),
        heads, plan.key_blocks, *_sizes(plan, plan.key, scale),
        TILE_K=tile.held, TILE_Q=tile.walked, num_warps=tile.warps, num_stages=tile.stages,
        **_constants(plan, head_dim, key_mask),
    )  # fmt: skip


def _tile(held_block: int, walked_block: int, x: torch.Tensor) -> BackwardTile:
    return backward_tile(held_block, walked_block, _padded(x.shape[-1]), x.dtype, shared_memory_of(x.device))


def _padded(head_dim: int) -> int:
    return max(16, power_of_two(head_dim))


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _sizes(plan: BlockPlan, held: Side, scale: float) -> tuple:
    rule = plan.kernel_rule
    steps = (head_step(x) for x in (held.order, rule.query, rule.key))
    return plan.query.slots, *steps, plan.key.slots, int(plan.lists > 1), scale / math.log(2), scale


def _constants(plan: BlockPlan, head_dim: int, key_mask: torch.Tensor | None) -> dict:
    return {
        "HEAD_DIM": head_dim, "BLOCK_D": _padded(head_dim), "BLOCK_Q": plan.query.block, "BLOCK_K": plan.key.block,
        "RULE": plan.kernel_rule.kind,
        "HAS_KEY_MASK": key_mask is not None, "KEY_MASK_OF_HEAD": plan.key.order.shape[0] > 1,
        "EXACT": interpreted(),
    }  # fmt: skip


def _row_terms(grad, grad_lse, out, lse, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp in base 2 and delta, float32 `[batch, heads, query slots]`."""
    batch, tokens, heads, head_dim = grad.shape
    rows, delta = (
        torch.empty(batch, heads, plan.query.slots, dtype=torch.float32, device=grad.device) for _ in range(2)
    )
    _row_terms_kernel[(-(-plan.query.slots // _TILE), batch * heads)](
        grad, out, lse, lse if grad_lse is None else grad_lse.contiguous(), plan.query.order, rows, delta,
        *_strides(grad, out), heads, tokens, plan.query.slots, head_step(plan.query.order),
        HEAD_DIM=head_dim, BLOCK_D=_padded(head_dim), TILE=_TILE, HAS_GRAD_LSE=grad_lse is not None,
    )  # fmt: skip
    return rows, delta
