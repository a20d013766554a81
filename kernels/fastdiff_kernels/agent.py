"""Agent attention in plain torch: pooling, and two softmaxes with the agents between queries and keys."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .agent_plan import AgentPlan
from .agent_spans import Ranges
from .attention import GUESTS, check_backend
from .errors import InvalidInputError, UnsupportedError
from .ops import check_call

_WITH_CUDNN = ("cuda",)


class AgentBias(NamedTuple):
    """Biases of both softmaxes as products, so that they are never held whole.

    Attributes:
        first: The bias of agent a for grid key j is `first[a] @ tokens[j]`; `[heads, agents, rank]`.
        second: The bias of grid query i for agent a is `tokens[i] @ second[a]`; `[heads, agents, rank]`.
        tokens: What both know of the grid's tokens, `[grid tokens, rank]`.
    """

    first: torch.Tensor
    second: torch.Tensor
    tokens: torch.Tensor


def pool_cells(x: torch.Tensor, plan: AgentPlan) -> torch.Tensor:
    """The mean of each cell: `[batch, grid tokens, ...]` to `[batch, agents, ...]`.

    It sums axis by axis in matrix products, which are the same in every run; sums by index are not on a GPU. Their
    weights keep sums of many float16 tokens finite, and being powers of two round nothing.
    """
    grid, cells = plan.grid, plan.cell_grid
    t, y, w = (axis.to(x.dtype) for axis in plan.axes)
    sums = w @ x.reshape(x.shape[0], grid.frames, grid.height, grid.width, -1)
    sums = y @ sums.flatten(3)
    if grid.frames > 1:
        sums = t @ sums.flatten(2)
    sums = sums.reshape(x.shape[0], cells.tokens, -1)
    shares = plan.shares.to(torch.promote_types(x.dtype, torch.float32))
    return (sums / shares[:, None]).to(x.dtype).unflatten(2, x.shape[2:])


def agent_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    agents: torch.Tensor,
    plan: AgentPlan,
    *,
    scale: float | None = None,
    scale2: float | None = None,
    shortcut: float | torch.Tensor = 0.0,
    bias: AgentBias | None = None,
    key_mask: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention through agents: they gather the values of all keys, and the grid's queries gather theirs.

        gathered = softmax(scale * agents @ k.T + B1) @ v
        output   = softmax([scale2 * q @ agents.T + B2, scale * q @ k_beside.T]) @ [gathered; v_beside] + shortcut * v

    `beside` are the keys beside the grid (text, references); the agents see them too. Queries beside the grid
    are ordinary rows of softmax(scale * q @ k.T) @ v. Linear in the tokens of the grid, in time and memory.
    Reference: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874.

    Args:
        q: Queries `[batch, query tokens, heads, head_dim]`, any strides with a contiguous head_dim.
        k, v: Keys and values `[batch, key tokens, heads, head_dim]`, of the dtype and device of `q`.
        agents: One for each cell of the plan, `[batch, agents, heads, head_dim]`, such as `pool_cells` makes.
        plan: Cells and spans, on the device of `q`.
        scale: Factor of the scores of keys, 1 / sqrt(head_dim) by default.
        scale2: Factor of the scores of agents, `scale` by default. A larger one sharpens the second softmax.
        shortcut: What part of its own value each grid token gets, or the very tensor that is added to the grid's
            rows, `[batch, grid tokens, heads, head_dim]`.
        bias: B1 and B2.
        key_mask: Which keys exist, bool `[batch, key tokens]`.
        backend: `"torch"` and `"auto"` make two dense calls, and one for each span beside the grid, `"reference"`
            writes the formula out (slow).

    Returns:
        Output of the shape and dtype of `q`, zero where a query sees nothing.

    Raises:
        InvalidInputError: If shapes, dtypes, devices or the backend's name do not fit.
        UnsupportedError: If the backend has no kernel for it: `"triton"`, `"flex"` and `"fa4"`.
    """
    if not torch.compiler.is_compiling():
        if not isinstance(plan, AgentPlan):
            raise InvalidInputError(f"plan is of type {type(plan).__name__}; give an AgentPlan.")
        check_call(q, k, v, plan, key_mask)
        _check_agents(q, agents, plan, shortcut, bias)
        for name, factor in (("scale", scale), ("scale2", scale2)):
            if factor is not None and not (math.isfinite(factor) and factor):
                raise InvalidInputError(f"{name} is {factor}; give a finite number other than 0.")
    chosen = agent_backend(backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    scale2 = scale if scale2 is None else float(scale2)
    attend = _explicit if chosen == "reference" else _fused
    dtype = q.dtype
    if chosen == "reference" and dtype != torch.float64:
        q, k, v, agents = (x.float() for x in (q, k, v, agents))

    q, k, v, agents = (x.transpose(1, 2) for x in (q, k, v, agents))
    sees = [_tokens(x, plan.spans.seen) for x in (k, v)]
    bias1 = None if bias is None else (bias.first, _tokens_of(bias, plan, plan.spans.seen))
    gathered = attend(agents, *sees, _mask(key_mask, plan.spans.seen), scale, bias1)

    # One scale serves both kinds of keys of the second softmax, so the agents carry the quotient.
    keys = torch.cat([agents * (scale2 / scale), _tokens(k, plan.spans.beside)], dim=2)
    values = torch.cat([gathered, _tokens(v, plan.spans.beside)], dim=2)
    mask = _mask(key_mask, plan.spans.beside)
    if mask is not None:
        mask = torch.cat([mask.new_ones(mask.shape[0], plan.agents), mask], dim=1)
    bias2 = None
    if bias is not None:
        bias2 = (bias.tokens, F.pad(bias.second, (0, 0, 0, keys.shape[2] - plan.agents)))
    grid = attend(_slice(q, *plan.spans.query_grid), keys, values, mask, scale, bias2)
    if isinstance(shortcut, torch.Tensor):
        grid = grid + shortcut.transpose(1, 2).to(grid.dtype)
    elif shortcut:
        grid = grid + shortcut * _own_values(v, plan, key_mask)

    pieces = []
    for start, stop, ranges in plan.spans.rows:
        if ranges is None:
            pieces.append(grid)
        elif not ranges:
            pieces.append(torch.zeros_like(q[:, :, start:stop]))
        else:
            keys, values = (_tokens(x, ranges) for x in (k, v))
            pieces.append(attend(_slice(q, start, stop), keys, values, _mask(key_mask, ranges), scale, None))
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)
    return out.transpose(1, 2).to(dtype)


