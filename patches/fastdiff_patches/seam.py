"""Makes a stock attention processor call a layer of ours where it calls its attention function.

Every softmax processor of diffusers reaches its attention through one of two global names of its module. So its code is
kept as it is and run under a copy of the module's globals in which those names are ours, by a subclass that an adopted
processor gets as its class.
"""

from __future__ import annotations

import copy
import inspect
import sys
import threading
import types
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models import attention_dispatch

from fastdiff_kernels import UnsupportedError

_CALLS = frozenset({"dispatch_attention_fn", "scaled_dot_product_attention"})
_HANDLE = "_fastdiff"


class Layer(Protocol):
    """The handle on an adopted processor."""

    def takes(self, queries: int, keys: int, parallel: Any = None) -> bool: ...

    def watches(self) -> bool: ...

    def entered(self, module: Any) -> None: ...

    def reach(self) -> None: ...

    def left(self, processor: Any) -> None: ...

    def gathers(self) -> bool: ...

    def gather(self, arguments: dict[str, Any]) -> dict[str, Any]: ...

    def enter(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor: ...

    def leave(self, out: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor: ...

    def attend(self, query, key, value, mask, dropout, causal, scale, parallel, inputs) -> torch.Tensor: ...


class _Here(threading.local):
    # Set inside the processor's call and not by a context variable: torch.compile cannot trace those, and
    # checkpointed blocks run again in autograd's own threads.
    # In __init__, which each thread runs: torch.compile guards on which attributes the object itself has.
    def __init__(self):
        self.layer: Layer | None = None
        self.inputs: dict[str, Any] | None = None
        # Whether calls are noted, as the processor's frame found it: what it calls may be compiled without it.
        self.watched = False

    def take(self, queries: int, keys: int, parallel: Any = None) -> Layer | None:
        """The layer whose processor is running, if the attention call is for it."""
        if self.layer is None or not self.layer.takes(queries, keys, parallel):
            return None
        if self.watched:
            self.layer.reach()
        return None if not torch.compiler.is_compiling() and _scores_are_skipped() else self.layer


def _scores_are_skipped() -> bool:
    """Whether diffusers wants the values for the output here (perturbed-attention guidance), by a mode over SDPA."""
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


_here = _Here()


def keep(name: str, value: torch.Tensor) -> None:
    """Keeps a value among the inputs of the attention call that is running, if that one gathers any."""
    if _here.inputs is not None:
        _here.inputs[name] = value


def _dispatch(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    attention_kwargs=None,
    *,
    backend=None,
    parallel_config=None,
):
    layer = _here.take(query.shape[1], key.shape[1], parallel_config)
    if layer is not None:
        return layer.attend(query, key, value, attn_mask, dropout_p, is_causal, scale, parallel_config, _here.inputs)
    return attention_dispatch.dispatch_attention_fn(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale,
        enable_gqa,
        attention_kwargs,
        backend=backend,
        parallel_config=parallel_config,
    )


def _sdpa(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    layer = _here.take(query.shape[2], key.shape[2])
    if layer is not None:
        natural = (x.transpose(1, 2) for x in (query, key, value))
        return layer.attend(*natural, attn_mask, dropout_p, is_causal, scale, None, _here.inputs).transpose(1, 2)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )


_shadows: dict[str, types.ModuleType] = {}
_adopted: dict[type, type] = {}


def _shadow(source: types.ModuleType) -> types.ModuleType:
    """A copy of a module's globals in which the two attention functions are ours."""
    shadow = _shadows.get(source.__name__)
    if shadow is None:
        # The name must be its own and importable: torch.compile guards globals as `import(__name__).name`, and
        # under the old name it would look at diffusers' functions. __package__ stays, for relative imports.
        shadow = types.ModuleType(f"fastdiff_shadow.{source.__name__}")
        _shadows[source.__name__] = sys.modules[shadow.__name__] = shadow
    _fill(shadow, source)
    return shadow


def _fill(shadow: types.ModuleType, source: types.ModuleType) -> None:
    names = {name: value for name, value in vars(source).items() if name not in ("__name__", "__spec__", "__loader__")}
    if "dispatch_attention_fn" in names:
        names["dispatch_attention_fn"] = _dispatch
    if "scaled_dot_product_attention" in names:
        names["scaled_dot_product_attention"] = _sdpa
    if names.get("F") is F:
        names["F"] = _functional(f"{shadow.__name__}.F")
    vars(shadow).update(names)


def _functional(name: str) -> types.ModuleType:
    """torch.nn.functional under another name, with our attention function."""
    if name not in sys.modules:
        copied = types.ModuleType(name)
        vars(copied).update((key, value) for key, value in vars(F).items() if key[:2] != "__")
        copied.scaled_dot_product_attention = _sdpa
        sys.modules[name] = copied
    return sys.modules[name]


def refresh() -> None:
    """Brings the copies of users' modules up to date: those of notebooks and of reloaded files change as they run."""
    for name, shadow in list(_shadows.items()):
        if name.partition(".")[0] != "diffusers" and name in sys.modules:
            _fill(shadow, sys.modules[name])


def _copied(code: types.CodeType) -> types.CodeType:
    """The same code, and that of its inner functions, as objects of their own.

    torch.compile keeps what it compiled by the code object, under names in the globals that it ran with.
    """
    inner = tuple(_copied(each) if isinstance(each, types.CodeType) else each for each in code.co_consts)
    return code.replace(co_consts=inner)


def _calls_attention(cls: type) -> bool:
    code = getattr(cls.__call__, "__code__", None)
    return code is not None and not _CALLS.isdisjoint(code.co_names)


def _adopted_class(cls: type) -> type:
    """The subclass of a processor class that runs the same code with our attention functions."""
    if cls not in _adopted:
        call = cls.__call__
        if not _calls_attention(cls):
            raise UnsupportedError(
                f"{cls.__name__} calls neither {' nor '.join(sorted(_CALLS))}, so its attention cannot be replaced; "
                "set the model's default processors first (for example model.set_attn_processor)."
            )
        shadow = _shadow(sys.modules[call.__module__])
        code = _copied(call.__code__)
        same = types.FunctionType(code, shadow.__dict__, call.__name__, call.__defaults__, call.__closure__)
        same.__kwdefaults__ = call.__kwdefaults__
        names = tuple(inspect.signature(call).parameters)[1:]

        def __call__(self, *args, **kwargs):
            layer = self._fastdiff
            if layer is None:
                return same(self, *args, **kwargs)
            watched = layer.watches()
            if watched:
                layer.entered(args[0] if args else kwargs[names[0]])
            inputs = layer.gather({**dict(zip(names, args, strict=False)), **kwargs}) if layer.gathers() else None
            outer = _here.layer, _here.inputs, _here.watched
            _here.layer, _here.inputs, _here.watched = layer, inputs, watched
            try:
                if inputs is not None and len(args) > 1:
                    args = (args[0], layer.enter(args[1], inputs), *args[2:])
                elif inputs is not None:
                    kwargs[names[1]] = layer.enter(kwargs[names[1]], inputs)
                out = same(self, *args, **kwargs)
                if inputs is not None:
                    out = layer.leave(out, inputs)
            finally:
                _here.layer, _here.inputs, _here.watched = outer
            if watched and not torch.compiler.is_compiling():
                layer.left(self)
            return out

        # For its signature: modules drop the keyword arguments that it does not name, RoPE among them. Some look while
        # torch.compile traces them, and then a ready `__signature__` is not allowed where a dict has changed before.
        __call__.__wrapped__ = call
        members = {
            "__call__": __call__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__reduce__": lambda self: (_revive, (cls, self.__dict__)),
            _HANDLE: None,  # IP-adapter loaders build `type(processor)()`, which then runs dense
        }
        # Some of diffusers' checks read the class name, so it stays.
        _adopted[cls] = type(cls.__name__, (cls,), members)
        _register(_adopted[cls], cls)
    return _adopted[cls]


def _register(own: type, cls: type) -> None:
    """Makes our class known to diffusers' hooks (layer skipping) where they know the class that it stands for."""
    try:
        known = AttentionProcessorRegistry.get(cls)
    except ValueError:
        return
    AttentionProcessorRegistry.register(own, known)


def _revive(cls: type, state: dict[str, Any]) -> Any:
    own = _adopted_class(cls)
    processor = own.__new__(own)
    processor.__dict__.update(state)
    return processor


def stock(processor: Any) -> Any:
    """The processor itself, or a stock copy of one that is adopted."""
    if not adopted(processor):
        return processor
    copied = copy.copy(processor)
    copied.__class__ = type(processor).__mro__[1]
    copied.__dict__.pop(_HANDLE, None)
    return copied


def adopted(processor: Any) -> bool:
    """Whether a processor is of our class."""
    return hasattr(type(processor), _HANDLE)


def adoptable(processor: Any) -> bool:
    """Whether a processor makes an attention call that can be replaced."""
    return adopted(processor) or _calls_attention(type(processor))


def adopt(processor: Any, layer: Layer) -> Any:
    """A copy of a stock processor that calls `layer`; the original is not touched and may be shared.

    Raises:
        UnsupportedError: If the processor's class makes no attention call that can be replaced.
    """
    copied = copy.copy(processor)
    copied.__class__ = _adopted_class(type(processor))
    bind(copied, layer)
    return copied


def context_parallel(processor: Any) -> Any | None:
    """diffusers' `ContextParallelConfig` where `enable_parallelism` has set one on a processor."""
    parallel = getattr(processor, "_parallel_config", None)
    return None if parallel is None else parallel.context_parallel_config


def unbound(processor: Any) -> bool:
    """Whether a processor has our class and no layer: diffusers builds processors anew by `type(processor)()`."""
    return adopted(processor) and getattr(processor, _HANDLE) is None


def bind(processor: Any, layer: Layer) -> None:
    """Has a processor of our class call `layer`."""
    processor.__dict__[_HANDLE] = layer


def give_back(adopted: Any, original: Any) -> None:
    """Carries over to the original what the user set on its adopted copy since (an attention backend, say)."""
    state = {name: value for name, value in adopted.__dict__.items() if name != _HANDLE}
    if state != original.__dict__:
        original.__dict__.clear()
        original.__dict__.update(state)


def stock_processors(model: torch.nn.Module) -> dict[str, Any]:
    """Fresh processors of the classes that the model's own constructor sets, by module name."""
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
    return {name: module.processor for name, module in twin.named_modules() if hasattr(module, "processor")}
