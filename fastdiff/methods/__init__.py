"""The methods: which scores to compute. Each is a frozen config that builds its plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fastdiff_kernels import AgentPlan, BlockPlan, InvalidInputError, TokenLayout

from .agent import AgentConfig
from .base import MethodConfig
from .clear import ClearConfig
from .neighborhood import NeighborhoodConfig
from .neighborhood_presets import neighborhood_presets
from .paro import ParoConfig
from .radial import RadialConfig
from .rules import Rule, RulesConfig

METHODS: dict[str, type[MethodConfig]] = {
    kind.method: kind for kind in (RadialConfig, NeighborhoodConfig, ClearConfig, ParoConfig, AgentConfig, RulesConfig)
}

__all__ = [
    "METHODS",
    "AgentConfig",
    "ClearConfig",
    "MethodConfig",
    "NeighborhoodConfig",
    "ParoConfig",
    "RadialConfig",
    "Rule",
    "RulesConfig",
    "build_plan",
    "load_config",
    "neighborhood_presets",
]


def load_config(source: MethodConfig | Mapping | str | Path, method: str | None = None) -> MethodConfig:
    """Reads a config from what users have at hand.

    Args:
        source: A config, a dict, JSON text, or the path of a JSON file.
        method: The method of a source that does not name its own.

    Raises:
        InvalidInputError: If it cannot be read, names an unknown method or setting, or is out of range.
    """
    if isinstance(source, MethodConfig):
        return source
    if not isinstance(source, Mapping | str | Path):
        raise InvalidInputError(f"config is {source!r}; give a config such as RadialConfig(), a dict, JSON or a file.")
    data = dict(source) if isinstance(source, Mapping) else _read_json(source)
    name = data.get("method", method)
    if name is None:
        raise InvalidInputError(f'the config names no method; add "method", one of {", ".join(METHODS)}.')
    if not isinstance(name, str) or name not in METHODS:
        raise InvalidInputError(f"method is {name!r}; allowed are {', '.join(METHODS)}.")
    return METHODS[name].from_dict(data)


def _read_json(source: str | Path) -> dict:
    text, where = str(source), "the config"
    if not text.strip():
        raise InvalidInputError("the config is empty; give JSON text or a JSON file.")
    if not text.lstrip().startswith(("{", "[")):
        where = f"the config file {source}"
        try:
            # Some editors put a byte order mark before the text.
            text = Path(source).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"{where} cannot be read ({error}); give JSON text or a JSON file.") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{where} is no valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise InvalidInputError(f'{where} must be a JSON object, such as {{"method": "radial"}}.')
    return data


def build_plan(
    config: MethodConfig, layout: TokenLayout, device: str = "cpu", layer: int = 0
) -> BlockPlan | AgentPlan | None:
    """A method's plan for a layout in one layer, as it is outside a denoising run; None where it is dense.

    Raises:
        InvalidInputError: If rules count layers from the end or by share, or the method does not fit the layout.
    """
    part = config.at(layer)
    if part is None:
        return None
    unknown = dict.fromkeys(("step", "steps", "heads", "head_dim"))
    return part.planner().plan(layout, layer=layer, device=torch.device(device), **unknown)
