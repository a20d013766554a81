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

_HOMES = {
    "AgentAttnProcessor": "fastdiff.attn_processors",
    "AgentConfig": "fastdiff.methods",
    "ClearAttnProcessor": "fastdiff.attn_processors",
    "ClearConfig": "fastdiff.methods",
    "DenseSchedule": "fastdiff.schedule",
    "FastDiffError": "fastdiff_kernels",
    "Grid": "fastdiff_kernels",
    "HighResolution": "fastdiff.highres",
    "NeighborhoodAttnProcessor": "fastdiff.attn_processors",
    "NeighborhoodConfig": "fastdiff.methods",
    "ParoAttnProcessor": "fastdiff.attn_processors",
    "ParoConfig": "fastdiff.methods",
    "Preset": "fastdiff.published",
    "RadialAttnProcessor": "fastdiff.attn_processors",
    "RadialConfig": "fastdiff.methods",
    "Rule": "fastdiff.methods",
    "RulesAttnProcessor": "fastdiff.attn_processors",
    "RulesConfig": "fastdiff.methods",
    "TokenLayout": "fastdiff_kernels",
    "apply": "fastdiff.api",
    "calibrate": "fastdiff.calibration",
    "high_resolution": "fastdiff.highres",
    "load_clear_weights": "fastdiff.clear_weights",
    "load_config": "fastdiff.methods",
    "presets": "fastdiff.published",
    "processors": "fastdiff.attn_processors",
    "remove": "fastdiff.api",
    "summary": "fastdiff.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
