"""The truth of agent attention for tests: its formula written out span by span in float64, and random inputs."""

from __future__ import annotations

import torch

from fastdiff_kernels import Grid, Span, TokenLayout


def truth(q, k, v, agents, layout, *, scale, scale2, shortcut=0.0, key_mask=None, bias1=None, bias2=None):
    """Output like `q`; biases are `[heads, agents, grid tokens]` and `[heads, grid tokens, agents]`."""
    out = torch.zeros_like(q)
    key_span = torch.repeat_interleave(torch.tensor([span.tokens for span in layout.key]))
    exists = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool) if key_mask is None else key_mask
    own = next(index for index, span in enumerate(layout.key) if span.kind == "grid")
    start = 0
    for span, cells in zip(layout.query, layout.visibility, strict=True):
        rows = slice(start, start + span.tokens)
        start += span.tokens
        sees = torch.tensor([cells[index] != "none" for index in key_span])
        for sample in range(q.shape[0]):
            for head in range(q.shape[2]):
                query, key, value = q[sample, rows, head], k[sample, :, head], v[sample, :, head]
                visible = sees & exists[sample]
                scores = scale * query @ key.T
                if span.kind != "grid":
                    out[sample, rows, head] = softmax(scores, visible) @ value
                    continue
                agent, grid = agents[sample, :, head], key_span == own
                first = scale * agent @ key.T
                if bias1 is not None:
                    first[:, grid] = first[:, grid] + bias1[head]
                gathered = softmax(first, visible) @ value
                second = scale2 * query @ agent.T + (0 if bias2 is None else bias2[head])
                both = torch.cat([second, scores[:, ~grid]], dim=1)
                seen = torch.cat([torch.ones(len(agent), dtype=torch.bool), visible[~grid]])
                own_value = torch.where(exists[sample, grid, None], value[grid], 0)
                through = softmax(both, seen) @ torch.cat([gathered, value[~grid]])
                out[sample, rows, head] = through + shortcut * own_value
    return out


def softmax(scores: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Weights over the visible columns, zeros where there are none."""
    if not visible.any():
        return torch.zeros_like(scores)
    weights = (scores - scores[:, visible].amax(1, keepdim=True)).exp() * visible
    return weights / weights.sum(1, keepdim=True)


def cell_means(x: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
    """The mean of each cell, `[batch, agents, ...]`."""
    return torch.stack([x[:, cells == cell].mean(1) for cell in range(int(cells.max()) + 1)], dim=1)


def tensors(layout: TokenLayout, batch=2, heads=2, head_dim=8, dtype=torch.float64, seed=0):
    """Random q, k and v."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (
        (batch, tokens, heads, head_dim) for tokens in (layout.query_tokens, layout.key_tokens, layout.key_tokens)
    )
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)


def around(grid: Grid, before: tuple[Span, ...] = (), after: tuple[Span, ...] = ()) -> TokenLayout:
    """A grid with other spans before and after it."""
    spans = (*before, Span("grid", grid.tokens, grid), *after)
    return TokenLayout(spans, spans)
