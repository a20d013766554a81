"""The truth: dense attention with the plan's mask, in plain torch. Slow, queries x keys of memory, differentiable."""

from __future__ import annotations

import torch

from .on_cpu import on_cpu
from .plan import BlockPlan


@on_cpu
def dense_mask(plan: BlockPlan) -> torch.Tensor:
    """The plan token by token, bool `[1 or heads, query tokens, key tokens]`."""
    # Row by row it asks the lists for numbers, and each would wait for a GPU.
    heads, device, plan = plan.heads or 1, plan.device, plan.to("cpu")
    mask = torch.zeros(heads, plan.query_tokens, plan.key_tokens, dtype=torch.bool)
    for head in range(heads):
        query_order = plan.query.order[head % plan.query.order.shape[0]].long()
        key_order = plan.key.order[head % plan.key.order.shape[0]].long()
        slots = torch.cat([plan.slot_mask(head, row) for row in range(plan.query_blocks)])
        slots = slots[query_order >= 0][:, key_order >= 0]
        mask[head, query_order[query_order >= 0, None], key_order[None, key_order >= 0]] = slots
    return mask.to(device)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    scale: float,
    key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp, computed in float32, or in float64 where the inputs are float64.

    Returns:
        Output `[batch, query tokens, heads, head_dim]` in the inputs' dtype, zero for queries without keys, and
        the natural log-sum-exp `[batch, heads, query tokens]`, -inf for those.
    """
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    mask = dense_mask(plan)[None]
    if key_mask is not None:
        mask = mask & key_mask[:, None, None, :]
    seen = mask.any(-1, keepdim=True)
    # Autocast would compute the products in half precision.
    with torch.autocast(q.device.type, enabled=False):
        scores = torch.einsum("bqhd,bkhd->bhqk", q.to(exact), k.to(exact)) * scale
        # Empty rows keep finite scores, since a row of -inf has no gradient; they are zeroed below.
        scores = scores.masked_fill(~mask & seen, float("-inf"))
        lse = torch.logsumexp(scores, dim=-1)
        weights = (scores - lse[..., None]).exp() * seen
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v.to(exact))
    return out.to(q.dtype), lse.masked_fill(~seen[..., 0], float("-inf"))
