"""Block-sparse attention for Hopper GPUs in Gluon, which ships inside Triton: the forward kernel and its launcher.

The same function as block_sparse.py, for 128 x 128 blocks. A program computes one query block with three groups of
warps: one copies keys and values into rings of shared memory, two compute 64 queries each. A group issues the scores
of a block, then the values of the block before it, and does its softmax while the tensor cores still work.

Gluon's interface moves between Triton's releases; all that depends on it stands in this file.
"""

from __future__ import annotations

import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_sparse import COUNTS, head_step, pairs_seen, word_of
from .plan import BlockPlan
from .reorder import gather

BLOCK = 128
_HALF = gl.constexpr(BLOCK // 2)
_STAGES = gl.constexpr(2)
_LN2 = gl.constexpr(math.log(2))


@gluon.jit
def _copy(desc, ring, full, empty, count, row, column):
    stage = count % _STAGES
    hopper.mbarrier.wait(empty.index(stage), (count // _STAGES & 1) ^ 1)
    hopper.mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(desc, [row, column], full.index(stage), ring.index(stage))


@gluon.jit
def _copy_blocks(
    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    full_indices, full_start, full_blocks, partial_indices, partial_start, blocks, first_row, column,
):  # fmt: skip
    """The copying group: keys and values of the row's full blocks, then of its partial ones."""
    rows: gl.constexpr = k_desc.block_type.shape[0]
    for n in range(full_blocks):
        row = first_row + gl.load(full_indices + full_start + n) * rows
        _copy(k_desc, k_ring, k_full, k_empty, n, row, column)
        _copy(v_desc, v_ring, v_full, v_empty, n, row, column)
    for n in range(full_blocks, blocks):
        row = first_row + gl.load(partial_indices + partial_start + n - full_blocks) * rows
        _copy(k_desc, k_ring, k_full, k_empty, n, row, column)
        _copy(v_desc, v_ring, v_full, v_empty, n, row, column)


@gluon.jit
def _softmax(scores, row_max, row_sum, scale_log2, PARTIAL: gl.constexpr):
    new_max = gl.maximum(row_max, gl.max(scores, 1))
    base = new_max * scale_log2
    if PARTIAL:
        # A row that has seen no key yet has no maximum: any finite one keeps its weights at 0 instead of NaN.
        base = gl.where(new_max == float("-inf"), 0.0, base)
    weights = gl.exp2(scores * scale_log2 - base[:, None])
    shrink = gl.exp2(row_max * scale_log2 - base)
    return weights, new_max, row_sum * shrink + gl.sum(weights, 1), shrink


@gluon.jit
def _hide(scores, n, q_slots, q_table, k_table, indices, rule, bits, RULE: gl.constexpr):
    """Scores of the n-th partial block, -inf where the rule does not hold."""
    keys: gl.constexpr = gl.SliceLayout(0, scores.type.layout)
    block = gl.load(indices + n)
    k_slots = block * 128 + gl.arange(0, 128, layout=keys)
    word = word_of(bits, n, RULE)
    visible = pairs_seen(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, 128, 128)
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def _steps(
    acc, weights, row_max, row_sum, query, k_ring, v_ring, k_full, k_empty, v_full, v_empty, start, end, place,
    q_slots, q_table, k_table, indices, rule, bits, scale_log2, PARTIAL: gl.constexpr, RULE: gl.constexpr,
):  # fmt: skip
    """Blocks start to end of a row, one behind in the values; `place` + n is where block n stands in `indices`."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    weight_layout: gl.constexpr = weights.type.layout
    for n in range(start, end):
        stage = n % _STAGES
        hopper.mbarrier.wait(k_full.index(stage), n // _STAGES & 1)
        zeros = gl.zeros([_HALF, 128], gl.float32, score_layout)
        scores = hopper.warpgroup_mma(query, k_ring.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
        before = (n - 1) % _STAGES
        hopper.mbarrier.wait(v_full.index(before), (n - 1) // _STAGES & 1)
        acc = hopper.warpgroup_mma(weights, v_ring.index(before), acc, is_async=True)
        scores = hopper.warpgroup_mma_wait(1, deps=[scores])
        hopper.mbarrier.arrive(k_empty.index(stage), count=1)
        if PARTIAL:
            scores = _hide(scores, place + n, q_slots, q_table, k_table, indices, rule, bits, RULE)
        new_weights, row_max, row_sum, shrink = _softmax(scores, row_max, row_sum, scale_log2, PARTIAL)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        hopper.mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
        weights = gl.convert_layout(new_weights.to(weights.dtype), weight_layout)
    return acc, weights, row_max, row_sum


@gluon.jit
def _attend(
    half, q_ring, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out, lse, q_order, q_table, k_table,
    full_blocks, partial_indices, partial_start, blocks, rule, bits, first_slot, out_stride, scale_log2,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr, WRITE_LSE: gl.constexpr,
):  # fmt: skip
    """A computing group: 64 queries of the program's block."""
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    query = q_ring.index(half)
    q_slots = first_slot + half * _HALF + gl.arange(0, _HALF, layout=rows)
    row_max = gl.full([_HALF], float("-inf"), gl.float32, rows)
    row_sum = gl.zeros([_HALF], gl.float32, rows)
    acc = gl.zeros([_HALF, HEAD_DIM], gl.float32, out_layout)
    if blocks > 0:
        hopper.mbarrier.wait(k_full.index(0), 0)
        zeros = gl.zeros([_HALF, 128], gl.float32, score_layout)
        scores = hopper.warpgroup_mma(query, k_ring.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
        scores = hopper.warpgroup_mma_wait(0, deps=[scores])
        hopper.mbarrier.arrive(k_empty.index(0), count=1)
        if full_blocks == 0:
            scores = _hide(scores, partial_start, q_slots, q_table, k_table, partial_indices, rule, bits, RULE)
        weights, row_max, row_sum, shrink = _softmax(scores, row_max, row_sum, scale_log2, True)
        weights = gl.convert_layout(weights.to(query.dtype), weight_layout)
        acc, weights, row_max, row_sum = _steps(
            acc, weights, row_max, row_sum, query, k_ring, v_ring, k_full, k_empty, v_full, v_empty, 1, full_blocks, 0,
            q_slots, q_table, k_table, partial_indices, rule, bits, scale_log2, False, RULE,
        )  # fmt: skip
        acc, weights, row_max, row_sum = _steps(
            acc, weights, row_max, row_sum, query, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            gl.maximum(full_blocks, 1), blocks, partial_start - full_blocks,
            q_slots, q_table, k_table, partial_indices, rule, bits, scale_log2, True, RULE,
        )  # fmt: skip
        last = (blocks - 1) % _STAGES
        hopper.mbarrier.wait(v_full.index(last), (blocks - 1) // _STAGES & 1)
        acc = hopper.warpgroup_mma(weights, v_ring.index(last), acc, is_async=True)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])

    # Queries without keys: output 0, log-sum-exp -inf (their maximum still is).
    row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, out_layout))[:, None]
    store: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    result = gl.convert_layout(acc.to(out.dtype.element_ty), store)
    slots = first_slot + half * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, store))
    tokens = gl.load(q_order + slots)
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store))
    place = out + tokens.to(gl.int64)[:, None] * out_stride + dims[None, :]
    gl.store(place, result, mask=(tokens >= 0)[:, None])
    if WRITE_LSE:
        tokens = gl.load(q_order + q_slots)
        gl.store(lse + tokens, (row_max * scale_log2 + gl.log2(row_sum)) * _LN2, mask=tokens >= 0)


