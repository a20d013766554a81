"""Trains the embedded text-to-video pipeline from nothing and writes it as a plain diffusers folder.

One GPU, about 13 minutes on an H200:  python scripts/train_tiny_wan.py --out build/tiny-wan

The shipped weights were made so with seed 0, but for `--dit-seconds 395`, which ended the DiT after 5,705 of its
6,000 iterations; results/tiny-wan-eval.json has the times and what was measured.

Each stage writes its weights into the work folder and is skipped when they are there; latents are never kept,
they are made again in half a minute. `--probe` measures the speed of every stage, `--smoke` runs all of them in
miniature on a CPU.
"""

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from causal_vae import WholeClip
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from evaluate_tiny_wan import evaluate
from tiny_folder import SHARD, cast, note, read_notes, report, write_pipeline
from tiny_report import draw_losses
from tiny_text import build_tokenizer, vocabulary_size
from tiny_vae import train_vae
from tiny_wan_dit import SHIFT, TEXT_TOKENS, cache_latents, train_dit
from tiny_wan_settings import FULL, SMOKE, TRANSFORMER_KEYS, Settings
from tiny_wan_vae import measure_latents
from transformers import UMT5Config, UMT5EncoderModel

log = logging.getLogger("train_tiny_wan")
STAGES = ("vae", "dit", "assemble", "evaluate")
MAX_BYTES = 24_000_000


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("training needs a CUDA GPU and none is seen; --smoke runs the miniature on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    torch._dynamo.config.recompile_limit = 64
    work = options.out
    work.mkdir(parents=True, exist_ok=True)
    # The miniature must never overwrite the released files.
    assets, results = (work / "assets", work / "results") if options.smoke else (options.assets, options.results)
    settings = _settings(options)
    for stage in STAGES:
        if stage not in options.stages:
            continue
        began = time.perf_counter()
        if stage == "vae":
            _vae_stage(settings, options, work, device)
        elif stage == "dit":
            _dit_stage(settings, options, work, device)
        elif options.probe:
            continue
        elif stage == "assemble":
            _assemble(work, assets)
        else:
            results.mkdir(parents=True, exist_ok=True)
            curves, record = read_notes([work / "vae.json", work / "dit.json"])
            draw_losses("tiny-wan", curves, results)
            evaluate(assets, results, settings.evaluation, options.seed, device, record)
        log.info("stage %s took %.0f s", stage, time.perf_counter() - began)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="work folder: weights and notes of each stage")
    parser.add_argument("--assets", type=Path, default=Path("fastdiff/assets/tiny-wan"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-iterations", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--vae-seconds", type=float, help="end the VAE's phases early, in proportion")
    parser.add_argument("--dit-iterations", type=int)
    parser.add_argument("--dit-seconds", type=float, help="end the DiT early, its rate having decayed")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="everything in miniature, on a CPU too")
    parser.add_argument("--probe", action="store_true", help="time 20 iterations of each stage, write nothing")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; allowed are {', '.join(STAGES)}")
    if options.vae_iterations and len(options.vae_iterations) != len(FULL.phases):
        parser.error(f"--vae-iterations takes {len(FULL.phases)} counts, one for each phase")
    return options


def _settings(options: argparse.Namespace) -> Settings:
    settings = SMOKE if options.smoke else FULL
    counts = options.vae_iterations or [phase.iterations for phase in settings.phases]
    dit_iterations = options.dit_iterations or settings.dit_iterations
    buckets = settings.buckets
    if options.probe:
        counts, dit_iterations = [20] * len(counts), 20
        # The usual bucket and the longest one: the others lie between.
        ends = (buckets[0], max(buckets, key=lambda bucket: bucket.frames))
        buckets = tuple(replace(bucket, clips=bucket.batch) for bucket in ends)
        settings = replace(settings, phases=tuple(replace(phase, sizes=phase.sizes[:1]) for phase in settings.phases))
    phases = tuple(replace(phase, iterations=count) for phase, count in zip(settings.phases, counts, strict=True))
    return replace(settings, phases=phases, dit_iterations=dit_iterations, buckets=buckets)


