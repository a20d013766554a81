"""The public function: checks its input, chooses a backend, calls the operator."""

from __future__ import annotations

import importlib.util
import math

import torch
from torch.autograd import forward_ad

from .errors import InvalidInputError, MissingDependencyError, UnsupportedError
from .ops import block_sparse, check_call
from .plan import BlockPlan
from .reference import reference
from .tuning import interpreted

# Looked up once: torch.compile cannot trace the look-up.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
# Other libraries on the same plans, only by request.
GUESTS = ("flex", "fa4")
BACKENDS = ("auto", "triton", "torch", "reference", *GUESTS)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    key_mask: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the pairs that a plan computes.

    Args:
        q: Queries `[batch, query tokens, heads, head_dim]`, any strides with a contiguous head_dim.
        k, v: Keys and values `[batch, key tokens, heads, head_dim]`, of the dtype and device of `q`.
        plan: What to compute. It may lie on any device; a copy on the device of `q` is the faster one.
        scale: Factor of the scores, 1 / sqrt(head_dim) by default.
        key_mask: Which keys exist, bool `[batch, key tokens]`: padding that differs by sample.
        return_lse: Also return the log-sum-exp of the scores.
        backend: `"triton"` (fastest, GPUs), `"torch"` (any device, skips the same blocks), `"reference"` (dense
            with a mask: the truth, slow), or `"auto"`: triton on a GPU where it is installed, else torch. Other
            libraries compute the same plan in `"flex"` (FlexAttention) and `"fa4"` (FlashAttention-4): export.py.

    Returns:
        Output of the shape and dtype of `q`, zero where a query sees no key; with `return_lse` also the natural
        log-sum-exp, float32 `[batch, heads, query tokens]` (float64 from the reference in float64), -inf where a
        query sees no key.

    Raises:
        InvalidInputError: If shapes, dtypes, devices, the scale or the backend's name do not fit.
        UnsupportedError: If the backend cannot take this dtype, device, head dim or block size, or the call is
            differentiated in forward mode, which `"reference"` alone can.
        MissingDependencyError: If triton or FlashAttention-4 is asked for and not installed.
    """
    if not torch.compiler.is_compiling():
        if not isinstance(plan, BlockPlan):
            raise InvalidInputError(f"plan is of type {type(plan).__name__}; give a BlockPlan.")
        check_call(q, k, v, plan, key_mask)
        if scale is not None and not math.isfinite(scale):
            raise InvalidInputError(f"scale is {scale}; give a finite number.")
        if backend != "reference":
            _refuse_tangents(q, k, v)
    chosen = choose_backend(backend, q.device, q.dtype, q.shape[-1])
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        out, lse = reference(q, k, v, plan.to(q.device), scale, key_mask)
    elif chosen in GUESTS:
        from . import export

        out, lse = getattr(export, chosen)(q, k, v, plan.to(q.device), scale, key_mask, return_lse)
    else:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        # The Triton backward starts from the log-sum-exp, the portable one computes it anew.
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        out, lse = block_sparse(
            q, k, v, plan.handle, key_mask, scale, return_lse or (trained and chosen == "triton"), chosen
        )
    return (out, lse) if return_lse else out


def _refuse_tangents(*tensors: torch.Tensor) -> None:
    """Forward-mode derivatives would be lost without a word."""
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise UnsupportedError(
            "forward-mode derivatives (torch.func.jvp, forward_ad) are not implemented; use backward, or "
            "backend='reference'."
        )


def check_backend(backend: str) -> None:
    """Raises InvalidInputError unless there is a backend of this name."""
    if backend not in BACKENDS:
        raise InvalidInputError(f"backend is {backend!r}; allowed are {', '.join(BACKENDS)}.")


def require_backend(backend: str) -> None:
    """Checks what can be known of a backend before there are tensors.

    Raises:
        InvalidInputError: If there is no such backend.
        MissingDependencyError: If triton or FlashAttention-4 is asked for and not installed.
    """
    check_backend(backend)
    if backend == "triton" and not _HAS_TRITON:
        raise MissingDependencyError("backend 'triton' needs a GPU and the triton package: pip install triton.")
    if backend == "fa4":
        from .export import require_fa4

        require_fa4()


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The backend that will run: any of `BACKENDS` but `"auto"`.

    Raises:
        InvalidInputError: If there is no such backend.
        UnsupportedError: If it was asked for by name and cannot run here.
        MissingDependencyError: If triton or FlashAttention-4 is asked for and not installed.
    """
    require_backend(backend)
    if backend in ("torch", "reference"):
        return backend
    if backend in GUESTS:
        return _check_guest(backend, device, dtype)
    if backend == "auto" and (device.type != "cuda" or not _HAS_TRITON):
        return "torch"
    if device.type != "cuda" and not interpreted():
        raise UnsupportedError(
            f"backend 'triton' runs on GPUs and the tensors are on {device.type}; use backend='torch', or set "
            "TRITON_INTERPRET=1 before triton is imported to test it slowly on the CPU."
        )
    fits = dtype in TRITON_DTYPES and head_dim % 8 == 0 and 16 <= head_dim <= MAX_HEAD_DIM
    if fits:
        return "triton"
    if backend == "auto":
        return "torch"
    raise UnsupportedError(
        f"backend 'triton' got head_dim {head_dim} in {dtype}; it takes multiples of 8 from 16 to {MAX_HEAD_DIM} in "
        "float32, float16 or bfloat16. Use backend='torch' for others."
    )


def _check_guest(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    devices = {"flex": ("cuda", "cpu"), "fa4": ("cuda",)}[backend]
    dtypes = {"flex": TRITON_DTYPES, "fa4": (torch.float16, torch.bfloat16)}[backend]
    if device.type not in devices or dtype not in dtypes:
        raise UnsupportedError(
            f"backend {backend!r} got {dtype} on {device.type}; it takes {', '.join(str(x)[6:] for x in dtypes)} on "
            f"{' and '.join(devices)}. Use backend='torch' for others."
        )
    return backend


def backends() -> list[tuple[str, bool, str]]:
    """Every backend as (name, can run here, why)."""
    if not _HAS_TRITON:
        triton = (False, "triton is not installed (pip install triton)")
    elif torch.cuda.is_available():
        triton = (True, f"default on {torch.cuda.get_device_name()}")
    elif interpreted():
        triton = (True, "in Triton's interpreter on the CPU: for tests, very slow")
    else:
        triton = (False, "no GPU that Triton can use was found")
    default = "" if triton[0] and torch.cuda.is_available() else "default here; "
    return [
        ("triton", *triton),
        ("torch", True, default + "any device, skips what the plan skips"),
        ("reference", True, "dense with a mask: the truth for tests, slow"),
        ("flex", True, "FlexAttention of torch, by request: compiled on a GPU, slow elsewhere"),
        ("fa4", *_fa4()),
    ]


def _fa4() -> tuple[bool, str]:
    from .export import fa4_version

    found = fa4_version()
    if found is None:
        return False, "FlashAttention-4 is not installed (pip install flash-attn-4)"
    if not torch.cuda.is_available():
        return False, f"FlashAttention-4 {found} found, and no GPU"
    return True, f"FlashAttention-4 {found}, by request: plans of whole blocks"
