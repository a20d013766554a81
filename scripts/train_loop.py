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
# The first iterations compile and tune; speed is measured after them.
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
    """AdamW over all parameters of `modules`, fused on a GPU."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.AdamW(parameters, betas=betas, weight_decay=decay, fused=parameters[0].is_cuda)


def fit(
    label: str,
    adam: torch.optim.AdamW,
    step: Callable[[], Tensor],
    iterations: int,
    rate: Rate,
    average: Average | None = None,
    seconds: float | None = None,
) -> Fit:
    """Runs `iterations` of `step`, which returns the loss.

    Args:
        seconds: ends earlier when the time is over. The rate follows whichever is further, iterations or
            time, so the loop always ends at its lowest rate; the result then depends on the machine's speed.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    parameters = adam.param_groups[0]["params"]
    device = parameters[0].device
    unread: list[Tensor] = []
    losses: list[tuple[int, float]] = []
    began = settled = time.perf_counter()
    done = 0
    bar = tqdm(total=iterations, desc=label, mininterval=5, maxinterval=20)
    for iteration in range(iterations):
        spent = (time.perf_counter() - began) / seconds if seconds else 0.0
        if spent >= 1:
            break
        adam.param_groups[0]["lr"] = rate.at(iteration, max(iteration / iterations, spent))
        loss = step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        if average is not None:
            average.update(iteration)
        unread.append(loss.detach())
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
    step: Callable[[], Tensor],
    iterations: int,
    rate: Rate,
    seconds: float | None,
) -> Fit:
    """Trains denoisers: `fit` with AdamW over all of `modules`, which are left with their moving average."""
    adam = optimiser(modules, betas=(0.9, 0.99), decay=0.01)
    average = Average(modules, decay=0.999)
    for module in modules:
        module.train()
    result = fit(label, adam, step, iterations, rate, average, seconds)
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
