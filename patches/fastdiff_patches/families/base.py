"""Family: what is known of a group of models; and what the rows of families share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdiff_kernels import Grid, Span, TokenLayout

Table = tuple[torch.Tensor, torch.Tensor]


def patch_of(config: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns in a token, as most configs say it."""
    patch = getattr(config, "patch_size", None) or 1
    if isinstance(patch, int):
        return getattr(config, "patch_size_t", None) or 1, patch, patch
    return *[1] * (3 - len(patch)), *patch


def _no_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, 0


def _no_references(config: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    return ()


def _inner_heads(attention: nn.Module) -> tuple[int, int]:
    return attention.heads, attention.inner_dim // attention.heads


def _same_layout(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    return layout


def _same_processor(processor: Any) -> Any:
    return processor


def _same_mask(mask: Any) -> Any:
    return mask


def _no_rotary(arguments: Mapping[str, Any]) -> Table | None:
    return None


@dataclass(frozen=True)
class Family:
    """A group of models that tell their layout the same way.

    Attributes:
        name: What `summary` and messages call it.
        modules: Full names of the self-attention modules in `named_modules()`. Cross-attention, refiners and
            text towers must not match.
        grid: (model config, forward arguments by name) -> the token grid. Reads shapes; contents only where the
            shapes do not tell, and then once for each tensor, since that waits for the device. None with `whole`.
        text: (model config, forward arguments by name) -> text tokens (before, after) the grid in the sequence.
        text_varies: Whether a call has only the text that is no padding, behind the grid, and the layout all of it.
        references: (model config, forward arguments by name) -> spans of reference images behind the grid.
        at: (model config, layout of the model, name of a module) -> the layout in that module.
        frames: Whether one attention call spans the frames of a video.
        levels: Whether modules stand on levels of unequal size, with convolutions between them.
        patch: model config -> latent frames, rows and columns in a token, for forecasts before a run. The latents are
            those of the VAE, also where the pipeline packs them.
        usual_text: Text tokens (before, after) in a pipeline's default call, for forecasts before a run.
        latents: Name of the forward argument that holds the visual tokens, a tensor or a list of one for each sample;
            None for whichever tensor comes first.
        heads: attention module -> (heads, head_dim).
        supplies: Which of `fastdiff_patches.planner.NEEDS` the family can fill.
        query_norms: Names, in an attention module, of the modules whose outputs in this order make up the query before
            RoPE; a module without text lacks those of the text. Empty if the model has no RoPE.
        heads_first: Whether these outputs are `[batch, heads, tokens, head_dim]` and not tokens first.
        overwrites_query: Whether RoPE is written into these outputs.
        rotary: Arguments of a processor's call by name -> the table of `NEEDS["rotary"]`.
        mask: Mask of the attention call -> a bool mask that hides keys alone, where the model says it otherwise.
        processor: stock processor -> the one that is adopted in its place: another where the stock one does before its
            attention call what sparse attention must not.
        whole: (model config, forward arguments by name) -> the layout, where `grid`, `text` and `references` cannot
            say it.
        by_length: Whether, of the modules named, those are meant whose calls have as many tokens as the layout.
    """

    name: str
    modules: re.Pattern[str]
    grid: Callable[[Any, Mapping[str, Any]], Grid] | None
    text: Callable[[Any, Mapping[str, Any]], tuple[int, int]] = _no_text
    text_varies: bool = False
    references: Callable[[Any, Mapping[str, Any]], tuple[Span, ...]] = _no_references
    at: Callable[[Any, TokenLayout, str], TokenLayout] = _same_layout
    frames: bool = False
    levels: bool = False
    patch: Callable[[Any], tuple[int, int, int]] = patch_of
    usual_text: tuple[int, int] = (0, 0)
    latents: str | None = "hidden_states"
    heads: Callable[[nn.Module], tuple[int, int]] = _inner_heads
    supplies: frozenset[str] = frozenset()
    query_norms: tuple[str, ...] = ()
    heads_first: bool = False
    overwrites_query: bool = False
    rotary: Callable[[Mapping[str, Any]], Table | None] = _no_rotary
    mask: Callable[[Any], Any] = _same_mask
    processor: Callable[[Any], Any] = _same_processor
    whole: Callable[[Any, Mapping[str, Any]], TokenLayout] | None = None
    by_length: bool = False

    def layout(self, config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
        """The layout of the model in the forward that gets these arguments; `at` makes it that of one module."""
        if self.whole is not None:
            return self.whole(config, inputs)
        grid = self.grid(config, inputs)
        return self._around(grid, self.text(config, inputs), self.references(config, inputs))

    def forecast(self, grid: Grid, like: TokenLayout | None = None) -> TokenLayout:
        """The layout to expect on another grid: with the text of a layout that has run, or else the usual text."""
        if like is None:
            return self._around(grid, self.usual_text)
        spans = tuple(Span("grid", grid.tokens, grid) if span.kind == "grid" else span for span in like.query)
        return TokenLayout(spans, spans)

    def visual(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """The latents of the first sample or of all, for their device and their values."""
        values = inputs.values() if self.latents is None else [inputs[self.latents]]
        tensors = (value[0] if isinstance(value, (list, tuple)) else value for value in values)
        return next(value for value in tensors if isinstance(value, torch.Tensor) and value.is_floating_point())

    def _around(self, grid: Grid, text: tuple[int, int], references: tuple[Span, ...] = ()) -> TokenLayout:
        before, after = ((Span("text", tokens),) if tokens else () for tokens in text)
        spans = (*before, Span("grid", grid.tokens, grid), *references, *after)
        return TokenLayout(spans, spans)


def given(value: Any) -> str:
    """What stands for an argument in a message: its shape, its type, or that it is missing."""
    if value is None:
        return "missing"
    return f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
