"""Trains the tiny Wan transformer and its text encoder on cached latents; it writes no file."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from causal_vae import WholeClip
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from tiny_text import tokenize
from tiny_world import describe, render, sample_scene
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from train_loop import Fit, Rate, advance, fit_averaged
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

# WanPipeline pads every prompt to this many tokens with zeros and masks none of them.
TEXT_TOKENS = 512
# The longest caption of the grammar has 19 words; padding further would only cost time.
CAPTION_TOKENS = 24
CAPTIONS_PER_CLIP = 6
CAPTION_DROPOUT = 0.1
SHIFT = 3.0


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape. `weight` is their share of the iterations, `chunk` how many are encoded at once."""

    frames: int
    height: int
    width: int
    clips: int
    batch: int
    weight: float
    chunk: int


@dataclass(frozen=True)
class Cache:
    """Normalised bfloat16 latents `[clips, 16, frames, height, width]`, ids `[clips, captions, tokens]`."""

    bucket: Bucket
    latents: Tensor
    tokens: Tensor


@torch.no_grad()
def cache_latents(
    vae: AutoencoderKLWan,
    tokenizer: PreTrainedTokenizerFast,
    buckets: Sequence[Bucket],
    seed: int,
    compiled: bool,
) -> list[Cache]:
    """Draws and encodes the clips of all buckets on the VAE's device."""
    whole = WholeClip(vae, compiled)
    device = vae.device
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    deviation = torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    caches = []
    for bucket in buckets:
        latents, tokens = [], []
        label = f"latents, {bucket.frames} frames {bucket.height}x{bucket.width}"
        for _ in tqdm(range(0, bucket.clips, bucket.chunk), desc=label, mininterval=5):
            scene = sample_scene(bucket.chunk, bucket.frames, bucket.height, bucket.width, generator)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                encoded, _ = whole.encode(render(scene, device)[0])
            latents.append(((encoded - mean) / deviation).to(torch.bfloat16))
            texts = [describe(scene, index, dice) for index in range(bucket.chunk) for _ in range(CAPTIONS_PER_CLIP)]
            tokens.append(tokenize(tokenizer, texts, CAPTION_TOKENS).view(bucket.chunk, CAPTIONS_PER_CLIP, -1))
        caches.append(Cache(bucket, torch.cat(latents), torch.cat(tokens).to(device)))
    return caches


def encode_text(encoder: UMT5EncoderModel, tokens: Tensor) -> Tensor:
    """Text states `[batch, 512, dim]` as WanPipeline makes them: zero after the true length."""
    seen = tokens != encoder.config.pad_token_id
    # In this form the mask is taken as it is; a two-dimensional one may be read on the host at each step.
    mask = torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, torch.finfo(torch.float32).min)
    states = encoder(tokens, attention_mask=mask[:, None, None]).last_hidden_state * seen[..., None]
    return F.pad(states, (0, 0, 0, TEXT_TOKENS - tokens.shape[1]))


def train_dit(
    transformer: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    caches: Sequence[Cache],
    iterations: int,
    rate: Rate,
    seed: int,
    compiled: bool,
    seconds: float | None = None,
) -> Fit:
    """Trains both models in place by flow matching and leaves their moving average in them."""
    torch.manual_seed(seed)
    device = transformer.device
    if compiled:
        # One block is compiled for each sequence length and serves all layers.
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
    empty = tokenize(tokenizer, [""], CAPTION_TOKENS).to(device)
    dice = random.Random(seed)
    weights = [cache.bucket.weight for cache in caches]

    def loss() -> Tensor:
        cache = dice.choices(caches, weights)[0]
        return flow_loss(transformer, encoder, cache, empty)

    def step(adam: torch.optim.AdamW) -> Callable[[float], Tensor]:
        return lambda _: advance(adam, loss)

    return fit_averaged("dit", [transformer, encoder], step, iterations, rate, seconds)


def flow_loss(transformer: WanTransformer3DModel, encoder: UMT5EncoderModel, cache: Cache, empty: Tensor) -> Tensor:
    """Mean squared error of the velocity `noise - clip` for a random batch of one bucket."""
    batch, device = cache.bucket.batch, cache.latents.device
    chosen = torch.randint(len(cache.latents), (batch,), device=device)
    clip = cache.latents[chosen].float()
    tokens = cache.tokens[chosen, torch.randint(CAPTIONS_PER_CLIP, (batch,), device=device)]
    dropped = torch.rand(batch, 1, device=device) < CAPTION_DROPOUT
    tokens = torch.where(dropped, empty, tokens)

    # One noise level from each of `batch` equal slices: the loss of a batch varies less.
    uniform = (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch
    sigma = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    noise = torch.randn_like(clip)
    mixed = torch.lerp(clip, noise, sigma[:, None, None, None, None])
    with torch.autocast(device.type, torch.bfloat16, enabled=clip.is_cuda):
        text = encode_text(encoder, tokens)
        velocity = transformer(mixed, sigma * 1000, text, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - clip)
