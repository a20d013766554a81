"""The options of `fastdiff plan` for methods of boxes: their settings without JSON, and what an ideal kernel gains."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from fastdiff_kernels.errors import InvalidInputError

if TYPE_CHECKING:
    from fastdiff_kernels import Grid

AXES = ("t", "y", "x")
WHOLE = "all"


def config_of(method: str, window: str, stride: str | None, dilation: str | None, causal: str | None) -> Any:
    """The method's config from `--window` and its companions.

    Raises:
        InvalidInputError: If one cannot be read, or the method has no window.
    """
    from fastdiff.methods import METHODS

    kind = METHODS[method]
    if not hasattr(kind, "axis_settings"):
        able = ", ".join(name for name, other in METHODS.items() if hasattr(other, "axis_settings"))
        raise InvalidInputError(f"--window goes with --method {able}; --method is {method}.")
    sizes = tuple(None if word == WHOLE else _number("--window", window, word) for word in window.split("x"))
    if len(sizes) > len(AXES):
        raise InvalidInputError(f"--window is {window!r}; give up to 3 numbers, such as 18x24x24.")
    settings = {}
    for name, text in (("stride", stride), ("dilation", dilation)):
        if text is not None:
            numbers = tuple(_number(f"--{name}", text, word) for word in text.split("x"))
            settings[name] = numbers if len(numbers) > 1 else numbers[0]
    if causal is not None:
        names = AXES[-len(sizes) :]
        asked = [word.strip() for word in causal.split(",")]
        if not set(asked) <= set(names):
            raise InvalidInputError(f"--causal is {causal!r}; name axes of the window, of {', '.join(names)}.")
        settings["causal"] = tuple(name in asked for name in names)
    return kind(sizes, **settings)


def simulation(
    config: Any, grid: Grid, query_tile: str | None, key_tile: str | None, share: float | None, strides: bool
) -> dict[str, Any]:
    """What the options `--simulate` and `--search` add to the result.

    Args:
        config: A config of boxes.
        grid: The token grid.
        query_tile, key_tile: As given, such as "4x8x8"; None for those of the published kernels.
        share: Share of a dense run's time that is self-attention, for the end-to-end bound.
        strides: Whether to search strides, and tiles too unless one was given.

    Raises:
        InvalidInputError: If the config has no boxes, or a tile or the share cannot be.
    """
    from fastdiff.methods.neighborhood_search import default_tiles, search, tiles_of
    from fastdiff_kernels.box import simulate

    if not hasattr(config, "axis_settings"):
        raise InvalidInputError(f"--simulate counts tiles of boxes, which {config.method} does not have.")
    defaults = default_tiles(grid)
    tiles = [
        default if text is None else _tile(option, text, grid)
        for option, text, default in zip(("--query-tile", "--key-tile"), (query_tile, key_tile), defaults, strict=True)
    ]
    result = _costs(simulate(config.axes(grid), *tiles), tiles, share)
    if strides:
        given = query_tile is not None or key_tile is not None
        choices = [[tile] for tile in tiles] if given else [tiles_of(_tokens(tile), grid) for tile in defaults]
        result["search"] = [
            {"stride": found.stride, "density": _density(replace(config, stride=found.stride), grid)}
            | _costs(found.simulation, [found.query_tile, found.key_tile], share)
            for found in search(config, grid, *choices)
        ]
    return result


def rows(result: dict[str, Any]) -> dict[str, str]:
    """The simulation in words."""
    tiles = f"{_times(result['query_tile'])} queries, {_times(result['key_tile'])} keys"
    perfect = "every one is full" if result["perfect"] else f"{100 * result['full_share']:.0f} % are full"
    padded = f", {result['bound'] / result['padding']:.2f}x less padding" if result["padding"] > 1 else ""
    found = {
        "tiles simulated": tiles,
        "true density": f"{result['true_density']:.4f}, which would allow {result['flop_bound']:.2f}x",
        "tiles visited": f"{result['visited_density']:.4f} of the dense ones; {perfect}",
        "bound": f"{result['bound']:.2f}x, by the query tile that visits most ({result['worst_density']:.4f}){padded}",
    }
    if "end_to_end" in result:
        found["end to end"] = f"{result['end_to_end']:.2f}x at most"
    return found


def table(result: dict[str, Any]) -> list[list[str]]:
    """The search as lines of cells, the head first."""
    head = ["stride", "density", "queries", "keys", "bound", "full"]
    share = "end_to_end" in result
    lines = [
        [
            _times(found["stride"]),
            f"{found['density']:.4f}",
            _times(found["query_tile"]),
            _times(found["key_tile"]),
            f"{found['bound']:.2f}x",
            f"{100 * found['full_share']:.0f} %",
            *([f"{found['end_to_end']:.2f}x"] if share else []),
        ]
        for found in result["search"]
    ]
    return [[*head, "end to end"] if share else head, *lines]


def _costs(found: Any, tiles: list[tuple[int, int, int]], share: float | None) -> dict[str, Any]:
    costs = asdict(found) | {"query_tile": tiles[0], "key_tile": tiles[1]}
    return costs if share is None else costs | {"end_to_end": found.end_to_end(share)}


def _density(config: Any, grid: Grid) -> float:
    from fastdiff.methods import build_plan
    from fastdiff_kernels import TokenLayout

    return build_plan(config, TokenLayout.self_attention(grid)).density()


def _tile(option: str, text: str, grid: Grid) -> tuple[int, int, int]:
    sides = [_number(option, text, word) for word in text.split("x")]
    sides = [1] * (len(AXES) - len(sides)) + sides
    lengths = (grid.frames, grid.height, grid.width)
    if len(sides) != len(AXES) or not all(side >= 1 for side in sides):
        raise InvalidInputError(f"{option} is {text!r}; give up to 3 numbers from 1, such as 4x8x8.")
    if any(side > max(2 * length, 1) for side, length in zip(sides, lengths, strict=True)):
        raise InvalidInputError(f"{option} is {text!r}, more than twice the grid of {grid}; give a smaller one.")
    return tuple(sides)


def _number(option: str, text: str, word: str) -> int:
    if not (word.isascii() and word.isdigit()):
        raise InvalidInputError(f"{option} is {text!r}; give whole numbers with x between them, such as 18x24x24.")
    return int(word)


def _tokens(tile: tuple[int, int, int]) -> int:
    return tile[0] * tile[1] * tile[2]


def _times(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))
