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
import os

import torch
import triton
import triton.language as tl

from .block_sparse import BITS, head_step, in_order, mask_in_order, pairs_seen
from .plan import BlockPlan
from .tuning import backward_tile, shared_memory_of


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
            word = 0
            if RULE == BITS:
                word = tl.load(bits + entry)
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
            word = 0
            if RULE == BITS:
                word = tl.load(bits + tl.load(bit_place + entry))
            visible = pairs_seen(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, BLOCK_Q, BLOCK_K)
            scores = tl.where(tl.trans(visible), scores, float("-inf"))
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
    heads, blocks, q_slots_in_all, q_order_step, k_order_step, q_table_step, k_table_step, k_slots_in_all, list_step,
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
    tokens = tl.load(q_order + head * q_order_step + q_slots)
    place = grad_q + batch * out_stride_b + head * out_stride_h + tokens.to(tl.int64)[:, None] * out_stride_n
    inside = (tokens >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(place + dims[None, :], (total * scale).to(grad_q.dtype.element_ty), mask=inside)


@triton.jit
def _grad_kv_kernel(
    q, k, v, upstream, lse, delta, grad_k, grad_v, key_mask, k_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits, bit_place,
    q_stride_b, q_stride_n, q_stride_h, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h,
    up_stride_b, up_stride_n, up_stride_h, out_stride_b, out_stride_n, out_stride_h,
    heads, blocks, q_slots_in_all, q_order_step, k_order_step, q_table_step, k_table_step, k_slots_in_all, list_step,
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
    tokens = tl.load(k_order + head * k_order_step + k_slots)
    place = batch * out_stride_b + head * out_stride_h + tokens.to(tl.int64)[:, None] * out_stride_n + dims[None, :]
    inside = (tokens >= 0)[:, None] & (dims < HEAD_DIM)[None, :]
    tl.store(grad_k + place, (total_k * scale).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + place, total_v.to(grad_v.dtype.element_ty), mask=inside)


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
    batch, _, heads, head_dim = q.shape
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    delta = torch.einsum("bqhd,bqhd->bhq", grad.float(), out.float())
    if grad_lse is not None:
        delta = delta - grad_lse.float()
    # Queries that see no key, and padding, get weights of 0 from an infinite log-sum-exp.
    rows = torch.where(lse == float("-inf"), float("inf"), lse / math.log(2))
    rows = _rows_in_order(rows, plan.query.order, float("inf"))
    delta = _rows_in_order(delta, plan.query.order, 0.0)
    upstream, query = (in_order(x, plan.query.order) for x in (grad, q))
    key, value = (in_order(x, plan.key.order) for x in (k, v))
    if key_mask is not None:
        key_mask = mask_in_order(key_mask, plan.key.order)

    block_d = max(16, triton.next_power_of_2(head_dim))
    block_q, block_k = plan.query.block, plan.key.block
    shared_memory = shared_memory_of(q.device)
    strides = [stride for x in (query, key, value, upstream, grads[0]) for stride in x.stride()[:3]]
    rule = plan.kernel_rule
    sizes = (
        plan.query.slots,
        *(head_step(x) for x in (plan.query.order, plan.key.order, rule.query, rule.key)),
        plan.key.slots, int(plan.lists > 1), scale / math.log(2), scale,
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_Q": block_q, "BLOCK_K": block_k, "RULE": rule.kind,
        "HAS_KEY_MASK": key_mask is not None, "KEY_MASK_OF_HEAD": plan.key.order.shape[0] > 1,
        # The interpreter's bfloat16 product is wrong without an error, so it computes in float32.
        "EXACT": os.environ.get("TRITON_INTERPRET") == "1",
    }  # fmt: skip
    mask = rows if key_mask is None else key_mask

    tile = backward_tile(block_q, block_k, block_d, q.dtype, shared_memory)
    _grad_q_kernel[(plan.query_blocks * (block_q // tile.held), batch * heads)](
        query, key, value, upstream, rows, delta, grads[0], mask,
        plan.query.order, rule.query, rule.key, plan.launch_order,
        plan.full.offsets, plan.full.indices, plan.partial.offsets, plan.partial.indices,
        rule.parameters, plan.bits, *strides, heads, plan.query_blocks, *sizes,
        TILE_Q=tile.held, TILE_K=tile.walked, num_warps=tile.warps, num_stages=tile.stages, **constants,
    )  # fmt: skip
    columns = plan.transposed
    strides[-3:] = grads[1].stride()[:3]
    tile = backward_tile(block_k, block_q, block_d, q.dtype, shared_memory)
    _grad_kv_kernel[(plan.key_blocks * (block_k // tile.held), batch * heads)](
        query, key, value, upstream, rows, delta, grads[1], grads[2], mask,
        plan.key.order, rule.query, rule.key, columns.launch_order,
        columns.full.offsets, columns.full.indices, columns.partial.offsets, columns.partial.indices,
        rule.parameters, plan.bits, columns.bit_place, *strides, heads, plan.key_blocks, *sizes,
        TILE_K=tile.held, TILE_Q=tile.walked, num_warps=tile.warps, num_stages=tile.stages, **constants,
    )  # fmt: skip
    return tuple(grads)


def _rows_in_order(x: torch.Tensor, order: torch.Tensor, padding: float) -> torch.Tensor:
    """`[batch, heads, tokens]` to `[batch, heads, slots]`, with a value of its own for padding."""
    place = order.clamp(min=0).long()
    slots = x[..., place[0]] if len(place) == 1 else x.gather(2, place.expand(len(x), -1, -1))
    return slots.masked_fill(order < 0, padding)
