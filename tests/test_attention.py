"""Every backend against the reference: odd shapes, text, padding masks, empty rows, poisoned memory, bad input."""

import pytest
import torch
from plans import box_rule, metric_plan, random_bits_plan

from fastdiff_kernels import (
    FULL,
    PARTIAL,
    BlockPlan,
    Grid,
    InvalidInputError,
    Rule,
    Span,
    TokenLayout,
    UnsupportedError,
    arrange_sides,
    attention,
    choose_backend,
    snake_order,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


def draw(plan, heads=2, dim=32, dtype=torch.float32, batch=2, seed=0):
    """Random q, k, v as a processor hands them over: transposed views, so not contiguous."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (plan.query_tokens, plan.key_tokens, plan.key_tokens)
    inputs = (torch.randn(batch, heads, n, dim, generator=generator) for n in lengths)
    return [x.to(DEVICE, dtype).transpose(1, 2) for x in inputs]


def assert_matches(plan, inputs, backend, **options):
    """Equal to the float64 reference within the error of a reference of the inputs' own dtype."""
    dtype = inputs[0].dtype
    out, lse = attention(*inputs, plan, backend=backend, return_lse=True, **options)
    exact = [x.double() for x in inputs]
    truth, true_lse = attention(*exact, plan, backend="reference", return_lse=True, **options)
    assert out.shape == inputs[0].shape
    assert out.dtype == dtype
    error = (out.double() - truth).norm() / truth.norm()
    assert error < {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(lse, true_lse.float(), atol=2e-2 if dtype == torch.bfloat16 else 3e-3, rtol=0)
    without_lse = attention(*inputs, plan, backend=backend, **options)
    torch.testing.assert_close(without_lse, out, atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("before", "after"), [(0, 0), (5, 0), (0, 19)])
@pytest.mark.parametrize("grid", [Grid(3, 5, 7), Grid(1, 7, 9)], ids=str)
def test_metric_plans(grid, before, after, backend, poison):
    plan = metric_plan(grid, before, after)
    assert_matches(plan, draw(plan), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_box_plans(backend, poison):
    layout = TokenLayout.self_attention(Grid(3, 5, 7), text_after=4)
    plan = BlockPlan.from_rule(layout, box_rule(layout.grid), block_q=16, block_k=32, grid_order=snake_order)
    assert_matches(plan, draw(plan), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_head_bits_plans_of_uneven_length_with_empty_rows(backend, poison):
    plan, mask = random_bits_plan(75, 41, heads=3)
    inputs = draw(plan, heads=3)
    out, lse = attention(*inputs, plan, backend=backend, return_lse=True)
    empty = ~mask.any(-1)
    assert empty.any()
    assert (out.transpose(1, 2)[:, empty] == 0).all()
    assert (lse[:, empty] == float("-inf")).all()
    assert_matches(plan, inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [16, 24, 40, 64, 80, 128, 256])
def test_head_dims_and_dtypes(dim, dtype, backend, poison):
    plan = metric_plan(Grid(2, 5, 7))
    assert_matches(plan, draw(plan, heads=1, dim=dim, dtype=dtype, batch=1), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_masks_that_differ_by_sample(backend, poison):
    plan = metric_plan(Grid(2, 5, 7), text_after=9)
    mask = torch.ones(2, plan.key_tokens, dtype=torch.bool, device=DEVICE)
    mask[0, -6:] = False
    mask[1, :] = False  # a sample without any key
    mask[1, 3] = True
    assert_matches(plan, draw(plan), backend, key_mask=mask)
    mask[1, 3] = False
    out = attention(*draw(plan), plan, backend=backend, key_mask=mask)
    assert (out[1] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_heads_whose_scores_do_not_fit_one_call(masked, monkeypatch, poison):
    plan = metric_plan(Grid(3, 5, 7), 5)
    inputs = draw(plan, heads=5)
    mask = None
    if masked:
        mask = torch.ones(2, plan.key_tokens, dtype=torch.bool, device=DEVICE)
        mask[1, -20:] = False
    for scores in (1, 2 * plan.longest_row * plan.key.block * plan.query.block):
        monkeypatch.setattr("fastdiff_kernels.portable._SCORES", scores)
        assert_matches(plan, inputs, "torch", key_mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_that_a_rule_leaves_without_keys_stay_so_under_a_key_mask(backend, poison):
    layout = TokenLayout.self_attention(Grid(1, 1, 35))
    rule = Rule.metric(torch.tensor([9]))
    plan = BlockPlan.from_rule(layout, rule, block_q=16, block_k=16)
    # Without its own block, only the ends of a block see anything.
    plan = BlockPlan.from_states(plan.query, plan.key, 1 - torch.eye(3)[None], rule)
    mask = torch.ones(2, 35, dtype=torch.bool, device=DEVICE)
    mask[:, -2:] = False
    assert_matches(plan, draw(plan), backend, key_mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_and_large_logits(backend, poison):
    plan = metric_plan(Grid(2, 5, 7))
    q, k, v = draw(plan)
    assert_matches(plan, (q, k, v), backend, scale=0.5)
    out = attention(q * 1e4, k, v, plan, backend=backend)
    assert out.isfinite().all()
    equal = attention(q, torch.ones_like(k), v, plan, backend=backend)
    torch.testing.assert_close(equal, attention(q, torch.ones_like(k), v, plan, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_larger_blocks_are_split_into_tiles(backend, poison):
    layout = TokenLayout.self_attention(Grid(2, 9, 17))
    rule = Rule.metric(torch.tensor([40, 9]))
    plan = BlockPlan.from_rule(layout, rule, block_q=128, block_k=128, grid_order=snake_order)
    assert_matches(plan, draw(plan, heads=1, batch=1, dim=64), backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients(backend):
    plan = metric_plan(Grid(2, 3, 4), text_after=3)
    inputs = [x.double().requires_grad_() for x in draw(plan, dim=8)]
    mask = torch.ones(2, plan.key_tokens, dtype=torch.bool, device=DEVICE)
    mask[0, -2:] = False

    def run(q, k, v):
        return attention(q, k, v, plan, backend=backend, key_mask=mask, return_lse=backend == "reference")

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("return_lse", [False, True])
def test_gradients_equal_the_reference(backend, return_lse, poison):
    plan, mask = random_bits_plan(75, 41, heads=2)
    grads = []
    for name in (backend, "reference"):
        inputs = [x.detach().requires_grad_() for x in draw(plan)]
        out = attention(*inputs, plan, backend=name, return_lse=return_lse)
        if return_lse:
            out, lse = out
            seen = mask.any(-1).to(DEVICE)
            loss = (out**2).sum() + (lse[:, seen] ** 2).sum()
        else:
            loss = (out**2).sum()
        grads.append(torch.autograd.grad(loss, inputs))
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, atol=2e-5, rtol=1e-4)


def box_plan():
    layout = TokenLayout.self_attention(Grid(3, 5, 7), text_after=4)
    return BlockPlan.from_rule(layout, box_rule(layout.grid), block_q=16, block_k=32, grid_order=snake_order)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("plan", "dim", "dtype", "masked"),
    [
        (metric_plan(Grid(3, 5, 7), 5, 3), 16, torch.float32, True),
        (box_plan(), 40, torch.float32, False),
        (metric_plan(Grid(1, 13, 11), block_q=128, block_k=128), 64, torch.bfloat16, False),
        (metric_plan(Grid(2, 5, 7), 0, 9), 128, torch.float16, True),
    ],
    ids=["metric with text", "box", "one large block", "half precision"],
)
def test_gradients_of_every_rule(plan, dim, dtype, masked, backend, poison):
    generator = torch.Generator().manual_seed(1)
    mask = None
    if masked:
        mask = (torch.rand(2, plan.key_tokens, generator=generator) < 0.7).to(DEVICE)
        mask[1] = False  # a sample that sees nothing
    upstream = torch.randn(2, plan.query_tokens, 2, dim, generator=generator).to(DEVICE)
    grads = []
    for name, exact in ((backend, dtype), ("reference", torch.float64)):
        inputs = [x.to(exact).detach().requires_grad_() for x in draw(plan, dim=dim, dtype=dtype)]
        out = attention(*inputs, plan, backend=name, key_mask=mask)
        grads.append(torch.autograd.grad(out, inputs, upstream.to(dtype).to(exact)))
    limit = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, truth in zip(*grads, strict=True):
        assert (ours.double() - truth).norm() <= limit * truth.norm()
        if masked:
            assert (ours[1] == 0).all()


def test_transposed_lists_name_the_same_blocks():
    plan, _ = random_bits_plan(75, 41, heads=3)
    for rows, columns in ((plan.full, plan.transposed.full), (plan.partial, plan.transposed.partial)):
        assert torch.equal(rows.mask(plan.key_blocks).transpose(1, 2), columns.mask(plan.query_blocks))
    state = plan.partial.mask(plan.key_blocks)
    bits = torch.zeros(state.shape, dtype=torch.int32).masked_scatter(state, plan.bits)
    by_column = plan.bits[plan.transposed.bit_place.long()]
    assert torch.equal(bits.transpose(1, 2)[state.transpose(1, 2)], by_column)


def test_a_plan_first_wanted_in_inference_mode_can_be_trained_with():
    with torch.inference_mode():
        plan = metric_plan(Grid(2, 5, 7))
        attention(*draw(plan), plan)
    for backend in (*BACKENDS, "reference"):
        q, k, v = (x.requires_grad_() for x in draw(plan))
        attention(q, k, v, plan, backend=backend).sum().backward()
        assert q.grad.isfinite().all()


def test_kernels_are_launched_on_the_device_of_their_tensors(monkeypatch):
    from fastdiff_kernels import block_sparse, block_sparse_backward

    plan, within = metric_plan(Grid(2, 5, 7)), []

    class Guard(torch.cuda.device_of):
        def __init__(self, x):
            super().__init__(x)
            self.device = x.device

        def __enter__(self):
            super().__enter__()
            within.append(self.device)

        def __exit__(self, *error):
            within.pop()
            return super().__exit__(*error)

    def watched(kernel):
        def run(q, *more):
            seen.append(list(within))
            return kernel(q, *more)

        return run

    seen = []
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    for module, name in ((block_sparse, "forward"), (block_sparse_backward, "backward")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    q, k, v = (x.requires_grad_() for x in draw(plan))
    attention(q, k, v, plan, backend="triton").sum().backward()
    assert seen == [[q.device], [q.device]]


@pytest.mark.gpu
@pytest.mark.two_gpus
def test_a_device_that_is_not_the_current_one():
    plan = metric_plan(Grid(2, 5, 7)).to("cuda:1")
    q, k, v = (x.to("cuda:1").requires_grad_() for x in draw(plan))
    grads = []
    for backend in ("triton", "reference"):
        out = attention(q, k, v, plan, backend=backend)
        grads.append((out, *torch.autograd.grad((out**2).sum(), (q, k, v))))
    for ours, truth in zip(*grads, strict=True):
        torch.testing.assert_close(ours, truth, atol=2e-5, rtol=1e-4)


def test_dense_plan_equals_sdpa():
    layout = TokenLayout.self_attention(Grid(2, 5, 7), 3)
    plan = BlockPlan.from_rule(layout, Rule.metric(torch.tensor([1000, 1000])), block_q=32, block_k=32)
    q, k, v = draw(plan)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    for backend in (*BACKENDS, "reference"):
        torch.testing.assert_close(attention(q, k, v, plan, backend=backend), dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"q": a["q"][0]}, "batch, tokens, heads"),
        (lambda a: {"q": a["q"][:, :-1]}, "this plan is for"),
        (lambda a: {"k": a["k"][:, :-1], "v": a["v"][:, :-1]}, "this plan is for"),
        (lambda a: {"k": a["k"].half()}, "all three alike"),
        (lambda a: {name: a[name].int() for name in "qkv"}, "floating-point"),
        (lambda a: {name: a[name].to(torch.float8_e4m3fn) for name in "qkv"}, "16 bits at least"),
        (lambda a: {name: a[name][:, :, :0] for name in "qkv"}, "0 heads of 32"),
        (lambda a: {name: a[name][..., :0] for name in "qkv"}, "2 heads of 0"),
        (lambda a: {"plan": None}, "give a BlockPlan"),
        (lambda a: {"scale": float("nan")}, "scale is nan"),
        (lambda a: {"key_mask": torch.ones(2, a["plan"].key_tokens, dtype=torch.bool, device="meta")}, "on meta"),
        (lambda a: {"v": a["v"][..., :-8]}, "must be equal"),
        (lambda a: {"k": a["k"][:, :, :1], "v": a["v"][:, :, :1]}, "Repeat grouped"),
        (lambda a: {"backend": "cudnn"}, "allowed are"),
        (lambda a: {"key_mask": torch.ones(2, 3, dtype=torch.bool)}, "key_mask"),
        (lambda a: {"key_mask": torch.ones(2, a["plan"].key_tokens)}, "key_mask"),
    ],
)
def test_bad_input_is_refused(change, message):
    plan = metric_plan(Grid(2, 5, 7))
    arguments = dict(zip("qkv", draw(plan), strict=True)) | {"plan": plan}
    with pytest.raises(InvalidInputError, match=message):
        attention(**(arguments | change(arguments)))


def test_plan_of_other_heads_is_refused():
    plan, _ = random_bits_plan(75, 41, heads=3)
    with pytest.raises(InvalidInputError, match="lists for 3"):
        attention(*draw(plan, heads=2), plan)


@pytest.mark.parametrize("blocks", [(32, 8), (8, 32), (24, 24)])
def test_blocks_that_triton_does_not_take(blocks):
    plan = metric_plan(Grid(2, 5, 7), block_q=blocks[0], block_k=blocks[1])
    with pytest.raises(UnsupportedError, match="powers of two from 16"):
        attention(*draw(plan), plan, backend="triton")
    assert_matches(plan, draw(plan), "torch")


def test_pad_queries_in_a_block_with_others_see_nothing():
    grid = Grid(1, 4, 5)
    query = (Span("grid", 20, grid), Span("pad", 12))
    sides = arrange_sides(TokenLayout(query, (Span("text", 40),)), (32, 16), aligned=False)
    states = torch.full((1, sides[0].blocks, sides[1].blocks), PARTIAL)
    plan = BlockPlan.from_states(*sides, states, Rule.none())
    for backend in BACKENDS:
        assert_matches(plan, draw(plan), backend)
        assert not attention(*draw(plan), plan, backend=backend)[:, 20:].any()


@pytest.mark.parametrize("aligned", [True, False])
def test_whole_blocks_never_show_pad_keys(aligned):
    spans = (Span("text", 32), Span("pad", 32))
    sides = arrange_sides(TokenLayout(spans[:1], spans), (16, 16), aligned=aligned)
    plan = BlockPlan.from_states(*sides, torch.full((1, 2, 4), FULL), Rule.none())
    assert (plan.full_blocks, plan.partial_blocks) == (4, 0)
    assert not plan.visible_keys(0)[32:].any()


def test_forward_mode_derivatives_are_refused_but_by_the_reference():
    plan = metric_plan(Grid(2, 5, 7))
    q, k, v = draw(plan)
    for backend in BACKENDS:
        with pytest.raises(UnsupportedError, match="forward-mode"):
            torch.func.jvp(lambda x, backend=backend: attention(x, k, v, plan, backend=backend), (q,), (q,))
    _, tangent = torch.func.jvp(lambda x: attention(x, k, v, plan, backend="reference"), (q,), (q,))
    assert tangent.norm() > 0


def test_gradients_without_a_log_sum_exp_are_refused_by_triton():
    plan = metric_plan(Grid(2, 5, 7))
    q, k, v = draw(plan)
    batches = torch.stack([q, 2 * q]).requires_grad_()
    out = torch.func.vmap(lambda x: attention(x, k, v, plan, backend="triton"))(batches)
    with pytest.raises(UnsupportedError, match="return_lse=True"):
        out.sum().backward()
    torch.func.vmap(lambda x: attention(x, k, v, plan, backend="torch"))(batches).sum().backward()
    again = batches.detach().requires_grad_()
    torch.stack([attention(x, k, v, plan, backend="reference") for x in again]).sum().backward()
    torch.testing.assert_close(batches.grad, again.grad, atol=1e-4, rtol=1e-4)


def test_backend_choice(monkeypatch):
    cpu, half = torch.device("cpu"), torch.float16
    assert choose_backend("auto", cpu, half, 64) == "torch"
    with pytest.raises(UnsupportedError, match="head_dim 20"):
        choose_backend("triton", torch.device("cuda"), half, 20)
    with pytest.raises(UnsupportedError, match="float64"):
        choose_backend("triton", torch.device("cuda"), torch.float64, 64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedError, match="TRITON_INTERPRET"):
        choose_backend("triton", cpu, half, 64)
