"""RulesPlanner: hands each layer at each step to the planner of the method that the rules name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdiff_kernels import BlockPlan, InvalidInputError, TokenLayout, of_heads
from fastdiff_patches.planner import Extras

from .base import MethodConfig
from .planner import PlanCache, Planner
from .rules import DENSE, RulesConfig


@dataclass(frozen=True)
class RulePlan:
    """One method's plan, and who carries it out.

    Attributes:
        planner: The method's planner.
        plan: Its plan.
        key: Under which name the method's learned parameters stand among the layer's, if it has some.
    """

    planner: Planner
    plan: Any
    key: str

    def density(self) -> float:
        """That of the method's plan."""
        return self.plan.density()

    def of_heads(self, first: int, count: int) -> RulePlan:
        """The same for some heads, for context parallelism; a plan that cannot be cut stays whole."""
        return replace(self, plan=of_heads(self.plan, first, count)) if isinstance(self.plan, BlockPlan) else self


class RulesPlanner(Planner):
    """Rules at work on one model, or on models with as many layers.

    Args:
        config: The rules.
        cache: Not used: plans are kept by the methods' planners.
        layers: Self-attention layers of the model, None as long as no model is known.
    """

    config: RulesConfig

    def __init__(self, config: RulesConfig, cache: PlanCache | None = None, layers: int | None = None):
        super().__init__(config, cache)
        self._planners = {part: part.planner() for part in config.parts}
        self._layers = layers

    def __reduce__(self):
        return type(self), (self.config, None, self._layers)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(planner.needs for planner in self._planners.values()))

    def check_model(self, model: torch.nn.Module, layers: list[str]) -> None:
        """Whether the model has the layers that the rules name, and is one for their methods.

        Raises:
            InvalidInputError: If it lacks one, or has not as many as the pipeline's other model.
            FastDiffError: If a method is not for this model.
        """
        if self._layers not in (None, len(layers)):
            raise InvalidInputError(
                f"the pipeline's models have {self._layers} and {len(layers)} self-attention layers and rules count "
                "for both; apply rules to each model, without steps."
            )
        self.config.check_layers(len(layers))
        for planner in self._planners.values():
            planner.check_model(model, layers)
        self._layers = len(layers)

    def plan(
        self,
        layout: TokenLayout,
        *,
        layer: int,
        step: int | None,
        steps: int | None,
        heads: int | None,
        head_dim: int | None,
        device: torch.device,
    ) -> RulePlan | None:
        """The plan of the method that the rules name, None for dense."""
        part = self.config.at(layer, self._layers, step, steps)
        if part is None:
            return None
        planner = self._planners[part]
        where = {"layer": layer, "step": step, "steps": steps, "heads": heads, "head_dim": head_dim}
        plan = planner.plan(layout, **where, device=device)
        return None if plan is None else RulePlan(planner, plan, self._key(part))

    def parameters(self, *, layer: int, heads: int, head_dim: int) -> torch.nn.ModuleDict | None:
        """What the methods that the layer uses learn in it, by the place of the method among the rules' methods."""
        where = {"layer": layer, "heads": heads, "head_dim": head_dim}
        parts = self.config.of_layer(layer, self._layers)
        found = {self._key(part): self._planners[part].parameters(**where) for part in parts}
        found = {key: module for key, module in found.items() if module is not None}
        return torch.nn.ModuleDict(found) if found else None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: RulePlan, extras: Extras) -> torch.Tensor:
        """Attention of one call, by the method's planner."""
        return plan.planner.attend(q, k, v, plan.plan, _own(plan, extras))

    def runs_on(self, backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """The backends that the methods will take, with commas between.

        Raises:
            FastDiffError: If one of them cannot run here.
        """
        found = (planner.runs_on(backend, device, dtype, head_dim) for planner in self._planners.values())
        return ", ".join(dict.fromkeys(found)) or DENSE

    def enter(self, hidden: torch.Tensor, plan: RulePlan, extras: Extras) -> torch.Tensor:
        """What the method's planner makes of the attention module's input."""
        return plan.planner.enter(hidden, plan.plan, _own(plan, extras))

    def leave(self, out: torch.Tensor, plan: RulePlan, extras: Extras) -> torch.Tensor:
        """What the method's planner makes of the attention module's output."""
        return plan.planner.leave(out, plan.plan, _own(plan, extras))

    def _key(self, part: MethodConfig) -> str:
        return str(list(self._planners).index(part))


def _own(plan: RulePlan, extras: Extras) -> Extras:
    """What the method's planner is given: its own parameters in the place of all methods'."""
    learned = extras.parameters
    own = learned[plan.key] if learned is not None and plan.key in learned else None
    return Extras(extras.scale, extras.key_mask, extras.backend, own, extras.inputs)
