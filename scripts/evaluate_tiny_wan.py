"""Measures the finished tiny Wan folder through the stock pipeline: prompts, VAE fidelity, contact sheet."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from tiny_report import decibel, describe_pipeline, judge, rates, read_back, requests
from tiny_world import render, sample_scene
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """How much to measure. `rows` are the contact sheet's prompts with frames, height and width."""

    prompts: int
    frames: int
    size: int
    steps: int
    guidance: float
    batch: int
    vae_frames: tuple[int, ...]
    vae_clips: int
    rows: tuple[tuple[str, int, int, int], ...]


def evaluate(folder: Path, results: Path, plan: Evaluation, seed: int, device: torch.device, record: dict) -> dict:
    """Writes `tiny-wan-eval.json` and `tiny-wan-contact-sheet.png` into `results`.

    Args:
        record: what the training stages noted; goes into the file as it is.
    """
    began = time.perf_counter()
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    report = {
        "seed": seed,
        "settings": {
            "steps": plan.steps,
            "guidance": plan.guidance,
            "frames": plan.frames,
            "size": plan.size,
        },
        **describe_pipeline(pipe, folder),
        "training": record,
        "vae": _vae(pipe.vae, plan, seed),
    }
    log.info("VAE: %s", report["vae"])
    stock = pipe.scheduler
    report["prompts"] = {type(stock).__name__: _prompts(pipe, plan, seed)}
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=stock.config.flow_shift)
    report["prompts"]["FlowMatchEulerDiscreteScheduler"] = _prompts(pipe, plan, seed)
    pipe.scheduler = stock
    log.info("prompts: %s", {name: part["rates"] for name, part in report["prompts"].items()})
    _contact_sheet(pipe, plan, seed, results / "tiny-wan-contact-sheet.png")
    report["seconds"] = round(time.perf_counter() - began, 1)
    (results / "tiny-wan-eval.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _generate(
    pipe: WanPipeline, prompts: Sequence[str], frames: int, size: tuple[int, int], plan: Evaluation, seed: int
) -> Tensor:
    """`[prompts, 3, frames, height, width]` in [-1, 1]; the seed counts up with the prompts."""
    device = pipe.transformer.device
    video = pipe(
        list(prompts),
        height=size[0],
        width=size[1],
        num_frames=frames,
        num_inference_steps=plan.steps,
        guidance_scale=plan.guidance,
        generator=[torch.Generator(device).manual_seed(seed + index) for index in range(len(prompts))],
        output_type="pt",
    ).frames
    return video.transpose(1, 2) * 2 - 1


def _prompts(pipe: WanPipeline, plan: Evaluation, seed: int) -> dict:
    """Rates of obeyed prompts and every single verdict."""
    asked = requests(plan.prompts)
    verdicts = []
    for first in range(0, len(asked), plan.batch):
        chunk = asked[first : first + plan.batch]
        size = (plan.size, plan.size)
        videos = _generate(pipe, [item.prompt for item in chunk], plan.frames, size, plan, seed + first)
        verdicts += [judge(item, video) for item, video in zip(chunk, videos, strict=True)]
    return {"rates": rates(verdicts), "verdicts": verdicts}


@torch.no_grad()
def _vae(vae: AutoencoderKLWan, plan: Evaluation, seed: int) -> dict:
    """PSNR of the stock chunked code on unseen clips, and how well true and rebuilt clips are read back."""
    generator = torch.Generator().manual_seed(seed + 1)
    fidelity = {}
    for frames in plan.vae_frames:
        video, coverage = render(sample_scene(plan.vae_clips, frames, plan.size, plan.size, generator), vae.device)
        rebuilt = vae.decode(vae.encode(video).latent_dist.mode()).sample
        # Peak to peak is 2, so a squared error of 4 is 0 dB.
        error = (rebuilt - video).square()
        whole, last = error.mean((1, 2, 3, 4)), error[:, :, -4:].mean((1, 2, 3, 4))
        objects = (error * coverage).sum() / (3 * coverage.sum())
        fidelity[str(frames)] = {
            "psnr": decibel(whole),
            "psnr_last_frames": decibel(last),
            "psnr_objects": decibel(objects[None]),
        }
    scene = sample_scene(plan.prompts, plan.frames, plan.size, plan.size, generator)
    video, _ = render(scene, vae.device)
    rebuilt = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in video.split(8)])
    return {
        "psnr_by_frames": fidelity,
        "read_back_true": read_back(scene, video),
        "read_back_rebuilt": read_back(scene, rebuilt),
    }


def _contact_sheet(pipe: WanPipeline, plan: Evaluation, seed: int, path: Path) -> None:
    """Six frames of every row's clip, the prompt above them."""
    figure, axes = plt.subplots(len(plan.rows), 1, figsize=(7, 1.4 * len(plan.rows)), squeeze=False)
    for axis, (prompt, frames, height, width) in zip(axes[:, 0], plan.rows, strict=True):
        video = _generate(pipe, [prompt], frames, (height, width), plan, seed)[0]
        shown = torch.linspace(0, video.shape[1] - 1, 6).round().long().tolist()
        strip = torch.cat([torch.nn.functional.pad(video[:, frame], (0, 4), value=1) for frame in shown], 2)
        axis.imshow(((strip.permute(1, 2, 0).clamp(-1, 1) + 1) / 2).float().cpu().numpy())
        note = "" if (frames, height, width) == (plan.frames, plan.size, plan.size) else f" ({frames}x{height}x{width})"
        axis.set_title(prompt + note, fontsize=8, pad=3)
        axis.axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=100)
    plt.close(figure)
