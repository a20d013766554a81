"""Published settings of neighborhood attention by name: what was run, on which grid, and how much faster it was."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff_kernels import Grid
from fastdiff_kernels.box import Tile

from .neighborhood import NeighborhoodConfig


@dataclass(frozen=True)
class NeighborhoodPreset:
    """One row of the tables of arXiv 2504.16922 (B200, batch of one, no fine-tuning).

    Attributes:
        config: The settings.
        grid: The tokens that it was run on.
        query_tile, key_tile: Tiles of the authors' kernel, for `fastdiff plan --simulate`.
        attention_share: Share of a dense run's time that is self-attention.
        steps: Denoising steps of the run.
        dense_steps: First steps that the paper keeps dense where it cares for quality.
        speedup: Of the whole run with no dense step, as measured there.
    """

    config: NeighborhoodConfig
    grid: Grid
    query_tile: Tile
    key_tile: Tile
    attention_share: float
    steps: int
    dense_steps: int
    speedup: float


# name, grid, query tile, key tile, attention share, steps, dense steps
_MODELS = {
    "cosmos": (Grid(16, 44, 80), (8, 4, 8), (4, 4, 8), 0.587, 35, 12),
    "hunyuanvideo": (Grid(30, 48, 80), (4, 8, 8), (2, 8, 8), 0.607, 50, 15),
    "flux-4k": (Grid(1, 256, 256), (1, 16, 16), (1, 16, 8), 0.518, 28, 9),
}
# The one window that the authors' bounds fit only with other tiles.
_TILES = {(30, 40, 40): ((2, 16, 8), (2, 8, 8))}

# model, window, then speed-up by stride
_RUNS = (
    ("cosmos", (16, 32, 48), {(1, 1, 1): 1.18, (1, 8, 1): 1.20, (1, 1, 16): 1.21, (1, 8, 16): 1.46}),
    ("cosmos", (16, 24, 16), {(1, 1, 1): 1.76, (1, 8, 1): 1.79, (1, 1, 16): 1.88, (1, 8, 16): 2.05}),
    ("hunyuanvideo", (30, 40, 40), {(1, 1, 1): 1.15, (1, 1, 8): 1.26, (1, 32, 8): 1.53}),
    (
        "hunyuanvideo",
        (18, 24, 24),
        {
            (1, 1, 1): 1.73,
            (2, 1, 1): 1.77,
            (1, 1, 8): 1.95,
            (2, 1, 8): 1.98,
            (1, 8, 8): 2.09,
            (2, 8, 8): 2.11,
            (16, 8, 8): 2.23,
        },
    ),
    ("flux-4k", (80, 80), {(1, 1): 1.65, (16, 1): 1.72, (16, 16): 1.82}),
)


def neighborhood_presets() -> dict[str, NeighborhoodPreset]:
    """All presets by name: model, window, and `s` with the stride, such as `"flux-4k-80x80-s16x1"`."""
    found = {}
    for model, window, runs in _RUNS:
        grid, query_tile, key_tile, *numbers = _MODELS[model]
        tiles = _TILES.get(window, (query_tile, key_tile))
        for stride, speedup in runs.items():
            name = f"{model}-{_times(window)}-s{1 if set(stride) == {1} else _times(stride)}"
            found[name] = NeighborhoodPreset(NeighborhoodConfig(window, stride), grid, *tiles, *numbers, speedup)
    return found


def _times(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))
