"""The door of diffusers' own `set_attn_processor`: a dict of the model's processors, and single objects.

(Not named `processors`: importing a module of that name would hide the public function `fastdiff.processors`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastdiff_kernels import InvalidInputError, UnsupportedError
from fastdiff_patches import locate
from fastdiff_patches.marker import Marker, unmarked

from .api import attach, pipeline_of, settings_from
from .methods import RadialConfig, planner_for

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from .methods.base import MethodConfig


def processors(
    pipe_or_model: Any,
    config: MethodConfig | dict[str, Any] | str | Path,
    *,
    dense_steps: int | list[int] = 0,
    dense_layers: int | list[int] = 0,
    backend: str = "auto",
    component: str | None = None,
) -> dict[str, Any]:
    """Processors for `pipe.transformer.set_attn_processor(...)`, with the same result as `fastdiff.apply`.

    The self-attention ones are the model's own processors made sparse, all others are the very objects that the
    model holds. The dict belongs to this model; `fastdiff.remove` puts the originals back. What was applied to the
    model before is removed.

    Args:
        pipe_or_model: A diffusers pipeline, or a model alone.
        config: The method, as for `fastdiff.apply`.
        dense_steps: Denoising steps that stay dense, as for `fastdiff.apply`. Needs a pipeline.
        dense_layers: Layers that stay dense.
        backend: "auto", "triton", "torch" or "reference".
        component: Which of a pipeline's two transformers (Wan 2.2), "transformer" or "transformer_2"; each needs a
            dict of its own.

    Returns:
        A processor for each name in `model.attn_processors`.

    Raises:
        InvalidInputError: If a setting is out of range, `dense_steps` is given without a pipeline, or the component
            is not clear.
        UnsupportedError: If the model has no `set_attn_processor` or its family is not described.
    """
    settings = settings_from(config, dense_steps, dense_layers, backend)
    pipe = pipeline_of(pipe_or_model, settings.schedule)
    model = _component(pipe_or_model, component)
    if not hasattr(model, "attn_processors"):
        raise UnsupportedError(f"{type(model).__name__} has no set_attn_processor; use fastdiff.apply(pipe, config).")
    with unmarked(model):
        attached = attach(model, settings, planner_for(settings.config), pipe)
    attached.watch(model)
    ours = {f"{binding.name}.processor": binding.adopted for binding in attached.bindings}
    return {name: ours.get(name.replace("_orig_mod.", ""), stock) for name, stock in model.attn_processors.items()}


class RadialAttnProcessor(Marker):
    """Radial attention as one object for `model.set_attn_processor(...)` (arXiv 2506.19852).

    Stands for `fastdiff.apply(model, RadialConfig(...))`: before the first forward the model's stock processors are
    built again and those of its self-attention are made sparse; cross-attention stays as it was. The object knows
    no pipeline, hence no denoising steps.

    Args:
        config: A `RadialConfig`; or leave it out and give its fields by name (`decay_factor=0.2`).
        dense_layers: Layers that stay dense, as for `fastdiff.apply`.
        backend: "auto", "triton", "torch" or "reference".
        dense_steps: Not possible here.

    Raises:
        InvalidInputError: If `dense_steps` is given, or both a config and its fields.
    """

    def __init__(
        self,
        config: RadialConfig | None = None,
        *,
        dense_layers: int | list[int] = 0,
        backend: str = "auto",
        dense_steps: int | list[int] | None = None,
        **fields: Any,
    ):
        if dense_steps is not None:
            raise InvalidInputError(
                f"dense_steps is {dense_steps!r}; a processor object knows no scheduler to tell the step. Use "
                "pipe.transformer.set_attn_processor(fastdiff.processors(pipe, config, dense_steps=...)), or "
                "fastdiff.apply(pipe, config, dense_steps=...)."
            )
        if config is not None and fields:
            raise InvalidInputError(f"both config and {', '.join(fields)} were given; give one or the other.")
        if not isinstance(config, RadialConfig | None):
            raise InvalidInputError(f"config is {config!r}; give a RadialConfig.")
        self.settings = settings_from(config or _radial(fields), 0, dense_layers, backend)
        super().__init__()

    def attach(self, model: nn.Module) -> None:
        """Does what `fastdiff.apply(model, config)` does."""
        planner = planner_for(self.settings.config)
        attach(model, self.settings, planner, None).install(model)


def _radial(fields: dict[str, Any]) -> RadialConfig:
    try:
        return RadialConfig(**fields)
    except TypeError as error:
        raise InvalidInputError(f"{error}; see RadialConfig for the names of its fields.") from None


def _component(pipe_or_model: Any, component: str | None) -> nn.Module:
    models = locate.transformers(pipe_or_model)
    if component is None and len(models) == 1:
        return next(iter(models.values()))
    if component not in models:
        raise InvalidInputError(
            f"component is {component!r}; {type(pipe_or_model).__name__} has {', '.join(models)}, each with processors "
            "of its own. Name one."
        )
    return models[component]
