"""Times fastdiff's attention against the dense and sparse kernels found here, and writes results/bench-*.json.

    python scripts/bench_kernels.py                 # GPU: against cuDNN SDPA and FlexAttention
    python scripts/bench_kernels.py --cpu           # the portable backend against torch SDPA

TF/s counts only the score blocks that are computed: 4 x heads x tokens^2 x head_dim x density / time, and 2.5 times as
much for a backward pass. A kernel that differs from float64 attention on sampled queries, or whose gradients differ on
sampled queries and keys, is not timed: the script stops.
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

from fastdiff.methods import MethodConfig, NeighborhoodConfig, RadialConfig
from fastdiff_kernels import BlockPlan, Grid, TokenLayout, attention

log = logging.getLogger("bench")


@dataclass(frozen=True)
class Shape:
    """One attention call, with the methods to time on it; `backward` times their gradients too."""

    name: str
    grid: Grid
    heads: int
    head_dim: int
    dtype: torch.dtype
    configs: tuple[MethodConfig, ...]
    backward: bool = False


def gpu_shapes() -> tuple[Shape, ...]:
    w, small, hunyuan = Grid(21, 45, 80), Grid(21, 30, 52), Grid(30, 48, 80)
    whole = NeighborhoodConfig((None, None, None))
    window = (18, 24, 24)
    solved = RadialConfig.for_density(0.2, w)
    published = RadialConfig(decay_factor=0.2)
    reference = RadialConfig(decay_factor=0.2, mode="reference")
    return (
        Shape("W", w, 40, 128, torch.bfloat16, (solved, published, reference, whole)),
        Shape("W, 8 heads", w, 8, 128, torch.bfloat16, (solved,), backward=True),
        Shape("Wan 1.3B 480p", small, 12, 128, torch.bfloat16, (published,)),
        Shape(
            "HunyuanVideo",
            hunyuan,
            24,
            128,
            torch.bfloat16,
            (NeighborhoodConfig(window), NeighborhoodConfig(window, stride=(16, 8, 8))),
        ),
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

    def backward(self, kernel: str, plan: BlockPlan | None, run: Callable[..., torch.Tensor], order=None) -> None:
        """The gradients of `run(q, k, v)` alone, whose tensors may stand in an `InOrder`."""
        upstream = torch.randn_like(self.inputs[0])
        inputs, grad = self.inputs, upstream
        if order is not None:
            inputs, grad = order.inputs, order.slots(upstream)
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = run(*inputs)

        def gradients():
            return torch.autograd.grad(out, inputs, grad, retain_graph=True)

        found = gradients() if order is None else [order(x) for x in gradients()]
        self._check_gradients(kernel, plan, upstream, found)
        self._time(kernel, plan, gradients, "backward")

    def _record(self, kernel, plan, run, natural) -> None:
        self._check(kernel, natural(), plan)
        self._time(kernel, plan, run, "forward")

    def _time(self, kernel, plan, run, direction) -> None:
        times = self._times(run)
        density = 1.0 if plan is None else plan.density()
        median = statistics.median(times)
        shape, tokens = self.shape, self.shape.grid.tokens
        flops = 4 * shape.heads * tokens**2 * shape.head_dim * density * (2.5 if direction == "backward" else 1)
        self.records.append(
            {
                "kernel": kernel,
                "shape": shape.name,
                "tokens": tokens,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "density": round(density, 4),
                "direction": direction,
                "milliseconds": round(median * 1e3, 3),
                "spread": round((max(times) - min(times)) * 1e3, 3),
                "tflops": round(flops / median / 1e12, 3),
            }
        )
        log.info("%s, %s, %s: density %.3f, %.2f ms", shape.name, kernel, direction, density, median * 1e3)

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

    def _check_gradients(self, kernel: str, plan: BlockPlan | None, upstream, grads) -> None:
        """Against float64 gradients of one query, one key and one value in the middle of the last head."""
        head, token = self.shape.heads - 1, self.shape.grid.tokens // 2
        scale = self.shape.head_dim**-0.5
        q, k, v, upstream = (x[0, :, head].double() for x in (*self.inputs, upstream))

        truth_q, truth_k, truth_v = torch.zeros(3, self.shape.head_dim, dtype=torch.float64, device=self.device)
        for queries, seen in rows_with(plan, token, len(q), self.device):
            scores = (q[queries] @ k.t() * scale).masked_fill(~seen, float("-inf"))
            weights = scores.softmax(1)
            slope = upstream[queries] @ v.t()
            slope = weights * (slope - (weights * slope).sum(1, keepdim=True))
            truth_k += slope[:, token] @ q[queries] * scale
            truth_v += weights[:, token] @ upstream[queries]
            truth_q += (slope[queries == token] @ k * scale).sum(0)
        for name, truth, found in zip("qkv", (truth_q, truth_k, truth_v), grads, strict=True):
            error = float((found[0, token, head].double() - truth).norm() / truth.norm())
            if not error < 3e-2:
                raise SystemExit(f"{kernel} on {self.shape.name} is wrong: error {error:.2e} in the gradient of {name}")

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


def rows_with(plan: BlockPlan | None, key: int, tokens: int, device: str):
    """Yields queries that see a key, some at a time, and what each of them sees: int64 `[n]`, bool `[n, tokens]`.

    A query sees the key of its own place under every method that is timed here.
    """
    if plan is None:
        for queries in torch.arange(tokens, device=device).split(1024):
            yield queries, torch.ones(len(queries), tokens, dtype=torch.bool, device=device)
        return
    order, block = plan.key.order[0].long(), plan.query.block
    slot = int((order == key).nonzero()[0])
    for row in range(plan.query_blocks):
        mask = plan.slot_mask(0, row)
        queries = plan.query.order[0, row * block : (row + 1) * block].long()
        chosen = mask[:, slot] & (queries >= 0)
        seen = torch.zeros(int(chosen.sum()), tokens, dtype=torch.bool, device=device)
        seen[:, order[order >= 0]] = mask[chosen][:, order >= 0]
        yield queries[chosen], seen


def name_of(config: MethodConfig) -> str:
    if isinstance(config, RadialConfig):
        return f"radial {config.mode}, decay {config.decay_factor:g}, near {config.near_width:g}"
    if set(config.window) == {None}:
        return "every block"
    sides = ["x".join(map(str, side)) for side in (config.window, config.stride) if isinstance(side, tuple)]
    return "neighborhood " + ", stride ".join(sides)


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
        name = f"fastdiff triton, {name_of(config)}"
        bench.sparse(name, plan, lambda plan=plan: attention(q, k, v, plan))
        if shape.backward:
            bench.backward(name, plan, lambda q, k, v, plan=plan: attention(q, k, v, plan))
    if shape.backward:

        def dense(q, k, v):
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

        bench.backward("cuDNN SDPA", None, dense)
    if isinstance(shape.configs[0], RadialConfig):
        bench_flex(bench, shape.configs[0].build_plan(layout).to("cuda"), name_of(shape.configs[0]))
    return bench.records


class InOrder:
    """Tensors of the bench in a plan's order, as FlexAttention takes them, and back."""

    def __init__(self, bench: Bench, order: torch.Tensor):
        self.order, self.shape = order, bench.inputs[0].shape
        self.inputs = [x.index_select(1, order.clamp(min=0)).transpose(1, 2).contiguous() for x in bench.inputs]

    def slots(self, tokens: torch.Tensor) -> torch.Tensor:
        """A gradient in this order, zero for padding: its queries must leave no trace in keys and values."""
        padding = (self.order < 0)[:, None, None]
        return tokens.index_select(1, self.order.clamp(min=0)).masked_fill(padding, 0).transpose(1, 2).contiguous()

    def __call__(self, slots: torch.Tensor) -> torch.Tensor:
        result = slots.new_empty(self.shape)
        exists = self.order >= 0
        result[:, self.order[exists]] = slots.transpose(1, 2)[:, exists]
        return result


def bench_flex(bench: Bench, plan: BlockPlan, name: str) -> None:
    """The same blocks in FlexAttention, on tensors that stand in the plan's order already."""
    order = plan.key.order[0].long()
    tokens = InOrder(bench, order)
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

    def run(q, k, v):
        return compiled(q, k, v, block_mask=mask)

    bench.sparse(f"FlexAttention, {name}", plan, lambda: run(*tokens.inputs), tokens)
    if bench.shape.backward:
        bench.backward(f"FlexAttention, {name}", plan, run, tokens)


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
    common = conditions(device, options.commit)
    output = options.output or Path("results") / ("bench-portable.json" if options.cpu else "bench-kernels.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    records, bench = [], bench_cpu if options.cpu else bench_gpu
    for shape in cpu_shapes() if options.cpu else gpu_shapes():
        records += [{**record, **common} for record in bench(shape, options.repeats)]
        # After each shape, so that a run cut short loses only the last.
        output.write_text(json.dumps(records, indent=1) + "\n")
    log.info("wrote %s", output)


if __name__ == "__main__":
    main()