@gluon.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    q, k_desc, v_desc, out, lse, q_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits,
    q_stride_b, q_stride_n, q_stride_h, out_stride_b, out_stride_n, out_stride_h,
    heads, q_tokens, q_blocks, q_order_step, q_table_step, k_table_step, k_slots, list_step, scale_log2,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr, WRITE_LSE: gl.constexpr,
):  # fmt: skip
    batch, head = gl.program_id(1) // heads, gl.program_id(1) % heads
    which = head * list_step
    row = gl.load(launch_order + which * q_blocks + gl.program_id(0))
    offset = which * (q_blocks + 1) + row
    full_start, partial_start = gl.load(full_offsets + offset), gl.load(partial_offsets + offset)
    full_blocks = gl.load(full_offsets + offset + 1) - full_start
    blocks = full_blocks + gl.load(partial_offsets + offset + 1) - partial_start

    head64, batch64 = head.to(gl.int64), batch.to(gl.int64)
    q_order += head64 * q_order_step
    q_table += head64 * q_table_step
    k_table += head64 * k_table_step
    q_ring = gl.allocate_shared_memory(q.dtype.element_ty, [2, _HALF, HEAD_DIM], k_desc.layout)
    load: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    dims = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, load))
    q += batch64 * q_stride_b + head64 * q_stride_h
    for half in gl.static_range(2):
        slots = row * 128 + half * _HALF + gl.arange(0, _HALF, layout=gl.SliceLayout(1, load))
        tokens = gl.load(q_order + slots)
        place = q + tokens.to(gl.int64)[:, None] * q_stride_n + dims[None, :]
        q_ring.index(half).store(gl.load(place, mask=(tokens >= 0)[:, None], other=0.0))
    hopper.fence_async_shared()

    k_ring = gl.allocate_shared_memory(k_desc.dtype, [_STAGES, 128, HEAD_DIM], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [_STAGES, 128, HEAD_DIM], v_desc.layout)
    barriers: gl.constexpr = hopper.mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    k_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    v_full = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    v_empty = gl.allocate_shared_memory(gl.int64, [_STAGES, 1], barriers)
    for stage in gl.static_range(_STAGES):
        hopper.mbarrier.init(k_full.index(stage), count=1)
        hopper.mbarrier.init(v_full.index(stage), count=1)
        # Both computing groups give a stage back.
        hopper.mbarrier.init(k_empty.index(stage), count=2)
        hopper.mbarrier.init(v_empty.index(stage), count=2)

    out += batch64 * out_stride_b + head64 * out_stride_h
    lse += (batch64 * heads + head64) * q_tokens
    # Written out in the call: a tuple in a variable would lose its compile-time constants.
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    0, q_ring, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out, lse, q_order, q_table, k_table,
                    full_blocks, partial_indices, partial_start, blocks, rule, bits, row * 128, out_stride_n,
                    scale_log2, HEAD_DIM, RULE, WRITE_LSE,
                ),
            ),
            (
                _attend,
                (
                    1, q_ring, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out, lse, q_order, q_table, k_table,
                    full_blocks, partial_indices, partial_start, blocks, rule, bits, row * 128, out_stride_n,
                    scale_log2, HEAD_DIM, RULE, WRITE_LSE,
                ),
            ),
            (
                _copy_blocks,
                (
                    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                    full_indices, full_start, full_blocks, partial_indices, partial_start, blocks,
                    batch * k_slots, head * HEAD_DIM,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def fits(q: torch.Tensor, plan: BlockPlan, scale: float, key_mask: torch.Tensor | None) -> bool:
    """Whether this kernel computes the call; all others are for block_sparse.py."""
    return (
        key_mask is None
        and scale > 0
        and (plan.query.block, plan.key.block) == (BLOCK, BLOCK)
        and q.shape[-1] in (64, 128)
        and q.dtype in (torch.float16, torch.bfloat16)
        and all(stride % 8 == 0 for stride in q.stride()[:3])
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel; arguments and results as in block_sparse.py."""
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens) if return_lse else (1,), dtype=torch.float32, device=q.device)
    rule, slots, tile = plan.kernel_rule, plan.key.slots, [BLOCK, head_dim]
    layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16 if q.dtype == torch.bfloat16 else gl.float16)
    keys, values = (
        TensorDescriptor.from_tensor(x.view(batch * slots, heads * head_dim), tile, layout)
        for x in gather((k, plan.key.order), (v, plan.key.order))
    )
    _forward_kernel[(plan.query_blocks, batch * heads)](
        q, keys, values, out, lse, plan.query.order, rule.query, rule.key, plan.launch_order,
        plan.full.offsets, plan.full.indices, plan.partial.offsets, plan.partial.indices,
        rule.parameters, plan.bits, *q.stride()[:3], *out.stride()[:3],
        heads, tokens, plan.query_blocks,
        head_step(plan.query.order), head_step(rule.query), head_step(rule.key), slots, int(plan.lists > 1),
        scale / math.log(2),
        HEAD_DIM=head_dim, RULE=rule.kind, WRITE_LSE=return_lse, num_warps=4,
    )  # fmt: skip
    return out, lse
