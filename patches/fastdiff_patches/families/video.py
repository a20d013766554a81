"""Video transformers whose self-attention sees the video alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError

from ..planner import NEEDS
from ..video_coords import video_spans
from .base import Family, Table, reads
from .reading import latent_sizes, packed_tokens, patched


def video_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    return patched(config, latent_sizes(inputs, "batch, channels, frames, height, width"))


def _wan_rotary(arguments: Mapping[str, Any]) -> Table | None:
    table = arguments.get("rotary_emb")
    return None if table is None else tuple(part[0, :, 0] for part in table)


_WAN = Family(
    "wan",
    re.compile(r"blocks\.\d+\.attn1"),
    reads(video_grid),
    frames=True,
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=_wan_rotary,
)
_VACE = replace(
    _WAN,
    name="wan-vace",
    modules=re.compile(r"(vace_)?blocks\.\d+\.attn1"),
    # What a block of its control tower turns into queries is not its first argument.
    supplies=_WAN.supplies - {"block_input"},
)


def _skyreels(config: Any, inputs: Mapping[str, Any]) -> Grid:
    if config.num_frame_per_block > 1:
        raise UnsupportedError(
            f"this SkyReels-V2 attends block by block in time (num_frame_per_block is {config.num_frame_per_block}), "
            "which sparse attention does not follow. Run it synchronously (causal_block_size=1), or call "
            "fastdiff.remove(pipe)."
        )
    return video_grid(config, inputs)


_COSMOS = Family(
    "cosmos",
    re.compile(r"transformer_blocks\.\d+\.attn1"),
    reads(video_grid),
    frames=True,
    # Their RoPE turns halves of the channels and no pairs of neighbours.
    supplies=frozenset({"block_input", "seed"}),
)


def _frame(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    return TokenLayout.self_attention(Grid(1, layout.grid.height, layout.grid.width))


# Its temporal blocks attend over the frames of one place, which costs next to nothing, and stay dense.
_LATTE = replace(_COSMOS, name="latte", at=_frame, frames=False, supplies=frozenset(NEEDS))


def _sizes(config: Any, inputs: Mapping[str, Any]) -> Grid | None:
    sizes = [inputs.get(name) for name in ("num_frames", "height", "width")]
    if None in sizes:
        return None
    return patched(config, tuple(sizes))


def _ltx(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """The sizes tell, or where clips condition the video the coordinates."""
    tokens, grid, coordinates = packed_tokens(inputs), _sizes(config, inputs), inputs.get("video_coords")
    if grid is not None and (grid.tokens == tokens or coordinates is None):
        spans = (Span("grid", grid.tokens, grid),)
    elif coordinates is not None:
        spans = video_spans(coordinates)
    else:
        raise InvalidInputError(
            "num_frames, height and width are missing and so are video_coords; the grid is read from either."
        )
    return _checked(spans, tokens)


def _ltx2(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """Keyframes and references stand behind the video."""
    tokens, grid = packed_tokens(inputs), _sizes(config, inputs)
    if grid is None:
        raise InvalidInputError("num_frames, height or width is missing; the grid is read from these latent sizes.")
    behind = tokens - grid.tokens
    spans = (Span("grid", grid.tokens, grid), *((Span("reference", behind),) if behind > 0 else ()))
    return _checked(spans, tokens)


def _checked(spans: tuple[Span, ...], tokens: int) -> TokenLayout:
    layout = TokenLayout(spans, spans)
    if layout.query_tokens != tokens:
        raise InvalidInputError(
            f"hidden_states has {tokens} tokens, and its sizes or coordinates tell {layout.query_tokens}."
        )
    return layout


_LTX = Family(
    "ltx",
    re.compile(r"transformer_blocks\.\d+\.attn1"),
    _ltx,
    frames=True,
    # Each head has RoPE of its own.
    supplies=frozenset(NEEDS) - {"rotary"},
    query_norms=("norm_q",),
)


def _kandinsky5(config: Any, inputs: Mapping[str, Any]) -> Grid:
    if inputs.get("sparse_params") is not None:
        raise UnsupportedError(
            "this Kandinsky 5 is sparse already (attention_type is 'nabla'), with its tokens in another order. Take a "
            "checkpoint that is not, or call fastdiff.remove(pipe)."
        )
    return patched(config, latent_sizes(inputs, "batch, frames, height, width, channels"))


_KANDINSKY5 = Family(
    "kandinsky-5",
    re.compile(r"visual_transformer_blocks\.\d+\.self_attention"),
    reads(_kandinsky5),
    frames=True,
    supplies=frozenset({"block_input", "seed"}),
)


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _VACE,
    "WanAnimateTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": replace(_WAN, name="skyreels-v2", layout=reads(_skyreels)),
    "CosmosTransformer3DModel": _COSMOS,
    "AllegroTransformer3DModel": replace(_COSMOS, name="allegro"),
    "LatteTransformer3DModel": _LATTE,
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": replace(_LTX, name="ltx-2", layout=_ltx2),
    "Kandinsky5Transformer3DModel": _KANDINSKY5,
}
