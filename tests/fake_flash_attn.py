"""A stand-in for FlashAttention-4 that reads block lists as its documentation says, on a CPU, with all scores."""

import sys
import types
from typing import NamedTuple

import torch


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: torch.Tensor
    mask_block_idx: torch.Tensor
    full_block_cnt: torch.Tensor
    full_block_idx: torch.Tensor
    block_size: tuple[int, int]


def flash_attn_func(q, k, v, *, softmax_scale=None, block_sparse_tensors=None, return_lse=False):
    mask = torch.ones(1, q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
    if block_sparse_tensors is not None:
        _read(block_sparse_tensors, mask)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), scores.logsumexp(-1) if return_lse else None


def _read(lists: BlockSparseTensorsTorch, mask: torch.Tensor) -> None:
    mask[:] = False
    block_q, block_k = lists.block_size
    for counts, indices in (lists[:2], lists[2:4]):
        for head in range(mask.shape[1]):
            which = head % counts.shape[1]
            for row, count in enumerate(counts[0, which].tolist()):
                for key in indices[0, which, row, :count].tolist():
                    rows, keys = row * block_q, key * block_k
                    mask[0, head, rows : rows + block_q, keys : keys + block_k] = True


def install(monkeypatch) -> None:
    """Makes it the flash-attn-4 that is installed, for one test."""
    cute = types.ModuleType("flash_attn.cute")
    cute.flash_attn_func = flash_attn_func
    sparsity = types.ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch
    for module in (types.ModuleType("flash_attn"), cute, sparsity):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    users = ("fastdiff_kernels.export", *(f"fastdiff.bench.{name}" for name in ("kernels", "record", "rivals")))
    for module in users:
        monkeypatch.setattr(f"{module}.fa4_version", lambda: "4.0")
