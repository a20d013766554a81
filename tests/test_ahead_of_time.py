"""The portable Triton kernels, compiled for GPUs that are not at hand: they build, and fit shared memory."""

import pytest
from ahead_of_time import shared_memory

# Shared memory that one program may take, in bytes.
TARGETS = {
    "cuda 80": 166_912,
    "cuda 86": 101_376,
    "cuda 89": 101_376,
    "cuda 90": 232_448,
    "cuda 100": 232_448,
    "hip gfx942": 65_536,
}
BUILD = """
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff_kernels import block_sparse, block_sparse_backward
from fastdiff_kernels.rule import RuleKind
from fastdiff_kernels.tuning import backward_tile, forward_tile

backend, arch, limit, dim = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
forward = forward_tile(128, 128, dim, torch.bfloat16, limit)
backward = backward_tile(128, 128, dim, torch.bfloat16, limit)
shared = {"HEAD_DIM": dim, "BLOCK_D": dim, "BLOCK_Q": 128, "BLOCK_K": 128, "RULE": int(RuleKind.BOX)}
shared |= {"HAS_KEY_MASK": True, "KEY_MASK_OF_HEAD": False, "EXACT": False}
kernels = (
    (block_sparse._forward_kernel, forward, {"TILE_Q": forward.queries, "TILE_K": forward.keys, "WRITE_LSE": True}),
    (block_sparse_backward._grad_q_kernel, backward, {"TILE_Q": backward.held, "TILE_K": backward.walked}),
    (block_sparse_backward._grad_kv_kernel, backward, {"TILE_K": backward.held, "TILE_Q": backward.walked}),
)
kinds = dict.fromkeys(("q", "k", "v", "out", "upstream", "grad_q", "grad_k", "grad_v"), "*bf16")
kinds |= {"lse": "*fp32", "delta": "*fp32", "key_mask": "*i8", "scale_log2": "fp32", "scale": "fp32"}
tables = "q_order k_order q_table k_table launch_order full_offsets full_indices partial_offsets partial_indices"
kinds |= dict.fromkeys([*tables.split(), "rule", "bits", "bit_place"], "*i32")
for kernel, tile, own in kernels:
    constants = shared | own
    names = {name: "constexpr" if name in constants else kinds.get(name, "i32") for name in kernel.arg_names}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    print(triton.compile(ASTSource(kernel, names, constants), target=target, options=options).metadata.shared)
"""


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_build_and_fit(target, tmp_path):
    pytest.importorskip("triton")
    found = shared_memory(BUILD, [*target.split(), str(TARGETS[target]), "128"], tmp_path)
    assert len(found) == 3
    assert max(found) <= TARGETS[target]
