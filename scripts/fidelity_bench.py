"""One embedded pipeline under test: its dense samples, its samples under a method, and how far apart they are."""

from __future__ import annotations

import statistics
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tiny_report import judge, requests

from fastdiff.commands import pipelines, running, sizes
from fastdiff.commands.attention import SparseAttention, calibrated, sparse_attention
from fastdiff.commands.options import Request
from fastdiff.measure import quality
from fastdiff.methods import METHODS

CALIBRATION_PROMPTS = 2
# What PSNR counts for where two samples are equal.
MOST_DECIBEL = 99.0


@dataclass(frozen=True)
class Entry:
    """A method with what a density leaves open.

    Attributes:
        label: What tables and plots call it.
        shares: Shares of dense steps that it is run with, if not all of the plan's.
    """

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    shares: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        sizes: Options of each pipeline: frames, height, width.
        densities: What the settings are solved for.
        shares: Shares of the steps, from the first on, that stay dense.
    """

    sizes: dict[str, dict[str, int]]
    densities: tuple[float, ...]
    shares: tuple[float, ...]
    steps: int
    prompts: int


class Bench:
    """One pipeline at one size, with its dense samples.

    Args:
        model: Name of an embedded pipeline.
        plan: Sizes, steps and prompts.
        seed: Of the first prompt; it counts up with them.
        device: As `--device` has it.
    """

    def __init__(self, model: str, plan: Plan, seed: int, device: str):
        blank = dict.fromkeys(Request.__dataclass_fields__)
        kept = {"model": model, "method": "dense", "dense_layers": 0, "device": device, "dtype": "auto", "seed": seed}
        self.request = Request(**{**blank, **kept, "steps": plan.steps, **plan.sizes[model]})
        self.pipe, self.job = pipelines.prepare(self.request)
        self.layer = sizes.finest_layer(self.pipe, self.job.grid, self.job.text_tokens)
        self.prompts = requests(plan.prompts, motion=self.job.is_video)
        self.dense = self.samples(seed)

    def samples(self, seed: int) -> list[torch.Tensor]:
        """A clip or picture `[frames, 3, height, width]` in [0, 1] for each prompt, all made in one batch."""
        texts = [item.prompt for item in self.prompts]
        made = running.call(
            self.pipe,
            self.job,
            prompt=texts,
            # One for each prompt: a string would be taken for a batch of one.
            **{name: [text] * len(texts) for name, text in self.job.call.items() if name == "negative_prompt"},
            generator=[torch.Generator().manual_seed(seed + index) for index in range(len(texts))],
            output_type="pt",
        )
        batch = made.frames if self.job.is_video else made.images[:, None]
        return list(batch.float().clamp(0, 1))

    def recovery(self, samples: list[torch.Tensor]) -> dict[str, float]:
        """Share of prompts of which all that is measured is right (colours, shape, direction), and of each alone."""
        pairs = zip(self.prompts, samples, strict=True)
        verdicts = [judge(item, sample.transpose(0, 1) * 2 - 1) for item, sample in pairs]
        names = ("colour", "shape", "direction")
        marks = [{name: verdict[f"{name}_right"] for name in names} for verdict in verdicts]
        # A still picture moves nowhere, and a pair of objects has no one shape: None is no mistake.
        found = {"recovered": statistics.fmean(False not in mark.values() for mark in marks)}
        for name in names:
            asked = [mark[name] for mark in marks if mark[name] is not None]
            if asked:
                found[name] = statistics.fmean(asked)
        return found

    def measure(self, samples: list[torch.Tensor]) -> dict[str, Any]:
        """Fidelity to the dense samples, and how many prompts are still obeyed."""
        pairs = list(zip(samples, self.dense, strict=True))
        return {
            "psnr": spread([min(quality.psnr(*pair), MOST_DECIBEL) for pair in pairs]),
            "ssim": spread([quality.ssim(*pair) for pair in pairs]),
            **self.recovery(samples),
        }

    def config(self, entry: Entry, density: float, folder: Path) -> Any:
        """The method's config for a density; PARO's is calibrated on other prompts, its file kept in `folder`.

        Raises:
            InvalidInputError: If this size does not allow the density.
        """
        if entry.method == "paro":
            path = folder / f"{self.request.model}-{density:g}.safetensors"
            return calibrated(self.pipe, self.job, density, self.calibration_prompts(), path)
        kind, grid = METHODS[entry.method], self.layer.layout.grid
        return kind.for_density(density, grid, text_tokens=self.job.text_tokens, **entry.settings)

    def calibration_prompts(self) -> list[str]:
        """Prompts that are not among the measured ones."""
        measured = {item.prompt for item in self.prompts}
        more = requests(len(measured) + 8 * CALIBRATION_PROMPTS, motion=self.job.is_video)
        return [item.prompt for item in reversed(more) if item.prompt not in measured][:CALIBRATION_PROMPTS]

    def attention(self, config: Any, share: float) -> AbstractContextManager[SparseAttention]:
        """A config at work, with a share of the steps dense."""
        request = replace(self.request, dense_steps=round(share * self.job.steps))
        return sparse_attention(self.pipe, request, self.job, config)

    def conditions(self) -> dict[str, Any]:
        """The size, and what it means for attention."""
        names = ("height", "width", "num_frames", "guidance_scale", "text_tokens")
        return {
            **{name: getattr(self.job, name) for name in names},
            "grid": str(self.job.grid),
            "finest_grid": str(self.layer.layout.grid),
            "heads": self.layer.heads,
            "head_dim": self.layer.head_dim,
            "dtype": str(sizes.core(self.pipe).dtype).removeprefix("torch."),
        }


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation over prompts."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}
