"""Sparse self-attention for diffusers pipelines: `apply`, `remove`, `summary`.

Public names load on first use, so that `import fastdiff` needs neither diffusers nor triton.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff_kernels import FastDiffError, Grid, TokenLayout

    from .api import apply, remove, summary
    from .attn_processors import (
        AgentAttnProcessor,
        ClearAttnProcessor,
        NeighborhoodAttnProcessor,
        ParoAttnProcessor,
        RadialAttnProcessor,
        RulesAttnProcessor,
        processors,
    )
    from .calibration import calibrate
    from .clear_weights import load_clear_weights
    from .highres import HighResolution, high_resolution
    from .methods import (
        AgentConfig,
        ClearConfig,
        NeighborhoodConfig,
        ParoConfig,
        RadialConfig,
        Rule,
        RulesConfig,
        load_config,
    )
    from .published import Preset, presets
    from .schedule import DenseSchedule

__version__ = "0.1.0"

__all__ = [
    "AgentAttnProcessor",
    "AgentConfig",
    "ClearAttnProcessor",
    "ClearConfig",
    "DenseSchedule",
    "FastDiffError",
    "Grid",
    "HighResolution",
    "NeighborhoodAttnProcessor",
    "NeighborhoodConfig",
    "ParoAttnProcessor",
    "ParoConfig",
    "Preset",
    "RadialAttnProcessor",
    "RadialConfig",
    "Rule",
    "RulesAttnProcessor",
    "RulesConfig",
    "TokenLayout",
    "__version__",
    "apply",
    "calibrate",
    "high_resolution",
    "load_clear_weights",
    "load_config",
    "presets",
    "processors",
    "remove",
    "summary",
]

_NAMES = {
    "fastdiff.api": ("apply", "remove", "summary"),
    "fastdiff.attn_processors": (
        "AgentAttnProcessor",
        "ClearAttnProcessor",
        "NeighborhoodAttnProcessor",
        "ParoAttnProcessor",
        "RadialAttnProcessor",
        "RulesAttnProcessor",
        "processors",
    ),
    "fastdiff.calibration": ("calibrate",),
    "fastdiff.clear_weights": ("load_clear_weights",),
    "fastdiff.highres": ("HighResolution", "high_resolution"),
    "fastdiff.methods": (
        "AgentConfig",
        "ClearConfig",
        "NeighborhoodConfig",
        "ParoConfig",
        "RadialConfig",
        "Rule",
        "RulesConfig",
        "load_config",
    ),
    "fastdiff.published": ("Preset", "presets"),
    "fastdiff.schedule": ("DenseSchedule",),
    "fastdiff_kernels": ("FastDiffError", "Grid", "TokenLayout"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
