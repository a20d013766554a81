"""What patches is handed from above: a planner (which scores to compute) and a schedule (what stays dense)."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from fastdiff_kernels import TokenLayout


class Plan(Protocol):
    """What patches and `summary` read of a plan; everything else is between the planner and its kernel."""

    def density(self) -> float: ...


class Extras(NamedTuple):
    """What an attention call carries besides query, key and value.

    Attributes:
        scale: Factor on the scores, None for 1/sqrt(head_dim).
        key_mask: bool `[batch, key tokens]`, False for keys that nobody sees, or None.
        backend: "auto", "triton", "torch" or "reference".
        parameters: The module that `Planner.parameters` made for this layer, or None.
    """

    scale: float | None
    key_mask: torch.Tensor | None
    backend: str
    parameters: torch.nn.Module | None


class Planner(Protocol):
    """A method at work.

    Attributes:
        needs: What the method must be given besides query, key and value, a subset of
            {"pre_rope_query", "block_input"}. A family that cannot supply it refuses.
    """

    needs: frozenset[str]

    def plan(
        self,
        layout: TokenLayout,
        *,
        layer: int,
        step: int | None,
        steps: int | None,
        heads: int,
        head_dim: int,
        device: torch.device,
    ) -> Plan:
        """The plan of one layer at one step; called before every forward, so the planner caches it.

        `step` and `steps` are None where no denoising run is known of (training, a bare model).
        """
        ...

    def parameters(self, *, layer: int, heads: int, head_dim: int) -> torch.nn.Module | None:
        """Learned parameters of one layer, or None."""
        ...

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, extras: Extras
    ) -> torch.Tensor:
        """The attention itself, all tensors `[batch, tokens, heads, head_dim]`. It is traced by torch.compile."""
        ...


class Schedule(Protocol):
    """Which denoising steps and layers stay dense.

    Attributes:
        uses_steps: Whether any answer depends on the step.
    """

    uses_steps: bool

    def check_layers(self, layers: int) -> None:
        """Raises InvalidInputError where the schedule names a layer that a model of `layers` layers lacks."""
        ...

    def is_dense(self, step: int | None, steps: int | None, layer: int, layers: int) -> bool:
        """Whether `layer` (of `layers`) stays dense at `step` (of `steps`; None outside a denoising run)."""
        ...
