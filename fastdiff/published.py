"""Presets: published settings by method, family and model, each with its source.

(Not named `presets`: importing a module of that name would hide the public function `fastdiff.presets`.)
"""

from __future__ import annotations

import difflib
import logging
import re
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_kernels import InvalidInputError

from .methods import METHODS, MethodConfig, RulesConfig

if TYPE_CHECKING:
    from torch import nn

    from .schedule import DenseSchedule

_logger = logging.getLogger("fastdiff")


@dataclass(frozen=True)
class Preset:
    """Settings that somebody has published for a model.

    Attributes:
        name: What `fastdiff.apply` and `--preset` take.
        method: The method whose name alone takes the first of its presets that fits.
        family: The family that it is for, as `summary` names it.
        model: The model that it was published for.
        config: The method's settings.
        schedule: Steps and layers that stay dense; numbers of steps are kept as shares of all.
        grid: The tokens (frames x height x width) that it was published for. On others radial scales by itself, windows
            by `base_grid`; disks and the number of agents stay.
        steps: Denoising steps of the published runs, None where they are not told.
        source: Paper and code that say so.
        weights: The weights that it was published with, None for the model's own.
        facts: Entries that the model's config must have for the method's name alone to take it.
        experts: Transformers that the pipeline must have, likewise; None for any number.
    """

    name: str
    method: str
    family: str
    model: str
    config: MethodConfig
    schedule: DenseSchedule
    grid: str
    steps: int | None
    source: str
    weights: str | None = None
    facts: tuple[tuple[str, Any], ...] = ()
    experts: int | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.told}"

    @property
    def told(self) -> str:
        """All but the name, for people."""
        dense = [f"{key} {value}" for key, value in self.schedule.to_dict().items() if value]
        weights = [f"published with {self.weights}"] if self.weights else []
        where = f"{self.method} for {self.family} ({self.model}, {self.grid} tokens)"
        return "; ".join([where, _settings(self.config), *dense, *weights, self.source])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; `config` and `schedule` are what `apply` and `DenseSchedule.from_dict` take."""
        told = ("name", "method", "family", "model", "grid", "steps", "source", "weights")
        return {key: getattr(self, key) for key in told} | {
            "config": self.config.to_dict(),
            "schedule": self.schedule.to_dict(),
        }

    def fits(self, models: list[nn.Module]) -> bool:
        """Whether these are the transformers that it was published for, as far as their configs tell."""
        configs = [getattr(model, "config", None) for model in models]
        known = all(getattr(config, key, None) == value for config in configs for key, value in self.facts)
        return known and self.experts in (None, len(models))


class Presets(tuple[Preset, ...]):
    """All presets; printed, a line for each. Of several that fit a pipeline, a method's name takes the first."""

    def __repr__(self) -> str:
        return "\n".join(map(str, self))


@cache
def presets() -> Presets:
    """The published settings that `fastdiff.apply(pipe, "radial")` or another method's name chooses from.

    `fastdiff.apply(pipe, name)` takes one of them by its own name, also where another is the first that fits.
    """
    from .published_rows import every_preset

    return Presets(every_preset())


def is_name(config: Any) -> bool:
    """Whether what a user gave as a config is a method's name, or a word that is no JSON and no path of a file."""
    if not isinstance(config, str) or config in METHODS:
        return isinstance(config, str)
    return re.fullmatch(r"[\w.-]+", config) is not None and not config.endswith(".json") and not Path(config).is_file()


def named(name: str) -> Preset:
    """The preset of a name.

    Raises:
        InvalidInputError: If there is none.
    """
    found = next((preset for preset in presets() if preset.name == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [preset.name for preset in presets()], cutoff=0)
        raise InvalidInputError(
            f"there is no preset {name!r}; there are {len(presets())}, such as {', '.join(near)}. fastdiff presets, or "
            "fastdiff.presets(), lists them."
        )
    return found


def choose(pipe_or_model: Any, name: str) -> Preset:
    """The preset of a name, or the first of a method's that fits a pipeline, and logs which.

    Args:
        pipe_or_model: A pipeline, or a model, whose family is described.
        name: A preset's or a method's name.

    Raises:
        InvalidInputError: If there is no such name, the preset is for another family, or the method has none for this.
        UnsupportedError: If the model's family is not described.
    """
    from fastdiff_patches import locate
    from fastdiff_patches.families import family_of

    models = list(locate.transformers(pipe_or_model).values())
    family = family_of(models[0]).name
    known = [preset for preset in presets() if preset.family == family]
    if name in METHODS:
        fitting = [preset for preset in known if preset.method == name and preset.fits(models)]
    else:
        fitting = [preset for preset in known if preset.name == name]
    if not fitting:
        raise InvalidInputError(_no_preset(name, family, known))
    preset = fitting[0]
    level = logging.INFO if preset.weights is None else logging.WARNING
    _logger.log(level, "%ssettings published as %s", "" if name == preset.name else f"{name}: ", preset)
    return preset


def _no_preset(name: str, family: str, known: list[Preset]) -> str:
    there = f"for family {family!r} there are {', '.join(preset.name for preset in known) or 'none'}"
    families = dict.fromkeys(preset.family for preset in presets() if name in (preset.method, preset.name))
    if families:
        return f"the published settings of {name!r} are for {', '.join(families)}; {there}. Give one, or a config."
    if name in METHODS:
        kind = METHODS[name].__name__
        return f"nobody has published settings of {name!r} for a model; {there}. Give one, or a {kind} of your own."
    methods = ", ".join(dict.fromkeys(preset.method for preset in presets()))
    return (
        f"config is {name!r}, which is no method with published settings ({methods}) and no preset; {there}. Give one "
        "of these names, a config, JSON, or a file."
    )


def _settings(config: MethodConfig) -> str:
    if isinstance(config, RulesConfig):
        return f"{len(config.rules)} rules for layers"
    first, *others = fields(config)
    told = [first, *(field for field in others if getattr(config, field.name) != field.default)]
    return ", ".join(f"{field.name} {getattr(config, field.name)}" for field in told)
