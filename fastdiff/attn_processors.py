"""The door of diffusers' own `set_attn_processor`: a dict of the model's processors, and single objects.

(Not named `processors`: importing a module of that name would hide the public function `fastdiff.processors`.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from fastdiff_kernels import InvalidInputError, UnsupportedError
from fastdiff_patches import locate
from fastdiff_patches.marker import Marker, unmarked

from .api import attach, pipeline_of, settings_from
from .methods import METHODS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from .methods.base import MethodConfig
    from .schedule import DenseSchedule

_DOORS = (
    "Use pipe.transformer.set_attn_processor(fastdiff.processors(pipe, config, dense_steps=...)), or "
    "fastdiff.apply(pipe, config, dense_steps=...)."
)


def processors(
    pipe_or_model: Any,
    config: MethodConfig | dict[str, Any] | str | Path,
    *,
    dense_steps: int | float | list[int] | None = None,
    dense_layers: int | float | list[int] | None = None,
    schedule: DenseSchedule | None = None,
    backend: str = "auto",
    component: str | None = None,
) -> dict[str, Any]:
    """Processors for `pipe.transformer.set_attn_processor(...)` or `pipe.unet`, with the result of `fastdiff.apply`.

    The self-attention ones are the model's own processors made sparse, all others are the very objects that the
    model holds. The dict belongs to this model; `fastdiff.remove` puts the originals back. What was applied to the
    model before is removed.

    Args:
        pipe_or_model: A diffusers pipeline, or a model alone.
        config: The method, as for `fastdiff.apply`.
        dense_steps: Denoising steps that stay dense, as for `fastdiff.apply`. Needs a pipeline.
        dense_layers: Layers that stay dense.
        schedule: Both at once, and what else a `DenseSchedule` can say.
        backend: As for `fastdiff.apply`.
        component: Which of a pipeline's two transformers (Wan 2.2), "transformer" or "transformer_2"; each needs a
            dict of its own. Left out where a pipeline has one model.

    Returns:
        A processor for each name in `model.attn_processors`.

    Raises:
        InvalidInputError: If a setting is out of range, `dense_steps` or a config that changes with the step is given
            without a pipeline, or the component is not clear.
        UnsupportedError: If the model has no `set_attn_processor` or its family is not described.
    """
    settings = settings_from(config, dense_steps, dense_layers, backend, schedule, pipe_or_model)
    pipe = pipeline_of(pipe_or_model, settings)
    model = _component(pipe_or_model, component)
    if not hasattr(model, "attn_processors"):
        raise UnsupportedError(f"{type(model).__name__} has no set_attn_processor; use fastdiff.apply(pipe, config).")
    with unmarked(model):
        attached = attach(model, settings, settings.config.planner(), pipe)
    attached.watch(model)
    ours = {f"{binding.name}.processor": binding.adopted for binding in attached.bindings}
    return {name: ours.get(name.replace("_orig_mod.", ""), stock) for name, stock in model.attn_processors.items()}


class MethodAttnProcessor(Marker):
    """A method as one object for `model.set_attn_processor(...)`; each method has a class of its own below.

    Stands for `fastdiff.apply(model, config)`: before the first forward the model's stock processors are built again
    and those of its self-attention are made sparse; cross-attention stays as it was. The object knows no pipeline,
    hence no denoising steps.

    Args:
        config: The method's config; or leave it out and give its fields by name (`decay_factor=0.2`).
        dense_layers: Layers that stay dense, as for `fastdiff.apply`.
        backend: "auto", "triton", "torch" or "reference"; "flex" and "fa4" where they are installed.
        dense_steps: Not possible here.

    Raises:
        InvalidInputError: If `dense_steps` or a config that changes with the step is given, or both a config and its
            fields.
    """

    method: ClassVar[str]

    def __init__(
        self,
        config: MethodConfig | None = None,
        *,
        dense_layers: int | float | list[int] = 0,
        backend: str = "auto",
        dense_steps: int | list[int] | None = None,
        **fields: Any,
    ):
        if dense_steps is not None:
            raise InvalidInputError(
                f"dense_steps is {dense_steps!r}; a processor object knows no scheduler to tell the step. {_DOORS}"
            )
        if config is not None and fields:
            raise InvalidInputError(f"both config and {', '.join(fields)} were given; give one or the other.")
        kind = METHODS[self.method]
        if config is None:
            config = _from_fields(kind, fields)
        if not isinstance(config, kind):
            raise InvalidInputError(f"config is {config!r}; give a {kind.__name__}.")
        if config.uses_steps:
            raise InvalidInputError(
                f"{config.to_json()} changes with the denoising step; a processor object knows no scheduler to tell "
                f"it. {_DOORS}"
            )
        self.settings = settings_from(config, None, dense_layers, backend)
        super().__init__()

    def attach(self, model: nn.Module) -> None:
        """Does what `fastdiff.apply(model, config)` does."""
        planner = self.settings.config.planner()
        attach(model, self.settings, planner, None).install(model)


class RadialAttnProcessor(MethodAttnProcessor):
    """Radial attention as one object (arXiv 2506.19852); takes a `RadialConfig` or its fields."""

    method = "radial"


class NeighborhoodAttnProcessor(MethodAttnProcessor):
    """Neighborhood attention as one object (arXiv 2504.16922); takes a `NeighborhoodConfig` or its fields."""

    method = "neighborhood"


class ClearAttnProcessor(MethodAttnProcessor):
    """CLEAR as one object (arXiv 2412.16112); takes a `ClearConfig` or its fields."""

    method = "clear"


class ParoAttnProcessor(MethodAttnProcessor):
    """PARO as one object (arXiv 2506.16054); takes a `ParoConfig` or its fields."""

    method = "paro"


class AgentAttnProcessor(MethodAttnProcessor):
    """Agent attention as one object (arXiv 2312.08874); takes an `AgentConfig` or its fields.

    Its agents must work in all steps: `steps=(0, 1)`.
    """

    method = "agent"


class RulesAttnProcessor(MethodAttnProcessor):
    """Rules as one object; takes a `RulesConfig` or its `rules`, none of which may name steps."""

    method = "rules"


def _from_fields(kind: type[MethodConfig], fields: dict[str, Any]) -> MethodConfig:
    try:
        return kind(**fields)
    except TypeError as error:
        raise InvalidInputError(f"{error}; see {kind.__name__} for the names of its fields.") from None


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
