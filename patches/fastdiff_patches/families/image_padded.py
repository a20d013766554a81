"""Picture transformers that cut, pad or repeat what they are given before they attend."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError

from ..planner import NEEDS
from .base import APART, Family, Table, around, reads
from .image_latents import latent_grid
from .reading import given, interleaved, lengths, text_tokens


def _lumina2_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    mask = inputs.get("encoder_attention_mask")
    if mask is None or mask.ndim != 2:
        raise InvalidInputError(
            f"encoder_attention_mask is {given(mask)}; the text before the image is as long as it says, "
            "[batch, tokens]."
        )
    found = sorted(set(lengths(mask)))
    if len(found) > 1:
        raise UnsupportedError(
            f"prompts of {', '.join(map(str, found))} tokens are in one batch; this model puts each picture right "
            "behind its own text, so that they stand in different places. Run them one by one, or pad them alike."
        )
    return found[0], 0


def _shared_rotary(arguments: Mapping[str, Any], name: str) -> Table | None:
    turns = arguments.get(name)
    if turns is None:
        return None
    # Without a mask all samples have the same lengths, hence positions.
    if len(turns) > 1 and arguments.get("attention_mask") is not None:
        raise UnsupportedError(
            "the method needs one table of RoPE and prompts of different lengths give each sample of the batch its "
            "own; run them one by one."
        )
    return interleaved(turns[0])


_LUMINA2 = Family(
    "lumina2",
    re.compile(r"layers\.\d+\.attn"),
    reads(latent_grid, _lumina2_text),
    usual_text=(256, 0),
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=partial(_shared_rotary, name="image_rotary_emb"),
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
    padding, texts = -_z_image_grid(config, inputs).tokens % _MULTIPLE, inputs.get("cap_feats")
    if not texts or not all(isinstance(text, torch.Tensor) and text.ndim == 2 for text in texts):
        raise InvalidInputError(
            f"cap_feats is {given(texts)}; the text behind the image comes as a list of [tokens, channels], one for "
            "each sample."
        )
    return 0, padding + max(len(text) + -len(text) % _MULTIPLE for text in texts)


_Z_IMAGE = Family(
    "z-image",
    re.compile(r"layers\.\d+\.attention"),
    reads(_z_image_grid, _z_image_text),
    patch=_z_image_patch,
    usual_text=(0, 512),
    latents="x",
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=partial(_shared_rotary, name="freqs_cis"),
)


def _hidream_text(inputs: Mapping[str, Any]) -> int:
    # The last layer of Llama stands behind T5, and each block appends a layer of its own.
    llama = inputs.get("encoder_hidden_states_llama3")
    if llama is None or not len(llama) or llama[0].ndim != 3:
        raise InvalidInputError(
            f"encoder_hidden_states_llama3 is {given(llama)}; the text behind the image comes as layers of [batch, "
            "tokens, channels]."
        )
    return text_tokens(inputs, "encoder_hidden_states_t5") + 2 * llama[0].shape[1]


def _hidream(config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    grid = latent_grid(config, inputs)
    longest = math.prod(config.max_resolution) // config.patch_size**2
    # Pictures that are no squares are padded with tokens that all see, with keys of zero.
    height, width = inputs["hidden_states"].shape[2:]
    padded = height != width and grid.tokens != longest
    padding = (Span("reference", longest - grid.tokens),) if padded else ()
    return around(grid, (0, _hidream_text(inputs)), padding)


def _hidream_rotary(arguments: Mapping[str, Any]) -> Table | None:
    turns = arguments["image_rotary_emb"][0, :, 0]
    cos, sin = (turns[..., row, 0].repeat_interleave(2, -1) for row in (0, 1))
    attention = arguments["attn"]
    rest = attention.inner_dim // attention.heads - cos.shape[-1]
    return torch.nn.functional.pad(cos, (0, rest), value=1), torch.nn.functional.pad(sin, (0, rest))


_HIDREAM = Family(
    "hidream",
    re.compile(r"(double|single)_stream_blocks\.\d+\.block\.attn1"),
    _hidream,
    usual_text=(0, 384),
    supplies=APART,
    query_norms=("q_rms_norm", "q_rms_norm_t"),
    rotary=_hidream_rotary,
)


FAMILIES: dict[str, Family] = {
    "Lumina2Transformer2DModel": _LUMINA2,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "HiDreamImageTransformer2DModel": _HIDREAM,
}
