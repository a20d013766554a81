"""One row per model family: which modules are its self-attention, and how its layout follows from its inputs.

Rows are found by class name, so nothing of diffusers is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError

from .image_ids import image_spans
from .planner import NEEDS

Table = tuple[torch.Tensor, torch.Tensor]


def _no_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, 0


def _no_references(config: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    return ()


def _inner_heads(attention: nn.Module) -> tuple[int, int]:
    return attention.heads, attention.inner_dim // attention.heads


def _same_layout(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    return layout


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
            shapes do not tell, and then once for each tensor, since that waits for the device.
        text: (model config, forward arguments by name) -> text tokens (before, after) the grid in the sequence.
        references: (model config, forward arguments by name) -> spans of reference images behind the grid.
        at: (model config, layout of the model, name of a module) -> the layout in that module.
        usual_text: Text tokens (before, after) in a pipeline's default call, for forecasts before a run.
        latents: Name of the forward argument that holds the visual tokens.
        heads: attention module -> (heads, head_dim).
        supplies: Which of `fastdiff_patches.planner.NEEDS` the family can fill.
        query_norms: Names, in an attention module, of the modules whose outputs in this order make up the query before
            RoPE; a module without text lacks those of the text. Empty if the model has no RoPE.
        rotary: Arguments of a processor's call by name -> the table of `NEEDS["rotary"]`.
    """

    name: str
    modules: re.Pattern[str]
    grid: Callable[[Any, Mapping[str, Any]], Grid]
    text: Callable[[Any, Mapping[str, Any]], tuple[int, int]] = _no_text
    references: Callable[[Any, Mapping[str, Any]], tuple[Span, ...]] = _no_references
    at: Callable[[Any, TokenLayout, str], TokenLayout] = _same_layout
    usual_text: tuple[int, int] = (0, 0)
    latents: str = "hidden_states"
    heads: Callable[[nn.Module], tuple[int, int]] = _inner_heads
    supplies: frozenset[str] = frozenset()
    query_norms: tuple[str, ...] = ()
    rotary: Callable[[Mapping[str, Any]], Table | None] = _no_rotary

    def layout(self, config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
        """The layout of the model in the forward that gets these arguments; `at` makes it that of one module."""
        grid = self.grid(config, inputs)
        return self._around(grid, self.text(config, inputs), self.references(config, inputs))

    def forecast(self, grid: Grid, like: TokenLayout | None = None) -> TokenLayout:
        """The layout to expect on another grid: with the text of a layout that has run, or else the usual text."""
        if like is None:
            return self._around(grid, self.usual_text)
        spans = tuple(Span("grid", grid.tokens, grid) if span.kind == "grid" else span for span in like.query)
        return TokenLayout(spans, spans)

    def _around(self, grid: Grid, text: tuple[int, int], references: tuple[Span, ...] = ()) -> TokenLayout:
        before, after = ((Span("text", tokens),) if tokens else () for tokens in text)
        spans = (*before, Span("grid", grid.tokens, grid), *references, *after)
        return TokenLayout(spans, spans)


def _patched_video(config: Any, inputs: Mapping[str, Any]) -> Grid:
    video = inputs.get("hidden_states")
    if video is None or video.ndim != 5:
        raise InvalidInputError(
            f"hidden_states is {_given(video)}; the grid is read from latents [batch, channels, frames, height, width]."
        )
    return Grid(*(size // patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True)))


def _wan_rotary(arguments: Mapping[str, Any]) -> Table | None:
    table = arguments.get("rotary_emb")
    return None if table is None else tuple(part[0, :, 0] for part in table)


_WAN = Family(
    "wan",
    re.compile(r"blocks\.\d+\.attn1"),
    _patched_video,
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=_wan_rotary,
)


def _flux_spans(inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    packed, ids = inputs.get("hidden_states"), inputs.get("img_ids")
    if packed is None or packed.ndim != 3:
        raise InvalidInputError(
            f"hidden_states is {_given(packed)}; this model takes packed latents [batch, tokens, channels]. Pack them "
            "as FluxPipeline does (2x2 pixels make a token)."
        )
    if ids is None or ids.ndim not in (2, 3) or ids.shape[-1] != 3 or ids.shape[-2] != packed.shape[1]:
        raise InvalidInputError(
            f"img_ids is {_given(ids)}; the grid is read from the positions of the {packed.shape[1]} image tokens, "
            f"[{packed.shape[1]}, 3]."
        )
    return image_spans(ids)


def _flux_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    return _flux_spans(inputs)[0].grid


def _flux_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    text = inputs.get("encoder_hidden_states")
    if text is None or text.ndim != 3:
        raise InvalidInputError(
            f"encoder_hidden_states is {_given(text)}; the text stands before the image in the same sequence, "
            "[batch, tokens, channels]."
        )
    return text.shape[1], 0


def _flux_references(config: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    return _flux_spans(inputs)[1:]


def _flux_rotary(arguments: Mapping[str, Any]) -> Table | None:
    return arguments.get("image_rotary_emb")


_FLUX = Family(
    "flux",
    re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
    _flux_grid,
    text=_flux_text,
    references=_flux_references,
    usual_text=(512, 0),
    # Its blocks take text and picture apart, or one behind the other.
    supplies=frozenset(NEEDS) - {"block_input"},
    query_norms=("norm_added_q", "norm_q"),
    rotary=_flux_rotary,
)


def _picture(config: Any, inputs: Mapping[str, Any]) -> Grid:
    sample = inputs.get("sample")
    if sample is None or sample.ndim != 4:
        raise InvalidInputError(
            f"sample is {_given(sample)}; the grid is read from latents [batch, channels, height, width]."
        )
    return Grid(1, *sample.shape[2:])


def _unet_level(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    part, index, *_ = name.split(".")
    level = len(config.down_block_types) - 1
    if part != "mid_block":
        level = int(index) if part == "down_blocks" else level - int(index)
    # A strided convolution with padding on one side only drops the last row of an odd number.
    rounding = 0 if getattr(config, "downsample_padding", 1) == 0 else 1
    height, width = layout.grid.height, layout.grid.width
    for _ in range(level):
        height, width = (height + rounding) // 2, (width + rounding) // 2
    return TokenLayout.self_attention(Grid(1, height, width))


_UNET = Family(
    "unet",
    re.compile(r"(down_blocks\.\d+|mid_block|up_blocks\.\d+)\.attentions\.\d+\.transformer_blocks\.\d+\.attn1"),
    _picture,
    at=_unet_level,
    latents="sample",
    supplies=frozenset(NEEDS),
)


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
    "FluxTransformer2DModel": _FLUX,
    "UNet2DConditionModel": _UNET,
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


def _given(value: Any) -> str:
    if value is None:
        return "missing"
    return f"of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
