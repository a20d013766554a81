"""Times of work on a device, and what every record carries besides its figures."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastdiff.measure.report import version
from fastdiff_kernels.export import fa4_version

# A call that takes long is repeated until this many seconds have passed, but three times at least.
_PATIENCE, _LEAST = 5.0, 3
# A GPU at its power limit is slower for what comes after: each call is timed on one that has rested so many seconds,
# and then worked for some milliseconds, since after a rest launches are slow for a while too.
_REST, _WAKE = 1.0, 20.0


def milliseconds(run: Callable[[], object], device: str, repeats: int) -> list[float]:
    """Times a call, after one that is not counted.

    Args:
        run: What to time.
        device: Where its work runs, `"cuda"` or `"cpu"`.
        repeats: Timed calls; slow calls get fewer, from 3.

    Returns:
        Milliseconds of each call. On a GPU, which rests before, calls follow each other without a gap, so that the time
        of a short one is that of the device and not of its launch.
    """
    times = _gpu_times if device == "cuda" else _cpu_times
    (first,) = times(run, 1)
    if device == "cuda":
        time.sleep(_REST)
        for _ in range(int(_WAKE / first)):
            run()
    return times(run, min(repeats, max(_LEAST, int(1e3 * _PATIENCE / first))))


def _cpu_times(run: Callable[[], object], count: int) -> list[float]:
    found = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def _gpu_times(run: Callable[[], object], count: int) -> list[float]:
    # The device is busy with this one while the first timed one is being launched.
    run()
    events = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def conditions(device: str, commit: str | None) -> dict[str, Any]:
    """The machine and the software behind a figure.

    Args:
        device: `"cuda"` or `"cpu"`.
        commit: Of fastdiff, None to ask git.
    """
    name = torch.cuda.get_device_name() if device == "cuda" else f"none, {platform.machine()} CPU"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": version("triton")}
    if device == "cpu":
        versions["threads"] = str(torch.get_num_threads())
    elif (found := fa4_version()) is not None:
        versions["flash-attn-4"] = found
    return {"gpu": name, "versions": versions, "commit": commit or _commit()}


def _commit() -> str:
    """The commit of the checkout that this file belongs to, "unknown" elsewhere."""
    here = Path(__file__)

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(here.parent), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installation may lie inside somebody else's checkout.
    if git("ls-files", "--error-unmatch", here.name) is None:
        return "unknown"
    return git("rev-parse", "--short", "HEAD") or "unknown"


def moved_bytes(record: dict[str, Any]) -> int:
    """Bytes that a reorder reads and writes, by its record: q, k, v and the output, each once."""
    size = getattr(torch, record["dtype"]).itemsize
    return 2 * 4 * record["tokens"] * record["heads"] * record["head_dim"] * size
