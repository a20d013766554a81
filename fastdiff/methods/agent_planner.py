"""AgentPlanner: when agents act, where they come from, and the attention call through them."""

from __future__ import annotations

import torch

from fastdiff_kernels import AgentPlan, InvalidInputError, TokenLayout, UnsupportedError, agent_attention, pool_cells
from fastdiff_kernels.agent import agent_backend, hide_values

from .agent import AgentConfig
from .agent_merge import Matching, match, merge, pool_matched, unmerge
from .agent_terms import AgentTerms
from .planner import PlanCache, Planner

# Where `enter` leaves the matching of a call for `attend` and `leave`.
_MATCHING = "agent_matching"


class AgentPlanner(Planner):
    """Agent attention at work on one model.

    Args:
        config: The method's settings.
        cache: Where plans are kept; all planners share one by default, and so their equal plans.
    """

    config: AgentConfig

    def __init__(self, config: AgentConfig, cache: PlanCache | None = None):
        super().__init__(config, cache)
        # Tokens of the finest grid with agents in the forward whose layers are being asked for, and the last of them.
        self._finest, self._last = 0, -1

    @property
    def needs(self) -> frozenset[str]:
        # Pooled queries must not have been rotated: high frequencies would cancel.
        needs = {"pre_rope_query", "rotary"}
        return frozenset(needs | {"block_input", "seed"} if self.config.source == "merge" else needs)

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
    ) -> AgentPlan | None:
        """The plan of one layer at one step; the identical object wherever it is the same.

        None, and so dense, are steps outside `config.steps`, and the coarser levels of a model whose finer ones
        have agents, where these do not pay.

        Raises:
            InvalidInputError: If agents pay nowhere, or no step of the run lies within `config.steps`.
            UnsupportedError: If the layout has no single grid, or `"merge"` meets text.
        """
        if not self.config.acts(step, steps):
            return None
        # Layers are asked for in their order, so that a lower one begins another forward.
        if layer <= self._last:
            self._finest = 0
        self._last = layer
        key = {"layer": layer, "step": step, "steps": steps, "heads": heads, "head_dim": head_dim, "device": device}
        try:
            plan = super().plan(layout, **key)
        except InvalidInputError:
            if layout.grid.tokens < self._finest:
                return None
            raise
        self._finest = max(self._finest, layout.grid.tokens)
        return plan

    def parameters(self, *, layer: int, heads: int, head_dim: int) -> AgentTerms | None:
        """The learned terms of one layer, if the config asks for some."""
        config = self.config
        if not config.bias and not config.convolution:
            return None
        cells = config.agents if config.bias else None
        return AgentTerms(heads, head_dim, cells, config.k_shortcut if config.convolution else None)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AgentPlan, extras) -> torch.Tensor:
        """Attention of one call; `extras` is a `fastdiff_patches.planner.Extras`."""
        rotary = extras.inputs.get("rotary")
        natural = q if rotary is None else extras.inputs["pre_rope_query"]
        natural = natural[:, plan.spans.query_grid[0] : plan.spans.query_grid[1]]
        found = extras.inputs.get(_MATCHING)
        if found is None:
            agents, centres = pool_cells(natural, plan), plan.centres
        else:
            agents, centres = pool_matched(natural, found, plan), found.destinations + plan.spans.query_grid[0]
        if rotary is not None:
            agents = rotate(agents, *(table[centres] for table in rotary))
        scale = q.shape[-1] ** -0.5 if extras.scale is None else extras.scale
        terms, shortcut, bias = extras.parameters, self.config.k_shortcut, None
        if terms is not None:
            bias = terms.bias(plan.grid, q)
            if terms.convolved:
                shortcut = terms.convolve(hide_values(v, plan, extras.key_mask), plan.grid)
        return agent_attention(
            q,
            k,
            v,
            agents,
            plan,
            scale=scale,
            scale2=scale**self.config.k_scale2,
            shortcut=shortcut,
            bias=bias,
            key_mask=extras.key_mask,
            backend=extras.backend,
        )

    def runs_on(self, backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """The backend that `attend` will take: agents have no Triton kernel.

        Raises:
            FastDiffError: If there is no such backend, or it computes no agents (triton, flex, fa4).
        """
        return agent_backend(backend)

    def enter(self, hidden: torch.Tensor, plan: AgentPlan, extras) -> torch.Tensor:
        """Finds similar tokens by the block's input and merges them, if `merge_ratio` asks for it.

        Raises:
            InvalidInputError: If the block's input is not as long as the layout says.
            UnsupportedError: If tokens are to be merged whose positions RoPE needs.
        """
        features = extras.inputs["block_input"]
        if not torch.compiler.is_compiling():
            _check_input(features, hidden, plan)
        if plan.merged and extras.inputs.get("rotary") is not None:
            raise UnsupportedError(
                "merge_ratio takes tokens away from a model with RoPE, which turns each by its position; set "
                "merge_ratio=0."
            )
        found = extras.inputs[_MATCHING] = match(features, plan, extras.inputs["seed"])
        return merge(hidden, found) if plan.merged else hidden

    def leave(self, out: torch.Tensor, plan: AgentPlan, extras) -> torch.Tensor:
        """Gives every token its output again."""
        found: Matching = extras.inputs[_MATCHING]
        return unmerge(out, found) if plan.merged else out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """RoPE of `[batch, tokens, heads, head_dim]` by a table `[tokens, head_dim]` of interleaved pairs."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    first, second = exact.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    cos, sin = (table[:, None].to(exact) for table in (cos, sin))
    return (exact * cos + turned * sin).to(x.dtype)


def _check_input(features: torch.Tensor, hidden: torch.Tensor, plan: AgentPlan) -> None:
    tokens = plan.grid.tokens
    if features.ndim != 3 or features.shape[1] != tokens or hidden.shape[:2] != features.shape[:2]:
        raise InvalidInputError(
            f"the block's input is {list(features.shape)} and its attention's {list(hidden.shape)}; this plan is for "
            f"[batch, {tokens}, channels]."
        )
