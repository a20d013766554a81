"""Video transformers whose self-attention sees text in the same sequence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastdiff_kernels import Grid, Span, TokenLayout

from ..contents import read_once
from .base import APART, Family, patch_of, reads
from .reading import latent_sizes, lengths, table_before_text, table_behind_text, text_after, text_before, text_tokens
from .video import video_grid

# Lengths of text are rounded up to a multiple, so that not every prompt has a plan of its own.
_TEXT_STEP = 64

_HUNYUAN = Family(
    "hunyuan-video",
    re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
    reads(video_grid, text_after),
    frames=True,
    usual_text=(0, 256),
    supplies=APART,
    query_norms=("norm_q", "norm_added_q"),
    rotary=table_before_text,
)


def _framepack(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """What is known of the past stands in front, the older the coarser."""
    grid, patch = video_grid(config, inputs), patch_of(config)
    history = []
    for name, coarse in (("latents_history_4x", 4), ("latents_history_2x", 2), ("latents_clean", 1)):
        past = inputs.get(name)
        if past is not None:
            sizes = zip(past.shape[2:], patch, strict=True)
            history.append(Span("reference", math.prod(-(-size // (coarse * step)) for size, step in sizes)))
    text = Span("text", text_tokens(inputs, "image_embeds") + text_tokens(inputs))
    spans = (*history, Span("grid", grid.tokens, grid), text)
    return TokenLayout(spans, spans)


# Of a single sample its padding is cut off.
_FRAMEPACK = replace(
    _HUNYUAN, name="framepack", layout=_framepack, text_varies=True, supplies=frozenset({"seed"}), query_norms=()
)


def _hunyuan15(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    """Most slots for text are padding, which stands behind all text in each sample and nobody sees."""
    grid = video_grid(config, inputs)
    names = "encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"
    slots = [text_tokens(inputs, name) for name in names]
    valid = (lengths(inputs[name]) for name in ("encoder_attention_mask", "encoder_attention_mask_2"))
    # An image of zeros stands for none.
    seen = max(map(sum, zip(*valid, strict=True))) + (slots[2] if read_once(inputs[names[2]], _any) else 0)
    text = min(-(-seen // _TEXT_STEP) * _TEXT_STEP, sum(slots))
    behind = (("text", text), ("pad", sum(slots) - text))
    spans = (Span("grid", grid.tokens, grid), *(Span(kind, tokens) for kind, tokens in behind if tokens))
    return TokenLayout(spans, spans)


def _any(tensor: torch.Tensor) -> bool:
    return bool(tensor.any())


def _hunyuan15_processor(processor: Any) -> Any:
    from ..hunyuan_video15 import masks_keys

    return masks_keys(processor)


_HUNYUAN15 = replace(
    _HUNYUAN,
    name="hunyuan-video-1.5",
    modules=re.compile(r"transformer_blocks\.\d+\.attn"),
    layout=_hunyuan15,
    processor=_hunyuan15_processor,
)

_MOCHI = Family(
    "mochi",
    re.compile(r"transformer_blocks\.\d+\.attn1"),
    reads(video_grid, text_after),
    frames=True,
    # Its processor takes one sample after the other, and of each the text that is no padding.
    text_varies=True,
    usual_text=(0, 256),
    supplies=frozenset({"seed"}),
)


def _motif_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    image = inputs.get("image_embeds")
    return 0, text_tokens(inputs) + (0 if image is None else image.shape[1])


def _motif_block(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    part, index, _ = name.split(".")
    if part != "single_transformer_blocks" or int(index) < config.num_single_layers - config.num_decoder_layers:
        return layout
    # The last blocks have what the ones before have made of the video in the place of the text.
    grid = layout.grid
    spans = Span("grid", grid.tokens, grid), Span("reference", grid.tokens, grid)
    return TokenLayout(spans, spans)


_MOTIF = replace(
    _HUNYUAN, name="motif-video", layout=reads(video_grid, _motif_text), at=_motif_block, usual_text=(0, 512)
)


def _cogvideox(config: Any, inputs: Mapping[str, Any]) -> Grid:
    frames, height, width = latent_sizes(inputs, "batch, frames, channels, height, width")
    time, *patch = patch_of(config)
    return Grid(-(-frames // time), height // patch[0], width // patch[1])


_COGVIDEOX = Family(
    "cogvideox",
    re.compile(r"transformer_blocks\.\d+\.attn1"),
    reads(_cogvideox, text_before),
    frames=True,
    usual_text=(226, 0),
    supplies=APART,
    query_norms=("norm_added_q", "norm_q"),
    heads_first=True,
    rotary=table_behind_text,
)


def _easyanimate_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    more = "encoder_hidden_states_t5"
    return text_tokens(inputs) + (text_tokens(inputs, more) if inputs.get(more) is not None else 0), 0


_EASYANIMATE = replace(_COGVIDEOX, name="easyanimate", layout=reads(video_grid, _easyanimate_text), usual_text=(256, 0))


FAMILIES: dict[str, Family] = {
    "HunyuanVideoTransformer3DModel": _HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": _FRAMEPACK,
    "HunyuanVideo15Transformer3DModel": _HUNYUAN15,
    "MochiTransformer3DModel": _MOCHI,
    "MotifVideoTransformer3DModel": _MOTIF,
    "CogVideoXTransformer3DModel": _COGVIDEOX,
    "ConsisIDTransformer3DModel": replace(_COGVIDEOX, name="consisid"),
    "EasyAnimateTransformer3DModel": _EASYANIMATE,
}
