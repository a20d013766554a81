"""Case: how the tests of families run one model; `family_cases_video.py` and `family_cases_image.py` hold the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from fake_planner import FakePlanner
from torch import nn

import fastdiff
from fastdiff_patches import families, locate, seam
from fastdiff_patches.processor import Layer


@dataclass(frozen=True)
class Case:
    """A model, its arguments for (frames, height, width) tokens, and what moves the token of a place in them.

    Attributes:
        build: () -> the model, with random weights, a few hundred kilobytes. Called only where diffusers has its class.
        arguments: (frames, height, width) -> the arguments of its forward by name, batch 1.
        move: (arguments, frame, row, column) -> changes one place of the latents in them, in place.
        grids: The sizes to try, (frames, height, width) in tokens.
        needs: Further names that diffusers must have, where the class is older than what is special.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[..., dict[str, Any]]
    move: Callable[..., None]
    grids: tuple[tuple[int, int, int], ...]
    needs: tuple[str, ...] = ()


def present(cases: dict[str, Case]) -> dict[str, Case]:
    """Those whose model the installed diffusers has; a case is named "class" or "class, what is special"."""
    wanted = {name: (name.split(",")[0], *case.needs) for name, case in cases.items()}
    return {name: case for name, case in cases.items() if all(hasattr(diffusers, each) for each in wanted[name])}


def without_neighbours(model: nn.Module) -> nn.Module:
    """Convolutions see their own pixel only, nothing is normalised over pixels, and refiners mix no tokens."""
    for module_name, module in list(model.named_modules()):
        if "refiner" in module_name and hasattr(module, "to_v"):
            for parameter in module.to_v.parameters():
                parameter.data.zero_()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            own = torch.zeros(3, 3)
            own[1, 1] = 1
            module.weight.data *= own
        for name, part in list(module.named_children()):
            if isinstance(part, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return model


def run(model, inputs) -> torch.Tensor:
    """What the model returns, samples of a list stacked."""
    with torch.no_grad():
        out = model(**inputs)
    out = out if isinstance(out, torch.Tensor) else out[0]
    return torch.stack(out) if isinstance(out, list) else out


class Recorder(FakePlanner):
    """Keeps the values of each call, `[batch x tokens, channels]`, and lets no token see another."""

    def attend(self, query, key, value, plan, extras):
        self.extras.append(value.flatten(2).flatten(0, 1))
        return torch.zeros_like(query)


def values(model, inputs) -> dict[str, torch.Tensor]:
    """The values that each self-attention call of the model's own processors gets, by the name of the module."""
    family = families.family_of(model)
    modules = locate.self_attention(model, family)
    originals = {module: module.processor for module in modules.values()}
    layout = family.layout(model.config, inputs)
    found = {name: [] for name in modules}
    try:
        for name, module in modules.items():
            layer = Layer(0, name, 1, 1, Recorder(extras=found[name]), "auto", family)
            layer.prepare(object(), parts=(family.at(model.config, layout, name).key_tokens,))
            module.processor = seam.adopt(family.processor(module.processor), layer)
        run(model, inputs)
    finally:
        for module, processor in originals.items():
            module.processor = processor
    return {name: calls[0] for name, calls in found.items()}


def spans(model, inputs):
    """(kind, tokens) of each span of the model's layout."""
    layout = families.family_of(model).layout(model.config, inputs)
    return [(span.kind, span.tokens) for span in layout.query]


def sparse_equals_dense(model, inputs):
    """Under a window of all; density 1."""
    dense = run(model, inputs)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, None, None), block_size=32))
    torch.testing.assert_close(run(model, inputs), dense, atol=5e-6, rtol=1e-4)
    fastdiff.remove(model)
    assert torch.equal(run(model, inputs), dense)


def has(name):
    """Skips a test where diffusers lacks a name."""
    return pytest.mark.skipif(not hasattr(diffusers, name), reason=f"diffusers has no {name}")
