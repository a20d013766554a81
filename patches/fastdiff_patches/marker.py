"""Marker: one processor object for all modules of a model, which stands for a method until the first forward.

`set_attn_processor(one object)` reaches every attention module, cross-attention too, drops the stock processors and
tells the object neither the model nor the pipeline. So the object only marks the model; just before the model's
first forward its stock processors are built again and the method is attached as if it had been applied.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._dynamo.eval_frame import skip_code
from torch.nn.modules.module import register_module_forward_pre_hook

from fastdiff_kernels import InvalidInputError

from . import seam
from .attachment import find
from .families import find_family
from .locate import self_attention

_living: weakref.WeakSet[Marker] = weakref.WeakSet()
_hooks: list[torch.utils.hooks.RemovableHandle] = []


class Marker:
    """Base of the single processor objects; a method's own class says in `attach` what it stands for."""

    _attention_backend = None
    _parallel_config = None

    def __init__(self):
        _living.add(self)
        if not _hooks:
            _hooks.append(register_module_forward_pre_hook(_announce))
            _hooks.append(register_module_forward_pre_hook(_resolve))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        Marker.__init__(self)

    def attach(self, model: nn.Module) -> None:
        """Attaches the method to a model that has its stock processors again."""
        raise NotImplementedError

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
        image_rotary_emb: Any = None,
        temb: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        # Attention modules pass only the keyword arguments that this signature names.
        raise InvalidInputError(
            f"{type(self).__name__} was called on a module outside a supported model, so it could not be replaced by "
            "the model's own processors. Set it with set_attn_processor on a whole model of a supported family and "
            "call that model, or use fastdiff.apply(pipe, config)."
        )


def _disarm() -> None:
    # Not from a finaliser: that may run amidst a compilation, which has read the hooks already.
    while _hooks and not _living:
        _hooks.pop().remove()


def _markers(module: nn.Module) -> dict[nn.Module, Marker]:
    if find_family(module) is None:
        return {}
    found = ((part, getattr(part, "processor", None)) for part in module.modules())
    return {part: processor for part, processor in found if isinstance(processor, Marker)}


def _announce(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    """First global pre-hook: has the second one called with the keyword arguments, where it has work to do."""
    if torch.compiler.is_compiling() or kwargs is not None:
        return
    _ask_for_kwargs(module)


def _resolve(module: nn.Module, args: tuple, kwargs: dict[str, Any] | None = None) -> None:
    """Second global pre-hook: turns a marked model into a patched one and prepares its running forward."""
    if torch.compiler.is_compiling() or kwargs is None:
        return
    _patch(module, args, kwargs)


# Where a whole model is compiled, torch runs its hooks under the compiler but not in its graph, and would compile
# each as a function of its own: they must run as they are. Submodules' hooks are traced into the graph, which the
# usual torch.compiler.disable forbids; there they do nothing, since a marked model is resolved before its trace.
skip_code(_announce.__code__)
skip_code(_resolve.__code__)


@torch.compiler.disable
def _ask_for_kwargs(module: nn.Module) -> None:
    _disarm()
    if _hooks and _markers(module):
        # torch hands keyword arguments to hooks of one module and not to global ones, and hooks that are added
        # during a call miss that call.
        module._forward_pre_hooks_with_kwargs[_hooks[1].id] = True


@torch.compiler.disable
def _patch(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    module._forward_pre_hooks_with_kwargs.pop(_hooks[1].id, None)
    if _attach(module):
        # Before the model's own code is traced, so that its graph does not depend on these hooks.
        _disarm()
        find(module)(module, args, kwargs)


def _attach(model: nn.Module) -> bool:
    markers = set(_markers(model).values())
    if not markers:
        return False
    if len(markers) > 1:
        raise InvalidInputError(
            f"{len(markers)} processor objects such as {type(next(iter(markers))).__name__} stand on one "
            f"{type(model).__name__}; give one object to model.set_attn_processor. Loading an IP-adapter makes others, "
            "without the settings: load it first, or use fastdiff.apply."
        )
    marker = markers.pop()
    modules = self_attention(model, find_family(model)).values()
    missing = sum(module.processor is not marker for module in modules)
    if missing:
        raise InvalidInputError(
            f"{type(marker).__name__} stands for a whole model, and {missing} of the {len(modules)} self-attention "
            f"modules of this {type(model).__name__} have other processors; give it to model.set_attn_processor, or "
            "keep layers dense with dense_layers=."
        )
    with unmarked(model):
        marker.attach(model)
    return True


@contextlib.contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Puts stock processors where markers stand, and the markers back if the body fails."""
    marked = _markers(model)
    unmark(model)
    try:
        yield
    except Exception:
        # The stock processors would run dense from now on and say nothing.
        for part, marker in marked.items():
            part.processor = marker
        raise


def unmark(model: nn.Module) -> None:
    """Puts stock processors where markers stand."""
    marked = _markers(model)
    stock = seam.stock_processors(model) if marked else {}
    for name, module in model.named_modules():
        marker = marked.get(module)
        if marker is None:
            continue
        processor = stock[name.replace("_orig_mod.", "")]
        for choice in ("_attention_backend", "_parallel_config"):
            if getattr(marker, choice) is not None and hasattr(processor, choice):
                setattr(processor, choice, getattr(marker, choice))
        module.processor = processor


def is_marked(model: nn.Module) -> bool:
    """Whether a marker waits on this model for its first forward."""
    return bool(_markers(model))
