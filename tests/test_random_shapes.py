"""Random shapes against the reference: a thousand for each kernel on a GPU, a few in the interpreter.

Shapes, lists, orders, text, masks and strides are drawn; what is compiled into the kernels is not, so that a run
compiles few of them. A failure names the variant and the number of the shape, which draw the same call again.
"""

from random import Random

import pytest
import torch
from random_calls import Call, Variant, draw_agents, draw_call, draw_mask, draw_tensor

from fastdiff_kernels import AgentBias, agent_attention, attention, pool_cells
from fastdiff_kernels.tuning import hopper_kernel

ON_GPU = torch.cuda.is_available()
ON_HOPPER = ON_GPU and torch.cuda.get_device_capability() == (9, 0)
DEVICE = "cuda" if ON_GPU else "cpu"
MOST = 600 if ON_GPU else 50
SHAPES = 1000
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32

PORTABLE = [
    Variant("box", 64, (64, 64), BRAIN),
    Variant("box", 128, (128, 128), BRAIN, masked=True),
    Variant("box", 128, (128, 128), HALF, lse=False),
    Variant("box", 40, (64, 32), FULL),
    Variant("box", 32, (16, 16), FULL, masked=True, lse=False),
    Variant("box", 64, (32, 128), HALF, by_head=True),
    Variant("disc", 64, (128, 64), BRAIN, masked=True),
    Variant("disc", 128, (128, 128), BRAIN, lse=False),
    Variant("disc", 16, (32, 32), FULL),
    Variant("disc", 48, (64, 64), HALF, by_head=True, masked=True),
    Variant("metric", 128, (128, 128), BRAIN),
    Variant("ball", 64, (64, 64), HALF, masked=True, lse=False),
    Variant("ball", 80, (32, 64), FULL),
    Variant("metric", 96, (64, 128), BRAIN, by_head=True),
    Variant("bits", 64, (64, 64), BRAIN, by_head=True),
    Variant("mixed bits", 128, (128, 128), HALF, masked=True, lse=False),
    Variant("bits", 32, (32, 16), FULL, by_head=True, masked=True),
    Variant("none", 64, (64, 64), BRAIN, masked=True),
    Variant("none", 256, (128, 64), HALF),
    Variant("none", 24, (16, 32), FULL, by_head=True, lse=False),
]
HOPPER = [
    Variant("box", 128, (128, 128), BRAIN),
    Variant("box", 64, (128, 128), HALF, by_head=True, lse=False),
    Variant("disc", 64, (128, 128), BRAIN),
    Variant("disc", 128, (128, 128), HALF, by_head=True),
    Variant("metric", 128, (128, 128), BRAIN, lse=False),
    Variant("ball", 64, (128, 128), HALF),
    Variant("bits", 128, (128, 128), BRAIN, by_head=True),
    Variant("mixed bits", 64, (128, 128), BRAIN, lse=False),
    Variant("none", 128, (128, 128), HALF),
    Variant("none", 64, (128, 128), BRAIN, by_head=True),
    Variant("box", 128, (128, 128), BRAIN, masked=True),
    Variant("ball", 40, (128, 128), HALF, masked=True, lse=False),
    Variant("bits", 64, (128, 128), BRAIN, by_head=True, masked=True),
    Variant("none", 256, (128, 128), HALF, masked=True),
]
AGENTS = [(dim, dtype, masked) for dim in (40, 64, 128) for dtype in (BRAIN, HALF, FULL) for masked in (False, True)]

# Of a row, relative to it and to the mean row, where a key of 600 that is lost makes 2e-3 to 3e-2. Agents round twice.
LIMIT = {FULL: 1e-5, HALF: 2e-3, BRAIN: 8e-3}
AGENT_LIMIT = {FULL: 3e-5, HALF: 6e-3, BRAIN: 5e-2}


