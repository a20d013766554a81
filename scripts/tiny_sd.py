"""The tiny Stable Diffusion: its U-Net, text encoder, loss, and the pipeline they make; it writes no file."""

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tiny_flux import clip_text_model
from tiny_pictures import CAPTION_TOKENS, strata
from tiny_text import build_tokenizer, vocabulary_size
from torch import Tensor, nn
from torch.nn import functional as F

LATENT_CHANNELS = 4
# The last noise level is pure noise and the first step starts there: otherwise the mean colour leaks into training
# and is missing in sampling. At pure noise only v-prediction says something about the picture. `beta_end` is twice
# the usual value: in these latents two shapes can still be told apart at a noise level of 0.96.
SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.025,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
    "steps_offset": 1,
}


@dataclass(frozen=True)
class UNetSize:
    """Channels and attention heads of the three levels; the last level has convolutions only, below it attention."""

    channels: tuple[int, int, int]
    heads: tuple[int, int, int]
    text_dim: int
    sample: int


class TinySD:
    """A `Denoiser` trained by v-prediction."""

    def __init__(self, size: UNetSize) -> None:
        self.tokenizer = build_tokenizer(CAPTION_TOKENS)
        self.scheduler = DDIMScheduler(**SCHEDULER)
        self.unet = UNet2DConditionModel(
            sample_size=size.sample,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=size.channels,
            layers_per_block=1,
            cross_attention_dim=size.text_dim,
            # In this class the argument counts heads, whatever its name says.
            attention_head_dim=size.heads,
            norm_num_groups=16,
            use_linear_projection=True,
        )
        self.unet.to(memory_format=torch.channels_last)
        self.clip = clip_text_model(vocabulary_size(self.tokenizer), size.text_dim)
        self.parts: dict[str, nn.Module] = {"unet": self.unet, "text_encoder": self.clip}

    def compile(self) -> None:
        self.unet.compile(dynamic=False)

    def loss(self, latents: Tensor, tokens: Tensor, text_tokens: int) -> Tensor:
        """Mean squared error of the velocity `sqrt(a) noise - sqrt(1 - a) picture`."""
        if self.scheduler.alphas_cumprod.device != latents.device:
            self.scheduler.alphas_cumprod = self.scheduler.alphas_cumprod.to(latents.device)
        count = self.scheduler.config.num_train_timesteps
        times = (strata(len(latents), latents.device) * count).long().clamp_(max=count - 1)
        kept = self.scheduler.alphas_cumprod[times][:, None, None, None]
        noise = torch.randn_like(latents)
        mixed = kept.sqrt() * latents + (1 - kept).sqrt() * noise
        states = self.clip(tokens).last_hidden_state
        velocity = self.unet(mixed, times, encoder_hidden_states=states, return_dict=False)[0]
        return F.mse_loss(velocity.float(), kept.sqrt() * noise - (1 - kept).sqrt() * latents)

    def pipeline(self, vae: AutoencoderKL) -> StableDiffusionPipeline:
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.clip,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def arguments(prompts: list[str], guidance: float, text_tokens: int) -> dict:
    """What StableDiffusionPipeline is called with besides size and seed; it pads to its own `text_tokens`."""
    return {"prompt": prompts, "guidance_scale": guidance}
