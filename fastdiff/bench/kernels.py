"""One attention call by every kernel found here: checked, timed, recorded.

TF/s counts only the score blocks that are computed: 4 x heads x tokens^2 x head_dim x density / time, and 2.5 times as
much for a backward pass.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdiff.methods import AgentConfig, ClearConfig, RadialConfig
from fastdiff_kernels import (
    AgentPlan,
    BlockPlan,
    FastDiffError,
    UnsupportedError,
    attention,
    choose_backend,
    pool_cells,
)
from fastdiff_kernels.export import fa4_version
from fastdiff_patches.planner import Extras

from .record import milliseconds
from .rivals import Attend, Blocks, FA4Blocks, FlexBlocks, OwnBlocks, dense_kernels, why_missing
from .shapes import EveryBlock, RandomBlocks, RandomParo, Shape
from .truth import check_agents, check_gradients, check_output

REORDER = "reorder: gather of q, k and v, scatter of the output"

_logger = logging.getLogger("fastdiff")


class Bench:
    """The kernels on one shape.

    Args:
        shape: The call.
        device: `"cuda"` or `"cpu"`.
        repeats: Timed calls of each kernel.

    Attributes:
        records: What was measured, a dict for each kernel and direction.
        missing: Dense kernels that do not run here, with the reason.
    """

    def __init__(self, shape: Shape, device: str, repeats: int):
        self.shape, self.device, self.repeats = shape, device, repeats
        generator = torch.Generator(device).manual_seed(0)
        size = (1, shape.tokens, shape.heads, shape.head_dim)
        draw = {"dtype": shape.dtype, "device": device, "generator": generator}
        self.inputs = [torch.randn(size, **draw) for _ in range(3)]
        self.upstream = torch.randn(size, **draw) if shape.backward else None
        self.records: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}

    def run(self) -> list[dict[str, Any]]:
        """Checks and times everything.

        Raises:
            WrongResultError: If a kernel computes something else; it and all after it are not timed.
        """
        # FlexAttention compiles anew for each call, and torch would give up after some and run it slowly.
        torch._dynamo.reset()
        for name, attend in dense_kernels(self.device).items():
            self._guest(name, lambda name=name, attend=attend: self._measure(name, None, attend))
        first = True
        for config in self.shape.configs():
            plan = config.build_plan(self.shape.layout).to(self.device)
            if isinstance(plan, AgentPlan):
                self._agents(config, plan)
                continue
            self._measure(
                f"fastdiff {self._backend()}, {name_of(config)}",
                plan,
                lambda q, k, v, plan=plan: attention(q, k, v, plan),
            )
            if self.device == "cuda":
                self._beside(plan, name_of(config), first)
            first = False
        return self.records

    def _beside(self, plan: BlockPlan, name: str, first: bool) -> None:
        """FlashAttention-4 on the same blocks; of the first also FlexAttention, and ours and the reorder apart."""
        if fa4_version() is not None:
            kernel = f"FlashAttention-4, {name}"
            self._guest(kernel, lambda: self._in_order(kernel, plan, FA4Blocks(plan), backward=False))
        if first:
            if not plan.key.in_token_order:
                kernel = f"fastdiff {self._backend()}, {name}, tokens in its order"
                self._in_order(kernel, plan, OwnBlocks(plan), backward=False)
            kernel = f"FlexAttention, {name}"
            self._guest(kernel, lambda: self._in_order(kernel, plan, FlexBlocks(plan), self.shape.backward))
            if self.shape.reorder:
                self._reorder(plan)

    def _measure(self, kernel: str, plan: BlockPlan | None, attend: Attend) -> None:
        check_output(self._what(kernel), self.inputs, attend(*self.inputs), plan)
        self._time(kernel, plan, "forward", lambda: attend(*self.inputs))
        if self.shape.backward:
            self._backward(kernel, plan, attend, self.inputs, self.upstream, lambda *grads: grads)

    def _in_order(self, kernel: str, plan: BlockPlan, blocks: Blocks, backward: bool) -> None:
        """A kernel that wants its tensors in the plan's order, which is outside the timing."""
        inputs = blocks.slots(*self.inputs)
        (out,) = blocks.tokens(blocks.attend(*inputs))
        check_output(self._what(kernel), self.inputs, out, plan)
        self._time(kernel, plan, "forward", lambda: blocks.attend(*inputs))
        if backward:
            (upstream,) = blocks.slots(self.upstream)
            self._backward(kernel, plan, blocks.attend, inputs, upstream, blocks.tokens)

    def _backward(self, kernel, plan, attend, inputs, upstream, tokens: Callable[..., Sequence[torch.Tensor]]) -> None:
        """The gradients alone; `tokens` brings all three into the natural order, outside the timing."""
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = attend(*inputs)

        def gradients():
            return torch.autograd.grad(out, inputs, upstream, retain_graph=True)

        check_gradients(self._what(kernel), self.inputs, self.upstream, tokens(*gradients()), plan)
        self._time(kernel, plan, "backward", gradients)

    def _agents(self, config: AgentConfig, plan: AgentPlan) -> None:
        q, k, v = self.inputs
        planner, grid = config.planner(), slice(*plan.spans.query_grid)
        backend = planner.runs_on("auto", q.device, q.dtype, q.shape[-1])
        kernel = f"fastdiff {backend}, {name_of(config)}"

        def run():
            return planner.attend(q, k, v, plan, Extras(None, None, "auto", None, {}))

        agents = pool_cells(q[:, grid].double(), plan)
        settings = {"scale2": q.shape[-1] ** (-0.5 * config.k_scale2), "shortcut": config.k_shortcut}
        check_agents(self._what(kernel), self.inputs, agents, run(), plan, **settings)
        self._time(kernel, plan, "forward", run)

    def _reorder(self, plan: BlockPlan) -> None:
        """What bringing all tokens into the plan's order and back takes by itself, without attention."""
        from .reorder import there_and_back

        run = there_and_back(self.inputs, plan, self._what(REORDER))
        self._time(REORDER, None, "forward", run, density=0.0)

    def _time(self, kernel, plan, direction, run, density: float | None = None) -> None:
        times = milliseconds(run, self.device, self.repeats)
        if density is None:
            density = 1.0 if plan is None else plan.density()
        shape, median = self.shape, statistics.median(times)
        self.records.append(
            {
                "kernel": kernel,
                "shape": shape.name,
                "tokens": shape.tokens,
                "heads": shape.heads,
                "head_dim": shape.head_dim,
                "dtype": str(shape.dtype).removeprefix("torch."),
                "density": round(density, 4),
                "direction": direction,
                "milliseconds": round(median, 3),
                "spread": round(max(times) - min(times), 3),
                "tflops": round(operations(shape, density, direction) / median / 1e9, 3),
            }
        )
        _logger.info("%s, %s: %.3f ms", self._what(kernel), direction, median)

    def _guest(self, kernel: str, measure: Callable[[], None]) -> None:
        """A kernel of others may be missing or refuse a plan, which is said; a wrong one is refused like ours."""
        try:
            measure()
            return
        except UnsupportedError as error:
            reason = str(error)
        except FastDiffError:
            raise
        except (RuntimeError, ValueError) as error:
            reason = why_missing(error)
            if reason is None:
                raise
        self.missing[kernel] = reason
        _logger.warning("%s does not run on shape %s here: %s", kernel, self.shape.name, reason)

    def _what(self, kernel: str) -> str:
        return f"{kernel} on shape {self.shape.name}"

    def _backend(self) -> str:
        return choose_backend("auto", torch.device(self.device), self.shape.dtype, self.shape.head_dim)


def operations(shape: Shape, density: float, direction: str) -> float:
    """Floating-point operations of the computed score blocks."""
    forward = 4 * shape.heads * shape.tokens**2 * shape.head_dim * density
    return 2.5 * forward if direction == "backward" else forward


def name_of(config: Any) -> str:
    """A method with its settings, as records carry it."""
    if isinstance(config, RadialConfig):
        return f"radial {config.mode}, decay {config.decay_factor:g}, near {config.near_width:g}"
    if isinstance(config, ClearConfig):
        return f"clear, radius {config.radius:g}"
    if isinstance(config, AgentConfig):
        return f"agent, {'x'.join(map(str, config.agents))} agents"
    if isinstance(config, RandomParo):
        return "paro, random blocks"
    if isinstance(config, RandomBlocks):
        return "random blocks for each head"
    if isinstance(config, EveryBlock):
        return "every block"
    sides = [side for side in (config.window, config.stride) if isinstance(side, tuple)]
    texts = ["x".join("all" if width is None else str(width) for width in side) for side in sides]
    return "neighborhood " + ", stride ".join(texts)
