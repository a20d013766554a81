"""Draws results/fidelity.png from the data of results/fidelity.json: density against PSNR, a panel a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

COLOURS = {
    "radial": "#2f6690",
    "neighborhood": "#f4a259",
    "clear": "#3a9d6e",
    "paro": "#8e5aa8",
    "agent": "#c8403a",
    "agent, early": "#e59a96",
}


def draw(data: dict[str, Any], path: Path) -> None:
    """Writes the picture.

    Args:
        data: What fidelity.json holds.
        path: A .png file.
    """
    found = {model: part for model, part in data["pipelines"].items() if "other_seed" in part}
    figure = Figure(figsize=(4.3 * max(1, len(found)), 3.9), dpi=110, layout="constrained")
    panels = figure.subplots(1, max(1, len(found)), squeeze=False)[0]
    for panel, (model, part) in zip(panels, found.items(), strict=False):
        _panel(panel, model, part)
    handles = {name: line for panel in panels for line, name in zip(*panel.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path)


def _panel(panel: Any, model: str, part: dict[str, Any]) -> None:
    measured = [cell for cell in part["cells"] if "psnr" in cell]
    for label, share in dict.fromkeys((cell["label"], cell["dense_share"]) for cell in measured):
        line = sorted(
            (cell["density"], cell["psnr"]["mean"])
            for cell in measured
            if (cell["label"], cell["dense_share"]) == (label, share)
        )
        style = "-" if share else "--"
        dense = f"first {100 * share:.0f} % of steps dense" if share else "no dense steps"
        name = label if label.endswith("early") else f"{label}, {dense}"
        panel.plot(*zip(*line, strict=True), style, marker="o", markersize=3.5, color=COLOURS.get(label), label=name)
    yardstick = part["other_seed"]["psnr"]["mean"]
    panel.axhline(yardstick, color="grey", linewidth=1, linestyle=":", label="dense, other seeds")
    size = f"{part['height']}×{part['width']}"
    frames = f"{part['num_frames']} frames of " if part["num_frames"] > 1 else ""
    panel.set(title=f"{model}, {frames}{size}", xlabel="density of the sparse steps", ylabel="PSNR against dense, dB")
    panel.title.set_fontsize(10)
    panel.set_xlim(left=0, right=1.05 * panel.get_xlim()[1])
    panel.grid(alpha=0.3)
