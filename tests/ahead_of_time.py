"""Runs a script that compiles kernels for GPUs that are not at hand, in a process without Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parents[1] / "kernels"


def shared_memory(script: str, arguments: list[str], folder: Path) -> list[int]:
    """What the script prints: the bytes of shared memory that each kernel takes."""
    # TRITON_INTERPRET, which the other tests need, is read once by triton and would rule compiling out.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(KERNELS), "TRITON_CACHE_DIR": str(folder)}
    file = folder / "build.py"
    file.write_text(script)
    command = [sys.executable, str(file), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [int(line) for line in done.stdout.split()]
