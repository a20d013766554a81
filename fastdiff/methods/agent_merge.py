"""Matching of similar tokens for agent attention: who joins whom, merging before a layer and undoing it after."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from fastdiff_kernels import AgentPlan

# A generator of Lehmer's kind: its products stay far below 2**63, so they are the same on every device.
_PRIME, _FACTOR, _SPREAD = 2**31 - 1, 48271, 69621


class Matching(NamedTuple):
    """What became of the tokens of one call.

    Attributes:
        destinations: The token of each cell that the others may join, int64 `[agents]`.
        agent: The agent that each kept token belongs to, int64 `[batch, kept]`.
        kept: The tokens that are kept, ascending, int64 `[batch, kept]`; None where none is merged, as all below.
        place: Which of the kept tokens stands for each token, int64 `[batch, tokens]`.
        members: Which tokens each destination stands for, bool `[batch, agents, tokens]`.
    """

    destinations: torch.Tensor
    agent: torch.Tensor
    kept: torch.Tensor | None = None
    place: torch.Tensor | None = None
    members: torch.Tensor | None = None


def draw(seed: torch.Tensor, plan: AgentPlan) -> torch.Tensor:
    """One token of each cell, the same for the same seed wherever it runs, int64 `[agents]`.

    Args:
        seed: 0-d int64 on the CPU.
        plan: Its cells.
    """
    grid, (_, height, width) = plan.grid, plan.sizes.long().unbind(-1)
    state = torch.arange(1, plan.agents + 1, device=plan.device) * _SPREAD % _PRIME
    state = (state + seed % _PRIME) % _PRIME
    for _ in range(3):
        state = state * _FACTOR % _PRIME
        state = state ^ (state >> 13)
    place = state % plan.sizes.prod(-1)
    t, y, x = place // (height * width), place // width % height, place % width
    return plan.corners + (t * grid.height + y) * grid.width + x


def match(features: torch.Tensor, plan: AgentPlan, seed: torch.Tensor) -> Matching:
    """Lets every token join the most similar of one random token per cell, the same ones for the whole batch.

    Args:
        features: What is compared, by the cosine of the angle, `[batch, tokens, channels]`.
        plan: Its cells, and how many tokens are merged: those that resemble their destination most.
        seed: 0-d int64 on the CPU.
    """
    batch, tokens, _ = features.shape
    destinations = draw(seed, plan)
    unit = F.normalize(features.detach(), dim=-1)
    score, agent = (unit @ unit[:, destinations].transpose(1, 2)).max(-1)
    agent = agent.index_copy(1, destinations, torch.arange(plan.agents, device=agent.device).expand(batch, -1))
    if not plan.merged:
        return Matching(destinations, agent)
    # Stable, so that tokens of equal score are chosen alike in every run.
    score = score.float().index_fill(1, destinations, float("-inf"))
    closest = score.argsort(dim=1, descending=True, stable=True)[:, : plan.merged]
    gone = torch.zeros_like(agent).scatter(1, closest, 1)
    kept = gone.argsort(dim=1, stable=True)[:, : tokens - plan.merged]
    stands_for = torch.where(gone == 1, destinations[agent], torch.arange(tokens, device=agent.device))
    place = ((1 - gone).cumsum(1) - 1).gather(1, stands_for)
    members = stands_for[:, None] == destinations[:, None]
    return Matching(destinations, agent.gather(1, kept), kept, place, members)


def merge(x: torch.Tensor, found: Matching) -> torch.Tensor:
    """The kept tokens, each the mean of those it stands for: `[batch, tokens, channels]` to `[batch, kept, channels]`.

    It sums in a product with zeros and ones, which is the same in every run; sums by index are not on a GPU.
    """
    means = _means(found.members.to(x.dtype), x, _counts(found, x))
    return x.index_copy(1, found.destinations, means).gather(1, _wide(found.kept, x))


def unmerge(x: torch.Tensor, found: Matching) -> torch.Tensor:
    """Every token's output, a copy of that of the token which stands for it: the inverse way of `merge`."""
    return x.gather(1, _wide(found.place, x))


def pool_matched(x: torch.Tensor, found: Matching, plan: AgentPlan) -> torch.Tensor:
    """The mean of all tokens of each agent, merged ones included: `[batch, kept, ...]` to `[batch, agents, ...]`."""
    weights = (found.agent[:, None] == torch.arange(plan.agents, device=x.device)[:, None]).to(x.dtype)
    if found.kept is not None:
        counts = _counts(found, x)
        stands_for = counts.new_ones(found.place.shape).index_copy(1, found.destinations, counts)
        weights = (weights * stands_for.gather(1, found.kept)[:, None]).to(x.dtype)
    totals = weights.sum(-1, dtype=torch.promote_types(x.dtype, torch.float32))
    return _means(weights, x.flatten(2), totals).unflatten(2, x.shape[2:])


def _means(weights: torch.Tensor, x: torch.Tensor, totals: torch.Tensor) -> torch.Tensor:
    """`weights @ x / totals`, finite where the sum of many float16 tokens would not be."""
    # A power of two rounds nothing and takes the weights below a total of 1.
    share, exponent = torch.frexp(totals)
    power = torch.ldexp(torch.ones_like(totals), -exponent).to(x.dtype)
    return ((weights * power[..., None]) @ x / share[..., None]).to(x.dtype)


def _counts(found: Matching, like: torch.Tensor) -> torch.Tensor:
    """How many tokens each destination stands for, exact, `[batch, agents]`."""
    return found.members.sum(-1).to(torch.promote_types(like.dtype, torch.float32))


def _wide(index: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])
