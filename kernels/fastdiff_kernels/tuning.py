"""Which Triton kernel runs on a GPU, and its tile shapes by shared memory, head dim and dtype. Imports no triton."""

from __future__ import annotations

import importlib
import logging
import os
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

_logger = logging.getLogger("fastdiff")

# Shared memory that one program may take, in bytes, by compute capability, (9, 4) that of AMD's gfx942; what is not
# listed gets the smallest.
SHARED_MEMORY = {
    (8, 0): 166_912, (8, 6): 101_376, (8, 9): 101_376, (9, 0): 232_448, (9, 4): 65_536, (10, 0): 232_448,
}  # fmt: skip


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
    """The tile of the forward kernel: the widest that fits shared memory, with the deepest pipeline there.

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


@dataclass(frozen=True)
class BackwardTile:
    """How a backward kernel cuts its work: the side whose gradient it holds, and the side that it walks along."""

    held: int
    walked: int
    warps: int
    stages: int


def backward_tile(
    held_block: int, walked_block: int, head_dim: int, dtype: torch.dtype, shared_memory: int
) -> BackwardTile:
    """The tile of a backward kernel: the widest that fits shared memory, with the deepest pipeline there.

    Args:
        held_block, walked_block: Blocks of the plan on the two sides, powers of two.
        head_dim, dtype, shared_memory: As in `forward_tile`.
    """
    row = head_dim * dtype.itemsize
    small = dtype == torch.float32 or head_dim > 128
    for held, walked in ((128, 64), (64, 64), (64, 32), (32, 32), (16, 16)):
        held, walked = min(held, held_block, 32 if small else 128), min(walked, walked_block, 32 if small else 64)
        for stages in (3, 2, 1):
            # Both tensors of the held side stay; those of the walked side are buffered.
            if 2 * held * row + 2 * stages * walked * row + 2 * held * walked * dtype.itemsize <= shared_memory:
                return BackwardTile(held, walked, 8 if held * head_dim >= 128 * 128 else 4, stages)
    return BackwardTile(min(16, held_block), min(16, walked_block), 4, 1)


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least this. Triton's own takes ten microseconds outside of kernels."""
    return 1 << (least - 1).bit_length()


def shared_memory_of(device: torch.device) -> int:
    """Bytes of shared memory one program may take on this device; the CPU, for the interpreter, counts as sm90."""
    if device.type != "cuda":
        return SHARED_MEMORY[9, 0]
    limit = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", None)
    smallest = min(SHARED_MEMORY.values())
    return limit or SHARED_MEMORY.get(torch.cuda.get_device_capability(device), smallest)


def interpreted() -> bool:
    """Whether Triton interprets kernels on the CPU. Its bfloat16 product is wrong there, so all compute in float32."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def hopper_kernel(device: torch.device) -> ModuleType | None:
    """The module with the kernel for this GPU's architecture, None where there is none and the portable one runs."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    if interpreted():
        # The interpreter has no Gluon.
        return None
    return _load_hopper()


def hopper_backward(device: torch.device) -> ModuleType | None:
    """The module with its kernels for the backward pass, likewise."""
    return _load_hopper_backward() if hopper_kernel(device) is not None else None


@lru_cache(maxsize=1)
def _load_hopper() -> ModuleType | None:
    return _load("hopper")


@lru_cache(maxsize=1)
def _load_hopper_backward() -> ModuleType | None:
    return _load("hopper_backward")


def _load(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(f".{name}", __package__)
    except (ImportError, AttributeError) as error:
        _logger.warning(
            "this Triton's Gluon lacks what fastdiff's Hopper kernel needs (%s), so the portable Triton kernel runs, "
            "which is slower; install another triton release to get it.",
            error,
        )
        return None
