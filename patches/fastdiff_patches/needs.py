"""Needs: hooks and readings that give a method what it wants besides query, key and value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code

from .seam import keep

if TYPE_CHECKING:
    from .processor import Layer

_SEED_VALUES = 4096


class KeepOutput:
    """Forward hook of a query norm: keeps its output for the attention call that it runs in."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        # Some processors write RoPE into it.
        keep(self.name, output.clone())


class KeepInput:
    """Forward pre-hook of a transformer block: keeps its input for the attention module in it."""

    def __init__(self, layer: Layer):
        self.layer = layer

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        # A layer that is dense would never take it.
        if self.layer.active:
            self.layer.block_input = args[0] if args else kwargs["hidden_states"]


# Where blocks are compiled one by one, their hooks run before their graph. Compiled as a function of its own, the
# hook would cost a graph for each block; where a whole model is compiled it is traced all the same.
skip_code(KeepInput.__call__.__code__)


def install(model: nn.Module, attention: nn.Module, layer: Layer) -> list[torch.utils.hooks.RemovableHandle]:
    """Sets the hooks that one layer needs."""
    handles = []
    if "pre_rope_query" in layer.needs:
        norms = ((name, getattr(attention, name, None)) for name in layer.family.query_norms)
        handles += [norm.register_forward_hook(KeepOutput(name)) for name, norm in norms if norm is not None]
    if "block_input" in layer.needs:
        block = next(parent for parent in model.modules() if attention in parent.children())
        handles.append(block.register_forward_pre_hook(KeepInput(layer), with_kwargs=True))
    return handles


def seed_of(latents: torch.Tensor) -> torch.Tensor:
    """A number that follows from latents, 0-d int64 on the CPU, not negative. It waits for the device."""
    values = latents.detach()[:1].flatten()[:_SEED_VALUES].float().view(torch.int32).long()
    weights = 2 * torch.arange(len(values), device=values.device) + 1
    return ((values * weights).sum() & 2**62 - 1).cpu()
