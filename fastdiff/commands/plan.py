"""`fastdiff plan`: what a method would compute on a grid, without a model."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from fastdiff_kernels import Grid, TokenLayout


def plan(
    method: Annotated[str, typer.Option(help=f"The sparse method: {', '.join(o.METHODS)}.")] = "radial",
    grid: Annotated[str, typer.Option(help="Tokens: frames x height x width.")] = "21x45x80",
    config: o.Config = None,
    density: o.Density = None,
    window: Annotated[
        str | None, typer.Option(help="Instead of --config: keys on each axis, such as 18x24x24; all for a whole axis.")
    ] = None,
    stride: Annotated[str | None, typer.Option(help="With --window: queries that share one, such as 16x8x8.")] = None,
    dilation: Annotated[str | None, typer.Option(help="With --window: the distance of keys, such as 1x2x2.")] = None,
    causal: Annotated[str | None, typer.Option(help="With --window: axes without later keys, of t,y,x.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens before the grid in the same sequence.")] = 0,
    text_after: Annotated[int, typer.Option(help="Text tokens after it.")] = 0,
    layer: Annotated[int, typer.Option(help="Which self-attention layer, where layers differ.")] = 0,
    head: Annotated[int, typer.Option(help="Which head is drawn, where heads differ.")] = 0,
    query: Annotated[
        str | None, typer.Option(help="The query t,y,x whose keys are drawn; by default the one in the middle.")
    ] = None,
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Count tiles of boxes: the bound of an ideal kernel's speed-up.")
    ] = False,
    search: Annotated[
        bool, typer.Option("--search", help="Also find strides and tiles that raise that bound.")
    ] = False,
    query_tile: Annotated[str | None, typer.Option(help="Queries of a simulated tile, such as 4x8x8.")] = None,
    key_tile: Annotated[str | None, typer.Option(help="Keys of a simulated tile, such as 2x8x8.")] = None,
    attention_share: Annotated[
        float | None, typer.Option(help="Share of a dense run's time in self-attention, for the end-to-end bound.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A picture of the plan, .png.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show what a method computes on a token grid; needs no model.

    The default grid is that of Wan for 81 frames of 1280x720.

    \b
    Examples:
      fastdiff plan --method radial --grid 21x45x80
      fastdiff plan --grid 9x17x23 --config '{"decay_factor": 0.2}' --out plan.png
      fastdiff plan --method neighborhood --grid 30x48x80 --window 18x24x24 --stride 16x8x8 --simulate
      fastdiff plan --method neighborhood --grid 30x48x80 --window 18x24x24 --search --attention-share 0.6
      fastdiff plan --grid 21x30x52 --density 0.3 --json
    """
    from fastdiff_kernels import Grid, TokenLayout

    options = locals()
    _check(options)
    shape = Grid.parse(grid)
    where = _place(query, shape)
    settings = _settings(options, shape)
    layout = TokenLayout.self_attention(shape, text_before=text, text_after=text_after)
    result = {"method": method, "config": settings.to_dict(), "grid": str(shape), "text": text + text_after}
    result |= {"layer": layer} | _simulation(options, settings, shape)

    from fastdiff.methods import build_plan

    start = time.perf_counter()
    built = build_plan(settings, layout, layer=layer)
    result |= {"build_seconds": time.perf_counter() - start} | _numbers(built, layout)
    _check_head(head, built)
    if out is not None:
        title = f"{method} on {shape}, density {result['density']:.3f}"
        _picture(built, out, layout=layout, where=where, head=head, title=title)
        result["out"] = str(out)
    _tell(result, as_json)


def _check(options: dict[str, Any]) -> None:
    from fastdiff_kernels import InvalidInputError

    o.check_settings(options["method"], options["config"], options["density"])
    if options["method"] == "dense":
        raise InvalidInputError("--method is dense; a plan belongs to a sparse method.")
    if options["method"] == "paro" and options["config"] is None:
        raise InvalidInputError("--method paro needs a calibration; give --config, with a file of fastdiff calibrate.")
    _only_with(options, ["window"], ("stride", "dilation", "causal"))
    _only_with(options, ["simulate", "search"], ("query_tile", "key_tile", "attention_share"))
    _only_with(options, ["out"], ("query",))
    if options["window"] is not None and (options["config"] is not None or options["density"] is not None):
        raise InvalidInputError("--window excludes --config and --density; give one of them.")
    for name in ("text", "text_after", "layer", "head"):
        if options[name] < 0:
            raise InvalidInputError(f"{_option(name)} is {options[name]}; it must be 0 or more.")
    if options["density"] is not None and options["text"] and options["text_after"]:
        raise InvalidInputError("--density counts text on one side of the grid; give --text or --text-after.")
    out = options["out"]
    if out is not None and out.suffix != ".png":
        raise InvalidInputError(f"--out is {out}; it must end in .png.")


def _only_with(options: dict[str, Any], one_of: list[str], names: tuple[str, ...]) -> None:
    from fastdiff_kernels import InvalidInputError

    alone = next((name for name in names if options[name] is not None), None)
    if alone is not None and not any(options[name] for name in one_of):
        raise InvalidInputError(f"{_option(alone)} goes with {' or '.join(map(_option, one_of))}; give that too.")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _settings(options: dict[str, Any], grid: Grid) -> Any:
    """The method's config, from --config, --window, --density, or its defaults."""
    method, text = options["method"], options["text"] + options["text_after"]
    if options["window"] is None and options["config"] is None and options["density"] is None:
        o.check_defaults(method)
    if options["window"] is None:
        settings = o.read_config(method, options["config"])
    else:
        from .boxes import config_of

        settings = config_of(method, *(options[name] for name in ("window", "stride", "dilation", "causal")))
    _check_memory(grid, text, method, settings and settings.at(options["layer"]))
    return o.settings_for(method, settings, options["density"], grid, text)


