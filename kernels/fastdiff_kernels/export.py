"""Plans as other libraries take them: FlexAttention's BlockMask and FlashAttention-4's block lists, and calls of both.

Both count in slots: their tensors stand in the plan's token order, see `to_slots`. They are the backends `"flex"` and
`"fa4"` of `attention`, which never chooses them by itself.
"""

from __future__ import annotations

import importlib.metadata
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .block_list import BlockList
from .errors import MissingDependencyError, UnsupportedError
from .order import Side
from .plan import FULL, PARTIAL, BlockPlan
from .rule import BOX_HEADER, METRIC_HEADER, RuleKind

# Built once for each plan, as long as it lives.
_masks: weakref.WeakKeyDictionary[BlockPlan, BlockMask] = weakref.WeakKeyDictionary()
_lists: weakref.WeakKeyDictionary[BlockPlan, FA4Lists] = weakref.WeakKeyDictionary()


class FA4Lists(NamedTuple):
    """Block lists by the names of FlashAttention-4's `BlockSparseTensorsTorch`; all tensors are int32.

    Attributes:
        mask_block_cnt: How many key blocks of each query block are tested, `[1, lists, query blocks]`.
        mask_block_idx: Which, ascending, `[1, lists, query blocks, longest row]`; what is beyond the count is unused.
        full_block_cnt, full_block_idx: The same of key blocks computed whole.
        block_size: Queries and keys of a block.
    """

    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def to_slots(x: torch.Tensor, side: Side) -> torch.Tensor:
    """Tokens `[batch, tokens, heads, ...]` in the order of one side of a plan, `[batch, slots, heads, ...]`.

    Padding repeats token 0. It is differentiable.
    """
    return _pick(x, side.order.clamp(min=0).long())


def from_slots(x: torch.Tensor, side: Side) -> torch.Tensor:
    """Slots back to tokens, `[batch, slots, heads, ...]` to `[batch, tokens, heads, ...]`; differentiable."""
    order = torch.where(side.order < 0, side.tokens, side.order).long()
    return _pick(x, order.argsort(dim=1)[:, : side.tokens])


def flex_block_mask(plan: BlockPlan, key_mask: torch.Tensor | None = None) -> BlockMask:
    """A plan for `flex_attention`, over tensors in the plan's order.

    Its `mask_mod` is the plan's whole truth, so that it also holds where FlexAttention ignores block lists, as its
    uncompiled form does.

    Args:
        plan: On the device of the tensors.
        key_mask: Which keys exist, bool `[batch, key tokens]`; every block is then tested.

    Returns:
        A mask for `[batch, heads, slots, head_dim]`, with the plan's block sizes.
    """
    full, partial = plan.full, plan.partial
    state, sees = _states(plan), _pair_test(plan)
    if key_mask is None:
        mask_mod = sees
    else:
        exists = to_slots(key_mask[..., None].expand(-1, -1, plan.key.order.shape[0]), plan.key).transpose(1, 2)
        exists = exists.contiguous() if exists.shape[1] > 1 else exists[:, 0]
        full, partial = BlockList.from_mask(torch.zeros_like(state, dtype=torch.bool)), BlockList.from_mask(state != 0)

        def mask_mod(b, h, q, k):
            return sees(b, h, q, k) & (exists[b, h, k] if exists.dim() == 3 else exists[b, k])

    counts, indices = _rows(partial, plan.key_blocks)
    return BlockMask.from_kv_blocks(
        counts, indices, *_rows(full, plan.key_blocks), BLOCK_SIZE=(plan.query.block, plan.key.block),
        mask_mod=mask_mod, seq_lengths=(plan.query.slots, plan.key.slots),
    )  # fmt: skip


def flex_tiles(plan: BlockPlan, q: torch.Tensor) -> dict[str, int]:
    """Tiles of FlexAttention's forward kernel for a plan, as its `kernel_options`.

    Its own may not divide the plan's blocks, or leave no shared memory for the tables that the mask is looked up in.
    The kernel that it has for fewer than 128 queries takes no tiles, so that is left out.
    """
    rows, columns = (128, 64) if q.element_size() == 2 and q.shape[-1] <= 128 else (64, 32)
    return {
        "fwd_BLOCK_M": min(rows, plan.query.block),
        "fwd_BLOCK_N": min(columns, plan.key.block),
        "FORCE_USE_FLEX_ATTENTION": True,
    }


