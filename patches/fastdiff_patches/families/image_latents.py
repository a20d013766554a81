"""Picture transformers that take latents as they are: shapes tell the grid."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdiff_kernels import Grid, InvalidInputError, TokenLayout, UnsupportedError

from ..planner import NEEDS
from .base import Family, Table, given
from .image_text import shared_table, text_after, text_before, text_tokens, unturned_behind

# Their blocks take text and picture apart.
APART = frozenset(NEEDS) - {"block_input"}
_FIRST = r"transformer_blocks\.\d+\.attn1"


def latent_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    """The grid of latents `[batch, channels, (frames,) height, width]`.

    Raises:
        InvalidInputError: If the forward is not given any.
    """
    patch = config.patch_size
    patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
    latents = inputs.get("hidden_states")
    if latents is None or latents.ndim != 2 + len(patch):
        sizes = ", ".join(("frames", "height", "width")[-len(patch) :])
        raise InvalidInputError(
            f"hidden_states is {given(latents)}; the grid is read from latents [batch, channels, {sizes}]."
        )
    sizes = [size // each for size, each in zip(latents.shape[2:], patch, strict=True)]
    return Grid(*[1] * (3 - len(sizes)), *sizes)


def _sd3_at(config: Any, layout: TokenLayout, name: str) -> TokenLayout:
    # Dual layers look at the picture alone once more.
    return TokenLayout.self_attention(layout.grid) if name.endswith("attn2") else layout


_SD3 = Family(
    "sd3",
    re.compile(r"transformer_blocks\.\d+\.attn2?"),
    latent_grid,
    text=text_after,
    at=_sd3_at,
    usual_text=(0, 333),
    supplies=APART,
)

_PIXART = Family("pixart", re.compile(_FIRST), latent_grid, supplies=frozenset(NEEDS))

_COGVIEW3 = Family("cogview3", re.compile(_FIRST), latent_grid, text=text_before, usual_text=(224, 0), supplies=APART)

# Its RoPE pairs the halves of a head and no neighbours.
_COGVIEW4 = Family(
    "cogview4", re.compile(_FIRST), latent_grid, text=text_before, usual_text=(1024, 0), supplies=frozenset({"seed"})
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
_GLM_IMAGE = replace(_COGVIEW4, name="glm-image", grid=_glm_grid)


def _ernie_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, text_tokens(inputs, "text_bth")


# Its RoPE too pairs the halves of a head.
_ERNIE_IMAGE = Family(
    "ernie-image",
    re.compile(r"layers\.\d+\.self_attention"),
    latent_grid,
    text=_ernie_text,
    supplies=frozenset({"seed"}),
)

_HUNYUAN_DIT = Family(
    "hunyuan-dit",
    re.compile(r"blocks\.\d+\.attn1"),
    latent_grid,
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
    latent_grid,
    text=_aura_text,
    usual_text=(_REGISTERS + 256, 0),
    supplies=APART,
)


def _hunyuan_image_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    tokens = text_tokens(inputs)
    if config.text_embed_2_dim is not None and inputs.get("encoder_hidden_states_2") is not None:
        tokens += text_tokens(inputs, "encoder_hidden_states_2")
    return 0, tokens


def _hunyuan_image_rotary(arguments: Mapping[str, Any]) -> Table | None:
    table, text = arguments.get("image_rotary_emb"), arguments.get("encoder_hidden_states")
    return None if table is None else unturned_behind(table, text.shape[1])


_HUNYUAN_IMAGE = Family(
    "hunyuan-image",
    re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
    latent_grid,
    text=_hunyuan_image_text,
    usual_text=(0, 1128),
    supplies=APART,
    query_norms=("norm_q", "norm_added_q"),
    rotary=_hunyuan_image_rotary,
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
