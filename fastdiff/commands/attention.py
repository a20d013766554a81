"""A request's method on a pipeline, for the length of one run, and what is to be said of it afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdiff.assets import EMBEDDED

from .options import Request, defaults_for, settings_for
from .pipelines import Job
from .running import arguments, warm_up
from .screen import stage
from .sizes import LayerShape, finest_layer

# What a model shows while PARO is calibrated; the second where the first is what shall be made.
_WORLD = ("a blue square and a green ring over a striped ground", "a red triangle and a yellow circle")
_ANYTHING = ("a street with people, cars and trees on a sunny day", "a cat on a sofa by a window")
_GROUPS = 4


@dataclass(frozen=True)
class SparseAttention:
    """What a run computes.

    Attributes:
        config: The method's config, None for dense attention.
        planner: The method at work, None for dense attention.
        density: Of the layers and steps that are sparse. Layers of different sizes count by their scores.
        mean_density: Over all steps and layers.
        sparse_steps: The steps in which some layer is sparse.
        backend: The backend that runs.
        layer: The first of the layers with the most tokens that are sparse in some step.
    """

    config: Any = None
    planner: Any = None
    density: float = 1.0
    mean_density: float = 1.0
    sparse_steps: tuple[int, ...] = ()
    dense_steps: int | list[int] = 0
    dense_layers: int | list[int] = 0
    backend: str | None = None
    layer: LayerShape | None = None

    def to_dict(self, made_in: Path, kept_in: Path) -> dict[str, Any]:
        """As a report has it.

        Args:
            made_in: Folder of a calibration that was made for this run.
            kept_in: Where that is going to stand.
        """
        config = None if self.config is None else self.config.to_dict()
        if config and Path(config.get("calibration", "")).parent == made_in:
            config["calibration"] = str(kept_in / Path(config["calibration"]).name)
        return {
            "config": config,
            "density": self.density,
            "mean_density": self.mean_density,
            "sparse_steps": list(self.sparse_steps),
            "dense_steps": self.dense_steps,
            "dense_layers": self.dense_layers,
            "backend": self.backend,
        }


def config_for(pipe: Any, request: Request, job: Job, calibration: Path) -> Any:
    """The method's config: as given, else solved for the wanted density on the layers with the most tokens.

    Args:
        calibration: Where a calibration is kept, if the method needs one and none was given.

    Raises:
        FastDiffError: If this size does not allow the density, or the model cannot take the method.
    """
    if request.method == "dense":
        return None
    if request.preset is not None:
        from fastdiff.published import choose

        return choose(pipe, request.preset).config
    if request.method == "paro" and request.config is None:
        prompts = _WORLD if request.model in EMBEDDED else _ANYTHING
        prompt = next(prompt for prompt in prompts if prompt != job.prompt)
        with stage(f"Calibrating paro by a dense run of “{prompt}”"):
            return calibrated(pipe, job, request.solve_for, [prompt], calibration)
    from fastdiff_kernels import InvalidInputError

    layout = finest_layer(pipe, job.grid, job.text_tokens).layout
    try:
        return settings_for(request.method, request.config, request.solve_for, layout.grid, job.text_tokens)
    except InvalidInputError as error:
        if request.density is not None or request.solve_for is None:
            raise
        raise InvalidInputError(
            f"{error} That density is the default for {request.model}; --density or --config says another."
        ) from error


def calibrated(pipe: Any, job: Job, density: float, prompts: list[str], path: Path) -> Any:
    """PARO's config for the size and the steps of a job; every prompt is run dense once.

    Raises:
        FastDiffError: If the model or the size cannot be calibrated at this density.
    """
    from fastdiff.calibration import calibrate

    groups = min(_GROUPS, job.steps)
    return calibrate(
        pipe, prompts, path=path, density=density, groups=groups, seed=job.seed + 1, **arguments(pipe, job)
    )


@contextlib.contextmanager
def sparse_attention(pipe: Any, request: Request, job: Job, config: Any) -> Iterator[SparseAttention]:
    """Applies a method while the body runs; leaves the pipeline alone for the method `dense`.

    Args:
        config: The method's config, None for `dense`.

    Raises:
        FastDiffError: If the config does not fit, or the model cannot take the method.
    """
    import fastdiff

    if config is None:
        yield SparseAttention()
        return
    kept = {"dense_steps": _dense_steps(request, job, config), "dense_layers": request.dense_layers}
    fastdiff.apply(pipe, config, **kept)
    try:
        yield _described(pipe, job, config, kept)
    finally:
        fastdiff.remove(pipe)


def warm_up_sparse(pipe: Any, job: Job, config: Any) -> None:
    """A step under a method, one for each method of rules, no step and no layer dense; its result is dropped."""
    import fastdiff

    for part in config.in_one_step():
        fastdiff.apply(pipe, part)
        try:
            warm_up(pipe, job)
        finally:
            fastdiff.remove(pipe)


def _dense_steps(request: Request, job: Job, config: Any) -> int | list[int]:
    from fastdiff import DenseSchedule

    if isinstance(request.dense_steps, float):
        return round(request.dense_steps * job.steps)
    if request.dense_steps is not None:
        DenseSchedule(request.dense_steps).check_steps(job.steps)
        return request.dense_steps
    return 0 if config.says_dense_steps else round(defaults_for(request.model).dense_share * job.steps)


def _described(pipe: Any, job: Job, config: Any, kept: dict[str, Any]) -> SparseAttention:
    import fastdiff
    from fastdiff_kernels import TokenLayout
    from fastdiff_patches import attachment, locate

    whole = TokenLayout.self_attention(job.grid, text_before=job.text_tokens)
    scores, sparse, computed, all_scores = 0, 0.0, 0.0, 0
    sparse_steps: set[int] = set()
    densities: dict[Any, float] = {None: 1.0}
    largest: LayerShape | None = None
    for model in locate.transformers(pipe).values():
        attached = attachment.find(model)
        places = attached.places(model.config, whole)
        # Step by step and in the order of the layers, as in a run.
        for step in range(job.steps):
            for layer in attached.layers:
                layout, coarse = places[layer.name]
                dense = coarse or attached.schedule.is_dense(step, job.steps, layer.index, attached.total)
                plan = None if dense else attached.plan(layer, layout, step, job.steps, pipe.device)
                size = layout.query_tokens * layout.key_tokens
                if plan not in densities:
                    densities[plan] = plan.density()
                computed, all_scores = computed + size * densities[plan], all_scores + size
                if plan is not None:
                    sparse_steps.add(step)
                    sparse, scores = sparse + size * densities[plan], scores + size
                    if largest is None or layout.query_tokens > largest.layout.query_tokens:
                        largest = LayerShape(layout, layer.index, layer.heads, layer.head_dim)
    return SparseAttention(
        config,
        attached.planner,
        sparse / scores if scores else 1.0,
        computed / all_scores,
        tuple(sorted(sparse_steps)),
        backend=fastdiff.summary(pipe).models[0].runs_on,
        layer=largest,
        **kept,
    )
