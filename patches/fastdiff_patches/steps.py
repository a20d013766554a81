"""Knows the current denoising step by reading the pipeline's scheduler; counts no calls and wraps nothing."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch

from fastdiff_kernels import InvalidInputError


class StepReader:
    """Reads (step, number of steps) from the scheduler of the pipeline that is running.

    Both experts of a Wan 2.2 pipeline read the same scheduler, so their steps are counted together, and several
    forwards in one step (classifier-free guidance) read the same number. The scheduler is looked up on each call,
    because users swap it. Pipelines are held weakly; the last scheduler strongly, because a pipeline made from
    another's components outlives it.
    """

    def __init__(self, pipes: Iterable[Any] = ()):
        self._pipes: list[weakref.ref] = []
        self._scheduler: Any = None
        for pipe in pipes:
            self.add(pipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> StepReader:
        # A copied pipeline's model reads the copy. A model copied alone is no longer one of the pipeline's that it
        # came from, and goes on reading the scheduler.
        copied = StepReader()
        copied._pipes = [weakref.ref(memo[id(pipe)]) for pipe in self.pipes() if id(pipe) in memo]
        copied._scheduler = memo.get(id(self._scheduler), self._scheduler)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"_pipes": [], "_scheduler": None}

    def add(self, pipe: Any) -> None:
        """Another pipeline that runs the same model."""
        if not any(known is pipe for known in self.pipes()):
            self._pipes.append(weakref.ref(pipe))
        self._scheduler = pipe.scheduler

    def pipes(self) -> list[Any]:
        """The pipelines that are still alive."""
        return [pipe for pipe in (reference() for reference in self._pipes) if pipe is not None]

    def scheduler(self) -> Any | None:
        """The scheduler in use, None without a pipeline.

        Raises:
            InvalidInputError: If pipelines share the model and not the scheduler.
        """
        found = {id(pipe.scheduler): pipe.scheduler for pipe in self.pipes()}
        if len(found) > 1:
            raise InvalidInputError(
                "several live pipelines share this model and have different schedulers, so the step is unknown; give "
                "them one scheduler object, or call fastdiff.remove and apply to the one in use."
            )
        for scheduler in found.values():
            self._scheduler = scheduler
        return self._scheduler

    def run(self) -> Any | None:
        """An object that stands for the denoising run: each run has its own list of timesteps. None without one."""
        return getattr(self.scheduler(), "timesteps", None)

    def read(self, timestep: torch.Tensor | float | None) -> tuple[int | None, int | None]:
        """The current step and the number of steps; (None, None) outside a denoising run.

        Args:
            timestep: What the model is called with. Only looked at while the scheduler has no `step_index`, which
                costs a synchronisation with the device.
        """
        scheduler = self.scheduler()
        # Before set_timesteps a scheduler lists all its training timesteps, which are no denoising run.
        if scheduler is None or getattr(scheduler, "num_inference_steps", None) is None:
            return None, None
        steps = len(scheduler.timesteps)
        step = _index(scheduler, timestep)
        return (step, steps) if step is not None and step < steps else (None, None)


def _index(scheduler: Any, timestep: torch.Tensor | float | None) -> int | None:
    step = getattr(scheduler, "step_index", None)
    if step is not None:
        return int(step)
    if timestep is None:
        return int(scheduler.begin_index or 0) if hasattr(scheduler, "step_index") else None
    # One timestep per frame or token: the reference frames of image-to-video stand at 0.
    now = torch.as_tensor(timestep).max()
    # As the model is called: some pipelines hand timesteps over in half precision.
    listed = torch.as_tensor(scheduler.timesteps).to(now.device, now.dtype)
    places = (listed == now).nonzero().flatten().tolist()
    if hasattr(scheduler, "step_index"):
        # The first step of a run, or any where the pipeline steps copies of the scheduler (SkyReels-V2, diffusion
        # forcing). Some models are called with timesteps of another scale, which are none of those listed.
        return places[0] if places else int(scheduler.begin_index or 0)
    # PNDM visits a timestep several times, and counts. A timestep that is not listed is none of a run, but training.
    counted = getattr(scheduler, "counter", None)
    return counted if counted in places else next(iter(places), None)
