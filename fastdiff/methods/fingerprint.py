"""Fingerprint: whether a model is the one that a file was made for, from its class, config and a few weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff_kernels import InvalidInputError

# Values read of each parameter; so little that a model of 14 billion takes well under a second.
_VALUES = 4
# Loading in another dtype moves a weight by up to 2^-8 of itself.
_RELATIVE, _ABSOLUTE = 0.01, 1e-6


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What a model is recognised by.

    Adapters on top (LoRA), parameters of methods and the dtype do not count: masks of the base model are theirs too.

    Attributes:
        model: Class name.
        structure: Hash of the class, the config, and the names and shapes of all parameters.
        values: Four values of each parameter, float32 `[parameters, 4]`; NaN where the model was offloaded.
    """

    model: str
    structure: str
    values: torch.Tensor

    @classmethod
    def of(cls, model: torch.nn.Module) -> Fingerprint:
        parameters = list(_own_parameters(model))
        # Later versions of diffusers add entries that say nothing by default.
        config = {name: value for name, value in dict(model.config).items() if name[0] != "_" and value}
        shapes = [(name, list(parameter.shape)) for name, parameter in parameters]
        text = json.dumps([type(model).__name__, config, shapes], sort_keys=True, default=str)
        values = [_sample(parameter) for _, parameter in parameters]
        return cls(type(model).__name__, hashlib.sha256(text.encode()).hexdigest()[:16], torch.stack(values))

    def check(self, model: torch.nn.Module, what: str) -> None:
        """Raises InvalidInputError unless `model` is the one of this fingerprint; `what` was made for that."""
        here = Fingerprint.of(model)
        advice = "calibrate this model, or give the file that belongs to it."
        if (here.model, here.structure) != (self.model, self.structure):
            raise InvalidInputError(
                f"{what} was made for another model: a {self.model} with the hash {self.structure}; this is a "
                f"{here.model} with {here.structure}; {advice}"
            )
        close = torch.isclose(here.values, self.values, rtol=_RELATIVE, atol=_ABSOLUTE)
        differ = ~(close | here.values.isnan() | self.values.isnan()).all(1)
        if differ.any():
            names = [name for name, _ in _own_parameters(model)]
            first = names[int(differ.nonzero()[0])]
            raise InvalidInputError(
                f"{what} was made for a {self.model} with other weights: {int(differ.sum())} of its {len(names)} "
                f"parameters differ, the first is {first}; {advice}"
            )

    def to_dict(self) -> dict[str, Any]:
        return {"class": self.model, "structure": self.structure}


def _own_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if "fastdiff" not in parts and not any(part.startswith("lora_") for part in parts):
            found[".".join(part for part in parts if part not in ("base_layer", "_orig_mod"))] = parameter
    yield from sorted(found.items())


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.is_meta or parameter.numel() == 0:
        return torch.full((_VALUES,), float("nan"))
    place = torch.linspace(0, parameter.numel() - 1, _VALUES, dtype=torch.float64).long().to(parameter.device)
    return parameter.detach().reshape(-1)[place].float().cpu()
