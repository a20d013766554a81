"""The record of a run: environment, versions, numbers, as JSON that appears on disk whole or not at all."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path

PACKAGES = ("torch", "triton", "diffusers", "transformers", "accelerate", "numpy")
DISTRIBUTION = "fastdiff-attention"


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None; imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions of Python, fastdiff and what it stands on."""
    found = {"python": platform.python_version(), "fastdiff": version(DISTRIBUTION)}
    return found | {name: version(name) for name in PACKAGES}


def environment(device: str) -> dict:
    """The machine behind a number.

    Args:
        device: Where the run was: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`.
    """
    import torch

    found = {"device": str(device), "platform": platform.platform(), "threads": torch.get_num_threads()}
    if torch.device(device).type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
        found["driver"] = _driver()
    # Only torch itself names its build, such as +cpu.
    return found | {"versions": versions() | {"torch": torch.__version__}}


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    try:
        return path.read_text().splitlines()[0]
    except OSError:
        return None


def plain(value):
    """The same with JSON's types only: tuples to lists, numbers that are not finite to None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return plain(value.item())
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return str(value)


def to_json(value) -> str:
    """Strict JSON (no NaN, no Infinity), indented."""
    return json.dumps(plain(value), indent=2, allow_nan=False, ensure_ascii=False)


def write_json(path: str | Path, value) -> None:
    """Writes JSON under a temporary name beside `path` and renames it, so that no reader sees half a file."""
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_json(value) + "\n")
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _umask() -> int:
    # Reading the mask is only possible by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
