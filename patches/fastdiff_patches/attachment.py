"""Attachment: what is patched on one model. It is the model's forward pre-hook, and the only record there is."""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from fastdiff_kernels import InvalidInputError, TokenLayout, UnsupportedError

from . import needs, seam
from .families import Family, family_of
from .locate import heads_of, self_attention, unwrap
from .planner import Plan, Planner, Schedule
from .processor import Layer
from .steps import StepReader
from .ulysses import parts_of, share_of

_logger = logging.getLogger("fastdiff")
_SEEN_LIMIT = 8


class Place(NamedTuple):
    """Where a layer stands in a forward: its own layout, and why it is dense there under every method, or None."""

    layout: TokenLayout
    coarse: str | None


@dataclass(eq=False)
class Binding:
    """One self-attention module: its processor before, its processor under fastdiff, and the layer behind that."""

    name: str
    module: nn.Module
    original: Any
    adopted: Any
    layer: Layer
    placed: bool = False
    hooks: list[torch.utils.hooks.RemovableHandle] = field(default_factory=list)

    def stands(self) -> bool:
        """Whether the module holds our processor."""
        return self.module.processor is self.adopted

    def prepare(self, model: nn.Module) -> None:
        """Gives the module what the method learns in it, and the hooks that the method needs."""
        if self.layer.parameters is not None:
            _move_to(self.layer.parameters, self.module)
            self.module.add_module("fastdiff", self.layer.parameters)
        self.hooks = needs.install(model, self.module, self.layer)

    def place(self) -> None:
        self.module.processor, self.placed = self.adopted, True

    def follow(self) -> None:
        """Takes over a processor that diffusers built anew from our class, as its IP-adapter loaders do."""
        if seam.unbound(self.module.processor):
            self.adopted = self.module.processor
            seam.bind(self.adopted, self.layer)

    def release(self) -> None:
        """Takes everything of ours off the module, and leaves a processor that the user has set since."""
        if self.stands():
            seam.give_back(self.adopted, self.original)
            self.module.processor = self.original
        if self.layer.parameters is not None and getattr(self.module, "fastdiff", None) is self.layer.parameters:
            del self.module.fastdiff
        for hook in self.hooks:
            hook.remove()
        self.hooks = []
        self.layer.retire()