def fa4_lists(plan: BlockPlan) -> FA4Lists:
    """A plan for FlashAttention-4, over tensors in the plan's order that end with their last token.

    FlashAttention-4 takes an in-block rule as code of its own language only, so this is for plans whose blocks are all
    whole but for the end of the sequence.

    Raises:
        UnsupportedError: If a block has pairs that are not computed, or padding stands anywhere but at the end.
    """
    for name, side in (("query", plan.query), ("key", plan.key)):
        tokens = side.order[:, : side.tokens]
        if bool((tokens < 0).any()):
            raise UnsupportedError(
                f"the {name} side of this plan has padding between its {side.tokens} tokens, which FlashAttention-4 "
                "could hide only by a rule of its own; use an order without padding, or another backend."
            )
    on_cpu = plan.to("cpu")
    for head in range(on_cpu.heads or 1):
        exists, asks = (
            (side.order[head % side.order.shape[0]] >= 0).unflatten(0, (-1, side.block))
            for side in (on_cpu.key, on_cpu.query)
        )
        which = head % on_cpu.lists
        for row in on_cpu.partial.counts[which].nonzero().flatten().tolist():
            hidden = ~on_cpu.partial_mask(head, row) & exists[on_cpu.row(on_cpu.partial, which, row)]
            if bool(hidden[asks[row]].any()):
                raise UnsupportedError(
                    f"a {plan.rule.kind.name} rule decides inside the blocks of this plan, and FlashAttention-4 gets "
                    "whole blocks only; use a method or mode of whole blocks, or another backend."
                )
    return FA4Lists(
        *_rows(plan.partial, plan.longest_row), *_rows(plan.full, plan.longest_row),
        block_size=(plan.query.block, plan.key.block),
    )  # fmt: skip


