"""DenseSchedule: which denoising steps and which layers stay dense."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastdiff_kernels import InvalidInputError

from .choice import Choice, check_range, count, is_named, read_choice


@dataclass(frozen=True)
class DenseSchedule:
    """Denoising steps and layers that keep dense attention; a layer is sparse where nothing here names it.

    More dense steps and layers are slower and safer. The first steps settle the composition, so papers keep about
    a quarter of them dense (Radial Attention, arXiv 2506.19852: 12 of 50, and the first layer).

    Args:
        first_steps: A whole number n for the first n steps, a share of all steps between 0 and 1 (`0.25`: the first
            quarter, rounded to whole steps), or the indices of single steps; negative ones count from the end
            (`[0, 1, -1]`: the first two and the last). With two experts (Wan 2.2) steps are counted through. Steps are
            the timesteps that the scheduler lists: image to image at a strength below 1 begins amid them, and
            second-order schedulers (Heun) list more than were asked for.
        layers: The same for self-attention layers, in the order in which the model holds them.
        last_steps: A whole number n for the last n steps, or a share of all steps.
        every: Every n-th step, counted from the first (`5`: steps 0, 5, 10 and so on); 0 for none.

    Raises:
        InvalidInputError: If a number is out of range or of another kind.
    """

    first_steps: Choice = 0
    layers: Choice = 0
    last_steps: int | float = 0
    every: int = 0

    def __post_init__(self):
        object.__setattr__(self, "first_steps", read_choice("dense_steps", self.first_steps))
        object.__setattr__(self, "layers", read_choice("dense_layers", self.layers))
        object.__setattr__(self, "last_steps", read_choice("last_steps", self.last_steps))
        object.__setattr__(self, "every", read_choice("every", self.every))
        if isinstance(self.last_steps, tuple):
            raise InvalidInputError(f"last_steps is {list(self.last_steps)}; give a number of steps or a share of all.")
        if not isinstance(self.every, int) or self.every == 1:
            raise InvalidInputError(f"every is {self.every}; give a whole number of 2 or more, or 0 for none.")

    @property
    def uses_steps(self) -> bool:
        """Whether any step is kept dense."""
        return bool(self.first_steps or self.last_steps or self.every)

    def is_dense(self, step: int | None, steps: int | None, layer: int, layers: int) -> bool:
        """Whether a layer stays dense at a step; outside a denoising run (`step` is None) only layers count."""
        return self.is_dense_layer(layer, layers) or (step is not None and self.is_dense_step(step, steps))

    def is_dense_layer(self, layer: int, layers: int) -> bool:
        return is_named(self.layers, layer, layers)

    def is_dense_step(self, step: int, steps: int) -> bool:
        last = step >= steps - count(self.last_steps, steps)
        return last or is_named(self.first_steps, step, steps) or (self.every > 0 and step % self.every == 0)

    def check_layers(self, layers: int) -> None:
        """Compares the layers named here with how many a model has.

        Raises:
            InvalidInputError: If the model lacks one.
        """
        check_range("dense_layers", self.layers, layers, f"this model has {layers} layers")

    def check_steps(self, steps: int) -> None:
        """Compares the steps named here with how many a run has, for callers who know that before.

        Raises:
            InvalidInputError: If the run lacks one.
        """
        check_range("dense_steps", self.first_steps, steps, f"this run has {steps} steps")
        check_range("last_steps", self.last_steps, steps, f"this run has {steps} steps")

    def __str__(self) -> str:
        return str(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: `{"dense_steps": 12, "dense_layers": [0, -1]}`, the rest only where it is set."""
        kept = {key: getattr(self, name) for key, name in _KEYS.items()}
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in kept.items()}
        return {key: value for key, value in plain.items() if value or key in ("dense_steps", "dense_layers")}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DenseSchedule:
        """The inverse of `to_dict`; what is missing is 0.

        Raises:
            InvalidInputError: If it is no dict, or has another key.
        """
        if not isinstance(data, Mapping):
            raise InvalidInputError(f"a schedule is {data!r}; give a dict of {', '.join(_KEYS)}.")
        unknown = sorted(str(key) for key in set(data) - set(_KEYS))
        if unknown:
            raise InvalidInputError(f"a schedule has no {', '.join(unknown)}; it takes {', '.join(_KEYS)}.")
        return cls(**{_KEYS[key]: value for key, value in data.items()})


_KEYS = {
    "dense_steps": "first_steps",
    "dense_layers": "layers",
    "dense_last_steps": "last_steps",
    "dense_every": "every",
}
