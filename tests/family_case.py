"""Case: how the tests of families run one model; `family_cases_video.py` and `family_cases_image.py` hold the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import nn


@dataclass(frozen=True)
class Case:
    """A model, its arguments for (frames, height, width) tokens, and what moves the token of a place in them.

    Attributes:
        build: () -> the model, with random weights, a few hundred kilobytes. Called only where diffusers has its class.
        arguments: (frames, height, width) -> the arguments of its forward by name, batch 1.
        move: (arguments, frame, row, column) -> changes one place of the latents in them, in place.
        grids: The sizes to try, (frames, height, width) in tokens.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[..., dict[str, Any]]
    move: Callable[..., None]
    grids: tuple[tuple[int, int, int], ...]


def present(cases: dict[str, Case]) -> dict[str, Case]:
    """Those whose model the installed diffusers has; a case is named "class" or "class, what is special"."""
    return {name: case for name, case in cases.items() if hasattr(diffusers, name.split(",")[0])}


def without_neighbours(model: nn.Module) -> nn.Module:
    """Convolutions see their own pixel only, and nothing is normalised over pixels."""
    for module in list(model.modules()):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            own = torch.zeros(3, 3)
            own[1, 1] = 1
            module.weight.data *= own
        for name, part in list(module.named_children()):
            if isinstance(part, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return model
