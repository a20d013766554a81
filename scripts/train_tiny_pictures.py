"""Trains an embedded text-to-picture pipeline from nothing and writes it as a plain diffusers folder.

One GPU:

    python scripts/train_tiny_pictures.py tiny-flux --out build/tiny-flux
    python scripts/train_tiny_pictures.py tiny-sd --out build/tiny-sd

The shipped denoisers were trained with `--seconds 700` on an H100 each, with the VAEs of an earlier run
(`--vae-seconds 80`). Nearly half of the time goes to pictures of 128x128, a sixteenth of the attention: at full size
alone, ten minutes gave the right colours in the wrong shapes.

The VAE's weights are written into the work folder and taken from there when they exist. `--smoke` runs everything in
miniature on a CPU, `--probe` twenty iterations of each stage at full size.
"""

import argparse
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from evaluate_tiny_pictures import evaluate
from tiny_folder import cast, note, read_notes, report, write_pipeline
from tiny_picture_settings import FULL, SMOKE, Settings
from tiny_picture_vae import PictureCodec, new_vae, whiten
from tiny_pictures import cache_pictures, train_denoiser
from tiny_report import draw_losses
from tiny_vae import train_vae

log = logging.getLogger("train_tiny_pictures")
STAGES = ("vae", "denoiser", "evaluate")


def main() -> None:
    options = _options()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.smoke:
        raise SystemExit("training needs a CUDA GPU and none is seen; --smoke runs the miniature on a CPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    # Convolutions are not tuned: with so many shapes the tuning takes longer than a short training gains by it.
    # cuDNN's attention is off because one compiled backward pass at 512x512 died with an illegal access.
    torch.backends.cuda.enable_cudnn_sdp(False)
    work = options.out
    # Neither the miniature nor a probe may overwrite the released files.
    trial = options.smoke or options.probe
    assets = work / "assets" if trial else options.assets or Path("fastdiff/assets") / options.pipeline
    results = work / "results" if trial else options.results
    for folder in (work, results):
        folder.mkdir(parents=True, exist_ok=True)
    settings = _settings(options)

    runs = (
        lambda: _vae_stage(settings, options, work, device),
        lambda: _denoiser_stage(settings, options, work, assets, device),
        lambda: _evaluate_stage(settings, options, work, assets, results, device),
    )
    for name, run in zip(STAGES, runs, strict=True):
        if name not in options.stages:
            continue
        began = time.perf_counter()
        run()
        log.info("stage %s took %.0f s", name, time.perf_counter() - began)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", choices=list(FULL))
    parser.add_argument("--out", type=Path, required=True, help="work folder: the VAE and the notes of each stage")
    parser.add_argument("--assets", type=Path, help="the pipeline's folder; fastdiff/assets/PIPELINE by default")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, help="end the VAE's phases early, in proportion")
    parser.add_argument("--seconds", type=float, help="end the denoiser early, its rate having decayed")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="everything in miniature, on a CPU too")
    parser.add_argument("--probe", action="store_true", help="20 iterations of each stage, to see that all of it runs")
    options = parser.parse_args()
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"unknown stages {sorted(unknown)}; allowed are {', '.join(STAGES)}")
    return options


def _settings(options: argparse.Namespace) -> Settings:
    settings = (SMOKE if options.smoke else FULL)[options.pipeline]
    if not options.probe:
        return settings
    plan = settings.evaluation
    return replace(
        settings,
        phases=tuple(replace(phase, iterations=20) for phase in settings.phases),
        buckets=tuple(replace(bucket, pictures=bucket.chunk) for bucket in settings.buckets),
        iterations=20,
        evaluation=replace(plan, variants=tuple(replace(item, prompts=4, steps=2) for item in plan.variants), sheet=2),
    )


def _vae_stage(settings: Settings, options: argparse.Namespace, work: Path, device: torch.device) -> None:
    if (work / "vae.json").exists():
        log.info("vae: taken from %s", work)
        return
    torch.manual_seed(options.seed)
    vae = new_vae(settings.channels, settings.latent_channels, settings.shift).to(device)
    fits = train_vae(vae, PictureCodec(vae), settings.phases, options.seed, options.vae_seconds)
    named = {phase.label: fit for phase, fit in zip(settings.phases, fits, strict=True)}
    report(named)
    height, _ = settings.phases[1].sizes[0]
    whiten(vae, height, settings.latent_batches, options.seed + 1)
    cast(vae, torch.bfloat16).save_pretrained(work / "vae")
    note(work / "vae.json", named)


def _denoiser_stage(
    settings: Settings, options: argparse.Namespace, work: Path, assets: Path, device: torch.device
) -> None:
    torch.manual_seed(options.seed)
    # Loaded from disk, so that the latents are those of the rounded model that is shipped.
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).to(memory_format=torch.channels_last).eval()
    denoiser = settings.denoiser()
    for part in denoiser.parts.values():
        part.to(device)
    began = time.perf_counter()
    caches = cache_pictures(vae, denoiser.tokenizer, settings.buckets, options.seed + 2)
    log.info("latents took %.0f s", time.perf_counter() - began)
    fit = train_denoiser(
        denoiser,
        caches,
        settings.iterations,
        settings.rate,
        options.seed,
        not options.no_compile and not options.smoke,
        options.seconds,
    )
    report({"denoiser": fit})
    note(work / "denoiser.json", {"denoiser": fit})
    for part in (*denoiser.parts.values(), vae):
        cast(part, torch.bfloat16)
    write_pipeline(denoiser.pipeline(vae), assets, settings.max_bytes)


def _evaluate_stage(
    settings: Settings, options: argparse.Namespace, work: Path, assets: Path, results: Path, device: torch.device
) -> None:
    curves, record = read_notes([work / "vae.json", work / "denoiser.json"])
    draw_losses(options.pipeline, curves, results)
    name, plan = options.pipeline, settings.evaluation
    evaluate(name, settings.arguments, assets, results, plan, options.seed, device, record)


if __name__ == "__main__":
    main()
