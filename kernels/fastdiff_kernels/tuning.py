"""Tile shapes of the Triton kernels by GPU, head dim and dtype. Imports no triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Shared memory that one program may take, in bytes, by compute capability; what is not listed gets the smallest.
SHARED_MEMORY = {(8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (10, 0): 232_448}


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        queries, keys: Rows and columns of scores computed at once; powers of two that divide the plan's blocks.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def forward_tile(block_q: int, block_k: int, head_dim: int, dtype: torch.dtype, shared_memory: int) -> Tile:
    """The tile of the forward kernel: the deepest pipeline, then the widest tile, that fits shared memory.

    Args:
        block_q, block_k: Blocks of the plan, powers of two.
        head_dim: Head dim as padded in the kernel, a power of two.
        dtype: Of queries, keys and values.
        shared_memory: Bytes a program may take.
    """
    exact = dtype == torch.float32
    queries = min(block_q, 64 if exact or head_dim > 128 else 128)
    row = head_dim * dtype.itemsize
    for keys in (128, 64, 32, 16):
        if keys > block_k or (exact and keys > 64):
            continue
        for stages in (3, 2):
            if queries * row + 2 * stages * keys * row <= shared_memory:
                return Tile(queries, keys, 8 if queries * max(head_dim, 64) >= 128 * 128 else 4, stages)
    return Tile(queries, 16, 4, 1)


def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory one program may take on this device; the CPU, for the interpreter, counts as sm90."""
    if device.type != "cuda":
        return SHARED_MEMORY[9, 0]
    limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    smallest = min(SHARED_MEMORY.values())
    return limit or SHARED_MEMORY.get(torch.cuda.get_device_capability(device), smallest)
