"""A planner without kernels for tests of patches: a window of tokens, and a record of what it was asked and given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from fastdiff.schedule import DenseSchedule
from fastdiff_patches.attachment import Attachment
from fastdiff_patches.steps import StepReader


@dataclass(eq=False)
class FakePlan:
    mask: torch.Tensor

    def density(self) -> float:
        return self.mask.float().mean().item()


@dataclass(eq=False)
class FakePlanner:
    """Each token sees those at most `window` places away; None sees all.

    Args:
        sparse: (layer, step) -> whether there is a plan; always, left out.
        merge: `enter` adds the transformer block's input, `leave` subtracts it, both scaled by this.
        keep_extras: Whether `extras` records those of each attention call.
    """

    window: int | None = 4
    needs: frozenset[str] = frozenset()
    uses_steps: bool = False
    sparse: Callable[[int, int | None], bool] | None = None
    merge: float = 0.0
    keep_extras: bool = True
    asked: list[dict] = field(default_factory=list)
    extras: list = field(default_factory=list)
    checked: list = field(default_factory=list)
    learned: bool = False
    _plans: dict = field(default_factory=dict)

    def check_model(self, model, layers):
        self.checked.append((model, layers))

    def plan(self, layout, *, layer, step, steps, heads, head_dim, device):
        self.asked.append({"layout": layout, "layer": layer, "step": step, "steps": steps, "heads": heads})
        if self.sparse is not None and not self.sparse(layer, step):
            return None
        if layout not in self._plans:
            place = torch.arange(layout.query_tokens)
            near = (place[:, None] - place).abs() <= (layout.query_tokens if self.window is None else self.window)
            self._plans[layout] = FakePlan(near.to(device))
        return self._plans[layout]

    def runs_on(self, backend, device, dtype, head_dim):
        return "torch"

    def parameters(self, *, layer, heads, head_dim):
        return torch.nn.Linear(head_dim, head_dim) if self.learned else None

    def attend(self, query, key, value, plan, extras):
        if self.keep_extras and not torch.compiler.is_compiling():
            self.extras.append(extras)
        if extras.parameters is not None:
            value = extras.parameters(value)
        mask = plan.mask if extras.key_mask is None else plan.mask & extras.key_mask[:, None, None]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, mask, scale=extras.scale).transpose(1, 2)

    def enter(self, hidden, plan, extras):
        extras.inputs["entered"] = hidden
        return hidden + self.merge * extras.inputs["block_input"]

    def leave(self, out, plan, extras):
        return out - self.merge * extras.inputs["entered"]

    def steps_asked(self) -> list[int | None]:
        """The step of each forward that was sparse in layer 0 of some model."""
        return [asked["step"] for asked in self.asked if asked["layer"] == 0]


class Watching(FakePlanner):
    """Also keeps the query of each call."""

    def attend(self, query, key, value, plan, extras):
        extras.inputs["query"] = query
        return super().attend(query, key, value, plan, extras)


class UsingPlanner(FakePlanner):
    """Its output depends on all that it is given, and it runs compiled."""

    def attend(self, query, key, value, plan, extras):
        found = extras.inputs
        if "pre_rope_query" in self.needs:
            query = query + found["pre_rope_query"]
        if found.get("rotary") is not None:
            cos, sin = found["rotary"]
            query = query * (1 + cos[:, None] + sin[:, None])
        if "block_input" in self.needs:
            value = value * (1 + found["block_input"].mean() + found["attention"].to_q.weight.mean())
        if "seed" in self.needs:
            value = value * (1 + (found["seed"] % 7).float() / 7)
        return super().attend(query, key, value, plan, extras)


def model_of(target):
    """A pipeline's model, or the model itself."""
    return getattr(target, "unet", getattr(target, "transformer", target))


def put_on(target, planner, dense_layers=0, dense_steps=0) -> FakePlanner:
    """Puts a planner on a model, or on a pipeline's, which then tells the step."""
    model = model_of(target)
    steps = StepReader([] if model is target else [target])
    Attachment(model, planner, DenseSchedule(dense_steps, dense_layers), steps).install(model)
    return planner


def rotated(x, cos, sin):
    """RoPE as `NEEDS["rotary"]` says it."""
    first, second = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[None, :, None, 0::2], sin[None, :, None, 0::2]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
