"""Video transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError

from ..contents import read_once
from ..planner import NEEDS
from .base import Family, Table, given

# Lengths of text are rounded up to a multiple, so that not every prompt has a plan of its own.
_TEXT_STEP = 64


def _video(config: Any, inputs: Mapping[str, Any]) -> Grid:
    video = inputs.get("hidden_states")
    if video is None or video.ndim != 5:
        raise InvalidInputError(
            f"hidden_states is {given(video)}; the grid is read from latents [batch, channels, frames, height, width]."
        )
    return Grid(*(size // patch for size, patch in zip(video.shape[2:], _patches(config), strict=True)))


def _patches(config: Any) -> tuple[int, int, int]:
    """Latent frames, rows and columns in a token."""
    if isinstance(config.patch_size, int):
        return getattr(config, "patch_size_t", None) or 1, config.patch_size, config.patch_size
    return tuple(config.patch_size)


def _wan_rotary(arguments: Mapping[str, Any]) -> Table | None:
    table = arguments.get("rotary_emb")
    return None if table is None else tuple(part[0, :, 0] for part in table)


_WAN = Family(
    "wan",
    re.compile(r"blocks\.\d+\.attn1"),
    _video,
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
    return _video(config, inputs)


def _text(inputs: Mapping[str, Any], name: str = "encoder_hidden_states") -> int:
    text = inputs.get(name)
    if text is None or text.ndim != 3:
        raise InvalidInputError(
            f"{name} is {given(text)}; the text stands in the same sequence as the video, [batch, tokens, channels]."
        )
    return text.shape[1]


def _text_behind(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, _text(inputs)


def _rotary_before_text(arguments: Mapping[str, Any]) -> Table | None:
    """The table of the video, and behind it that of text which is not turned."""
    table, text = arguments.get("image_rotary_emb"), arguments.get("encoder_hidden_states")
    if table is None:
        return None
    behind = 0 if text is None else text.shape[1]
    return tuple(F.pad(part, (0, 0, 0, behind), value=still) for part, still in zip(table, (1.0, 0.0), strict=True))


_HUNYUAN = Family(
    "hunyuan-video",
    re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
    _video,
    text=_text_behind,
    usual_text=(0, 256),
    # Its blocks take text and video apart.
    supplies=frozenset(NEEDS) - {"block_input"},
    query_norms=("norm_q", "norm_added_q"),
    rotary=_rotary_before_text,
)


def _hunyuan15(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """Most slots for text are padding, which stands behind all text in each sample and nobody sees."""
    grid = _video(config, inputs)
    names = "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"
    slots = [_text(inputs, name) for name in names]
    lengths = (read_once(inputs[name], _valid) for name in ("encoder_attention_mask", "encoder_attention_mask_2"))
    # An image of zeros stands for none.
    seen = max(map(sum, zip(*lengths, strict=True))) + (slots[2] if read_once(inputs[names[2]], _any) else 0)
    text = min(-(-seen // _TEXT_STEP) * _TEXT_STEP, sum(slots))
    behind = (("text", text), ("pad", sum(slots) - text))
    spans = (Span("grid", grid.tokens, grid), *(Span(kind, tokens) for kind, tokens in behind if tokens))
    return TokenLayout(spans, spans)


def _valid(mask: torch.Tensor) -> list[int]:
    return mask.bool().sum(1).tolist()


def _any(tensor: torch.Tensor) -> bool:
    return bool(tensor.any())


def _hunyuan15_processor(processor: Any) -> Any:
    from ..hunyuan_video15 import masks_keys

    return masks_keys(processor)


_HUNYUAN15 = replace(
    _HUNYUAN,
    name="hunyuan-video-1.5",
    modules=re.compile(r"transformer_blocks\.\d+\.attn"),
    whole=_hunyuan15,
    processor=_hunyuan15_processor,
)


def _motif_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    image = inputs.get("image_embeds")
    return 0, _text(inputs) + (0 if image is None else image.shape[1])


def _motif_block(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    part, index, _ = name.split(".")
    if part != "single_transformer_blocks" or int(index) < config.num_single_layers - config.num_decoder_layers:
        return layout
    # The last blocks have what the ones before have made of the video in the place of the text.
    grid = layout.query[0]
    spans = (grid, Span("reference", grid.tokens, grid.grid))
    return TokenLayout(spans, spans)


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _VACE,
    "WanAnimateTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": replace(_WAN, name="skyreels-v2", grid=_skyreels),
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN15,
    "MotifVideoTransformer3DModel": replace(_HUNYUAN, name="motif-video", text=_motif_text, at=_motif_block),
}