def agent_backend(backend: str) -> str:
    """The backend that `agent_attention` will run: `"torch"` or `"reference"`.

    Raises:
        InvalidInputError: If there is no such backend.
        UnsupportedError: If it is one that has no kernel for it.
    """
    check_backend(backend)
    if backend in ("triton", *GUESTS):
        raise UnsupportedError(f"backend {backend!r} has no kernel for agent attention; use backend='auto' or 'torch'.")
    return "torch" if backend == "auto" else backend


def hide_values(v: torch.Tensor, plan: AgentPlan, key_mask: torch.Tensor | None) -> torch.Tensor:
    """The grid's values, zero where the key does not exist, `[batch, grid tokens, heads, head_dim]`."""
    return _own_values(v.transpose(1, 2), plan, key_mask).transpose(1, 2)


def _own_values(v, plan, key_mask):
    own = _slice(v, *plan.spans.key_grid)
    if key_mask is None:
        return own
    return own.masked_fill(~key_mask[:, None, plan.spans.key_grid[0] : plan.spans.key_grid[1], None], 0)


def _fused(q, k, v, mask, scale, bias):
    """One dense call; a bias widens queries and keys by its rank, so that no bias of queries x keys is made."""
    if bias is not None:
        # Kernels want whole multiples of 8.
        room = -bias[0].shape[-1] % 8
        q, k = (
            torch.cat([x, _all(F.pad(part * factor, (0, room)), x)], dim=-1)
            for x, part, factor in ((q, bias[0], 1 / scale), (k, bias[1], 1.0))
        )
    if mask is None:
        return _sdpa(q, k, v, None, scale)
    # What a row of nothing gives is up to the kernel, NaN perhaps: it sees everything here and is zeroed afterwards.
    mask = mask[:, None, None]
    empty = ~mask.any(-1, keepdim=True)
    return _sdpa(q, k, v, mask | empty, scale).masked_fill(empty, 0)


