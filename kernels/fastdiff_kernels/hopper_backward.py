"""The backward pass for Hopper GPUs in Gluon: formulas and names as in block_sparse_backward.py, the form of hopper.py.

One kernel walks the plan's rows for dQ, the other its columns for dK and dV. A program holds one block in two groups of
warps, 64 slots each; a third copies what they walk along into a ring of shared memory. Tiles are [held, walked], so
weights and slopes stay in registers as operands of the next product. The columns' log-sum-exps and deltas come with
their queries: loaded by each thread they would take registers that the two accumulators need.

Nothing is summed by atomics, so results repeat. Adding dQ up beside dK and dV would save two of seven products and was
no faster: its tiles have to be added to global memory (results/notes-kernels.md).
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_sparse import head_step, pairs_hidden, word_of
from .hopper import give_back, hide, hide_masked, launched, layout_of, tile_at, wait
from .plan import BlockPlan
from .tuning import power_of_two

BLOCK = gl.constexpr(128)
# Rows of a tile: queries or keys that are walked, and those that a computing group holds.
_TILE = gl.constexpr(64)
_TILES = gl.constexpr(2)
_STAGES = gl.constexpr(3)
# Log-sum-exps or deltas of a tile of queries, as the copy engine brings them.
TERM_TILE = [1, _TILE.value]
TERM_LAYOUT = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
# What differs from call to call without a need to compile anew.
_COUNTS = ("batches", "heads", "q_blocks", "k_blocks", "list_step", "heavy", "mask_heads")


@gluon.jit
def _start(held, tile, acc, use_acc: gl.constexpr):
    return hopper.warpgroup_mma(held, tile.permute((1, 0)), acc, use_acc=use_acc, is_async=True)


@gluon.jit
def _first_slot(n, full_indices, full_start, full_tiles, partial_indices, partial_start):
    """Where the n-th tile that is walked begins: full blocks come before partial ones."""
    if n < full_tiles:
        block = gl.load(full_indices + full_start + n // _TILES)
    else:
        block = gl.load(partial_indices + partial_start + (n - full_tiles) // _TILES)
    return block * BLOCK + n % _TILES * _TILE


@gluon.jit
def _copy_held(desc0, desc1, held0, held1, held_full, head, row):
    hopper.mbarrier.expect(held_full, 2 * _TILES * desc0.block_type.nbytes)
    for half in gl.static_range(_TILES):
        place = [head, row + half * _TILE, 0]
        hopper.tma.async_copy_global_to_shared(desc0, place, held_full, held0.index(half))
        hopper.tma.async_copy_global_to_shared(desc1, place, held_full, held1.index(half))


@gluon.jit
def _wait_for_room(full, empty, n, size):
    hopper.mbarrier.wait(empty.index(n % _STAGES), (n // _STAGES & 1) ^ 1)
    hopper.mbarrier.expect(full.index(n % _STAGES), size)


@gluon.jit
def _copy(desc, ring, full, n, place):
    hopper.tma.async_copy_global_to_shared(desc, place, full.index(n % _STAGES), ring.index(n % _STAGES))


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
def _copy_queries(
    k_desc, v_desc, q_desc, up_desc, lse_desc, delta_desc, keys, values, held_full, q_ring, up_ring, lse_ring,
    delta_ring, full, empty, full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
    head, k_row, q_row, term_row,
):  # fmt: skip
    """The copying group of a column: queries, and what belongs to them."""
    _copy_held(k_desc, v_desc, keys, values, held_full, head, k_row)
    for n in range(tiles):
        slot = _first_slot(n, full_indices, full_start, full_tiles, partial_indices, partial_start)
        _wait_for_room(full, empty, n, 2 * q_desc.block_type.nbytes + 2 * lse_desc.block_type.nbytes)
        _copy(q_desc, q_ring, full, n, [head, q_row + slot, 0])
        _copy(up_desc, up_ring, full, n, [head, q_row + slot, 0])
        _copy(lse_desc, lse_ring, full, n, [term_row, slot])
        _copy(delta_desc, delta_ring, full, n, [term_row, slot])


@gluon.jit
def _query_tiles(
    grad_k, grad_v, key, value, q_ring, up_ring, lse_ring, delta_ring, full, empty,
    start, end, place, indices, k_slots, column, q_table, k_table, rule, bits, bit_place, scale_log2,
    RULE: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Adds tiles start to end of a column to its dK / scale and dV; their blocks stand from `place` on in `indices`."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, grad_k.type.layout, 2)
    dtype: gl.constexpr = key.dtype
    for n in range(start, end):
        wait(full, n)
        query, upstream = tile_at(q_ring, n), tile_at(up_ring, n)
        zeros = gl.zeros([_TILE, _TILE], gl.float32, score_layout)
        scores = _start(key, query, zeros, False)
        # From -delta on, which saves subtracting it.
        slope = _start(value, upstream, zeros - delta_ring.index(n % _STAGES).load(score_layout), True)
        scores = hopper.warpgroup_mma_wait(1, deps=[scores])
        if PARTIAL:
            entry = place + (n - start) // _TILES
            queries = gl.arange(0, _TILE, layout=gl.SliceLayout(0, score_layout))
            q_slots = gl.load(indices + entry) * BLOCK + n % _TILES * _TILE + queries
            word = word_of(bits, gl.load(bit_place + entry), RULE)
            hidden = pairs_hidden(q_table, k_table, q_slots, k_slots, column, rule, word, RULE, BLOCK, BLOCK, True)
            scores = hide(scores, hidden)
        weights = gl.exp2(scores * scale_log2 - lse_ring.index(n % _STAGES).load(score_layout))
        operand = gl.convert_layout(weights.to(dtype), weight_layout)
        grad_v = hopper.warpgroup_mma(operand, upstream, grad_v, is_async=True)
        slope = hopper.warpgroup_mma_wait(1, deps=[slope])
        slope = (weights * slope).to(dtype)
        grad_k = hopper.warpgroup_mma(gl.convert_layout(slope, weight_layout), query, grad_k, is_async=True)
        grad_k, grad_v = hopper.warpgroup_mma_wait(0, deps=[grad_k, grad_v])
        give_back(empty, n)
    return grad_k, grad_v


@gluon.jit
def _hold_keys(
    half: gl.constexpr, keys, values, held_full, q_ring, up_ring, lse_ring, delta_ring, full, empty,
    grad_k, grad_v, k_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices, partial_start,
    tiles, rule, bits, bit_place, limits, column, out_stride, scale, scale_log2,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """A computing group of a column: 64 keys."""
    width: gl.constexpr = keys.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    first_slot = column * BLOCK + half * _TILE
    k_slots = first_slot + gl.arange(0, _TILE, layout=gl.SliceLayout(1, score_layout))
    key, value = tile_at(keys, half), tile_at(values, half)
    total_k = gl.zeros([_TILE, width], gl.float32, out_layout)
    total_v = gl.zeros([_TILE, width], gl.float32, out_layout)
    hopper.mbarrier.wait(held_full, 0)
    total_k, total_v = _query_tiles(
        total_k, total_v, key, value, q_ring, up_ring, lse_ring, delta_ring, full, empty,
        0, full_tiles, full_start, full_indices, k_slots, column, q_table, k_table, rule, bits, bit_place, scale_log2,
        RULE, False,
    )  # fmt: skip
    total_k, total_v = _query_tiles(
        total_k, total_v, key, value, q_ring, up_ring, lse_ring, delta_ring, full, empty,
        full_tiles, tiles, partial_start, partial_indices, k_slots, column, q_table, k_table, rule, bits, bit_place,
        scale_log2, RULE, True,
    )  # fmt: skip
    if HAS_KEY_MASK:
        # A row is one key's, so what it added up without being seen can be thrown away here, infinite or not.
        slots = first_slot + gl.arange(0, _TILE, layout=gl.SliceLayout(1, out_layout))
        seen = (gl.load(limits + slots) > 0)[:, None]
        total_k, total_v = gl.where(seen, total_k, 0.0), gl.where(seen, total_v, 0.0)
    _store(grad_k, total_k * scale, k_order, first_slot, out_stride, HEAD_DIM)
    _store(grad_v, total_v, k_order, first_slot, out_stride, HEAD_DIM)


@gluon.jit(do_not_specialize=_COUNTS)
def _columns_kernel(
    q_desc, up_desc, k_desc, v_desc, lse_desc, delta_desc, grad_k, grad_v, k_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits, bit_place, limits,
    out_stride_b, out_stride_n, out_stride_h,
    batches, heads, k_blocks, heavy, q_slots, k_slots, k_order_step, q_table_step, k_table_step, list_step,
    mask_heads, scale_log2, scale, HEAD_DIM: gl.constexpr, RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    batch, head, column = launched(launch_order, batches, heads, k_blocks, heavy, list_step)
    offset = head * list_step * (k_blocks + 1) + column
    full_start, partial_start = gl.load(full_offsets + offset), gl.load(partial_offsets + offset)
    full_tiles = (gl.load(full_offsets + offset + 1) - full_start) * _TILES
    tiles = full_tiles + (gl.load(partial_offsets + offset + 1) - partial_start) * _TILES

    head64, batch64 = head.to(gl.int64), batch.to(gl.int64)
    k_order += head64 * k_order_step
    q_table += head64 * q_table_step
    k_table += head64 * k_table_step
    grad_k += batch64 * out_stride_b + head64 * out_stride_h
    grad_v += batch64 * out_stride_b + head64 * out_stride_h
    if HAS_KEY_MASK:
        limits += (batch64 * mask_heads + head64 % mask_heads) * k_slots

    dtype: gl.constexpr = k_desc.dtype
    width: gl.constexpr = k_desc.block_type.shape[2]
    keys = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], k_desc.layout)
    values = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], v_desc.layout)
    q_ring = gl.allocate_shared_memory(dtype, [_STAGES, 1, _TILE, width], q_desc.layout)
    up_ring = gl.allocate_shared_memory(dtype, [_STAGES, 1, _TILE, width], up_desc.layout)
    lse_ring = gl.allocate_shared_memory(gl.float32, [_STAGES, 1, _TILE], lse_desc.layout)
    delta_ring = gl.allocate_shared_memory(gl.float32, [_STAGES, 1, _TILE], delta_desc.layout)
    barriers: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    held_full = gl.allocate_shared_memory(gl.int64, [1], barriers)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    hopper.mbarrier.init(held_full, count=1)
    for stage in gl.static_range(_STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        # Both computing groups give a stage back.
        hopper.mbarrier.init(empty.index(stage), count=2)

    # Written out in the call: a tuple in a variable would lose its compile-time constants.
    gl.warp_specialize(
        [
            (
                _hold_keys,
                (
                    0, keys, values, held_full, q_ring, up_ring, lse_ring, delta_ring, full, empty,
                    grad_k, grad_v, k_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices,
                    partial_start, tiles, rule, bits, bit_place, limits, column, out_stride_n, scale, scale_log2,
                    HEAD_DIM, RULE, HAS_KEY_MASK,
                ),
            ),
            (
                _hold_keys,
                (
                    1, keys, values, held_full, q_ring, up_ring, lse_ring, delta_ring, full, empty,
                    grad_k, grad_v, k_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices,
                    partial_start, tiles, rule, bits, bit_place, limits, column, out_stride_n, scale, scale_log2,
                    HEAD_DIM, RULE, HAS_KEY_MASK,
                ),
            ),
            (
                _copy_queries,
                (
                    k_desc, v_desc, q_desc, up_desc, lse_desc, delta_desc, keys, values, held_full, q_ring, up_ring,
                    lse_ring, delta_ring, full, empty, full_indices, full_start, full_tiles, partial_indices,
                    partial_start, tiles, head, batch * k_slots + column * BLOCK, batch * q_slots,
                    batch * heads + head,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit
def _copy_keys(
    q_desc, up_desc, k_desc, v_desc, queries, upstreams, held_full, k_ring, v_ring, full, empty,
    full_indices, full_start, full_tiles, partial_indices, partial_start, tiles, head, q_row, k_row,
):  # fmt: skip
    """The copying group of a row."""
    _copy_held(q_desc, up_desc, queries, upstreams, held_full, head, q_row)
    for n in range(tiles):
        slot = _first_slot(n, full_indices, full_start, full_tiles, partial_indices, partial_start)
        _wait_for_room(full, empty, n, 2 * k_desc.block_type.nbytes)
        _copy(k_desc, k_ring, full, n, [head, k_row + slot, 0])
        _copy(v_desc, v_ring, full, n, [head, k_row + slot, 0])


@gluon.jit
def _key_tiles(
    grad_q, scores, query, upstream, k_ring, v_ring, full, empty, row_lse, row_delta,
    start, end, tiles, place, indices, q_slots, q_table, k_table, rule, bits, limits, masked, scale_log2,
    RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """Adds tiles start to end of a row to its dQ / scale; scores are one tile ahead."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    slope_layout: gl.constexpr = gl.DotOperandLayout(0, grad_q.type.layout, 2)
    for n in range(start, end):
        zeros = gl.zeros([_TILE, _TILE], gl.float32, score_layout)
        slope = _start(upstream, tile_at(v_ring, n), zeros, False)
        # After the last tile of what lies there, and thrown away.
        hopper.mbarrier.wait(full.index((n + 1) % _STAGES), (n + 1) // _STAGES & 1, pred=n + 1 < tiles)
        next_scores = _start(query, tile_at(k_ring, n + 1), zeros, False)
        entry = place + (n - start) // _TILES
        if HAS_KEY_MASK or PARTIAL:
            block = gl.load(indices + entry)
        if HAS_KEY_MASK:
            scores = hide_masked(scores, block, n, limits, masked)
        if PARTIAL:
            keys = gl.arange(0, _TILE, layout=gl.SliceLayout(0, score_layout))
            k_slots = block * BLOCK + n % _TILES * _TILE + keys
            word = word_of(bits, entry, RULE)
            hidden = pairs_hidden(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, BLOCK, BLOCK)
            scores = hide(scores, hidden)
        weights = gl.exp2(scores * scale_log2 - row_lse[:, None])
        slope = hopper.warpgroup_mma_wait(1, deps=[slope])
        slope = (weights * (slope - row_delta[:, None])).to(k_ring.dtype)
        grad_q = hopper.warpgroup_mma(gl.convert_layout(slope, slope_layout), tile_at(k_ring, n), grad_q, is_async=True)
        grad_q, scores = hopper.warpgroup_mma_wait(0, deps=[grad_q, next_scores])
        give_back(empty, n)
    return grad_q, scores


@gluon.jit
def _hold_queries(
    half: gl.constexpr, queries, upstreams, held_full, k_ring, v_ring, full, empty, grad_q,
    lse, delta, q_order, q_table, k_table, full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
    rule, bits, limits, masked, row, out_stride, scale, scale_log2,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """A computing group of a row: 64 queries."""
    width: gl.constexpr = queries.shape[3]
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _TILE, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    first_slot = row * BLOCK + half * _TILE
    q_slots = first_slot + gl.arange(0, _TILE, layout=gl.SliceLayout(1, score_layout))
    row_lse = gl.load(lse + q_slots)
    row_delta = gl.load(delta + q_slots)
    total = gl.zeros([_TILE, width], gl.float32, out_layout)
    zeros = gl.zeros([_TILE, _TILE], gl.float32, score_layout)
    hopper.mbarrier.wait(held_full, 0)
    # From registers, since a product of two such tiles in shared memory waits for their reads.
    query, upstream = tile_at(queries, half).load(gl.DotOperandLayout(0, score_layout, 2)), tile_at(upstreams, half)
    hopper.mbarrier.wait(full.index(0), 0, pred=tiles > 0)
    scores = hopper.warpgroup_mma_wait(0, deps=[_start(query, tile_at(k_ring, 0), zeros, False)])
    total, scores = _key_tiles(
        total, scores, query, upstream, k_ring, v_ring, full, empty, row_lse, row_delta,
        0, full_tiles, tiles, full_start, full_indices, q_slots, q_table, k_table, rule, bits, limits, masked,
        scale_log2, RULE, HAS_KEY_MASK, False,
    )  # fmt: skip
    total, scores = _key_tiles(
        total, scores, query, upstream, k_ring, v_ring, full, empty, row_lse, row_delta,
        full_tiles, tiles, tiles, partial_start, partial_indices, q_slots, q_table, k_table, rule, bits, limits, masked,
        scale_log2, RULE, HAS_KEY_MASK, True,
    )  # fmt: skip
    _store(grad_q, total * scale, q_order, first_slot, out_stride, HEAD_DIM)


@gluon.jit(do_not_specialize=_COUNTS)
def _rows_kernel(
    q_desc, up_desc, k_desc, v_desc, grad_q, lse, delta, q_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits, limits, masked,
    out_stride_b, out_stride_n, out_stride_h,
    batches, heads, q_blocks, heavy, q_slots, k_slots, q_order_step, q_table_step, k_table_step, list_step,
    mask_heads, scale_log2, scale, HEAD_DIM: gl.constexpr, RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    batch, head, row = launched(launch_order, batches, heads, q_blocks, heavy, list_step)
    offset = head * list_step * (q_blocks + 1) + row
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
    if HAS_KEY_MASK:
        layer_of_mask = batch64 * mask_heads + head64 % mask_heads
        limits += layer_of_mask * k_slots
        masked += layer_of_mask * (k_slots // BLOCK)

    dtype: gl.constexpr = q_desc.dtype
    width: gl.constexpr = q_desc.block_type.shape[2]
    queries = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], q_desc.layout)
    upstreams = gl.allocate_shared_memory(dtype, [_TILES, 1, _TILE, width], up_desc.layout)
    k_ring = gl.allocate_shared_memory(dtype, [_STAGES, 1, _TILE, width], k_desc.layout)
    v_ring = gl.allocate_shared_memory(dtype, [_STAGES, 1, _TILE, width], v_desc.layout)
    barriers: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    held_full = gl.allocate_shared_memory(gl.int64, [1], barriers)
    full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    hopper.mbarrier.init(held_full, count=1)
    for stage in gl.static_range(_STAGES):
        hopper.mbarrier.init(full.index(stage), count=1)
        hopper.mbarrier.init(empty.index(stage), count=2)

    gl.warp_specialize(
        [
            (
                _hold_queries,
                (
                    0, queries, upstreams, held_full, k_ring, v_ring, full, empty, grad_q, lse, delta, q_order,
                    q_table, k_table, full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
                    rule, bits, limits, masked, row, out_stride_n, scale, scale_log2, HEAD_DIM, RULE, HAS_KEY_MASK,
                ),
            ),
            (
                _hold_queries,
                (
                    1, queries, upstreams, held_full, k_ring, v_ring, full, empty, grad_q, lse, delta, q_order,
                    q_table, k_table, full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
                    rule, bits, limits, masked, row, out_stride_n, scale, scale_log2, HEAD_DIM, RULE, HAS_KEY_MASK,
                ),
            ),
            (
                _copy_keys,
                (
                    q_desc, up_desc, k_desc, v_desc, queries, upstreams, held_full, k_ring, v_ring, full, empty,
                    full_indices, full_start, full_tiles, partial_indices, partial_start, tiles,
                    head, batch * q_slots + row * BLOCK, batch * k_slots,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(query: torch.Tensor, plan: BlockPlan, scale: float) -> bool:
    """Whether these kernels compute the call; all others are for block_sparse_backward.py."""
    return (
        scale > 0
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
    limits: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Writes dK and dV.

    Args:
        query, upstream, key, value: In the plan's order, contiguous `[batch, slots, heads, head_dim]`.
        lse, delta: Of the query slots, float32 `[batch, heads, slots]`; the log-sum-exp to base 2.
        grad_k, grad_v: In the order of the tokens.
        limits: Of a key mask, see `reorder.key_limits`.
    """
    batch, _, heads, head_dim = query.shape
    rule, lists = plan.kernel_rule, plan.transposed
    _columns_kernel[(plan.key_blocks * batch * heads,)](
        *(_tiles_of(x) for x in (query, upstream, key, value)), _terms_of(lse), _terms_of(delta), grad_k, grad_v,
        plan.key.order, rule.query, rule.key, lists.launch_order,
        lists.full.offsets, lists.full.indices, lists.partial.offsets, lists.partial.indices,
        rule.parameters, plan.bits, lists.bit_place, lse if limits is None else limits[0], *grad_k.stride()[:3],
        batch, heads, plan.key_blocks, lists.heavy, plan.query.slots, plan.key.slots,
        head_step(plan.key.order), head_step(rule.query), head_step(rule.key), int(plan.lists > 1),
        plan.key.order.shape[0], scale / math.log(2), scale,
        HEAD_DIM=head_dim, RULE=rule.kind, HAS_KEY_MASK=limits is not None, num_warps=4,
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
    limits: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Writes dQ, in the order of the tokens; arguments as in `walk_columns`."""
    batch, _, heads, head_dim = query.shape
    rule = plan.kernel_rule
    _rows_kernel[(plan.query_blocks * batch * heads,)](
        *(_tiles_of(x) for x in (query, upstream, key, value)), grad_q, lse, delta,
        plan.query.order, rule.query, rule.key, plan.launch_order,
        plan.full.offsets, plan.full.indices, plan.partial.offsets, plan.partial.indices,
        rule.parameters, plan.bits, *((lse, lse) if limits is None else limits), *grad_q.stride()[:3],
        batch, heads, plan.query_blocks, plan.heavy_rows, plan.query.slots, plan.key.slots,
        head_step(plan.query.order), head_step(rule.query), head_step(rule.key), int(plan.lists > 1),
        plan.key.order.shape[0], scale / math.log(2), scale,
        HEAD_DIM=head_dim, RULE=rule.kind, HAS_KEY_MASK=limits is not None, num_warps=4,
    )  # fmt: skip


def tile_of(head_dim: int) -> list[int]:
    """Heads, slots and dims of one copy; what is beyond a head is 0."""
    return [1, _TILE.value, max(64, power_of_two(head_dim))]


def _tiles_of(x: torch.Tensor) -> TensorDescriptor:
    """How the copy engine reads a tensor in a plan's order."""
    batch, slots, heads, head_dim = x.shape
    tile = tile_of(head_dim)
    layout = layout_of(*tile, dtype=x.dtype)
    shape, strides = [heads, batch * slots, head_dim], [head_dim, heads * head_dim, 1]
    return TensorDescriptor(x, shape, strides, tile, layout)


def _terms_of(x: torch.Tensor) -> TensorDescriptor:
    """The same of what stands beside the queries, float32 `[batch, heads, slots]`."""
    return TensorDescriptor.from_tensor(x.flatten(0, 1), TERM_TILE, TERM_LAYOUT)
