"""Picture transformers that take packed tokens: positions of the tokens or a list of shapes tell the grid."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdiff_kernels import Grid, InvalidInputError, Span, UnsupportedError

from ..image_ids import image_spans
from ..planner import NEEDS
from .base import Family, Table, given, patch_of
from .image_text import interleaved, shared_table, text_before, text_tokens

# Their blocks take text and picture apart, or one behind the other.
_SUPPLIES = frozenset(NEEDS) - {"block_input"}


def _packed(inputs: Mapping[str, Any]) -> torch.Tensor:
    packed = inputs.get("hidden_states")
    if packed is None or packed.ndim != 3:
        raise InvalidInputError(
            f"hidden_states is {given(packed)}; this model takes packed latents [batch, tokens, channels]. Pack them "
            "as its pipeline does (FluxPipeline makes a token of 2x2 pixels)."
        )
    return packed


def _spans(inputs: Mapping[str, Any], picture: int) -> tuple[Span, ...]:
    tokens, ids = _packed(inputs).shape[1], inputs.get("img_ids")
    if ids is None or ids.ndim not in (2, 3) or ids.shape[-1] < 3 or ids.shape[-2] != tokens:
        raise InvalidInputError(
            f"img_ids is {given(ids)}; the grid is read from the positions of the {tokens} image tokens, "
            f"[{tokens}, 3 or more]."
        )
    return image_spans(ids, picture)


def _grid(config: Any, inputs: Mapping[str, Any], picture: int = 0) -> Grid:
    return _spans(inputs, picture)[0].grid


def _references(config: Any, inputs: Mapping[str, Any], picture: int = 0) -> tuple[Span, ...]:
    return _spans(inputs, picture)[1:]


def _two_by_two(config: Any) -> tuple[int, int, int]:
    return 1, 2, 2


_FLUX = Family(
    "flux",
    re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
    _grid,
    text=text_before,
    references=_references,
    patch=_two_by_two,
    usual_text=(512, 0),
    supplies=_SUPPLIES,
    query_norms=("norm_added_q", "norm_q"),
    rotary=shared_table,
)


def _flux2_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    if inputs.get("kv_cache_mode") is not None:
        raise UnsupportedError(
            f"kv_cache_mode is {inputs['kv_cache_mode']!r}: keys of reference images are kept beside the sequence, "
            "which sparse attention does not know. Use a pipeline that appends references (Flux2KleinPipeline), or "
            "call fastdiff.remove."
        )
    return _grid(config, inputs)


def _chroma_mask(mask: Any) -> Any:
    """Its blocks make the mask of keys one of queries and keys, in which padding sees nothing; nobody sees padding."""
    if mask is None or mask.dtype == torch.bool:
        return mask if mask is None else mask.any(2, keepdim=True)
    raise UnsupportedError(
        f"attention_mask is {mask.dtype}: ChromaPipeline gives numbers, which are added to the scores instead of "
        "hiding padding (issue 12116 of diffusers). Call pipe.encode_prompt yourself, and give its embeddings and its "
        "masks as prompt_attention_mask=mask.bool(), negative_prompt_attention_mask likewise."
    )


_CHROMA = replace(_FLUX, name="chroma", mask=_chroma_mask)
_FLUX2 = replace(_FLUX, name="flux2", grid=_flux2_grid)
# Text is image 0 there.
_LONGCAT = replace(
    _FLUX, name="longcat-image", grid=partial(_grid, picture=1), references=partial(_references, picture=1)
)


def _krea_spans(inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    text, image, ids = text_tokens(inputs, ndim=4), _packed(inputs).shape[1], inputs.get("position_ids")
    if ids is None or ids.shape != (text + image, 3):
        raise InvalidInputError(
            f"position_ids is {given(ids)}; the grid is read from the positions of {text} text and {image} image "
            f"tokens, [{text + image}, 3]."
        )
    return image_spans(ids, text=text)


def _krea_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    return _krea_spans(inputs)[0].grid


def _krea_references(config: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    return _krea_spans(inputs)[1:]


def _krea_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    return text_tokens(inputs, ndim=4), 0


def _krea_heads(attention: nn.Module) -> tuple[int, int]:
    return attention.num_heads, attention.head_dim


_KREA2 = Family(
    "krea2",
    re.compile(r"transformer_blocks\.\d+\.attn"),
    _krea_grid,
    text=_krea_text,
    references=_krea_references,
    patch=_two_by_two,
    usual_text=(512, 0),
    heads=_krea_heads,
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=shared_table,
)


def _qwen_images(inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(frames, height, width) of each image in the sequence."""
    tokens, shapes = _packed(inputs).shape[1], inputs.get("img_shapes")
    samples = [[sample] if isinstance(sample[0], int) else list(sample) for sample in shapes or ()]
    if not samples or any(sample != samples[0] for sample in samples):
        raise InvalidInputError(
            f"img_shapes is {shapes!r}; the grid is read from it: for each sample the same list of (frames, height, "
            "width) in tokens, one for each image. Run pictures of unequal sizes one by one."
        )
    if sum(map(math.prod, samples[0])) != tokens:
        raise InvalidInputError(f"img_shapes is {samples[0]} for {tokens} image tokens; they must be as many.")
    return [tuple(image) for image in samples[0]]


def _qwen_pictures(config: Any, inputs: Mapping[str, Any]) -> int:
    # The layered model draws all images but the last.
    images = _qwen_images(inputs)
    return len(images) - 1 if getattr(config, "use_layer3d_rope", False) else 1


def _qwen_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    pictures = _qwen_images(inputs)[: _qwen_pictures(config, inputs)]
    if any(picture != pictures[0] for picture in pictures):
        raise InvalidInputError(f"img_shapes gives layers of sizes {pictures}; layers must have one size.")
    frames, height, width = pictures[0]
    return Grid(len(pictures) * frames, height, width)


def _qwen_references(config: Any, inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    images = _qwen_images(inputs)[_qwen_pictures(config, inputs) :]
    return tuple(Span("reference", math.prod(image)) for image in images)


def _qwen_rotary(arguments: Mapping[str, Any]) -> Table | None:
    tables = arguments.get("image_rotary_emb")
    return None if tables is None else interleaved(torch.cat([tables[1], tables[0]]))


_QWEN = Family(
    "qwen-image",
    re.compile(r"transformer_blocks\.\d+\.attn"),
    _qwen_grid,
    text=text_before,
    references=_qwen_references,
    usual_text=(512, 0),
    supplies=_SUPPLIES,
    query_norms=("norm_added_q", "norm_q"),
    rotary=_qwen_rotary,
)


FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX2,
    "ChromaTransformer2DModel": _CHROMA,
    # The scale factor of Bria's pipelines counts the packing.
    "BriaTransformer2DModel": replace(_FLUX, name="bria", patch=patch_of, usual_text=(128, 0)),
    "BriaFiboTransformer2DModel": replace(_FLUX, name="bria-fibo", patch=patch_of),
    "LongCatImageTransformer2DModel": _LONGCAT,
    "OvisImageTransformer2DModel": replace(_FLUX, name="ovis-image", usual_text=(256, 0)),
    "QwenImageTransformer2DModel": _QWEN,
    "Krea2Transformer2DModel": _KREA2,
}
