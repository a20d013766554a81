"""The short form of the rules: chosen where it fits, and computing the same pairs as the tables it replaces."""

import pytest
import torch
from plans import box_rule, random_bits_plan

from fastdiff.methods import ClearConfig
from fastdiff_kernels import (
    BlockPlan,
    Grid,
    Rule,
    RuleKind,
    Side,
    Span,
    TokenLayout,
    UnsupportedError,
    arrange_sides,
    attention,
    snake_order,
)
from fastdiff_kernels.kernel_rule import BALL, DISC, MIXED_BITS, whole_ball

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PICTURE, VIDEO = Grid(1, 9, 7), Grid(3, 5, 4)


def pooled(grid: Grid, text: int) -> TokenLayout:
    spans = (Span("text", text), Span("grid", grid.tokens, grid))
    return TokenLayout(spans, (*spans, Span("pooled", 6)))


def with_reference(grid: Grid) -> TokenLayout:
    other = Grid(grid.frames, grid.height + 3, grid.width + 2)
    spans = (Span("text", 5), Span("grid", grid.tokens, grid), Span("reference", other.tokens, other))
    return TokenLayout(spans, spans)


def plan_of(layout: TokenLayout, rule: Rule) -> BlockPlan:
    return BlockPlan.from_rule(layout, rule, block_q=32, block_k=16, grid_order=snake_order)


def disc(a: int = 1, b: int = 1, limit: int = 9) -> Rule:
    return Rule.metric(torch.tensor([limit]), a=a, b=b)


@pytest.mark.parametrize(
    ("plan", "kind"),
    [
        (plan_of(pooled(PICTURE, 5), disc()), DISC),
        (plan_of(with_reference(PICTURE), disc(2, 3, 14)), DISC),
        (plan_of(TokenLayout.self_attention(PICTURE, 0, 3), disc(limit=-1)), RuleKind.BOX),
        (plan_of(with_reference(VIDEO), box_rule(VIDEO, (1, 1, 1))), RuleKind.BOX),
        (plan_of(pooled(PICTURE, 3), box_rule(PICTURE)), RuleKind.BOX),
        (plan_of(with_reference(VIDEO), Rule.metric(torch.tensor([400] * 3))), RuleKind.BOX),
        (plan_of(pooled(VIDEO, 5), Rule.metric(torch.tensor([9, 4, -1]), a=2)), BALL),
        (plan_of(with_reference(VIDEO), ClearConfig((2.3, 3.1, 4.7)).rule(VIDEO)), BALL),
        (plan_of(TokenLayout.self_attention(VIDEO), Rule.metric(torch.tensor([9, 8, -1]))), RuleKind.METRIC),
        (plan_of(TokenLayout.self_attention(PICTURE), Rule.metric(torch.tensor([9]), sink_frames=1)), RuleKind.BOX),
    ],
    ids=[
        "disc, pooled",
        "disc, reference",
        "empty disc",
        "box",
        "box, pooled",
        "whole",
        "ball",
        "ellipsoid",
        "metric",
        "sink",
    ],
)
def test_it_computes_the_same_pairs(plan, kind, poison):
    plan = plan.to(DEVICE)
    assert plan.kernel_rule.kind == kind
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 1, 16, device=DEVICE) for n in (plan.query_tokens, plan.key_tokens, plan.key_tokens))
    out = attention(q, k, v, plan, backend="triton")
    torch.testing.assert_close(out, attention(q, k, v, plan, backend="reference"), atol=1e-5, rtol=1e-4)


def test_blocks_of_several_spans_keep_their_tables():
    layout = TokenLayout.self_attention(Grid(1, 3, 5), text_after=4)
    sides = arrange_sides(layout, (16, 16), aligned=False)
    state = torch.ones(1, 2, 2, dtype=torch.uint8)
    plan = BlockPlan.from_states(*sides, state, Rule.none())
    assert plan.kernel_rule.kind == RuleKind.NONE
    assert plan.kernel_rule.query is plan.query.table
    with pytest.raises(UnsupportedError, match="several spans"):
        _ = BlockPlan.from_states(*sides, state, box_rule(layout.grid)).kernel_rule
    assert random_bits_plan(75, 41, heads=2)[0].kernel_rule.kind == RuleKind.BITS
    bits = torch.randint(0, 16, state.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    plan = BlockPlan.from_states(*sides, state, Rule.bits(8, 8, 2), bits).to(DEVICE)
    assert plan.kernel_rule.kind == MIXED_BITS
    inputs = [torch.randn(1, plan.key_tokens, 1, 16, device=DEVICE, requires_grad=True) for _ in range(3)]
    found, truth = (attention(*inputs, plan, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(found, truth, atol=1e-5, rtol=1e-4)
    for gradients in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (found, truth)), strict=True):
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_large_grids_fit_and_too_large_ones_are_refused():
    def line(length: int) -> BlockPlan:
        grid = Grid(1, 1, length)
        ends = torch.arange(length)
        rule = Rule.box((torch.zeros(1), torch.zeros(1), ends), (torch.zeros(1), torch.zeros(1), ends))
        side = Side(1, 16, torch.zeros(1, 16, dtype=torch.int32), torch.zeros(1, 16, 5, dtype=torch.int32))
        side.order[0, 1:] = -1
        side.table[0, 0] = torch.tensor([0, 0, grid.width - 1, 0, 1])
        key = Side(1, 16, side.order, side.table.clone())
        key.table[0, 0, 3] = 1
        return BlockPlan.from_states(side, key, torch.ones(1, 1, 1), rule)

    assert line(2**20).kernel_rule.kind == RuleKind.BOX
    too_long = line(4)
    object.__setattr__(too_long.rule, "parameters", too_long.rule.parameters.clone())
    too_long.rule.parameters[-1] = 2**29
    with pytest.raises(UnsupportedError, match="larger than"):
        _ = too_long.kernel_rule


@pytest.mark.parametrize("radius", [3.0, (2.0, 6.0, 6.0), (4.5, 9.0, 12.0), (1.1, 7.3, 7.3), (20.0, 3.5, 5.0)], ids=str)
def test_an_ellipsoid_becomes_one_inequality_of_whole_numbers(radius):
    grid = Grid(9, 24, 31)
    rule = ClearConfig(radius).rule(grid)
    found = whole_ball(rule, (grid.frames - 1, grid.height - 1, grid.width - 1))
    assert found is not None
    a, b, c, r = found
    dt, dy, dx = torch.meshgrid(*(torch.arange(n) for n in (grid.frames, grid.height, grid.width)), indexing="ij")
    true_a, true_b = rule.parameters[:2].tolist()
    inside = true_a * dy**2 + true_b * dx**2 < rule.limits()[dt]
    assert torch.equal(a * dy**2 + b * dx**2 + c * dt**2 < r, inside)


@pytest.mark.parametrize("last", [(2, 0, 0), (2, 1, 1)])
def test_the_search_for_an_ellipsoid_ends_where_frames_have_few_places(last):
    # The next frame is seen, the own one and the one after next are not.
    assert whole_ball(Rule.metric(torch.tensor([-1, 2, -1])), last) is None
