"""From a pipeline or a model to the transformers in it, and to their self-attention modules in order."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdiff_kernels import InvalidInputError, UnsupportedError

from .families import Family

COMPONENTS = ("transformer", "transformer_2", "unet")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside what torch.compile returned, or the module itself."""
    return getattr(model, "_orig_mod", model)


def transformers(pipe_or_model: Any) -> dict[str, nn.Module]:
    """The models to patch, by component name; a bare model is named "model".

    Raises:
        InvalidInputError: If this is neither a model nor a pipeline with one.
    """
    if isinstance(pipe_or_model, nn.Module):
        return {"model": unwrap(pipe_or_model)}
    parts = {name: getattr(pipe_or_model, name, None) for name in COMPONENTS}
    models = {name: unwrap(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    if not models:
        raise InvalidInputError(
            f"{type(pipe_or_model).__name__} holds no model as {' or '.join(COMPONENTS)}; give a diffusers pipeline "
            "that does, or the model itself."
        )
    return models


def self_attention(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The family's self-attention modules by name, in the order in which the model holds them.

    Raises:
        UnsupportedError: If the model has none.
    """
    # Blocks that were compiled one by one carry the wrapper's name in their own.
    named = ((name.replace("_orig_mod.", ""), module) for name, module in model.named_modules())
    attention = {name: module for name, module in named if name and hasattr(module, "processor")}
    # Some UNets look at the text alone where others look at themselves.
    found = {
        name: module
        for name, module in attention.items()
        if (family.by_length or family.modules.fullmatch(name)) and not getattr(module, "is_cross_attention", False)
    }
    if not found:
        like = "" if family.by_length else f" named like {family.modules.pattern!r}"
        raise UnsupportedError(
            f"this {type(model).__name__} has no module{like} that has an attention processor and is no "
            f"cross-attention; family {family.name!r} does not describe it. Say with modules= which are its "
            f"self-attention modules; with a processor it has {', '.join([*attention][:8]) or 'none'}"
            f"{' and others' if len(attention) > 8 else ''}."
        )
    return found


def heads_of(attention: nn.Module) -> tuple[int, int]:
    """(heads, head_dim) of an attention module.

    Raises:
        UnsupportedError: If it does not tell them as diffusers' attention modules do.
    """
    heads = getattr(attention, "heads", None) or getattr(attention, "num_heads", None)
    projection = getattr(attention, "to_q", None) or getattr(attention, "to_query", None)
    width = getattr(attention, "inner_dim", None) or getattr(projection, "out_features", None)
    if heads is None or width is None:
        raise UnsupportedError(
            f"{type(attention).__name__} does not tell its heads and their size: attributes heads and inner_dim, as "
            "diffusers' attention modules have them, are missing. Leave it out with modules=."
        )
    return heads, width // heads
