"""What patches is handed from above: a planner (which scores to compute) and a schedule (what stays dense)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

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
        backend: "auto" or one that `fastdiff_kernels.attention` takes.
        parameters: The module that `Planner.parameters` made for this layer, or None.
        inputs: What the planner needs, by name; see `NEEDS`. A dict of this call alone, in which `enter`, `attend`
            and `leave` may hand each other what they like.
    """

    scale: float | None
    key_mask: torch.Tensor | None
    backend: str
    parameters: torch.nn.Module | None
    inputs: dict[str, Any]


NEEDS = {
    "pre_rope_query": "the query `[batch, tokens, heads, head_dim]` after its norm and before RoPE, in the token order "
    "of the attention call",
    "rotary": "(cos, sin), each `[tokens, head_dim]`, the RoPE table of the tokens of the query: a pair of neighbours "
    "(x0, x1) becomes (x0*cos - x1*sin, x1*cos + x0*sin), and both have the same cos and sin; None without RoPE",
    "block_input": "the input of the transformer block, before its norm, `[batch, tokens, channels]`; `attention` "
    "then holds the attention module, and `enter` and `leave` are called around it",
    "seed": "a number drawn from the first latents of the run, 0-d int64 on the CPU, the same in all calls of the run",
}


class Planner(Protocol):
    """A method at work.

    Attributes:
        needs: What the method must be given besides query, key and value, a subset of `NEEDS`; it comes in
            `Extras.inputs`. A family that cannot supply it refuses.
        uses_steps: Whether any plan depends on the step.
    """

    needs: frozenset[str]
    uses_steps: bool

    def check_model(self, model: torch.nn.Module, layers: list[str]) -> None:
        """Called once when attached, with the names of the self-attention modules: raises if this model is not fit."""
        ...

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
    ) -> Plan | None:
        """The plan of one layer at one step, None for dense; called before every forward, so the planner caches it.

        `step` and `steps` are None where no denoising run is known of (training, a bare model); `heads` and
        `head_dim` where only a picture of the plan is wanted.
        """
        ...

    def parameters(self, *, layer: int, heads: int, head_dim: int) -> torch.nn.Module | None:
        """Learned parameters of one layer, or None. They come to stand on the attention module as `fastdiff`."""
        ...

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: Plan, extras: Extras
    ) -> torch.Tensor:
        """The attention itself, all tensors `[batch, tokens, heads, head_dim]`. It is traced by torch.compile."""
        ...

    def runs_on(self, backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """The backend that `attend` takes where `backend` was asked for, for `summary`; raises where it cannot run."""
        ...

    def enter(self, hidden: torch.Tensor, plan: Plan, extras: Extras) -> torch.Tensor:
        """What the attention module gets instead of its input, before its projections; only with "block_input"."""
        ...

    def leave(self, out: torch.Tensor, plan: Plan, extras: Extras) -> torch.Tensor:
        """What the block gets instead of the module's output, after its projection; only with "block_input"."""
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
