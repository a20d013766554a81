"""Wall time of a call, and of attention alone. Knows devices; knows no pipeline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from fastdiff_kernels import InvalidInputError, TokenLayout
from fastdiff_patches.planner import Extras, Planner


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
        median: The middle of all repeats.
        spread: Distance of the quartiles, the size of the noise.
        repeats: How many calls were timed.
    """

    median: float
    spread: float
    repeats: int

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class AttentionTiming:
    """Attention alone, dense (SDPA) and by a method, on tensors of the same shape."""

    dense: Timing
    sparse: Timing

    @property
    def speedup(self) -> float:
        return self.dense.median / self.sparse.median

    def to_dict(self) -> dict:
        return {"dense": self.dense.to_dict(), "sparse": self.sparse.to_dict(), "speedup": self.speedup}


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has done what it was given; returns at once on the CPU."""
    kind = torch.device(device).type
    if kind == "cuda":
        torch.cuda.synchronize(device)
    elif kind == "mps":
        torch.mps.synchronize()


def time_call(
    call: Callable[[], object], device: torch.device | str = "cpu", repeats: int = 5, warm_up: int = 1
) -> Timing:
    """Times a call on a device.

    Args:
        call: What to time; its result is thrown away.
        device: Where its work runs: the clock stops when that device is idle.
        repeats: Timed calls. More is slower and steadier.
        warm_up: Calls before those, for compilation and caches.

    Raises:
        InvalidInputError: If `repeats` is below 1 or `warm_up` below 0.
    """
    if repeats < 1 or warm_up < 0:
        raise InvalidInputError(f"repeats is {repeats} and warm_up {warm_up}; they must be at least 1 and at least 0.")
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if repeats > 1 else (seconds[0],) * 3
    return Timing(statistics.median(seconds), high - low, repeats)


def attention_speedup(
    planner: Planner,
    layout: TokenLayout,
    *,
    heads: int,
    head_dim: int,
    layer: int = 0,
    batch: int = 1,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    repeats: int = 5,
    backend: str = "auto",
) -> AttentionTiming:
    """Times a method's attention against dense SDPA on random tensors of the shape that a model has.

    All that the method does is timed: the token order, pooling, both passes of agents, merging of tokens.

    Args:
        planner: The method at work, `config.planner()`, or that of an attached model.
        layout: The tokens of the call.
        heads: Attention heads of the model.
        head_dim: Size of a head.
        layer: Which of the model's self-attention layers this is, for methods that tell them apart.
        batch: Samples of a call.
        device: Where to run.
        dtype: Type of queries, keys and values.
        repeats: Timed calls of each side.
        backend: Backend of the sparse side, as in `fastdiff_kernels.attention`.

    Raises:
        InvalidInputError: If the method keeps this layer dense, or the numbers do not fit.
    """
    device = torch.device(device)
    where = {"layer": layer, "heads": heads, "head_dim": head_dim}
    plan = planner.plan(layout, step=None, steps=None, device=device, **where)
    if plan is None:
        raise InvalidInputError(f"the method keeps layer {layer} dense; time a layer that it makes sparse.")
    parameters = planner.parameters(**where)
    if parameters is not None:
        parameters = parameters.to(device, dtype)
    generator = torch.Generator().manual_seed(0)

    def draw(tokens: int, *sizes: int) -> torch.Tensor:
        return torch.randn(batch, tokens, *sizes, generator=generator).to(device, dtype)

    hidden = draw(layout.query_tokens, heads * head_dim)
    q, k, v = (draw(n, heads, head_dim) for n in (layout.query_tokens, layout.key_tokens, layout.key_tokens))
    stand_ins = {"pre_rope_query": q, "rotary": None, "block_input": hidden, "attention": None, "seed": torch.tensor(0)}

    def sparse() -> None:
        extras = Extras(None, None, backend, parameters, dict(stand_ins))
        if "block_input" not in planner.needs:
            planner.attend(q, k, v, plan, extras)
            return
        # Merged tokens are fewer, and so are the queries and keys that a model would make of them.
        merged = planner.enter(hidden, plan, extras).shape[1]
        out = planner.attend(q[:, :merged], k[:, :merged], v[:, :merged], plan, extras)
        planner.leave(out.flatten(2), plan, extras)

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    with torch.no_grad():
        dense = time_call(lambda: torch.nn.functional.scaled_dot_product_attention(*heads_first), device, repeats)
        return AttentionTiming(dense, time_call(sparse, device, repeats))
