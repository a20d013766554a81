"""Runs every kernel on small shapes under NVIDIA's compute-sanitizer, and says what it found.

    python scripts/sanitize.py                                # memcheck and racecheck of all kernels
    python scripts/sanitize.py --tools memcheck --cases "portable forward"

Each case runs in a process of its own, first alone, which compiles its kernels, then under each tool. Torch's kernels
in between are looked at too. The exit code is 1 if a tool found something, 2 if compute-sanitizer or a GPU is missing.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

log = logging.getLogger("sanitize")
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_FOUND = re.compile(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard")
MOST_LINES = 12


def attend(
    head_dim: int, block: int, dtype: str, *, train: bool, masked: bool = False, batch: int = 2, sides=(2, 9, 13)
) -> None:
    """Each rule once: windows, discs, ellipsoids, distances with limits of their own, bitmaps by head.

    `sides` are frames, height and width.
    """
    import torch

    from fastdiff_kernels import Grid, attention

    device = torch.device("cuda")
    for plan, heads in small_plans(Grid(*sides), block):
        plan = plan.to(device)
        shape = (batch, plan.query_tokens, heads, head_dim)
        q, k, v = (torch.randn(shape, device=device, dtype=getattr(torch, dtype)) for _ in range(3))
        mask = torch.rand(shape[:2], device=device) < 0.7 if masked else None
        inputs = [x.requires_grad_(train) for x in (q, k, v)]
        out = attention(*inputs, plan, key_mask=mask, backend="triton")
        if train:
            torch.autograd.grad(out, inputs, torch.randn_like(out))
    torch.cuda.synchronize()


def small_plans(grid, block: int) -> list:
    """Plans with text, partial blocks and padding, and how many heads to run each with."""
    import torch

    from fastdiff_kernels import BlockPlan, Grid, Rule, TokenLayout, arrange_sides, snake_order

    picture = Grid(1, grid.frames * grid.height, grid.width)
    ends = [torch.arange(n) for n in (grid.frames, grid.height, grid.width)]
    window = Rule.box(tuple((x - 2).clamp(min=0) for x in ends), tuple((x + 2).clamp(max=len(x) - 1) for x in ends))
    rules = (
        (picture, Rule.metric(torch.tensor([20]))),
        (grid, window),
        (grid, Rule.metric(torch.tensor([30, 9]))),
        (grid, Rule.metric(torch.tensor([30, 9]), sink_frames=1)),
    )
    plans = [
        (BlockPlan.from_rule(TokenLayout.self_attention(g, 5, 9), rule, block_q=block, block_k=block,
                             grid_order=snake_order), 2)
        for g, rule in rules
    ]  # fmt: skip
    query, key = arrange_sides(TokenLayout.self_attention(grid), (block, block))
    generator = torch.Generator().manual_seed(0)
    state = torch.randint(0, 3, (3, query.blocks, key.blocks), generator=generator)
    words = torch.randint(0, 2**16, state.shape, generator=generator, dtype=torch.int32)
    plans.append((BlockPlan.from_states(query, key, state, Rule.bits(block // 4, block // 4, 4), words), 3))
    return plans


# Blocks of 128 in half precision are what the Hopper kernels take.
CASES: dict[str, Callable[[], None]] = {
    "portable forward": lambda: attend(64, 64, "bfloat16", train=False, masked=True),
    "portable forward, float32": lambda: attend(40, 32, "float32", train=False),
    "portable backward": lambda: attend(64, 64, "bfloat16", train=True, masked=True),
    # As small as it can be: products in float32 go through shared memory, where racecheck is slow.
    "portable backward, float32": lambda: attend(40, 32, "float32", train=True, batch=1, sides=(2, 5, 7)),
    "128-blocks forward, head dim 128": lambda: attend(128, 128, "bfloat16", train=False),
    "128-blocks forward, key mask, head dim 64": lambda: attend(64, 128, "float16", train=False, masked=True),
    "128-blocks backward, head dim 128": lambda: attend(128, 128, "bfloat16", train=True),
    "128-blocks backward, head dim 64": lambda: attend(64, 128, "float16", train=True),
}


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, or in CUDA's folder."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [str(Path(folder) / "bin") for folder in folders if folder]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def examine(sanitizer: str, tool: str, case: str) -> bool:
    """Runs one case under one tool and logs its findings; False if there are any."""
    done = run([sanitizer, "--tool", tool, "--print-limit", "5", *own_command(case)], stop=False)
    report = done.stdout + done.stderr
    counts = [int(number) for pair in _FOUND.findall(report) for number in pair if number]
    lines = [line for line in report.splitlines() if line.startswith("=========") and len(line.strip("= ")) > 0]
    clean = done.returncode == 0 and counts == [0]
    log.info("%-40s %-10s %s", case, tool, "clean" if clean else f"exit code {done.returncode}, found {counts}")
    if not clean:
        for line in lines[:MOST_LINES] or report.splitlines()[-MOST_LINES:]:
            log.info("    %s", line)
    return clean


def own_command(case: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), "--run", case]


def run(command: list[str], *, stop: bool) -> subprocess.CompletedProcess:
    # Each tensor is an allocation of its own, so that memcheck sees where it ends.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=stop)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--run", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if options.run:
        CASES[options.run]()
        return 0
    import torch

    sanitizer = find_sanitizer()
    if sanitizer is None or not torch.cuda.is_available():
        log.error("compute-sanitizer (part of the CUDA toolkit; put it on PATH or set CUDA_HOME): %s", sanitizer)
        log.error("a GPU that torch can use: %s", torch.cuda.is_available())
        return 2
    log.info("%s, torch %s, %s", torch.cuda.get_device_name(), torch.__version__, sanitizer)
    clean = True
    for case in options.cases:
        run(own_command(case), stop=True)
        for tool in options.tools:
            clean &= examine(sanitizer, tool, case)
    return 0 if clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
