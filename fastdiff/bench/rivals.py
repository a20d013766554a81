"""The dense kernels that a benchmark compares with, and FlexAttention on the blocks of a plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastdiff_kernels import BlockPlan, RuleKind

# q, k and v `[1, tokens, heads, head_dim]` to the output, of the same shape.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

SDPA_BACKENDS = {
    "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION,
    "flash SDPA": SDPBackend.FLASH_ATTENTION,
    "efficient SDPA": SDPBackend.EFFICIENT_ATTENTION,
}
# Names of dense kernels of others.
DENSE = (*SDPA_BACKENDS, "FlexAttention, dense", "torch SDPA")

# What a torch without the kernel says of a call, or a kernel of a call that it does not take.
_MISSING = ("No available kernel", "No valid execution plans", "not supported", "NYI", "not compiled", "out of memory")


def dense_kernels(device: str) -> dict[str, Attend]:
    """Dense attention by name: on a GPU each kernel of torch, on a CPU the one there is."""
    if device == "cpu":
        return {"torch SDPA": _sdpa}
    kernels = {name: _only(backend) for name, backend in SDPA_BACKENDS.items()}
    return kernels | {"FlexAttention, dense": heads_last(torch.compile(flex_attention, dynamic=False))}


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


@dataclass(frozen=True, eq=False)
class FlexBlocks:
    """The blocks of a plan in FlexAttention, on tensors that stand in the plan's order already.

    Attributes:
        order: The token of each slot, -1 for padding, int64 `[slots]`.
        mask: The same blocks in FlexAttention's form.
    """

    order: torch.Tensor
    mask: BlockMask

    @classmethod
    def of(cls, plan: BlockPlan) -> FlexBlocks | None:
        """None where FlexAttention would need the plan's in-block rule, or lists and orders for each head."""
        alike = torch.equal(plan.query.order, plan.key.order)
        if plan.rule.kind != RuleKind.NONE or plan.heads is not None or not alike:
            return None
        order = plan.key.order[0].long()
        exists = order >= 0

        def key_exists(batch, head, query, key):
            return exists[key]

        lists = [part for blocks in (plan.partial, plan.full) for part in _padded(blocks, plan.key_blocks)]
        sizes = {"BLOCK_SIZE": (plan.query.block, plan.key.block), "seq_lengths": (len(order),) * 2}
        return cls(order, BlockMask.from_kv_blocks(*lists, mask_mod=key_exists, **sizes))

    def attend(self) -> Attend:
        """Compiled attention of tensors in slots, `[1, heads, slots, head_dim]`."""
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(q, k, v, block_mask=self.mask)

    def slots(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens to slots, zero where there is padding: queries there must leave no trace in gradients."""
        found = x.index_select(1, self.order.clamp(min=0)).masked_fill((self.order < 0)[:, None, None], 0)
        return found.transpose(1, 2).contiguous()

    def tokens(self, slots: torch.Tensor) -> torch.Tensor:
        """Slots to tokens, `[1, tokens, heads, head_dim]`."""
        exists = self.order >= 0
        batch, heads, _, head_dim = slots.shape
        result = slots.new_empty(batch, int(exists.sum()), heads, head_dim)
        result[:, self.order[exists]] = slots.transpose(1, 2)[:, exists]
        return result


def _padded(blocks, key_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block list as FlexAttention takes it: counts `[1, 1, rows]`, indices `[1, 1, rows, key blocks]`."""
    mask = blocks.mask(key_blocks)[0]
    indices = mask.int().argsort(dim=1, descending=True, stable=True)
    return mask.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]
