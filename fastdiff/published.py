"""Presets: published settings by method, family and model, each with its source.

(Not named `presets`: importing a module of that name would hide the public function `fastdiff.presets`.)
"""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

from fastdiff_kernels import InvalidInputError

from .methods import (
    METHODS,
    AgentConfig,
    ClearConfig,
    MethodConfig,
    NeighborhoodConfig,
    RadialConfig,
    Rule,
    RulesConfig,
)
from .methods.neighborhood_presets import NeighborhoodPreset, neighborhood_presets
from .schedule import DenseSchedule

if TYPE_CHECKING:
    from torch import nn

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
    return Presets((*_radial(), *_cosmos_schedules(), *_neighborhood(), *_clear(), *_agent()))


def is_name(config: Any) -> bool:
    """Whether what a user gave as a config is a single word, which no JSON and no path of a JSON file is."""
    return isinstance(config, str) and not set(config) & set('{}[]":/\\ ') and not config.endswith(".json")


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
    _logger.log(level, "%s: settings published as %s", name, preset)
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


def _radial() -> list[Preset]:
    code = "mit-han-lab/radial-attention at 72788d4"
    table = f"arXiv 2506.19852, Table 1, and {code}"
    longer = f"arXiv 2506.19852, Table 2, and {code}"
    lora = "a LoRA of that length, which was not released"
    wan, hunyuan = "Wan2.1-T2V-14B", "HunyuanVideo"
    quarter = DenseSchedule(0.24, 1)

    def radial(name, family, model, config, schedule, grid, steps, source, **more):
        return Preset(f"radial-{name}", "radial", family, model, config, schedule, grid, steps, source, **more)

    after = DenseSchedule(0.04, 2)
    wan22 = RadialConfig(0.8, block_size=64)
    return [
        radial("wan-2.2", "wan", "Wan2.2-T2V-A14B", wan22, DenseSchedule(0.275, 1), "20x48x80", 40, code, experts=2),
        radial("wan-2.1", "wan", wan, RadialConfig(0.2), quarter, "18x48x80", 50, table),
        radial("wan-2.1-long", "wan", wan, RadialConfig(1.0), after, "41x45x80", 50, longer, weights=lora),
        radial(
            "hunyuan-video",
            "hunyuan-video",
            hunyuan,
            RadialConfig(0.95, sink=False),
            DenseSchedule(0.24),
            "30x48x80",
            50,
            table,
        ),
        radial(
            "hunyuan-video-long",
            "hunyuan-video",
            hunyuan,
            RadialConfig(1.0),
            after,
            "128x45x80",
            50,
            longer,
            weights=lora,
        ),
    ]


# The windows of Cosmos-Predict2 by the share that they leave out, in percent; frames are whole.
_COSMOS = {
    98: ((4, 16), (1, 1), (11, 5)),
    95: ((12, 16), (4, 1), (1, 5)),
    92: ((12, 24), (4, 8), (1, 1)),
    77: ((20, 40), (4, 8), (1, 1)),
    55: ((28, 56), (4, 8), (1, 1)),
}


def _cosmos_schedules() -> list[Preset]:
    def rule(layers: str, share: int) -> Rule:
        window, stride, dilation = _COSMOS[share]
        config = NeighborhoodConfig((None, *window), (1, *stride), (1, *dilation), base_grid="24x44x80")
        return Rule(config, layers=layers)

    layers = {
        "2B": {98: "0-1", 95: "2, 5, 10", 92: "3-4, 6-9, 27", 77: "11-22, 24-26", 55: "23"},
        "14B": {98: "0-10", 95: "11-12", 92: "13-22", 77: "23, 25, 29-30, 33, 35", 55: "24, 26, 28, 31-32, 34"},
    }
    facts = {"2B": (28, 16), "14B": (36, 40)}
    return [
        Preset(
            f"neighborhood-cosmos-predict2-{size.lower()}",
            "neighborhood",
            "cosmos",
            f"Cosmos-Predict2-{size}-Video2World",
            RulesConfig([rule(named, share) for share, named in rules.items()]),
            DenseSchedule(),
            "24x44x80",
            None,
            "nvidia-cosmos/cosmos-predict2, NATTEN parameters of the Video2World models",
            weights="checkpoints that were trained further with it",
            facts=(
                ("num_layers", facts[size][0]),
                ("num_attention_heads", facts[size][1]),
                ("extra_pos_embed_type", None),
            ),
        )
        for size, rules in layers.items()
    ]


# Family, model, and the window and stride that the method's name takes.
_PAPER = {
    "cosmos": ("cosmos", "Cosmos-1.0-Diffusion-7B", "cosmos-16x32x48-s1x8x16"),
    "hunyuanvideo": ("hunyuan-video", "HunyuanVideo", "hunyuanvideo-18x24x24-s16x8x8"),
    "flux-4k": ("flux", "FLUX.1-dev", "flux-4k-80x80-s16x16"),
}


def _neighborhood() -> list[Preset]:
    def preset(name: str, found: NeighborhoodPreset) -> Preset:
        family, model, _ = next(row for key, row in _PAPER.items() if name.startswith(f"{key}-"))
        return Preset(
            f"neighborhood-{name}",
            "neighborhood",
            family,
            model,
            NeighborhoodConfig(found.config.window, found.config.stride, base_grid=found.grid),
            DenseSchedule(round(found.dense_steps / found.steps, 3)),
            str(found.grid),
            found.steps,
            "arXiv 2504.16922, end-to-end results",
            weights="URAE, for 4096x4096 pixels" if family == "flux" else None,
        )

    first = [row[-1] for row in _PAPER.values()]
    every = neighborhood_presets()
    order = [*first, *(name for name in every if name not in first)]
    return [preset(name, every[name]) for name in order]


def _clear() -> list[Preset]:
    variants = ((32, None), (16, None), (8, None), (16, 4), (8, 4))
    found = []
    for radius, factor in variants:
        pooled = "" if factor is None else f"-down-{factor}"
        found.append(
            Preset(
                f"clear-flux-{radius}{pooled}",
                "clear",
                "flux",
                "FLUX.1-dev",
                ClearConfig(radius, pool_factor=factor),
                DenseSchedule(),
                "1x64x64",
                None,
                "arXiv 2412.16112 and Huage001/CLEAR at 98e9fed",
                weights=f"clear_local_{radius}{pooled.replace('-', '_')}, see load_clear_weights",
            )
        )
    return found


def _agent() -> list[Preset]:
    source = "arXiv 2312.08874 and LeapLabTHU/Agent-Attention at 207ce3e"
    model, config = "Stable Diffusion 1.5", AgentConfig.agent_sd("64x64")
    return [Preset("agent-sd", "agent", "unet", model, config, DenseSchedule(), "1x64x64", 50, source)]
