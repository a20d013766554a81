"""One row per model family: which modules are its self-attention, and how its layout follows from its inputs.

Rows are found by class name, so nothing of diffusers is imported here.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from fastdiff_kernels import InvalidInputError, TokenLayout, UnsupportedError

from . import image, image_latents, image_padded, unet, video, video_text
from .base import Family, patch_of

__all__ = ["FAMILIES", "Family", "family_of", "find_family", "patch_of"]

_FILES = (video, video_text, image, image_latents, image_padded, unet)
FAMILIES: dict[str, Family] = {name: family for file in _FILES for name, family in file.FAMILIES.items()}
# Their self-attention is linear and has no scores that could be left out.
LINEAR = frozenset({"SanaTransformer2DModel", "SanaVideoTransformer3DModel"})


def find_family(model: nn.Module) -> Family | None:
    """The family of a model or of the class it is derived from, None if there is none."""
    return next((FAMILIES[cls.__name__] for cls in type(model).__mro__ if cls.__name__ in FAMILIES), None)


def family_of(
    model: nn.Module, told: Callable[[Mapping[str, Any]], TokenLayout] | None = None, modules: str | None = None
) -> Family:
    """The family of a model, as its row or a user describes it.

    Args:
        model: The model.
        told: Forward arguments by name -> layout, in the place of what the row says.
        modules: Pattern of the full names of the self-attention modules, in the place of the row's. Without a row and
            without a pattern they are those whose calls have as many tokens as the layout.

    Raises:
        InvalidInputError: If the pattern is no regular expression, or `told` no function.
        UnsupportedError: If neither a row nor a user describes the model, or its self-attention is linear.
    """
    family = find_family(model)
    if any(cls.__name__ in LINEAR for cls in type(model).__mro__):
        raise UnsupportedError(
            f"the self-attention of {type(model).__name__} is linear: its cost grows with the tokens and not with "
            "their square, and it has no scores to leave out. Use the model as it is."
        )
    if family is None and told is None:
        inner = "module" if isinstance(getattr(model, "module", None), nn.Module) else "get_base_model()"
        if inner == "module" or hasattr(model, "get_base_model"):
            raise UnsupportedError(
                f"{type(model).__name__} wraps the model; give .{inner} of it, and before it is wrapped where the "
                "method learns parameters."
            )
        raise UnsupportedError(
            f"{type(model).__name__} is not described, so where its tokens stand is not known. Describe it: "
            "fastdiff.apply(model, config, layout=lambda inputs: TokenLayout.self_attention(Grid(frames, height, "
            "width))), where inputs are the arguments of its forward by name, and text_before= or text_after= counts "
            "text in the same sequence. Of a pipeline give the pipeline itself or its denoiser (transformer, unet); "
            "`fastdiff models` lists what is described."
        )
    if told is not None:
        if not callable(told):
            raise InvalidInputError(f"layout is {told!r}; give a function of the forward's arguments by name.")
        layout = functools.partial(_checked, told)
        known = family or Family(type(model).__name__, None, layout, latents=None)
        family = dataclasses.replace(known, layout=layout)
    if modules is not None:
        try:
            family = dataclasses.replace(family, modules=re.compile(modules))
        except (re.error, TypeError) as error:
            raise InvalidInputError(
                f"modules is {modules!r}, which is no regular expression ({error}); write one that matches the full "
                "names of the self-attention modules."
            ) from None
    return family


def _checked(told: Callable[[Mapping[str, Any]], TokenLayout], config: Any, inputs: Mapping[str, Any]) -> TokenLayout:
    try:
        layout = told(inputs)
    except KeyError as error:
        raise InvalidInputError(
            f"layout= asks for the argument {error}; the forward was given {', '.join(inputs)}."
        ) from error
    if not isinstance(layout, TokenLayout) or layout.query != layout.key:
        raise InvalidInputError(
            f"layout= gave {layout!r}; it must give the TokenLayout of self-attention, for example "
            "TokenLayout.self_attention(Grid(frames, height, width), text_before=512)."
        )
    return layout
