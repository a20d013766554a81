"""One row per model family: which modules are its self-attention, and how its layout follows from its inputs.

Rows are found by class name, so nothing of diffusers is imported here.
"""

from __future__ import annotations

from torch import nn

from fastdiff_kernels import UnsupportedError

from . import image, unet, video
from .base import Family

__all__ = ["FAMILIES", "Family", "family_of", "find_family"]

FAMILIES: dict[str, Family] = {**video.FAMILIES, **image.FAMILIES, **unet.FAMILIES}


def find_family(model: nn.Module) -> Family | None:
    """The family of a model or of the class it is derived from, None if there is none."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def family_of(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedError: If no row describes the model's class.
    """
    family = find_family(model)
    if family is None:
        raise UnsupportedError(
            f"{type(model).__name__} is not described; supported are {', '.join(sorted(FAMILIES))} and classes "
            "derived from them. To describe it, add a row with its self-attention modules and its token grid: "
            "fastdiff_patches.families.FAMILIES[class name] = Family(name, modules, grid)."
        )
    return family
