"""Pictures of the tiny world as cached latents, and the loop that trains a denoiser on them; it writes no file."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from diffusers import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from tiny_text import tokenize
from tiny_world import describe, render, sample_scene
from torch import Tensor, nn
from tqdm import tqdm
from train_loop import Fit, Rate, Replay, advance, fit_averaged
from transformers import PreTrainedTokenizerFast

# The longest caption of the grammar has 16 words; the CLIP text models have this many positions.
CAPTION_TOKENS = 32
CAPTIONS_PER_PICTURE = 4
CAPTION_DROPOUT = 0.1


@dataclass(frozen=True)
class Bucket:
    """Pictures of one shape.

    Attributes:
        weight: share of the iterations among the buckets in use.
        since, until: in use between these shares of the training.
        chunk: how many pictures are encoded at once.
        text_tokens: length of the padded captions, for models to which it makes a difference.
        compiled: False runs the model eagerly; compiling for a rare shape takes longer than it saves.
    """

    height: int
    width: int
    pictures: int
    batch: int
    weight: float
    chunk: int
    text_tokens: int = CAPTION_TOKENS
    compiled: bool = False
    since: float = 0.0
    until: float = 1.0


@dataclass(frozen=True)
class Cache:
    """White bfloat16 latents `[pictures, channels, height / 4, width / 4]`, ids `[pictures, captions, tokens]`."""

    bucket: Bucket
    latents: Tensor
    tokens: Tensor


class Denoiser(Protocol):
    """The trained parts of one picture pipeline, by their names in it."""

    tokenizer: PreTrainedTokenizerFast
    parts: dict[str, nn.Module]

    def compile(self) -> None:
        """Compiles the large part in place."""

    def loss(self, latents: Tensor, tokens: Tensor, text_tokens: int) -> Tensor:
        """Mean squared error for a batch of latents `[batch, channels, height, width]` and their captions."""

    def pipeline(self, vae: AutoencoderKL) -> DiffusionPipeline:
        """The whole pipeline."""


def strata(batch: int, device: torch.device) -> Tensor:
    """One uniform number from each of `batch` equal slices of [0, 1]: the loss of a batch varies less."""
    return (torch.arange(batch, device=device) + torch.rand(batch, device=device)) / batch


@torch.no_grad()
def cache_pictures(
    vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, buckets: Sequence[Bucket], seed: int
) -> list[Cache]:
    """Draws and encodes the pictures of all buckets on the VAE's device."""
    device = vae.device
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    caches = []
    for bucket in buckets:
        latents, tokens = [], []
        label = f"latents, {bucket.height}x{bucket.width}"
        for _ in tqdm(range(0, bucket.pictures, bucket.chunk), desc=label, mininterval=5):
            scene = sample_scene(bucket.chunk, 1, bucket.height, bucket.width, generator)
            pixels = render(scene, device)[0][:, :, 0].contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                latents.append(vae.encode(pixels).latent_dist.mode().contiguous().to(torch.bfloat16))
            texts = [
                describe(scene, index, dice, motion=False)
                for index in range(bucket.chunk)
                for _ in range(CAPTIONS_PER_PICTURE)
            ]
            ids = tokenize(tokenizer, texts, CAPTION_TOKENS)
            tokens.append(ids.view(bucket.chunk, CAPTIONS_PER_PICTURE, CAPTION_TOKENS))
        caches.append(Cache(bucket, torch.cat(latents), torch.cat(tokens).to(device)))
    return caches


def train_denoiser(
    denoiser: Denoiser,
    caches: Sequence[Cache],
    iterations: int,
    rate: Rate,
    seed: int,
    compiled: bool,
    seconds: float | None = None,
) -> Fit:
    """Trains all parts in place and leaves their moving average in them."""
    torch.manual_seed(seed)
    if compiled:
        denoiser.compile()
    parts = list(denoiser.parts.values())
    device = caches[0].latents.device
    empty = tokenize(denoiser.tokenizer, [""], CAPTION_TOKENS).to(device)
    dice = random.Random(seed)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def loss(cache: Cache) -> Tensor:
        bucket = cache.bucket
        chosen = torch.randint(len(cache.latents), (bucket.batch,), device=device)
        tokens = cache.tokens[chosen, torch.randint(CAPTIONS_PER_PICTURE, (bucket.batch,), device=device)]
        dropped = torch.rand(bucket.batch, 1, device=device) < CAPTION_DROPOUT
        tokens = torch.where(dropped, empty, tokens)
        with (
            torch.compiler.set_stance("default" if bucket.compiled else "force_eager"),
            torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"),
        ):
            return denoiser.loss(cache.latents[chosen].float(), tokens, bucket.text_tokens)

    def step(adam: torch.optim.AdamW) -> Callable[[float], Tensor]:
        losses = [partial(loss, cache) for cache in caches]
        steps = [Replay(adam, part, pool) if pool else partial(advance, adam, part) for part in losses]

        def one(progress: float) -> Tensor:
            used = [
                (cache.bucket.weight, run)
                for cache, run in zip(caches, steps, strict=True)
                if cache.bucket.since <= progress < cache.bucket.until
            ]
            weights, runs = zip(*used, strict=True)
            return dice.choices(runs, weights)[0]()

        return one

    return fit_averaged("denoiser", parts, step, iterations, rate, seconds)
