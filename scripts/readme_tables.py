"""Fills the marked sections of README.md from the files in results/, so that no number in it is typed by hand.

    python3 scripts/readme_tables.py               # writes README.md
    python3 scripts/readme_tables.py --check       # exit code 1 if README.md is not what the files say

A section stands between `<!-- begin: NAME -->` and `<!-- end: NAME -->`; NAME is a key of SECTIONS below. Every file
that is there must have its section. With `--missing-ok` a section whose file is not there is left as it is. Standard
library only.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from readme_bench import bench, models
from readme_text import table, versions
from readme_together import together

ROOT = Path(__file__).resolve().parent.parent


class Stale(Exception):
    """What keeps README.md from being filled, in one line."""


def compare(report: dict[str, Any]) -> str:
    """One video dense and sparse: `report.json` of `fastdiff compare`."""
    alone = report["attention"]
    times = (
        ("whole run, s", report["seconds_dense"], report["seconds_sparse"], 1),
        ("one denoising step, s", report["seconds_per_step_dense"], report["seconds_per_step_sparse"], 2),
        ("attention alone, ms", 1e3 * alone["dense"]["median"], 1e3 * alone["sparse"]["median"], 0),
    )
    rows = [
        ["density of a sparse step", "1", f"{report['density']:.3f}", ""],
        ["density, mean over steps and layers", "1", f"{report['mean_density']:.3f}", ""],
        *([name, f"{a:.{digits}f}", f"{b:.{digits}f}", f"{a / b:.2f}×"] for name, a, b, digits in times),
        ["PSNR against dense, dB", "", f"{report['psnr']:.1f}", ""],
        ["SSIM against dense", "", f"{report['ssim']:.3f}", ""],
    ]
    config = ", ".join(
        f"{name} {report['config'][name]:.3g}" if name == "decay_factor" else f"{name} {report['config'][name]}"
        for name in ("mode", "decay_factor")
    )
    others = report["steps"] - 1
    timed = sorted({str(report.get(f"timed_steps_{side}", others)) for side in ("dense", "sparse")}, reverse=True)
    conditions = (
        f"“{report['prompt']}”: {report['num_frames']} frames of {report['width']}×{report['height']}, "
        f"{report['tokens']} tokens ({report['grid'].replace('x', '×')}), {report['heads']} heads of "
        f"{report['head_dim']}, {report['steps']} steps of which {dense_steps(report)} stay dense, seed "
        f"{report['seed']}; {config}; backend {report['backend']}, {report['dtype']} on {where(report)}; each video "
        f"once after a warm-up step, a step is the median of {' and '.join(timed)}, attention alone the median of "
        f"{alone['dense']['repeats']} (spread {1e3 * alone['dense']['spread']:.1f} and "
        f"{1e3 * alone['sparse']['spread']:.1f} ms between the quartiles); {versions(report['versions'])}."
    )
    return table(["", "dense (SDPA)", report["method"], "gain"], rows) + "\n\n" + conditions


def compare_briefly(report: dict[str, Any]) -> str:
    """The same run elsewhere, in a sentence."""
    alone = report["attention"]
    a, b = report["seconds_per_step_dense"], report["seconds_per_step_sparse"]
    return (
        f"The same run on {where(report)} (backend {report['backend']}, {report['dtype']}): a denoising step takes "
        f"{1e3 * a:.0f} ms dense and {1e3 * b:.0f} ms sparse, {a / b:.2f}×; attention alone "
        f"{1e3 * alone['dense']['median']:.2f} and {1e3 * alone['sparse']['median']:.2f} ms, {alone['speedup']:.2f}×; "
        f"{report['psnr']:.1f} dB and SSIM {report['ssim']:.3f} against dense; {versions(report['versions'])}."
    )


def dense_steps(report: dict[str, Any]) -> str:
    chosen = report["dense_steps"]
    return f"the first {chosen}" if isinstance(chosen, int) else f"those numbered {', '.join(map(str, chosen))}"


def where(report: dict[str, Any]) -> str:
    return report.get("gpu") or f"{report['threads']} CPU threads"


def tiny_wan(report: dict[str, Any]) -> str:
    """The embedded model: how well it does what prompts say, dense, on stock diffusers."""
    rows = []
    for scheduler, found in report["prompts"].items():
        rates, verdicts = found["rates"], found["verdicts"]
        single = sum(verdict["shape_right"] is not None for verdict in verdicts)
        cells = [f"{100 * rates[name]:.0f} %" for name in ("colour", "shape", "direction", "pair_colours")]
        rows.append([scheduler, f"{single} + {len(verdicts) - single}", *cells])
    head = ["scheduler", "prompts (one + two objects)", "colour", "shape", "direction", "both colours of two"]
    settings, count = report["settings"], report["parameters"]
    fidelity = report["vae"]["psnr_by_frames"][str(settings["frames"])]["psnr"]
    read_back = report["vae"]["read_back_rebuilt"]["shape"]
    minutes = training_minutes(report["training"])
    conditions = (
        f"{settings['frames']} frames of {settings['size']}×{settings['size']}, {settings['steps']} steps, guidance "
        f"{settings['guidance']:g}, seed {report['seed']} and on, dense; {report['gpu']}, "
        f"{versions(report['versions'])}. Parameters: transformer {millions(count['transformer'])}, VAE "
        f"{millions(count['vae'])}, text encoder {millions(count['text_encoder'])}; {report['bytes'] / 1e6:.1f} MB in "
        f"all; {minutes:.0f} minutes of training steps on that GPU. The VAE alone rebuilds unseen clips at "
        f"{fidelity:.1f} dB, and in {100 * read_back:.0f} % of them the shape is still read right."
    )
    return table(head, rows) + "\n\n" + conditions


def tiny_picture(report: dict[str, Any]) -> str:
    """An embedded model that makes pictures, at each size and with each text length that was measured."""
    rows = []
    for name, found in report["prompts"].items():
        rates, verdicts, settings = found["rates"], found["verdicts"], found["settings"]
        single = sum(verdict["shape_right"] is not None for verdict in verdicts)
        cells = [f"{100 * rates[kind]:.0f} %" for kind in ("colour", "shape", "pair_colours")]
        rows.append([name, f"{settings['steps']}", f"{single} + {len(verdicts) - single}", *cells])
    head = ["run as", "steps", "prompts (one + two objects)", "colour", "shape", "both colours of two"]
    names = {"transformer": "transformer", "unet": "UNet", "vae": "VAE"}
    names |= {"text_encoder": "text encoder", "text_encoder_2": "second text encoder"}
    count = ", ".join(f"{names[part]} {millions(number)}" for part, number in report["parameters"].items())
    size, fidelity = next(iter(report["vae"].items()))
    guidance = " or ".join(sorted({f"{found['settings']['guidance']:g}" for found in report["prompts"].values()}))
    conditions = (
        f"Guidance {guidance}, seed {report['seed']} and on, dense; {report['gpu']}, {versions(report['versions'])}. "
        f"Parameters: {count}; {report['bytes'] / 1e6:.1f} MB in all; {training_minutes(report['training']):.0f} "
        f"minutes of training steps on that GPU. The VAE alone rebuilds unseen pictures of {size}×{size} at "
        f"{fidelity['psnr']:.1f} dB, and in {100 * fidelity['read_back_rebuilt']['shape']:.0f} % of them the shape is "
        "still read right."
    )
    return table(head, rows) + "\n\n" + conditions


def fidelity(report: dict[str, Any]) -> str:
    """How near methods stay to dense attention: one table for each pipeline of `scripts/fidelity.py`."""
    densities, parts = report["plan"]["densities"], []
    for model, found in report["pipelines"].items():
        kept = dict.fromkeys((cell["label"], cell["dense_share"]) for cell in found["cells"])
        rows = []
        for label, share in kept:
            cells = {
                cell["target"]: closeness(cell)
                for cell in found["cells"]
                if (cell["label"], cell["dense_share"]) == (label, share)
            }
            steps = f"first {100 * share:.0f} %" if share else "later ones" if label.endswith("early") else "none"
            rows.append([label, steps, *(cells.get(density, "not run") for density in densities)])
        frames = f"{found['num_frames']} frames of " if found["num_frames"] > 1 else ""
        text = f" and {found['text_tokens']} of text" if found["text_tokens"] else ""
        parts.append(
            f"**{model}**, {frames}{found['height']}×{found['width']}, tokens {found['grid'].replace('x', '×')}{text}, "
            f"{found['heads']} heads of {found['head_dim']} in the finest layers. Dense obeys "
            f"{100 * found['dense']['recovered']:.0f} % of the prompts; dense with other seeds: "
            f"{closeness(found['other_seed'])}.\n\n"
            + table(["method", "dense steps", *(f"{density:g}" for density in densities)], rows)
        )
    conditions = (
        "A cell says which density was reached, PSNR against the dense sample of the same seed (± standard deviation "
        "over the prompts), SSIM, and how many prompts are obeyed; or the lowest density that the method has at this "
        "size. “agent, early” has agents in the first 40 % of the steps alone, as published. "
        f"{report['plan']['prompts']} prompts, {report['plan']['steps']} steps, seed {report['seed']} and on; "
        f"{where(report)}, {versions(report['versions'])}, commit {report['commit']}."
    )
    return "\n\n".join([*parts, conditions])


def closeness(cell: dict[str, Any]) -> str:
    """`0.29: 24.1 ± 2.0 dB, 0.92, 88 %`: reached density, PSNR, SSIM, obeyed prompts; or a method's floor."""
    if "psnr" not in cell:
        return "—" if cell["floor"] is None else f"floor {cell['floor']:.2f}"
    reached = f"{cell['density']:.2f}: " if "density" in cell else ""
    psnr = f"{cell['psnr']['mean']:.1f} ± {cell['psnr']['std']:.1f} dB"
    return f"{reached}{psnr}, {cell['ssim']['mean']:.2f}, {100 * cell['recovered']:.0f} %"


