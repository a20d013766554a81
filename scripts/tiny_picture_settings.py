"""The numbers that make the embedded picture pipelines: sizes, phases, buckets, evaluation; full and in miniature."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import tiny_flux
import tiny_sd
from evaluate_tiny_pictures import Evaluation, Variant
from tiny_flux import LONG_TEXT, FluxSize, TinyFlux
from tiny_pictures import CAPTION_TOKENS, Bucket, Denoiser
from tiny_sd import TinySD, UNetSize
from tiny_vae import Phase
from train_loop import Rate

# What a caption is usually padded to for the tiny Flux: short, because every text token is attended densely.
SHORT_TEXT = 64
# For this share of the training pictures are small. Which shape stands where is learnt there at a fraction of the cost.
SMALL = 0.45


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result of one pipeline, besides the seed.

    Attributes:
        denoiser: makes the untrained parts.
        arguments: see `evaluate_tiny_pictures.evaluate`.
        shift: `shift_factor` of the VAE's config.
        max_bytes: the folder may not be larger.
    """

    denoiser: Callable[[], Denoiser]
    arguments: Callable[[list[str], float, int], dict]
    latent_channels: int
    shift: float | None
    channels: tuple[int, int, int]
    phases: tuple[Phase, ...]
    latent_batches: int
    buckets: tuple[Bucket, ...]
    iterations: int
    rate: Rate
    evaluation: Evaluation
    max_bytes: int


PHASES = (
    Phase(1, 48, 3000, Rate(1e-3, 6e-4, 100), share=0.5),
    Phase(1, 12, 2000, Rate(6e-4, 1e-5), share=0.5, sizes=((256, 256), (512, 512))),
)


def _variants(guidance: float, text_tokens: int, steps: int) -> tuple[Variant, ...]:
    usual = Variant("256x256", 256, 256, guidance, 64, 32, text_tokens, steps)
    return (
        usual,
        replace(usual, name="no guidance", guidance=1.0),
        replace(usual, name="half the steps", steps=steps // 2, prompts=32),
        replace(usual, name="512x512", height=512, width=512, prompts=16, batch=8),
        replace(usual, name="192x320", height=192, width=320, prompts=32),
    )


FLUX_VARIANTS = _variants(3.0, SHORT_TEXT, 20)
FULL = {
    "tiny-flux": Settings(
        denoiser=lambda: TinyFlux(FluxSize(heads=3, dual=2, single=5, text_dim=64)),
        arguments=tiny_flux.arguments,
        latent_channels=tiny_flux.LATENT_CHANNELS,
        shift=0.0,
        channels=(24, 48, 72),
        phases=PHASES,
        latent_batches=16,
        buckets=(
            Bucket(128, 128, 65536, 64, 1.0, 256, SHORT_TEXT, compiled=True, until=SMALL),
            Bucket(256, 256, 32768, 48, 0.71, 64, SHORT_TEXT, compiled=True, since=SMALL),
            Bucket(256, 256, 4096, 32, 0.07, 64, LONG_TEXT, since=SMALL),
            Bucket(512, 512, 2048, 10, 0.12, 16, SHORT_TEXT, since=SMALL),
            Bucket(192, 320, 2048, 48, 0.05, 64, SHORT_TEXT, since=SMALL),
            Bucket(320, 192, 2048, 48, 0.05, 64, SHORT_TEXT, since=SMALL),
        ),
        iterations=60000,
        rate=Rate(1e-3, 1e-5, 300),
        evaluation=Evaluation(
            variants=(
                *FLUX_VARIANTS,
                replace(FLUX_VARIANTS[0], name="512 text tokens", prompts=32, text_tokens=LONG_TEXT),
            ),
            vae_sizes=(256, 512),
            vae_pictures=64,
        ),
        max_bytes=14_000_000,
    ),
    "tiny-sd": Settings(
        denoiser=lambda: TinySD(UNetSize(channels=(64, 96, 96), heads=(2, 3, 3), text_dim=64, sample=64)),
        arguments=tiny_sd.arguments,
        latent_channels=tiny_sd.LATENT_CHANNELS,
        shift=None,
        channels=(24, 48, 72),
        phases=PHASES,
        latent_batches=16,
        buckets=(
            Bucket(128, 128, 65536, 64, 1.0, 256, compiled=True, until=SMALL),
            Bucket(256, 256, 32768, 32, 0.86, 64, compiled=True, since=SMALL),
            Bucket(512, 512, 2048, 8, 0.08, 16, since=SMALL),
            Bucket(192, 320, 2048, 32, 0.03, 64, since=SMALL),
            Bucket(320, 192, 2048, 32, 0.03, 64, since=SMALL),
        ),
        iterations=60000,
        rate=Rate(8e-4, 1e-5, 300),
        evaluation=Evaluation(variants=_variants(4.0, CAPTION_TOKENS, 24), vae_sizes=(256, 512), vae_pictures=64),
        max_bytes=10_000_000,
    ),
}


def _miniature(settings: Settings, denoiser: Callable[[], Denoiser]) -> Settings:
    """Every shape kept different, everything else as small as it runs."""
    sizes = ((32, 32), (64, 64))
    shapes = {
        (128, 128): (16, 16),
        (256, 256): (32, 32),
        (512, 512): (64, 64),
        (192, 320): (32, 48),
        (320, 192): (48, 32),
    }
    buckets = tuple(
        replace(
            bucket,
            height=shapes[bucket.height, bucket.width][0],
            width=shapes[bucket.height, bucket.width][1],
            pictures=4,
            batch=2,
            chunk=2,
        )
        for bucket in settings.buckets
    )
    variants = tuple(
        replace(
            variant,
            height=shapes[variant.height, variant.width][0],
            width=shapes[variant.height, variant.width][1],
            prompts=4,
            batch=4,
            steps=2,
        )
        for variant in settings.evaluation.variants
    )
    return replace(
        settings,
        denoiser=denoiser,
        channels=(8, 8, 16),
        phases=(
            replace(settings.phases[0], batch=2, iterations=4, sizes=((24, 24),)),
            replace(settings.phases[1], batch=2, iterations=4, sizes=sizes, repeat=1),
        ),
        latent_batches=1,
        buckets=buckets,
        iterations=6,
        evaluation=Evaluation(variants=variants, vae_sizes=(32,), vae_pictures=4, sheet=2),
    )


SMOKE = {
    "tiny-flux": _miniature(FULL["tiny-flux"], lambda: TinyFlux(FluxSize(heads=1, dual=1, single=1, text_dim=16))),
    "tiny-sd": _miniature(FULL["tiny-sd"], lambda: TinySD(UNetSize((16, 16, 16), (1, 1, 1), text_dim=16, sample=64))),
}
