"""`fastdiff calibrate`: orders and masks of PARO for one model at one size, as one file."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from fastdiff.calibration import CalibrationSettings

    from .pipelines import Job


def calibrate(
    model: o.Model = "tiny-wan",
    method: Annotated[str, typer.Option(help="The method that needs it: paro.")] = "paro",
    density: Annotated[
        float, typer.Option(help="Share of computed scores, text included. Less is faster, more is safer.")
    ] = 0.3,
    prompts: Annotated[
        Path | None,
        typer.Option(help="A text file with a prompt in each line; one or two do. By default the model's own prompt."),
    ] = None,
    groups: Annotated[
        int, typer.Option(help="Groups of steps with masks of their own. More is closer and takes more memory.")
    ] = 4,
    objective: Annotated[
        str, typer.Option(help="What makes an order good: mass (attention kept), or paper (the paper's score, mended).")
    ] = "mass",
    mask: Annotated[
        str, typer.Option(help="global: one threshold for all heads. row: each query block keeps an equal share.")
    ] = "global",
    sample: Annotated[
        float, typer.Option(help="Share of the query blocks looked at for the orders; below 1 all prompts run twice.")
    ] = 1.0,
    alpha: Annotated[float, typer.Option(help="For --objective paper: weight of skippable blocks.")] = 1.0,
    epsilon: Annotated[float, typer.Option(help="For --objective paper: entries below it are small.")] = 1e-3,
    sigma: Annotated[float, typer.Option(help="For --objective paper: share of small entries to skip a block.")] = 0.9,
    height: o.Height = None,
    width: o.Width = None,
    num_frames: o.NumFrames = None,
    steps: o.Steps = None,
    guidance_scale: o.GuidanceScale = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    output: Annotated[Path, typer.Option(help="The file, .safetensors.")] = Path("outputs/calibration.safetensors"),
    as_json: o.AsJson = False,
) -> None:
    """Find token orders and block masks for the method paro.

    The pipeline runs dense and is watched. What is found holds for this model at this size, and for any prompt and
    seed. Use it with --method paro --config '{"calibration": "outputs/calibration.safetensors"}'.

    \b
    Examples:
      fastdiff calibrate --num-frames 17 --density 0.5
      fastdiff calibrate --model tiny-flux --objective paper --output outputs/flux.safetensors
      fastdiff calibrate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --density 0.3 --prompts prompts.txt --sample 0.125
    """
    from fastdiff.calibration import CalibrationSettings
    from fastdiff_kernels.errors import InvalidInputError

    from .screen import results_only_on_stdout

    if method != "paro":
        raise InvalidInputError(f"--method is {method!r}; only paro is calibrated.")
    settings = CalibrationSettings(density, groups, objective, mask, sample, alpha, epsilon, sigma)
    if output.suffix != ".safetensors":
        raise InvalidInputError(f"--output is {output}; it must end in .safetensors.")
    texts = _own_prompt(model) if prompts is None else _read_prompts(prompts)
    options = {"method": "dense", "config": None, "density": None, "dense_steps": None, "dense_layers": None}
    request = o.Request.parse({**locals(), **options, "prompt": texts[0]})
    with results_only_on_stdout():
        result = _run(request, texts, settings, output)
    if as_json:
        from fastdiff.measure.report import to_json

        typer.echo(to_json(result))
        return
    from .tables import pairs

    pairs(f"paro for {request.model} at {result['size']}", _rows(result))
    typer.echo(f"Calibration in {output}")


def _own_prompt(model: str) -> list[str]:
    from fastdiff_kernels.errors import InvalidInputError

    prompt = o.defaults_for(model).prompt
    if prompt is None:
        raise InvalidInputError(f"--model {model} needs prompts: add --prompts FILE, a prompt in each line.")
    return [prompt]


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file that say something."""
    from fastdiff_kernels.errors import InvalidInputError

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"--prompts {path} cannot be read ({error}); give a text file.") from error
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise InvalidInputError(f"--prompts {path} has no prompt; write one in each line.")
    return found


def _run(request: o.Request, texts: list[str], settings: CalibrationSettings, output: Path) -> dict[str, Any]:
    import fastdiff
    from fastdiff.measure import report
    from fastdiff.methods.paro_file import calibration_at

    from .pipelines import prepare
    from .running import arguments
    from .screen import stage

    pipe, job = prepare(request)
    _check_memory(pipe, job, settings)
    runs = len(texts) * (1 if settings.sample == 1 else 2)
    start = time.perf_counter()
    with stage("Calibrating", total=runs * job.steps) as shown:

        def on_step_end(_pipe, _step, _timestep, tensors):
            shown.advance()
            return tensors

        call = arguments(pipe, job, callback_on_step_end=on_step_end)
        config = fastdiff.calibrate(pipe, texts, path=output, seed=job.seed, **asdict(settings), **call)
    return {
        "output": str(output),
        "config": config.to_dict(),
        "model": request.model,
        "size": job.size,
        "seconds": time.perf_counter() - start,
        "file_bytes": output.stat().st_size,
        **calibration_at(config.calibration).describe(),
        **report.environment(str(pipe.device)),
    }


def _check_memory(pipe: Any, job: Job, settings: CalibrationSettings) -> None:
    from fastdiff.methods.paro_file import BLOCK
    from fastdiff_patches.families import family_of
    from fastdiff_patches.locate import self_attention, unwrap

    from .memory import check_memory
    from .sizes import core, finest_layer

    model = unwrap(core(pipe))
    layers = len(self_attention(model, family_of(model)))
    finest = finest_layer(pipe, job.grid, job.text_tokens)
    needed = settings.needed_bytes(layers, finest.heads, finest.layout.grid.tokens, BLOCK)
    check_memory(needed, f"the statistics of {layers} layers", "--groups, --sample or the size")


def _rows(result: dict[str, Any]) -> dict[str, str]:
    orders = ", ".join(f"{name} {count}" for name, count in result["orders"].items() if count)
    mass = ", ".join(f"{mass:.3f}" for mass in result["mass_by_group"])
    rows = {
        "grid": ", ".join(result["grids"]),
        "layers": f"{result['layers']}, {result['dense_layers']} of them left dense",
        "density": f"{result['density']:.3f}, of a head {result['lowest_head_density']:.3f} to "
        f"{result['highest_head_density']:.3f}",
        "heads by order": orders,
        "mean margin to the next order": f"{result['mean_margin']:.4f}",
        "attention kept, by group of steps": mass,
        "attention kept by the worst head": f"{result['lowest_mass']:.3f}",
        "runs": f"{result['prompts']} of {result['steps']} steps, {result['seconds']:.0f} s",
        "file": f"{result['file_bytes'] / 1024:.0f} KiB",
    }
    if result["sample"] < 1:
        rows["heads whose margin is within the sampling error"] = str(result["heads_within_sampling_error"])
    return rows
