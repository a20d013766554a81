"""`fastdiff generate`: one video, dense or sparse, and a JSON beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o


def generate(
    model: o.Model = "tiny-wan",
    method: o.Method = "radial",
    config: o.Config = None,
    density: o.Density = None,
    prompt: o.Prompt = None,
    height: o.Height = None,
    width: o.Width = None,
    num_frames: o.NumFrames = None,
    steps: o.Steps = None,
    guidance_scale: o.GuidanceScale = None,
    seed: o.Seed = None,
    dense_steps: o.DenseSteps = None,
    dense_layers: o.DenseLayers = "0",
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    output: Annotated[Path, typer.Option(help="The video; the JSON gets the same name.")] = Path("outputs/video.mp4"),
    as_json: o.AsJson = False,
) -> None:
    """Generate one video, dense or with sparse attention.

    Writes the video, and beside it a JSON with config, density, seconds per step and versions.

    \b
    Examples:
      fastdiff generate --prompt "a green triangle moving up" --num-frames 49
      fastdiff generate --method dense --output outputs/dense.mp4
      fastdiff generate --config '{"decay_factor": 0.2, "block_size": 32}' --dense-steps 2
      fastdiff generate --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --density 0.3 --dense-steps 12 --dense-layers 1 \\
          --prompt "a cat on a surfboard"
    """
    from fastdiff_kernels.errors import InvalidInputError

    from .screen import results_only_on_stdout

    request = o.Request.parse(locals())
    if output.suffix != ".mp4":
        raise InvalidInputError(f"--output is {output}; it must end in .mp4.")
    with results_only_on_stdout():
        report = _run(request, output)
    if as_json:
        from fastdiff.measure.report import to_json

        typer.echo(to_json(report))
        return
    said = "dense" if report["config"] is None else f"{report['method']} at density {report['density']:.3f}"
    typer.echo(
        f"{output}: {report['num_frames']} frames of {report['width']}x{report['height']}, {said}, "
        f"{report['seconds']:.1f} s ({report['seconds_per_step']:.2f} s a step)"
    )


def _run(request: o.Request, output: Path) -> dict:
    from fastdiff.measure import report

    from .attention import sparse_attention
    from .outputs import check_room, staged
    from .pictures import images, require_writers, write_video
    from .pipelines import prepare
    from .running import generate_video
    from .screen import stage

    require_writers()
    record = output.with_suffix(".json").name
    with staged(output.parent, [output.name, record]) as folder:
        pipe, job = prepare(request)
        check_room(output.parent, job.video_bytes)
        with sparse_attention(pipe, request, job) as sparse:
            run = generate_video(pipe, job, f"Generating ({request.method})")
        with stage("Writing the video"):
            write_video(folder / output.name, images(run.video), job.fps)
        result = {
            "video": str(output),
            "model": request.model,
            "method": request.method,
            **sparse.to_dict(),
            **run.to_dict(),
            **job.to_dict(),
            "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
            **report.environment(str(pipe.device)),
        }
        report.write_json(folder / record, result)
    return result
