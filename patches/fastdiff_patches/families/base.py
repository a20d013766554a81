"""Family: what is known of a group of models; and what the rows of families share."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout

from ..planner import NEEDS

Table = tuple[torch.Tensor, torch.Tensor]
# What families supply whose blocks take text and picture apart, or one behind the other.
APART = frozenset(NEEDS) - {"block_input"}


def patch_of(config: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns in a token, as most configs say it."""
    patch = getattr(config, "patch_size", None) or 1
    if isinstance(patch, int):
        return getattr(config, "patch_size_t", None) or 1, patch, patch
    return *[1] * (3 - len(patch)), *patch


def around(grid: Grid, text: tuple[int, int] = (0, 0), references: tuple[Span, ...] = ()) -> TokenLayout:
    """The layout of a grid with text tokens (before, after) it, and references right behind it."""
    before, after = ((Span("text", tokens),) if tokens else () for tokens in text)
    spans = (*before, Span("grid", grid.tokens, grid), *references, *after)
    return TokenLayout(spans, spans)


def reads(
    grid: Callable[[Any, Mapping[str, Any]], Grid],
    text: Callable[[Any, Mapping[str, Any]], tuple[int, int]] | None = None,
) -> Callable[[Any, Mapping[str, Any]], TokenLayout]:
    """A family's `layout` out of what reads its grid and what reads its text tokens (before, after) it."""
    return functools.partial(_read, grid, text)


def _read(grid: Callable, text: Callable | None, config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    return around(grid(config, inputs), (0, 0) if text is None else text(config, inputs))


def _same_layout(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    return layout


def _same(value: Any) -> Any:
    return value


def _no_rotary(arguments: Mapping[str, Any]) -> Table | None:
    return None


@dataclass(frozen=True)
class Family:
    """A group of models that tell their layout the same way.

    Attributes:
        name: What `summary` and messages call it.
        modules: Full names of the self-attention modules in `named_modules()`. Cross-attention, refiners and
            text towers must not match. None for those whose calls have as many tokens as the layout.
        layout: (model config, forward arguments by name) -> the layout of the model; `reads` makes one of a grid and
            text. Reads shapes; contents only where the shapes do not tell, and then once for each tensor, since that
            waits for the device.
        text_varies: Whether a call has only the text that is no padding, behind the grid, and the layout all of it.
        at: (model config, layout of the model, name of a module) -> the layout in that module.
        frames: Whether one attention call spans the frames of a video.
        levels: Whether modules stand on levels of unequal size, with convolutions between them.
        patch: model config -> latent frames, rows and columns in a token, for forecasts before a run. The latents are
            those of the VAE, also where the pipeline packs them.
        usual_text: Text tokens (before, after) in a pipeline's default call, for forecasts before a run.
        latents: Name of the forward argument that holds the visual tokens, a tensor or a list of one for each sample;
            None for whichever tensor comes first.
        supplies: Which of `fastdiff_patches.planner.NEEDS` the family can fill.
        query_norms: Names, in an attention module, of the modules whose outputs in this order make up the query before
            RoPE; a module without text lacks those of the text. Empty if the model has no RoPE.
        heads_first: Whether these outputs are `[batch, heads, tokens, head_dim]` and not tokens first.
        rotary: Arguments of a processor's call by name -> the table of `NEEDS["rotary"]`.
        mask: Mask of the attention call -> a bool mask that hides keys alone, where the model says it otherwise.
        processor: stock processor -> the one that is adopted in its place: another where the stock one does before its
            attention call what sparse attention must not.
    """

    name: str
    modules: re.Pattern[str] | None
    layout: Callable[[Any, Mapping[str, Any]], TokenLayout]
    text_varies: bool = False
    at: Callable[[Any, TokenLayout, str], TokenLayout] = _same_layout
    frames: bool = False
    levels: bool = False
    patch: Callable[[Any], tuple[int, int, int]] = patch_of
    usual_text: tuple[int, int] = (0, 0)
    latents: str | None = "hidden_states"
    supplies: frozenset[str] = frozenset()
    query_norms: tuple[str, ...] = ()
    heads_first: bool = False
    rotary: Callable[[Mapping[str, Any]], Table | None] = _no_rotary
    mask: Callable[[Any], Any] = _same
    processor: Callable[[Any], Any] = _same

    @property
    def by_length(self) -> bool:
        """Whether the length of a call tells if it is self-attention."""
        return self.modules is None

    def forecast(self, grid: Grid, like: TokenLayout | None = None) -> TokenLayout:
        """The layout to expect on another grid: with the text of a layout that has run, or else the usual text."""
        if like is None:
            return around(grid, self.usual_text)
        spans = tuple(Span("grid", grid.tokens, grid) if span.kind == "grid" else span for span in like.query)
        return TokenLayout(spans, spans)

    def visual(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The latents of the first sample or of all, for their device and their values.

        Raises:
            InvalidInputError: If the forward was given none.
        """
        values = inputs.values() if self.latents is None else [inputs.get(self.latents)]
        tensors = (value[0] if isinstance(value, (list, tuple)) and value else value for value in values)
        for value in tensors:
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                return value
        raise InvalidInputError(
            f"the forward was given no tensor of numbers as {self.latents or 'any argument'}, so the device of the "
            "visual tokens is not known; give one by name."
        )
