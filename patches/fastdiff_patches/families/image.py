"""Picture transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastdiff_kernels import Grid, InvalidInputError, Span

from ..image_ids import image_spans
from ..planner import NEEDS
from .base import Family, Table, given


def _flux_spans(inputs: Mapping[str, Any]) -> tuple[Span, ...]:
    packed, ids = inputs.get("hidden_states"), inputs.get("img_ids")
    if packed is None or packed.ndim != 3:
        raise InvalidInputError(
            f"hidden_states is {given(packed)}; this model takes packed latents [batch, tokens, channels]. Pack them "
            "as FluxPipeline does (2x2 pixels make a token)."
        )
    if ids is None or ids.ndim not in (2, 3) or ids.shape[-1] != 3 or ids.shape[-2] != packed.shape[1]:
        raise InvalidInputError(
            f"img_ids is {given(ids)}; the grid is read from the positions of the {packed.shape[1]} image tokens, "
            f"[{packed.shape[1]}, 3]."
        )
    return image_spans(ids)


def _flux_grid(config: Any, inputs: Mapping[str, Any]) -> Grid:
    return _flux_spans(inputs)[0].grid


def _flux_text(config: Any, inputs: Mapping[str, Any]) -> tuple[int, int]:
    text = inputs.get("encoder_hidden_states")
    if text is None or text.ndim != 3:
        raise InvalidInputError(
            f"encoder_hidden_states is {given(text)}; the text stands before the image in the same sequence, "
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


FAMILIES: dict[str, Family] = {
    "FluxTransformer2DModel": _FLUX,
}
