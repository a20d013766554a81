"""The three verbs: apply a method to a pipeline, remove it, and tell what it does."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from fastdiff_kernels import Grid, InvalidInputError

from .schedule import DenseSchedule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import nn

    from fastdiff_kernels import TokenLayout
    from fastdiff_patches.attachment import Attachment
    from fastdiff_patches.planner import Planner

    from .methods.base import MethodConfig
    from .overview import Summary

_logger = logging.getLogger("fastdiff")
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """What a model was patched with; two pipelines that share the model must agree on it."""

    config: MethodConfig
    schedule: DenseSchedule
    backend: str
    layout: Callable[[Mapping[str, Any]], TokenLayout] | None = None
    modules: str | None = None
    preset: str | None = None


def apply(
    pipe_or_model: T,
    config: MethodConfig | dict[str, Any] | str | Path,
    *,
    dense_steps: int | float | list[int] | None = None,
    dense_layers: int | float | list[int] | None = None,
    schedule: DenseSchedule | None = None,
    backend: str = "auto",
    layout: Callable[[Mapping[str, Any]], TokenLayout] | None = None,
    modules: str | None = None,
) -> T:
    """Makes the self-attention of a diffusers pipeline sparse, in place.

    Weights, cross-attention and the pipeline itself stay as they are. Frame count, height and width are read from
    each call, so one `apply` serves every size. A second `apply` replaces the first.

    Args:
        pipe_or_model: A diffusers pipeline (its `transformer` and, if it has one, its `transformer_2`, or its
            `unet`), or such a model alone.
        config: The method and its settings, for example `RadialConfig(decay_factor=0.2)`
            (Radial Attention, arXiv 2506.19852), or the same as a dict, as JSON text or as the path of a JSON file. A
            method's name, such as `"radial"`, takes the settings that were published for this family, dense steps and
            layers too, and logs which; `fastdiff.presets()` lists them, and their names are taken as well.
        dense_steps: Denoising steps that stay dense: the first n, a first share of all (`0.25`), or a list of indices,
            negative ones from the end. More is slower and safer. Needs a pipeline, whose scheduler tells the step.
            By default none, or those of the preset.
        dense_layers: The same for self-attention layers.
        schedule: Both at once, and what else a `DenseSchedule` can say: the last steps, every n-th step.
        backend: "auto" (Triton on a GPU, torch elsewhere), "triton", "torch", "reference" (slow, for tests), or of
            other libraries "flex" and "fa4", see `fastdiff doctor`.
        layout: For a model that no family describes: a function of its forward's arguments, by name, that returns the
            `TokenLayout` of its self-attention. Called before each forward; read shapes, since contents wait for the
            device. For example, for pictures whose pixels are the tokens, behind 77 text tokens:
            `lambda inputs: TokenLayout.self_attention(Grid(1, *inputs["hidden_states"].shape[-2:]), text_before=77)`.
        modules: Regular expression for the full names of the self-attention modules. Left out, they are the family's,
            or, with `layout` alone, those whose calls have as many query and as many key tokens as the layout;
            `dense_layers` then counts all attention modules.

    Returns:
        Its first argument.

    Raises:
        InvalidInputError: If a setting is out of range, if `dense_steps` or a config that changes with the step is
            given without a pipeline, if nothing is published under a name for this family, or if another live pipeline
            shares the model and uses other settings.
        UnsupportedError: If neither a family nor `layout` describes the model, or it cannot supply what the method
            needs.
    """
    from fastdiff_patches import attachment, locate, marker

    settings = settings_from(config, dense_steps, dense_layers, backend, schedule, pipe_or_model)
    settings = replace(settings, layout=layout, modules=modules)
    pipe = pipeline_of(pipe_or_model, settings)
    models = locate.transformers(pipe_or_model)
    planner = settings.config.planner()
    # All are built before any is installed: what cannot be done leaves the pipeline as it was.
    with contextlib.ExitStack() as stack:
        for model in models.values():
            stack.enter_context(marker.unmarked(model))
        joins = [model for model in models.values() if _shared(pipe, model, settings)]
        built = [(model, attach(model, settings, planner, pipe)) for model in models.values() if model not in joins]
    for model in joins:
        attachment.find(model).steps.add(pipe)
    for model, attached in built:
        before = attachment.find(model)
        if before is not None:
            _logger.warning("%s was patched already: replaced by %s.", type(model).__name__, settings.config)
        attached.install(model)
    return pipe_or_model


def remove(pipe_or_model: T) -> T:
    """Undoes `apply`, bit for bit: the original processor objects stand where they stood. Without effect otherwise.

    Processors of ours that somebody has set again since, as code that swaps processors for a call and puts back what it
    found, become stock ones.

    Args:
        pipe_or_model: What `apply` was given, or any pipeline or model that holds the same transformers.

    Returns:
        Its argument.

    Raises:
        InvalidInputError: If this is neither a model nor a pipeline with a transformer.
    """
    from fastdiff_patches import attachment, locate, marker, seam

    for model in locate.transformers(pipe_or_model).values():
        marker.unmark(model)
        attached = attachment.find(model)
        if attached is not None:
            attached.remove()
        for module in model.modules():
            if seam.adopted(getattr(module, "processor", None)):
                module.processor = seam.stock(module.processor)
    return pipe_or_model


def summary(pipe_or_model: Any, grid: Grid | str | None = None, steps: int | None = None) -> Summary:
    """What is patched: layers, density, backend, and what stays dense and why. Print it, or take `to_dict()`.

    Density is known for the grids that have run. Before a run it is computed for `grid`.

    Args:
        pipe_or_model: A pipeline or a model, patched or not.
        grid: Frames x height x width of tokens to compute the density for, for example "21x45x80" (81 frames at
            1280x720 in Wan); by default those of the last run.
        steps: Number of denoising steps for the mean over steps; by default that of the last run.

    Raises:
        InvalidInputError: If the grid is no grid, steps no number of steps, or this is neither a model nor a pipeline
            with a transformer; or if a calibration cannot be read any more.
    """
    from fastdiff_patches import attachment, locate

    from .methods.base import is_whole
    from .overview import summarize

    if isinstance(grid, str):
        grid = Grid.parse(grid)
    if not isinstance(grid, Grid | None):
        raise InvalidInputError(f"grid is {grid!r}; give a Grid, or text such as '21x45x80'.")
    if steps is not None and not is_whole(steps, 1):
        raise InvalidInputError(f"steps is {steps!r}; give a whole number from 1.")
    models = locate.transformers(pipe_or_model)
    return summarize({name: (model, attachment.find(model)) for name, model in models.items()}, grid, steps)


def pipeline_of(pipe_or_model: Any, settings: Settings) -> Any | None:
    """The pipeline whose scheduler tells the step, None for a bare model.

    Raises:
        InvalidInputError: If there is none and the settings need it.
    """
    if hasattr(pipe_or_model, "scheduler"):
        return pipe_or_model
    name = type(pipe_or_model).__name__
    if settings.schedule.uses_steps:
        raise InvalidInputError(
            f"{settings.schedule} names steps and {name} has no scheduler to tell the step; give the pipeline instead "
            "of the model, or leave steps out."
        )
    if settings.config.uses_steps:
        raise InvalidInputError(
            f"{settings.config.to_json()} changes with the denoising step and {name} has no scheduler to tell it; give "
            "the pipeline instead of the model, or settings that are the same in all steps."
        )
    return None


def attach(model: nn.Module, settings: Settings, planner: Planner, pipe: Any | None) -> Attachment:
    """A method for one model, not installed yet; pipelines that shared the one before share this one too."""
    from fastdiff_patches.attachment import Attachment, find
    from fastdiff_patches.families import family_of
    from fastdiff_patches.steps import StepReader

    from .advice import tell_gain, tell_training

    family = family_of(model, settings.layout, settings.modules)
    before = find(model)
    known = before.steps.pipes() if before is not None and pipe is not None else []
    steps = StepReader([*known, *([pipe] if pipe is not None else [])])
    attached = Attachment(
        model,
        planner,
        settings.schedule,
        steps,
        backend=settings.backend,
        settings=settings,
        family=family,
        tell=tell_gain,
    )
    if before is None or before.settings.config != settings.config:
        tell_training(model, family, settings.config)
    return attached


def settings_from(
    config: Any,
    dense_steps: Any,
    dense_layers: Any,
    backend: str,
    schedule: DenseSchedule | None = None,
    pipe_or_model: Any = None,
) -> Settings:
    """Checks what a user gave; None stands for what was left out. The name of a preset needs a pipeline or a model.

    Raises:
        InvalidInputError: If one of them is out of range, or what stays dense is said twice.
        MissingDependencyError: If the backend is not installed.
    """
    from fastdiff_kernels.attention import require_backend

    from . import published
    from .methods import load_config

    require_backend(backend)
    told = {"first_steps": dense_steps, "layers": dense_layers}
    told = {name: value for name, value in told.items() if value is not None}
    if schedule is not None and (not isinstance(schedule, DenseSchedule) or DenseSchedule(**told) != DenseSchedule()):
        raise InvalidInputError(
            f"schedule is {schedule!r} beside dense_steps={dense_steps!r} and dense_layers={dense_layers!r}; give a "
            "DenseSchedule alone, or those two."
        )
    if pipe_or_model is None or not published.is_name(config):
        return Settings(load_config(config), DenseSchedule(**told) if schedule is None else schedule, backend)
    preset = published.choose(pipe_or_model, config)
    dense = replace(preset.schedule, **told) if schedule is None else schedule
    return Settings(preset.config, dense, backend, preset=preset.name)


def _shared(pipe: Any | None, model: nn.Module, settings: Settings) -> bool:
    """Whether another live pipeline already runs this model with the same settings.

    Raises:
        InvalidInputError: If it does so with other settings.
    """
    from fastdiff_patches import attachment

    attached = attachment.find(model)
    if pipe is None or attached is None:
        return False
    others = [other for other in attached.steps.pipes() if other is not pipe]
    if not others:
        return False
    if attached.settings == settings:
        return True
    raise InvalidInputError(
        f"another pipeline ({type(others[0]).__name__}) shares this {type(model).__name__} and uses it with "
        f"{attached.settings}; pipelines that share a model share one config. Call fastdiff.remove first, then apply "
        "the new one to each of them."
    )
