"""Plans as FlexAttention and FlashAttention-4 take them: the same attention, and lists of the documented form."""

from random import Random

import pytest
import torch
from plans import box_rule, metric_plan, plain_sides, random_bits_plan
from random_calls import Variant, draw_call
from torch.nn.attention.flex_attention import flex_attention

from fastdiff_kernels import (
    BlockPlan,
    Grid,
    MissingDependencyError,
    Rule,
    TokenLayout,
    UnsupportedError,
    attention,
    backends,
    choose_backend,
    export,
    snake_order,
)
from fastdiff_kernels.agent import agent_backend
from fastdiff_kernels.reference import dense_mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = {"atol": 1e-5, "rtol": 1e-4}


def draw(plan, heads=2, dim=16, dtype=torch.float32):
    torch.manual_seed(0)
    lengths = (plan.query_tokens, plan.key_tokens, plan.key_tokens)
    return [torch.randn(2, heads, n, dim, device=DEVICE, dtype=dtype).transpose(1, 2) for n in lengths]


def assert_same(plan, inputs, backend, **options):
    out, lse = attention(*inputs, plan, backend=backend, return_lse=True, **options)
    truth, true_lse = attention(*inputs, plan, backend="reference", return_lse=True, **options)
    torch.testing.assert_close(out, truth, **EXACT)
    torch.testing.assert_close(lse, true_lse, **EXACT)


def box_plan() -> BlockPlan:
    layout = TokenLayout.self_attention(Grid(3, 5, 7), text_after=4)
    return BlockPlan.from_rule(layout, box_rule(layout.grid), block_q=16, block_k=32, grid_order=snake_order)


@pytest.mark.parametrize("plan", [metric_plan(Grid(3, 5, 7), 5, 3), box_plan(), random_bits_plan(75, 41, heads=2)[0]])
@pytest.mark.parametrize("masked", [False, True])
def test_flex_equals_the_reference(plan, masked):
    mask = None
    if masked:
        mask = torch.ones(2, plan.key_tokens, dtype=torch.bool, device=DEVICE)
        mask[0, -6:] = False
        mask[1] = False
    assert_same(plan, draw(plan), "flex", key_mask=mask, scale=0.3)


@pytest.mark.parametrize("rule", ["box", "disc", "metric", "bits", "none"])
def test_flex_equals_the_reference_on_random_calls(rule):
    variant = Variant(rule, 16, (32, 16), torch.float32, by_head=rule not in ("metric", "disc"), masked=rule == "disc")
    call = draw_call(variant, Random(rule), 100, DEVICE)
    assert not call.peaked
    assert_same(call.plan, (call.q, call.k, call.v), "flex", **call.options)


@pytest.mark.parametrize("plan", [metric_plan(Grid(3, 5, 7), 5, 3), random_bits_plan(75, 41, heads=2)[0]])
def test_flex_lists_are_those_of_the_plan(plan):
    mask = export.flex_block_mask(plan)
    assert mask.BLOCK_SIZE[0] == plan.query.block
    assert mask.BLOCK_SIZE[1] == plan.key.block
    assert mask.shape == (1, plan.lists, plan.query.slots, plan.key.slots)
    for blocks, counts, indices in (
        (plan.partial, mask.kv_num_blocks, mask.kv_indices),
        (plan.full, mask.full_kv_num_blocks, mask.full_kv_indices),
    ):
        assert torch.equal(counts[0], blocks.counts)
        for which in range(plan.lists):
            for row in range(plan.query_blocks):
                found = indices[0, which, row, : counts[0, which, row]]
                assert torch.equal(found.long(), plan.row(blocks, which, row))
    assert (mask.to_dense()[0] != 0).tolist() == [(plan.draw(head) != 0).tolist() for head in range(plan.lists)]


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["box", "metric", "bits"])
def test_compiled_flex_on_a_cpu(rule):
    """The compiler turns a `mask_mod` of anything but single numbers into a wrong one."""
    variant = Variant(rule, 16, (32, 32), torch.float32, by_head=rule == "bits")
    call = draw_call(variant, Random(f"{rule} 1"), 100, "cpu")
    mask = export.flex_block_mask(call.plan)
    sides = (call.plan.query, call.plan.key, call.plan.key)
    call.q = call.q / 2500 if call.peaked else call.q
    slots = [export.to_slots(x, side).transpose(1, 2) for x, side in zip((call.q, call.k, call.v), sides, strict=True)]
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(flex_attention, dynamic=False)(*slots, block_mask=mask, scale=call.scale)
    truth = attention(call.q, call.k, call.v, call.plan, backend="reference", **call.options)
    torch.testing.assert_close(export.from_slots(out.transpose(1, 2), call.plan.query), truth, **EXACT)


