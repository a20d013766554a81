"""What rows share: how to read the arguments of a forward, and tables of RoPE in the form of `NEEDS["rotary"]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff_kernels import Grid, InvalidInputError

from ..contents import read_once
from .base import Table, patch_of


def given(value: Any) -> str:
    """What stands for an argument in a message: its shape, its type, or that it is missing."""
    if value is None:
        return "missing"
    return f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def latent_sizes(inputs: Mapping[str, Any], axes: str, name: str = "hidden_states") -> tuple[int, int, int]:
    """Frames, height and width of an argument with these axes; one frame where none of them counts frames.

    Raises:
        InvalidInputError: If it has other axes.
    """
    latents, names = inputs.get(name), axes.split(", ")
    if getattr(latents, "ndim", None) != len(names):
        raise InvalidInputError(f"{name} is {given(latents)}; the grid is read from latents [{axes}].")
    sizes = dict(zip(names, latents.shape, strict=True))
    return sizes.get("frames", 1), sizes["height"], sizes["width"]


def patched(config: Any, sizes: tuple[int, int, int]) -> Grid:
    """The grid of latents of this size."""
    return Grid(*(size // step for size, step in zip(sizes, patch_of(config), strict=True)))


def packed_tokens(inputs: Mapping[str, Any]) -> int:
    """Tokens of packed latents.

    Raises:
        InvalidInputError: If they are not packed.
    """
    packed = inputs.get("hidden_states")
    if getattr(packed, "ndim", None) != 3:
        raise InvalidInputError(
            f"hidden_states is {given(packed)}; this model takes packed latents [batch, tokens, channels]. Pack them "
            "as its pipeline does."
        )
    return packed.shape[1]


def text_tokens(inputs: Mapping[str, Any], name: str = "encoder_hidden_states", ndim: int = 3) -> int:
    """Tokens of a text embedding, `[batch, tokens, channels]` or with more dimensions behind the tokens.

    Raises:
        InvalidInputError: If it is none.
    """
    text = inputs.get(name)
    if getattr(text, "ndim", None) != ndim:
        raise InvalidInputError(
            f"{name} is {given(text)}; the text stands in the same sequence, with {ndim} dimensions: [batch, tokens, "
            f"{'layers, ' * (ndim - 3)}channels]."
        )
    return text.shape[1]


def text_before(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return text_tokens(inputs), 0


def text_after(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, text_tokens(inputs)


def lengths(mask: torch.Tensor) -> list[int]:
    """Tokens of each sample that are no padding, by a mask `[batch, tokens]`."""
    return read_once(mask, _lengths)


def _lengths(mask: torch.Tensor) -> list[int]:
    return mask.bool().sum(1).tolist()


def shared_table(arguments: Mapping[str, Any]) -> Table | None:
    """The table as most processors get it, for all tokens of the call."""
    return arguments.get("image_rotary_emb")


def table_before_text(arguments: Mapping[str, Any]) -> Table | None:
    return _beside_text(arguments, before=0, behind=1)


def table_behind_text(arguments: Mapping[str, Any]) -> Table | None:
    return _beside_text(arguments, before=1, behind=0)


def _beside_text(arguments: Mapping[str, Any], before: int, behind: int) -> Table | None:
    """The table of the grid, and beside it that of text, which is not turned."""
    table, text = arguments.get("image_rotary_emb"), arguments.get("encoder_hidden_states")
    if table is None:
        return None
    rows = 0 if text is None else text.shape[1]
    cos, sin = table
    around = (0, 0, before * rows, behind * rows)
    return F.pad(cos, around, value=1.0), F.pad(sin, around)


def interleaved(turns: torch.Tensor) -> Table:
    """The table of unit complex numbers, `[tokens, head_dim / 2]`, one for each pair."""
    cos, sin = (part.float().repeat_interleave(2, -1) for part in (turns.real, turns.imag))
    return cos, sin
