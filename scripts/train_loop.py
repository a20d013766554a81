"""One optimisation loop for every embedded model: rates, clipping, averaging, losses; it knows no model."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

# Reading a loss waits for the GPU, so it is read once in so many iterations.
READ_EVERY = 50
# The first iterations compile and tune: speed is measured, and graphs are captured, after them.
SETTLING = 5


@dataclass(frozen=True)
class Rate:
    """Learning rate from `start` to `end` along half a cosine, after `warmup` iterations of linear rise."""

    start: float
    end: float
    warmup: int = 50

    def at(self, iteration: int, progress: float) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return min(1.0, (iteration + 1) / self.warmup) * (self.end + (self.start - self.end) * cosine)


@dataclass(frozen=True)
class Fit:
    """What a loop did. `losses` holds (iteration, mean loss since the entry before)."""

    iterations: int
    seconds: float
    per_second: float
    losses: list[tuple[int, float]]


class Average:
    """Exponential moving average of the parameters of `modules`."""

    def __init__(self, modules: Iterable[nn.Module], decay: float) -> None:
        self.parameters = [parameter for module in modules for parameter in module.parameters()]
        self.shadow = [parameter.detach().clone() for parameter in self.parameters]
        self.decay = decay

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        # A short memory at first: the random start must not linger in the average.
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(self.shadow, [parameter.detach() for parameter in self.parameters], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Writes the average into the modules."""
        for parameter, value in zip(self.parameters, self.shadow, strict=True):
            parameter.copy_(value)


def optimiser(modules: Iterable[nn.Module], betas: tuple[float, float], decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters of `modules`; on a GPU it is fused and takes its rate from a tensor, for `Replay`."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    rate, gpu = torch.zeros((), device=parameters[0].device), parameters[0].is_cuda
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, weight_decay=decay, fused=gpu, capturable=gpu)


def advance(adam: torch.optim.AdamW, loss: Callable[[], Tensor]) -> Tensor:
    """One iteration: loss, gradients, clipping, step. Returns the loss."""
    value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(adam.param_groups[0]["params"], 1.0)
    adam.step()
    adam.zero_grad(set_to_none=True)
    return value.detach()


class Replay:
    """`advance` as a CUDA graph: on a small model the GPU waits for launches more than it computes.

    It runs as it is at first and is captured then. `loss` must always do the same with tensors of the same shapes and
    never wait for the GPU. Graphs may share a `pool`: they run one at a time, and only their losses outlive them.
    """

    def __init__(self, adam: torch.optim.AdamW, loss: Callable[[], Tensor], pool: tuple[int, int]) -> None:
        self.adam, self.loss, self.pool = adam, loss, pool
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> Tensor:
        self.calls += 1
        if self.calls <= SETTLING:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                value = advance(self.adam, self.loss)
            torch.cuda.current_stream().wait_stream(side)
            return value
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=self.pool):
                self.value = advance(self.adam, self.loss)
        self.graph.replay()
        return self.value.clone()


def fit(
    label: str,
    adam: torch.optim.AdamW,
    step: Callable[[float], Tensor],
    iterations: int,
    rate: Rate,
    average: Average | None = None,
    seconds: float | None = None,
) -> Fit:
    """Runs `iterations` of `step`.

    Args:
        step: the done share of the training -> the loss, after one `advance` or `Replay`.
        seconds: ends earlier when the time is over. The rate follows whichever is further, iterations or
            time, so the loop always ends at its lowest rate; the result then depends on the machine's speed.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    group = adam.param_groups[0]
    device = group["params"][0].device
    unread: list[Tensor] = []
    losses: list[tuple[int, float]] = []
    began = settled = time.perf_counter()
    done = 0
    bar = tqdm(total=iterations, desc=label, mininterval=5, maxinterval=20)
    for iteration in range(iterations):
        spent = (time.perf_counter() - began) / seconds if seconds else 0.0
        if spent >= 1:
            break
        progress = max(iteration / iterations, spent)
        group["lr"].fill_(rate.at(iteration, progress))
        loss = step(progress)
        if average is not None:
            average.update(iteration)
        unread.append(loss)
        done = iteration + 1
        bar.update()
        if done == SETTLING:
            _wait(device)
            settled = time.perf_counter()
        if len(unread) == READ_EVERY or done == iterations:
            losses.append((done, _read(unread, label, done)))
            bar.set_postfix(loss=f"{losses[-1][1]:.4f}", refresh=False)
    if unread:
        losses.append((done, _read(unread, label, done)))
    _wait(device)
    bar.close()
    end = time.perf_counter()
    return Fit(done, end - began, max(done - SETTLING, 0) / max(end - settled, 1e-9), losses)


def fit_averaged(
    label: str,
    modules: Sequence[nn.Module],
    step: Callable[[torch.optim.AdamW], Callable[[float], Tensor]],
    iterations: int,
    rate: Rate,
    seconds: float | None,
) -> Fit:
    """Trains denoisers: `fit` with AdamW over all of `modules`, which are left with their moving average.

    Args:
        step: makes the step of `fit` for the optimiser.
    """
    adam = optimiser(modules, betas=(0.9, 0.99), decay=0.01)
    average = Average(modules, decay=0.999)
    for module in modules:
        module.train()
    result = fit(label, adam, step(adam), iterations, rate, average, seconds)
    average.apply()
    for module in modules:
        module.eval()
    return result


def _read(unread: list[Tensor], label: str, iteration: int) -> float:
    loss = float(torch.stack(unread).mean())
    unread.clear()
    if not math.isfinite(loss):
        raise FloatingPointError(f"{label}: the loss is {loss} at iteration {iteration}; lower the learning rate")
    return loss


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
