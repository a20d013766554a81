"""What the evaluations of all embedded pipelines share: requests, rates, fidelity, loss curves; it runs no pipeline."""

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import diffusers
import matplotlib
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline
from tiny_world import COLOURS, GROUNDS, HEADINGS, MOTIONS, PAIRED, SHAPES, Scene
from tiny_world_recover import recover
from torch import Tensor, nn

matplotlib.use("Agg")
from matplotlib import pyplot as plt


@dataclass(frozen=True)
class Request:
    """A prompt and what it asks for; None where it does not say, or where it is not measured."""

    prompt: str
    colours: frozenset[str]
    shape: str | None = None
    direction: str | None = None


def describe_pipeline(pipe: DiffusionPipeline, folder: Path) -> dict:
    """Versions, card, bytes and parameters, for the head of a report."""
    device = pipe.device
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "parameters": {
            name: sum(parameter.numel() for parameter in part.parameters())
            for name, part in pipe.components.items()
            if isinstance(part, nn.Module)
        },
    }


def requests(count: int, motion: bool = True) -> list[Request]:
    """A fixed list that walks through colours, shapes and headings; every fourth prompt has two objects.

    Args:
        motion: False for still pictures: every second prompt tells the ground instead of a heading.
    """
    colours, headings = list(COLOURS), list(HEADINGS)[:4]
    listed = []
    for index in range(count):
        colour, shape = colours[index % 8], SHAPES[index % len(SHAPES)]
        first = f"{'an' if colour == 'orange' else 'a'} {colour} {shape}"
        if index % 4 < 3:
            heading = headings[(index // 3) % 4] if motion else None
            look = f" over a {GROUNDS[(index // 2) % 4]} ground" if index % 2 else ""
            text = f"{first} moving {heading}" if motion else first + look
            listed.append(Request(text, frozenset([colour]), shape, heading))
            continue
        other = colours[(index + 2 + index // 8) % 8 if (2 + index // 8) % 8 else (index + 1) % 8]
        second = f"{'an' if other == 'orange' else 'a'} {other} {SHAPES[(index + 2) % len(SHAPES)]}"
        if motion:
            text = f"{first} passing behind {second}" if index % 8 == 7 else f"{first} and {second} colliding"
        else:
            text = f"{first} and {second}"
        listed.append(Request(text, frozenset([colour, other])))
    return listed


def judge(item: Request, video: Tensor) -> dict:
    """What a clip or picture `[3, frames, height, width]` shows, and whether it is what was asked for."""
    seen = recover(video)
    return {
        "prompt": item.prompt,
        "colours": sorted(seen.colours),
        "colour_right": seen.colours == item.colours,
        "shape": seen.shape,
        "shape_right": None if item.shape is None else seen.shape == item.shape,
        "direction": seen.direction,
        "direction_right": None if item.direction is None else seen.direction == item.direction,
    }


def rates(verdicts: Sequence[dict]) -> dict[str, float]:
    """Shares of obeyed prompts: colour and shape of single objects, their direction, both colours of pairs."""
    kinds = {
        "colour": [verdict["colour_right"] for verdict in verdicts if verdict["shape_right"] is not None],
        "shape": [verdict["shape_right"] for verdict in verdicts if verdict["shape_right"] is not None],
        "direction": [verdict["direction_right"] for verdict in verdicts if verdict["direction_right"] is not None],
        "pair_colours": [verdict["colour_right"] for verdict in verdicts if verdict["shape_right"] is None],
    }
    return {name: round(sum(right) / len(right), 4) for name, right in kinds.items() if right}


def decibel(error: Tensor) -> float:
    return round(float((10 * torch.log10(4 / error.clamp(min=1e-12))).mean()), 2)


def read_back(scene: Scene, video: Tensor) -> dict:
    """How often `recover` tells the truth about drawn clips."""
    verdicts: dict[str, list[bool]] = {"colours": [], "shape": [], "direction": []}
    for index in range(len(scene)):
        seen, kind = recover(video[index]), list(MOTIONS)[scene.motion[index]]
        items = 2 if kind in PAIRED else 1
        verdicts["colours"].append(seen.colours == {list(COLOURS)[scene.colour[index, item]] for item in range(items)})
        if items == 1:
            verdicts["shape"].append(seen.shape == SHAPES[scene.shape[index, 0]])
        if kind == "moving" and video.shape[2] > 1:
            verdicts["direction"].append(seen.direction == list(HEADINGS)[scene.heading[index]])
    return {name: round(float(np.mean(values)), 4) for name, values in verdicts.items() if values}


def draw_losses(name: str, losses: dict[str, list[tuple[int, float]]], results: Path) -> None:
    """Writes `NAME-loss.json` and `NAME-loss.png`, one panel for each stage."""
    (results / f"{name}-loss.json").write_text(json.dumps(losses) + "\n")
    figure, axes = plt.subplots(1, len(losses), figsize=(3.2 * len(losses), 2.8), squeeze=False)
    for axis, (stage, curve) in zip(axes[0], losses.items(), strict=True):
        axis.plot(*zip(*curve, strict=True))
        axis.set(title=stage, yscale="log", xlabel="iteration")
    figure.tight_layout()
    figure.savefig(results / f"{name}-loss.png", dpi=110)
    plt.close(figure)
