"""What the tests show of each model: runs those of families and pipelines and writes fastdiff/assets/tested.json.

    python scripts/tested_models.py
    python scripts/tested_models.py --output /tmp/tested.json -k wan     # options go to pytest

`fastdiff models` reads the file. Exit code 1 if a test failed, which the file then names.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

from fastdiff.bench.record import conditions
from fastdiff.catalogue import TESTED
from fastdiff.measure.report import version, write_json

ROOT = Path(__file__).resolve().parent.parent
FILES = ("test_families.py", "test_video_pipelines.py", "test_image_pipelines.py")


class Tests:
    """A plugin of pytest that gathers the outcomes of tests that use the fixture `shows`."""

    def __init__(self):
        self.found: dict[tuple[str, ...], dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        shown = dict(report.user_properties).get("shows")
        if shown is None or report.when != "call" or report.skipped:
            return
        row = dict(zip(("model", "shows", "weights"), shown, strict=True))
        row = self.found.setdefault(tuple(shown), {**row, "passed": 0, "failed": []})
        if report.failed:
            row["failed"].append(report.nodeid)
        else:
            row["passed"] += 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    options, rest = parser.parse_known_args(arguments)
    tests = Tests()
    files = [str(ROOT / "tests" / name) for name in FILES]
    code = pytest.main(["-q", "--rootdir", str(ROOT), *files, *rest], plugins=[tests])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) or not tests.found:
        return 2
    if rest and options.output is None:
        sys.stderr.write("tested_models: nothing is written, because options chose the tests; give --output.\n")
        return int(code)
    found = conditions("cpu", None)
    found["versions"] |= {"diffusers": version("diffusers")}
    write_json(options.output or TESTED, {**found, "tests": [row for _, row in sorted(tests.found.items())]})
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
