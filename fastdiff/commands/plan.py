"""`fastdiff plan`: what a method would compute on a grid, without a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from fastdiff_kernels import BlockPlan, Grid


def plan(
    method: Annotated[str, typer.Option(help="The sparse method: radial or neighborhood.")] = "radial",
    grid: Annotated[str, typer.Option(help="Tokens: frames x height x width.")] = "21x45x80",
    config: o.Config = None,
    density: o.Density = None,
    text: Annotated[int, typer.Option(help="Text tokens before the video in the same sequence.")] = 0,
    out: Annotated[Path | None, typer.Option(help="A picture of the plan, .png.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show what a method computes on a token grid; needs no model.

    The default grid is that of Wan for 81 frames of 1280x720.

    \b
    Examples:
      fastdiff plan --method radial --grid 21x45x80
      fastdiff plan --grid 9x17x23 --config '{"decay_factor": 0.2}' --out plan.png
      fastdiff plan --grid 21x30x52 --density 0.3 --json
    """
    from fastdiff_kernels import Grid, InvalidInputError, TokenLayout

    o.check_settings(method, config, density)
    if method == "dense":
        raise InvalidInputError("--method is dense; a plan belongs to a sparse method.")
    if text < 0:
        raise InvalidInputError(f"--text is {text}; it must be 0 or more.")
    if out is not None and out.suffix != ".png":
        raise InvalidInputError(f"--out is {out}; it must end in .png.")
    shape = Grid.parse(grid)
    settings = o.read_config(method, config)
    _check_memory(shape, text, settings)

    from fastdiff.measure.report import to_json
    from fastdiff.methods import build_plan

    settings = o.settings_for(method, settings, density, shape, text)
    layout = TokenLayout.self_attention(shape, text_before=text)
    start = time.perf_counter()
    built = build_plan(settings, layout)
    result = _numbers(built, time.perf_counter() - start)
    result |= {"method": method, "config": settings.to_dict(), "grid": str(shape), "text": text}
    if out is not None:
        _picture(built, shape, text, f"{method} on {shape}, density {result['density']:.3f}", out)
        result["out"] = str(out)
    if as_json:
        typer.echo(to_json(result))
        return
    from .tables import pairs

    pairs(f"{method} on a grid of {shape}", _rows(result, built))
    if out is not None:
        typer.echo(f"Picture in {out}")


def _check_memory(grid: Grid, text: int, settings: Any) -> None:
    from .memory import check_memory

    # Measured while building: 56 bytes a pair of blocks. Frames are padded to whole blocks.
    block = getattr(settings, "block_size", 128)
    blocks = grid.frames * -(-grid.frame_tokens // block) + -(-text // block)
    what = f"the block lists of {grid.tokens + text} tokens"
    check_memory(56 * blocks**2, what, "--grid or --text, or take a larger block_size")


def _numbers(built: BlockPlan, seconds: float) -> dict[str, Any]:
    return {
        "density": built.density(),
        "query_blocks": built.query_blocks,
        "key_blocks": built.key_blocks,
        "full_blocks": built.full_blocks,
        "partial_blocks": built.partial_blocks,
        "longest_row": built.longest_row,
        "mean_row": built.mean_row,
        "plan_bytes": built.nbytes,
        "build_seconds": seconds,
        "query_tokens": built.query_tokens,
        "key_tokens": built.key_tokens,
    }


def _rows(result: dict[str, Any], built: BlockPlan) -> dict[str, str]:
    blocks = f"{result['query_blocks']} x {result['key_blocks']} of {built.query.block} x {built.key.block} tokens"
    return {
        "config": ", ".join(f"{name} {value}" for name, value in result["config"].items() if name != "method"),
        "tokens": f"{result['query_tokens']} ({result['text']} of text)",
        "density": f"{result['density']:.4f}",
        "blocks": blocks,
        "computed whole": str(result["full_blocks"]),
        "computed with a rule": str(result["partial_blocks"]),
        "key blocks in a row": f"{result['mean_row']:.1f} on average, {result['longest_row']} in the longest",
        "memory": f"{result['plan_bytes'] / 1024:.0f} KiB",
        "built in": f"{1e3 * result['build_seconds']:.1f} ms",
    }


def _picture(built: BlockPlan, grid: Grid, text: int, title: str, out: Path) -> None:
    from fastdiff_kernels import MissingDependencyError

    from .outputs import staged

    with staged(out.parent, [out.name]) as folder:
        try:
            from .plan_picture import draw
        except ImportError as error:
            raise MissingDependencyError('--out needs matplotlib: pip install "fastdiff-attention[demo]".') from error
        draw(built, grid, text, title).savefig(folder / out.name)
