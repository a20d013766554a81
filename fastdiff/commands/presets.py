"""`fastdiff presets`: published settings, and where they are published."""

from __future__ import annotations

import typer

from . import options as o


def presets(as_json: o.AsJson = False) -> None:
    """List published settings, each with its source.

    generate and compare take one with --preset NAME; fastdiff.apply(pipe, "radial") takes the first of a method's that
    fits the pipeline.

    \b
    Examples:
      fastdiff presets
      fastdiff presets --json
    """
    from fastdiff.published import presets as published

    found = published()
    if as_json:
        from fastdiff.measure.report import to_json

        typer.echo(to_json([preset.to_dict() for preset in found]))
        return
    for family in dict.fromkeys(preset.family for preset in found):
        typer.echo(f"Family {family}")
        for preset in found:
            if preset.family == family:
                typer.echo(f"  {preset.name}\n      {preset.told}")
