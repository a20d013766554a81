"""The backward pass for Hopper GPUs in Gluon: formulas and names as in block_sparse_backward.py, the form of hopper.py.

One kernel walks the plan's rows for dQ, the other its columns for dK and dV. A program holds one block in two groups of
warps, 64 slots each; a third copies what they walk along into rings of shared memory. Tiles are [held, walked], so
weights and slopes stay in registers as operands of the next product.

Nothing is summed by atomics, so results repeat. Adding dQ up beside dK and dV would save two of seven products and was
no faster: its tiles have to be added to global memory (results/notes-kernels.md).
"""

from __future__ import annotations

import math

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_sparse import head_step, pairs_seen, word_of
from .plan import BlockPlan

BLOCK = gl.constexpr(128)
# Rows of a tile: queries or keys that are walked, and those that a computing group holds.
_TILE = gl.constexpr(64)
_TILES = gl.constexpr(2)
_QUERY_STAGES, _KEY_STAGES = gl.constexpr(2), gl.constexpr(3)
# What differs from call to call without a need to compile anew.
_COUNTS = ("heads", "q_blocks", "k_blocks", "list_step")


@gluon.jit
def _copy(desc, ring, full, empty, count, head, row):
    stages: gl.constexpr = ring.shape[0]
    stage = count % stages
    hopper.mbarrier.wait(empty.index(stage), (count // stages & 1) ^ 1)
    hopper.mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(desc, [head, row, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _copy_tiles(
    held0_desc, held1_desc, walked0_desc, walked1_desc, held0, held1, held_full,
    ring0, ring1, full0, empty0, full1, empty1, full_indices, full_start, full_tiles, partial_indices, partial_start,
    tiles, head, held_row, walked_row,
):  # fmt: skip
    """The copying group: two tensors of the held block, then of the walked blocks, full ones before partial ones."""
    hopper.mbarrier.expect(held_full, 2 * _TILES * held0_desc.block_type.nbytes)
    for half in gl.static_range(_TILES):
        row = held_row + half * _TILE
        hopper.tma.async_copy_global_to_shared(held0_desc, [head, row, 0], held_full, held0.index(half))
        hopper.tma.async_copy_global_to_shared(held1_desc, [head, row, 0], held_full, held1.index(half))
    for n in range(full_tiles):
        row = walked_row + gl.load(full_indices + full_start + n // _TILES) * BLOCK + n % _TILES * _TILE
        _copy(walked0_desc, ring0, full0, empty0, n, head, row)
        _copy(walked1_desc, ring1, full1, empty1, n, head, row)
    for n in range(full_tiles, tiles):
        block = gl.load(partial_indices + partial_start + (n - full_tiles) // _TILES)
        row = walked_row + block * BLOCK + n % _TILES * _TILE
        _copy(walked0_desc, ring0, full0, empty0, n, head, row)
        _copy(walked1_desc, ring1, full1, empty1, n, head, row)


@gluon.jit
def _tile(ring, stage):
    return ring.index(stage).reshape([ring.type.shape[2], ring.type.shape[3]])


@gluon.jit
def _store(out, value, order, first_slot, stride, HEAD_DIM: gl.constexpr):
    """Writes 64 slots in the order of the tokens."""
    width: gl.constexpr = value.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])
    tokens = gl.load(order + first_slot + gl.arange(0, _TILE, layout=gl.SliceLayout(1, layout)))[:, None]
    dims = gl.arange(0, width, layout=gl.SliceLayout(0, layout))[None, :]
    value = gl.convert_layout(value.to(out.dtype.element_ty), layout)
    gl.store(out + tokens.to(gl.int64) * stride + dims, value, mask=(tokens >= 0) & (dims < HEAD_DIM))


@gluon.jit
def _query_tiles(
    grad_k, grad_v, key, value, q_ring, up_ring, q_full, q_empty, up_full, up_empty, lse, delta,
    start, end, place, indices, k_slots, column, q_table, k_table, rule, bits, bit_place, scale_log2,
    RULE: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Adds tiles start to end of a column to its dK / scale and dV; their blocks stand from `place` on in `indices`."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, grad_k.type.layout, 2)
    dtype: gl.constexpr = key.dtype
    for n in range(start, end):
        entry = place + (n - start) // _TILES
        first_slot = gl.load(indices + entry) * BLOCK + n % _TILES * _TILE
        q_slots = first_slot + gl.arange(0, _TILE, layout=gl.SliceLayout(0, score_layout))
        row_lse = gl.load(lse + q_slots)
        row_delta = gl.load(delta + q_slots)
        stage, phase = n % _QUERY_STAGES, n // _QUERY_STAGES & 1
        zeros = gl.zeros([_TILE, _TILE], gl.float32, score_layout)
        hopper.mbarrier.wait(q_full.index(stage), phase)
        query = _tile(q_ring, stage)
        scores = hopper.warpgroup_mma(key, query.permute((1, 0)), zeros, use_acc=False, is_async=True)
        hopper.mbarrier.wait(up_full.index(stage), phase)
        grad = _tile(up_ring, stage)
        slope = hopper.warpgroup_mma(value, grad.permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = hopper.warpgroup_mma_wait(1, deps=[scores])
        if PARTIAL:
            word = word_of(bits, gl.load(bit_place + entry), RULE)
            visible = pairs_seen(q_table, k_table, q_slots, k_slots, column, rule, word, RULE, BLOCK, BLOCK, True)
            scores = gl.where(visible, scores, float("-inf"))
        weights = gl.exp2(scores * scale_log2 - row_lse[None, :])
        grad_v = hopper.warpgroup_mma(gl.convert_layout(weights.to(dtype), weight_layout), grad, grad_v, is_async=True)
        slope = hopper.warpgroup_mma_wait(1, deps=[slope])
        slope = (weights * (slope - row_delta[None, :])).to(dtype)
        grad_k = hopper.warpgroup_mma(gl.convert_layout(slope, weight_layout), query, grad_k, is_async=True)
        grad_v = hopper.warpgroup_mma_wait(1, deps=[grad_v])
        hopper.mbarrier.arrive(up_empty.index(stage), count=1)
        grad_k = hopper.warpgroup_mma_wait(0, deps=[grad_k])
        hopper.mbarrier.arrive(q_empty.index(stage), count=1)
    return grad_k, grad_v


@gluon.jit
def _hold_keys(
    half: gl.constexpr, keys, values, held_full, q_ring, up_ring, q_full, q_empty, up_full, up_empty,
    lse, delta, grad_k, grad_v, k_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices,
    partial_start, tiles, rule, bits, bit_place, column, out_stride, scale, scale_log2,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr,
):  # fmt: skip
    """A computing group of a column: 64 keys."""
    width: gl.constexpr = keys.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    first_slot = column * BLOCK + half * _TILE
    k_slots = first_slot + gl.arange(0, _TILE, layout=gl.SliceLayout(1, score_layout))
    key, value = _tile(keys, half), _tile(values, half)
    total_k = gl.zeros([_TILE, width], gl.float32, out_layout)
    total_v = gl.zeros([_TILE, width], gl.float32, out_layout)
    hopper.mbarrier.wait(held_full, 0)
    total_k, total_v = _query_tiles(
        total_k, total_v, key, value, q_ring, up_ring, q_full, q_empty, up_full, up_empty, lse, delta,
        0, full_tiles, full_start, full_indices, k_slots, column, q_table, k_table, rule, bits, bit_place, scale_log2,
        RULE, False,
    )  # fmt: skip
    total_k, total_v = _query_tiles(
        total_k, total_v, key, value, q_ring, up_ring, q_full, q_empty, up_full, up_empty, lse, delta,
        full_tiles, tiles, partial_start, partial_indices, k_slots, column, q_table, k_table, rule, bits, bit_place,
        scale_log2, RULE, True,
    )  # fmt: skip
    _store(grad_k, total_k * scale, k_order, first_slot, out_stride, HEAD_DIM)
    _store(grad_v, total_v, k_order, first_slot, out_stride, HEAD_DIM)


@gluon.jit(do_not_specialize=_COUNTS)
def _columns_kernel(
    q_desc, up_desc, k_desc, v_desc, grad_k, grad_v, lse, delta, k_order, q_table, k_table,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits, bit_place,
    out_stride_b, out_stride_n, out_stride_h,
    heads, k_blocks, q_slots, k_slots, k_order_step, q_table_step, k_table_step, list_step, scale_log2, scale,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr,
):  # fmt: skip
    # In their own order: neighbouring columns walk the same rows, which are then in the cache.
    column = gl.program_id(0)
    batch, head = gl.program_id(1) // heads, gl.program_id(1) % heads
    offset = head * list_step * (k_blocks + 1) + column
    full_start, partial_start = gl.load(full_offsets + offset), gl.load(partial_offsets + offset)
    full_tiles = (gl.load(full_offsets + offset + 1) - full_start) * _TILES
    tiles = full_tiles + (gl.load(partial_offsets + offset + 1) - partial_start) * _TILES

    head64, batch64 = head.to(gl.int64), batch.to(gl.int64)
    k_order += head64 * k_order_step
    q_table += head64 * q_table_step
    k_table += head64 * k_table_step
    lse += (batch64 * heads + head64) * q_slots
    delta += (batch64 * heads + head64) * q_slots
    grad_k += batch64 * out_stride_b + head64 * out_stride_h
    grad_v += batch64 * out_stride_b + head64 * out_stride_h

    dtype: gl.constexpr = k_desc.dtype
    width: gl.constexpr = k_desc.block_type.shape[2]
    keys = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], k_desc.layout)
    values = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [_QUERY_STAGES, 1, _TILE, width], q_desc.layout)
    up_ring = gl.allocate_shared_memory(dtype, [_QUERY_STAGES, 1, _TILE, width], up_desc.layout)
    barriers: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    held_full = gl.allocate_shared_memory(gl.int64, [1], barriers)
    q_full = gl.allocate_shared_memory(gl.int64, [_QUERY_STAGES, 1], barriers)
    q_empty = gl.allocate_shared_memory(gl.int64, [_QUERY_STAGES, 1], barriers)
    up_full = gl.allocate_shared_memory(gl.int64, [_QUERY_STAGES, 1], barriers)
    up_empty = gl.allocate_shared_memory(gl.int64, [_QUERY_STAGES, 1], barriers)
    hopper.mbarrier.init(held_full, count=1)
    for stage in gl.static_range(_QUERY_STAGES):
        hopper.mbarrier.init(q_full.index(stage), count=1)
        hopper.mbarrier.init(up_full.index(stage), count=1)
        # Both computing groups give a stage back.
        hopper.mbarrier.init(q_empty.index(stage), count=2)
        hopper.mbarrier.init(up_empty.index(stage), count=2)

    # Written out in the call: a tuple in a variable would lose its compile-time constants.
    gl.warp_specialize(
        [
            (
                _hold_keys,
                (
                    0, keys, values, held_full, q_ring, up_ring, q_full, q_empty, up_full, up_empty,
                    lse, delta, grad_k, grad_v, k_order, q_table, k_table, full_indices, full_start, full_tiles,
                    partial_indices, partial_start, tiles, rule, bits, bit_place, column, out_stride_n, scale,
                    scale_log2, HEAD_DIM, RULE,
                ),
            ),
            (
                _hold_keys,
                (
                    1, keys, values, held_full, q_ring, up_ring, q_full, q_empty, up_full, up_empty,
                    lse, delta, grad_k, grad_v, k_order, q_table, k_table, full_indices, full_start, full_tiles,
                    partial_indices, partial_start, tiles, rule, bits, bit_place, column, out_stride_n, scale,
                    scale_log2, HEAD_DIM, RULE,
                ),
            ),
            (
                _copy_tiles,
                (
                    k_desc, v_desc, q_desc, up_desc, keys, values, held_full, q_ring, up_ring, q_full, q_empty,
                    up_full, up_empty, full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
                    head, batch * k_slots + column * BLOCK, batch * q_slots,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _key_tiles(
    grad_q, scores, query, upstream, k_ring, v_ring, k_full, k_empty, v_full, v_empty, row_lse, row_delta,
    start, end, tiles, place, indices, q_slots, q_table, k_table, rule, bits, scale_log2,
    RULE: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Adds tiles start to end of a row to its dQ / scale; scores are one tile ahead."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    slope_layout: gl.constexpr = gl.DotOperandLayout(0, grad_q.type.layout, 2)
    for n in range(start, end):
        stage, after = n % _KEY_STAGES, (n + 1) % _KEY_STAGES
        zeros = gl.zeros([_TILE, _TILE], gl.float32, score_layout)
        hopper.mbarrier.wait(v_full.index(stage), n // _KEY_STAGES & 1)
        value = _tile(v_ring, stage).permute((1, 0))
        slope = hopper.warpgroup_mma(upstream, value, zeros, use_acc=False, is_async=True)
        hopper.mbarrier.wait(k_full.index(after), (n + 1) // _KEY_STAGES & 1, pred=n + 1 < tiles)
        # After the last tile of what lies there, and thrown away.
        key = _tile(k_ring, after).permute((1, 0))
        next_scores = hopper.warpgroup_mma(query, key, zeros, use_acc=False, is_async=True)
        if PARTIAL:
            entry = place + (n - start) // _TILES
            block = gl.load(indices + entry)
            keys = gl.arange(0, _TILE, layout=gl.SliceLayout(0, score_layout))
            k_slots = block * BLOCK + n % _TILES * _TILE + keys
            word = word_of(bits, entry, RULE)
            visible = pairs_seen(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, BLOCK, BLOCK)
            scores = gl.where(visible, scores, float("-inf"))
        weights = gl.exp2(scores * scale_log2 - row_lse[:, None])
        slope = hopper.warpgroup_mma_wait(1, deps=[slope])
        hopper.mbarrier.arrive(v_empty.index(stage), count=1)
        slope = (weights * (slope - row_delta[:, None])).to(query.dtype)
        operand = gl.convert_layout(slope, slope_layout)
        grad_q = hopper.warpgroup_mma(operand, _tile(k_ring, stage), grad_q, is_async=True)
        grad_q, scores = hopper.warpgroup_mma_wait(0, deps=[grad_q, next_scores])
        hopper.mbarrier.arrive(k_empty.index(stage), count=1)
    return grad_q, scores


@gluon.jit
def _hold_queries(
    half: gl.constexpr, queries, upstreams, held_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty, grad_q,
    lse, delta, q_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
    rule, bits, row, out_stride, scale, scale_log2, HEAD_DIM: gl.constexpr, RULE: gl.constexpr,
):  # fmt: skip
    """A computing group of a row: 64 queries."""
    width: gl.constexpr = queries.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    first_slot = row * BLOCK + half * _TILE
    q_slots = first_slot + gl.arange(0, _TILE, layout=gl.SliceLayout(1, score_layout))
    row_lse = gl.load(lse + q_slots)
    row_delta = gl.load(delta + q_slots)
    query, upstream = _tile(queries, half), _tile(upstreams, half)
    zeros = gl.zeros([_TILE, _TILE], gl.float32, score_layout)
    hopper.mbarrier.wait(held_full, 0)
    hopper.mbarrier.wait(k_full.index(0), 0, pred=tiles > 0)
    scores = hopper.warpgroup_mma(query, _tile(k_ring, 0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    scores = hopper.warpgroup_mma_wait(0, deps=[scores])
    total = gl.zeros([_TILE, width], gl.float32, out_layout)
    total, scores = _key_tiles(
        total, scores, query, upstream, k_ring, v_ring, k_full, k_empty, v_full, v_empty, row_lse, row_delta,
        0, full_tiles, tiles, full_start, full_indices, q_slots, q_table, k_table, rule, bits, scale_log2, RULE, False,
    )  # fmt: skip
    total, scores = _key_tiles(
        total, scores, query, upstream, k_ring, v_ring, k_full, k_empty, v_full, v_empty, row_lse, row_delta,
        full_tiles, tiles, tiles, partial_start, partial_indices, q_slots, q_table, k_table, rule, bits, scale_log2,
        RULE, True,
    )  # fmt: skip
    _store(grad_q, total * scale, q_order, first_slot, out_stride, HEAD_DIM)


@gluon.jit(do_not_specialize=_COUNTS)
def _rows_kernel(
    q_desc, up_desc, k_desc, v_desc, grad_q, lse, delta, q_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits,
    out_stride_b, out_stride_n, out_stride_h,
    heads, q_blocks, q_slots, k_slots, q_order_step, q_table_step, k_table_step, list_step, scale_log2, scale,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr,
):  # fmt: skip
    batch, head = gl.program_id(1) // heads, gl.program_id(1) % heads
    which = head * list_step
    row = gl.load(launch_order + which * q_blocks + gl.program_id(0))
    offset = which * (q_blocks + 1) + row
    full_start, partial_start = gl.load(full_offsets + offset), gl.load(partial_offsets + offset)
    full_tiles = (gl.load(full_offsets + offset + 1) - full_start) * _TILES
    tiles = full_tiles + (gl.load(partial_offsets + offset + 1) - partial_start) * _TILES

    head64, batch64 = head.to(gl.int64), batch.to(gl.int64)
    q_order += head64 * q_order_step
    q_table += head64 * q_table_step
    k_table += head64 * k_table_step
    lse += (batch64 * heads + head64) * q_slots
    delta += (batch64 * heads + head64) * q_slots
    grad_q += batch64 * out_stride_b + head64 * out_stride_h

    dtype: gl.constexpr = q_desc.dtype
    width: gl.constexpr = q_desc.block_type.shape[2]
    queries = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], q_desc.layout)
    upstreams = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], up_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [_KEY_STAGES, 1, _TILE, width], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [_KEY_STAGES, 1, _TILE, width], v_desc.layout)
    barriers: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    held_full = gl.allocate_shared_memory(gl.int64, [1], barriers)
    k_full = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], barriers)
    k_empty = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], barriers)
    v_full = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], barriers)
    v_empty = gl.allocate_shared_memory(gl.int64, [_KEY_STAGES, 1], barriers)
    hopper.mbarrier.init(held_full, count=1)
    for stage in gl.static_range(_KEY_STAGES):
        hopper.mbarrier.init(k_full.index(stage), count=1)
        hopper.mbarrier.init(v_full.index(stage), count=1)
        hopper.mbarrier.init(k_empty.index(stage), count=2)
        hopper.mbarrier.init(v_empty.index(stage), count=2)

    gl.warp_specialize(
        [
            (
                _hold_queries,
                (
                    0, queries, upstreams, held_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty, grad_q,
                    lse, delta, q_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices,
                    partial_start, tiles, rule, bits, row, out_stride_n, scale, scale_log2, HEAD_DIM, RULE,
                ),
            ),
            (
                _hold_queries,
                (
                    1, queries, upstreams, held_full, k_ring, v_ring, k_full, k_empty, v_full, v_empty, grad_q,
                    lse, delta, q_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices,
                    partial_start, tiles, rule, bits, row, out_stride_n, scale, scale_log2, HEAD_DIM, RULE,
                ),
            ),
            (
                _copy_tiles,
                (
                    q_desc, up_desc, k_desc, v_desc, queries, upstreams, held_full, k_ring, v_ring, k_full, k_empty,
                    v_full, v_empty, full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
                    head, batch * q_slots + row * BLOCK, batch * k_slots,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(query: torch.Tensor, plan: BlockPlan, key_mask: torch.Tensor | None) -> bool:
    """Whether these kernels compute the call; all others are for block_sparse_backward.py."""
    return (
        key_mask is None
        and (plan.query.block, plan.key.block) == (BLOCK.value, BLOCK.value)
        and query.shape[-1] in range(40, 129, 8)
        and query.dtype in (torch.float16, torch.bfloat16)
    )


def walk_columns(
    query: torch.Tensor,
    upstream: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
) -> None:
    """Writes dK and dV.

    Args:
        query, upstream, key, value: In the plan's order, contiguous `[batch, slots, heads, head_dim]`.
        lse, delta: Of the query slots, float32 `[batch, heads, slots]`; the log-sum-exp to base 2.
        grad_k, grad_v: In the order of the tokens.
    """
    batch, _, heads, head_dim = query.shape
    rule, lists = plan.kernel_rule, plan.transposed
    _columns_kernel[(plan.key_blocks, batch * heads)](
        *(_tiles_of(x) for x in (query, upstream, key, value)), grad_k, grad_v, lse, delta,
        plan.key.order, rule.query, rule.key,
        lists.full.offsets, lists.full.indices, lists.partial.offsets, lists.partial.indices,
        rule.parameters, plan.bits, lists.bit_place, *grad_k.stride()[:3],
        heads, plan.key_blocks, plan.query.slots, plan.key.slots,
        head_step(plan.key.order), head_step(rule.query), head_step(rule.key), int(plan.lists > 1),
        scale / math.log(2), scale, HEAD_DIM=head_dim, RULE=rule.kind, num_warps=4,
    )  # fmt: skip


def walk_rows(
    query: torch.Tensor,
    upstream: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    grad_q: torch.Tensor,
    plan: BlockPlan,
    scale: float,
) -> None:
    """Writes dQ, in the order of the tokens; arguments as in `walk_columns`."""
    batch, _, heads, head_dim = query.shape
    rule = plan.kernel_rule
    _rows_kernel[(plan.query_blocks, batch * heads)](
        *(_tiles_of(x) for x in (query, upstream, key, value)), grad_q, lse, delta,
        plan.query.order, rule.query, rule.key, plan.launch_order,
        plan.full.offsets, plan.full.indices, plan.partial.offsets, plan.partial.indices,
        rule.parameters, plan.bits, *grad_q.stride()[:3],
        heads, plan.query_blocks, plan.query.slots, plan.key.slots,
        head_step(plan.query.order), head_step(rule.query), head_step(rule.key), int(plan.lists > 1),
        scale / math.log(2), scale, HEAD_DIM=head_dim, RULE=rule.kind, num_warps=4,
    )  # fmt: skip


def _tiles_of(x: torch.Tensor) -> TensorDescriptor:
    """Tiles of one head and 64 slots of a tensor in a plan's order; what is beyond a head is 0."""
    batch, slots, heads, head_dim = x.shape
    tile = tile_of(head_dim)
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    shape, strides = [heads, batch * slots, head_dim], [head_dim, heads * head_dim, 1]
    return TensorDescriptor(x, shape, strides, tile, layout)


def tile_of(head_dim: int) -> list[int]:
    """Heads, slots and dims of one copy."""
    return [1, _TILE.value, max(64, triton.next_power_of_2(head_dim))]
