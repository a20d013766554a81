"""A request's method on a pipeline, for the length of one run, and what is to be said of it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .options import Request, settings_for
from .pipelines import Job


@dataclass(frozen=True)
class SparseAttention:
    """What a run computes.

    Attributes:
        config: The method's config, None for dense attention.
        density: Of a sparse layer at a sparse step.
        mean_density: Over all steps and layers.
        backend: The backend that runs.
    """

    config: Any = None
    density: float = 1.0
    mean_density: float = 1.0
    dense_steps: int | list[int] = 0
    dense_layers: int | list[int] = 0
    backend: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "config": None if self.config is None else self.config.to_dict(),
            "density": self.density,
            "mean_density": self.mean_density,
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "backend": self.backend,
        }


@contextlib.contextmanager
def sparse_attention(
    pipe: Any, request: Request, job: Job, config: Any = None, schedule: bool = True
) -> Iterator[SparseAttention]:
    """Applies the requested method while the body runs; leaves the pipeline alone for the method `dense`.

    Args:
        config: The method's config where it is known already; else it is made from the request.
        schedule: Whether the requested dense steps and layers are kept.

    Raises:
        FastDiffError: If the config does not fit, or the model cannot take the method.
    """
    import fastdiff

    if request.method == "dense":
        yield SparseAttention()
        return
    config = config or settings_for(request.method, request.config, density_of(request), job.grid)
    kept = {"dense_steps": _dense_steps(request, job), "dense_layers": request.dense_layers} if schedule else {}
    fastdiff.apply(pipe, config, **kept)
    try:
        yield _described(fastdiff.summary(pipe, grid=job.grid, steps=job.steps), config, kept)
    finally:
        fastdiff.remove(pipe)


def density_of(request: Request) -> float | None:
    """The density to solve for: as asked, else the model's default unless a config was given."""
    from .pipelines import defaults_for

    if request.density is not None or request.config is not None:
        return request.density
    return defaults_for(request.model).density


def _dense_steps(request: Request, job: Job) -> int | list[int]:
    from fastdiff import DenseSchedule

    from .pipelines import defaults_for

    if request.dense_steps is not None:
        DenseSchedule(request.dense_steps).check_steps(job.steps)
        return request.dense_steps
    return round(defaults_for(request.model).dense_share * job.steps)


def _described(summary: Any, config: Any, kept: dict[str, Any]) -> SparseAttention:
    models = summary.to_dict()["models"]
    sparse = [layer["density"] for model in models for layer in model["layers"] if not layer["dense"]]
    means = [model["mean_density"] for model in models if model["mean_density"] is not None]
    return SparseAttention(
        config,
        sum(sparse) / len(sparse) if sparse else 1.0,
        sum(means) / len(means) if means else 1.0,
        backend=models[0]["runs_on"],
        **kept,
    )
