"""The operators under torch's own checks and under torch.compile."""

import pytest
import torch
from plans import metric_plan

from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError, attention
from fastdiff_kernels.ops import block_sparse, block_sparse_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(plan, requires_grad=False):
    torch.manual_seed(0)
    q = torch.randn(2, plan.query_tokens, 2, 16, device=DEVICE)
    return [x.requires_grad_(requires_grad) for x in (q, torch.randn_like(q), torch.randn_like(q))]


@pytest.mark.parametrize("return_lse", [False, True])
def test_opcheck(return_lse):
    plan = metric_plan(Grid(2, 3, 5))
    arguments = (*inputs(plan, requires_grad=True), plan.handle, None, 0.25, return_lse, "torch")
    torch.library.opcheck(block_sparse, arguments)
    q, k, v = inputs(plan)
    outputs = block_sparse(q, k, v, plan.handle, None, 0.25, True, "torch")
    backward = (torch.ones_like(q), None, q, k, v, *outputs, plan.handle, None, 0.25, "torch")
    torch.library.opcheck(block_sparse_backward, backward)


def test_fullgraph_compile_with_one_graph_for_many_plans():
    plans = [metric_plan(Grid(2, 3, 5), block_q=block) for block in (16, 32, 64)]
    plans += [metric_plan(Grid(3, 2, 5))]
    graphs = []

    def count(module, example_inputs):
        graphs.append(module)
        return module.forward

    class Layer(torch.nn.Module):
        def __init__(self, plan):
            super().__init__()
            self.plan = plan

        def forward(self, q, k, v):
            return attention(q * 2, k, v, self.plan)

    @torch.compile(backend=count, fullgraph=True)
    def run(layer, q, k, v):
        return layer(q, k, v)

    for plan in plans:
        q, k, v = inputs(plan)
        layer = Layer(plan)
        torch.testing.assert_close(run(layer, q, k, v), layer(q, k, v))
    assert len(graphs) == 1


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("tokens", [29, 31])
def test_compiled_calls_that_do_not_fit_are_refused(tokens, backend):
    plan = metric_plan(Grid(2, 3, 5))

    @torch.compile(backend="eager", fullgraph=True)
    def run(x):
        return attention(x, x, x, plan, backend=backend)

    with pytest.raises(InvalidInputError, match="this plan is for 30"):
        run(torch.randn(1, tokens, 2, 16, device=DEVICE))


def test_compiled_gradients():
    plan = metric_plan(Grid(2, 3, 5))

    def loss(q, k, v):
        return (attention(q, k, v, plan) ** 2).sum()

    eager, compiled = inputs(plan, True), inputs(plan, True)
    loss(*eager).backward()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(*compiled).backward()
    for ours, theirs in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradients_of_a_plan_that_its_maker_dropped():
    tensors = inputs(metric_plan(Grid(2, 3, 5)), requires_grad=True)
    kept = metric_plan(Grid(2, 3, 5))
    (want,) = torch.autograd.grad(attention(*tensors, kept).sum(), tensors[:1])
    out = attention(*tensors, metric_plan(Grid(2, 3, 5)))
    (found,) = torch.autograd.grad(out.sum(), tensors[:1])
    assert torch.equal(found, want)


def test_second_derivatives_are_refused_but_by_the_reference():
    plan = metric_plan(Grid(2, 3, 5))
    q, k, v = inputs(plan, requires_grad=True)
    for backend in ("torch", "reference"):
        (grad,) = torch.autograd.grad((attention(q, k, v, plan, backend=backend) ** 2).sum(), q, create_graph=True)
        if backend == "reference":
            assert torch.autograd.grad(grad.sum(), q)[0].norm() > 0
        else:
            with pytest.raises(UnsupportedError, match="second derivatives"):
                grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_autocast_changes_nothing_within(return_lse, backend):
    plan = metric_plan(Grid(2, 3, 5))
    found = []
    for on in (False, True):
        tensors = inputs(plan, requires_grad=True)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=on):
            out = attention(*tensors, plan, return_lse=return_lse, backend=backend)
        out = out if return_lse else (out,)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=on and backend == "torch"):
            found.append((*out, *torch.autograd.grad([x.sum() for x in out], tensors)))
    for plain, cast in zip(*found, strict=True):
        assert torch.equal(plain, cast)


def test_autocast_takes_what_the_layers_hand_over():
    plan = metric_plan(Grid(2, 3, 5))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        q, k, v = (torch.nn.functional.linear(x, torch.eye(16, device=DEVICE)) for x in inputs(plan))
        assert attention(q, k, v, plan).dtype == torch.bfloat16
