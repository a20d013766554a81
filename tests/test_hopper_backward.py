"""The backward pass on Hopper: against float64 on a Hopper GPU; elsewhere it is compiled ahead of time."""

import pytest
import torch
from ahead_of_time import shared_memory
from test_hopper import on_hopper, plans

from fastdiff_kernels import attention
from fastdiff_kernels.tuning import hopper_backward

BRAIN, HALF = torch.bfloat16, torch.float16

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from fastdiff_kernels import hopper_backward

head_dim, rule, masked = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "True"
tile = hopper_backward.tile_of(head_dim)
shared = dict.fromkeys(("grad_q", "grad_k", "grad_v"), "*bf16")
layout = gl.NVMMASharedLayout.get_default_for(tile, gl.bfloat16)
shared |= dict.fromkeys(("q_desc", "up_desc", "k_desc", "v_desc"), f"tensordesc<bf16{tile},{layout!r}>")
terms = f"tensordesc<fp32{hopper_backward.TERM_TILE},{hopper_backward.TERM_LAYOUT!r}>"
shared |= dict.fromkeys(("lse_desc", "delta_desc"), terms)
shared |= dict.fromkeys(("lse", "delta", "limits"), "*fp32") | {"masked": "*i1"}
shared |= dict.fromkeys(("scale_log2", "scale"), "fp32")
tables = "q_order k_order q_table k_table launch_order full_offsets full_indices partial_offsets partial_indices"
shared |= dict.fromkeys([*tables.split(), "rule", "bits", "bit_place"], "*i32")
for kernel in (hopper_backward._columns_kernel, hopper_backward._rows_kernel):
    constants = {"HEAD_DIM": head_dim, "RULE": rule, "HAS_KEY_MASK": masked}
    kinds = shared | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    source = GluonASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert "wgmma" in built.asm["ptx"]
    print(built.metadata.shared)
"""


@pytest.mark.parametrize(("head_dim", "rule", "masked"), [(128, 2, False), (40, 3, True), (128, 1, True)])
def test_they_compile_and_fit_shared_memory(head_dim, rule, masked, tmp_path):
    pytest.importorskip("triton")
    found = shared_memory(COMPILE, [str(head_dim), str(rule), str(masked)], tmp_path)
    assert len(found) == 2
    assert max(found) <= 232_448


@on_hopper
@pytest.mark.gpu
@pytest.mark.parametrize("name", plans())
@pytest.mark.parametrize(
    ("head_dim", "dtype", "masked"),
    [(128, BRAIN, False), (128, HALF, True), (96, BRAIN, False), (64, BRAIN, True), (40, HALF, False)],
    ids=str,
)
def test_gradients_equal_float64(name, head_dim, dtype, masked, poison):
    plan = plans()[name].to("cuda")
    torch.manual_seed(0)
    shape = (2, plan.heads or 3, plan.query_tokens, head_dim)
    *inputs, upstream = (torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for _ in range(4))
    upstream_lse = torch.randn(shape[:3], device="cuda")
    mask = None
    if masked:
        # Single keys, and all from some place on; hidden ones with scores that no seen key has.
        mask = torch.rand(2, plan.key_tokens, device="cuda") < 0.8
        mask[1, plan.key_tokens // 2 :] = False
        inputs[1] = torch.where(mask[..., None, None], inputs[1], 100 * inputs[1])

    def gradients(inputs, backend):
        inputs = [x.detach().requires_grad_() for x in inputs]
        out, lse = attention(*inputs, plan, key_mask=mask, return_lse=True, backend=backend)
        upstreams = (upstream.to(out.dtype), upstream_lse.to(lse.dtype).masked_fill(lse == float("-inf"), 0))
        return torch.autograd.grad((out, lse), inputs, upstreams)

    truth = gradients([x.double() for x in inputs], "reference")
    ours, again = (gradients(inputs, "triton") for _ in range(2))
    for found, same, true in zip(ours, again, truth, strict=True):
        assert torch.equal(found, same)
        assert (found.double() - true).norm() < 1e-2 * true.norm()


@on_hopper
@pytest.mark.gpu
def test_other_calls_are_left_to_the_portable_kernels():
    plan = plans()["box"].to("cuda")
    query = torch.empty(1, plan.query.slots, 2, 128, device="cuda", dtype=torch.bfloat16)
    kernels = hopper_backward(query.device)
    assert kernels.fits(query, plan, 0.1)
    assert not kernels.fits(query, plan, -0.1)
    assert not kernels.fits(query.float(), plan, 0.1)
    assert not kernels.fits(query[..., :32], plan, 0.1)
    assert not kernels.fits(query[..., :100], plan, 0.1)
