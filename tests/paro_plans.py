"""Calibrations with random orders and masks for tests, and their token-level truth written without the package."""

from __future__ import annotations

import torch

from fastdiff.methods.fingerprint import Fingerprint
from fastdiff.methods.paro_file import Calibration, LayerMasks, blocks_of, pack
from fastdiff_kernels import Grid
from fastdiff_kernels.axis_order import AXIS_ORDERS

BLOCK = 64


def random_masks(grid: Grid, heads: int, seed: int = 0, density: float = 0.3) -> torch.Tensor:
    blocks = blocks_of(grid)
    return torch.rand(heads, blocks, blocks, generator=torch.Generator().manual_seed(seed)) < density


def calibration(grid: Grid, heads: int = 2, layers: int = 1, groups: int = 1, model=None, names=None) -> Calibration:
    """Another order for every head, another mask for every head, layer and group."""
    found = []
    for layer in range(layers):
        masks = torch.stack([random_masks(grid, heads, 10 * layer + group) for group in range(groups)])
        found.append(
            LayerMasks(
                names[layer] if names else f"layer {layer}",
                grid,
                (torch.arange(heads) + layer).remainder(6).to(torch.uint8),
                pack(masks),
                torch.linspace(0.5, 1, groups * heads).reshape(groups, heads),
                masks.float().mean((2, 3)),
                torch.linspace(0, 0.1, heads),
            )
        )
    fingerprint = Fingerprint("Nobody", "0" * 16, torch.zeros(1, 4)) if model is None else Fingerprint.of(model)
    return Calibration(groups, tuple(found), fingerprint, {"density": 0.3})


def places(grid: Grid, order: str) -> torch.Tensor:
    """Where each token stands when the axes are walked in an order such as "HWF", int64 `[tokens]`."""
    sizes = dict(zip("FHW", (grid.frames, grid.height, grid.width), strict=True))
    token = torch.arange(grid.tokens)
    at = {"W": token % grid.width, "H": token // grid.width % grid.height, "F": token // grid.frame_tokens}
    place = torch.zeros_like(token)
    for axis in order:
        place = place * sizes[axis] + at[axis]
    return place


def truth(grid: Grid, orders: list[int], mask: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """Which keys each query sees, text before and after the grid, bool `[heads, tokens, tokens]`."""
    total = before + grid.tokens + after
    seen = torch.ones(len(orders), total, total, dtype=torch.bool)
    for head, order in enumerate(orders):
        block = places(grid, AXIS_ORDERS[order]) // BLOCK
        kept = mask[head][block][:, block] | (block[:, None] == block)
        seen[head, before : before + grid.tokens, before : before + grid.tokens] = kept
    return seen
