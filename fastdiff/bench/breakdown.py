"""Where the device time of a forward goes, by torch.profiler."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

PARTS = ("attention", "linears", "element-wise", "reorder")

# What launches a kernel says what it is for, kernels' own names change with GPU and release.
_LINEARS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_convolution", "aten::convolution")
_ATTENTION = ("scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention")
_MOVES = ("index_select", "gather", "index_copy")
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


def breakdown(run: Callable[[], object]) -> dict[str, float]:
    """Runs something once and adds up its kernels.

    Returns:
        Milliseconds of each of `PARTS`. Linears are matrix products and convolutions; the reorder is what fastdiff's
        operators copy before and after their attention; element-wise is all else.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return add_up(json.loads(trace.read_text(encoding="utf-8"))["traceEvents"])


def add_up(events: list[dict[str, Any]]) -> dict[str, float]:
    """The same from the events of a trace in Chrome's format.

    The profiler's own lists, which say what each operator launched, had kernels of long runs twice.
    """
    # Operators have numbers of their own, which those of other events may equal.
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    callers = {operator["args"]["External id"]: names for operator, names in _with_callers(operators)}
    found = dict.fromkeys(PARTS, 0.0)
    for event in events:
        if event.get("cat") in _ON_DEVICE:
            part = _part(callers.get(event["args"].get("External id"), ()), event["name"])
            found[part] += event["dur"] / 1e3
    return found


def _with_callers(operators: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], tuple[str, ...]]]:
    """Each operator with the names around a launch in it: its own and those of the operators that it runs in."""
    around: dict[Any, list[dict[str, Any]]] = {}
    for operator in sorted(operators, key=lambda event: (event["ts"], -event["dur"])):
        outer = around.setdefault((operator["pid"], operator["tid"]), [])
        while outer and outer[-1]["ts"] + outer[-1]["dur"] <= operator["ts"]:
            outer.pop()
        outer.append(operator)
        yield operator, tuple(event["name"] for event in outer)


def _part(callers: tuple[str, ...], kernel: str) -> str:
    if any(name.startswith("fastdiff::") for name in callers):
        moves = any(word in text for word in _MOVES for text in (*callers, kernel.lower()))
        return "reorder" if moves else "attention"
    # What inductor fuses before an attention call bears that name too, and is no operator.
    if any(word in name for name in callers if "::" in name for word in _ATTENTION):
        return "attention"
    return "linears" if any(name in _LINEARS for name in callers) else "element-wise"
