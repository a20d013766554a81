"""The whole-clip forward of the tiny VAE equals diffusers' chunked one."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from causal_vae import WholeClip
from diffusers import AutoencoderKLWan


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    model = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights of one and zero biases would hide a mistake.
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("frames", [1, 5, 17, 33])
def test_whole_clip_equals_chunks(vae: AutoencoderKLWan, frames: int) -> None:
    video = torch.rand(2, 3, frames, 24, 32) * 2 - 1
    whole = WholeClip(vae)
    with torch.no_grad():
        expected = vae.encode(video).latent_dist
        mean, log_variance = whole.encode(video)
        torch.testing.assert_close(mean, expected.mean, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(log_variance, expected.logvar, atol=1e-4, rtol=1e-4)
        pixels = whole.decode(expected.mean).clamp(-1, 1)
        torch.testing.assert_close(pixels, vae.decode(expected.mean).sample, atol=1e-4, rtol=1e-4)


def test_gradients_reach_every_parameter(vae: AutoencoderKLWan) -> None:
    whole = WholeClip(vae)
    mean, log_variance = whole.encode(torch.rand(1, 3, 5, 16, 16))
    (whole.decode(mean).square().mean() + log_variance.mean()).backward()
    assert all(parameter.grad is not None for parameter in vae.parameters())
    vae.zero_grad()


def test_other_forms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Wan 2\.1"):
        WholeClip(AutoencoderKLWan(base_dim=8, num_res_blocks=1, patch_size=2, in_channels=12, out_channels=12))
