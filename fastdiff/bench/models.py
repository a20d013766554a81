"""One denoising forward of a whole model with random weights: dense and by each method, eager and compiled."""

from __future__ import annotations

import contextlib
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastdiff
from fastdiff.methods import AgentConfig, ClearConfig, MethodConfig, NeighborhoodConfig, RadialConfig
from fastdiff.methods.planner import PlanCache
from fastdiff_kernels import FastDiffError, TokenLayout
from fastdiff_kernels.errors import NotFiniteError
from fastdiff_patches.families import find_family

from .architectures import Architecture
from .breakdown import PARTS, breakdown
from .kernels import name_of
from .published_models import Draw
from .record import milliseconds
from .rivals import SDPA_BACKENDS, dense_kernels, why_missing

# Whole models as diffusers runs them, or with their blocks compiled; in this order, since compiling cannot be undone.
MODES = ("eager", "compiled")
_ANY_SDPA = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)

_logger = logging.getLogger("fastdiff")


@dataclass(frozen=True)
class Row:
    """One way to compute a model's attention: its name, what puts it in place, and the method's config."""

    name: str
    active: Callable[[], AbstractContextManager]
    config: MethodConfig | None = None


class ModelBench:
    """Times one architecture on the GPU.

    Args:
        architecture: The model.
        density: What methods are solved for.
        full: Whether all layers are built; otherwise the times of a few are scaled, linearly in the layers.
        repeats: Timed forwards of each depth.
        modes: Which of `MODES`.

    Attributes:
        missing: What was not timed, with the reason.
    """

    def __init__(
        self, architecture: Architecture, *, density: float, full: bool, repeats: int, modes: Sequence[str] = MODES
    ):
        self.architecture, self.density, self.repeats, self.modes = architecture, density, repeats, modes
        self.depth = architecture.depth()
        self.points = depths(self.depth, architecture.few, full)
        self.missing: dict[str, str] = {}

    def run(self) -> list[dict[str, Any]]:
        """Builds the model and times every row, eager before compiled."""
        try:
            return self._run()
        finally:
            # The next model needs the memory.
            self.model = self.inputs = self.lists = None
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()

    def _run(self) -> list[dict[str, Any]]:
        whole = self.architecture.build("meta", self.depth)
        self.weights = sum(p.numel() * p.element_size() for p in whole.parameters())
        built = {name: max(point[name] for point in self.points) for name in self.depth}
        self.model = self.architecture.build("cuda", built)
        self.inputs = self.architecture.inputs(Draw("cuda"))
        self.lists = {name: list(getattr(self.model, name)) for name in self.depth}
        rows = [*self._dense_rows(), *self._sparse_rows()]
        records = []
        for mode in self.modes:
            if mode == "compiled":
                compile_blocks(self.model, list(self.depth))
            for row in rows:
                records += self._guarded(row, mode)
        return records

    def _dense_rows(self) -> Iterator[Row]:
        yield Row("dense, diffusers default", contextlib.nullcontext)
        one, size = self.architecture, (1, self.architecture.tokens, self.architecture.heads)
        inputs = [Draw("cuda")(*size, one.head_dim) for _ in range(3)]
        times = {}
        for name in SDPA_BACKENDS:
            attend = dense_kernels("cuda")[name]
            try:
                (times[name],) = milliseconds(lambda attend=attend: attend(*inputs), "cuda", 1)
            except RuntimeError as error:
                if why_missing(error) is None:
                    raise
        best = min(times, key=times.get)
        # Calls that this kernel does not take, with a mask for example, go to the others.
        order = list(dict.fromkeys([SDPA_BACKENDS[best], *_ANY_SDPA]))
        yield Row(f"dense, {best}", lambda: sdpa_kernel(order, set_priority=True))

    def _sparse_rows(self) -> Iterator[Row]:
        one = self.architecture
        if find_family(self.model) is None:
            self.missing["sparse methods"] = f"no family describes {one.kind} yet, so dense attention alone is timed."
            return
        for method in one.methods:
            for build in BUILDERS[method]:
                try:
                    config = build(one, self.density)
                except FastDiffError as error:
                    self.missing[method] = str(error)
                    continue
                yield Row(name_of(config), lambda config=config: self._applied(config), config)

    @contextlib.contextmanager
    def _applied(self, config: MethodConfig) -> Iterator[None]:
        fastdiff.apply(self.model, config)
        try:
            yield
        finally:
            fastdiff.remove(self.model)

    def _guarded(self, row: Row, mode: str) -> list[dict[str, Any]]:
        """A row that cannot run here is said and left out: it does not cost the others."""
        if row.config is None:
            # Which of torch's kernels runs is compiled in; methods share what is compiled.
            torch._dynamo.reset()
        try:
            # A cache of traces would bring back the kernel of another row.
            with torch._functorch.config.patch(enable_autograd_cache=False), torch.no_grad(), row.active():
                record = self._record(row, mode)
        except (FastDiffError, torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException) as error:
            if isinstance(error, NotFiniteError):
                raise
            self.missing[f"{row.name}, {mode}"] = reason = " ".join(str(error).split())[:300]
            _logger.warning("%s, %s, %s: not timed: %s", self.architecture.name, row.name, mode, reason)
            return []
        _logger.info("%s, %s, %s: %.1f ms", self.architecture.name, row.name, mode, record["milliseconds"])
        return [record]

    def _record(self, row: Row, mode: str) -> dict[str, Any]:
        one, points = self.architecture, self.points
        activations = max(self._peak(point) for point in points)
        rounds = [[self._time(point) for point in points] for _ in range(self.repeats)]
        totals = [scaled(times, points, self.depth) for times in rounds]
        parts = [self._at(point, lambda: breakdown(self._forward)) for point in points]
        density, plan = 1.0, None
        if row.config is not None:
            density, plan = fastdiff.summary(self.model).models[0].mean_density, self._plan_time(row.config)
        layers = sum(self.depth.values()) or _repeated(self.model)
        return {
            "model": one.name,
            "what": one.what,
            "tokens": one.tokens,
            "heads": one.heads,
            "head_dim": one.head_dim,
            "dtype": "bfloat16",
            "layers": layers,
            "layers_timed": max(sum(point.values()) for point in points) or layers,
            "attention": row.name,
            "config": None if row.config is None else row.config.to_dict(),
            "mode": mode,
            "density": round(density, 4),
            "milliseconds": round(statistics.median(totals), 2),
            "spread": round(max(totals) - min(totals), 2),
            "peak_gib": round((self.weights + activations) / 2**30, 2),
            "breakdown": {part: round(scaled([some[part] for some in parts], points, self.depth), 2) for part in PARTS},
            "plan_milliseconds": None if plan is None else round(plan, 1),
        }

    def _forward(self) -> torch.Tensor:
        return self.model(**self.inputs, return_dict=False)[0]

    def _at(self, point: dict[str, int], run: Callable[[], Any]) -> Any:
        """Runs something on the model with so many blocks: the last of each list, since a last one may be special."""
        for name, count in point.items():
            setattr(self.model, name, nn.ModuleList(self.lists[name][-count:]))
        try:
            return run()
        finally:
            for name, blocks in self.lists.items():
                setattr(self.model, name, nn.ModuleList(blocks))

    def _peak(self, point: dict[str, int]) -> int:
        """Bytes of one forward on top of the weights; it warms up and compiles too.

        Raises:
            NotFiniteError: If the model's output is not finite.
        """
        out = self._at(point, self._forward)
        if not bool(out.isfinite().all()):
            raise NotFiniteError(f"{self.architecture.name}: the output is not finite, so its time is no use.")
        del out
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._at(point, self._forward)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _time(self, point: dict[str, int]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def run():
            start.record()
            self._forward()
            end.record()

        self._at(point, run)
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def _plan_time(self, config: MethodConfig) -> float:
        """Milliseconds to build a plan that is in no cache."""
        one = self.architecture
        planner = type(config.planner())(config, PlanCache())
        layout = TokenLayout.self_attention(one.grid, text_before=one.text)
        where = {"heads": one.heads, "head_dim": one.head_dim, "device": torch.device("cuda")}
        start = time.perf_counter()
        planner.plan(layout, layer=0, step=None, steps=None, **where)
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)


