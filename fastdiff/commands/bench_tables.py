"""The tables of `fastdiff bench` on stdout, one for each shape or model."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table


def kernels(shape: Any, records: list[dict[str, Any]], missing: dict[str, str]) -> None:
    """The kernels on one shape, each against the fastest dense one that ran."""
    from fastdiff.bench.kernels import REORDER
    from fastdiff.bench.record import moved_bytes

    title = f"{shape.name}: {shape.what}, {shape.tokens} tokens, {shape.heads} heads of {shape.head_dim}"
    table = _table(title, "kernel", "density", "ms (spread)", "against dense", "TF/s")
    for one in records:
        dense = fastest_dense(one, records)
        rate = f"{one['tflops']:.4g}"
        if one["kernel"] == REORDER:
            dense, rate = None, f"{moved_bytes(one) / one['milliseconds'] / 1e6:.0f} GB/s"
        table.add_row(
            one["kernel"] + (", backward" if one["direction"] == "backward" else ""),
            f"{one['density']:.3f}",
            f"{one['milliseconds']:.3f} ({one['spread']:.3f})",
            f"{dense / one['milliseconds']:.2f}x" if dense else "",
            rate,
        )
    _show(table, missing)


def fastest_dense(record: dict[str, Any], records: list[dict[str, Any]]) -> float | None:
    """Milliseconds of the fastest dense kernel of others in the same direction, None if none ran."""
    from fastdiff.bench.rivals import DENSE

    alike = (one for one in records if one["kernel"] in DENSE and one["direction"] == record["direction"])
    return min((one["milliseconds"] for one in alike), default=None)


def models(architecture: Any, records: list[dict[str, Any]], missing: dict[str, str]) -> None:
    """One model: dense and by each method, eager and compiled, against diffusers as it comes."""
    from fastdiff.bench.breakdown import PARTS

    title = f"{architecture.name}: {architecture.what}"
    if records:
        one = records[0]
        title += f", {one['tokens']} tokens, {one['layers']} layers, {one['layers_timed']} timed"
    table = _table(title, "attention", "blocks", "density", "ms", "against default", "peak GiB", *PARTS, "plan ms")
    for one in records:
        table.add_row(
            one["attention"],
            one["mode"],
            f"{one['density']:.3f}",
            f"{one['milliseconds']:.0f} ({one['spread']:.0f})",
            f"{records[0]['milliseconds'] / one['milliseconds']:.2f}x",
            f"{one['peak_gib']:.1f}",
            *(f"{one['breakdown'][part]:.0f}" for part in PARTS),
            f"{one['plan_milliseconds']:.0f}" if one["plan_milliseconds"] is not None else "",
        )
    _show(table, missing)


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first)
    for name in others:
        table.add_column(name, justify="right")
    return table


def _show(table: Table, missing: dict[str, str]) -> None:
    out = Console(highlight=False)
    out.print(table)
    for name, reason in missing.items():
        out.print(f"{name}: {reason}", markup=False)
