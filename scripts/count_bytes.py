"""Counts the bytes that each kernel of an attention call moves to and from a GPU's memory, by Nsight Compute (ncu).

    python scripts/count_bytes.py            # 8 heads of Wan 2.1's 720p video, radial at density 0.2, with gradients

The floor is what no kernel can do without: inputs read once, outputs written once. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import csv
import math
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

GRID, HEADS, HEAD_DIM, DENSITY = (21, 45, 80), 8, 128, 0.2
READ, WRITTEN, TIME = "dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum"
PARTS = ("forward", "backward")


def call(part: str) -> None:
    """One call, the second one, for the profiler to look at."""
    import torch

    from fastdiff.methods import RadialConfig
    from fastdiff_kernels import Grid, TokenLayout, attention

    grid = Grid(*GRID)
    plan = RadialConfig.for_density(DENSITY, grid).build_plan(TokenLayout.self_attention(grid)).to("cuda")
    shape = (1, grid.tokens, HEADS, HEAD_DIM)
    train = part == "backward"
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=train) for _ in range(3))
    upstream = torch.randn_like(q)
    for watched in (False, True):
        if watched and not train:
            torch.cuda.profiler.start()
        out = attention(q, k, v, plan)
        torch.cuda.synchronize()
        if watched and train:
            torch.cuda.profiler.start()
        if train:
            torch.autograd.grad(out, (q, k, v), upstream)
        torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def floor(part: str) -> float:
    """Gigabytes: q, k, v, out; of a backward pass also the three gradients and that of the output."""
    tensor = math.prod(GRID) * HEADS * HEAD_DIM * 2 / 1e9
    return tensor * (4 if part == "forward" else 8)


def count(ncu: str, part: str) -> dict[str, dict[str, float]]:
    """Bytes read and written and nanoseconds, by kernel."""
    command = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--print-units", "base", "--csv"]
    command += ["--metrics", ",".join((READ, WRITTEN, TIME))]
    done = subprocess.run(
        [*command, sys.executable, str(Path(__file__).resolve()), "--run", part], capture_output=True, text=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or not lines:
        raise SystemExit(f"ncu ended with {done.returncode}:\n{(done.stdout + done.stderr)[-2000:]}")
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in csv.DictReader(lines):
        name = row["Kernel Name"].split("(")[0].split("<")[0].removeprefix("void ")
        found[name][row["Metric Name"]] += float(row["Metric Value"].replace(",", ""))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        call(options.run)
        return
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        raise SystemExit("ncu, which is part of the CUDA toolkit, was not found on PATH.")
    line = "| {} | {} | {:.3f} | {:.3f} | {:.3f} |".format
    print("| pass | kernel | ms | GB read | GB written |\n| --- | --- | --- | --- | --- |")
    for part in PARTS:
        kernels, total = count(ncu, part), [0.0, 0.0, 0.0]
        for name, metrics in kernels.items():
            numbers = metrics[TIME] / 1e6, metrics[READ] / 1e9, metrics[WRITTEN] / 1e9
            total = [a + b for a, b in zip(total, numbers, strict=True)]
            print(line(part, f"`{name}`", *numbers))
        print(line(part, f"all, {(total[1] + total[2]) / floor(part):.2f} x the floor of {floor(part):.3f}", *total))


if __name__ == "__main__":
    main()
