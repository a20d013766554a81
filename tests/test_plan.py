"""Plans against token-by-token truth on odd grids, and what plans say of themselves."""

import copy
import pickle
import subprocess
import sys
from dataclasses import is_dataclass, replace

import pytest
import torch
from plans import box_rule, metric_plan, metric_rule, random_bits_plan, truth_of

from fastdiff_kernels import (
    PARTIAL,
    BlockPlan,
    Grid,
    InvalidInputError,
    Rule,
    Span,
    TokenLayout,
    arrange_sides,
    natural_order,
    raster_order,
    snake_order,
)
from fastdiff_kernels.plan import plan_of
from fastdiff_kernels.reference import dense_mask

LAYOUTS = [
    TokenLayout.self_attention(Grid(3, 5, 7)),
    TokenLayout.self_attention(Grid(4, 3, 9), text_before=5),
    TokenLayout.self_attention(Grid(2, 7, 5), text_after=21),
    TokenLayout.self_attention(Grid(1, 9, 11), 3, 2),
    TokenLayout(
        (Span("text", 3), Span("grid", 24, Grid(2, 3, 4)), Span("pad", 5)),
        (Span("text", 3), Span("grid", 24, Grid(2, 3, 4)), Span("pad", 5), Span("pooled", 6)),
    ),
    # A reference image under the same rule on index-aligned coordinates, keys longer than queries.
    TokenLayout(
        (Span("grid", 24, Grid(2, 3, 4)),),
        (Span("grid", 24, Grid(2, 3, 4)), Span("reference", 24, Grid(2, 3, 4))),
        (("rule", "rule"),),
    ),
]


