"""Refuses gradients of a checkpointed call that was computed again under another plan than before.

Gradient checkpointing calls a block a second time during the backward pass. It then finds its layers as the last
forward left them, which may have been another one: of another size, step or config. Calls whose tensors differ in shape
torch refuses by itself.
"""

from __future__ import annotations

import itertools

import torch

from fastdiff_kernels import InvalidInputError

_numbers = itertools.count(1)


def new_number() -> torch.Tensor:
    """A number for what a layer computes from now on, 0-d int64 on the CPU."""
    with torch.inference_mode(False):
        return torch.tensor(next(_numbers), device="cpu")


class _Witness(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, number):
        return query.view_as(query)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, number = inputs
        # What is saved comes back as the second computation saved it; an attribute stays as it was.
        ctx.save_for_backward(number)
        ctx.number = int(number)

    @staticmethod
    def backward(ctx, grad):
        (number,) = ctx.saved_tensors
        if int(number) != ctx.number:
            raise InvalidInputError(
                "gradient checkpointing computed an attention call again after the model had run with another layout, "
                "step or config, so its gradients would be wrong; call backward before the model runs again, or switch "
                "checkpointing off."
            )
        return grad, None


def witnessed(query: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """The queries; their backward pass raises if what was computed again has another number."""
    return _Witness.apply(query, number)
