"""The project's chores, standard library only: makes .venv, installs, then runs the demo, the tests or the lint.

Examples:
    python3 scripts/tasks.py demo            # fastdiff compare, results in outputs/
    python3 scripts/tasks.py test -k plan    # what follows goes to pytest
    python3 scripts/tasks.py lint
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 10)
# What each chore needs; "dev" includes "demo".
EXTRAS = {"demo": "demo", "test": "dev", "test-oldest": "dev", "lint": "dev"}
# Most tests that see diffusers or the command line; others change with those versions as these do, or not at all.
SEES_DIFFUSERS = (
    "advice",
    "agent_pictures",
    "api",
    "bench",
    "calibrate",
    "catalogue",
    "clear",
    "clear_flux",
    "cli",
    "cli_pictures",
    "compile",
    "default_device",
    "families",
    "family_batches",
    "image_families",
    "image_pipelines",
    "import_hygiene",
    "latent_families",
    "layer_skip",
    "layout_door",
    "measure",
    "method_processors",
    "needs",
    "notebook_processors",
    "overview",
    "packaging",
    "presets",
    "processors",
    "recomputation",
    "rules",
    "seam",
    "seed",
    "steps",
    "together",
    "together_loaders",
    "together_memory",
    "ulysses",
    "video_families",
    "video_pipelines",
)


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in EXTRAS:
        say(__doc__.strip())
        return 2
    chore, rest = arguments[0], arguments[1:]
    oldest = chore == "test-oldest"
    venv = ROOT / os.environ.get("FASTDIFF_VENV", ".venv-oldest" if oldest else ".venv")
    python = prepare(venv, EXTRAS[chore], "constraints-oldest.txt" if oldest else "constraints.txt")
    if python is None:
        return 1
    return {"demo": demo, "test": test, "test-oldest": test_oldest, "lint": lint}[chore](python, rest)


def prepare(venv: Path, extra: str, constraints: str) -> Path | None:
    """The python of a virtual environment that has the project and an extra; None where that failed."""
    if sys.version_info < OLDEST_PYTHON:
        say(f"This is Python {sys.version.split()[0]}; fastdiff needs 3.10 or newer: make PYTHON=python3.12 ...")
        return None
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = venv / f".installed-{extra}"
    wanted = fingerprint(constraints)
    if python.exists() and any(
        path.exists() and path.read_text() == wanted for path in {stamp, venv / ".installed-dev"}
    ):
        return python
    if not works(python):
        say(f"Making a virtual environment in {shown(venv)} with Python {sys.version.split()[0]}")
        shutil.rmtree(venv, ignore_errors=True)
        if subprocess.call([sys.executable, "-m", "venv", str(venv)]):
            say("Python could not make it. On Debian or Ubuntu first: sudo apt install python3-venv")
            return None
    say(f"Installing fastdiff-attention[{extra}] with the versions of {constraints}; the first time takes minutes")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    pip += [] if sys.stdout.isatty() else ["--quiet"]
    if subprocess.call([*pip, "-c", str(ROOT / constraints), "-e", f"{ROOT}[{extra}]"]):
        say("The installation failed; the lines above say why.")
        return None
    stamp.write_text(wanted)
    return python


def fingerprint(constraints: str) -> str:
    """Changes when an installation would."""
    digest = hashlib.sha256(str(ROOT).encode())
    for path in (ROOT / "pyproject.toml", ROOT / constraints):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def works(python: Path) -> bool:
    # An environment whose folder was moved, or whose Python was removed, is made anew.
    if not python.exists():
        return False
    return subprocess.call([str(python), "-c", ""], stderr=subprocess.DEVNULL) == 0


def demo(python: Path, rest: list[str]) -> int:
    say("Generating one video twice on the embedded model, with dense and with radial attention")
    return run([python, "-m", "fastdiff", "compare", *rest])


def test(python: Path, rest: list[str]) -> int:
    say("Running the tests")
    workers = [] if any(word.startswith(("-n", "--pdb")) for word in rest) else ["-n", "2"]
    return run([python, "-m", "pytest", *workers, *rest])


def test_oldest(python: Path, rest: list[str]) -> int:
    return test(python, [f"tests/test_{name}.py" for name in SEES_DIFFUSERS] + rest)


def lint(python: Path, rest: list[str]) -> int:
    say("Linting")
    os.environ["PATH"] = str(python.parent) + os.pathsep + os.environ["PATH"]
    return run([python, "-m", "pre_commit", "run", "--all-files", "--show-diff-on-failure", *rest])


def run(command: list[str | Path]) -> int:
    try:
        return subprocess.call([str(word) for word in command], cwd=ROOT)
    except KeyboardInterrupt:
        return 130


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
