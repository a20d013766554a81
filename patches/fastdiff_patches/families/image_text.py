"""What picture transformers share: text in the sequence, and tables of RoPE in the form of `NEEDS["rotary"]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fastdiff_kernels import InvalidInputError

from .base import Table, given


def text_tokens(inputs: Mapping[str, Any], name: str = "encoder_hidden_states", ndim: int = 3) -> int:
    """Tokens of a text embedding, `[batch, tokens, channels]` or with more dimensions behind the tokens.

    Raises:
        InvalidInputError: If it is none.
    """
    text = inputs.get(name)
    if text is None or text.ndim != ndim:
        raise InvalidInputError(
            f"{name} is {given(text)}; the text stands in the sequence of the image, with {ndim} dimensions: [batch, "
            f"tokens, {'layers, ' * (ndim - 3)}channels]."
        )
    return text.shape[1]


def text_before(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return text_tokens(inputs), 0


def text_after(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, text_tokens(inputs)


def shared_table(arguments: Mapping[str, Any]) -> Table | None:
    """The table as most processors get it, for all tokens of the call."""
    return arguments.get("image_rotary_emb")


def interleaved(turns: torch.Tensor) -> Table:
    """The table of unit complex numbers, `[tokens, head_dim / 2]`, one for each pair."""
    cos, sin = (part.float().repeat_interleave(2, -1) for part in (turns.real, turns.imag))
    return cos, sin


def unturned_behind(table: Table, tokens: int) -> Table:
    """The table with tokens behind it that RoPE leaves alone."""
    cos, sin = table
    rest = cos.new_ones(tokens, cos.shape[-1])
    return torch.cat([cos, rest]), torch.cat([sin, torch.zeros_like(rest)])
