"""Video transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError

from ..planner import NEEDS
from .base import Family, Table, given


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
            f"this SkyReels-V2 attends block by block in time (num_frame_per_block is {config.num_frame_per_block}, "
            "asynchronous diffusion forcing), which sparse attention does not follow. Run it synchronously (causal_block_size=1), or call "
            "fastdiff.remove(pipe)."
        )
    return _video(config, inputs)


FAMILIES: dict[str, Family] = {
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _VACE,
    "WanAnimateTransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": replace(_WAN, name="skyreels-v2", grid=_skyreels),
}
