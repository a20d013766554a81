"""Picture transformers that take latents as they are: shapes tell the grid."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError

from ..contents import read_once
from ..planner import NEEDS
from .base import Family, Table, given
from .image_text import interleaved, shared_table, text_after, text_before, text_tokens, unturned_behind

# Their blocks take text and picture apart.
_APART = frozenset(NEEDS) - {"block_input"}
_JOINT = r"(single_)?transformer_blocks\.\d+\.attn"
_FIRST = r"transformer_blocks\.\d+\.attn1"


def _latents(config: Any, inputs: Mapping[str, Any]) -> Grid:
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
    _latents,
    text=text_after,
    at=_sd3_at,
    usual_text=(0, 333),
    supplies=_APART,
)

_PIXART = Family("pixart", re.compile(_FIRST), _latents, supplies=frozenset(NEEDS))

_COGVIEW3 = Family("cogview3", re.compile(_FIRST), _latents, text=text_before, usual_text=(224, 0), supplies=_APART)

# Its RoPE pairs the halves of a head and no neighbours.
_COGVIEW4 = Family(
    "cogview4", re.compile(_FIRST), _latents, text=text_before, usual_text=(1024, 0), supplies=frozenset({"seed"})
)


def _glm_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    caches = inputs.get("kv_caches")
    if caches is not None and caches[0].mode == "read":
        raise UnsupportedError(
            "kv_caches hold keys of reference images beside the sequence, which sparse attention does not know; "
            "generate without reference images, or call fastdiff.remove."
        )
    return _latents(config, inputs)


# Like CogView 4.
_GLM_IMAGE = replace(_COGVIEW4, name="glm-image", grid=_glm_grid)


def _ernie_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return 0, text_tokens(inputs, "text_bth")


# Its RoPE too pairs the halves of a head.
_ERNIE_IMAGE = Family(
    "ernie-image",
    re.compile(r"layers\.\d+\.self_attention"),
    _latents,
    text=_ernie_text,
    supplies=frozenset({"seed"}),
)

_HUNYUAN_DIT = Family(
    "hunyuan-dit",
    re.compile(r"blocks\.\d+\.attn1"),
    _latents,
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
    _latents,
    text=_aura_text,
    usual_text=(_REGISTERS + 256, 0),
    supplies=_APART,
)


def _valid(mask: torch.Tensor) -> list[int]:
    return mask.sum(1).tolist()


def _lumina2_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    mask = inputs.get("encoder_attention_mask")
    if mask is None or mask.ndim != 2:
        raise InvalidInputError(
            f"encoder_attention_mask is {given(mask)}; the text before the image is as long as it says, "
            "[batch, tokens]."
        )
    lengths = sorted(set(read_once(mask, _valid)))
    if len(lengths) > 1:
        raise UnsupportedError(
            f"prompts of {', '.join(map(str, lengths))} tokens are in one batch; this model puts each picture right "
            "behind its own text, so that they stand in different places. Run them one by one, or pad them alike."
        )
    return int(lengths[0]), 0


def _shared_rotary(turns: torch.Tensor, mask: torch.Tensor | None) -> Table:
    # Without a mask all samples have the same lengths, hence positions.
    if len(turns) > 1 and mask is not None:
        raise UnsupportedError(
            "the method needs one table of RoPE and prompts of different lengths give each sample of the batch its "
            "own; run them one by one."
        )
    return interleaved(turns[0])


def _lumina2_rotary(arguments: Mapping[str, Any]) -> Table | None:
    turns = arguments.get("image_rotary_emb")
    return None if turns is None else _shared_rotary(turns, arguments.get("attention_mask"))


_LUMINA2 = Family(
    "lumina2",
    re.compile(r"layers\.\d+\.attn"),
    _latents,
    text=_lumina2_text,
    usual_text=(256, 0),
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=_lumina2_rotary,
)

_MULTIPLE = 32


def _z_image(inputs: Mapping[str, Any]) -> torch.Tensor:
    images = inputs.get("x")
    if not images or not all(isinstance(image, torch.Tensor) and image.ndim == 4 for image in images):
        what = "missing" if not images else f"a list of {given(images[0])}"
        raise InvalidInputError(
            f"x is {what}; the grid is read from latents [channels, frames, height, width], one for each sample. "
            "Several images for a sample (omni mode) are not described."
        )
    if len({image.shape for image in images}) > 1:
        raise InvalidInputError("x holds latents of unequal sizes; run them one by one.")
    return images[0]


def _z_image_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    frames, height, width = _z_image(inputs).shape[1:]
    patch = inputs.get("patch_size", 2)
    return Grid(frames // inputs.get("f_patch_size", 1), height // patch, width // patch)


def _z_image_patch(config: Any) -> tuple[int, int, int]:
    return config.all_f_patch_size[0], config.all_patch_size[0], config.all_patch_size[0]


def _z_image_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    # Learned tokens pad image and text, and all see them.
    padding = -_z_image_grid(config, inputs).tokens % _MULTIPLE
    return 0, padding + max(len(text) + -len(text) % _MULTIPLE for text in inputs["cap_feats"])


def _z_image_rotary(arguments: Mapping[str, Any]) -> Table | None:
    turns = arguments.get("freqs_cis")
    return None if turns is None else _shared_rotary(turns, arguments.get("attention_mask"))


_Z_IMAGE = Family(
    "z-image",
    re.compile(r"layers\.\d+\.attention"),
    _z_image_grid,
    text=_z_image_text,
    patch=_z_image_patch,
    usual_text=(0, 512),
    latents="x",
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=_z_image_rotary,
)


def _hidream_padding(config: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    grid = _latents(config, inputs)
    longest = math.prod(config.max_resolution) // config.patch_size**2
    # Pictures that are no squares are padded with tokens that all see, with keys of zero.
    height, width = inputs["hidden_states"].shape[2:]
    return () if height == width or grid.tokens == longest else (Span("reference", longest - grid.tokens),)


def _hidream_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    # The last layer of Llama stands behind T5, and each block appends a layer of its own.
    llama = inputs["encoder_hidden_states_llama3"]
    return 0, text_tokens(inputs, "encoder_hidden_states_t5") + 2 * llama[0].shape[1]


def _hidream_rotary(arguments: Mapping[str, Any]) -> Table | None:
    turns = arguments["image_rotary_emb"][0, :, 0]
    cos, sin = (turns[..., row, 0].repeat_interleave(2, -1) for row in (0, 1))
    attention = arguments["attn"]
    rest = attention.inner_dim // attention.heads - cos.shape[-1]
    return torch.nn.functional.pad(cos, (0, rest), value=1), torch.nn.functional.pad(sin, (0, rest))


_HIDREAM = Family(
    "hidream",
    re.compile(r"(double|single)_stream_blocks\.\d+\.block\.attn1"),
    _latents,
    text=_hidream_text,
    references=_hidream_padding,
    usual_text=(0, 384),
    supplies=_APART,
    query_norms=("q_rms_norm", "q_rms_norm_t"),
    rotary=_hidream_rotary,
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
    re.compile(_JOINT),
    _latents,
    text=_hunyuan_image_text,
    usual_text=(0, 1128),
    supplies=_APART,
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
    "Lumina2Transformer2DModel": _LUMINA2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "HiDreamImageTransformer2DModel": _HIDREAM,
    "HunyuanImageTransformer2DModel": _HUNYUAN_IMAGE,
}
