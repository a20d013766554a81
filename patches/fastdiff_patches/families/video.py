"""Video transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastdiff_kernels import Grid, InvalidInputError

from ..planner import NEEDS
from .base import Family, Table, given


def _patched_video(config: Any, inputs: Mapping[str, Any]) -> Grid:
    video = inputs.get("hidden_states")
    if video is None or video.ndim != 5:
        raise InvalidInputError(
            f"hidden_states is {given(video)}; the grid is read from latents [batch, channels, frames, height, width]."
        )
    return Grid(*(size // patch for size, patch in zip(video.shape[2:], config.patch_size, strict=True)))


def _wan_rotary(arguments: Mapping[str, Any]) -> Table | None:
    table = arguments.get("rotary_emb")
    return None if table is None else tuple(part[0, :, 0] for part in table)


_WAN = Family(
    "wan",
    re.compile(r"blocks\.\d+\.attn1"),
    _patched_video,
    supplies=frozenset(NEEDS),
    query_norms=("norm_q",),
    rotary=_wan_rotary,
)


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
}
