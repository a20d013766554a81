"""What a kernel must have computed, in float64 on sampled queries and keys. Who differs is not timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from fastdiff_kernels import AgentPlan, BlockPlan, agent_attention
from fastdiff_kernels.errors import WrongResultError

# Relative errors that rounding explains, of outputs and of gradients.
_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
_ROUNDING_BACKWARD = 3e-2


def check_output(what: str, inputs: Sequence[torch.Tensor], out: torch.Tensor, plan: BlockPlan | None) -> None:
    """Compares the output of three queries of the first and of the last head.

    Args:
        what: Kernel and shape, for the message.
        inputs: q, k and v, `[1, tokens, heads, head_dim]`.
        out: What the kernel made of them, of the same shape.
        plan: Who sees whom, None where everyone sees everyone.

    Raises:
        WrongResultError: If they differ by more than rounding.
    """
    q, k, v = inputs
    tokens, heads, head_dim = q.shape[1:]
    for head in {0, heads - 1}:
        for query in (0, tokens // 2, tokens - 1):
            seen = slice(None) if plan is None else plan.visible_keys(query, head).to(q.device)
            keys, values = (x[0, :, head][seen].double() for x in (k, v))
            scores = keys @ q[0, query, head].double() * head_dim**-0.5
            truth = scores.softmax(0) @ values
            _compare(f"{what}, query {query} of head {head}", out[0, query, head], truth, _ROUNDING[q.dtype])


def check_agents(
    what: str, inputs: Sequence[torch.Tensor], agents: torch.Tensor, out: torch.Tensor, plan: AgentPlan, **settings
) -> None:
    """Compares all of agent attention with its formula in float64.

    Raises:
        WrongResultError: If they differ by more than rounding.
    """
    exact = [x.double() for x in (*inputs, agents)]
    truth = agent_attention(*exact, plan, backend="reference", **settings)
    _compare(what, out, truth, _ROUNDING[out.dtype])


def check_gradients(
    what: str,
    inputs: Sequence[torch.Tensor],
    upstream: torch.Tensor,
    grads: Sequence[torch.Tensor],
    plan: BlockPlan | None,
) -> None:
    """Compares the gradients of one query, one key and one value in the middle of the last head.

    Args:
        what, inputs, plan: As in `check_output`; heads share their lists and order.
        upstream: Gradient of the output.
        grads: Gradients of q, k and v that the kernel found.

    Raises:
        WrongResultError: If they differ by more than rounding.
    """
    tokens, heads, head_dim = inputs[0].shape[1:]
    head, token, scale = heads - 1, tokens // 2, head_dim**-0.5
    q, k, v, upstream = (x[0, :, head].double() for x in (*inputs, upstream))
    truth_q, truth_k, truth_v = torch.zeros(3, head_dim, dtype=torch.float64, device=q.device)
    for queries, seen in _rows_with(plan, token, tokens, q.device):
        scores = (q[queries] @ k.t() * scale).masked_fill(~seen, float("-inf"))
        weights = scores.softmax(1)
        slope = upstream[queries] @ v.t()
        slope = weights * (slope - (weights * slope).sum(1, keepdim=True))
        truth_k += slope[:, token] @ q[queries] * scale
        truth_v += weights[:, token] @ upstream[queries]
        truth_q += (slope[queries == token] @ k * scale).sum(0)
    for name, truth, found in zip("qkv", (truth_q, truth_k, truth_v), grads, strict=True):
        _compare(f"{what}, gradient of {name}", found[0, token, head], truth, _ROUNDING_BACKWARD)


def _compare(what: str, found: torch.Tensor, truth: torch.Tensor, limit: float) -> None:
    error = float((found.double() - truth).norm() / truth.norm())
    # NaN is not below any limit.
    if not error < limit:
        raise WrongResultError(
            f"{what}: the relative error against float64 is {error:.2e} and rounding explains {limit:.0e}; the kernel "
            "is wrong here, so it is not timed. Please report it with the output of fastdiff doctor."
        )


def _rows_with(
    plan: BlockPlan | None, key: int, tokens: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yields queries that see a key, some at a time, and what each of them sees: int64 `[n]`, bool `[n, tokens]`.

    A query sees the key of its own place under every method that is timed here.
    """
    if plan is None:
        for queries in torch.arange(tokens, device=device).split(1024):
            yield queries, torch.ones(len(queries), tokens, dtype=torch.bool, device=device)
        return
    order, block = plan.key.order[0].long(), plan.query.block
    slot = int((order == key).nonzero()[0])
    for row in range(plan.query_blocks):
        mask = plan.slot_mask(0, row)
        queries = plan.query.order[0, row * block : (row + 1) * block].long()
        chosen = mask[:, slot] & (queries >= 0)
        seen = torch.zeros(int(chosen.sum()), tokens, dtype=torch.bool, device=device)
        seen[:, order[order >= 0]] = mask[chosen][:, order >= 0]
        yield queries[chosen], seen
