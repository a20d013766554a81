"""Results as tables on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def comparison(report: dict[str, Any], folder: Path) -> None:
    """The table of `fastdiff compare`, a verdict, and where the files are."""
    out = Console(highlight=False)
    text = f" and {report['text_tokens']} of text" if report["text_tokens"] else ""
    title = f"{report['model']}: {size(report)}, {report['tokens']} tokens{text}, {report['steps']} steps, "
    title += f"{report['device']} {report['dtype']}"
    table = Table()
    table.add_column("")
    for name in ("dense", report["method"], "gain"):
        table.add_column(name, justify="right")
    alone = report["attention"]
    table.add_row("density", "1", f"{report['density']:.3f}", "")
    if report["mean_density"] != report["density"]:
        table.add_row("density, mean over steps and layers", "1", f"{report['mean_density']:.3f}", "")
    rows = (
        ("whole run, s", report["seconds_dense"], report["seconds_sparse"], "{:.2f}"),
        ("sparse denoising step, s", report["seconds_per_step_dense"], report["seconds_per_step_sparse"], "{:.3f}"),
        ("attention alone, ms", 1e3 * alone["dense"]["median"], 1e3 * alone["sparse"]["median"], "{:.1f}"),
    )
    for name, dense, sparse, form in rows:
        table.add_row(name, form.format(dense), form.format(sparse), f"{dense / sparse:.2f}x")
    same = report["identical"]
    table.add_row("PSNR against dense, dB", "", "identical" if same else f"{report['psnr']:.1f}", "")
    table.add_row("SSIM against dense", "", f"{report['ssim']:.3f}", "")
    out.print(title, markup=False)
    out.print(table)
    out.print(verdict(report), markup=False)
    videos = ("side_by_side.mp4", "frames.png", "report.json", "dense.mp4", "sparse.mp4")
    files = videos if report["fps"] else ("side_by_side.png", "report.json", "dense.png", "sparse.png")
    out.print(f"Results in {folder}: {', '.join(files)}", markup=False)
    calibration = report["config"].get("calibration")
    if calibration:
        out.print(f"Calibration in {calibration}; --config takes it for other prompts and seeds.", markup=False)


def size(report: dict[str, Any]) -> str:
    """Of what was made: "65 frames of 128x128", or "512x512" for a picture."""
    pixels = f"{report['width']}x{report['height']}"
    return f"{report['num_frames']} frames of {pixels}" if report["fps"] else f"a picture of {pixels}"


def verdict(report: dict[str, Any]) -> str:
    """One line: what sparse attention brought here."""
    gain = report["speedup"]
    pays = f"{gain:.2f}x as fast end to end" if gain > 1.02 else f"no faster end to end here ({gain:.2f}x)"
    # The whole runs are one sample each, and the first thing that a busy machine spoils.
    step = report["seconds_per_step_dense"] / report["seconds_per_step_sparse"]
    fidelity = "bit-identical" if report["identical"] else f"{report['psnr']:.1f} dB, SSIM {report['ssim']:.3f}"
    if report["density"] >= 1:
        pays = "saves nothing, all scores are computed on this grid"
    return (
        f"{report['method'].capitalize()} at density {report['density']:.2f}: {pays}, a sparse step {step:.2f}x, "
        f"attention alone {report['attention_speedup']:.2f}x; {fidelity} against dense."
    )


def pairs(title: str, rows: dict[str, str]) -> None:
    """A two-column table."""
    out = Console(highlight=False)
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    out.print(table)


def lines(title: str, cells: list[list[str]]) -> None:
    """A table of right-aligned columns, its head first."""
    out = Console(highlight=False)
    table = Table(title=title, title_justify="left")
    for name in cells[0]:
        table.add_column(name, justify="right", no_wrap=True)
    for line in cells[1:]:
        table.add_row(*line)
    out.print(table)