def _sdpa(q, k, v, mask, scale):
    wants_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not (wants_gradients and q.device.type in _WITH_CUDNN):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    # cuDNN's gradients may be NaN at lengths that do not suit it (NVIDIA/cudnn-frontend issue 160), and agents and
    # text come in any number; torch prefers cuDNN on Hopper.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def _explicit(q, k, v, mask, scale, bias):
    scores = q @ k.transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + (bias[0].to(q.dtype) @ bias[1].to(q.dtype).transpose(-1, -2))
    if mask is None:
        return scores.softmax(-1) @ v
    # Rows without keys keep finite scores, since a row of -inf has no gradient; they are zeroed.
    seen = mask[:, None, None].any(-1, keepdim=True)
    scores = scores.masked_fill(~mask[:, None, None] & seen, float("-inf"))
    return (scores.softmax(-1) @ v) * seen


def _all(part, like):
    """A part of a bias, `[(heads,) tokens, rank]`, for every sample and head."""
    return part.to(like.dtype).expand(*like.shape[:2], *part.shape[-2:])


def _slice(x, start, stop):
    return x if (start, stop) == (0, x.shape[2]) else x[:, :, start:stop]


def _tokens(x: torch.Tensor, ranges: Ranges) -> torch.Tensor:
    """Some tokens of `[batch, heads, tokens, head_dim]`."""
    if len(ranges) == 1:
        return _slice(x, *ranges[0])
    return torch.cat([x[:, :, start:stop] for start, stop in ranges], dim=2) if ranges else x[:, :, :0]


def _mask(key_mask: torch.Tensor | None, ranges: Ranges) -> torch.Tensor | None:
    if key_mask is None or not ranges:
        return None
    return torch.cat([key_mask[:, start:stop] for start, stop in ranges], dim=1)


def _tokens_of(bias: AgentBias, plan: AgentPlan, ranges: Ranges) -> torch.Tensor:
    """What the bias knows of the keys in some ranges, `[keys, rank]`: nothing of those beside the grid."""
    first, last = plan.spans.key_grid
    before = sum(stop - start for start, stop in ranges if stop <= first)
    before += sum(first - start for start, stop in ranges if start < first < stop)
    total = sum(stop - start for start, stop in ranges)
    return F.pad(bias.tokens, (0, 0, before, total - before - (last - first)))


def _check_agents(q, agents, plan, shortcut, bias) -> None:
    batch, _, heads, dim = q.shape
    grid_tokens = plan.spans.grid_tokens
    wanted = {"agents": (agents, (batch, plan.agents, heads, dim))}
    if isinstance(shortcut, torch.Tensor):
        wanted["shortcut"] = (shortcut, (batch, grid_tokens, heads, dim))
    for name, (x, shape) in wanted.items():
        if x.shape != shape or x.dtype != q.dtype or x.device != q.device:
            raise InvalidInputError(
                f"{name} is {x.dtype} {list(x.shape)} on {x.device}; this call needs {q.dtype} {list(shape)} on "
                f"{q.device}."
            )
    if bias is None:
        return
    rank = bias.tokens.shape[-1]
    shapes = ((heads, plan.agents, rank), (heads, plan.agents, rank), (grid_tokens, rank))
    for name, x, shape in zip(bias._fields, bias, shapes, strict=True):
        if x.shape != shape:
            raise InvalidInputError(f"bias.{name} has the shape {list(x.shape)}; this call needs {list(shape)}.")
