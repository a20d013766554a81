"""`fastdiff generate`: one video or picture, dense or sparse, and a JSON beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options as o

if TYPE_CHECKING:
    from .pipelines import Job

VIDEO, PICTURE = Path("outputs/video.mp4"), Path("outputs/picture.png")
Output = Annotated[
    Path | None,
    typer.Option(
        help="The result, .mp4 for a video and .png for a picture; the JSON gets the same name. By default "
        f"{VIDEO} or {PICTURE}."
    ),
]


def generate(
    model: o.Model = "tiny-wan",
    method: o.Method = None,
    config: o.Config = None,
    density: o.Density = None,
    preset: o.Preset = None,
    prompt: o.Prompt = None,
    height: o.Height = None,
    width: o.Width = None,
    num_frames: o.NumFrames = None,
    steps: o.Steps = None,
    guidance_scale: o.GuidanceScale = None,
    seed: o.Seed = None,
    dense_steps: o.DenseSteps = None,
    dense_layers: o.DenseLayers = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    output: Output = None,
    as_json: o.AsJson = False,
) -> None:
    """Generate one video or picture, dense or with sparse attention.

    Writes it, and beside it a JSON with config, density, seconds per step and versions. The method paro without
    --config calibrates first and keeps its calibration file there too.

    \b
    Examples:
      fastdiff generate --prompt "a green triangle moving up" --num-frames 49
      fastdiff generate --method dense --output outputs/dense.mp4
      fastdiff generate --model tiny-flux --method clear --density 0.3 --prompt "a red ring over a striped ground"
      fastdiff generate --config '{"decay_factor": 0.2, "block_size": 32}' --dense-steps 2
      fastdiff generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --preset radial-wan-2.1 --prompt "a cat on a surfboard"
    """
    from fastdiff_kernels.errors import InvalidInputError

    from .screen import results_only_on_stdout

    request = o.Request.parse(locals())
    if output is not None and output.suffix not in (VIDEO.suffix, PICTURE.suffix):
        raise InvalidInputError(f"--output is {output}; it must end in .mp4 for a video, in .png for a picture.")
    with results_only_on_stdout():
        report = _run(request, output)
    if as_json:
        from fastdiff.measure.report import to_json

        typer.echo(to_json(report))
        return
    from .tables import size

    said = "dense" if report["config"] is None else f"{report['method']} at density {report['density']:.3f}"
    typer.echo(
        f"{report['output']}: {size(report)}, {said}, {report['seconds']:.1f} s ({report['seconds_per_step']:.2f} s a "
        "step)"
    )


def _run(request: o.Request, output: Path | None) -> dict:
    from fastdiff.measure import report

    from .attention import config_for, sparse_attention
    from .outputs import check_room, staged
    from .pictures import images, require_writers, write
    from .pipelines import prepare
    from .running import generate_once
    from .screen import stage
    from .sizes import core

    places = [VIDEO, PICTURE] if output is None else [output]
    require_writers(video=places[-1].suffix == VIDEO.suffix)
    names = [place.with_suffix(suffix).name for place in places for suffix in (place.suffix, ".json", ".safetensors")]
    with staged(places[0].parent, names) as folder:
        pipe, job = prepare(request)
        output = _place(request, output, job)
        require_writers(video=job.is_video)
        check_room(output.parent, job.pixel_bytes)
        config = config_for(pipe, request, job, folder / output.with_suffix(".safetensors").name)
        with sparse_attention(pipe, request, job, config) as sparse:
            run = generate_once(pipe, job, f"Generating ({request.method})")
        with stage(f"Writing {output.name}"):
            write(folder / output.name, images(run.frames), job.fps)
        result = {
            "output": str(output),
            "model": request.model,
            "method": request.method,
            "preset": request.preset,
            **sparse.to_dict(folder, output.parent),
            "seconds": run.seconds,
            "seconds_per_step": run.seconds_per_step(sparse.sparse_steps),
            **job.to_dict(),
            "dtype": str(core(pipe).dtype).removeprefix("torch."),
            **report.environment(str(pipe.device)),
        }
        report.write_json(folder / output.with_suffix(".json").name, result)
    return result


def _place(request: o.Request, output: Path | None, job: Job) -> Path:
    from fastdiff_kernels.errors import InvalidInputError

    fitting = VIDEO if job.is_video else PICTURE
    if output is not None and output.suffix != fitting.suffix:
        kind = "videos" if job.is_video else "pictures"
        raise InvalidInputError(f"--output is {output} and {request.model} makes {kind}; end it in {fitting.suffix}.")
    return output or fitting