def _simulation(options: dict[str, Any], settings: Any, grid: Grid) -> dict[str, Any]:
    if not options["simulate"] and not options["search"]:
        return {}
    from .boxes import simulation

    given = (options[name] for name in ("query_tile", "key_tile", "attention_share", "search"))
    return simulation(settings, grid, *given)


def _check_memory(grid: Grid, text: int, method: str, settings: Any) -> None:
    from fastdiff.methods import METHODS
    from fastdiff.methods.base import block_on

    from .memory import check_memory

    block = getattr(settings or METHODS[method], "block_size", None)
    what, reduce = f"{grid.tokens + text} tokens", "--grid or --text"
    if block is None:
        # Measured while building: cells, their order and what it is made from.
        check_memory(100 * (grid.tokens + text), what, reduce)
        return
    block = block_on(grid, block)
    # Measured while building: 56 bytes a pair of blocks. Frames are padded to whole blocks.
    blocks = grid.frames * -(-grid.frame_tokens // block) + -(-text // block)
    check_memory(56 * blocks**2, f"the block lists of {what}", f"{reduce}, or take a larger block_size")


def _check_head(head: int, built: Any) -> None:
    from fastdiff_kernels import InvalidInputError

    heads = getattr(built, "heads", None)
    if heads is not None and head >= heads:
        raise InvalidInputError(f"--head is {head}; this plan has {heads}, counted from 0.")


def _place(query: str | None, grid: Grid) -> tuple[int, int, int]:
    """The query whose keys are drawn; the middle of the grid if none was named."""
    from fastdiff_kernels import InvalidInputError

    sides = (grid.frames, grid.height, grid.width)
    if query is None:
        return grid.frames // 2, grid.height // 2, grid.width // 2
    words = [word.strip() for word in query.split(",")]
    numbers = tuple(int(word) if word.isascii() and word.isdigit() else grid.tokens for word in words)
    if len(numbers) != 3 or any(number >= side for number, side in zip(numbers, sides, strict=True)):
        raise InvalidInputError(
            f"--query is {query!r}; give frame, row and column on the grid of {grid}, counted from 0, such as "
            f"{grid.frames // 2},{grid.height // 2},{grid.width // 2}."
        )
    return numbers


def _numbers(built: Any, layout: TokenLayout) -> dict[str, Any]:
    """What a plan says of itself; a plan is made of blocks, or of cells with an agent each, or None for dense."""
    tokens = {"query_tokens": layout.query_tokens, "key_tokens": layout.key_tokens}
    if built is None:
        return tokens | {"density": 1.0}
    numbers = tokens | {"density": built.density(), "plan_bytes": built.nbytes}
    if hasattr(built, "cells"):
        return numbers | {"agents": built.agents}
    return numbers | {
        "key_tokens": built.key_tokens,
        "lists": built.lists,
        "query_block": built.query.block,
        "key_block": built.key.block,
        "query_blocks": built.query_blocks,
        "key_blocks": built.key_blocks,
        "full_blocks": built.full_blocks,
        "partial_blocks": built.partial_blocks,
        "longest_row": built.longest_row,
        "mean_row": built.mean_row,
    }


def _tell(result: dict[str, Any], as_json: bool) -> None:
    from fastdiff.measure.report import to_json

    if as_json:
        typer.echo(to_json(result))
        return
    from . import boxes, tables

    rows = _rows(result) | (boxes.rows(result) if "bound" in result else {})
    tables.pairs(f"{result['method']} on a grid of {result['grid']}", rows)
    if "search" in result:
        tables.lines("Strides that raise the bound, less padding", boxes.table(result))
    if "out" in result:
        typer.echo(f"Picture in {result['out']}")


def _rows(result: dict[str, Any]) -> dict[str, str]:
    rows = {
        "config": ", ".join(f"{name} {value}" for name, value in result["config"].items() if name != "method"),
        "tokens": f"{result['query_tokens']} ({result['text']} of text)",
        "density": f"{result['density']:.4f}",
    }
    if "agents" in result:
        rows["agents"] = str(result["agents"])
    elif "lists" in result:
        of = f"{result['query_block']} x {result['key_block']} tokens"
        of += f", for each of {result['lists']} heads" if result["lists"] > 1 else ""
        mean = f"{result['mean_row']:.1f} on average, {result['longest_row']} in the longest"
        rows |= {
            "blocks": f"{result['query_blocks']} x {result['key_blocks']} of {of}",
            "computed whole": str(result["full_blocks"]),
            "computed with a rule": str(result["partial_blocks"]),
            "key blocks in a row": mean,
        }
    else:
        return rows | {"plan": f"layer {result['layer']} stays dense"}
    return rows | {
        "memory": f"{result['plan_bytes'] / 1024:.0f} KiB",
        "built in": f"{1e3 * result['build_seconds']:.1f} ms",
    }


def _picture(built: Any, out: Path, **view: Any) -> None:
    from fastdiff_kernels import InvalidInputError, MissingDependencyError

    from .outputs import staged

    if built is None:
        raise InvalidInputError("--out has nothing to draw: this layer stays dense; choose another --layer.")
    with staged(out.parent, [out.name]) as folder:
        try:
            from .plan_picture import draw
        except ImportError as error:
            raise MissingDependencyError('--out needs matplotlib: pip install "fastdiff-attention[demo]".') from error
        draw(built, **view).savefig(folder / out.name)
