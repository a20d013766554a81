"""Picture transformers that take latents as they are: shapes tell the grid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdiff_kernels import Grid, TokenLayout, UnsupportedError

from ..planner import NEEDS
from .base import APART, Family, reads
from .reading import latent_sizes, patched, shared_table, table_before_text, text_after, text_before, text_tokens

_FIRST = r"transformer_blocks\.\d+\.attn1"


def latent_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """The grid of latents `[batch, channels, (frames,) height, width]`.

    Raises:
        InvalidInputError: If the forward is not given any.
    """
    has_frames = not isinstance(config.patch_size, int) and len(config.patch_size) == 3
    axes = "batch, channels, frames, height, width" if has_frames else "batch, channels, height, width"
    return patched(config, latent_sizes(inputs, axes))


def _sd3_at(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    # Dual layers look at the picture alone once more.
    return TokenLayout.self_attention(layout.grid) if name.endswith("attn2") else layout


_SD3 = Family(
    "sd3",
    re.compile(r"transformer_blocks\.\d+\.attn2?"),
    reads(latent_grid, text_after),
    at=_sd3_at,
    usual_text=(0, 333),
    supplies=APART,
)

_PIXART = Family("pixart", re.compile(_FIRST), reads(latent_grid), supplies=frozenset(NEEDS))

_COGVIEW3 = Family("cogview3", re.compile(_FIRST), reads(latent_grid, text_before), usual_text=(224, 0), supplies=APART)

# Its RoPE pairs the halves of a head and no neighbours.
_COGVIEW4 = Family(
    "cogview4", re.compile(_FIRST), reads(latent_grid, text_before), usual_text=(1024, 0), supplies=frozenset({"seed"})
)


def _glm_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    caches = inputs.get("kv_caches")
    if caches is not None and caches[0].mode == "read":
        raise UnsupportedError(
            "kv_caches hold keys of reference images beside the sequence, which sparse attention does not know; "
            "generate without reference images, or call fastdiff.remove."
        )
    return latent_grid(config, inputs)


# Like CogView 4.
_GLM_IMAGE = replace(_COGVIEW4, name="glm-image", layout=reads(_glm_grid, text_before))


def _ernie_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, text_tokens(inputs, "text_bth")


# Its RoPE too pairs the halves of a head.
_ERNIE_IMAGE = Family(
    "ernie-image",
    re.compile(r"layers\.\d+\.self_attention"),
    reads(latent_grid, _ernie_text),
    supplies=frozenset({"seed"}),
)

_HUNYUAN_DIT = Family(
    "hunyuan-dit",
    re.compile(r"blocks\.\d+\.attn1"),
    reads(latent_grid),
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    heads_first=True,
    rotary=shared_table,
)

_REGISTERS = 8


def _aura_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return _REGISTERS + text_tokens(inputs), 0


_AURA_FLOW = Family(
    "aura-flow",
    re.compile(r"(joint|single)_transformer_blocks\.\d+\.attn"),
    reads(latent_grid, _aura_text),
    usual_text=(_REGISTERS + 256, 0),
    supplies=APART,
)


def _hunyuan_image_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    tokens = text_tokens(inputs)
    if config.text_embed_2_dim is not None and inputs.get("encoder_hidden_states_2") is not None:
        tokens += text_tokens(inputs, "encoder_hidden_states_2")
    return 0, tokens


_HUNYUAN_IMAGE = Family(
    "hunyuan-image",
    re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
    reads(latent_grid, _hunyuan_image_text),
    usual_text=(0, 1128),
    supplies=APART,
    query_norms=("norm_q", "norm_added_q"),
    rotary=table_before_text,
)


FAMILIES: dict[str, Family] = {
    "SD3Transformer2DModel": _SD3,
    "PixArtTransformer2DModel": _PIXART,
    "CogView3PlusTransformer2DModel": _COGVIEW3,
    "CogView4Transformer2DModel": _COGVIEW4,
    "GlmImageTransformer2DModel": _GLM_IMAGE,
    "ErnieImageTransformer2DModel": _ERNIE_IMAGE,
    "HunyuanDiT2DModel": _HUNYUAN_DIT,
    "AuraFlowTransformer2DModel": _AURA_FLOW,
    "HunyuanImageTransformer2DModel": _HUNYUAN_IMAGE,
}