def shapes(variants: list) -> range:
    return range(-(-SHAPES // len(variants)) if ON_GPU else 1)


def everywhere(variants: list) -> list:
    """Marked where a GPU runs them; of the block-sparse ones the interpreter takes a few that are small."""
    if ON_GPU:
        return [pytest.param(variant, marks=pytest.mark.gpu, id=str(variant)) for variant in variants]
    small = [x for x in variants if not isinstance(x, Variant) or max(*x.blocks, x.head_dim) <= 80]
    return [pytest.param(variant, id=str(variant)) for variant in small[::2]]


def error(ours: torch.Tensor, truth: torch.Tensor, cancelled: torch.Tensor | float = 0.0) -> float:
    """The worst row's difference, relative to that row, the mean one, and what was `cancelled` to get it."""
    ours, truth = ours.detach().double(), truth.detach()
    size = truth.norm(dim=-1)
    return float(((ours - truth).norm(dim=-1) / (size + size.mean() + cancelled).clamp(min=1e-30)).max())


def limit(call: Call, lse: torch.Tensor) -> float:
    """Scores carry float32's error, which grows with them."""
    return LIMIT[call.q.dtype] + 5e-7 * float(lse.detach().masked_fill(lse.isinf(), 0).abs().max())


@pytest.fixture
def portable(monkeypatch):
    """The portable Triton kernel, on Hopper too."""
    monkeypatch.setattr("fastdiff_kernels.tuning._load_hopper", lambda: None)


def check_forward(call: Call, lse: bool, backend: str = "triton") -> None:
    inputs = (call.q, call.k, call.v)
    truth, true_lse = attention(
        *(x.double() for x in inputs), call.plan, backend="reference", return_lse=True, **call.options
    )
    found = [attention(*inputs, call.plan, backend=backend, return_lse=lse, **call.options) for _ in range(2)]
    out, again = (x[0] if lse else x for x in found)
    assert torch.equal(out, again), "two runs differ"
    assert error(out, truth) <= limit(call, true_lse)
    unseen = (true_lse == float("-inf")).transpose(1, 2)
    assert (out[unseen] == 0).all(), "queries without keys"
    if lse:
        assert torch.equal(found[0][1], found[1][1]), "two runs differ in their log-sum-exp"
        torch.testing.assert_close(found[0][1], true_lse.float(), atol=1e-3, rtol=1e-5)


def check_backward(call: Call, rng: Random, lse: bool, backend: str = "triton") -> None:
    generator = torch.Generator(DEVICE).manual_seed(rng.randrange(2**31))
    upstream = torch.randn(call.q.shape, generator=generator, device=DEVICE).to(call.q.dtype)
    of_lse = torch.randn(call.q[..., 0].transpose(1, 2).shape, generator=generator, device=DEVICE)

    def forward(way: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (call.q, call.k, call.v)]
        return inputs, *attention(*inputs, call.plan, backend=way, return_lse=True, **call.options)

    def grads(inputs, out, found) -> list[torch.Tensor]:
        if not lse:
            return torch.autograd.grad(out, inputs, upstream.to(out.dtype), retain_graph=True)
        # The log-sum-exp of a query without keys is no number to train with.
        of_found = torch.where(found.isfinite(), of_lse.to(found.dtype), 0)
        return torch.autograd.grad((out, found), inputs, (upstream.to(out.dtype), of_found), retain_graph=True)

    exact = forward("reference", torch.float64)
    (q, k, v), out, true_lse = exact
    truth = grads(*exact)
    # A query with one key has no gradient: it comes from subtracting dO . O from dO . v, which are rounded.
    rounded = abs(call.scale) * (upstream.double().norm(dim=-1) * out.norm(dim=-1))
    mean_key = attention(q, k, k, call.plan, backend="reference", **call.options).norm(dim=-1)
    weight = (rounded * q.norm(dim=-1))[..., None].expand_as(out)
    mean_query = torch.autograd.grad(out, v, weight, retain_graph=True)[0][..., 0]
    # Slopes that float16 has no numbers for, below 6e-8, are lost whatever they are multiplied with.
    numbers = torch.finfo(call.q.dtype)
    lost = abs(call.scale) * numbers.smallest_normal * numbers.eps / 2 / LIMIT[call.q.dtype]
    of_keys, of_queries = (lost * x.detach().norm(dim=-1).sum(1, keepdim=True) for x in (k, q))
    cancelled = ((rounded * mean_key).detach() + of_keys, mean_query + of_queries, 0.0)

    unseen = (true_lse == float("-inf")).transpose(1, 2)
    ours, again = (grads(*forward(backend, call.q.dtype)) for _ in range(2))
    for index, name in enumerate("qkv"):
        found = ours[index]
        assert torch.equal(found, again[index]), f"two runs differ in the gradient of {name}"
        assert error(found, truth[index], cancelled[index]) <= limit(call, true_lse), f"gradient of {name}"
        nothing = unseen if name == "q" else (truth[2] == 0).all(-1)
        assert (found[nothing] == 0).all(), f"gradient of {name} that sees nothing"


def run(variant: Variant, number: int, check, **options) -> None:
    rng = Random(f"{variant} {number}")
    call = draw_call(variant, rng, MOST, DEVICE, **options)
    try:
        check(call, rng)
    except AssertionError as failure:
        raise AssertionError(f"shape {number} of {variant}: {call}") from failure


@pytest.mark.parametrize("variant", everywhere(PORTABLE))
def test_portable_forward(variant, portable, poison):
    for number in shapes(PORTABLE):
        run(variant, number, lambda call, rng: check_forward(call, variant.lse))


@pytest.mark.parametrize("variant", everywhere(PORTABLE))
def test_backward(variant, portable, poison):
    for number in shapes(PORTABLE):
        run(variant, number, lambda call, rng: check_backward(call, rng, variant.lse))


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("variant", HOPPER, ids=str)
def test_hopper_forward(variant, poison):
    def check(call, rng):
        assert hopper_kernel(call.q.device).fits(call.q, call.plan, call.scale)
        check_forward(call, variant.lse)

    for number in shapes(HOPPER):
        run(variant, number, check, positive=True)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")
@pytest.mark.parametrize("variant", HOPPER, ids=str)
def test_hopper_backward(variant, poison):
    for number in shapes(HOPPER):
        run(variant, number, lambda call, rng: check_backward(call, rng, variant.lse), positive=True)


@pytest.mark.parametrize("variant", PORTABLE, ids=str)
def test_the_torch_backend(variant, poison):
    def check(call, rng):
        check_forward(call, variant.lse, "torch")
        check_backward(call, rng, variant.lse, "torch")

    for number in range(4):
        run(variant, number, check)


@pytest.mark.parametrize("variant", everywhere(AGENTS))
def test_agents(variant, poison):
    for number in shapes(AGENTS):
        check_agents(*variant, Random(f"{variant} {number}"))


def check_agents(head_dim: int, dtype: torch.dtype, masked: bool, rng: Random) -> None:
    plan, layout = draw_agents(rng, MOST)
    plan = plan.to(DEVICE)
    batch, heads = rng.randint(1, 3), rng.randint(1, 4)
    tokens = (layout.query_tokens, layout.key_tokens, layout.key_tokens)
    q, k, v = (draw_tensor(rng, batch, n, heads, head_dim, dtype, DEVICE) for n in tokens)
    start, stop = plan.spans.query_grid
    agents = pool_cells(q[:, start:stop], plan)
    more = {"scale": head_dim**-0.5, "scale2": rng.choice([None, 0.3]), "shortcut": rng.choice([0.0, 0.075])}
    if masked:
        more["key_mask"] = draw_mask(rng, batch, layout.key_tokens, DEVICE)
    exact = [x.double() for x in (q, k, v, agents)]
    bias = None
    if rng.random() < 0.3:
        parts = [draw_tensor(rng, heads, plan.agents, 1, 12, FULL, DEVICE)[:, :, 0] for _ in range(2)]
        bias = AgentBias(*parts, draw_tensor(rng, 1, plan.grid.tokens, 1, 12, FULL, DEVICE)[0, :, 0])
    truth = agent_attention(*exact, plan, backend="reference", bias=bias, **more)
    found = [agent_attention(q, k, v, agents, plan, bias=bias, **more) for _ in range(2)]
    what = f"{plan} of {list(q.shape)} queries, shortcut {more['shortcut']}, bias {bias is not None}"
    assert torch.equal(*found), f"two runs differ: {what}"
    assert error(found[0], truth) <= AGENT_LIMIT[dtype], what

    upstream = draw_tensor(rng, batch, q.shape[1], heads, head_dim, dtype, DEVICE)
    grads = []
    for way, inputs in (("reference", exact), ("auto", (q, k, v, agents))):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = agent_attention(*inputs, plan, backend=way, bias=bias, **more)
        grads.append(torch.autograd.grad(out, inputs, upstream.to(out.dtype)))
    # Where a query sees one agent alone its gradient is what rounding leaves of that of its scores.
    rest = upstream.double().norm()
    for name, true, ours in zip(("q", "k", "v", "agents"), *grads, strict=True):
        assert (ours.double() - true).norm() <= AGENT_LIMIT[dtype] * (true.norm() + rest), f"gradient of {name}: {what}"
