"""One generation, timed, with its progress shown."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdiff_kernels.errors import NotFiniteError

from . import sizes
from .pipelines import Job
from .screen import stage

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Run:
    """A finished generation.

    Attributes:
        frames: `[frames, 3, height, width]`, float32 on the CPU, in [0, 1]; a picture is one frame.
        seconds: The whole pipeline call: text, denoising, decoding.
        step_seconds: The denoising steps one by one; the first also pays for the text encoder.
    """

    frames: torch.Tensor
    seconds: float
    step_seconds: tuple[float, ...]

    def timed(self, steps: Sequence[int] = ()) -> list[float]:
        """The times of some steps, by default of all; without the first, if there are others."""
        chosen = [time for step, time in enumerate(self.step_seconds) if step in steps or not steps]
        return (chosen[1:] if 0 in steps or not steps else chosen) or chosen or [self.seconds]

    def seconds_per_step(self, steps: Sequence[int] = ()) -> float:
        """Median over such steps."""
        return statistics.median(self.timed(steps))


def generate_once(pipe: Any, job: Job, title: str) -> Run:
    """Runs the pipeline once.

    Raises:
        NotFiniteError: If the result has values that are not finite.
    """
    import torch

    from fastdiff.measure.timing import synchronize

    marks: list[float] = []
    with stage(title, total=job.steps) as shown:

        def on_step_end(_pipe, _step, _timestep, tensors):
            synchronize(pipe.device)
            marks.append(time.perf_counter())
            shown.advance()
            if len(marks) == job.steps:
                shown.rename(f"{title}, decoding")
            return tensors

        start = time.perf_counter()
        made = call(pipe, job, output_type="pt", callback_on_step_end=on_step_end)
        frames = made.frames[0] if job.is_video else made.images
        synchronize(pipe.device)
        seconds = time.perf_counter() - start
    frames = frames.detach().float().cpu()
    if not bool(torch.isfinite(frames).all()):
        raise NotFiniteError(f"{title}: the result has values that are not finite; try --dtype float32.")
    steps = tuple(after - before for before, after in zip([start, *marks], marks, strict=False))
    return Run(frames.clamp(0, 1), seconds, steps)


def warm_up(pipe: Any, job: Job) -> None:
    """One step whose result is dropped: allocations, compilation and plans are not timed later."""
    # A GPU also picks its convolutions at the first decoding; a CPU would only do the work twice.
    call(pipe, job, num_inference_steps=1, output_type="latent" if pipe.device.type == "cpu" else "pt")


def call(pipe: Any, job: Job, **more) -> Any:
    """Calls the pipeline as a job says; `more` comes on top or instead."""
    import torch

    # On the CPU, so that a seed means the same noise on every device.
    generator = torch.Generator("cpu").manual_seed(job.seed)
    return pipe(**arguments(pipe, job, **{"prompt": job.prompt, "generator": generator, **more}))


def arguments(pipe: Any, job: Job, **more) -> dict[str, Any]:
    """What the pipeline is called with for a job, without prompt and noise; of `more`, what it knows."""
    wanted = {
        "height": job.height,
        "width": job.width,
        sizes.frames_argument(pipe): job.num_frames,
        "num_inference_steps": job.steps,
        "guidance_scale": job.guidance_scale,
        **job.call,
        **more,
    }
    known = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in wanted.items() if name in known and value is not None}
