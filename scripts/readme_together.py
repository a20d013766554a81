"""The README's table of what fastdiff works together with. Standard library only."""

from __future__ import annotations

from typing import Any

from readme_text import table


def together(cpu: dict[str, Any], gpu: dict[str, Any] | None = None, two_gpus: dict[str, Any] | None = None) -> str:
    """Green or red by test: what `scripts/together.py` has found on a CPU, on a GPU and on two, None if not yet run."""
    reports = {"CPU": cpu, "one GPU": gpu, "two GPUs": two_gpus}
    reports = {device: report for device, report in reports.items() if report is not None}
    columns = {device: {row["name"]: row for row in report["rows"]} for device, report in reports.items()}
    rows = []
    for name in sorted({name for column in columns.values() for name in column}, key=str.lower):
        found = {device: column[name] for device, column in columns.items() if name in column}
        skipped = [
            f"{device}, {count}: {reason}" for device, row in found.items() for reason, count in row["skipped"].items()
        ]
        cells = [outcome(found[device]) if device in found else "" for device in columns]
        rows.append([name, *cells, "; ".join(skipped)])
    conditions = [
        "A cell has the number of tests, and is empty where none wants these devices. Tiny models with random weights.",
        *(f"{device}{named(report)}: {software(report)}." for device, report in reports.items()),
    ]
    return table(["together with", *columns, "tests not run"], rows) + "\n\n" + " ".join(conditions)


def outcome(row: dict[str, Any]) -> str:
    passed, failed = row["passed"], len(row["failed"])
    if row["outcome"] == "red":
        return f"red, {failed} of {passed + failed} failed"
    return f"green, {passed}" if row["outcome"] == "green" else row["outcome"]


def named(report: dict[str, Any]) -> str:
    return "" if report["gpu"].startswith("none") else f" ({report['gpu']})"


def software(report: dict[str, Any]) -> str:
    versions = [f"{name} {found}" for name, found in report["versions"].items() if found and name != "threads"]
    return f"{', '.join(versions)}; commit {report['commit']}"
