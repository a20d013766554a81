"""What fastdiff works together with, by test: runs the tests marked `together` and writes results/together.json.

    python scripts/together.py               # then: python3 scripts/readme_tables.py
    python scripts/together.py --output /tmp/together.json -k caches     # options go to pytest

A row is green if its tests passed, red if one failed, and not run if all were skipped. Exit code 1 if one is red.
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
PACKAGES = ("diffusers", "transformers", "peft", "accelerate", "torchao", "optimum-quanto", "bitsandbytes")


class Rows:
    """A plugin of pytest that gathers the outcomes of the marked tests, by what the marker names."""

    def __init__(self):
        self.rows: dict[str, dict[str, Any]] = {}
        self._row_of: dict[str, dict[str, Any]] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("together"):
                (name,) = marker.args
                row = self.rows.setdefault(name, {"name": name, "passed": 0, "failed": [], "skipped": {}})
                self._row_of[item.nodeid] = row

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        row = self._row_of.get(report.nodeid)
        if row is None:
            return
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options, rest = parser.parse_known_args(arguments)
    rows = Rows()
    tests = (ROOT / "tests").glob("test_*.py")
    files = sorted(str(path) for path in tests if "mark.together" in path.read_text(encoding="utf-8"))
    code = pytest.main(["-q", "--rootdir", str(ROOT), "-m", "together", *files, *rest], plugins=[rows])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not rows.rows:
        return 2
    if rest and options.output is None:
        sys.stderr.write("together: nothing is written, because options chose the tests; give --output.\n")
        return int(code)
    found = conditions("cuda" if torch.cuda.is_available() else "cpu", None)
    found["versions"] |= {name: version(name) for name in PACKAGES}
    write_json(options.output or ROOT / "results" / "together.json", {**found, "rows": rows.outcomes()})
    return int(any(outcome(row) == "red" for row in rows.rows.values()))


if __name__ == "__main__":
    sys.exit(main())
