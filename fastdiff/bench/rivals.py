"""What a benchmark compares with: dense kernels of others, and blocks of a plan on tensors in the plan's order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from fastdiff_kernels import BlockPlan, Side, attention
from fastdiff_kernels.export import fa4_call, fa4_version, flex_block_mask, flex_tiles, from_slots, to_slots

# q, k and v `[1, tokens, heads, head_dim]` to the output, of the same shape.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SDPA_BACKENDS = {
    "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION,
    "flash SDPA": SDPBackend.FLASH_ATTENTION,
    "efficient SDPA": SDPBackend.EFFICIENT_ATTENTION,
}
# Names of dense kernels of others.
DENSE = (*SDPA_BACKENDS, "FlexAttention, dense", "FlashAttention-4, dense", "torch SDPA")

# What a torch without the kernel says of a call, or a kernel of a call that it does not take.
_MISSING = (
    "No available kernel", "No valid execution plans", "not supported", "NYI", "not compiled", "out of memory",
    "out of resource", "No choices to select",
)  # fmt: skip


def dense_kernels(device: str) -> dict[str, Attend]:
    """Dense attention by name: on a GPU each kernel of torch and FlashAttention-4 if installed, on a CPU the one."""
    if device == "cpu":
        return {"torch SDPA": _sdpa}
    kernels = {name: _only(backend) for name, backend in SDPA_BACKENDS.items()}
    kernels["FlexAttention, dense"] = heads_last(torch.compile(flex_attention, dynamic=False))
    if fa4_version() is not None:
        kernels["FlashAttention-4, dense"] = _fa4
    return kernels


def why_missing(error: Exception) -> str | None:
    """Why a kernel does not run here, in one line; None if the error says nothing of the kind."""
    text = str(error)
    return next((" ".join(text.split())[:160] for word in _MISSING if word in text), None)


def heads_last(attend: Attend) -> Attend:
    """An `Attend` from one that takes `[1, heads, tokens, head_dim]`."""
    return lambda q, k, v: attend(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


_sdpa = heads_last(F.scaled_dot_product_attention)


def _only(backend: SDPBackend) -> Attend:
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attend


def _fa4(q, k, v):
    from flash_attn.cute import flash_attn_func

    return flash_attn_func(q, k, v)[0]


class Blocks:
    """One kernel on the blocks of a plan, of tensors that stand in the plan's order already.

    Args:
        plan: On the device of the tensors.
        attend: The kernel.
    """

    def __init__(self, plan: BlockPlan, attend: Attend):
        self.attend = attend
        self._sides = plan.query, plan.key, plan.key

    def slots(self, *tokens: torch.Tensor) -> list[torch.Tensor]:
        """What belongs to q, to k and to v in the plan's order, `[1, slots, heads, head_dim]`."""
        return [to_slots(x, side) for x, side in zip(tokens, self._sides, strict=False)]

    def tokens(self, *slots: torch.Tensor) -> list[torch.Tensor]:
        """The same back, `[1, tokens, heads, head_dim]`."""
        return [from_slots(x, side) for x, side in zip(slots, self._sides, strict=False)]


class OwnBlocks(Blocks):
    """fastdiff's kernel as those of others are timed, so that no token moves."""

    def __init__(self, plan: BlockPlan):
        settled = replace(plan, query=_as_they_stand(plan.query), key=_as_they_stand(plan.key))
        super().__init__(plan, lambda q, k, v: attention(q, k, v, settled))


def _as_they_stand(side: Side) -> Side:
    slots = torch.arange(side.slots, dtype=torch.int32, device=side.order.device)
    return replace(side, tokens=side.slots, order=slots[None])


class FlexBlocks(Blocks):
    """FlexAttention, compiled; its tensors are `[1, heads, slots, head_dim]`, zero for padding."""

    def __init__(self, plan: BlockPlan):
        mask = flex_block_mask(plan)
        compiled = torch.compile(flex_attention, dynamic=False)
        super().__init__(plan, lambda q, k, v: compiled(q, k, v, block_mask=mask, kernel_options=flex_tiles(plan, q)))

    def slots(self, *tokens: torch.Tensor) -> list[torch.Tensor]:
        # Queries of padding must leave no trace in gradients.
        padding = ((side.order < 0).t()[None, :, :, None] for side in self._sides)
        found = zip(super().slots(*tokens), padding, strict=False)
        return [x.masked_fill(nothing, 0).transpose(1, 2).contiguous() for x, nothing in found]

    def tokens(self, *slots: torch.Tensor) -> list[torch.Tensor]:
        return super().tokens(*(x.transpose(1, 2) for x in slots))


class FA4Blocks(Blocks):
    """FlashAttention-4; its tensors have no padding.

    Raises:
        UnsupportedError: If it cannot take the plan, see `fa4_lists`.
    """

    def __init__(self, plan: BlockPlan):
        call = fa4_call(plan)
        super().__init__(plan, lambda q, k, v: call(q, k, v)[0])

    def slots(self, *tokens: torch.Tensor) -> list[torch.Tensor]:
        return [x[:, : side.tokens] for x, side in zip(super().slots(*tokens), self._sides, strict=False)]
