"""Measures the latents of the tiny Wan VAE, by which they are normalised; it writes no file."""

import torch
from causal_vae import WholeClip
from diffusers import AutoencoderKLWan
from tiny_world import render, sample_scene


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
