"""One row per model family: which modules are its self-attention, and how its layout follows from its inputs.

Rows are found by class name, so nothing of diffusers is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastdiff_kernels import Grid, InvalidInputError, TokenLayout, UnsupportedError


def _no_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, 0


def _inner_heads(attention: nn.Module) -> tuple[int, int]:
    return attention.heads, attention.inner_dim // attention.heads


@dataclass(frozen=True)
class Family:
    """A group of models that tell their layout the same way.

    Attributes:
        name: What `summary` and messages call it.
        modules: Full names of the self-attention modules in `named_modules()`. Cross-attention, refiners and
            text towers must not match.
        grid: (model config, forward arguments by name) -> the token grid. Reads shapes, never tensor contents.
        text: (model config, forward arguments by name) -> text tokens (before, after) the grid in the sequence.
        latents: Name of the forward argument that holds the visual tokens.
        heads: attention module -> (heads, head_dim).
        supplies: Which of `Planner.needs` the family can fill.
    """

    name: str
    modules: re.Pattern[str]
    grid: Callable[[Any, Mapping[str, Any]], Grid]
    text: Callable[[Any, Mapping[str, Any]], tuple[int, int]] = _no_text
    latents: str = "hidden_states"
    heads: Callable[[nn.Module], tuple[int, int]] = _inner_heads
    supplies: frozenset[str] = frozenset()

    def layout(self, config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
        """The layout of the self-attention calls in the forward that gets these arguments."""
        before, after = self.text(config, inputs)
        return TokenLayout.self_attention(self.grid(config, inputs), text_before=before, text_after=after)


def _patched_video(config: Any, inputs: Mapping[str, Any]) -> Grid:
    video = inputs.get("hidden_states")
    if video is None or video.ndim != 5:
        given = "missing" if video is None else f"of shape {tuple(video.shape)}"
        raise InvalidInputError(
            f"hidden_states is {given}; the grid is read from latents [batch, channels, frames, height, width]."
        )
    return Grid(*(size // patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True)))


_WAN = Family("wan", re.compile(r"blocks\.\d+\.attn1"), _patched_video)

FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
}


def find_family(model: nn.Module) -> Family | None:
    """The family of a model or of the class it is derived from, None if there is none."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: If no row describes the model's class.
    """
    family = find_family(model)
    if family is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not described; supported are {', '.join(sorted(FAMILIES))} and classes "
            "derived from them. To describe it, add a row with its self-attention modules and its token grid: "
            "fastdiff_patches.families.FAMILIES[class name] = Family(name, modules, grid)."
        )
    return family
