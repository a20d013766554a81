"""The models that families describe: which methods make sense on each, and what tests have shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_kernels import InvalidInputError

from .advice import training_wanted
from .methods import METHODS, AgentConfig, ClearConfig, MethodConfig, RadialConfig

if TYPE_CHECKING:
    from fastdiff_patches.families import Family

# Written by scripts/tested_models.py.
TESTED = Path(__file__).parent / "assets" / "tested.json"

RANDOM = "random"
_PIPELINE = "pipeline "
_SHOWN = ("shows", "weights", "passed", "failed")

# The settings that ask least of a model; the other methods need nothing but query, key and value.
_LEAST: dict[str, MethodConfig] = {"radial": RadialConfig(), "clear": ClearConfig(8), "agent": AgentConfig(1)}


def catalogue(name: str | None = None) -> dict[str, Any]:
    """Every model that can be patched, as plain data.

    Args:
        name: A family, a model class or a pipeline class, in letters of either case; None for all.

    Returns:
        `models`, each with `model` (its class in diffusers), `family`, `methods` (method -> `use` and `why`, see
        `use_of`), `tested` (what the tests have shown, with which weights) and `pipelines` (those that they ran);
        `published_weights`, the models among them that a test ran with published weights; and the conditions of the
        test run.

    Raises:
        InvalidInputError: If nothing is named so.
    """
    from fastdiff_patches.families import FAMILIES

    record = json.loads(TESTED.read_text(encoding="utf-8"))
    models = []
    for model, family in FAMILIES.items():
        tested = [{key: test[key] for key in _SHOWN} for test in record["tests"] if test["model"] == model]
        ran = (test["shows"] for test in tested if test["passed"])
        pipelines = [shown.removeprefix(_PIPELINE) for shown in ran if shown.startswith(_PIPELINE)]
        if name is None or name.lower() in {each.lower() for each in (model, family.name, *pipelines)}:
            methods = {method: use_of(method, family) for method in METHODS if method != "rules"}
            found = {"model": model, "family": family.name, "methods": methods}
            models.append(found | {"tested": tested, "pipelines": pipelines})
    if not models:
        families = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise InvalidInputError(
            f"no family, model or pipeline is named {name!r}; families are {families}. A model that none describes "
            "takes layout=, see fastdiff.apply."
        )
    published = [one["model"] for one in models if any(test["weights"] != RANDOM for test in one["tested"])]
    conditions = {key: value for key, value in record.items() if key != "tests"}
    return {"models": models, "published_weights": published, "test_run": conditions}


def use_of(method: str, family: Family) -> dict[str, str | None]:
    """Whether a method makes sense in the models of a family: `use` and `why`.

    `use` is "yes", "training" (runs, and wants fine-tuned weights), "calibration" (runs after one) or "no".
    """
    config = _LEAST.get(method)
    missing = frozenset() if config is None else config.planner().needs - family.supplies
    if missing:
        return _use("no", f"needs {', '.join(sorted(missing))}, which the family does not supply")
    if method == "radial" and not family.frames:
        return _use("no", "attention sees one picture at a time, and radial leaves out tokens of other frames alone")
    if method == "paro":
        return _use("calibration", "fastdiff calibrate watches the model once")
    wants = None if config is None else training_wanted(config, family)
    return _use("yes", None) if wants is None else _use("training", wants)


def _use(use: str, why: str | None) -> dict[str, str | None]:
    return {"use": use, "why": why}
