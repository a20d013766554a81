"""`fastdiff doctor`: what is installed, what would run and why, what is missing and how to get it."""

from __future__ import annotations

import importlib.util
from typing import Any

import typer

from . import options as o

# The oldest triton that the kernels were tested with.
TESTED_TRITON = (3, 6)
# import name -> what it is for
OPTIONAL = {
    "imageio": "writing videos",
    "imageio_ffmpeg": "writing videos",
    "matplotlib": "pictures of plans",
    "PIL": "writing pictures",
    "torchmetrics": "PSNR and SSIM",
}


def doctor(as_json: o.AsJson = False) -> None:
    """Show versions, devices, backends, and what is missing.

    \b
    Examples:
      fastdiff doctor
      fastdiff doctor --json
    """
    from .screen import results_only_on_stdout

    with results_only_on_stdout():
        found = examine()
    if as_json:
        from fastdiff.measure.report import to_json

        typer.echo(to_json(found))
    else:
        _show(found)


def examine() -> dict[str, Any]:
    """Everything that doctor says, as plain data."""
    from fastdiff.measure.report import versions
    from fastdiff_kernels import backends

    listed = [{"name": name, "available": available, "reason": reason} for name, available, reason in backends()]
    return {
        "versions": versions(),
        "devices": _devices(),
        "backends": listed,
        "backend": next(entry["name"] for entry in listed if entry["available"] and "default" in entry["reason"]),
        "ffmpeg": _ffmpeg(),
        "models": _models(),
        "problems": _problems(),
    }


def _devices() -> dict[str, Any]:
    import torch

    devices: dict[str, Any] = {"cpu": {"threads": torch.get_num_threads()}}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {
            "name": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
    if torch.backends.mps.is_available():
        devices["mps"] = {}
    return devices


def _ffmpeg() -> str | None:
    try:
        import imageio_ffmpeg

        return imageio_ffmpeg.get_ffmpeg_version()
    except (ImportError, RuntimeError, OSError):
        return None


def _models() -> dict[str, str]:
    from fastdiff.assets import EMBEDDED, pipeline_path
    from fastdiff_kernels import FastDiffError

    found = {}
    for name in EMBEDDED:
        try:
            found[name] = str(pipeline_path(name))
        except FastDiffError:
            found[name] = "missing"
    return found


def _problems() -> list[dict[str, str]]:
    """Each with what it is, why it matters, and what to do."""
    import torch

    from fastdiff.measure.report import version

    def problem(what: str, why: str, do: str) -> dict[str, str]:
        return {"what": what, "why": why, "do": do}

    found = []
    if version("fastdiff") is not None:
        found.append(
            problem(
                f"the distribution fastdiff {version('fastdiff')} is installed",
                "that is a text-diff library of the same import name; which of both is imported is chance",
                "pip uninstall fastdiff, then install fastdiff-attention anew",
            )
        )
    missing = {module: use for module, use in OPTIONAL.items() if importlib.util.find_spec(module) is None}
    if missing:
        why = "needed for " + ", ".join(dict.fromkeys(missing.values()))
        found.append(problem(f"{', '.join(missing)} missing", why, 'pip install "fastdiff-attention[demo]"'))
    if importlib.util.find_spec("ftfy") is None:
        found.append(problem("ftfy missing", "Wan pipelines clean prompts with it", "pip install ftfy"))
    triton = version("triton")
    if torch.cuda.is_available() and triton is None:
        found.append(problem("triton missing", "the fast kernels of GPUs are written in it", "pip install triton"))
    if triton is not None and tuple(int(part) for part in triton.split(".")[:2]) < TESTED_TRITON:
        tested = ".".join(map(str, TESTED_TRITON))
        found.append(problem(f"triton {triton}", f"older than {tested}, the oldest tested", "install a newer torch"))
    lost = [name for name, place in _models().items() if place == "missing"]
    if lost:
        why = "embedded models of generate and compare"
        found.append(problem(f"{', '.join(lost)} missing", why, "install fastdiff-attention anew, or give --model"))
    return found


def _show(found: dict[str, Any]) -> None:
    from .tables import pairs

    pairs("Versions", {name: value or "not installed" for name, value in found["versions"].items()})
    devices = {name: ", ".join(f"{k} {v}" for k, v in facts.items()) for name, facts in found["devices"].items()}
    pairs("Devices", devices)
    backends = {
        entry["name"]: ("yes: " if entry["available"] else "no: ") + entry["reason"] for entry in found["backends"]
    }
    pairs("Backends", backends)
    pairs("Files", {"ffmpeg": found["ffmpeg"] or "missing", **found["models"]})
    if not found["problems"]:
        typer.echo("Nothing that this machine needs is missing.")
    for problem in found["problems"]:
        typer.echo(f"! {problem['what']}: {problem['why']}. Do: {problem['do']}.")