@pytest.mark.gpu
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("rule", ["box", "disc", "metric", "bits"])
def test_compiled_flex_and_its_gradients(rule, block):
    torch._dynamo.reset()
    train = block == 128
    for number in range(2):
        variant = Variant(rule, 64, (block, block), torch.bfloat16, by_head=rule == "bits", masked=number == 1)
        call = draw_call(variant, Random(f"{rule} {block} {number}"), 600, DEVICE, positive=True)
        call.q = call.q / 2500 if call.peaked else call.q
        # Equal keys, which are drawn too, have queries without a gradient.
        call.k = torch.randn_like(call.k)
        found = []
        for backend, dtype in (("flex", torch.bfloat16), ("reference", torch.float64)):
            inputs = [x.detach().to(dtype).requires_grad_(train) for x in (call.q, call.k, call.v)]
            out = attention(*inputs, call.plan, backend=backend, **call.options)
            found.append((out, *(torch.autograd.grad(out, inputs, torch.ones_like(out)) if train else ())))
        for ours, truth in zip(*found, strict=True):
            assert (ours.double() - truth).norm() <= 2e-2 * truth.norm()


@pytest.mark.gpu
def test_flex_refuses_gradients_of_small_blocks():
    plan = metric_plan(Grid(3, 5, 7), 5, 3)
    inputs = [x.requires_grad_() for x in draw(plan)]
    with pytest.raises(UnsupportedError, match="multiples of 128"):
        attention(*inputs, plan, backend="flex")


def test_slots_and_back(poison):
    plan, _ = random_bits_plan(75, 41, heads=3)
    for side in (plan.query, plan.key, metric_plan(Grid(3, 5, 7), 5).query):
        x = torch.randn(2, side.tokens, 3, 4)
        slots = export.to_slots(x, side)
        assert slots.shape == (2, side.slots, 3, 4)
        assert torch.equal(slots[:, side.order[0] >= 0], x[:, side.order[0][side.order[0] >= 0].long()])
        assert torch.equal(export.from_slots(slots, side), x)


def whole_blocks(tokens=(75, 41), lists=2, blocks=(32, 16)) -> BlockPlan:
    """Blocks that are computed whole or not at all, padding at the end alone, a row of nothing."""
    query, key = plain_sides(tokens, blocks)
    state = torch.randint(0, 2, (lists, query.blocks, key.blocks), generator=torch.Generator().manual_seed(5))
    state[0, 1] = 0
    return BlockPlan.from_states(query, key, state * 2, Rule.none())


def test_fa4_lists_have_the_documented_form():
    plan = whole_blocks()
    lists = export.fa4_lists(plan)
    assert lists.block_size == (32, 16)
    for name, blocks in (("mask", plan.partial), ("full", plan.full)):
        counts, indices = getattr(lists, f"{name}_block_cnt"), getattr(lists, f"{name}_block_idx")
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.shape == (1, plan.lists, plan.query_blocks)
        assert indices.shape[:3] == counts.shape
        assert indices.shape[3] <= plan.key_blocks
        for which in range(plan.lists):
            for row in range(plan.query_blocks):
                found = indices[0, which, row, : counts[0, which, row]]
                assert torch.equal(found.long(), plan.row(blocks, which, row))
    # The end of the sequence is the only block that is tested.
    assert lists.mask_block_cnt.max() == 1
    assert (lists.mask_block_idx[..., 0] == plan.key_blocks - 1)[lists.mask_block_cnt == 1].all()


