"""Summary: what is patched, as data and as text. It reads attachments and never changes them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastdiff_kernels import FastDiffError, Grid

from .advice import dense_work, expected_gain

if TYPE_CHECKING:
    from fastdiff_patches.attachment import Attachment, Place
    from fastdiff_patches.processor import Layer


@dataclass(frozen=True)
class LayerSummary:
    """One self-attention layer.

    Attributes:
        dense: Whether the layer is dense in every step.
        why: Why the layer is sparse or dense.
        density: Computed tiles / (query tokens x key tokens), the mean over the steps that the schedule leaves
            sparse; 1.0 if the layer is always dense, None while no grid is known.
        grid: The layer's own grid, None while none is known.
    """

    index: int
    name: str
    heads: int
    head_dim: int
    dense: bool
    why: str
    density: float | None
    grid: str | None = None


@dataclass(frozen=True)
class ModelSummary:
    """One transformer or UNet.

    Attributes:
        component: Its name in the pipeline, or "model".
        config: The method's config as a dict, None if the model is not patched.
        schedule: What stays dense, as `DenseSchedule.to_dict` has it.
        backend: The backend that was asked for.
        runs_on: The backend that will run, on the device where the model is now.
        grids: Grids that have run, newest last.
        grid: The model's grid that the densities are for, None if none is known; the layers of a UNet have coarser
            ones.
        steps: Number of denoising steps that the mean is for, None if not known.
        layers: All self-attention layers.
        preset: The preset that the settings come from, None where they were given.
        marked: Whether a single processor object waits for the first forward.
        misfit: Why no layer is sparse where `layout=` fits no attention call.
        mean_density: Mean over layers and, where their number is known, steps; dense counts as 1. Layers of unequal
            grids count by their pairs of tokens. An expert of Wan 2.2 is counted as if it ran all steps.
        attention_share: Share of the scores in the FLOPs of a dense forward, estimated; None while no grid is known.
        gain: What a step that is sparse gains at most by these FLOPs.
    """

    component: str
    model: str
    family: str | None = None
    config: dict[str, Any] | None = None
    schedule: dict[str, Any] | None = None
    backend: str | None = None
    runs_on: str | None = None
    grids: tuple[str, ...] = ()
    grid: str | None = None
    steps: int | None = None
    layers: tuple[LayerSummary, ...] = ()
    mean_density: float | None = None
    attention_share: float | None = None
    gain: float | None = None
    marked: bool = False
    preset: str | None = None
    misfit: str | None = None

    def __str__(self) -> str:
        if self.marked:
            return f"{self.component} ({self.model}): marked by a processor object, patched at the first forward"
        if self.config is None:
            return f"{self.component} ({self.model}): not patched, attention is dense"
        lines = [
            f"{self.component} ({self.model}, family {self.family})",
            *([f"  preset    {self.preset}, see fastdiff.presets()"] if self.preset else []),
            f"  config    {json.dumps(self.config)}",
            f"  schedule  {json.dumps(self.schedule)}",
            f"  backend   {self.backend}, here {self.runs_on}",
            f"  grids     {', '.join(self.grids) or 'none has run yet'}",
            f"  density   {self._density_text()}",
        ]
        if self.gain is not None:
            share = f"self-attention is about {100 * self.attention_share:.0f} % of the FLOPs of a dense one"
            lines.append(f"  gain      at most {self.gain:.2f}x in a sparse step: {share}")
        lines.append("  layers")
        return "\n".join(
            lines + [f"    {text}" for text in _grouped(self.layers, self.grid) or [f"none: {self.misfit}"]]
        )

    def _density_text(self) -> str:
        if self.mean_density is None:
            return 'known after the first forward, or with summary(pipe, grid="frames x height x width")'
        over = f"layers and {self.steps} steps" if self.steps else "layers, at a sparse step"
        return f"{self.mean_density:.3f} mean over {over}, at {self.grid} tokens"


@dataclass(frozen=True)
class Summary:
    """What `fastdiff.summary` found, one entry for each transformer of the pipeline."""

    models: tuple[ModelSummary, ...]

    def __str__(self) -> str:
        return "\n".join(str(model) for model in self.models)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return dataclasses.asdict(self)


def summarize(
    models: Mapping[str, tuple[torch.nn.Module, Attachment | None]], grid: Grid | None, steps: int | None
) -> Summary:
    """Reads the attachments of models by component name."""
    from fastdiff_patches.marker import is_marked

    found = []
    for component, (model, attached) in models.items():
        if attached is None or is_marked(model):
            found.append(ModelSummary(component, type(model).__name__, marked=is_marked(model)))
        else:
            found.append(_one(component, model, attached, grid, steps))
    return Summary(tuple(found))


def _one(
    component: str, model: torch.nn.Module, attached: Attachment, grid: Grid | None, steps: int | None
) -> ModelSummary:
    settings, schedule = attached.settings, attached.settings.schedule
    layout = next(reversed(attached.seen), None)
    if grid is not None:
        layout = attached.family.forecast(grid, layout)
    places = {} if layout is None else attached.places(getattr(model, "config", None), layout)
    steps = steps or attached.steps_seen
    first = attached.layers[0] if attached.layers else None
    open_steps = [step for step in range(steps) if not schedule.is_dense_step(step, steps)] if steps else [None]
    # In the order of a run: step by step, and each step layer by layer.
    asked = open_steps if settings.config.uses_steps and open_steps else [None]
    densities = _densities(attached, places, asked, steps)
    layers = tuple(_layer(attached, layer, places, densities, asked, steps) for layer in attached.layers)
    mean = share = gain = None
    if layers and places:
        own = [places[layer.name].layout for layer in attached.layers]
        pairs = [layout.query_tokens * layout.key_tokens for layout in own]
        computed = sum(
            count * (1.0 if layer.dense else 1 + len(open_steps) / (steps or 1) * (layer.density - 1))
            for count, layer in zip(pairs, layers, strict=True)
        )
        mean = computed / sum(pairs)
        sparse = {layer.name: layer.density for layer in layers if not layer.dense}
        share, gain = expected_gain(*dense_work(model, attached, layout), sparse)
    return ModelSummary(
        component=component,
        model=type(model).__name__,
        family=attached.family.name,
        config=settings.config.to_dict(),
        schedule=schedule.to_dict(),
        backend=settings.backend,
        runs_on=first and _runs_on(attached, next(model.parameters()), first.head_dim),
        grids=tuple(str(seen.grid) for seen in attached.seen),
        grid=None if layout is None else str(layout.grid),
        steps=steps,
        layers=layers,
        mean_density=mean,
        attention_share=share,
        gain=gain,
        preset=settings.preset,
        misfit=None if layout is None else attached.misfit(layout),
    )


def _densities(
    attached: Attachment, places: Mapping[str, Place], asked: list[int | None], steps: int | None
) -> dict[str, list[float | None]]:
    """For each layer that may be sparse its density in each step that counts, None where the method is dense."""
    found: dict[str, list[float | None]] = {}
    for step in asked:
        for layer in attached.layers:
            place = places.get(layer.name)
            if place is None or _reason(attached, layer, place) is not None:
                continue
            plan = attached.plan(layer, place.layout, step, None if step is None else steps, "cpu")
            found.setdefault(layer.name, []).append(None if plan is None else plan.density())
    return found


def _reason(attached: Attachment, layer: Layer, place: Place | None) -> str | None:
    """Why a layer is dense whatever the method says."""
    if not attached.holds(layer):
        return "its processor is not fastdiff's: not set, or replaced"
    if attached.settings.schedule.is_dense_layer(layer.index, attached.total):
        return "named by dense_layers"
    return None if place is None else place.coarse


def _layer(
    attached: Attachment,
    layer: Layer,
    places: Mapping[str, Place],
    densities: Mapping[str, list[float | None]],
    asked: list[int | None],
    steps: int | None,
) -> LayerSummary:
    methods = _methods(attached, layer, asked, steps)
    place, found = places.get(layer.name), densities.get(layer.name)
    why, density = _reason(attached, layer, place), None
    if why is None and (methods == "dense" or (found is not None and all(step is None for step in found))):
        why = f"left dense by {attached.settings.config.method}"
    if why is not None:
        density = 1.0
    elif found is not None:
        density = sum(1.0 if step is None else step for step in found) / len(found)
    grid = None if place is None else str(place.layout.grid)
    known = (layer.index, layer.name, layer.heads, layer.head_dim)
    return LayerSummary(*known, why is not None, why or methods, density, grid)


def _methods(attached: Attachment, layer: Layer, asked: list[int | None], steps: int | None) -> str:
    """What decides in a layer in the steps that count; more than one method only under rules."""
    parts = (attached.settings.config.at(layer.index, attached.total, step, steps) for step in asked)
    return ", ".join(dict.fromkeys("dense" if part is None else part.method for part in parts))


def _runs_on(attached: Attachment, parameter: torch.Tensor, head_dim: int) -> str:
    try:
        return attached.planner.runs_on(attached.settings.backend, parameter.device, parameter.dtype, head_dim)
    except FastDiffError as error:
        return f"none: {error}"


def _grouped(layers: tuple[LayerSummary, ...], grid: str | None) -> list[str]:
    """One line for each run of neighbouring layers that differ in nothing but place."""
    lines: list[str] = []
    start = 0
    for end in range(1, len(layers) + 1):
        here = layers[start]
        if end < len(layers) and dataclasses.replace(layers[end], index=here.index, name=here.name) == here:
            continue
        last = layers[end - 1]
        place = here.name if end - start == 1 else f"{here.name} to {last.name}"
        state = "dense" if here.dense else "sparse"
        density = "density unknown" if here.density is None else f"density {here.density:.3f}"
        own = "" if here.grid == grid else f" at {here.grid} tokens"
        lines.append(f"{place}: {state} ({here.why}), {density}{own}, {here.heads} heads of {here.head_dim}")
        start = end
    return lines
