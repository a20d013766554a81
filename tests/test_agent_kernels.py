"""Agent attention in the kernels: the plan, pooling, both softmaxes against the formula, gradients, refusals."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from agent_truth import around, cell_means, tensors, truth
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff_kernels import (
    AgentBias,
    AgentPlan,
    Grid,
    InvalidInputError,
    Span,
    TokenLayout,
    UnsupportedError,
    agent,
    agent_attention,
    pool_cells,
)

EXACT = {"atol": 1e-12, "rtol": 1e-10}
GRID, CELLS = Grid(3, 5, 7), Grid(2, 2, 3)
LAYOUTS = {
    "grid": around(GRID),
    "text before": around(GRID, (Span("text", 4),)),
    "text around": around(GRID, (Span("text", 2),), (Span("text", 3),)),
    "reference": around(GRID, (Span("text", 2),), (Span("reference", 6), Span("text", 1))),
    "padding": around(GRID, (Span("text", 2), Span("pad", 3)), (Span("pad", 2), Span("text", 1))),
}


def side(most: int):
    return st.integers(1, most).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens)))


spans = st.lists(st.builds(Span, st.sampled_from(["text", "reference", "pad"]), st.integers(1, 3)), max_size=2).map(
    tuple
)


@settings(max_examples=500, deadline=None)
@given(st.tuples(side(3), side(5), side(5)), spans, spans, st.integers(0, 2**16), st.booleans(), st.booleans())
def test_both_backends_equal_the_formula(sides, before, after, seed, masked, learned):
    grid, cells = (Grid(*numbers) for numbers in zip(*sides, strict=True))
    layout = around(grid, before, after)
    plan = AgentPlan.from_cells(layout, cells)
    q, k, v = tensors(layout, batch=1 + seed % 2, heads=1 + seed % 3, head_dim=4, seed=seed)
    first = sum(span.tokens for span in before)
    agents = cell_means(q[:, first : first + grid.tokens], plan.cells)
    more = {"scale": 0.5, "scale2": 0.8, "shortcut": 0.075}
    if masked:
        more["key_mask"] = torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.6
    bias, written = None, {}
    if learned:
        parts = [torch.randn(q.shape[2], plan.agents, 3, dtype=q.dtype) for _ in range(2)]
        bias = AgentBias(*parts, torch.randn(grid.tokens, 3, dtype=q.dtype))
        written["bias1"] = bias.first @ bias.tokens.T
        written["bias2"] = (bias.second @ bias.tokens.T).transpose(1, 2)
    expected = truth(q, k, v, agents, layout, **more, **written)
    for backend in ("torch", "reference"):
        out = agent_attention(q, k, v, agents, plan, bias=bias, backend=backend, **more)
        torch.testing.assert_close(out, expected, **EXACT)


@settings(max_examples=200, deadline=None)
@given(st.tuples(side(4), side(6), side(6)))
def test_cells_part_the_grid_into_boxes_of_nearly_equal_sides(sides):
    grid, cells = (Grid(*numbers) for numbers in zip(*sides, strict=True))
    plan = AgentPlan.from_cells(around(grid, (Span("text", 2),)), cells)
    assert plan.cells.bincount().tolist() == plan.sizes.prod(1).tolist()
    assert (plan.sizes.amax(0) - plan.sizes.amin(0) <= 1).all()
    for cell in range(plan.agents):
        inside = grid.coordinates()[plan.cells == cell]
        low, high = inside.amin(0), inside.amax(0)
        assert ((high - low + 1) == plan.sizes[cell]).all()
        assert grid.coordinates()[plan.corners[cell]].tolist() == low.tolist()
        assert grid.coordinates()[plan.centres[cell] - 2].tolist() == ((low + high) // 2).tolist()


@pytest.mark.parametrize(("grid", "cells"), [(GRID, CELLS), (Grid(1, 5, 7), Grid(1, 5, 2)), (Grid(4, 3, 3), CELLS)])
def test_pooling_is_the_mean_of_each_cell(grid, cells):
    plan = AgentPlan.from_cells(around(grid), cells)
    x = torch.randn(2, grid.tokens, 3, 4, dtype=torch.float64)
    torch.testing.assert_close(pool_cells(x, plan), cell_means(x, plan.cells), **EXACT)
    low = pool_cells(x.bfloat16(), plan)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.double(), cell_means(x, plan.cells), atol=2e-2, rtol=2e-2)


def test_the_sum_of_many_half_precision_tokens_stays_finite():
    plan = AgentPlan.from_cells(around(Grid(3, 40, 50)), Grid(1, 1, 2))
    x = torch.full((1, plan.grid.tokens, 1, 2), 100.0, dtype=torch.float16)
    assert (pool_cells(x, plan) == 100).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_density_counts_the_scores_that_are_computed(name, monkeypatch):
    layout = LAYOUTS[name]
    plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = tensors(layout, batch=1, heads=1)
    agents, counted, plain = torch.randn(1, plan.agents, 1, 8).double(), [], F.scaled_dot_product_attention

    def counting(query, key, value, **more):
        counted.append(query.shape[-2] * key.shape[-2])
        return plain(query, key, value, **more)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    agent_attention(q, k, v, agents, plan)
    assert plan.density() == sum(counted) / (layout.query_tokens * layout.key_tokens)


def test_density_of_merged_tokens():
    plan = AgentPlan.from_cells(around(Grid(1, 8, 8)), Grid(1, 2, 2), merged=24)
    assert plan.density() == 2 * 4 * 40 / 64**2
    assert (plan.query_tokens, plan.key_tokens) == (40, 40)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_equal_those_of_the_formula(name, masked):
    layout = LAYOUTS[name]
    plan = AgentPlan.from_cells(layout, CELLS)
    first = sum(span.tokens for span in layout.query[: [span.kind for span in layout.query].index("grid")])
    q, k, v = (x.requires_grad_() for x in tensors(layout))
    more = {"scale": 0.4, "scale2": 0.7, "shortcut": 0.1}
    if masked:
        more["key_mask"] = torch.rand(k.shape[:2]) < 0.5
        more["key_mask"][1] = False
    upstream = torch.randn(q.shape, dtype=q.dtype)
    grads = []
    for way in ("torch", "reference", "truth"):
        grid_q = q[:, first : first + GRID.tokens]
        if way == "truth":
            out = truth(q, k, v, cell_means(grid_q, plan.cells), layout, **more)
        else:
            out = agent_attention(q, k, v, pool_cells(grid_q, plan), plan, backend=way, **more)
        grads.append(torch.autograd.grad(out, (q, k, v), upstream))
    for got in grads[:2]:
        torch.testing.assert_close(got, grads[2], atol=1e-11, rtol=1e-9)


def test_a_sample_without_keys_does_not_rely_on_the_kernel(monkeypatch):
    def plain(q, k, v, attn_mask, scale):
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~attn_mask, float("-inf"))
        return scores.softmax(-1) @ v

    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
    plan = AgentPlan.from_cells(LAYOUTS["text around"], CELLS)
    q, k, v = (x.requires_grad_() for x in tensors(LAYOUTS["text around"]))
    mask = torch.ones(k.shape[:2], dtype=torch.bool)
    mask[1] = False
    out = agent_attention(q, k, v, pool_cells(q[:, 2:-3], plan), plan, key_mask=mask)
    assert (out[1] == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_plan_first_wanted_in_inference_mode_can_be_trained_with():
    layout = LAYOUTS["text around"]
    with torch.inference_mode():
        plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = (x.requires_grad_() for x in tensors(layout))
    agent_attention(q, k, v, pool_cells(q[:, 2:-3], plan), plan).sum().backward()
    assert q.grad.isfinite().all()


def test_hidden_keys_leave_no_trace():
    layout = LAYOUTS["text around"]
    plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = tensors(layout, batch=1)
    agents = pool_cells(q[:, 2:-3], plan)
    mask = torch.rand(1, k.shape[1], generator=torch.Generator().manual_seed(1)) < 0.7
    before = agent_attention(q, k, v, agents, plan, shortcut=0.5, key_mask=mask)
    k, v = (torch.where(mask[..., None, None], x, 100.0) for x in (k, v))
    assert torch.equal(agent_attention(q, k, v, agents, plan, shortcut=0.5, key_mask=mask), before)


def test_a_shortcut_may_be_a_tensor():
    layout = LAYOUTS["text before"]
    plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = tensors(layout)
    agents = pool_cells(q[:, 4:], plan)
    by_number = agent_attention(q, k, v, agents, plan, shortcut=0.075)
    by_tensor = agent_attention(q, k, v, agents, plan, shortcut=0.075 * v[:, 4:])
    torch.testing.assert_close(by_number, by_tensor, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_close_and_keeps_its_dtype(dtype):
    layout = LAYOUTS["text around"]
    plan = AgentPlan.from_cells(layout, CELLS)
    exact = tensors(layout, head_dim=16)
    q, k, v = (x.to(dtype) for x in exact)
    expected = agent_attention(*exact, pool_cells(exact[0][:, 2:-3], plan), plan)
    for backend in ("auto", "reference"):
        out = agent_attention(q, k, v, pool_cells(q[:, 2:-3], plan), plan, backend=backend)
        assert out.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 3e-2
        torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


def test_plans_are_shared_by_copies_and_pickled():
    plan = AgentPlan.from_cells(LAYOUTS["text around"], CELLS)
    assert copy.deepcopy(plan) is plan
    assert plan.to("cpu") is plan
    again = pickle.loads(pickle.dumps(plan))
    assert torch.equal(again.cells, plan.cells)
    assert again.spans == plan.spans
    assert plan.to("meta").device.type == "meta"
    assert plan.nbytes >= 4 * (GRID.tokens + 5 * plan.agents)
    assert "2x2x3 agents on 3x5x7" in repr(plan)


def test_one_graph():
    layout = LAYOUTS["text around"]
    plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = tensors(layout, dtype=torch.float32)
    mask = torch.rand(k.shape[:2]) < 0.8

    def call(q, k, v):
        return agent_attention(q, k, v, pool_cells(q[:, 2:-3], plan), plan, shortcut=0.075, key_mask=mask)

    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="eager")(q, k, v), call(q, k, v))


GRID_SPAN = Span("grid", 4, Grid(1, 2, 2))
OTHER = Span("grid", 6, Grid(1, 2, 3))


@pytest.mark.parametrize(
    ("layout", "cells", "merged", "error", "message"),
    [
        (around(GRID), Grid(1, 6, 1), 0, InvalidInputError, "do not fit"),
        (around(GRID), CELLS, 94, InvalidInputError, "give 0 to 93"),
        (LAYOUTS["text before"], CELLS, 1, UnsupportedError, "alone in its sequence"),
        (TokenLayout((Span("text", 4),), (GRID_SPAN,)), Grid(1, 1, 1), 0, UnsupportedError, "0 grid spans"),
        (TokenLayout((GRID_SPAN, GRID_SPAN), (GRID_SPAN,)), Grid(1, 1, 1), 0, UnsupportedError, "2 grid spans"),
        (TokenLayout((GRID_SPAN,), (OTHER,)), Grid(1, 1, 1), 0, UnsupportedError, "one grid for both"),
        (TokenLayout((GRID_SPAN,), (GRID_SPAN,), (("all",),)), Grid(1, 1, 1), 0, UnsupportedError, "'rule' among"),
    ],
)
def test_plans_that_cannot_be_are_refused(layout, cells, merged, error, message):
    with pytest.raises(error, match=message):
        AgentPlan.from_cells(layout, cells, merged=merged)


def test_calls_that_do_not_fit_are_refused():
    layout = around(GRID)
    plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = tensors(layout)
    agents = pool_cells(q, plan)
    for more, message in (
        ({"agents": agents[:, 1:]}, "agents is"),
        ({"agents": agents.float()}, "agents is"),
        ({"q": q[:, 1:]}, "q has 104 tokens"),
        ({"shortcut": v[:, 1:]}, "shortcut is"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
        ({"plan": layout}, "give an AgentPlan"),
        ({"bias": AgentBias(q[0, :2], q[0, :2], q[0])}, "bias.first"),
    ):
        call = {"q": q, "k": k, "v": v, "agents": agents, "plan": plan, **more}
        with pytest.raises(InvalidInputError, match=message):
            agent_attention(**call)
    for backend in ("triton", "flex", "fa4"):
        with pytest.raises(UnsupportedError, match=f"'{backend}' has no kernel for agent"):
            agent_attention(q, k, v, agents, plan, backend=backend)


@pytest.mark.parametrize("factor", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["scale", "scale2"])
def test_factors_that_mean_nothing(name, factor):
    layout = LAYOUTS["text around"]
    plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = tensors(layout, batch=1, heads=2, head_dim=8, seed=0)
    with pytest.raises(InvalidInputError, match=f"^{name} is {factor}"):
        agent_attention(q, k, v, q[:, : plan.agents], plan, **{name: factor})


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_training_one_projection_goes_past_cudnn(trained, monkeypatch):
    monkeypatch.setattr(agent, "_WITH_CUDNN", ("cpu",))
    plan = AgentPlan.from_cells(LAYOUTS["text around"], CELLS)
    inputs = [x.float() for x in tensors(LAYOUTS["text around"], batch=1, heads=2, head_dim=8, seed=0)]
    agents = inputs[0][:, : plan.agents].clone()
    inputs[trained].requires_grad_()
    allowed, sdpa = [], F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        out = sdpa(*args, **kwargs)
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled() and out.requires_grad)
        return out

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert agent_attention(*inputs, agents, plan).requires_grad
    assert not any(allowed)


def test_training_goes_past_cudnn(monkeypatch):
    """On a GPU alone; here the choice of kernels is made as if this were one."""
    monkeypatch.setattr(agent, "_WITH_CUDNN", ("cpu",))
    layout = LAYOUTS["text around"]
    plan = AgentPlan.from_cells(layout, CELLS)
    q, k, v = (x.float().requires_grad_() for x in tensors(layout, batch=1, heads=2, head_dim=8, seed=0))
    allowed, sdpa = [], F.scaled_dot_product_attention

    def watched(*args, **kwargs):
        allowed.append(torch.backends.cuda.cudnn_sdp_enabled())
        return sdpa(*args, **kwargs)

    def run(q, k, v):
        return agent_attention(q, k, v, q[:, : plan.agents], plan)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    eager = run(q, k, v)
    calls = len(allowed)
    assert not any(allowed)
    with torch.no_grad():
        run(q, k, v)
    assert len(allowed) == 2 * calls
    assert all(allowed[calls:])
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)(q, k, v)
    torch.testing.assert_close(compiled, eager)
    assert compiled.requires_grad
    assert torch.backends.cuda.cudnn_sdp_enabled()