def test_plans_that_fa4_cannot_take_are_refused():
    windows = BlockPlan.from_rule(
        TokenLayout.self_attention(Grid(1, 8, 8)), box_rule(Grid(1, 8, 8)), block_q=16, block_k=16
    )
    with pytest.raises(UnsupportedError, match="BOX rule decides"):
        export.fa4_lists(windows)
    padded = BlockPlan.from_rule(
        TokenLayout.self_attention(Grid(2, 5, 7)), Rule.metric(torch.tensor([999] * 2)),
        block_q=16, block_k=16, grid_order=snake_order,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="padding between its 70 tokens"):
        export.fa4_lists(padded)


def test_the_fa4_call_hands_over_tensors_in_order(fake_fa4):
    plan = whole_blocks()
    q, k, v = (x.cpu() for x in draw(plan))
    out, lse = export.fa4(q, k, v, plan, 0.3, None, True)
    truth, true_lse = attention(q, k, v, plan, backend="reference", scale=0.3, return_lse=True)
    torch.testing.assert_close(out, truth, **EXACT)
    torch.testing.assert_close(lse, true_lse, **EXACT)
    assert not dense_mask(plan).any(-1).all()
    with pytest.raises(UnsupportedError, match="no backward"):
        export.fa4(q.requires_grad_(), k, v, plan, 0.3, None, False)
    with pytest.raises(UnsupportedError, match="key_mask"):
        export.fa4(q.detach(), k, v, plan, 0.3, torch.ones(2, plan.key_tokens, dtype=torch.bool), False)


@pytest.mark.gpu
@pytest.mark.skipif(export.fa4_version() is None, reason="needs flash-attn-4")
@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("lists", [1, 3])
def test_fa4_equals_the_reference(head_dim, lists):
    plan = whole_blocks((700, 900), lists, (128, 128)).to(DEVICE)
    inputs = draw(plan, heads=3, dim=head_dim, dtype=torch.bfloat16)
    out, lse = attention(*inputs, plan, backend="fa4", scale=0.2, return_lse=True)
    exact = (x.double() for x in inputs)
    truth, true_lse = attention(*exact, plan, backend="reference", scale=0.2, return_lse=True)
    torch.testing.assert_close(out.double(), truth, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-3, rtol=1e-3)


def test_what_is_missing_or_does_not_fit_is_refused(monkeypatch):
    plan = metric_plan(Grid(2, 5, 7))
    q, k, v = (x.cpu() for x in draw(plan))
    monkeypatch.setattr(export, "fa4_version", lambda: None)
    with pytest.raises(MissingDependencyError, match="pip install flash-attn-4"):
        attention(q, k, v, plan, backend="fa4")
    assert ("fa4", False, "FlashAttention-4 is not installed (pip install flash-attn-4)") in backends()
    monkeypatch.setattr(export, "fa4_version", lambda: "4.0")
    with pytest.raises(UnsupportedError, match=r"torch.float32 on cpu; it takes float16, bfloat16 on cuda"):
        attention(q, k, v, plan, backend="fa4")
    assert choose_backend("fa4", torch.device("cuda"), torch.bfloat16, 128) == "fa4"
    with pytest.raises(UnsupportedError, match="no gradients on cpu"):
        attention(q.requires_grad_(), k, v, plan, backend="flex")
    with pytest.raises(UnsupportedError, match="float64"):
        attention(q.double(), k.double(), v.double(), plan, backend="flex")
    with pytest.raises(Exception, match="cannot be traced"):
        torch.compile(lambda x: attention(x, x, x, plan, backend="flex"), backend="eager", fullgraph=True)(v)


@pytest.mark.parametrize("backend", ["flex", "fa4"])
def test_agents_are_for_neither(backend):
    with pytest.raises(UnsupportedError, match=f"{backend!r} has no kernel for agent"):
        agent_backend(backend)
