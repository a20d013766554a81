"""The numbers that make the tiny Wan: model sizes, phases, buckets, prompts; full and in miniature."""

from dataclasses import dataclass, replace

from evaluate_tiny_wan import Evaluation
from tiny_vae import Phase
from tiny_wan_dit import Bucket
from train_loop import Rate

TRANSFORMER_KEYS = {
    "patch_size": (1, 1, 1),
    "attention_head_dim": 64,
    "in_channels": 16,
    "out_channels": 16,
    "freq_dim": 128,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 256,
}


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result, besides the seed."""

    base_dim: int
    heads: int
    layers: int
    ffn: int
    text_dim: int
    phases: tuple[Phase, ...]
    latent_batches: int
    buckets: tuple[Bucket, ...]
    dit_iterations: int
    dit_rate: Rate
    evaluation: Evaluation


OTHER_SIZES = ((128, 128), (96, 160), (160, 96))
FULL = Settings(
    base_dim=16,
    heads=4,
    layers=8,
    ffn=1024,
    text_dim=64,
    phases=(
        Phase(1, 64, 1500, Rate(8e-4, 8e-4, 100), share=0.14),
        Phase(9, 16, 1200, Rate(8e-4, 6e-4), share=0.22, sizes=OTHER_SIZES),
        Phase(33, 8, 1800, Rate(6e-4, 3e-5), share=0.54),
        Phase(65, 4, 250, Rate(1e-4, 1e-6, 10), share=0.10),
    ),
    latent_batches=16,
    buckets=(
        Bucket(33, 128, 128, clips=12000, batch=48, weight=0.66, chunk=32),
        Bucket(17, 128, 128, clips=3000, batch=80, weight=0.08, chunk=60),
        Bucket(65, 128, 128, clips=1600, batch=20, weight=0.12, chunk=16),
        Bucket(129, 128, 128, clips=400, batch=8, weight=0.04, chunk=8),
        Bucket(33, 96, 160, clips=1280, batch=48, weight=0.05, chunk=32),
        Bucket(33, 160, 96, clips=1280, batch=48, weight=0.05, chunk=32),
    ),
    dit_iterations=6000,
    dit_rate=Rate(1e-3, 1e-5, 300),
    evaluation=Evaluation(
        prompts=64,
        frames=33,
        size=128,
        steps=12,
        guidance=4.0,
        batch=16,
        vae_frames=(1, 17, 33, 65, 129),
        vae_clips=8,
        rows=(
            ("a green triangle moving up", 33, 128, 128),
            ("a red circle moving right fast over a striped ground", 33, 128, 128),
            ("a blue cross rotating clockwise over a checkered ground", 33, 128, 128),
            ("a yellow ring bouncing over a grey ground", 33, 128, 128),
            ("a purple square moving down and left over a gradient ground", 33, 128, 128),
            ("a red circle and a blue square colliding over a grey ground", 33, 128, 128),
            ("an orange square passing behind a cyan circle", 33, 128, 128),
            ("a white triangle standing still", 33, 128, 128),
            ("a green circle moving left slowly", 65, 128, 128),
            ("a yellow triangle moving right slowly", 129, 128, 128),
            ("a blue ring moving right", 33, 96, 160),
        ),
    ),
)
SMOKE = replace(
    FULL,
    base_dim=8,
    heads=1,
    layers=2,
    ffn=128,
    phases=tuple(
        replace(phase, frames=frames, batch=2, iterations=6, sizes=((32, 32), (32, 48)), repeat=1)
        for phase, frames in zip(FULL.phases, (1, 5, 9, 17), strict=True)
    ),
    latent_batches=1,
    buckets=(
        Bucket(9, 32, 32, clips=8, batch=4, weight=0.6, chunk=4),
        Bucket(17, 32, 32, clips=4, batch=2, weight=0.3, chunk=2),
        Bucket(5, 32, 48, clips=4, batch=2, weight=0.1, chunk=4),
    ),
    dit_iterations=12,
    evaluation=Evaluation(
        prompts=8,
        frames=9,
        size=32,
        steps=2,
        guidance=4.0,
        batch=4,
        vae_frames=(1, 9),
        vae_clips=2,
        rows=(
            ("a green triangle moving up", 9, 32, 32),
            ("a red circle and a blue square colliding", 17, 32, 48),
        ),
    ),
)