class Attachment:
    """A method on one model.

    Built without changing the model; `install` (or `watch`, when the user sets the processors) starts it and
    `remove` undoes it bit for bit. It lives in the model's own pre-hooks, so copying or pickling the model copies
    it, and nothing else holds it.

    Attributes:
        settings: What the floor above wants back from `find(model)`; not looked at here.
        tell: (model, attachment, layout) -> called once, in the first forward that is sparse, before its layers run.
        total: Number of self-attention modules of the model.
        seen: The last layouts of the model that ran, newest last, each with the places of its layers by name.
        steps_seen: Number of steps of the last denoising run, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        planner: Planner,
        schedule: Schedule,
        steps: StepReader,
        *,
        backend: str = "auto",
        settings: Any = None,
        family: Family | None = None,
        tell: Callable[[nn.Module, Attachment, TokenLayout], None] | None = None,
    ):
        self.tell, self._warned = tell, False
        self.family = family_of(model) if family is None else family
        self.planner, self.schedule, self.steps, self.settings = planner, schedule, steps, settings
        missing = planner.needs - self.family.supplies
        if missing:
            raise UnsupportedError(
                f"the method needs {', '.join(sorted(missing))}, which family {self.family.name!r} does not supply; "
                "choose options that do without it."
            )
        modules = self_attention(model, self.family)
        if self.family.by_length:
            modules = {name: module for name, module in modules.items() if seam.adoptable(module.processor)}
        self.total = len(modules)
        schedule.check_layers(self.total)
        planner.check_model(model, list(modules))
        current = find(model)
        before = {b.module: b.original for b in current.bindings if b.stands()} if current is not None else {}
        self.bindings: list[Binding] = []
        self._replaced: list[Binding] = []
        for index, (name, module) in enumerate(modules.items()):
            layer = Layer(index, name, *heads_of(module), planner, backend, self.family)
            original = before.get(module, seam.stock(module.processor))
            adopted = seam.adopt(self.family.processor(original), layer)
            self.bindings.append(Binding(name, module, original, adopted, layer))
        self.seen: dict[TokenLayout, dict[str, Place]] = {}
        self.steps_seen: int | None = None
        self.seed: torch.Tensor | None = None
        self._run: tuple[Any, int | None] = (None, None)
        self._handle: torch.utils.hooks.RemovableHandle | None = None

    @property
    def layers(self) -> list[Layer]:
        """The layers that are self-attention, as far as is known."""
        return [binding.layer for binding in self.bindings if binding.layer.stray is None]

    def holds(self, layer: Layer) -> bool:
        """Whether the layer's module has our processor, or one of our class that gets its layer before it runs."""
        return any(
            binding.layer is layer and (binding.stands() or seam.unbound(binding.module.processor))
            for binding in self.bindings
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        copied = memo[id(self)] = copy.copy(self)
        for name in ("steps", "bindings", "_replaced", "seen", "_handle"):
            setattr(copied, name, copy.deepcopy(getattr(self, name), memo))
        return copied

    def watch(self, model: nn.Module) -> None:
        """Starts to prepare the layers before each forward of the model, without setting its processors."""
        current = find(model)
        if current is not None:
            current.remove()
        for binding in self.bindings:
            binding.prepare(model)
        self._handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def install(self, model: nn.Module) -> None:
        """Sets the processors and starts to prepare the layers before each forward."""
        self.watch(model)
        for binding in self.bindings:
            binding.place()

    def remove(self) -> None:
        """Puts the original processors back where ours still stand, and stops."""
        for binding in self.bindings:
            binding.release()
        self.bindings, self._replaced = [], []
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @torch.compiler.disable
    def __call__(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> None:
        """The forward pre-hook: finds the layout and the step, and gives each layer its plan."""
        # torch still calls a hook that another one has removed in the same forward, without keyword arguments.
        if kwargs is None:
            return
        seam.refresh()
        self._follow(model)
        if not self.bindings:
            return
        inputs = kwargs if not args else inspect.signature(type(model).forward).bind(model, *args, **kwargs).arguments
        layout = self.family.layout(getattr(model, "config", None), inputs)
        if (misfit := self.misfit(layout)) is not None:
            raise InvalidInputError(misfit)
        step, steps = self.steps.read(inputs.get("timestep"))
        if steps is not None and steps != self.steps_seen:
            self.steps_seen = steps
            self._warn_of_no_sparse_step(model, steps)
        if step is None and not torch.is_grad_enabled() and (self.schedule.uses_steps or self.planner.uses_steps):
            self._warn_of_no_step(model)
        places = self.seen[layout] = self.seen.pop(layout, None) or self.places(getattr(model, "config", None), layout)
        if len(self.seen) > _SEEN_LIMIT:
            del self.seen[next(iter(self.seen))]
        latents = self.family.visual(inputs)
        self._draw_seed(latents, step)
        for binding in self.bindings:
            if binding.placed:
                layer, place = binding.layer, places[binding.name]
                dense = place.coarse is not None or self.schedule.is_dense(step, steps, layer.index, self.total)
                plan = None if dense else self.plan(layer, place.layout, step, steps, latents.device)
                parallel = seam.context_parallel(binding.adopted)
                if parallel is not None:
                    plan = share_of(plan, parallel, layer.heads)
                layer.module = weakref.ref(binding.module)
                layer.prepare(plan, self.seed, parts_of(place.layout))
        if self.tell is not None and any(layer.active for layer in self.layers):
            tell, self.tell = self.tell, None
            tell(model, self, layout)

    def places(self, config: Any, layout: TokenLayout) -> dict[str, Place]:
        """Where each layer stands in a forward of the model's layout, by name.

        Layers with fewer than a quarter of the tokens of the finest layer stay dense: they cost next to nothing,
        and a pixel there stands for much of the picture.
        """
        layouts = {binding.name: self.family.at(config, layout, binding.name) for binding in self.bindings}
        finest = max(own.query_tokens for own in layouts.values())

        def coarse(tokens: int) -> str | None:
            return f"coarse level: {tokens} tokens" if 4 * tokens < finest else None

        return {name: Place(own, coarse(own.query_tokens)) for name, own in layouts.items()}

    def plan(
        self, layer: Layer, layout: TokenLayout, step: int | None, steps: int | None, device: torch.device | str
    ) -> Plan | None:
        """What the planner makes of one layer, whose layout is its own; None for dense."""
        # A plan is cached and may serve a training step later, whose backward refuses tensors of inference mode.
        with torch.inference_mode(False):
            return self.planner.plan(
                layout,
                layer=layer.index,
                step=step,
                steps=steps,
                heads=layer.heads,
                head_dim=layer.head_dim,
                device=torch.device(device),
            )

    def misfit(self, layout: TokenLayout) -> str | None:
        """What is wrong where the last forward made no call of the length that picks the modules, else None."""
        if not self.bindings or self.layers:
            return None
        lengths = sorted({binding.layer.stray for binding in self.bindings})
        return (
            f"layout= tells {layout.query_tokens} tokens and no self-attention call had so many; queries had "
            f"{', '.join(map(str, lengths))}. Count all tokens of the call, text too."
        )

    def _warn_of_no_step(self, model: nn.Module) -> None:
        """Warns once where a pipeline may be running whose scheduler we do not know."""
        if not self._warned:
            self._warned = True
            _logger.warning(
                "%s runs outside a denoising run of the pipelines that it was patched for, so what depends on the step "
                "does as it would in training. If another pipeline runs it, call fastdiff.apply on that one too.",
                type(model).__name__,
            )

    def _warn_of_no_sparse_step(self, model: nn.Module, steps: int) -> None:
        """Warns where a run begins whose steps all stay dense."""
        layers = [binding.layer.index for binding in self.bindings if binding.placed]
        dense = (self.schedule.is_dense(step, steps, layer, self.total) for step in range(steps) for layer in layers)
        if self.schedule.uses_steps and layers and all(dense):
            _logger.warning(
                "%s stays dense in every step of this run of %d (%s); name fewer steps, or a share such as 0.25.",
                type(model).__name__,
                steps,
                self.schedule,
            )

    def _draw_seed(self, latents: torch.Tensor, step: int | None) -> None:
        """Draws the seed where a run begins; outside a run each forward is one."""
        if "seed" not in self.planner.needs:
            return
        run, (last_run, last_step) = self.steps.run(), self._run
        if step is None or last_step is None or run is not last_run or step < last_step:
            with torch.inference_mode(False):
                self.seed = needs.seed_of(latents)
        self._run = run, step

    def _follow(self, model: nn.Module) -> None:
        """Sees which modules hold our processors: users set others, and some of diffusers' calls do so too.

        Some put ours back afterwards (perturbed-attention guidance).
        """
        back = [binding for binding in self._replaced if binding.stands()]
        for binding in back:
            binding.prepare(model)
            self._replaced.remove(binding)
        if back:
            self.bindings = sorted([*self.bindings, *back], key=lambda binding: binding.layer.index)
            # Layouts that came while they were away have no place for them.
            self.seen.clear()
        lost = []
        for binding in self.bindings:
            binding.follow()
            if binding.stands():
                binding.placed = True
            elif binding.placed:
                lost.append(binding)
        if not lost:
            return
        for binding in lost:
            binding.release()
        self.bindings = [binding for binding in self.bindings if binding not in lost]
        self._replaced += lost
        _logger.warning(
            "%d of the attention processors that fastdiff had set on %s were replaced by others (%s ...); these layers "
            "are left alone until ours are put back. Call fastdiff.apply again to make them sparse.",
            len(lost),
            type(model).__name__,
            lost[0].name,
        )
        if not self.bindings:
            self.remove()


def _move_to(parameters: nn.Module, module: nn.Module) -> None:
    """Moves parameters to where a module's own are, in the dtype it computes in."""
    own = [parameter for parameter in module.parameters() if parameter.device.type != "meta"]
    # Quantised and float8 weights are storage and no dtype to compute in.
    dtypes = [parameter.dtype for parameter in own if parameter.is_floating_point() and parameter.itemsize > 1]
    parameters.to(device=own[0].device if own else None, dtype=dtypes[0] if dtypes else None)


def find(model: nn.Module) -> Attachment | None:
    """What is patched on a model, None if nothing is."""
    hooks = unwrap(model)._forward_pre_hooks.values()
    return next((hook for hook in hooks if isinstance(hook, Attachment)), None)
