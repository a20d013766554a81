"""The Hopper kernel: against the reference on a Hopper GPU; elsewhere it is compiled ahead of time."""

import pytest
import torch
from ahead_of_time import shared_memory
from plans import box_rule, metric_rule, random_bits_plan

from fastdiff_kernels import BlockPlan, Grid, Rule, Side, TokenLayout, attention, snake_order
from fastdiff_kernels.tuning import hopper_kernel

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU")

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from fastdiff_kernels.hopper import _forward_kernel as kernel, tile_of

head_dim, rule = int(sys.argv[1]), int(sys.argv[2])
tile = tile_of(head_dim)
layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
constants = {"HEAD_DIM": head_dim, "RULE": rule, "HAS_KEY_MASK": sys.argv[3] == "True", "WRITE_LSE": True}
kinds = {"q": "*bf16", "out": "*bf16", "lse": "*fp32", "scale_log2": "fp32", **dict.fromkeys(constants, "constexpr")}
kinds |= dict.fromkeys(("k_desc", "v_desc"), f"tensordesc<bf16{tile},{layout!r}>")
tables = "q_order q_table k_table launch_order full_offsets full_indices partial_offsets partial_indices rule bits"
kinds |= dict.fromkeys(tables.split(), "*i32") | {"limits": "*fp32", "masked": "*i1"}
signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
source = GluonASTSource(kernel, signature, constants)
built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
assert b"wgmma" in built.asm["ptx"].encode()
print(built.metadata.shared)
"""


@pytest.mark.parametrize(
    ("head_dim", "rule", "masked"), [(128, 2, False), (128, 2, True), (128, 3, False), (40, 6, True), (256, 2, True)]
)
def test_it_compiles_and_fits_shared_memory(head_dim, rule, masked, tmp_path):
    pytest.importorskip("triton")
    (found,) = shared_memory(COMPILE, [str(head_dim), str(rule), str(masked)], tmp_path)
    assert found <= 232_448


def plans() -> dict[str, BlockPlan]:
    grid = Grid(3, 13, 17)
    text = TokenLayout.self_attention(grid, 5, 9)
    size = {"block_q": 128, "block_k": 128, "grid_order": snake_order}
    whole = Rule.metric(torch.tensor([10_000] * 3))
    return {
        "dense": BlockPlan.from_rule(TokenLayout.self_attention(Grid(1, 8, 16)), whole, **size),
        "dense with text": BlockPlan.from_rule(text, whole, **size),
        "metric": BlockPlan.from_rule(text, metric_rule(3), **size),
        "box": BlockPlan.from_rule(text, box_rule(grid), **size),
        "in token order": in_token_order(),
        "ball": BlockPlan.from_rule(text, Rule.metric(torch.tensor([40, 30, -1])), **size),
        "bits per head": bits_plan(),
    }


def in_token_order() -> BlockPlan:
    """663 tokens as they come: keys need no reordering, and the last block has 23 of them."""
    layout = TokenLayout.self_attention(Grid(3, 13, 17))
    return BlockPlan.from_rule(layout, metric_rule(3), block_q=128, block_k=128)


def bits_plan() -> BlockPlan:
    """Lists, orders and bitmaps that differ by head, an empty row among them."""
    heads, tokens = 3, 700
    generator = torch.Generator().manual_seed(3)
    orders = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(heads)])
    orders = torch.nn.functional.pad(orders, (0, -tokens % 128), value=-1).to(torch.int32)
    table = torch.zeros(*orders.shape, 5, dtype=torch.int32)
    table[..., 4] = (orders >= 0).int()
    key_table = torch.zeros_like(table)
    key_table[..., 3] = (orders >= 0).int()
    blocks = orders.shape[1] // 128
    state = torch.randint(0, 3, (heads, blocks, blocks), generator=generator)
    state[:, 0] = 0
    bits = torch.randint(0, 2**16, state.shape, generator=generator, dtype=torch.int32)
    query, key = Side(tokens, 128, orders, table), Side(tokens, 128, orders, key_table)
    return BlockPlan.from_states(query, key, state, Rule.bits(32, 32, 4), bits)


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("name", plans())
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_it_equals_the_reference(name, head_dim, dtype, poison):
    plan = plans()[name].to("cuda")
    torch.manual_seed(0)
    shape = (2, plan.heads or 3, plan.query_tokens, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(3))
    for factor in (1, 300):
        check(q * factor, k, v, plan, atol=2e-2 * factor)
    assert torch.equal(attention(q, k, v, plan, backend="triton"), attention(q, k, v, plan, backend="triton"))


def check(q, k, v, plan: BlockPlan, *, atol: float, key_mask: torch.Tensor | None = None) -> None:
    assert hopper_kernel(q.device).fits(q, plan, q.shape[-1] ** -0.5)
    out, lse = attention(q, k, v, plan, key_mask=key_mask, return_lse=True, backend="triton")
    inputs = (q.double(), k.double(), v.double())
    truth, true_lse = attention(*inputs, plan, key_mask=key_mask, return_lse=True, backend="reference")
    for ours, true in zip(out.double(), truth, strict=True):
        assert (ours - true).norm() <= 1e-2 * true.norm()
    torch.testing.assert_close(lse, true_lse.float(), atol=atol, rtol=1e-2)


@on_hopper
@pytest.mark.gpu
def test_keys_in_token_order_are_read_where_they_stand(monkeypatch):
    """Of each sample no more than is its own: what comes behind it in memory is NaN."""
    plan = in_token_order().to("cuda")
    monkeypatch.setattr("fastdiff_kernels.hopper.gather", lambda *pairs: pytest.fail("keys are copied"))
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 663, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    alone = attention(q[:1], k[:1], v[:1], plan, backend="triton")
    k[1], v[1] = float("nan"), float("nan")
    assert torch.equal(attention(q, k, v, plan, backend="triton")[:1], alone)


@on_hopper
@pytest.mark.gpu
def test_keys_that_the_copy_engine_cannot_read_are_copied():
    """Strides or a start that are no multiples of 16 bytes, and one sample seen as two."""
    plan = in_token_order().to("cuda")
    torch.manual_seed(0)
    q, plain = (torch.randn(2, 663, 3, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    want = attention(q, plain, plain, plan, backend="triton")
    apart = torch.zeros(2, 663, 3 * 64 + 2, device="cuda", dtype=torch.bfloat16)[..., :-2].unflatten(-1, (3, 64))
    late = torch.zeros(plain.numel() + 2, device="cuda", dtype=torch.bfloat16)[2:].view(plain.shape)
    for x in (apart, late):
        x.copy_(plain)
        assert torch.equal(attention(q, x, plain, plan, backend="triton"), want)
        assert torch.equal(attention(q, plain, x, plan, backend="triton"), want)
    twice = plain[:1].expand(2, -1, -1, -1)
    want = attention(q, twice.contiguous(), twice.contiguous(), plan, backend="triton")
    assert torch.equal(attention(q, twice, twice, plan, backend="triton"), want)


def masks(plan: BlockPlan) -> torch.Tensor:
    """For a sample each: padding at the end, random keys, the plan's first and third block of keys, no key at all."""
    mask = torch.ones(4, plan.key_tokens, dtype=torch.bool)
    mask[0, -6:] = False
    mask[1] = torch.rand(plan.key_tokens, generator=torch.Generator().manual_seed(0)) < 0.7
    blocks = plan.key.order[0].view(-1, 128)
    hidden = blocks[[0, 2 % len(blocks)]].flatten()
    mask[2, hidden[hidden >= 0].long()] = False
    mask[3] = False
    return mask


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "head_dim", "dtype"),
    [
        ("dense", 128, torch.bfloat16),
        ("dense with text", 64, torch.float16),
        ("metric", 128, torch.bfloat16),
        ("box", 256, torch.float16),
        ("ball", 40, torch.bfloat16),
        ("bits per head", 128, torch.float16),
        ("bits per head", 256, torch.bfloat16),
    ],
)
def test_key_masks(name, head_dim, dtype, poison):
    plan = plans()[name]
    mask = masks(plan).to("cuda")
    plan = plan.to("cuda")
    torch.manual_seed(0)
    shape = (4, plan.query_tokens, plan.heads or 3, head_dim)
    q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    for factor in (1, 300):
        check(q * factor, k, v, plan, atol=2e-2 * factor, key_mask=mask)


def test_the_interpreter_takes_the_portable_kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("fastdiff_kernels.tuning._load_hopper", lambda: "kernel")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert hopper_kernel(torch.device("cuda", 0)) == "kernel"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert hopper_kernel(torch.device("cuda", 0)) is None


@on_hopper
@pytest.mark.gpu
def test_other_calls_are_left_to_the_portable_kernel():
    plan = plans()["metric"].to("cuda")
    q = torch.randn(1, plan.query_tokens, 2, 128, device="cuda", dtype=torch.bfloat16)
    kernel = hopper_kernel(q.device)
    small, _ = random_bits_plan(75, 41, heads=2)
    assert not kernel.fits(q, plan, -0.1)
    assert not kernel.fits(q.float(), plan, 0.1)
    assert not kernel.fits(q[..., :36], plan, 0.1)
    assert not kernel.fits(q[..., :32], plan, 0.1)
    assert not kernel.fits(q, small, 0.1)
