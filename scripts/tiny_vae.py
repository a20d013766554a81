"""Trains the VAE of an embedded pipeline on clips or pictures of the tiny world; it writes no file."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers.models.modeling_utils import ModelMixin
from tiny_world import render, sample_scene
from torch import Tensor
from train_loop import Fit, Rate, advance, fit, optimiser

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

    @property
    def label(self) -> str:
        height, width = self.sizes[0]
        return f"vae, {self.frames} frames {height}x{width}"


class Codec(Protocol):
    """A VAE as the loss sees it: clips `[batch, 3, frames, height, width]` in and out."""

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of the latents."""


def train_vae(
    vae: ModelMixin,
    codec: Codec,
    phases: Sequence[Phase],
    seed: int,
    seconds: float | None = None,
) -> list[Fit]:
    """Trains `vae`, which `codec` calls, in place: phase after phase with one optimiser."""
    adam = optimiser([vae], betas=(0.9, 0.99), decay=1e-3)
    dice = torch.Generator().manual_seed(seed)
    vae.train()
    fits = []
    for phase in phases:
        sizes = [phase.sizes[0]] * phase.repeat + list(phase.sizes[1:])
        turn = 0

        def loss(phase: Phase = phase, sizes: list[tuple[int, int]] = sizes) -> Tensor:
            nonlocal turn
            height, width = sizes[turn % len(sizes)]
            turn += 1
            scene = sample_scene(phase.batch, phase.frames, height, width, dice)
            return _loss(codec, *render(scene, vae.device))

        limit = seconds * phase.share if seconds else None
        fits.append(
            fit(
                phase.label, adam, lambda _, loss=loss: advance(adam, loss), phase.iterations, phase.rate, seconds=limit
            )
        )
    vae.eval()
    return fits


def _loss(codec: Codec, video: Tensor, coverage: Tensor) -> Tensor:
    with torch.autocast(video.device.type, torch.bfloat16, enabled=video.is_cuda):
        mean, log_variance = codec.encode(video)
        latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        error = codec.decode(latents) - video
    weight = 1 + OBJECT_WEIGHT * coverage
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return (weight * (error.abs() + error.square())).mean() + KL_WEIGHT * divergence
