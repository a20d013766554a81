"""Rules: a method of its own for each layer and step. A list of them, of which the first that fits decides."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from fastdiff_kernels import BlockPlan, Grid, InvalidInputError, TokenLayout, UnsupportedError

from ..choice import Choice, check_range, is_named, read_choice
from .base import MethodConfig

if TYPE_CHECKING:
    from .rules_planner import RulesPlanner

DENSE = "dense"

_RANGE = re.compile(r"(-?\d{1,4})(?:-(-?\d{1,4}))?")


@dataclass(frozen=True)
class Rule:
    """Which method some layers use in some steps.

    Args:
        config: The method's config, or `"dense"`.
        layers: Self-attention layers, in the order in which the model holds them: a whole number n for the first n, a
            share of all between 0 and 1 for the first share, two shares (from, to) for what lies between them, a list
            of indices, or text with indices and ranges, both ends included: `"0-1, 5, -2--1"`. Negative ones count
            from the end. None for all.
        steps: Denoising steps, likewise; shares are rounded to whole steps, and indices that a run lacks name nothing.
            A config with steps of its own (agent) is dense in the others.

    Raises:
        InvalidInputError: If one of them is out of range or of another kind, or names nothing.
    """

    config: MethodConfig | str
    layers: Choice | tuple[float, float] | None = None
    steps: Choice | tuple[float, float] | None = None

    def __post_init__(self):
        object.__setattr__(self, "config", _config(self.config))
        for name in ("layers", "steps"):
            object.__setattr__(self, name, _part(name, getattr(self, name)))

    @property
    def is_dense(self) -> bool:
        return self.config == DENSE

    def names_layer(self, layer: int, layers: int | None) -> bool:
        """Whether the rule is for a layer of a model with `layers` layers.

        Raises:
            InvalidInputError: If it counts from the end or by share and the number is not known.
        """
        if layers is None and _needs_total(self.layers):
            raise InvalidInputError(
                f"a rule is for the layers {_written(self.layers)!r}, which takes a model to count; name the layers by "
                "indices from 0, or apply the rules to a model."
            )
        return _names(self.layers, layer, sys.maxsize if layers is None else layers)

    def names_step(self, step: int | None, steps: int | None) -> bool:
        """Whether the rule is for a step; outside a run every step counts, except for rules that keep it dense."""
        if self.steps is None or step is None or steps is None:
            return self.steps is None or not self.is_dense
        return _names(self.steps, step, steps)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is left out is all."""
        chosen = {name: _written(getattr(self, name)) for name in ("layers", "steps")}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        return chosen | {"config": self.config if self.is_dense else self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rule:
        """The inverse of `to_dict`.

        Raises:
            InvalidInputError: If a key is unknown or missing, or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = [key for key in data if key not in known]
        if unknown or "config" not in data:
            wrong = f"no {', '.join(map(repr, unknown))}" if unknown else "a config"
            raise InvalidInputError(f"a rule has {wrong}; it takes {', '.join(known)}, of which it must have config.")
        return cls(**data)


@dataclass(frozen=True)
class RulesConfig(MethodConfig):
    """A list of rules, each a method for some layers and steps; the first that names both decides.

    Layers and steps that no rule names are dense. `dense_steps` and `dense_layers` of `apply` stand above all rules.
    Outside a denoising run, in training, steps do not count, and rules that keep steps dense are passed over.

        layers   0-1   [dense          ]      RulesConfig([
                 2-10  [window 4 x 16  ]          Rule("dense", layers="0-1"),
                 11-   [radial | window]          Rule(NeighborhoodConfig((None, 4, 16)), layers="2-10"),
                        steps ->                  Rule(RadialConfig(), steps=0.5),
                                                  Rule(NeighborhoodConfig((None, 20, 40)))])

    How much a layer can spare differs by layer, and by step: Hassani et al., "Generalized Neighborhood Attention",
    arXiv 2504.16922, whose authors publish such a list for Cosmos-Predict2; see `fastdiff.presets()`.

    Args:
        rules: The rules, each a `Rule` or the same as a dict. Those that come first are the stronger ones.

    Raises:
        InvalidInputError: If there is no rule, or one of them is wrong; it says which.
    """

    method: ClassVar[str] = "rules"

    rules: tuple[Rule, ...]

    def __post_init__(self):
        if not isinstance(self.rules, list | tuple) or not self.rules:
            raise InvalidInputError(f"rules is {self.rules!r}; give a list of one rule or more.")
        object.__setattr__(self, "rules", tuple(_rule(place, rule) for place, rule in enumerate(self.rules)))

    @property
    def parts(self) -> tuple[MethodConfig, ...]:
        """The configs of the methods, each once, in the order of the rules."""
        return tuple(dict.fromkeys(rule.config for rule in self.rules if not rule.is_dense))

    @property
    def uses_steps(self) -> bool:
        return any(rule.steps is not None for rule in self.rules) or any(part.uses_steps for part in self.parts)

    @property
    def says_dense_steps(self) -> bool:
        return True

    def at(
        self, layer: int, layers: int | None = None, step: int | None = None, steps: int | None = None
    ) -> MethodConfig | None:
        for rule in self.rules:
            if rule.names_layer(layer, layers) and rule.names_step(step, steps):
                return None if rule.is_dense else rule.config
        return None

    def of_layer(self, layer: int, layers: int | None) -> tuple[MethodConfig, ...]:
        """The configs that a layer uses in one step or another."""
        found = {}
        for rule in self.rules:
            if rule.names_layer(layer, layers):
                found[rule.config] = None
                if rule.steps is None:
                    break
        return tuple(config for config in found if config != DENSE)

    def check_layers(self, layers: int) -> None:
        """Compares the layers named here with how many a model has.

        Raises:
            InvalidInputError: If the model lacks one.
        """
        for place, rule in enumerate(self.rules):
            if rule.layers is not None and not _is_share(rule.layers):
                check_range(f"layers of rule {place}", rule.layers, layers, f"this model has {layers} layers")

    def in_one_step(self) -> tuple[MethodConfig, ...]:
        sparse = (rule for rule in self.rules if not rule.is_dense)
        alone = (replace(rule, config=part, steps=None) for rule in sparse for part in rule.config.in_one_step())
        return tuple(dict.fromkeys(RulesConfig((rule,)) for rule in alone))

    def build_plan(self, layout: TokenLayout) -> BlockPlan | None:
        """The plan of the first layer outside a denoising run, on the CPU; None if it is dense."""
        first = self.at(0)
        return None if first is None else first.build_plan(layout)

    def planner(self) -> RulesPlanner:
        from .rules_planner import RulesPlanner

        return RulesPlanner(self)

    @classmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> RulesConfig:
        """Rules have no settings of their own to solve for.

        Raises:
            UnsupportedError: Always.
        """
        raise UnsupportedError(
            f"rules cannot be solved for the density {density:g}: each method in them has settings of its own. Give "
            "them as a config, each solved by its for_density."
        )

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "version": self.version, "rules": [rule.to_dict() for rule in self.rules]}


def _rule(place: int, given: Any) -> Rule:
    if isinstance(given, Rule):
        return given
    try:
        if not isinstance(given, Mapping):
            raise InvalidInputError(f"it is {given!r}; give a Rule, or a dict with config, layers and steps.")
        return Rule.from_dict(given)
    except InvalidInputError as error:
        raise InvalidInputError(f"rule {place} (counted from 0): {error}") from error


def _config(given: Any) -> MethodConfig | str:
    from . import load_config

    if given == DENSE:
        return DENSE
    config = load_config(given) if isinstance(given, Mapping) else given
    if not isinstance(config, MethodConfig) or isinstance(config, RulesConfig):
        raise InvalidInputError(
            f"the config of a rule is {given!r}; give the config of one method, or {DENSE!r}. Rules stand in one list "
            "and not in each other."
        )
    return config


def _part(name: str, given: Any) -> Choice | tuple[float, float] | None:
    if given is None:
        return None
    if isinstance(given, str):
        given = _indices(name, given)
    if isinstance(given, list | tuple) and any(isinstance(entry, float) for entry in given):
        return _shares(name, given)
    chosen = read_choice(name, given)
    if not chosen:
        raise InvalidInputError(f"{name} is {given!r}, which names none; leave the rule out, or name some.")
    return chosen


def _indices(name: str, text: str) -> list[int]:
    found: list[int] = []
    for word in text.split(","):
        match = _RANGE.fullmatch(word.strip())
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if first > last or (first < 0) != (last < 0):
            raise InvalidInputError(
                f"{name} is {text!r} and {word.strip()!r} in it is no index and no range; write 5 or 2-10 with commas "
                "between, and -1 or -3--1 for those counted from the end. Both ends of a range count from the same."
            )
        found += range(first, last + 1)
    return found


def _shares(name: str, given: list | tuple) -> tuple[float, float]:
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in given)
    if len(given) != 2 or not numbers or not 0 <= given[0] < given[1] <= 1:
        raise InvalidInputError(
            f"{name} is {given!r}; two shares are from and to, such as [0.25, 1.0], within 0 and 1."
        )
    return float(given[0]), float(given[1])


def _is_share(part: Choice | tuple[float, float]) -> bool:
    return isinstance(part[0] if isinstance(part, tuple) else part, float)


def _needs_total(part: Choice | tuple[float, float] | None) -> bool:
    return part is not None and (_is_share(part) or (isinstance(part, tuple) and part[-1] < 0))


def _names(part: Choice | tuple[float, float] | None, index: int, total: int) -> bool:
    if part is None:
        return True
    if isinstance(part, tuple) and _is_share(part):
        return round(part[0] * total) <= index < round(part[1] * total)
    return is_named(part, index, total)


def _written(part: Choice | tuple[float, float] | None) -> Any:
    """As JSON has it: indices as text, in which neighbours are a range."""
    if not isinstance(part, tuple):
        return part
    if _is_share(part):
        return list(part)
    runs: list[list[int]] = []
    for index in part:
        if runs and index == runs[-1][-1] + 1 and index:
            runs[-1][1:] = [index]
        else:
            runs.append([index])
    return ", ".join("-".join(map(str, run)) for run in runs)
