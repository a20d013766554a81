"""Attention operators: tensors and a plan in, a tensor out. Needs torch (and triton on GPUs), knows no model."""

from .agent import AgentBias, agent_attention, pool_cells
from .agent_plan import AgentPlan
from .attention import attention, backends, choose_backend
from .box import Simulation, simulate
from .errors import FastDiffError, InvalidInputError, MissingDependencyError, UnsupportedError
from .layout import Grid, Span, TokenLayout
from .order import Side, centred, natural_order, raster_order, snake_order
from .plan import EMPTY, FULL, PARTIAL, BlockList, BlockPlan, arrange_sides
from .rule import Rule, RuleKind
from .some_heads import of_heads

__all__ = [
    "EMPTY",
    "FULL",
    "PARTIAL",
    "AgentBias",
    "AgentPlan",
    "BlockList",
    "BlockPlan",
    "FastDiffError",
    "Grid",
    "InvalidInputError",
    "MissingDependencyError",
    "Rule",
    "RuleKind",
    "Side",
    "Simulation",
    "Span",
    "TokenLayout",
    "UnsupportedError",
    "agent_attention",
    "arrange_sides",
    "attention",
    "backends",
    "centred",
    "choose_backend",
    "natural_order",
    "of_heads",
    "pool_cells",
    "raster_order",
    "simulate",
    "snake_order",
]
