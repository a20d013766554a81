"""The tiny Flux: its transformer, its two text encoders, their loss, and the pipeline they make; it writes no file."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny_pictures import CAPTION_TOKENS, strata
from tiny_text import build_tokenizer, vocabulary_size
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

LATENT_CHANNELS = 16
# FluxPipeline pads every prompt to 512 tokens unless told otherwise.
LONG_TEXT = 512
# Levels are shifted eightfold at 1,024 tokens and sixteenfold at 4,096: in these latents two shapes can still be told
# apart at a noise level of 0.97, so that is where the shape is decided. With a shift of 2.5 the pictures had the right
# colours in shapeless blots. Training draws its levels by the same rule.
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 1.9,
    "max_shift": 2.8,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}


@dataclass(frozen=True)
class FluxSize:
    """`dual` blocks keep text and picture apart, `single` ones join them."""

    heads: int
    dual: int
    single: int
    text_dim: int


def clip_text_model(vocabulary: int, dim: int, layers: int = 2) -> CLIPTextModel:
    """A CLIP text model for the tiny vocabulary; its pooled output is the state of the first `</s>`."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=dim,
            intermediate_size=2 * dim,
            projection_dim=dim,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=CAPTION_TOKENS,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    )


class TinyFlux:
    """A `Denoiser` trained by flow matching."""

    def __init__(self, size: FluxSize) -> None:
        self.tokenizer = build_tokenizer(CAPTION_TOKENS)
        vocabulary = vocabulary_size(self.tokenizer)
        self.scheduler = FlowMatchEulerDiscreteScheduler(**SCHEDULER)
        self.transformer = FluxTransformer2DModel(
            in_channels=4 * LATENT_CHANNELS,
            num_layers=size.dual,
            num_single_layers=size.single,
            attention_head_dim=64,
            num_attention_heads=size.heads,
            joint_attention_dim=size.text_dim,
            pooled_projection_dim=size.text_dim,
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        )
        self.clip = clip_text_model(vocabulary, size.text_dim)
        self.t5 = T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=size.text_dim,
                d_kv=16,
                d_ff=2 * size.text_dim,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                pad_token_id=0,
                eos_token_id=1,
            )
        )
        self.parts: dict[str, nn.Module] = {
            "transformer": self.transformer,
            "text_encoder": self.clip,
            "text_encoder_2": self.t5,
        }

    def compile(self) -> None:
        self.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)

    def loss(self, latents: Tensor, tokens: Tensor, text_tokens: int) -> Tensor:
        """Mean squared error of the velocity `noise - picture`."""
        batch, channels, height, width = latents.shape
        device = latents.device
        picture = FluxPipeline._pack_latents(latents, batch, channels, height, width)
        mu = calculate_shift(
            picture.shape[1],
            SCHEDULER["base_image_seq_len"],
            SCHEDULER["max_image_seq_len"],
            SCHEDULER["base_shift"],
            SCHEDULER["max_shift"],
        )
        uniform = strata(batch, device)
        sigma = math.exp(mu) * uniform / (1 + (math.exp(mu) - 1) * uniform)
        noise = torch.randn_like(picture)
        # The pipeline masks no padding, so neither does training.
        states = self.t5(F.pad(tokens, (0, text_tokens - tokens.shape[1]))).last_hidden_state
        velocity = self.transformer(
            hidden_states=torch.lerp(picture, noise, sigma[:, None, None]),
            encoder_hidden_states=states,
            pooled_projections=self.clip(tokens).pooler_output,
            timestep=sigma,
            img_ids=_positions(height // 2, width // 2, device),
            txt_ids=torch.zeros(text_tokens, 3, device=device),
            return_dict=False,
        )[0]
        return F.mse_loss(velocity.float(), noise - picture)

    def pipeline(self, vae: AutoencoderKL) -> FluxPipeline:
        return FluxPipeline(
            scheduler=self.scheduler,
            vae=vae,
            text_encoder=self.clip,
            tokenizer=self.tokenizer,
            text_encoder_2=self.t5,
            tokenizer_2=build_tokenizer(LONG_TEXT),
            transformer=self.transformer,
        )


@lru_cache
def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """Made once: copying them to the GPU waits for it."""
    return FluxPipeline._prepare_latent_image_ids(1, height, width, device, torch.float32)


def arguments(prompts: list[str], guidance: float, text_tokens: int) -> dict:
    """What FluxPipeline is called with besides size and seed: with no `guidance_embeds`, guidance is the true one."""
    return {
        "prompt": prompts,
        "negative_prompt": [""] * len(prompts),
        "true_cfg_scale": guidance,
        "max_sequence_length": text_tokens,
    }