def depths(depth: dict[str, int], few: int, full: bool) -> list[dict[str, int]]:
    """The depths to time: all blocks, or a few of each list, and then twice as many of each list in turn."""
    if full or not depth:
        return [depth]
    shortest = {name: min(few, count) for name, count in depth.items()}
    return [shortest, *(shortest | {name: 2 * few} for name, count in depth.items() if count >= 2 * few)]


def scaled(readings: Sequence[float], points: Sequence[dict[str, int]], depth: dict[str, int]) -> float:
    """What readings at some depths say of the whole depth, since all blocks of a list do the same work."""
    first, shortest = readings[0], points[0]
    total = first
    for reading, point in zip(readings[1:], points[1:], strict=True):
        (name,) = (name for name in point if point[name] != shortest[name])
        total += (reading - first) / (point[name] - shortest[name]) * (depth[name] - shortest[name])
    return total


def compile_blocks(model: nn.Module, lists: list[str]) -> None:
    """Compiles block by block: as diffusers does it where the model says which, else the blocks of its lists."""
    if getattr(model, "_repeated_blocks", None):
        model.compile_repeated_blocks(fullgraph=True)
        return
    for name in lists:
        for block in getattr(model, name):
            block.compile()


def _repeated(model: nn.Module) -> int:
    return sum(type(module).__name__ in model._repeated_blocks for module in model.modules())


def _solved(kind: type[MethodConfig], **settings) -> Callable[[Architecture, float], MethodConfig]:
    return lambda one, density: kind.for_density(density, one.grid, text_tokens=one.text, **settings)


# Paro is missing: its masks are calibrated on real weights.
BUILDERS: dict[str, tuple[Callable[[Architecture, float], MethodConfig], ...]] = {
    "radial": (
        _solved(RadialConfig),
        lambda one, density: RadialConfig(decay_factor=0.2),
        _solved(RadialConfig, mode="reference"),
    ),
    "neighborhood": (_solved(NeighborhoodConfig),),
    "clear": (lambda one, density: ClearConfig(8),),
    "agent": (lambda one, density: replace(AgentConfig.agent_sd(one.grid), steps=(0.0, 1.0)),),
}
