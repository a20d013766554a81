"""The VAE of the embedded picture pipelines: an AutoencoderKL whose latents are white; it writes no file."""

import torch
from diffusers import AutoencoderKL
from tiny_world import render, sample_scene
from torch import Tensor


def new_vae(channels: tuple[int, int, int], latent_channels: int, shift: float | None) -> AutoencoderKL:
    """A VAE that makes pictures four times smaller.

    Args:
        shift: `shift_factor` of the config: FluxPipeline needs a number, StableDiffusionPipeline reads none.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=channels,
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=256,
        scaling_factor=1.0,
        shift_factor=shift,
        force_upcast=False,
        mid_block_add_attention=False,
    )


class PictureCodec:
    """An AutoencoderKL on clips of one frame, `[batch, 3, 1, height, width]`, as VAE training takes it."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.to(memory_format=torch.channels_last)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, `[batch, channels, height / 4, width / 4]`."""
        latents = self.vae.encode(video[:, :, 0].contiguous(memory_format=torch.channels_last)).latent_dist
        return latents.mean, latents.logvar

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample[:, :, None]


@torch.no_grad()
def whiten(vae: AutoencoderKL, size: int, batches: int, seed: int) -> None:
    """Gives each latent channel mean 0 and deviation 1, so that `scaling_factor` is 1 and `shift_factor` 0.

    One factor for all channels, as the config has it, would leave some of them louder than others. The change is
    folded into the two 1x1 convolutions around the latents, so the pixels stay the same.
    """
    codec = PictureCodec(vae)
    dice = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(batches):
        video, _ = render(sample_scene(8, 1, size, size, dice), vae.device)
        means.append(codec.encode(video)[0].transpose(0, 1).flatten(1))
    deviation, mean = torch.std_mean(torch.cat(means, 1), dim=1)
    channels = len(mean)
    into, back = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] /= deviation[:, None, None, None]
    into.bias[:channels].sub_(mean).div_(deviation)
    into.bias[channels:] -= 2 * deviation.log()
    back.bias += back.weight[:, :, 0, 0] @ mean
    back.weight *= deviation[None, :, None, None]
