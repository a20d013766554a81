"""From block statistics to an order for each head and a mask for each head and group of steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .statistics import block_sizes

# The bits of infinity; bits of floats from 0 on compare as the floats do.
INFINITE = 0x7F800000


def kept_mass(sums: torch.Tensor, share: float, rows: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of the attention the best blocks hold: the direct score of an order; the highest wins.

    Args:
        sums: Attention in each block, `[..., rows, blocks]`.
        share: Share of the blocks that is kept, each head for itself, the diagonal always.
        rows: The query blocks that the rows stand for, all of them or a sample.
        tokens: Tokens of the grid.

    Returns:
        Kept share of the attention `[...]`, and about its standard error as an estimate for all query blocks.
    """
    height, width = sums.shape[-2:]
    place = torch.arange(height)
    value = sums.clone()
    value[..., place, rows] = float("inf")
    count = min(max(height, int(share * height * width)), height * width)
    best = value.flatten(-2).topk(count, dim=-1).indices
    kept = torch.zeros_like(value).flatten(-2).scatter_(-1, best, 1.0).unflatten(-1, (height, width))
    queries = block_sizes(tokens)[rows]
    by_row = (sums * kept).sum(-1)
    error = (by_row / queries).std(-1, correction=0) * ((1 - height / width) / max(1, height - 1)) ** 0.5
    return by_row.sum(-1) / queries.sum(), error


def paper_score(small: torch.Tensor, incoherence: torch.Tensor, alpha: float) -> torch.Tensor:
    """The paper's score of each order, its first sign mended; the lowest wins.

    The paper adds the share of blocks that can be skipped and calls the minimum best. Here the share that cannot be
    skipped is added.

    Args:
        small: Share of the blocks that can be skipped, `[orders, ...]`.
        incoherence: Mean over blocks of largest / mean entry, `[orders, ...]`.
        alpha: Weight of the first against the second; 1 where nothing is quantised.
    """
    rest = 1 - small
    rest, incoherence = (x / x.sum(0).clamp(min=torch.finfo(x.dtype).tiny) for x in (rest, incoherence))
    return alpha * rest + (1 - alpha) * incoherence


def best_order(score: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order with the highest score for each head, the next, and how much better it is.

    Args:
        score: `[orders, heads]`. Of equals the first wins.

    Returns:
        Best and runner-up, int64 `[heads]` (equal where there is one order only), and the margin `[heads]`.
    """
    ranked = score.sort(dim=0, descending=True, stable=True)
    second = min(1, len(score) - 1)
    return ranked.indices[0], ranked.indices[second], ranked.values[0] - ranked.values[second]


def value_by_row(sums: torch.Tensor) -> torch.Tensor:
    """What a block is worth if every row shall keep the same share of its attention: that of all no better ones.

    For one threshold for the attention in a block, as in the paper, the block sums are the values.
    """
    ranked = sums.sort(dim=-1)
    rest = ranked.values.cumsum(-1) / ranked.values.sum(-1, keepdim=True).clamp(min=torch.finfo(sums.dtype).tiny)
    return torch.empty_like(sums).scatter_(-1, ranked.indices, rest)


def choose(values: Sequence[torch.Tensor], costs: Sequence[float], budget: float) -> list[torch.Tensor]:
    """The most valuable blocks that a budget pays for, and the diagonal whatever it costs.

    One threshold for all tensors is found by bisection over the bits of floats, so that nothing is sorted or joined.
    Blocks that equal it are taken in order while the budget lasts.

    Args:
        values: For each layer what its blocks are worth, float32 from 0 on, `[heads, blocks, blocks]`; their diagonals
            are overwritten.
        costs: For each layer what one block costs.
        budget: What all blocks together may cost.

    Returns:
        For each layer the chosen blocks, bool.
    """
    bits = [value.view(torch.int32) for value in values]
    for value in bits:
        value.diagonal(dim1=-2, dim2=-1).fill_(INFINITE)

    def spent(threshold: int) -> float:
        return sum(cost * int((value >= threshold).sum()) for value, cost in zip(bits, costs, strict=True))

    low, high = 0, INFINITE
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if spent(middle) <= budget * (1 + 1e-9) else (middle + 1, high)
    left = budget * (1 + 1e-9) - spent(low)
    masks = []
    for value, cost in zip(bits, costs, strict=True):
        mask = value >= low
        tied = (value == low - 1).flatten().nonzero()[: max(0, int(left / cost)), 0]
        left -= cost * len(tied)
        mask.view(-1)[tied] = True
        masks.append(mask)
    return masks