@pytest.mark.parametrize("order", [natural_order, snake_order], ids=lambda f: f.__name__)
@pytest.mark.parametrize("blocks", [(16, 16), (32, 16), (16, 64)], ids=str)
@pytest.mark.parametrize("kind", ["metric", "box"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "+".join(s.kind for s in x.key) + f"-{x.grid}")
def test_plan_equals_truth(layout, kind, blocks, order):
    rule = metric_rule(layout.grid.frames) if kind == "metric" else box_rule(layout.grid)
    plan = BlockPlan.from_rule(layout, rule, block_q=blocks[0], block_k=blocks[1], grid_order=order)
    truth = truth_of(layout, rule)
    assert torch.equal(dense_mask(plan)[0], truth)
    for token in (0, layout.query_tokens // 2, layout.query_tokens - 1):
        assert torch.equal(plan.visible_keys(token), truth[token])


def test_bits_plan_equals_truth():
    plan, truth = random_bits_plan(75, 41, heads=3)
    assert torch.equal(dense_mask(plan), truth)
    assert torch.equal(plan.visible_keys(40, head=2), truth[2, 40])


@pytest.mark.parametrize("order", [natural_order, raster_order, snake_order], ids=lambda f: f.__name__)
@pytest.mark.parametrize("grid", [Grid(1, 1, 1), Grid(3, 5, 7), Grid(2, 17, 3), Grid(9, 17, 23)], ids=str)
def test_orders_hold_every_token_once(order, grid):
    tokens, coordinates = order(grid, 32)
    assert sorted(tokens[tokens >= 0].tolist()) == list(range(grid.tokens))
    if order is not raster_order:
        assert torch.equal(coordinates[tokens >= 0], grid.coordinates()[tokens[tokens >= 0]])


@pytest.mark.parametrize(
    ("layout", "order", "kept"),
    [
        (TokenLayout.self_attention(Grid(3, 5, 7)), natural_order, True),
        (TokenLayout.self_attention(Grid(1, 4, 8)), natural_order, True),
        (TokenLayout.self_attention(Grid(1, 4, 8), text_after=3), natural_order, True),
        (TokenLayout.self_attention(Grid(3, 5, 7), text_after=3), natural_order, False),
        (TokenLayout.self_attention(Grid(3, 5, 7)), raster_order, False),
        (TokenLayout.self_attention(Grid(1, 9, 11)), snake_order, False),
    ],
)
def test_plans_say_where_tokens_stay_in_their_order(layout, order, kept):
    side = BlockPlan.from_rule(layout, box_rule(layout.grid), block_q=16, block_k=16, grid_order=order).key
    assert side.in_token_order is kept
    assert not replace(side, order=side.order.repeat(2, 1)).in_token_order


def test_snake_blocks_are_compact():
    plan = metric_plan(Grid(1, 45, 80), block_q=128, block_k=128)
    boxes = plan.query.boxes()
    sides = boxes[:, 1, 1:] - boxes[:, 0, 1:] + 1
    # A square of 128 tokens has sides of 11.3; a row-major strip would be 80 wide.
    assert sides.max() <= 24


@pytest.mark.parametrize("grid", [Grid(3, 5, 7), Grid(2, 17, 3), Grid(4, 9, 11)], ids=str)
def test_density_equals_count(grid):
    plan = metric_plan(grid, text_before=3)
    mask = dense_mask(plan)[0]
    computed = 0
    for row in range(plan.query_blocks):
        for which in (plan.full, plan.partial):
            computed += len(plan.row(which, 0, row)) * plan.query.block * plan.key.block
    assert plan.density() == pytest.approx(computed / mask.numel())
    assert plan.density() >= mask.float().mean()
    assert plan.longest_row == max(
        len(plan.row(plan.full, 0, r)) + len(plan.row(plan.partial, 0, r)) for r in range(plan.query_blocks)
    )
    assert plan.mean_row * plan.query_blocks == pytest.approx(plan.full_blocks + plan.partial_blocks)


def test_drawing_shows_full_and_partial():
    plan = metric_plan(Grid(3, 9, 11), text_after=4)
    drawn = plan.draw()
    assert drawn.shape == (plan.query_blocks, plan.key_blocks)
    assert int((drawn == 2).sum()) == plan.full_blocks
    assert int((drawn == 1).sum()) == plan.partial_blocks


@pytest.mark.parametrize("grid", [Grid(12, 7, 9), Grid(1, 9, 20), Grid(3, 40, 2)])
def test_launch_order_visits_the_same_place_of_a_few_frames(grid):
    plan = metric_plan(grid)
    order = plan.launch_order[0].tolist()
    assert sorted(order) == list(range(plan.query_blocks))
    visited = [divmod(block, plan.query_blocks // grid.frames) for block in order]
    assert visited == sorted(visited, key=lambda one: (one[0] // 5, one[1], one[0]))


def test_launch_order_of_other_plans_is_that_of_their_blocks():
    layout = TokenLayout.self_attention(Grid(6, 3, 3))
    # A block holds the tokens of nearly two frames.
    windows = BlockPlan.from_rule(layout, box_rule(layout.grid), block_q=16, block_k=16, grid_order=natural_order)
    for plan in (windows, random_bits_plan(75, 41, heads=3)[0]):
        counts = plan.full.counts + plan.partial.counts
        assert not (counts > 3 * counts.float().mean()).any()
        assert (plan.launch_order == torch.arange(plan.query_blocks)).all()


def test_rows_and_columns_of_text_are_heavy():
    layout = TokenLayout.self_attention(Grid(2, 32, 32), text_after=40)
    plan = BlockPlan.from_rule(layout, Rule.metric(torch.tensor([9, 5])), block_q=32, block_k=32)
    for lists, heavy in ((plan, plan.heavy_rows), (plan.transposed, plan.transposed.heavy)):
        counts = (lists.full.counts + lists.partial.counts)[0]
        assert heavy == (counts > 3 * counts.float().mean()).sum() == 2
        assert set(lists.launch_order[0, :heavy].tolist()) == {64, 65}


def test_handle_finds_the_plan_while_it_lives():
    plan = metric_plan(Grid(2, 3, 4))
    handle = plan.handle
    assert plan_of(handle) is plan
    assert copy.deepcopy(plan) is plan
    loaded = pickle.loads(pickle.dumps(plan))
    assert int(loaded.handle) != int(handle)
    assert torch.equal(dense_mask(loaded), dense_mask(plan))
    del plan
    with pytest.raises(InvalidInputError, match="no longer exists"):
        plan_of(handle)


def test_handles_of_two_processes_differ():
    count = "import fastdiff_kernels.plan as plan; print(next(plan._numbers))"
    numbers = {subprocess.check_output([sys.executable, "-c", count], text=True) for _ in range(2)}
    assert len(numbers) == 2


@pytest.mark.parametrize("block", [0, -32])
def test_blocks_without_tokens_are_refused(block):
    with pytest.raises(InvalidInputError, match="give 1 at least"):
        metric_plan(Grid(2, 3, 4), block_q=block)


def test_rules_that_cannot_be_are_refused():
    with pytest.raises(InvalidInputError, match="fit int32"):
        Rule.metric(torch.tensor([2**31]))
    with pytest.raises(InvalidInputError, match="one limit at least"):
        Rule.metric(torch.tensor([]))
    ends = [torch.arange(n) for n in (2, 3, 4)]
    with pytest.raises(InvalidInputError, match="must not decrease along an axis; on y"):
        Rule.box((ends[0], ends[1].flip(0), ends[2]), tuple(ends))
    with pytest.raises(InvalidInputError, match="give 1 at least for each"):
        Rule.bits(0, 4, 4)


@pytest.mark.parametrize(("rule", "says"), [(Rule.bits(16, 16, 8), "have 8x8"), (Rule.bits(64, 32, 2), "in rows of 2")])
def test_bitmaps_that_do_not_fit_a_word_are_refused(rule, says):
    sides = arrange_sides(TokenLayout.self_attention(Grid(2, 8, 16)), (128, 128))
    state = torch.full((1, 2, 2), PARTIAL)
    with pytest.raises(InvalidInputError, match=says):
        BlockPlan.from_states(*sides, state, rule, torch.ones(1, 2, 2, dtype=torch.int32))
    with pytest.raises(InvalidInputError, match=r"got the shape \[1, 2, 1\]"):
        BlockPlan.from_states(*sides, state, Rule.bits(32, 32, 4), torch.ones(1, 2, 1, dtype=torch.int32))


def test_metric_rules_that_do_not_reach_are_refused():
    grid, farther = Grid(3, 4, 4), Grid(5, 4, 4)
    spans = (Span("grid", grid.tokens, grid), Span("reference", farther.tokens, farther))
    rule = Rule.metric(torch.tensor([9, 5, 1]))
    with pytest.raises(InvalidInputError, match="up to 4 frames apart"):
        BlockPlan.from_rule(TokenLayout(spans, spans), rule, block_q=16, block_k=16)
    heavy = Rule.metric(torch.tensor([9, 5, 1]), a=2**28)
    with pytest.raises(InvalidInputError, match="more than int32 holds"):
        BlockPlan.from_rule(TokenLayout.self_attention(grid), heavy, block_q=16, block_k=16)


@pytest.mark.parametrize("block", [7, 10, 20, 24])
def test_blocks_of_any_size_lose_no_pair(block):
    layout = TokenLayout.self_attention(Grid(2, 9, 11), 3)
    rule = box_rule(layout.grid, (1, 1, 1))
    plan = BlockPlan.from_rule(layout, rule, block_q=block, block_k=block, grid_order=snake_order)
    assert torch.equal(dense_mask(plan)[0], truth_of(layout, rule))


@pytest.mark.parametrize("kind", ["metric", "box", "bits"])
def test_bytes_count_what_is_derived_later(kind):
    layout = TokenLayout.self_attention(Grid(2, 5, 7), 3)
    if kind == "bits":
        plan, _ = random_bits_plan(75, 41, heads=3)
    else:
        rule = metric_rule(2) if kind == "metric" else box_rule(layout.grid)
        plan = BlockPlan.from_rule(layout, rule, block_q=16, block_k=32)

    def tensors(part) -> dict:
        if isinstance(part, torch.Tensor):
            return {part.data_ptr(): part}
        values = vars(part).values() if is_dataclass(part) else ()
        return {place: x for value in values for place, x in tensors(value).items()}

    def held() -> int:
        return sum(x.nbytes for x in tensors(plan).values() if x is not plan.handle and x.numel())

    before = plan.nbytes
    assert before == held()
    assert plan.transposed is not None
    assert plan.kernel_rule is not None
    assert plan.launch_order is not None
    assert plan.nbytes == held() > before


def test_large_plan_holds_no_square_tensor():
    plan = metric_plan(Grid(21, 45, 80), block_q=128, block_k=128)
    assert plan.nbytes < 16 * 2**20


@pytest.mark.parametrize(
    "build",
    [
        lambda p: BlockPlan.from_states(p.query, p.key, torch.zeros(1, 2, 2), p.rule),
        lambda p: BlockPlan.from_states(p.query, p.key, p.draw()[None], Rule.bits(8, 8, 2)),
        lambda p: BlockPlan(p.query, p.key, p.full, p.partial, Rule.bits(8, 8, 2)),
        lambda p: BlockPlan.from_rule(LAYOUTS[0], Rule.none(), block_q=16, block_k=16),
        lambda p: Rule.box((torch.zeros(1),) * 2, (torch.zeros(1),) * 2),
        lambda p: p.visible_keys(p.query_tokens),
    ],
)
def test_bad_plans_are_refused(build):
    with pytest.raises(InvalidInputError):
        build(metric_plan(Grid(2, 5, 7)))


def test_partial_blocks_of_spans_that_do_not_see_each_other_are_left_out():
    picture = Grid(1, 5, 7)
    spans = (Span("text", 9), Span("grid", picture.tokens, picture))
    layout = TokenLayout(spans, (*spans, Span("pooled", 6), Span("pad", 3)))
    rule = box_rule(picture)
    plan = BlockPlan.from_rule(layout, rule, block_q=16, block_k=16)
    every = BlockPlan.from_states(plan.query, plan.key, torch.ones(1, plan.query_blocks, plan.key_blocks), rule)
    # Text sees all but pooled keys, and nobody sees padding.
    assert every.draw().tolist() == [[1, 1, 1, 1, 0, 0]] + [[1, 1, 1, 1, 1, 0]] * 3
    assert torch.equal(dense_mask(every)[0], truth_of(layout, rule))
