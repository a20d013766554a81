"""Random calls of attention: what a kernel has compiled in is given, all else is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from plans import box_rule

from fastdiff_kernels import (
    AgentPlan,
    BlockPlan,
    Grid,
    Rule,
    RuleKind,
    Side,
    Span,
    TokenLayout,
    arrange_sides,
    natural_order,
    raster_order,
    snake_order,
)
from fastdiff_kernels.kernel_rule import BALL, DISC, MIXED_BITS

KINDS = {
    "none": RuleKind.NONE,
    "metric": RuleKind.METRIC,
    "disc": DISC,
    "ball": BALL,
    "box": RuleKind.BOX,
    "bits": RuleKind.BITS,
    "mixed bits": MIXED_BITS,
}
# Blocks of several spans are what no short form of a rule takes.
MIXED = ("none", "mixed bits")


@dataclass(frozen=True)
class Variant:
    """What is compiled into a kernel.

    Attributes:
        rule: The rule as kernels take it, a key of KINDS.
        head_dim, blocks, dtype: Of the call; blocks are those of queries and keys.
        by_head: Lists and orders differ by head.
        masked: With a key mask.
        lse: The log-sum-exp is asked for.
    """

    rule: str
    head_dim: int
    blocks: tuple[int, int]
    dtype: torch.dtype
    by_head: bool = False
    masked: bool = False
    lse: bool = True

    def __str__(self) -> str:
        flags = [name for name in ("by_head", "masked", "lse") if getattr(self, name)]
        return "-".join(
            [
                self.rule.replace(" ", "_"),
                str(self.head_dim),
                "x".join(map(str, self.blocks)),
                str(self.dtype)[6:],
                *flags,
            ]
        )


@dataclass
class Call:
    """Arguments of `attention`; `peaked` where logits reach 1e4."""

    plan: BlockPlan
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    key_mask: torch.Tensor | None
    peaked: bool

    @property
    def options(self) -> dict:
        return {"scale": self.scale, "key_mask": self.key_mask}

    def __str__(self) -> str:
        shape, keys = list(self.q.shape), self.k.shape[1]
        return f"{self.plan} of {shape} queries and {keys} keys, scale {self.scale}, peaked {self.peaked}"


def draw_call(variant: Variant, rng: Random, most: int, device: str, *, positive: bool = False) -> Call:
    """A call of at most about `most` tokens; `positive` leaves negative scales out."""
    crowd = 4 if most > 100 else 2
    heads = rng.randint(2 if variant.by_head else 1, crowd)
    plan = draw_plan(variant, rng, heads, most).to(device)
    batch = rng.randint(1, crowd - 1)
    q, k, v = (
        draw_tensor(rng, batch, tokens, heads, variant.head_dim, variant.dtype, device)
        for tokens in (plan.query_tokens, plan.key_tokens, plan.key_tokens)
    )
    scale = variant.head_dim**-0.5 * rng.choice([1.0, 1.0, 0.3] if positive else [1.0, 1.0, 0.3, -0.5])
    content = rng.random()
    if content < 0.1:
        k = k[:, :1].expand_as(k).contiguous()
    peaked = content > 0.9
    if peaked:
        q = q * 2500
    mask = draw_mask(rng, batch, plan.key_tokens, device) if variant.masked else None
    return Call(plan, q, k, v, scale, mask, peaked)


def draw_tensor(rng, batch, tokens, heads, head_dim, dtype, device) -> torch.Tensor:
    """`[batch, tokens, heads, head_dim]`: contiguous, a transposed view, or a piece of a wider tensor."""
    generator = torch.Generator(device).manual_seed(rng.randrange(2**31))
    form = rng.randrange(3)
    shape = ((batch, tokens, heads, head_dim), (batch, heads, tokens, head_dim), (batch, tokens, heads, head_dim + 16))
    x = torch.randn(shape[form], generator=generator, device=device).to(dtype)
    return (x, x.transpose(1, 2), x[..., 16:])[form]


def draw_mask(rng, batch, tokens, device) -> torch.Tensor:
    """Random keys, or the first ones of each sample; now and then a sample has none."""
    if rng.random() < 0.5:
        share = rng.choice([0.1, 0.5, 0.95])
        mask = torch.tensor([[rng.random() < share for _ in range(tokens)] for _ in range(batch)])
    else:
        mask = torch.arange(tokens) < torch.tensor([rng.randint(1, tokens) for _ in range(batch)])[:, None]
    if rng.random() < 0.2:
        mask[rng.randrange(batch)] = False
    return mask.to(device)


def draw_plan(variant: Variant, rng: Random, heads: int, most: int) -> BlockPlan:
    """Redrawn until its rule takes the form that the variant names: small grids often make a shorter one do."""
    while True:
        layout = draw_layout(variant.rule, rng, most)
        orders = [natural_order, snake_order] + [raster_order] * (variant.rule != "box")
        order = rng.choice(orders)
        rule = draw_rule(variant, rng, layout.grid)
        block_q, block_k = variant.blocks
        if rule.kind in (RuleKind.METRIC, RuleKind.BOX) and not variant.by_head and rng.random() < 0.5:
            plan = BlockPlan.from_rule(layout, rule, block_q=block_q, block_k=block_k, grid_order=order)
        else:
            plan = _random_lists(variant, rng, heads, layout, rule, order)
        if plan.kernel_rule.kind == KINDS[variant.rule]:
            return plan


def draw_layout(rule: str, rng: Random, most: int) -> TokenLayout:
    """A grid, most often with text and now and then with pooled keys and padding, in sequences that may differ."""
    frames = 1 if rule == "disc" else rng.randint(2 if rule in ("metric", "ball") else 1, 4)
    room = max(1, rng.randint(1, most) // frames)
    height = rng.randint(1, min(room, 40))
    grid = Grid(frames, height, max(1, min(60, room // height)))
    query = [Span("grid", grid.tokens, grid)]
    if rule in MIXED or rng.random() < 0.5:
        query.insert(rng.randrange(2), Span("text", rng.randint(1, 1 + most // 10)))
    key = list(query)
    if rng.random() < 0.3:
        key.insert(rng.randrange(len(key) + 1), Span(rng.choice(["pooled", "pad"]), rng.randint(1, 1 + most // 20)))
    if len(query) > 1 and rng.random() < 0.2:
        query = [span for span in query if span.kind == "grid"]
    return TokenLayout(tuple(query), tuple(key))


def draw_rule(variant: Variant, rng: Random, grid: Grid) -> Rule:
    if variant.rule == "none":
        return Rule.none()
    if variant.rule == "box":
        return box_rule(grid, tuple(rng.randint(0, 12) for _ in range(3)))
    if variant.rule in ("bits", "mixed bits"):
        block_q, block_k = variant.blocks
        rows = rng.choice([2, 4])
        return Rule.bits(block_q // rows, block_k // 8, 8)
    a, b, near = rng.randint(0, 3), rng.randint(0, 3), rng.choice([2, 20, 150])
    if variant.rule == "metric":
        limits = torch.tensor([rng.choice([-1, 2, 20, 150]) for _ in range(grid.frames)])
        return Rule.metric(limits, a=a, b=b, sink_frames=rng.randint(0, 1))
    return Rule.metric(near - rng.randint(1, 30) * torch.arange(grid.frames) ** 2, a=a, b=b)


def _random_lists(variant, rng, heads, layout, rule, order) -> BlockPlan:
    aligned = variant.rule not in MIXED
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    query, key = arrange_sides(layout, variant.blocks, order, aligned)
    if variant.by_head:
        query, key = (_shuffle(side, heads, aligned, generator) for side in (query, key))
    shape = (heads if variant.by_head else 1, query.blocks, key.blocks)
    weights = torch.tensor(rng.choice([(1, 1, 1), (8, 1, 1), (0, 1, 9), (0, 9, 1)]), dtype=torch.float32)
    state = torch.multinomial(weights.expand(shape[0] * shape[1] * shape[2], 3), 1, generator=generator).view(shape)
    if rng.random() < 0.3:
        state[:, rng.randrange(query.blocks)] = 0
    if rng.random() < 0.3:
        state[:, :, rng.randrange(key.blocks)] = 0
    words = None
    if rule.kind == RuleKind.BITS:
        words = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
    return BlockPlan.from_states(query, key, state, rule, words)


def _shuffle(side: Side, heads: int, aligned: bool, generator: torch.Generator) -> Side:
    """Slots in an order of its own for each head; where spans fill whole blocks, each stays in its blocks."""
    block = side.block if aligned else side.slots
    orders = []
    for _ in range(heads):
        inside = torch.rand(side.slots // block, block, generator=generator).argsort(1)
        orders.append((inside + torch.arange(0, side.slots, block)[:, None]).flatten())
    place = torch.stack(orders)
    return Side(side.tokens, side.block, side.order[0][place], side.table[0][place])


def draw_agents(rng: Random, most: int) -> tuple[AgentPlan, TokenLayout]:
    """Cells of a grid, most often with other spans before and after it."""
    frames = rng.randint(1, 4)
    room = max(1, rng.randint(1, most) // frames)
    height = rng.randint(1, min(room, 40))
    grid = Grid(frames, height, max(1, room // height))
    before, after = (
        tuple(
            Span(rng.choice(["text", "reference", "pad"]), rng.randint(1, 1 + most // 20))
            for _ in range(rng.randrange(3))
        )
        for _ in range(2)
    )
    spans = (*before, Span("grid", grid.tokens, grid), *after)
    layout = TokenLayout(spans, spans)
    cells = Grid(*(rng.randint(1, min(side, 6)) for side in (grid.frames, grid.height, grid.width)))
    return AgentPlan.from_cells(layout, cells), layout
