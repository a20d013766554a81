"""Where the device time of a forward goes, by torch.profiler."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

PARTS = ("attention", "linears", "element-wise", "reorder")

# What launches a kernel says what it is for, kernels' own names change with GPU and release.
_LINEARS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_convolution", "aten::convolution")
_ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention")
# A call of the CUDA runtime or driver, which launches kernels for the operator around it. In long runs the profiler also
# gives it those of an operator that by chance has its number.
_DRIVER = re.compile("(cuda|cu|hip)[A-Z]")
_MOVES = ("index_select", "gather", "index_copy")


def breakdown(run: Callable[[], object]) -> dict[str, float]:
    """Runs something once and adds up its kernels.

    Returns:
        Milliseconds of each of `PARTS`. Linears are matrix products and convolutions; the reorder is what fastdiff's
        operators copy before and after their attention; element-wise is all else.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiler:
        run()
        torch.cuda.synchronize()
    return add_up(profiler.events())


def add_up(events: list[Any]) -> dict[str, float]:
    """The same from the profiler's events."""
    device = torch.autograd.DeviceType.CUDA
    found = dict.fromkeys(PARTS, 0.0)
    total = 0.0
    for event in events:
        if event.device_type == device and not event.is_user_annotation:
            total += event.time_range.elapsed_us()
        if _DRIVER.match(event.name):
            continue
        for kernel in event.kernels:
            part = _part(_callers(event), kernel.name)
            if part is not None:
                found[part] += kernel.duration
    found["element-wise"] = total - sum(found.values())
    return {part: us / 1e3 for part, us in found.items()}


def _callers(event: Any) -> list[str]:
    """The operators around a launch, the innermost first."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _part(callers: list[str], kernel: str) -> str | None:
    if any(name.startswith("fastdiff::") for name in callers):
        moves = any(word in text for word in _MOVES for text in (*callers, kernel.lower()))
        return "reorder" if moves else "attention"
    # What inductor fuses before an attention call bears that name too, and is no operator.
    if any(word in name for name in callers if "::" in name for word in _ATTENTION):
        return "attention"
    return "linears" if any(name in _LINEARS for name in callers) else None
