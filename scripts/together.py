"""What fastdiff works together with, by test: runs the tests marked `together` and writes down what they found.

    python scripts/together.py                  # those that run on a CPU, to results/together.json
    python scripts/together.py --gpus 1 -n 8    # those that want a GPU, to results/together-gpu.json
    python scripts/together.py --gpus 2         # those that want two, to results/together-2-gpus.json
    python scripts/together.py --output /tmp/together.json -k caches     # options go to pytest

Then: python3 scripts/readme_tables.py. A row is green if its tests passed, red if one failed, and not run if all were
skipped. Exit code 1 if one is red.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.bench.record import conditions
from fastdiff.measure.report import version, write_json

ROOT = Path(__file__).resolve().parent.parent
# The tests for so many GPUs, and where their outcomes go.
RUNS = (
    ("together and not gpu", "together.json"),
    ("together and gpu and not two_gpus", "together-gpu.json"),
    ("together and two_gpus", "together-2-gpus.json"),
)
PACKAGES = ("diffusers", "transformers", "peft", "accelerate", "torchao", "optimum-quanto", "bitsandbytes")


class Rows:
    """A plugin of pytest that gathers the outcomes of the marked tests, by what the marker names."""

    def __init__(self):
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = dict(report.user_properties).get("together")
        if name is None:
            return
        row = self.rows.setdefault(name, {"name": name, "passed": 0, "failed": [], "skipped": {}})
        if report.failed:
            row["failed"].append(report.nodeid)
        elif report.skipped:
            reason = report.longrepr[2].removeprefix("Skipped: ")
            row["skipped"][reason] = row["skipped"].get(reason, 0) + 1
        elif report.when == "call":
            row["passed"] += 1

    def outcomes(self) -> list[dict[str, Any]]:
        """The rows with their outcomes, by name."""
        return [
            {**row, "outcome": outcome(row)} for _, row in sorted(self.rows.items(), key=lambda each: each[0].lower())
        ]


def outcome(row: dict[str, Any]) -> str:
    if row["failed"]:
        return "red"
    return "green" if row["passed"] else "not run"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path)
    parser.add_argument("--gpus", type=int, choices=range(len(RUNS)), default=0, help="run the tests that want as many")
    parser.add_argument("--commit", help="for the record, where this is no git checkout")
    parser.add_argument("-n", dest="processes", help="run as many tests at a time, by pytest-xdist")
    options, rest = parser.parse_known_args(arguments)
    if options.gpus > torch.cuda.device_count():
        parser.error(f"--gpus {options.gpus} wants as many CUDA devices, and torch sees {torch.cuda.device_count()}.")
    rows = Rows()
    tests = (ROOT / "tests").glob("test_*.py")
    files = sorted(str(path) for path in tests if "mark.together" in path.read_text(encoding="utf-8"))
    chosen, name = RUNS[options.gpus]
    how = ["-q", "--rootdir", str(ROOT), "-m", chosen]
    if options.processes:
        how += ["-n", options.processes]
    code = pytest.main([*how, *files, *rest], plugins=[rows])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not rows.rows:
        return 2
    if rest and options.output is None:
        sys.stderr.write("together: nothing is written, because options chose the tests; give --output.\n")
        return int(code)
    found = conditions("cuda" if options.gpus else "cpu", options.commit)
    found["versions"] |= {package: version(package) for package in PACKAGES}
    write_json(options.output or ROOT / "results" / name, {**found, "rows": rows.outcomes()})
    return int(any(outcome(row) == "red" for row in rows.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