def training_minutes(training: dict[str, Any]) -> float:
    return sum(phase["seconds"] for stage in training.values() for phase in stage.values()) / 60


def millions(count: int) -> str:
    return f"{count / 1e6:.2g} M"


# For each section the files that it is made from, and what makes it of them; all but the first may not be there yet.
SECTIONS: dict[str, tuple[Any, ...]] = {
    "compare": ("compare-tiny-wan.json", compare),
    "compare-gpu": ("compare-tiny-wan-h200.json", compare_briefly),
    "kernels": ("bench-kernels.json", bench),
    "portable": ("bench-portable.json", bench),
    "models": ("bench-models.json", models),
    "tiny-wan": ("tiny-wan-eval.json", tiny_wan),
    "tiny-flux": ("tiny-flux-eval.json", tiny_picture),
    "tiny-sd": ("tiny-sd-eval.json", tiny_picture),
    "fidelity": ("fidelity.json", fidelity),
    "together": ("together.json", "together-gpu.json", "together-2-gpus.json", together),
}


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def filled(readme: str, results: Path, missing_ok: bool = False) -> str:
    """The text of README.md with every section made anew.

    Raises:
        Stale: If a section is unknown, incomplete or missing, or its file cannot be read.
    """
    marked = re.findall(r"<!-- (?:begin|end): (\S+) -->", readme)
    there = {name for name, (*files, _) in SECTIONS.items() if any((results / file).exists() for file in files)}
    for name in sorted({*there, *marked}):
        if name not in SECTIONS:
            raise Stale(f"README.md has a section {name!r}; known are {', '.join(SECTIONS)}.")
        if len(re.findall(rf"<!-- begin: {name} -->.*?<!-- end: {name} -->", readme, re.DOTALL)) != 1:
            raise Stale(f"README.md needs exactly one <!-- begin: {name} --> with <!-- end: {name} --> behind it.")
    for name, (*files, render) in SECTIONS.items():
        paths = [results / file for file in files]
        if name not in marked:
            continue
        if missing_ok and not paths[0].exists():
            continue
        try:
            text = render(load(paths[0]), *(load(path) if path.exists() else None for path in paths[1:]))
        except FileNotFoundError:
            raise Stale(f"{paths[0]} is missing; section {name!r} is made from it. CONTRIBUTING.md says how.") from None
        except (KeyError, TypeError, ValueError) as error:
            path = " or ".join(map(str, paths))
            raise Stale(f"{path} is not what section {name!r} expects: {type(error).__name__}: {error}") from error
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        before, rest = readme.split(begin)
        readme = f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}"
    return readme


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if README.md is stale")
    parser.add_argument("--missing-ok", action="store_true", help="leave sections alone whose file is missing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    options = parser.parse_args(arguments)
    old = options.readme.read_text(encoding="utf-8")
    try:
        new = filled(old, options.results, options.missing_ok)
    except Stale as error:
        sys.stderr.write(f"readme_tables: {error}\n")
        return 1
    if options.check and new != old:
        sys.stderr.write("readme_tables: README.md is stale; run: python3 scripts/readme_tables.py\n")
        return 1
    if not options.check and new != old:
        options.readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
