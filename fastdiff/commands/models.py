"""`fastdiff models`: which models can be patched, by which methods, and what the tests have shown of each."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import options as o

_MARKS = {"yes": "", "training": "*", "calibration": "+"}


def models(
    name: Annotated[
        str | None,
        typer.Argument(help="A family, such as wan, or a model or pipeline class of diffusers. All by default."),
    ] = None,
    as_json: o.AsJson = False,
) -> None:
    """List the models that can be patched, and their methods.

    And what tests have shown: they run small models of each class with random weights. Other models work too, if
    layout= describes them.

    \b
    Examples:
      fastdiff models
      fastdiff models flux
      fastdiff models FluxPipeline
      fastdiff models WanTransformer3DModel --json
    """
    from .screen import results_only_on_stdout

    with results_only_on_stdout():
        from fastdiff.catalogue import catalogue

        found = catalogue(name)
    if as_json:
        from fastdiff.measure.report import to_json

        typer.echo(to_json(found))
    else:
        _show(found, with_reasons=name is not None)


def _show(found: dict[str, Any], with_reasons: bool) -> None:
    families: dict[str, list[dict[str, Any]]] = {}
    for model in found["models"]:
        families.setdefault(model["family"], []).append(model)
    for family, members in families.items():
        typer.echo(f"{family}: {_methods(members[0])}")
        for model in members:
            typer.echo(f"    {model['model']}: {_shown(model)}")
    typer.echo("* wants fine-tuned weights (clear at a small radius alone)   + wants a calibration run")
    if with_reasons:
        reasons = {
            f"{method} in {model['family']}: {use['why']}": None
            for model in found["models"]
            for method, use in model["methods"].items()
            if use["why"]
        }
        for reason in reasons:
            typer.echo(reason)
    versions = ", ".join(f"{name} {found['test_run']['versions'][name]}" for name in ("torch", "diffusers"))
    published = ", ".join(found["published_weights"]) or "none"
    typer.echo(f"Tests ran small models with random weights ({versions}). With published weights: {published}.")


def _methods(model: dict[str, Any]) -> str:
    uses = {method: use["use"] for method, use in model["methods"].items()}
    return ", ".join(method + _MARKS[use] for method, use in uses.items() if use in _MARKS)


def _shown(model: dict[str, Any]) -> str:
    passed = sum(test["passed"] for test in model["tested"])
    total = passed + sum(len(test["failed"]) for test in model["tested"])
    if not total:
        return "not tested"
    ran = f"; ran {', '.join(model['pipelines'])}" if model["pipelines"] else ""
    return f"{passed} of {total} tests passed{ran}"
