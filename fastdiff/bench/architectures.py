"""The models that `fastdiff bench models` builds, whole or a few layers of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastdiff_kernels import Grid

from . import published_models


@dataclass(frozen=True)
class Architecture:
    """A model and its standard size.

    Attributes:
        name: What `--model` takes.
        what: The model and the size, for people.
        kind: Its class in diffusers.
        config: Arguments of that class.
        inputs: Makes the arguments of one forward.
        grid: Tokens of its finest self-attention layers.
        text: Text tokens in the same sequence.
        heads, head_dim: Of those layers.
        methods: What is timed on it besides dense attention; keys of `fastdiff.methods.METHODS`.
        layers: Its lists of equal blocks: attribute -> the argument that says how many. Empty for a model that is
            always built whole.
        few: Blocks of each list in the shortest model that is timed; another has as many more.
    """

    name: str
    what: str
    kind: str
    config: dict[str, Any]
    inputs: Callable[[published_models.Draw], published_models.Inputs]
    grid: Grid
    heads: int
    head_dim: int
    methods: tuple[str, ...]
    text: int = 0
    layers: dict[str, str] = field(default_factory=dict)
    few: int = 2

    @property
    def tokens(self) -> int:
        return self.grid.tokens + self.text

    def depth(self) -> dict[str, int]:
        """Blocks of each list in the published model."""
        return {name: self.config[argument] for name, argument in self.layers.items()}

    def build(self, device: str, depth: dict[str, int], dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """The model with random weights and so many blocks, for inference.

        Args:
            device: Where it is built; `"meta"` for its shapes alone.
            depth: Blocks of each list.
            dtype: Of its weights, but for the parts that its class keeps in float32.
        """
        import diffusers

        counts = {argument: depth[name] for name, argument in self.layers.items()}
        with torch.device(device), _default_dtype(dtype):
            model = getattr(diffusers, self.kind)(**(self.config | counts))
        exact = set(model._keep_in_fp32_modules or ())
        for name, parameter in model.named_parameters():
            if exact & set(name.split(".")):
                parameter.data = parameter.data.float()
        return model.eval().requires_grad_(False)


@contextmanager
def _default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


_BLOCKS = {"transformer_blocks": "num_layers"}
_BOTH = _BLOCKS | {"single_transformer_blocks": "num_single_layers"}
_LARGE, _SMALL = Grid(21, 45, 80), Grid(21, 30, 52)
_VIDEO, _PICTURE = ("radial", "neighborhood"), ("neighborhood", "clear")


def _flux_at(name: str, side: int, few: int = 2) -> Architecture:
    grid = Grid(1, side, side)
    what = f"FLUX.1, {16 * side}x{16 * side}"
    return Architecture(
        name,
        what,
        "FluxTransformer2DModel",
        published_models.FLUX,
        published_models.flux_inputs(grid),
        grid,
        24,
        128,
        _PICTURE,
        512,
        layers=_BOTH,
        few=few,
    )


def _wan_at(name: str, what: str, config: dict[str, Any], grid: Grid) -> Architecture:
    heads = config["num_attention_heads"]
    lists = {"blocks": "num_layers"}
    return Architecture(
        name,
        what,
        "WanTransformer3DModel",
        config,
        published_models.wan_inputs(grid),
        grid,
        heads,
        128,
        _VIDEO,
        layers=lists,
    )


ARCHITECTURES: tuple[Architecture, ...] = (
    _wan_at("wan-14b", "Wan2.1-14B, 81 frames of 1280x720", published_models.WAN_14B, _LARGE),
    _wan_at("wan-1.3b", "Wan2.1-1.3B, 81 frames of 832x480", published_models.WAN_1B, _SMALL),
    Architecture(
        "hunyuan",
        "HunyuanVideo, 129 frames of 1280x720",
        "HunyuanVideoTransformer3DModel",
        published_models.HUNYUAN,
        published_models.hunyuan_inputs,
        Grid(33, 45, 80),
        24,
        128,
        _VIDEO,
        256,
        _BOTH,
    ),
    Architecture(
        "cogvideox",
        "CogVideoX-5B, 49 frames of 720x480",
        "CogVideoXTransformer3DModel",
        published_models.COGVIDEOX,
        published_models.cogvideox_inputs,
        Grid(13, 30, 45),
        48,
        64,
        _VIDEO,
        226,
        _BLOCKS,
    ),
    Architecture(
        "mochi",
        "Mochi 1, 163 frames of 848x480",
        "MochiTransformer3DModel",
        published_models.MOCHI,
        published_models.mochi_inputs,
        Grid(28, 30, 53),
        24,
        128,
        _VIDEO,
        published_models.WORDS,
        _BLOCKS,
    ),
    _flux_at("flux", 64),
    # A dense block takes longer than a second.
    _flux_at("flux-8k", 512, few=1),
    Architecture(
        "sdxl",
        "SDXL, 1024x1024",
        "UNet2DConditionModel",
        published_models.SDXL,
        published_models.sdxl_inputs,
        Grid(1, 64, 64),
        10,
        64,
        (*_PICTURE, "agent"),
    ),
)
