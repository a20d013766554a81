"""torch operators of fastdiff_kernels: schemas, fake kernels, autograd. Imports no triton; kernels load on use."""

from __future__ import annotations

import torch

from .errors import InvalidInputError, UnsupportedError
from .plan import plan_of
from .portable import portable, portable_backward
from .tuning import hopper_kernel


@torch.library.custom_op("fastdiff::block_sparse", mutates_args=())
def block_sparse(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    handle: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    return_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output `[batch, query tokens, heads, head_dim]`, and log-sum-exp `[batch, heads, query tokens]` or nothing."""
    plan = plan_of(handle)
    # Compiled code comes here unchecked, and a kernel would read and write beyond its tensors.
    check_call(q, k, v, plan, key_mask)
    plan = plan.to(q.device)
    forward = _triton_forward if backend == "triton" else portable
    # Triton launches on the current device, which need not be that of the tensors. The dtype of the tensors says how
    # exact a call is: autocast has no say.
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        out, lse = forward(q, k, v, plan, scale, key_mask, return_lse)
    lse = lse.to(torch.float32) if return_lse else q.new_empty(0, dtype=torch.float32)
    return out.contiguous(), lse


def _triton_forward(q, k, v, plan, scale, key_mask, return_lse):
    blocks = plan.query.block, plan.key.block
    if any(block < 16 or block & (block - 1) for block in blocks):
        raise UnsupportedError(
            f"backend 'triton' got a plan with blocks of {blocks[0]} queries and {blocks[1]} keys; it takes powers of "
            "two from 16. Use backend='torch' for others."
        )
    hopper = hopper_kernel(q.device)
    if hopper is not None and hopper.fits(q, plan, scale):
        forward = hopper.forward
    else:
        from .block_sparse import forward
    return forward(q, k, v, plan, scale, key_mask, return_lse)


@block_sparse.register_fake
def _(q, k, v, handle, key_mask, scale, return_lse, backend):
    batch, tokens, heads, _ = q.shape
    shape = (batch, heads, tokens) if return_lse else (0,)
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fastdiff::block_sparse_backward", mutates_args=())
def block_sparse_backward(
    grad: torch.Tensor,
    grad_lse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor | None,
    lse: torch.Tensor,
    handle: torch.Tensor,
    key_mask: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; backend triton starts from `out` and `lse`, torch takes neither."""
    plan = plan_of(handle).to(q.device)
    with torch.cuda.device_of(q), torch.autocast(q.device.type, enabled=False):
        if backend == "triton":
            from .block_sparse_backward import backward

            if lse.dim() != 3:
                raise UnsupportedError(
                    "backend 'triton' was asked for gradients after a forward call that kept no log-sum-exp, as under "
                    "torch.func.vmap; call attention with return_lse=True, or use backend='torch'."
                )
            grads = backward(grad, grad_lse, q, k, v, out, lse, plan, scale, key_mask)
        else:
            grads = portable_backward(grad, grad_lse, q, k, v, plan, scale, key_mask)
    return tuple(x.contiguous() for x in grads)


@block_sparse_backward.register_fake
def _(grad, grad_lse, q, k, v, out, lse, handle, key_mask, scale, backend):
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))


def _setup_context(ctx, inputs, output):
    q, k, v, handle, key_mask, scale, return_lse, backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out if backend == "triton" else None, lse, handle, key_mask)
    ctx.scale, ctx.return_lse, ctx.backend = scale, return_lse, backend
    # Whoever made the plan may have dropped it when gradients are asked for. While a graph is traced there is none.
    ctx.plan = plan_of(handle) if type(handle) is torch.Tensor else None


def _backward(ctx, grad, grad_lse):
    *saved, handle, key_mask = ctx.saved_tensors
    grad_lse = grad_lse if ctx.return_lse else None
    grads = block_sparse_backward(grad, grad_lse, *saved, handle, key_mask, ctx.scale, ctx.backend)
    return (*grads, None, None, None, None, None)


block_sparse.register_autograd(_backward, setup_context=_setup_context)


def _second_derivatives(ctx, *grads):
    raise UnsupportedError("second derivatives are not implemented by backends 'triton' and 'torch'; use 'reference'.")


block_sparse_backward.register_autograd(_second_derivatives)


def check_call(q, k, v, plan, key_mask) -> None:
    """Raises InvalidInputError unless tensors and mask fit each other and the plan."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise InvalidInputError(f"{name} has the shape {list(x.shape)}; give [batch, tokens, heads, head_dim].")
        if x.dtype != q.dtype or x.device != q.device:
            raise InvalidInputError(
                f"{name} is {x.dtype} on {x.device} and q is {q.dtype} on {q.device}; give all three alike."
            )
    if not q.dtype.is_floating_point or q.dtype.itemsize < 2:
        raise InvalidInputError(f"q, k and v are {q.dtype}; give floating-point tensors of 16 bits at least.")
    batch, tokens, heads, dim = q.shape
    if heads < 1 or dim < 1:
        raise InvalidInputError(f"q has {heads} heads of {dim}; give 1 at least of both.")
    if k.shape != v.shape or (k.shape[0], k.shape[2], k.shape[3]) != (batch, heads, dim):
        raise InvalidInputError(
            f"q is {list(q.shape)}, k is {list(k.shape)} and v is {list(v.shape)}; batch, heads and head_dim must be "
            "equal, and k and v of one shape. Repeat grouped key-value heads first."
        )
    if tokens != plan.query_tokens or k.shape[1] != plan.key_tokens:
        raise InvalidInputError(
            f"q has {tokens} tokens and k {k.shape[1]}; this plan is for {plan.query_tokens} and {plan.key_tokens}. "
            "Build the plan from the layout of this call."
        )
    if plan.heads not in (None, heads):
        raise InvalidInputError(f"q has {heads} heads; this plan has lists for {plan.heads}.")
    if key_mask is None:
        return
    if key_mask.dtype != torch.bool or key_mask.shape != (batch, k.shape[1]) or key_mask.device != k.device:
        raise InvalidInputError(
            f"key_mask is {key_mask.dtype} {list(key_mask.shape)} on {key_mask.device}; give bool "
            f"[{batch}, {k.shape[1]}] on {k.device}, True where a key exists."
        )
