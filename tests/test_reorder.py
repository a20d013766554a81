"""The gather of several tensors in one launch, against indexing."""

import pytest
import torch
from ahead_of_time import shared_memory

pytest.importorskip("triton")

from fastdiff_kernels.reorder import MOST, gather, key_limits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def indexed(x, order):
    """What gather should give, head by head."""
    place = order.clamp(min=0).long()
    heads = [x[:, place[head % len(place)], head] for head in range(x.shape[2])]
    exists = (order >= 0).expand(x.shape[2], -1).t()
    return torch.stack(heads, dim=2) * exists[None, :, :, None]


def tensor(tokens, heads, dim, dtype, layout="tokens"):
    shape = (2, heads, tokens, dim) if layout == "heads" else (2, tokens, heads, dim)
    x = torch.randn(shape, device=DEVICE).to(dtype)
    if layout == "packed":
        # One of three that a fused projection gives.
        return torch.stack([x, x, x], dim=2)[:, :, 1]
    return x.transpose(1, 2) if layout == "heads" else x


def order(heads, slots, tokens):
    return torch.randint(-1, tokens, (heads, slots), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("layout", ["tokens", "packed", "heads"])
@pytest.mark.parametrize("by_head", [False, True], ids=["", "by head"])
@pytest.mark.parametrize(("heads", "dim"), [(1, 16), (3, 40), (7, 128), (3, 24), (2, 5)])
def test_it_equals_indexing(heads, dim, by_head, layout, poison):
    torch.manual_seed(0)
    q, k, v = (tensor(tokens, heads, dim, torch.float32, layout) for tokens in (37, 41, 41))
    pairs = [(q, order(1, 64, 37)), (k, order(heads if by_head else 1, 48, 41))]
    pairs.append((v, pairs[1][1]))
    for found, pair in zip(gather(*pairs), pairs, strict=True):
        assert found.is_contiguous()
        assert torch.equal(found, indexed(*pair))


@pytest.mark.parametrize("count", range(1, MOST + 1))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_any_number_of_tensors_in_any_dtype(count, dtype):
    torch.manual_seed(0)
    pairs = [(tensor(30 + n, 3, 64, dtype), order(1, 32 * (n + 1), 30)) for n in range(count)]
    for found, pair in zip(gather(*pairs), pairs, strict=True):
        assert found.dtype == dtype
        assert torch.equal(found, indexed(*pair))


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "expanded", "transposed"])
def test_limits_of_a_key_mask(heads, layout, poison):
    torch.manual_seed(0)
    batch, tokens, slots, block = 2, 41, 64, 16
    mask = torch.rand(batch, tokens, device=DEVICE) < 0.9
    if layout == "expanded":
        mask = mask[:1].expand(batch, -1)
    elif layout == "transposed":
        mask = mask.t().contiguous().t()
    places = order(heads, slots, tokens)
    places[:, :block] = -1
    limits, masked = key_limits(mask, places, block)
    hidden = ~mask[:, places.clamp(min=0).long()] & (places >= 0)
    assert hidden.any()
    assert not hidden[..., :block].any()
    assert torch.equal(limits, torch.where(hidden, -torch.inf, torch.inf))
    assert torch.equal(masked, hidden.unflatten(-1, (-1, block)).any(-1))


COMPILE = """
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff_kernels.reorder import MOST, _gather_kernel as kernel

backend, arch = sys.argv[1:]
target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, 32 if backend == "cuda" else 64)
constants = {"WIDTH": 3072, "PIECE": 512, "ROWS": 8, "COLUMNS": 512, "UNIT": 8, "TENSORS": MOST}
kinds = dict.fromkeys(constants, "constexpr")
for n in range(MOST):
    kinds |= {f"x{n}": "*bf16", f"out{n}": "*bf16", f"order{n}": "*i32"}
names = {name: kinds.get(name, "i32") for name in kernel.arg_names}
pointers = [place for place, name in enumerate(kernel.arg_names) if name[:-1] in ("x", "out")]
aligned = {(place,): [["tt.divisibility", 16]] for place in pointers}
built = triton.compile(ASTSource(kernel, names, constants, aligned), target=target, options={"num_warps": 4})
if backend == "cuda":
    assert "ld.global.v4.b32" in built.asm["ptx"], "sixteen bytes at a time"
print(built.metadata.shared)
"""


@pytest.mark.parametrize("target", ["cuda 80", "cuda 90", "hip gfx942"])
def test_it_builds_for_gpus_and_moves_sixteen_bytes_at_a_time(target, tmp_path):
    (found,) = shared_memory(COMPILE, target.split(), tmp_path)
    assert found <= 65_536


@pytest.mark.gpu
def test_beyond_32_bits():
    """More elements than an int32 counts, the last of them read and written."""
    x = torch.zeros(1, 2**20 + 8, 17, 128, dtype=torch.bfloat16, device="cuda")
    x[0, -8:] = torch.arange(8, device="cuda").view(8, 1, 1)
    places = torch.arange(x.shape[1], dtype=torch.int32, device="cuda").flip(0)[None]
    (found,) = gather((x, places))
    assert found[0, :8, 0, 0].tolist() == [7, 6, 5, 4, 3, 2, 1, 0]
    assert found[0, :8].float().var(dim=(1, 2)).max() == 0
    (back,) = gather((found, places))
    assert torch.equal(back, x)
