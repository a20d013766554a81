"""Checks what no linter sees: text ends with one newline, no trailing space, no file is too large for git."""

from __future__ import annotations

import sys
from pathlib import Path

LARGEST_BYTES = 15 * 2**20
LARGEST_PYTHON_LINES = 600


def complaints(path: Path) -> list[str]:
    data = path.read_bytes()
    found = [f"{len(data) / 2**20:.1f} MiB; at most 15"] if len(data) > LARGEST_BYTES else []
    if b"\0" in data[:8000] or path.suffix in (".json", ".txt"):
        return found
    if data and not data.endswith(b"\n"):
        found.append("no newline at the end")
    if data.endswith(b"\n\n"):
        found.append("empty lines at the end")
    if any(line != line.rstrip() for line in data.decode(errors="replace").split("\n")):
        found.append("spaces at the end of a line")
    if path.suffix == ".py" and data.count(b"\n") > LARGEST_PYTHON_LINES:
        found.append(f"more than {LARGEST_PYTHON_LINES} lines")
    return found


def main(names: list[str]) -> int:
    failed = 0
    for name in names:
        for complaint in complaints(Path(name)):
            sys.stderr.write(f"{name}: {complaint}\n")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
