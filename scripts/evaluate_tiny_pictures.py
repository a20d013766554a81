"""Measures a finished picture folder through the stock pipeline: prompts, VAE fidelity, contact sheet."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from tiny_report import decibel, describe_pipeline, judge, rates, read_back, requests
from tiny_world import render, sample_scene
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)

SHEET = (
    "a red circle",
    "a green square over a striped ground",
    "a blue triangle over a checkered ground",
    "a yellow ring over a gradient ground",
    "a purple cross over a grey ground",
    "an orange circle and a blue square",
    "a cyan triangle and a white ring",
    "a white cross and a red triangle",
)


@dataclass(frozen=True)
class Variant:
    """One way to call the pipeline, and how many prompts are measured so; `batch` are generated at once."""

    name: str
    height: int
    width: int
    guidance: float
    prompts: int
    batch: int
    text_tokens: int
    steps: int


@dataclass(frozen=True)
class Evaluation:
    """How much to measure. The contact sheet has one column for each variant and the first `sheet` prompts."""

    variants: tuple[Variant, ...]
    vae_sizes: tuple[int, ...]
    vae_pictures: int
    sheet: int = len(SHEET)


def evaluate(
    name: str,
    arguments: Callable[[list[str], float, int], dict],
    folder: Path,
    results: Path,
    plan: Evaluation,
    seed: int,
    device: torch.device,
    record: dict,
) -> dict:
    """Writes `NAME-eval.json` and `NAME-contact-sheet.png` into `results`.

    Args:
        arguments: prompts, guidance and text length to the pipeline's further arguments.
        record: what the training stages noted; goes into the file as it is.
    """
    began = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    report = {
        "seed": seed,
        **describe_pipeline(pipe, folder),
        "training": record,
        "vae": _vae(pipe.vae, plan, seed),
        "prompts": {},
    }
    log.info("VAE: %s", report["vae"])
    columns = []
    for variant in plan.variants:
        asked = requests(variant.prompts, motion=False)
        pictures = _generate(pipe, arguments, [item.prompt for item in asked], variant, seed)
        verdicts = [judge(item, picture[:, None]) for item, picture in zip(asked, pictures, strict=True)]
        settings = {key: value for key, value in vars(variant).items() if key != "name"}
        report["prompts"][variant.name] = {"settings": settings, "rates": rates(verdicts), "verdicts": verdicts}
        log.info("%s: %s", variant.name, report["prompts"][variant.name]["rates"])
        columns.append(_generate(pipe, arguments, SHEET[: plan.sheet], variant, seed))
    _contact_sheet(columns, plan, results / f"{name}-contact-sheet.png")
    report["seconds"] = round(time.perf_counter() - began, 1)
    (results / f"{name}-eval.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _generate(
    pipe: DiffusionPipeline,
    arguments: Callable[[list[str], float, int], dict],
    prompts: Sequence[str],
    variant: Variant,
    seed: int,
) -> list[Tensor]:
    """Pictures `[3, height, width]` in [-1, 1]; the seed counts up with the prompts."""
    pictures = []
    for first in range(0, len(prompts), variant.batch):
        chunk = list(prompts[first : first + variant.batch])
        images = pipe(
            **arguments(chunk, variant.guidance, variant.text_tokens),
            height=variant.height,
            width=variant.width,
            num_inference_steps=variant.steps,
            generator=[torch.Generator(pipe.device).manual_seed(seed + first + index) for index in range(len(chunk))],
            output_type="pt",
        ).images
        pictures += list((images * 2 - 1).float().cpu())
    return pictures


@torch.no_grad()
def _vae(vae: AutoencoderKL, plan: Evaluation, seed: int) -> dict:
    """PSNR on unseen pictures, how white the latents are, and how well true and rebuilt pictures are read back."""
    generator = torch.Generator().manual_seed(seed + 1)
    fidelity = {}
    for size in plan.vae_sizes:
        scene = sample_scene(plan.vae_pictures, 1, size, size, generator)
        video, coverage = render(scene, vae.device)
        latents = torch.cat([vae.encode(part[:, :, 0]).latent_dist.mode() for part in video.split(8)])
        rebuilt = torch.cat([vae.decode(part).sample for part in latents.split(8)])[:, :, None]
        # Peak to peak is 2, so a squared error of 4 is 0 dB.
        error = (rebuilt - video).square()
        objects = (error * coverage).sum() / (3 * coverage.sum())
        deviation, mean = torch.std_mean(latents.transpose(0, 1).flatten(1), dim=1)
        fidelity[str(size)] = {
            "psnr": decibel(error.mean((1, 2, 3, 4))),
            "psnr_objects": decibel(objects[None]),
            "largest_channel_mean": round(float(mean.abs().max()), 3),
            "channel_deviations": [round(float(deviation.min()), 3), round(float(deviation.max()), 3)],
            "read_back_true": read_back(scene, video),
            "read_back_rebuilt": read_back(scene, rebuilt),
        }
    return fidelity


def _contact_sheet(columns: list[list[Tensor]], plan: Evaluation, path: Path) -> None:
    """A row for each prompt, a column for each variant."""
    figure, axes = plt.subplots(
        plan.sheet, len(columns), figsize=(1.9 * len(columns), 1.55 * plan.sheet), squeeze=False
    )
    for row in range(plan.sheet):
        for column, pictures in enumerate(columns):
            axis = axes[row, column]
            axis.imshow(((pictures[row].permute(1, 2, 0).clamp(-1, 1) + 1) / 2).numpy())
            axis.axis("off")
            if not row:
                axis.set_title(plan.variants[column].name, fontsize=8)
        axes[row, 0].text(0, -0.04, SHEET[row], fontsize=7, va="top", transform=axes[row, 0].transAxes)
    figure.tight_layout(pad=0.5)
    figure.savefig(path, dpi=75)
    plt.close(figure)
