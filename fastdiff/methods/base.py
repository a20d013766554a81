"""What every method's config can do: be checked, travel as JSON, and build its plan for a layout."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from fastdiff_kernels import AgentPlan, BlockPlan, Grid, InvalidInputError, TokenLayout

if TYPE_CHECKING:
    from .planner import Planner


@dataclass(frozen=True)
class MethodConfig(ABC):
    """Base of the methods' configs: frozen, hashable, JSON in and out.

    Attributes:
        method: The method's name, the `"method"` key of the JSON form.
        version: Version of the JSON form; any other is refused.
    """

    method: ClassVar[str]
    version: ClassVar[int] = 1

    @abstractmethod
    def build_plan(self, layout: TokenLayout) -> BlockPlan | AgentPlan:
        """The plan for one layout, on the CPU.

        Raises:
            UnsupportedError: If the method has no meaning on this layout.
        """

    def planner(self) -> Planner:
        """What drives the method on a model; a method with more to do than to build plans has a planner of its own."""
        from .planner import Planner

        return Planner(self)

    @property
    def uses_steps(self) -> bool:
        """Whether a plan depends on the denoising step; then a pipeline must be there to tell it."""
        return False

    @property
    def says_dense_steps(self) -> bool:
        """Whether the settings themselves say in which steps the method acts, so that a default should add none."""
        return False

    def at(
        self, layer: int, layers: int | None = None, step: int | None = None, steps: int | None = None
    ) -> MethodConfig | None:
        """The config that decides in a layer (of `layers`) at a step (of `steps`), None for dense: this one, but for
        rules. What is not known is None."""
        return self

    def in_one_step(self) -> tuple[MethodConfig, ...]:
        """Configs that show in runs of one step all that this one does in a longer run, for warm-ups."""
        return (self,)

    @classmethod
    @abstractmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> MethodConfig:
        """The least sparse config whose plan stays within a density; whole blocks may leave it well below.

        Args:
            density: Computed share of the scores, text included, above 0 and up to 1.
            grid: The token grid of the run.
            text_tokens: Text tokens in the same sequence.
            **settings: Further settings of the method, which are kept.

        Raises:
            InvalidInputError: If the density is out of range, or below the floor of this grid, which is named.
        """

    def to_dict(self) -> dict[str, Any]:
        return {"method": self.method, "version": self.version, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def required(cls) -> list[str]:
        """The fields that have no default."""
        return [field.name for field in fields(cls) if field.default is field.default_factory is MISSING]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MethodConfig:
        """The inverse of `to_dict`; keys left out take their defaults.

        Raises:
            InvalidInputError: If a key is unknown or missing, a value out of range, or the version another.
        """
        values = dict(data)
        method, version = values.pop("method", cls.method), values.pop("version", cls.version)
        if method != cls.method:
            raise InvalidInputError(f"this config is for the method {method!r}, not for {cls.method!r}.")
        if version != cls.version:
            raise InvalidInputError(
                f"this {cls.method} config has the version {version!r}; this fastdiff reads version {cls.version}."
            )
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                raise InvalidInputError(f"{cls.method} has no setting {key!r}; it has {', '.join(known)}.")
        missing = [name for name in cls.required() if name not in values]
        if missing:
            raise InvalidInputError(f"{cls.method} has no default for {', '.join(missing)}; say what it should be.")
        return cls(**values)


# Tokens in a block, for methods whose plans are blocks of one size.
BLOCK_SIZES = (32, 64, 128)


def block_on(grid: Grid, block_size: int) -> int:
    """A block size that suits a grid: below 8,192 tokens at most 64, below 4,096 at most 32."""
    return min(block_size, 32 if grid.tokens < 4096 else 64 if grid.tokens < 8192 else 128)


def is_whole(value: Any, low: int) -> bool:
    """Whether `value` is a whole number from `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def is_positive(value: Any) -> bool:
    """Whether `value` is a finite number above 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < float("inf")


def check_whole(name: str, value: Any, low: int) -> None:
    """Raises InvalidInputError unless `value` is a whole number from `low`."""
    if not is_whole(value, low):
        raise InvalidInputError(f"{name} is {value!r}; give a whole number from {low}.")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """Raises InvalidInputError unless `value` is a number from `low` to `high`."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise InvalidInputError(f"{name} is {value!r}; it must be a number from {low:g} to {high:g}.")


def check_share(name: str, value: Any) -> None:
    """Raises InvalidInputError unless `value` is a number above 0 and up to 1."""
    if not is_positive(value) or value > 1:
        raise InvalidInputError(f"{name} is {value!r}; it must be a number above 0 and up to 1.")


def check_unknowns(settings: dict[str, Any], *names: str) -> None:
    """Raises InvalidInputError if a setting is given that a density is solved for."""
    for name in names:
        if name in settings:
            raise InvalidInputError(f"{name} is what a density is solved for; leave it out, it was {settings[name]!r}.")


def check_density(value: Any) -> None:
    """Raises InvalidInputError unless `value` is a density that can be asked for."""
    check_share("density", value)


def below_floor(method: str, density: float, where: object, floor: float, kept: str, instead: str) -> InvalidInputError:
    """What to raise where a method computes more than a density allows, whatever its settings.

    Args:
        where: The grid, and the text if it counts.
        floor: The lowest density that the method has there.
        kept: What that is computed with.
        instead: What lowers it.
    """
    ask = f"ask for that or more, or {instead}" if floor <= 1 else f"dense attention computes less; {instead}"
    return InvalidInputError(
        f"density {density:g} is below the floor of {method} on a grid of {where}, which is {floor:.4f} {kept}; {ask}."
    )


def smaller_blocks(block: int, otherwise: str) -> str:
    """The advice to take smaller blocks, or another one where there are none."""
    return "a smaller block_size" if block > min(BLOCK_SIZES) else otherwise


def largest_within(steps: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `steps` that fits, where 0 does and smaller ones fit if larger ones do."""
    low, high = 0, steps
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def check_choice(name: str, value: Any, allowed: tuple) -> None:
    """Raises InvalidInputError unless `value` is one of `allowed`, type included."""
    if not any(value == choice and type(value) is type(choice) for choice in allowed):
        raise InvalidInputError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}.")
