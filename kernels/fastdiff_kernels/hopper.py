"""Block-sparse attention for Hopper GPUs in Gluon, which ships inside Triton: the forward kernel and its launcher.

The same function as block_sparse.py, for 128 x 128 blocks. A program computes one query block with three groups of
warps: one copies keys and values into rings of shared memory, two compute 64 queries each. A group issues the scores
of a tile of keys, then the values of the tile before it, and does its softmax while the tensor cores still work; the
two take turns at issuing.

Gluon's interface moves between Triton's releases; all that depends on it stands here and in hopper_backward.py.
"""

from __future__ import annotations

import functools
import math

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .block_sparse import COUNTS, head_step, pairs_hidden, word_of
from .plan import BlockPlan
from .reorder import gather, key_limits
from .tuning import power_of_two

BLOCK = 128
_HALF = gl.constexpr(BLOCK // 2)
_STAGES = gl.constexpr(2)
# Named barriers of the two computing groups' turns; Triton numbers its own from 0.
_TURNS = gl.constexpr(14)
_LN2 = gl.constexpr(math.log(2))


@gluon.jit
def _copy(desc, ring, full, empty, count, batch, head, row):
    stages: gl.constexpr = ring.type.shape[0]
    stage = count % stages
    hopper.mbarrier.wait(empty.index(stage), (count // stages & 1) ^ 1)
    hopper.mbarrier.expect(full.index(stage), desc.block_type.nbytes)
    hopper.tma.async_copy_global_to_shared(desc, [batch, head, row, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _copy_tiles(
    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    full_indices, full_start, full_tiles, partial_indices, partial_start, tiles, batch, head,
):  # fmt: skip
    """The copying group: keys of the row's full blocks, then of its partial ones, and values one tile behind."""
    keys: gl.constexpr = k_desc.block_type.shape[2]
    parts: gl.constexpr = 128 // keys
    before = 0
    for n in range(tiles):
        if n < full_tiles:
            block = gl.load(full_indices + full_start + n // parts)
        else:
            block = gl.load(partial_indices + partial_start + (n - full_tiles) // parts)
        row = block * 128 + n % parts * keys
        _copy(k_desc, k_ring, k_full, k_empty, n, batch, head, row)
        if n > 0:
            _copy(v_desc, v_ring, v_full, v_empty, n - 1, batch, head, before)
        before = row
    if tiles > 0:
        _copy(v_desc, v_ring, v_full, v_empty, tiles - 1, batch, head, before)


@gluon.jit
def _by_lane(weights):
    """Sums of a row's weights by the four lanes that hold them, [rows, 4]: the lanes add theirs up once, at the end."""
    keys: gl.constexpr = weights.type.shape[1]
    parts = weights.reshape([weights.type.shape[0], keys // 8, 4, 2])
    return gl.sum(gl.sum(parts, 3), 1)


@gluon.jit
def _softmax(scores, row_max, sums, scale_log2, PARTIAL: gl.constexpr):
    """`row_max` is that of the scores as exponents of 2, so that `shrink` is exactly 1 where it stays.

    `sums` are by lane, and None before the first tile.
    """
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    base = new_max
    if PARTIAL:
        # A row that has seen no key yet has no maximum: any finite one keeps its weights at 0 instead of NaN.
        base = gl.where(new_max == float("-inf"), 0.0, base)
    weights = gl.exp2(scores * scale_log2 - base[:, None])
    shrink = gl.exp2(row_max - base)
    parts = _by_lane(weights)
    if sums is None:
        sums = parts
    else:
        sums = sums * gl.convert_layout(shrink, gl.SliceLayout(1, parts.type.layout))[:, None] + parts
    return weights, new_max, sums, shrink


def _unless_all_are_one(numbers: int) -> tuple[str, str]:
    """PTX that multiplies numbers of a thread, but by a branch around it where all factors in the warp are 1."""
    move = "".join(f"mov.f32 ${i}, ${numbers + i}; " for i in range(numbers))
    multiply = "".join(f"mul.f32 ${i}, ${i}, ${2 * numbers + i}; " for i in range(numbers))
    # A thread holds two rows of a product, two columns of the one and then two of the other.
    one, first, second = "0f3F800000", f"${2 * numbers}", f"${2 * numbers + 2}"
    return (
        f"{{ .reg .pred differs, any; setp.neu.f32 differs, {first}, {one}; "
        f"setp.neu.or.f32 differs, {second}, {one}, differs; vote.sync.any.pred any, differs, 0xffffffff; "
        f"{move}@!any bra DONE; {multiply}DONE: }}"
    ), ",".join(["=&f"] * numbers + ["f"] * 2 * numbers)


_SHRINK, _SHRINK_OPERANDS = (gl.constexpr(text) for text in _unless_all_are_one(32))


@gluon.jit
def _shrunk(acc, shrink):
    """acc * shrink. After the first tiles a row seldom has a new maximum, and then there is nothing to multiply."""
    shrink = gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return gl.inline_asm_elementwise(_SHRINK, _SHRINK_OPERANDS, [acc, shrink], dtype=gl.float32, is_pure=True, pack=32)


@gluon.jit
def _before_waiting(row_sum):
    """Keeps the exponentials, whose sum this is, before the wait that follows.

    ptxas moves a wait up as far as nothing holds it, and a group would then do its softmax when the tensor cores are
    done instead of meanwhile. A branch holds it; no sum is negative, so the fence behind it never runs.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred never; setp.lt.f32 never, $1, 0f00000000; @never fence.proxy.async.shared::cta; "
        "mov.b32 $0, $1; }", "=f,f", [row_sum], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def hide(scores, hidden):
    """Scores, -inf where `hidden` is not 0."""
    # As `gl.where` LLVM would pack the comparisons of a thread into words, and take those apart again.
    return gl.inline_asm_elementwise(
        "{ .reg .pred seen; setp.eq.s32 seen, $2, 0; selp.f32 $0, $1, 0fFF800000, seen; }", "=f,f,r", [scores, hidden],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _hide_partial(scores, n, q_slots, q_table, k_table, indices, rule, bits, RULE: gl.constexpr):
    """Scores of the n-th tile of partial blocks, -inf where the rule does not hold."""
    keys: gl.constexpr = scores.type.shape[1]
    parts: gl.constexpr = 128 // keys
    block = gl.load(indices + n // parts)
    k_slots = block * 128 + n % parts * keys + gl.arange(0, keys, layout=gl.SliceLayout(0, scores.type.layout))
    word = word_of(bits, n // parts, RULE)
    return hide(scores, pairs_hidden(q_table, k_table, q_slots, k_slots, block, rule, word, RULE, 128, 128))


@gluon.jit
def hide_masked(scores, block, n, limits, masked):
    """Scores of tile n, which lies in `block`, -inf where the key mask hides the key."""
    keys: gl.constexpr = scores.type.shape[1]
    if gl.load(masked + block):
        k_slots = gl.arange(0, keys, layout=gl.SliceLayout(0, scores.type.layout)) + block * 128
        scores = gl.minimum(scores, gl.load(limits + k_slots + n % (128 // keys) * keys)[None, :])
    return scores


@gluon.jit
def tile_at(ring, n):
    return ring.index(n % ring.type.shape[0]).reshape([ring.type.shape[-2], ring.type.shape[-1]])


@gluon.jit
def wait(barriers, n):
    stages: gl.constexpr = barriers.type.shape[0]
    hopper.mbarrier.wait(barriers.index(n % stages), n // stages & 1)


@gluon.jit
def give_back(barriers, n):
    hopper.mbarrier.arrive(barriers.index(n % barriers.type.shape[0]), count=1)


@gluon.jit
def _scores(query, k_ring, k_full, n):
    keys: gl.constexpr = k_ring.type.shape[-2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16])
    wait(k_full, n)
    zeros = gl.zeros([_HALF, keys], gl.float32, layout)
    return hopper.warpgroup_mma(query, tile_at(k_ring, n).permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _add_values(acc, weights, shrink, v_ring, v_full, n):
    """Starts adding the values of tile n."""
    acc = _shrunk(acc, shrink)
    weights = gl.convert_layout(weights.to(v_ring.dtype), gl.DotOperandLayout(0, acc.type.layout, 2))
    wait(v_full, n)
    return hopper.warpgroup_mma(weights, tile_at(v_ring, n), acc, is_async=True)


@gluon.jit
def _take_turn(half):
    gl.inline_asm_elementwise(
        "{ bar.sync $1, 256; mov.b32 $0, 0; }", "=r,r", [_TURNS + half], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _give_turn(half):
    """To the other computing group."""
    gl.inline_asm_elementwise(
        "{ bar.arrive $1, 256; mov.b32 $0, 0; }", "=r,r", [_TURNS + 1 - half], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def _steps(
    half, acc, weights, shrink, row_max, row_sum, query, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
    start, end, place, q_slots, q_table, k_table, indices, rule, bits, limits, masked, scale_log2,
    PARTIAL: gl.constexpr, RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr,
):  # fmt: skip
    """Tiles start to end of a row, one behind in the values; `place` + n is where tile n stands in `indices`."""
    parts: gl.constexpr = 128 // k_ring.type.shape[-2]
    for n in range(start, end):
        # One group issues both products, then the other: each does its softmax while the other's are computed.
        _take_turn(half)
        scores = _scores(query, k_ring, k_full, n)
        # What the softmax before left to do is done while the tensor cores work on the scores.
        sums = _add_values(acc, weights, shrink, v_ring, v_full, n - 1)
        _give_turn(half)
        scores = hopper.warpgroup_mma_wait(1, deps=[scores])
        give_back(k_empty, n)
        if PARTIAL:
            scores = _hide_partial(scores, place + n, q_slots, q_table, k_table, indices, rule, bits, RULE)
        if HAS_KEY_MASK:
            block = gl.load(indices + (place + n) // parts)
            scores = hide_masked(scores, block, n, limits, masked)
        weights, row_max, row_sum, shrink = _softmax(scores, row_max, row_sum, scale_log2, PARTIAL or HAS_KEY_MASK)
        row_sum = _before_waiting(row_sum)
        acc = hopper.warpgroup_mma_wait(0, deps=[sums])
        give_back(v_empty, n - 1)
    return acc, weights, shrink, row_max, row_sum


@gluon.jit
def _attend(
    half, q, q_ring, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out, lse, q_order, q_table, k_table,
    full_indices, full_start, full_tiles, partial_indices, partial_start, tiles, rule, bits, limits, masked,
    first_slot, q_stride, out_stride, scale_log2,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr, WRITE_LSE: gl.constexpr,
):  # fmt: skip
    """A computing group: 64 queries of the program's block."""
    keys: gl.constexpr = k_ring.type.shape[-2]
    width: gl.constexpr = k_ring.type.shape[-1]
    parts: gl.constexpr = 128 // keys
    rows: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, keys, 16]))
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, width, 16])
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // width, width // 8], [4, 1], [1, 0])

    tokens = gl.load(q_order + first_slot + gl.arange(0, _HALF, layout=gl.SliceLayout(1, memory))).to(gl.int64)[:, None]
    dims = gl.arange(0, width, layout=gl.SliceLayout(0, memory))[None, :]
    inside = (tokens >= 0) & (dims < HEAD_DIM)
    query = q_ring.index(half)
    query.store(gl.load(q + tokens * q_stride + dims, mask=inside, other=0.0))
    hopper.fence_async_shared()

    q_slots = first_slot + gl.arange(0, _HALF, layout=rows)
    row_max = gl.full([_HALF], float("-inf"), gl.float32, rows)
    row_sum = gl.zeros([_HALF], gl.float32, rows)
    acc = gl.zeros([_HALF, width], gl.float32, out_layout)
    if tiles > 0:
        if half == 1:
            _give_turn(half)
        full_place, place = full_start * parts, partial_start * parts - full_tiles
        scores = hopper.warpgroup_mma_wait(0, deps=[_scores(query, k_ring, k_full, 0)])
        give_back(k_empty, 0)
        if full_tiles == 0:
            scores = _hide_partial(scores, place, q_slots, q_table, k_table, partial_indices, rule, bits, RULE)
        if HAS_KEY_MASK:
            block = gl.load(full_indices + full_start) if full_tiles > 0 else gl.load(partial_indices + partial_start)
            scores = hide_masked(scores, block, 0, limits, masked)
        weights, row_max, sums, shrink = _softmax(scores, row_max, None, scale_log2, True)
        acc, weights, shrink, row_max, sums = _steps(
            half, acc, weights, shrink, row_max, sums, query, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            1, full_tiles, full_place, q_slots, q_table, k_table, full_indices, rule, bits, limits, masked, scale_log2,
            False, RULE, HAS_KEY_MASK,
        )  # fmt: skip
        acc, weights, shrink, row_max, sums = _steps(
            half, acc, weights, shrink, row_max, sums, query, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
            gl.maximum(full_tiles, 1), tiles, place, q_slots, q_table, k_table, partial_indices, rule, bits, limits,
            masked, scale_log2, True, RULE, HAS_KEY_MASK,
        )  # fmt: skip
        if half == 0:
            # The last turn given: a named barrier is left as it was found.
            _take_turn(half)
        acc = hopper.warpgroup_mma_wait(0, deps=[_add_values(acc, weights, shrink, v_ring, v_full, tiles - 1)])
        row_sum = gl.convert_layout(gl.sum(sums, 1), rows)

    # Queries without keys: output 0, log-sum-exp -inf (their maximum still is).
    row_sum = gl.where(row_sum == 0.0, 1.0, row_sum)
    acc = acc / gl.convert_layout(row_sum, gl.SliceLayout(1, out_layout))[:, None]
    # Through the memory of the queries, which nobody reads any more, into rows of 16 bytes a thread.
    query.store(acc.to(out.dtype.element_ty))
    gl.store(out + tokens * out_stride + dims, query.load(memory), mask=inside)
    if WRITE_LSE:
        tokens = gl.load(q_order + q_slots)
        gl.store(lse + tokens, (row_max + gl.log2(row_sum)) * _LN2, mask=tokens >= 0)


@gluon.jit
def launched(launch_order, batches, heads, blocks, heavy, list_step):
    """Batch, head and block of this program: heavy blocks of all heads first, then head by head, as caches like it."""
    program, layers = gl.program_id(0), batches * heads
    later = program - heavy * layers
    if later < 0:
        layer, rank = program % layers, program // layers
    else:
        layer, rank = later // (blocks - heavy), heavy + later % (blocks - heavy)
    head = layer % heads
    return layer // heads, head, gl.load(launch_order + head * list_step * blocks + rank)


@gluon.jit(do_not_specialize=(*COUNTS, "batches", "heavy_rows", "mask_heads"))
def _forward_kernel(
    q, k_desc, v_desc, out, lse, q_order, q_table, k_table, launch_order,
    full_offsets, full_indices, partial_offsets, partial_indices, rule, bits, limits, masked,
    q_stride_b, q_stride_n, q_stride_h, out_stride_b, out_stride_n, out_stride_h,
    batches, heads, q_tokens, q_blocks, heavy_rows, q_order_step, q_table_step, k_table_step, k_slots, list_step,
    mask_heads, scale_log2,
    HEAD_DIM: gl.constexpr, RULE: gl.constexpr, HAS_KEY_MASK: gl.constexpr, WRITE_LSE: gl.constexpr,
):  # fmt: skip
    keys: gl.constexpr = k_desc.block_type.shape[2]
    width: gl.constexpr = k_desc.block_type.shape[3]
    parts: gl.constexpr = 128 // keys
    batch, head, row = launched(launch_order, batches, heads, q_blocks, heavy_rows, list_step)
    offset = head * list_step * (q_blocks + 1) + row
    full_start, partial_start = gl.load(full_offsets + offset), gl.load(partial_offsets + offset)
    full_tiles = (gl.load(full_offsets + offset + 1) - full_start) * parts
    tiles = full_tiles + (gl.load(partial_offsets + offset + 1) - partial_start) * parts

    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([_HALF, width], q.dtype.element_ty)
    q_ring = gl.allocate_shared_memory(q.dtype.element_ty, [2, _HALF, width], q_layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [_STAGES, 1, 1, keys, width], k_desc.layout)
    v_ring = gl.allocate_shared_memory(v_desc.dtype, [_STAGES, 1, 1, keys, width], v_desc.layout)
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

    head64, batch64 = head.to(gl.int64), batch.to(gl.int64)
    q += batch64 * q_stride_b + head64 * q_stride_h
    out += batch64 * out_stride_b + head64 * out_stride_h
    lse += (batch64 * heads + head64) * q_tokens
    q_order += head64 * q_order_step
    q_table += head64 * q_table_step
    k_table += head64 * k_table_step
    if HAS_KEY_MASK:
        layer_of_mask = batch64 * mask_heads + head64 % mask_heads
        limits += layer_of_mask * k_slots
        masked += layer_of_mask * (k_slots // 128)
    # Written out in the call: a tuple in a variable would lose its compile-time constants.
    gl.warp_specialize(
        [
            (
                _attend,
                (
                    0, q, q_ring, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out, lse, q_order, q_table, k_table,
                    full_indices, full_start, full_tiles, partial_indices, partial_start, tiles, rule, bits, limits,
                    masked, row * 128, q_stride_n, out_stride_n, scale_log2, HEAD_DIM, RULE, HAS_KEY_MASK, WRITE_LSE,
                ),
            ),
            (
                _attend,
                (
                    1, q, q_ring, k_ring, v_ring, k_full, k_empty, v_full, v_empty, out, lse, q_order, q_table, k_table,
                    full_indices, full_start, full_tiles, partial_indices, partial_start, tiles, rule, bits, limits,
                    masked, row * 128 + _HALF, q_stride_n, out_stride_n, scale_log2, HEAD_DIM, RULE, HAS_KEY_MASK,
                    WRITE_LSE,
                ),
            ),
            (
                _copy_tiles,
                (
                    k_desc, v_desc, k_ring, v_ring, k_full, k_empty, v_full, v_empty,
                    full_indices, full_start, full_tiles, partial_indices, partial_start, tiles, batch, head,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


def tile_of(head_dim: int) -> list[int]:
    """Samples, heads, keys and dims of one copy: of more keys two stages would not fit shared memory."""
    width = max(64, power_of_two(head_dim))
    return [1, 1, BLOCK if width <= 128 else BLOCK // 2, width]


@functools.cache
def layout_of(*tile: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """How a tile lies in shared memory; finding that out takes as long as a launch."""
    return gl.NVMMASharedLayout.get_default_for(list(tile), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def _tiles_of(x: torch.Tensor) -> TensorDescriptor:
    """How the copy engine reads keys or values: 0 for what is beyond the end of a sample or of a head."""
    tile = tile_of(x.shape[-1])
    layout = layout_of(*tile, dtype=x.dtype)
    x = x.transpose(1, 2)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile, layout)


def _readable(x: torch.Tensor) -> bool:
    """Whether the copy engine can read the tensor where it stands: it counts in pieces of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:3])


def fits(q: torch.Tensor, plan: BlockPlan, scale: float) -> bool:
    """Whether this kernel computes the call; all others are for block_sparse.py."""
    return (
        scale > 0
        and (plan.query.block, plan.key.block) == (BLOCK, BLOCK)
        and q.shape[-1] in range(40, 257, 8)
        and q.dtype in (torch.float16, torch.bfloat16)
        and all(stride % 8 == 0 for stride in q.stride()[:3])
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_mask: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the kernel; arguments and results as in block_sparse.py."""
    batch, tokens, heads, head_dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, tokens) if return_lse else (1,), dtype=torch.float32, device=q.device)
    rule, slots = plan.kernel_rule, plan.key.slots
    if not (plan.key.in_token_order and _readable(k) and _readable(v)):
        k, v = gather((k, plan.key.order), (v, plan.key.order))
    limits, masked = (out, out) if key_mask is None else key_limits(key_mask, plan.key.order, BLOCK)
    _forward_kernel[(plan.query_blocks * batch * heads,)](
        q, _tiles_of(k), _tiles_of(v), out, lse, plan.query.order, rule.query, rule.key, plan.launch_order,
        plan.full.offsets, plan.full.indices, plan.partial.offsets, plan.partial.indices,
        rule.parameters, plan.bits, limits, masked, *q.stride()[:3], *out.stride()[:3],
        batch, heads, tokens, plan.query_blocks, plan.heavy_rows,
        head_step(plan.query.order), head_step(rule.query), head_step(rule.key), slots, int(plan.lists > 1),
        plan.key.order.shape[0], scale / math.log(2),
        HEAD_DIM=head_dim, RULE=rule.kind, HAS_KEY_MASK=key_mask is not None, WRITE_LSE=return_lse, num_warps=4,
    )  # fmt: skip
    return out, lse
