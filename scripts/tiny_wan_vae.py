"""Trains the tiny Wan VAE on whole clips of the tiny world and measures its latents; it writes no file."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from causal_vae import WholeClip
from diffusers import AutoencoderKLWan
from tiny_world import render, sample_scene
from torch import Tensor
from train_loop import Fit, Rate, fit, optimiser

OBJECT_WEIGHT = 6.0
KL_WEIGHT = 1e-4


@dataclass(frozen=True)
class Phase:
    """One stretch of VAE training. Short clips are cheap and teach the picture, long ones teach not to drift.

    Attributes:
        sizes: (height, width) pairs, taken in turn, the first one `repeat` times as often as each other.
        share: part of a time limit, if there is one.
    """

    frames: int
    batch: int
    iterations: int
    rate: Rate
    share: float
    sizes: tuple[tuple[int, int], ...] = ((128, 128),)
    repeat: int = 8


def train_vae(
    vae: AutoencoderKLWan,
    phases: Sequence[Phase],
    seed: int,
    compiled: bool,
    seconds: float | None = None,
) -> list[Fit]:
    """Trains `vae` in place, phase after phase with one optimiser."""
    whole = WholeClip(vae, compiled)
    adam = optimiser([vae], betas=(0.9, 0.99), decay=1e-3)
    dice = torch.Generator().manual_seed(seed)
    vae.train()
    fits = []
    for phase in phases:
        sizes = [phase.sizes[0]] * phase.repeat + list(phase.sizes[1:])
        turn = 0

        def step(phase: Phase = phase, sizes: list[tuple[int, int]] = sizes) -> Tensor:
            nonlocal turn
            height, width = sizes[turn % len(sizes)]
            turn += 1
            scene = sample_scene(phase.batch, phase.frames, height, width, dice)
            return _loss(whole, *render(scene, vae.device))

        limit = seconds * phase.share if seconds else None
        fits.append(fit(f"vae, {phase.frames} frames", adam, step, phase.iterations, phase.rate, seconds=limit))
    vae.eval()
    return fits


def _loss(whole: WholeClip, video: Tensor, coverage: Tensor) -> Tensor:
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        mean, log_variance = whole.encode(video)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        error = whole.decode(latents) - video
    weight = 1 + OBJECT_WEIGHT * coverage
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * divergence


@torch.no_grad()
def measure_latents(
    vae: AutoencoderKLWan, frames: int, height: int, width: int, batches: int, seed: int
) -> tuple[list[float], list[float]]:
    """Mean and deviation of each latent channel over `batches` batches of eight random clips."""
    whole = WholeClip(vae)
    dice = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(batches):
        video, _ = render(sample_scene(8, frames, height, width, dice), vae.device)
        means.append(whole.encode(video)[0].transpose(0, 1).flatten(1))
    deviation, mean = torch.std_mean(torch.cat(means, 1), dim=1)
    return mean.tolist(), deviation.tolist()
