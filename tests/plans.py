"""Plans for tests, with token-level truths written the slow and obvious way."""

from __future__ import annotations

import torch

from fastdiff_kernels import (
    BlockPlan,
    Grid,
    Rule,
    RuleKind,
    Side,
    Span,
    TokenLayout,
    arrange_sides,
    snake_order,
)


def metric_rule(frames: int, a: int = 1, b: int = 2, sink_frames: int = 1) -> Rule:
    limits = torch.tensor([max(2, 30 >> d) if d % 3 != 2 else -1 for d in range(frames)])
    return Rule.metric(limits, a=a, b=b, sink_frames=sink_frames)


def box_rule(grid: Grid, reach=(1, 2, 3)) -> Rule:
    """Windows of 2 reach + 1, shifted inwards at the borders, on each axis."""
    first, last = [], []
    for length, r in zip((grid.frames, grid.height, grid.width), reach, strict=True):
        window = min(length, 2 * r + 1)
        start = (torch.arange(length) - r).clamp(0, length - window)
        first.append(start)
        last.append(start + window - 1)
    return Rule.box(tuple(first), tuple(last))


def truth_of(layout: TokenLayout, rule: Rule) -> torch.Tensor:
    """The mask of a token-level rule in natural token order, one pair at a time, bool `[queries, keys]`."""
    mask = torch.zeros(layout.query_tokens, layout.key_tokens, dtype=torch.bool)
    parameters = rule.parameters.tolist()

    def holds(q, k):
        if rule.kind == RuleKind.METRIC:
            a, b, sink, _, *limits = parameters
            near = a * (q[1] - k[1]) ** 2 + b * (q[2] - k[2]) ** 2 < limits[abs(q[0] - k[0])]
            return near or k[0] < sink
        tables = [[t.tolist() for t in rule.axis_tables(axis)] for axis in range(3)]
        return all(first[q[axis]] <= k[axis] <= last[q[axis]] for axis, (first, last) in enumerate(tables))

    row = 0
    for q_span, cells in zip(layout.query, layout.visibility, strict=True):
        column = 0
        for k_span, cell in zip(layout.key, cells, strict=True):
            for i in range(q_span.tokens):
                for j in range(k_span.tokens):
                    ruled = cell == "rule" and holds(place(q_span.grid, i), place(k_span.grid, j))
                    seen = cell == "all" or ruled
                    mask[row + i, column + j] = seen
            column += k_span.tokens
        row += q_span.tokens
    return mask


def place(grid: Grid, token: int) -> tuple[int, int, int]:
    frame, rest = divmod(token, grid.frame_tokens)
    return (frame, *divmod(rest, grid.width))


def plain_sides(tokens: tuple[int, int], blocks: tuple[int, int]) -> tuple[Side, Side]:
    """The query and the key side over plain sequences in their own order."""
    return arrange_sides(TokenLayout(*((Span("text", count),) for count in tokens), (("rule",),)), blocks)


def random_bits_plan(tokens_q: int, tokens_k: int, heads: int, seed: int = 0) -> tuple[BlockPlan, torch.Tensor]:
    """A per-head BITS plan over plain sequences, and its mask `[heads, queries, keys]`."""
    generator = torch.Generator().manual_seed(seed)
    block_q, block_k, side_q, side_k = 32, 16, 8, 4
    query, key = plain_sides((tokens_q, tokens_k), (block_q, block_k))
    shape = (heads, query.blocks, key.blocks)
    state = torch.randint(0, 3, shape, generator=generator)
    bits = torch.randint(0, 2**16, shape, generator=generator, dtype=torch.int32)
    state[:, 0] = 0  # a row of nothing
    columns = block_k // side_k
    plan = BlockPlan.from_states(query, key, state, Rule.bits(side_q, side_k, columns), bits)
    mask = torch.zeros(heads, tokens_q, tokens_k, dtype=torch.bool)
    for h in range(heads):
        for i in range(tokens_q):
            for j in range(tokens_k):
                s = int(state[h, i // block_q, j // block_k])
                bit = (i % block_q) // side_q * columns + (j % block_k) // side_k
                on = bool(int(bits[h, i // block_q, j // block_k]) >> bit & 1)
                mask[h, i, j] = s == 2 or (s == 1 and on)
    return plan, mask


def metric_plan(grid: Grid, text_before: int = 0, text_after: int = 0, block_q: int = 32, block_k: int = 16):
    """A METRIC plan in snake order."""
    layout = TokenLayout.self_attention(grid, text_before, text_after)
    rule = metric_rule(grid.frames)
    return BlockPlan.from_rule(layout, rule, block_q=block_q, block_k=block_k, grid_order=snake_order)
