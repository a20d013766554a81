"""DenseSchedule: which denoising steps and which layers stay dense."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastdiff_kernels import InvalidInputError

Choice = int | tuple[int, ...]


@dataclass(frozen=True)
class DenseSchedule:
    """Denoising steps and layers that keep dense attention; a layer is sparse where neither names it.

    More dense steps and layers are slower and safer. The first steps settle the composition, so papers keep about
    a quarter of them dense (Radial Attention, arXiv 2506.19852: 12 of 50, and the first layer).

    Args:
        steps: A number n for the first n steps, or the indices of single steps; negative ones count from the
            end (`[0, 1, -1]`: the first two and the last). With two experts (Wan 2.2) steps are counted through.
        layers: The same for self-attention layers, in the order in which the model holds them.

    Raises:
        InvalidInputError: If a number n is negative, or one is neither a whole number nor a list of whole numbers.
    """

    steps: Choice = 0
    layers: Choice = 0

    def __post_init__(self):
        object.__setattr__(self, "steps", _choice("dense_steps", self.steps))
        object.__setattr__(self, "layers", _choice("dense_layers", self.layers))

    @property
    def uses_steps(self) -> bool:
        """Whether any step is kept dense."""
        return bool(self.steps)

    def is_dense(self, step: int | None, steps: int | None, layer: int, layers: int) -> bool:
        """Whether a layer stays dense at a step; outside a denoising run (`step` is None) only layers count."""
        return self.is_dense_layer(layer, layers) or (step is not None and self.is_dense_step(step, steps))

    def is_dense_layer(self, layer: int, layers: int) -> bool:
        return _named(self.layers, layer, layers)

    def is_dense_step(self, step: int, steps: int) -> bool:
        return _named(self.steps, step, steps)

    def check_layers(self, layers: int) -> None:
        """Compares the layers named here with how many a model has.

        Raises:
            InvalidInputError: If the model lacks one.
        """
        _check_range("dense_layers", self.layers, layers, f"this model has {layers} layers")

    def check_steps(self, steps: int) -> None:
        """Compares the steps named here with how many a run has, for callers who know that before.

        Raises:
            InvalidInputError: If the run lacks one.
        """
        _check_range("dense_steps", self.steps, steps, f"this run has {steps} steps")

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: `{"dense_steps": 12, "dense_layers": [0, -1]}`."""
        plain = ((name, getattr(self, name)) for name in ("steps", "layers"))
        return {f"dense_{name}": value if isinstance(value, int) else list(value) for name, value in plain}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DenseSchedule:
        """The inverse of `to_dict`; what is missing is 0.

        Raises:
            InvalidInputError: If there is another key.
        """
        unknown = sorted(set(data) - {"dense_steps", "dense_layers"})
        if unknown:
            raise InvalidInputError(f"a schedule has no {', '.join(unknown)}; it takes dense_steps and dense_layers.")
        return cls(data.get("dense_steps", 0), data.get("dense_layers", 0))


def _choice(name: str, given: Any) -> Choice:
    single = _whole(given)
    if single is not None:
        if single < 0:
            raise InvalidInputError(f"{name} is {given}; give 0 or more, or a list such as [-1] for the last.")
        return single
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | dict):
        entries = list(given)
        indices = [_whole(entry) for entry in entries]
        if None not in indices:
            return tuple(sorted(set(indices), key=lambda index: (index < 0, index)))
        given = entries
    raise InvalidInputError(
        f"{name} is {given!r}; give a whole number (the first n) or a list of whole numbers (indices, negative ones "
        "from the end)."
    )


def _check_range(name: str, choice: Choice, total: int, has: str) -> None:
    if isinstance(choice, int):
        if choice > total:
            raise InvalidInputError(f"{name} is {choice}; {has}. Give less.")
        return
    missing = [index for index in choice if not -total <= index < total]
    if missing:
        raise InvalidInputError(f"{name} names {missing}; {has}, so give {-total} to {total - 1}.")


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _named(choice: Choice, index: int, total: int) -> bool:
    if isinstance(choice, int):
        return index < choice
    return index in choice or index - total in choice