def _new_vae(settings: Settings) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=settings.base_dim,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    )


def _vae_stage(settings: Settings, options: argparse.Namespace, work: Path, device: torch.device) -> None:
    if (work / "vae.json").exists() and not options.probe:
        log.info("vae: taken from %s", work)
        return
    torch.manual_seed(options.seed)
    vae = _new_vae(settings).to(device)
    fits = train_vae(
        vae,
        WholeClip(vae, not options.no_compile),
        settings.phases,
        options.seed,
        options.vae_seconds,
    )
    report({phase.label: fit for phase, fit in zip(settings.phases, fits, strict=True)})
    if options.probe:
        return
    # What is measured, cached and shipped is the same rounded model.
    cast(vae, torch.bfloat16)
    cast(vae, torch.float32)
    phase = settings.phases[2]
    height, width = phase.sizes[0]
    mean, deviation = measure_latents(vae, phase.frames, height, width, settings.latent_batches, options.seed + 1)
    vae.register_to_config(latents_mean=mean, latents_std=deviation)
    cast(vae, torch.bfloat16).save_pretrained(work / "vae")
    note(
        work / "vae.json",
        {phase.label: fit for phase, fit in zip(settings.phases, fits, strict=True)},
    )


def _dit_stage(settings: Settings, options: argparse.Namespace, work: Path, device: torch.device) -> None:
    if (work / "dit.json").exists() and not options.probe:
        log.info("dit: taken from %s", work)
        return
    torch.manual_seed(options.seed)
    trained = (work / "vae.json").exists()
    vae = AutoencoderKLWan.from_pretrained(work / "vae") if trained or not options.probe else _new_vae(settings)
    vae = vae.to(device).eval()
    tokenizer = build_tokenizer(TEXT_TOKENS)
    encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocabulary_size(tokenizer),
            d_model=settings.text_dim,
            d_kv=16,
            d_ff=2 * settings.text_dim,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).to(device)
    transformer = WanTransformer3DModel(
        **TRANSFORMER_KEYS,
        num_attention_heads=settings.heads,
        num_layers=settings.layers,
        ffn_dim=settings.ffn,
        text_dim=settings.text_dim,
    ).to(device)
    began = time.perf_counter()
    compiled = not options.no_compile
    caches = cache_latents(vae, tokenizer, settings.buckets, options.seed + 2, compiled)
    log.info("latents took %.0f s", time.perf_counter() - began)
    groups = [[cache] for cache in caches] if options.probe else [caches]
    for group in groups:
        fit = train_dit(
            transformer,
            encoder,
            tokenizer,
            group,
            settings.dit_iterations,
            settings.dit_rate,
            options.seed,
            compiled,
            options.dit_seconds,
        )
        report({f"dit, {len(group)} buckets from {group[0].bucket}": fit})
    if options.probe:
        return
    cast(transformer, torch.bfloat16).save_pretrained(work / "transformer", max_shard_size=SHARD)
    cast(encoder, torch.bfloat16).save_pretrained(work / "text_encoder")
    note(work / "dit.json", {"dit": fit})


def _assemble(work: Path, assets: Path) -> None:
    """Joins the parts to a pipeline folder that diffusers loads alone."""
    pipe = WanPipeline(
        tokenizer=build_tokenizer(TEXT_TOKENS),
        text_encoder=UMT5EncoderModel.from_pretrained(work / "text_encoder", dtype=torch.bfloat16),
        vae=AutoencoderKLWan.from_pretrained(work / "vae", torch_dtype=torch.bfloat16),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        transformer=WanTransformer3DModel.from_pretrained(work / "transformer", torch_dtype=torch.bfloat16),
    )
    cast(pipe.transformer, torch.bfloat16)
    cast(pipe.text_encoder, torch.bfloat16)
    write_pipeline(pipe, assets, MAX_BYTES)


if __name__ == "__main__":
    main()
