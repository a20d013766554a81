"""Tokens brought into the order of a plan: one Triton launch for up to four tensors, and one for a key mask.

    out[b, s, h] = x[b, order[h, s], h],    zeros where order is -1

Every byte is read once and written once. Where heads share their order a token's heads are copied as one piece.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .tuning import power_of_two

MOST = 4
# What one program copies of a tensor: elements of a token, and bytes of all its tokens.
_COLUMNS, _BYTES = 512, 8192
_COUNTS = tuple(f"{name}{n}" for name in ("slots", "stride_b", "stride_n", "stride_piece", "step") for n in range(MOST))


@triton.jit
def _copy(
    x, out, order, slots, stride_b, stride_n, stride_piece, out_stride_n, order_step, tile, piece, batch,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Copies one piece of ROWS slots. Strides count UNITs of elements, so that the compiler sees what they divide."""
    rows = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    tokens = tl.load(order + piece * order_step + rows, mask=rows < slots, other=-1)
    inside = columns[None, :] < PIECE
    if WIDTH % PIECE != 0:
        inside &= piece * PIECE + columns[None, :] < WIDTH
    place = x + (batch * stride_b + piece * stride_piece) * UNIT
    place += tokens.to(tl.int64)[:, None] * stride_n * UNIT + columns[None, :]
    moved = tl.load(place, mask=inside & (tokens >= 0)[:, None], other=0.0)
    place = out + (batch * slots + rows).to(tl.int64)[:, None] * out_stride_n * UNIT + piece * PIECE + columns[None, :]
    tl.store(place, moved, mask=inside & (rows < slots)[:, None])


# All that differs from call to call, so that it is compiled once for a width; UNIT says what is aligned.
@triton.jit(do_not_specialize=(*_COUNTS, "out_stride_n", "pieces"))
def _gather_kernel(
    x0, x1, x2, x3, out0, out1, out2, out3, order0, order1, order2, order3, slots0, slots1, slots2, slots3,
    stride_b0, stride_b1, stride_b2, stride_b3, stride_n0, stride_n1, stride_n2, stride_n3,
    stride_piece0, stride_piece1, stride_piece2, stride_piece3, step0, step1, step2, step3, out_stride_n, pieces,
    WIDTH: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNIT: tl.constexpr,
    TENSORS: tl.constexpr,
):  # fmt: skip
    # A token's pieces stand side by side in memory, so neighbouring programs copy them.
    tile, piece = (tl.program_id(0) // pieces).to(tl.int64), (tl.program_id(0) % pieces).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    _copy(
        x0, out0, order0, slots0, stride_b0, stride_n0, stride_piece0, out_stride_n, step0, tile, piece, batch,
        WIDTH, PIECE, ROWS, COLUMNS, UNIT,
    )  # fmt: skip
    if TENSORS > 1:
        _copy(
            x1, out1, order1, slots1, stride_b1, stride_n1, stride_piece1, out_stride_n, step1, tile, piece, batch,
            WIDTH, PIECE, ROWS, COLUMNS, UNIT,
        )  # fmt: skip
    if TENSORS > 2:
        _copy(
            x2, out2, order2, slots2, stride_b2, stride_n2, stride_piece2, out_stride_n, step2, tile, piece, batch,
            WIDTH, PIECE, ROWS, COLUMNS, UNIT,
        )  # fmt: skip
    if TENSORS > 3:
        _copy(
            x3, out3, order3, slots3, stride_b3, stride_n3, stride_piece3, out_stride_n, step3, tile, piece, batch,
            WIDTH, PIECE, ROWS, COLUMNS, UNIT,
        )  # fmt: skip


def gather(*pairs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Tensors in the order of their slots, in one launch.

    Args:
        *pairs: One to four of (tensor, order): `[batch, tokens, heads, head_dim]` with a contiguous head_dim, all
            of one dtype, device, batch, heads and head_dim; and its order, int32 `[1 or heads, slots]`.

    Returns:
        A contiguous `[batch, slots, heads, head_dim]` for each, zeros in the slots of padding.
    """
    tensors, orders = zip(*pairs, strict=True)
    batch, _, heads, head_dim = tensors[0].shape
    size = tensors[0].element_size()
    out = tuple(x.new_empty(batch, order.shape[-1], heads, head_dim) for x, order in pairs)
    whole = all(order.shape[0] == 1 for order in orders) and all(x.stride(2) == head_dim for x in tensors)
    piece = min(_COLUMNS, heads * head_dim) if whole else head_dim
    columns = power_of_two(piece)
    rows = max(1, _BYTES // (columns * size))
    pieces = -(-heads * head_dim // piece)
    steps = [piece if whole else x.stride(2) for x in tensors]
    # Sixteen bytes at a time, where all that is added to an address allows it.
    unit = 16 // size
    numbers = (*(stride for x in tensors for stride in x.stride()[:2]), *steps, heads * head_dim)
    if any(number % unit for number in numbers):
        unit = 1
    slots = [order.shape[-1] for order in orders]

    def four(values):
        return (*values, *values[:1] * (MOST - len(values)))

    _gather_kernel[(-(-max(slots) // rows) * pieces, batch)](
        *four(tensors), *four(out), *four(orders), *four(slots),
        *four([x.stride(0) // unit for x in tensors]), *four([x.stride(1) // unit for x in tensors]),
        *four([step // unit for step in steps]),
        *four([order.stride(0) if order.shape[0] > 1 else 0 for order in orders]),
        heads * head_dim // unit, pieces,
        WIDTH=heads * head_dim, PIECE=piece, ROWS=rows, COLUMNS=columns, UNIT=unit, TENSORS=len(pairs), num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=("stride_b", "stride_n", "heads", "blocks"))
def _limits_kernel(key_mask, order, limits, masked, stride_b, stride_n, heads, blocks, BLOCK: tl.constexpr):
    block, layer = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    slots = block * BLOCK + tl.arange(0, BLOCK)
    tokens = tl.load(order + layer % heads * blocks * BLOCK + slots).to(tl.int64)
    exists = tl.load(key_mask + layer // heads * stride_b + tokens * stride_n, mask=tokens >= 0, other=True)
    tl.store(limits + layer * blocks * BLOCK + slots, tl.where(exists, float("inf"), float("-inf")))
    tl.store(masked + layer * blocks + block, tl.min(exists.to(tl.int32), 0) == 0)


def key_limits(key_mask: torch.Tensor, order: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a key mask allows, in the order of slots; padding is for a plan's rules to hide.

    Args:
        key_mask: Which keys exist, bool `[batch, tokens]`, any strides.
        order: int32 `[1 or heads, slots]`.
        block: Slots in a block.

    Returns:
        The highest score of each key, inf, or -inf where the mask hides it, float32 `[batch, 1 or heads, slots]`; and
        whether a block has a hidden key, bool `[batch, 1 or heads, slots / block]`.
    """
    batch, (heads, slots) = key_mask.shape[0], order.shape
    limits = torch.empty(batch, heads, slots, dtype=torch.float32, device=order.device)
    masked = torch.empty(batch, heads, slots // block, dtype=torch.bool, device=order.device)
    _limits_kernel[(masked.numel(),)](
        key_mask, order, limits, masked, *key_mask.stride(), heads, slots // block, BLOCK=block, num_warps=1
    )
    return limits, masked
