"""Memory on a GPU: calls allocate what they must and no more, and address beyond 2^31 elements."""

import gc

import pytest
import torch

from fastdiff_kernels import BlockPlan, Grid, Rule, TokenLayout, attention, snake_order

pytestmark = pytest.mark.gpu

HEADS, HEAD_DIM = 8, 128


def middle_plan() -> BlockPlan:
    """16,484 tokens, padded to 16,768 and 131 blocks of 128."""
    layout = TokenLayout.self_attention(Grid(4, 64, 64), text_after=100)
    rule = Rule.metric(torch.tensor([900, 400, 100, 40]))
    return BlockPlan.from_rule(layout, rule, block_q=128, block_k=128, grid_order=snake_order).to("cuda")


def draw(plan: BlockPlan, heads: int = HEADS, **options) -> list[torch.Tensor]:
    shape = (1, plan.query_tokens, heads, HEAD_DIM)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda", **options) for _ in range(3)]


def peak(run) -> int:
    """Bytes allocated at the worst moment, beyond what was allocated before."""
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.fixture(params=["chosen", "portable"])
def kernel(request, monkeypatch):
    """The kernels of this GPU, and the portable ones."""
    if request.param == "portable":
        monkeypatch.setattr("fastdiff_kernels.tuning._load_hopper", lambda: None)
    return request.param


def test_forward_allocates_the_output_and_what_it_gathers(kernel):
    plan = middle_plan()
    q, k, v = draw(plan)
    attention(q, k, v, plan)
    slots = plan.key.slots * HEADS * HEAD_DIM * 2
    lse = plan.query_tokens * HEADS * 4
    with torch.no_grad():
        assert q.nbytes + 2 * slots <= peak(lambda: attention(q, k, v, plan)) <= 1.02 * (q.nbytes + 2 * slots)
        with_lse = peak(lambda: attention(q, k, v, plan, return_lse=True))
    assert with_lse <= 1.02 * (q.nbytes + 2 * slots + lse)


def test_training_allocates_what_the_gradients_need(kernel):
    plan = middle_plan()
    q, k, v = draw(plan, requires_grad=True)
    upstream = torch.randn_like(q)

    def train():
        return torch.autograd.grad(attention(q, k, v, plan), (q, k, v), upstream)

    slots = plan.query.slots * HEADS
    gathered = 4 * slots * HEAD_DIM * 2
    rows = (plan.query_tokens * HEADS + 2 * slots) * 4
    allowed = q.nbytes + rows + gathered + 3 * q.nbytes
    first = peak(train)
    lists = plan.nbytes - middle_plan().nbytes
    assert first <= 1.02 * (allowed + lists)
    assert peak(train) <= 1.02 * allowed


@pytest.mark.slow
def test_more_than_2_to_the_31_elements(kernel):
    """The last heads of tensors of 2.2e9 elements equal the same heads alone, gradients too."""
    grid, heads = Grid(4, 128, 150), 220
    rule = Rule.metric(torch.tensor([150, 60, 30, 20]))
    layout = TokenLayout.self_attention(grid)
    plan = BlockPlan.from_rule(layout, rule, block_q=128, block_k=128, grid_order=snake_order).to("cuda")
    inputs = draw(plan, heads, requires_grad=True)
    assert inputs[0].numel() > 2**31
    alone = [x[:, :, -2:].detach().contiguous().requires_grad_() for x in inputs]
    upstream = torch.randn_like(inputs[0])
    out, few = attention(*inputs, plan), attention(*alone, plan)
    assert torch.equal(out[:, :, -2:], few)
    grads = torch.autograd.grad(out, inputs, upstream)
    for ours, theirs in zip(grads, torch.autograd.grad(few, alone, upstream[:, :, -2:]), strict=True):
        assert torch.equal(ours[:, :, -2:], theirs)
