"""The picture pipelines' training: white latents, a loss that reaches every part, a folder that loads and draws."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from diffusers import AutoencoderKL, DiffusionPipeline
from tiny_folder import cast, write_pipeline
from tiny_picture_settings import FULL, SMOKE
from tiny_picture_vae import PictureCodec, new_vae, whiten
from tiny_pictures import cache_pictures
from tiny_report import judge, requests
from tiny_world import render, sample_scene


def _vae(latent_channels: int, shift: float | None) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = new_vae((8, 8, 16), latent_channels, shift).eval()
    with torch.no_grad():
        # Fresh latents are nearly white already, which would hide a mistake.
        vae.quant_conv.weight.mul_(3)
        vae.quant_conv.bias.add_(1.5)
    return vae


@torch.no_grad()
def test_whitening_changes_latents_and_no_pixel() -> None:
    vae = _vae(4, None)
    codec = PictureCodec(vae)
    video, _ = render(sample_scene(8, 1, 48, 48, torch.Generator().manual_seed(3)))
    mean, log_variance = codec.encode(video)
    before = codec.decode(mean)
    noise = (0.5 * log_variance).exp() / mean.std((0, 2, 3), keepdim=True)
    whiten(vae, 48, 8, seed=0)
    mean, log_variance = codec.encode(video)
    torch.testing.assert_close(codec.decode(mean), before, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close((0.5 * log_variance).exp() / mean.std((0, 2, 3), keepdim=True), noise)
    assert (mean.mean((0, 2, 3)).abs() < 0.5).all()
    assert ((mean.std((0, 2, 3)) - 1).abs() < 0.5).all()


@pytest.mark.parametrize("name", list(FULL))
def test_loss_reaches_every_part_and_the_folder_draws(name: str, tmp_path: Path) -> None:
    settings = SMOKE[name]
    torch.manual_seed(0)
    denoiser = settings.denoiser()
    vae = _vae(settings.latent_channels, settings.shift)
    cache = cache_pictures(vae, denoiser.tokenizer, settings.buckets[:1], seed=0)[0]
    tokens = cache.tokens[:, 0]
    denoiser.loss(cache.latents.float(), tokens, settings.buckets[0].text_tokens).backward()
    for part in denoiser.parts.values():
        assert all(parameter.grad is not None for parameter in part.parameters())

    for part in (*denoiser.parts.values(), vae):
        cast(part, torch.bfloat16)
    write_pipeline(denoiser.pipeline(vae), tmp_path, settings.max_bytes)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    for part, trained in denoiser.parts.items():
        loaded = getattr(pipe, part).state_dict()
        assert all(torch.equal(loaded[key], value.to(loaded[key].dtype)) for key, value in trained.state_dict().items())
    call = settings.arguments(["a red circle", "a blue ring"], 2.0, 32)
    images = pipe(**call, height=32, width=48, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 32, 48)
    assert not torch.equal(images[0], images[1])


def test_picture_prompts_are_judged_by_look_alone() -> None:
    asked = requests(32, motion=False)
    assert all(item.direction is None for item in asked)
    assert not any("moving" in item.prompt for item in asked)
    verdict = judge(asked[0], torch.zeros(3, 1, 32, 32))
    assert (verdict["colour_right"], verdict["shape_right"]) == (False, False)
