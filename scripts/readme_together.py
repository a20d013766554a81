"""The README's table of what fastdiff works together with. Standard library only."""

from __future__ import annotations

from typing import Any

from readme_text import table


def together(report: dict[str, Any]) -> str:
    """Green or red by test: what `scripts/together.py` has found."""
    rows = []
    for row in report["rows"]:
        skipped = "; ".join(f"{count}: {reason}" for reason, count in row["skipped"].items())
        rows.append([row["name"], row["outcome"], f"{row['passed']}", f"{len(row['failed'])}", skipped])
    versions = ", ".join(f"{name} {found}" for name, found in report["versions"].items() if found and name != "threads")
    machine = "a CPU" if report["gpu"].startswith("none") else report["gpu"]
    conditions = f"Tiny models with random weights on {machine}; {versions}; commit {report['commit']}."
    return table(["together with", "result", "tests passed", "failed", "not run"], rows) + "\n\n" + conditions
