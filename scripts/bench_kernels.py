"""Times fastdiff's attention against the dense and sparse kernels found here, and writes results/bench-*.json.

    python scripts/bench_kernels.py                 # GPU: shape W against cuDNN SDPA and FlexAttention
    python scripts/bench_kernels.py --cpu           # the portable backend against torch SDPA

TF/s counts only the score blocks that are computed: 4 x heads x tokens^2 x head_dim x density / time. A kernel that
differs from float64 attention on sampled queries is not timed: the script stops.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from fastdiff.methods import RadialConfig
from fastdiff_kernels import BlockPlan, Grid, TokenLayout, attention

log = logging.getLogger("bench")


@dataclass(frozen=True)
class Shape:
    """One attention call, with the radial settings to time on it."""

    name: str
    grid: Grid
    heads: int
    head_dim: int
    dtype: torch.dtype
    configs: tuple[RadialConfig, ...]


def gpu_shapes() -> tuple[Shape, ...]:
    w, small = Grid(21, 45, 80), Grid(21, 30, 52)
    solved = RadialConfig.for_density(0.2, w)
    published = RadialConfig(decay_factor=0.2)
    reference = RadialConfig(decay_factor=0.2, mode="reference")
    return (
        Shape("W", w, 40, 128, torch.bfloat16, (solved, published, reference)),
        Shape("Wan 1.3B 480p", small, 12, 128, torch.bfloat16, (published,)),
    )


def cpu_shapes() -> tuple[Shape, ...]:
    grid = Grid(32, 16, 16)
    settings = (RadialConfig.for_density(0.25, grid),)
    return (
        Shape("8192 tokens, 8 heads of 64", grid, 8, 64, torch.float32, settings),
        Shape("8192 tokens, 12 heads of 128", grid, 12, 128, torch.float32, settings),
    )


class Bench:
    """Checks and times kernels on one shape, and keeps a record of each."""

    def __init__(self, shape: Shape, device: str, repeats: int):
        self.shape, self.device, self.repeats = shape, device, repeats
        size = (1, shape.grid.tokens, shape.heads, shape.head_dim)
        generator = torch.Generator(device).manual_seed(0)
        draw = {"dtype": shape.dtype, "device": device, "generator": generator}
        self.inputs = [torch.randn(size, **draw) for _ in range(3)]
        self.records: list[dict] = []

    def dense(self, kernel: str, run: Callable[[], torch.Tensor]) -> None:
        self._record(kernel, None, run, run)

    def sparse(self, kernel: str, plan: BlockPlan, run: Callable[[], torch.Tensor], tokens=None) -> None:
        """`tokens` turns what `run` returns into `[batch, tokens, heads, head_dim]`, outside the timing."""
        self._record(kernel, plan, run, (lambda: tokens(run())) if tokens else run)

    def _record(self, kernel, plan, run, natural) -> None:
        self._check(kernel, natural(), plan)
        times = self._times(run)
        density = 1.0 if plan is None else plan.density()
        median = statistics.median(times)
        shape, tokens = self.shape, self.shape.grid.tokens
        flops = 4 * shape.heads * tokens**2 * shape.head_dim * density
        self.records.append(
            {
                "kernel": kernel,
                "shape": shape.name,
                "tokens": tokens,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "density": round(density, 4),
                "direction": "forward",
                "milliseconds": round(median * 1e3, 3),
                "spread": round((max(times) - min(times)) * 1e3, 3),
                "tflops": round(flops / median / 1e12, 3),
            }
        )
        log.info("%s, %s: density %.3f, %.2f ms", shape.name, kernel, density, median * 1e3)

    def _check(self, kernel: str, out: torch.Tensor, plan: BlockPlan | None) -> None:
        """Against float64 attention of three queries of the first and the last head."""
        q, k, v = self.inputs
        tokens = self.shape.grid.tokens
        for head in (0, self.shape.heads - 1):
            for query in (0, tokens // 2, tokens - 1):
                seen = slice(None) if plan is None else plan.visible_keys(query).to(self.device)
                keys, values = (x[0, :, head][seen].double() for x in (k, v))
                scores = keys @ q[0, query, head].double() * self.shape.head_dim**-0.5
                truth = scores.softmax(0) @ values
                error = float((out[0, query, head].double() - truth).norm() / truth.norm())
                limit = 2e-2 if self.shape.dtype == torch.bfloat16 else 1e-5
                if not error < limit:
                    raise SystemExit(f"{kernel} on {self.shape.name} is wrong: error {error:.2e} at query {query}")

    def _times(self, run) -> list[float]:
        for _ in range(1 if self.device == "cpu" else 3):
            run()
        times = []
        for _ in range(self.repeats):
            if self.device == "cpu":
                start = time.perf_counter()
                run()
                times.append(time.perf_counter() - start)
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return times


def name_of(config: RadialConfig) -> str:
    return f"radial {config.mode}, decay {config.decay_factor:g}, near {config.near_width:g}"


def bench_gpu(shape: Shape, repeats: int) -> list[dict]:
    bench = Bench(shape, "cuda", repeats)
    q, k, v = bench.inputs
    heads_first = [x.transpose(1, 2) for x in bench.inputs]

    def cudnn():
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(*heads_first).transpose(1, 2)

    bench.dense("cuDNN SDPA", cudnn)
    layout = TokenLayout.self_attention(shape.grid)
    for config in shape.configs:
        plan = config.build_plan(layout).to("cuda")
        bench.sparse(f"fastdiff triton, {name_of(config)}", plan, lambda plan=plan: attention(q, k, v, plan))
    bench_flex(bench, shape.configs[0].build_plan(layout).to("cuda"), name_of(shape.configs[0]))
    return bench.records


def bench_flex(bench: Bench, plan: BlockPlan, name: str) -> None:
    """The same blocks in FlexAttention, on tensors that stand in the plan's order already."""
    order = plan.key.order[0].long()
    slots = [x.index_select(1, order.clamp(min=0)).transpose(1, 2).contiguous() for x in bench.inputs]
    exists = order >= 0

    def key_exists(batch, head, query, key):
        return exists[key]

    lists = [_padded(part, plan.key_blocks) for part in (plan.partial, plan.full)]
    (partial_counts, partial), (full_counts, full) = lists
    block = (plan.query.block, plan.key.block)
    mask = BlockMask.from_kv_blocks(
        partial_counts, partial, full_counts, full, BLOCK_SIZE=block, mask_mod=key_exists, seq_lengths=(len(order),) * 2
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def tokens(out):
        result = torch.empty_like(bench.inputs[0])
        result[:, order[exists]] = out.transpose(1, 2)[:, exists]
        return result

    bench.sparse(f"FlexAttention, {name}", plan, lambda: compiled(*slots, block_mask=mask), tokens)


def _padded(blocks, key_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A block list as FlexAttention takes it: counts `[1, 1, rows]`, indices `[1, 1, rows, key blocks]`."""
    mask = blocks.mask(key_blocks)[0]
    indices = mask.int().argsort(dim=1, descending=True, stable=True)
    return mask.sum(1, dtype=torch.int32)[None, None], indices.to(torch.int32)[None, None]


def bench_cpu(shape: Shape, repeats: int) -> list[dict]:
    bench = Bench(shape, "cpu", repeats)
    q, k, v = bench.inputs
    heads_first = [x.transpose(1, 2) for x in bench.inputs]
    bench.dense("torch SDPA", lambda: F.scaled_dot_product_attention(*heads_first).transpose(1, 2))
    for config in shape.configs:
        plan = config.build_plan(TokenLayout.self_attention(shape.grid))
        bench.sparse(f"fastdiff torch, {name_of(config)}", plan, lambda plan=plan: attention(q, k, v, plan))
    return bench.records


def conditions(device: str, commit: str | None) -> dict:
    """What every record carries besides its figures."""
    import triton

    if commit is None:
        git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip() or "unknown"
    name = torch.cuda.get_device_name() if device == "cuda" else f"none, {platform.machine()} CPU"
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    if device == "cpu":
        versions["threads"] = str(torch.get_num_threads())
    return {"gpu": name, "versions": versions, "commit": commit}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="time the portable backend on the CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--commit", help="for the record, where this is no git checkout")
    parser.add_argument("--output", type=Path, help="by default results/bench-kernels.json or bench-portable.json")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not options.cpu and not torch.cuda.is_available():
        parser.error("no CUDA device was found; --cpu times the portable backend")
    device = "cpu" if options.cpu else "cuda"
    records = []
    for shape in cpu_shapes() if options.cpu else gpu_shapes():
        records += (bench_cpu if options.cpu else bench_gpu)(shape, options.repeats)
    common = conditions(device, options.commit)
    output = options.output or Path("results") / ("bench-portable.json" if options.cpu else "bench-kernels.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps([{**record, **common} for record in records], indent=1) + "\n")
    log.info("wrote %s", output)


if __name__ == "__main__":
    main()
