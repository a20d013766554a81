"""Picture transformers that take packed tokens: positions of the tokens or a list of shapes tell the grid."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError

from ..image_ids import image_spans
from ..planner import NEEDS
from .base import APART, Family, Table, around, patch_of
from .reading import given, interleaved, packed_tokens, shared_table, text_before, text_tokens


def _flux(config: Any, inputs: Mapping[str, Any], picture: int = 0) -> TokenLayout:
    tokens, ids = packed_tokens(inputs), inputs.get("img_ids")
    if ids is None or ids.ndim not in (2, 3) or ids.shape[-1] < 3 or ids.shape[-2] != tokens:
        raise InvalidInputError(
            f"img_ids is {given(ids)}; the grid is read from the positions of the {tokens} image tokens, "
            f"[{tokens}, 3 or more]."
        )
    picture_span, *references = image_spans(ids, picture)
    return around(picture_span.grid, text_before(config, inputs), tuple(references))


def _two_by_two(config: Any) -> tuple[int, int, int]:
    return 1, 2, 2


_FLUX = Family(
    "flux",
    re.compile(r"(single_)?transformer_blocks\.\d+\.attn"),
    _flux,
    patch=_two_by_two,
    usual_text=(512, 0),
    supplies=APART,
    query_norms=("norm_added_q", "norm_q"),
    rotary=shared_table,
)


def _flux2(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    if inputs.get("kv_cache_mode") is not None:
        raise UnsupportedError(
            f"kv_cache_mode is {inputs['kv_cache_mode']!r}: keys of reference images are kept beside the sequence, "
            "which sparse attention does not know. Use a pipeline that appends references (Flux2KleinPipeline), or "
            "call fastdiff.remove."
        )
    return _flux(config, inputs)


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
_FLUX2 = replace(_FLUX, name="flux2", layout=_flux2)
# Text is image 0 there.
_LONGCAT = replace(_FLUX, name="longcat-image", layout=partial(_flux, picture=1))


def _krea(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    text, image, ids = text_tokens(inputs, ndim=4), packed_tokens(inputs), inputs.get("position_ids")
    if ids is None or ids.shape != (text + image, 3):
        raise InvalidInputError(
            f"position_ids is {given(ids)}; the grid is read from the positions of {text} text and {image} image "
            f"tokens, [{text + image}, 3]."
        )
    picture, *references = image_spans(ids, text=text)
    return around(picture.grid, (text, 0), tuple(references))


_KREA2 = Family(
    "krea2",
    re.compile(r"transformer_blocks\.\d+\.attn"),
    _krea,
    patch=_two_by_two,
    usual_text=(512, 0),
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=shared_table,
)


def _qwen_images(inputs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """(frames, height, width) of each image in the sequence."""
    tokens, shapes = packed_tokens(inputs), inputs.get("img_shapes")
    samples = [[sample] if isinstance(sample[0], int) else list(sample) for sample in shapes or ()]
    if not samples or any(sample != samples[0] for sample in samples):
        raise InvalidInputError(
            f"img_shapes is {shapes!r}; the grid is read from it: for each sample the same list of (frames, height, "
            "width) in tokens, one for each image. Run pictures of unequal sizes one by one."
        )
    if sum(map(math.prod, samples[0])) != tokens:
        raise InvalidInputError(f"img_shapes is {samples[0]} for {tokens} image tokens; they must be as many.")
    return [tuple(image) for image in samples[0]]


def _qwen(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    images = _qwen_images(inputs)
    # The layered model draws all images but the last.
    drawn = max(len(images) - 1, 1) if getattr(config, "use_layer3d_rope", False) else 1
    if any(image != images[0] for image in images[:drawn]):
        raise InvalidInputError(f"img_shapes gives layers of sizes {images[:drawn]}; layers must have one size.")
    frames, height, width = images[0]
    references = tuple(Span("reference", math.prod(image)) for image in images[drawn:])
    return around(Grid(drawn * frames, height, width), text_before(config, inputs), references)


def _qwen_rotary(arguments: Mapping[str, Any]) -> Table | None:
    tables = arguments.get("image_rotary_emb")
    return None if tables is None else interleaved(torch.cat([tables[1], tables[0]]))


_QWEN = Family(
    "qwen-image",
    re.compile(r"transformer_blocks\.\d+\.attn"),
    _qwen,
    usual_text=(512, 0),
    supplies=APART,
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