def flex(
    q, k, v, plan: BlockPlan, scale: float, key_mask, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` by FlexAttention, compiled on a GPU; elsewhere it makes all scores. Gradients on GPUs alone.

    Raises:
        UnsupportedError: In code that is being compiled, or if a gradient is wanted where FlexAttention has none.
    """
    _refuse_tracing("flex")
    on_gpu, blocks = q.device.type == "cuda", (plan.query.block, plan.key.block)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        if not on_gpu:
            raise UnsupportedError(
                f"FlexAttention has no gradients on {q.device.type}; use another backend to train there."
            )
        if any(block % 128 for block in blocks):
            raise UnsupportedError(
                f"this plan has blocks of {blocks[0]} x {blocks[1]}, and FlexAttention's backward kernel may take "
                "multiples of 128 only; use backend='triton' to train, or a plan of such blocks."
            )
    if key_mask is not None:
        mask = flex_block_mask(plan, key_mask)
    elif (mask := _masks.get(plan)) is None:
        mask = _masks[plan] = flex_block_mask(plan)
    slots = (to_slots(x, side).transpose(1, 2) for x, side in ((q, plan.query), (k, plan.key), (v, plan.key)))
    call, tiles = (_compiled_flex(), flex_tiles(plan, q)) if on_gpu else (flex_attention, None)
    out, aux = call(*slots, block_mask=mask, scale=scale, kernel_options=tiles, return_aux=AuxRequest(lse=True))
    lse = from_slots(aux.lse.transpose(1, 2), plan.query).transpose(1, 2) if return_lse else None
    return from_slots(out.transpose(1, 2), plan.query), lse


def fa4(q, k, v, plan: BlockPlan, scale: float, key_mask, return_lse: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`attention` by FlashAttention-4, which needs the distribution flash-attn-4 and a Hopper or Blackwell GPU.

    Which block sizes it takes depends on its release, GPU and head dim; it says so itself. Release 4.0.0b36 was run,
    with blocks of 128 on an H100.

    Raises:
        MissingDependencyError: If flash-attn-4 is not installed.
        UnsupportedError: As `fa4_lists`, and for a key mask, a gradient, or code that is being compiled.
    """
    _refuse_tracing("fa4")
    require_fa4()
    if key_mask is not None:
        raise UnsupportedError("backend 'fa4' takes no key_mask; use backend='triton'.")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise UnsupportedError("backend 'fa4' has no backward pass here; use backend='triton' to train.")
    slots = (to_slots(x, side)[:, : side.tokens] for x, side in ((q, plan.query), (k, plan.key), (v, plan.key)))
    out, lse = fa4_call(plan, scale)(*slots)
    out = from_slots(out, plan.query)
    return out, from_slots(lse.transpose(1, 2), plan.query).transpose(1, 2) if return_lse else None


def fa4_call(plan: BlockPlan, scale: float | None = None) -> Callable:
    """FlashAttention-4 on a plan: q, k, v in the plan's order, without padding, to the output and log-sum-exp.

    Raises:
        UnsupportedError: As `fa4_lists`.
    """
    if (lists := _lists.get(plan)) is None:
        lists = _lists[plan] = fa4_lists(plan)
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    tensors = BlockSparseTensorsTorch(**lists._asdict())

    def call(q, k, v):
        return flash_attn_func(q, k, v, softmax_scale=scale, block_sparse_tensors=tensors, return_lse=True)[:2]

    return call


def fa4_version() -> str | None:
    """The installed release of FlashAttention-4, None where there is none."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def require_fa4() -> None:
    """Raises MissingDependencyError where FlashAttention-4 is not installed."""
    if fa4_version() is None:
        raise MissingDependencyError("backend 'fa4' needs FlashAttention-4: pip install flash-attn-4.")


def _refuse_tracing(backend: str) -> None:
    if torch.compiler.is_compiling():
        raise UnsupportedError(f"backend {backend!r} cannot be traced by torch.compile; use backend='triton' there.")


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention, dynamic=False)


def _pick(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Rows `place`, `[1 or heads, n]`, of the second dimension of `[batch, m, heads, ...]`."""
    if place.shape[0] == 1:
        return x.index_select(1, place[0])
    place = place.t().reshape(1, place.shape[1], place.shape[0], *[1] * (x.dim() - 3))
    return x.gather(1, place.expand(x.shape[0], -1, -1, *x.shape[3:]))


def _rows(blocks: BlockList, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts `[1, lists, rows]` and the key blocks of each row, ascending and first, `[1, lists, rows, width]`."""
    counts = blocks.counts
    places = torch.arange(len(blocks.indices), device=counts.device)
    row = torch.repeat_interleave(counts.flatten().long())
    starts = counts.flatten().cumsum(0) - counts.flatten()
    indices = counts.new_zeros(counts.numel(), width)
    indices[row, places - starts[row]] = blocks.indices
    return counts[None].contiguous(), indices.view(1, *counts.shape, width)


def _states(plan: BlockPlan) -> torch.Tensor:
    """EMPTY, PARTIAL or FULL of every pair of blocks, int32 `[lists, query blocks, key blocks]`."""
    full, partial = (blocks.mask(plan.key_blocks).int() for blocks in (plan.full, plan.partial))
    return full * FULL + partial * PARTIAL


# FlexAttention compiles functions of single numbers: tables are looked up number by number, never row by row.


def _lookup(table: torch.Tensor) -> Callable:
    """(head, *place) -> the number of a tensor `[1 or heads, ...]` that stands there."""
    table = table.contiguous()
    if table.shape[0] > 1:
        return lambda h, *place: table[(h, *place)]
    shared = table[0]
    return lambda h, *place: shared[place]


def _pair_test(plan: BlockPlan) -> Callable:
    """(batch, head, query slot, key slot) -> whether the pair is computed."""
    rule, state = _rule_test(plan), _lookup(_states(plan))
    whole, by_rule, span = (_lookup(x) for x in (*plan.query.table[..., 3:].unbind(-1), plan.key.table[..., 3]))
    block_q, block_k = plan.query.block, plan.key.block

    def sees(b, h, q, k):
        here, of = state(h, q // block_q, k // block_k), span(h, k)
        pair = ((whole(h, q) & of) != 0) | (((by_rule(h, q) & of) != 0) & rule(h, q, k))
        return (here == FULL) | ((here == PARTIAL) & pair)

    return sees


def _rule_test(plan: BlockPlan) -> Callable:
    kind, parameters = plan.rule.kind, plan.rule.parameters
    q_axes, k_axes = ([_lookup(side.table[..., axis]) for axis in range(3)] for side in (plan.query, plan.key))
    if kind == RuleKind.METRIC:
        a, b, sink_frames, _ = parameters[:METRIC_HEADER].tolist()
        limits = plan.rule.limits().contiguous()

        def metric(h, q, k):
            dt, dy, dx = (q_axis(h, q) - k_axis(h, k) for q_axis, k_axis in zip(q_axes, k_axes, strict=True))
            return (a * dy * dy + b * dx * dx < limits[dt.abs()]) | (k_axes[0](h, k) < sink_frames)

        return metric
    if kind == RuleKind.BOX:
        ends = []
        for axis in range(BOX_HEADER):
            first, last = plan.rule.axis_tables(axis)
            # Tokens that no rule is for, of a reference image say, may stand beyond the tables.
            place = plan.query.table[..., axis].long().clamp(max=len(first) - 1)
            ends.append((_lookup(first[place]), _lookup(last[place]), k_axes[axis]))

        def box(h, q, k):
            inside = k >= 0
            for first, last, axis in ends:
                inside = inside & (first(h, q) <= axis(h, k)) & (axis(h, k) <= last(h, q))
            return inside

        return box
    if kind == RuleKind.BITS:
        words = plan.bits.new_zeros(plan.lists, plan.query_blocks, plan.key_blocks)
        words[plan.partial.mask(plan.key_blocks)] = plan.bits
        word = _lookup(words)
        q_side, k_side, columns = parameters.tolist()
        block_q, block_k = plan.query.block, plan.key.block

        def bits(h, q, k):
            place = (q % block_q) // q_side * columns + (k % block_k) // k_side
            return ((word(h, q // block_q, k // block_k) >> place) & 1) != 0

        return bits
    return lambda h, q, k: k >= 0
