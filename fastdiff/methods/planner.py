"""Turns a config into what the patches floor asks for: cached plans and the attention call."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch

from fastdiff_kernels import AgentPlan, BlockPlan, TokenLayout, attention, choose_backend

from .base import MethodConfig


class PlanCache:
    """Plans by key, least recently used first out, under a limit of bytes.

    Args:
        limit_bytes: More bytes than this are dropped from the cache; plans still in use live on elsewhere.
    """

    def __init__(self, limit_bytes: int = 2**30):
        self.limit_bytes = limit_bytes
        self._plans: OrderedDict[Hashable, BlockPlan | AgentPlan] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, build: Callable[[], BlockPlan | AgentPlan]) -> BlockPlan | AgentPlan:
        """The plan of this key, built if it is not there."""
        with self._lock:
            if key not in self._plans:
                self._plans[key] = build()
                held = sum(plan.nbytes for plan in self._plans.values())
                while held > self.limit_bytes and len(self._plans) > 1:
                    held -= self._plans.popitem(last=False)[1].nbytes
            self._plans.move_to_end(key)
            return self._plans[key]


_shared_cache = PlanCache()


class Planner:
    """One method at work on one model; see `fastdiff_patches.planner.Planner` for the protocol.

    Args:
        config: The method's settings.
        cache: Where plans are kept; all planners share one by default, and so their equal plans.
    """

    needs: frozenset[str] = frozenset()

    def __init__(self, config: MethodConfig, cache: PlanCache | None = None):
        self.config = config
        self._cache = _shared_cache if cache is None else cache

    def __reduce__(self):
        return type(self), (self.config,)

    @property
    def uses_steps(self) -> bool:
        """Whether any plan depends on the step."""
        return self.config.uses_steps

    def check_model(self, model: torch.nn.Module, layers: list[str]) -> None:
        """Raises if the method is not for this model; here it is for all."""

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
    ) -> BlockPlan | None:
        """The plan of one layer at one step, None for dense; the identical object wherever it is the same."""
        key = (self.config, layout, torch.device(device))
        return self._cache.get(key, lambda: self.config.build_plan(layout).to(device))

    def parameters(self, *, layer: int, heads: int, head_dim: int) -> torch.nn.Module | None:
        """What the method learns in one layer; nothing here."""
        return None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: BlockPlan, extras) -> torch.Tensor:
        """Attention of one call; `extras` is a `fastdiff_patches.planner.Extras`."""
        return attention(q, k, v, plan, scale=extras.scale, key_mask=extras.key_mask, backend=extras.backend)

    def runs_on(self, backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
        """The backend that `attend` will take for the one that was asked for.

        Raises:
            FastDiffError: If that one cannot run here.
        """
        return choose_backend(backend, device, dtype, head_dim)

    def enter(self, hidden: torch.Tensor, plan: BlockPlan, extras) -> torch.Tensor:
        """What the attention module gets instead of `hidden`; called only for a method that needs "block_input"."""
        return hidden

    def leave(self, out: torch.Tensor, plan: BlockPlan, extras) -> torch.Tensor:
        """What comes instead of the attention module's output; called only like `enter`."""
        return out
