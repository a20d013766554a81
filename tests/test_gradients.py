"""Training through the Triton kernels, and what surrounds a gradient in practice."""

import pytest
import torch
from plans import box_rule, metric_plan, random_bits_plan
from torch.utils.checkpoint import checkpoint

from fastdiff_kernels import BlockPlan, Grid, Side, TokenLayout, attention, snake_order

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LIMIT = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def box_plan(block: int) -> BlockPlan:
    layout = TokenLayout.self_attention(Grid(3, 5, 7), text_before=3, text_after=4)
    return BlockPlan.from_rule(layout, box_rule(layout.grid), block_q=block, block_k=block, grid_order=snake_order)


def draw(plan, heads=2, dim=32, dtype=torch.float32, seed=0):
    """Random q, k, v and the output's gradient, on two samples."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (plan.query_tokens, plan.key_tokens, plan.key_tokens, plan.query_tokens)
    drawn = (torch.randn(2, n, heads, dim, generator=generator).to(DEVICE, dtype) for n in lengths)
    *inputs, upstream = drawn
    return [x.requires_grad_() for x in inputs], upstream


def gradients(inputs, upstream, plan, **options):
    return torch.autograd.grad(attention(*inputs, plan, **options), inputs, upstream)


PLANS = {
    "metric with text": lambda: metric_plan(Grid(3, 5, 7), 5, 3),
    "box with text": lambda: box_plan(16),
    "one large block": lambda: box_plan(128),
    "bits per head, empty rows": lambda: random_bits_plan(75, 41, heads=2)[0],
}


@pytest.mark.parametrize(
    ("name", "dim", "dtype", "masked"),
    [
        ("metric with text", 40, torch.float32, True),
        ("box with text", 80, torch.float32, False),
        ("bits per head, empty rows", 96, torch.float32, True),
        ("one large block", 64, torch.bfloat16, False),
        ("one large block", 128, torch.float16, False),
        ("bits per head, empty rows", 64, torch.bfloat16, False),
    ],
)
def test_they_equal_float64(name, dim, dtype, masked, poison):
    plan = PLANS[name]()
    inputs, upstream = draw(plan, dim=dim, dtype=dtype)
    mask = None
    if masked:
        mask = torch.rand(2, plan.key_tokens, generator=torch.Generator().manual_seed(1)) < 0.7
        mask[1] = False  # a sample that sees nothing
        mask = mask.to(DEVICE)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = gradients(exact, upstream.double(), plan, backend="reference", key_mask=mask)
    found = gradients(inputs, upstream, plan, backend="triton", key_mask=mask)
    for ours, true in zip(found, truth, strict=True):
        assert (ours.double() - true).norm() <= LIMIT[dtype] * true.norm()
        if masked:
            assert (ours[1] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 80, 128])
def test_they_repeat(dim):
    layout = TokenLayout.self_attention(Grid(8, 30, 40), 60, 5)
    plan = BlockPlan.from_rule(layout, box_rule(layout.grid, (2, 8, 8)), block_q=128, block_k=128).to("cuda")
    inputs, upstream = draw(plan, heads=4, dim=dim, dtype=torch.bfloat16)
    first = gradients(inputs, upstream, plan)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(gradients(inputs, upstream, plan), first, strict=True))


def test_columns_are_listed_for_a_gradient_alone():
    plan = metric_plan(Grid(2, 5, 7)).to(DEVICE)
    (q, k, v), _ = draw(plan)
    out = attention(q, k, v, plan, backend="triton")
    assert "transposed" not in plan.__dict__
    out.sum().backward()
    assert "transposed" in plan.__dict__


def test_keys_that_no_query_sees_get_zeros(poison):
    """A column without rows is still written."""
    plan = metric_plan(Grid(1, 8, 16), block_q=16, block_k=16)
    state = torch.full((1, plan.query_blocks, plan.key_blocks), 2)
    state[..., 3] = 0
    query, key = (Side(side.tokens, side.block, side.order, side.table) for side in (plan.query, plan.key))
    plan = BlockPlan.from_states(query, key, state, plan.rule)
    inputs, upstream = draw(plan)
    _, grad_k, grad_v = gradients(inputs, upstream, plan, backend="triton")
    unseen = plan.key.order[0, 48:64].long()
    for grad in (grad_k, grad_v):
        assert (grad[:, unseen] == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(backend, reentrant):
    plan = metric_plan(Grid(2, 5, 7), text_after=3)
    inputs, upstream = draw(plan)

    def block(q, k, v):
        return attention(q * 2, k, v, plan, backend=backend)

    plain = torch.autograd.grad(block(*inputs), inputs, upstream)
    checkpoint(block, *inputs, use_reentrant=reentrant).backward(upstream)
    assert all(torch.equal(x.grad, grad) for x, grad in zip(inputs, plain, strict=True))


def test_compiled_training_equals_eager():
    plan = metric_plan(Grid(2, 3, 5))
    inputs, upstream = draw(plan, dim=16)

    def run(q, k, v):
        return attention(q * 2, k, v, plan, backend="triton") * 3

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(*inputs), inputs, upstream)
    theirs = torch.autograd.grad(run(*inputs), inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast_trains_weights_in_float32():
    plan = metric_plan(Grid(2, 3, 5))
    linear = torch.nn.Linear(32, 3 * 32).to(DEVICE)
    x = torch.randn(2, plan.query_tokens, 32, device=DEVICE)

    def loss(backend):
        q, k, v = linear(x).unflatten(-1, (3, 2, 16)).unbind(2)
        return attention(q, k, v, plan, backend=backend).float().square().sum()

    (truth,) = torch.autograd.grad(loss("reference"), linear.weight)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        (ours,) = torch.autograd.grad(loss("triton"), linear.weight)
    assert ours.dtype == torch.float32
    assert (ours - truth).norm() <= 3e-2 * truth.norm()


def test_a_gradient_without_strides():
    """The gradient of a sum is one number, expanded; that of the log-sum-exp may be too."""
    plan = metric_plan(Grid(2, 3, 5))
    inputs, _ = draw(plan, dim=16)
    grads = []
    for backend in ("triton", "reference"):
        out, lse = attention(*inputs, plan, backend=backend, return_lse=True)
        grads.append(torch.autograd.grad(out.sum() + 2 * lse.sum(), inputs))
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, atol=2e-5, rtol=1e-4)
