"""`fastdiff compare`: the same video dense and sparse, side by side, with time and fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from .attention import SparseAttention
    from .pipelines import Job
    from .running import Run

FILES = ("dense.mp4", "sparse.mp4", "side_by_side.mp4", "frames.png", "report.json")
# Height to which small videos are enlarged where they stand under labels.
LEAST_SIDE = 256


def compare(
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
    output: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("outputs"),
    as_json: o.AsJson = False,
) -> None:
    """Generate a video twice, dense and sparse, and compare time and fidelity.

    Same seed and same noise, after one warm-up step each. Writes dense.mp4, sparse.mp4, side_by_side.mp4,
    frames.png (a contact sheet) and report.json.

    \b
    Examples:
      fastdiff compare
      fastdiff compare --prompt "a blue square moving up" --density 0.3 --output outputs/square
      fastdiff compare --config '{"decay_factor": 0.2, "block_size": 32}' --dense-steps 2
      fastdiff compare --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat on a surfboard" --dense-steps 12
    """
    from fastdiff_kernels.errors import InvalidInputError

    from .screen import results_only_on_stdout

    request = o.Request.parse(locals())
    if method == "dense":
        raise InvalidInputError("--method is dense; compare runs dense by itself, name the sparse method.")
    with results_only_on_stdout():
        report = _run(request, output)
    if as_json:
        from fastdiff.measure.report import to_json

        typer.echo(to_json(report))
    else:
        from .tables import comparison

        comparison(report, output)


def _run(request: o.Request, output: Path) -> dict[str, Any]:
    from fastdiff.measure import report

    from .attention import sparse_attention
    from .outputs import check_room, staged
    from .pictures import require_writers
    from .pipelines import prepare
    from .running import generate_video, warm_up
    from .screen import stage

    require_writers()
    with staged(output, FILES) as folder:
        pipe, job = prepare(request)
        # Two videos, and both again, enlarged, side by side.
        check_room(output, 2 * job.video_bytes + beside_bytes(job))
        with sparse_attention(pipe, request, job) as sparse:
            pass
        with stage("Warming up"):
            warm_up(pipe, job)
            with sparse_attention(pipe, request, job, sparse.config, schedule=False):
                warm_up(pipe, job)
        dense_run = generate_video(pipe, job, "Generating (dense)")
        with sparse_attention(pipe, request, job, sparse.config):
            sparse_run = generate_video(pipe, job, f"Generating ({request.method}, density {sparse.density:.2f})")
        with stage("Measuring"):
            result = _measure(pipe, request, job, sparse, dense_run, sparse_run)
        with stage("Writing videos and contact sheet"):
            _write(folder, job, result, dense_run, sparse_run)
        report.write_json(folder / "report.json", result)
    return result


def _measure(
    pipe: Any, request: o.Request, job: Job, sparse: SparseAttention, dense_run: Run, sparse_run: Run
) -> dict[str, Any]:
    from fastdiff.measure import quality, report
    from fastdiff.measure.timing import attention_speedup
    from fastdiff.methods import build_plan
    from fastdiff_kernels import TokenLayout

    shape = pipe.transformer.config
    alone = attention_speedup(
        build_plan(sparse.config, TokenLayout.self_attention(job.grid)),
        heads=shape.num_attention_heads,
        head_dim=shape.attention_head_dim,
        device=pipe.device,
        dtype=pipe.transformer.dtype,
    )
    return {
        "model": request.model,
        "method": request.method,
        "density": sparse.density,
        "seconds_dense": dense_run.seconds,
        "seconds_sparse": sparse_run.seconds,
        "speedup": dense_run.seconds / sparse_run.seconds,
        "psnr": quality.psnr(sparse_run.video, dense_run.video),
        "ssim": quality.ssim(sparse_run.video, dense_run.video),
        "attention_speedup": alone.speedup,
        "attention": alone.to_dict(),
        "seconds_per_step_dense": dense_run.seconds_per_step,
        "seconds_per_step_sparse": sparse_run.seconds_per_step,
        "identical": bool((sparse_run.video == dense_run.video).all()),
        **sparse.to_dict(),
        **job.to_dict(),
        "tokens": job.grid.tokens,
        "heads": shape.num_attention_heads,
        "head_dim": shape.attention_head_dim,
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        **report.environment(str(pipe.device)),
    }


def beside_bytes(job: Job) -> int:
    """Of the side-by-side video uncompressed."""
    return 2 * job.video_bytes * max(1, -(-LEAST_SIDE // job.height)) ** 2


def _write(folder: Path, job: Job, result: dict[str, Any], dense_run: Run, sparse_run: Run) -> None:
    from .pictures import beside, contact_sheet, images, write_video

    runs = {"dense": dense_run, "sparse": sparse_run}
    for name, run in runs.items():
        write_video(folder / f"{name}.mp4", images(run.video), job.fps)
    large = {name: images(run.video, LEAST_SIDE) for name, run in runs.items()}
    method = f"{result['method']}, density {result['density']:.2f}"
    times = {name: f"{run.seconds_per_step:.2f} s/step" for name, run in runs.items()}
    labels = (f"dense, {times['dense']}", f"{method}, {times['sparse']}")
    write_video(folder / "side_by_side.mp4", beside(large["dense"], large["sparse"], labels), job.fps)
    fidelity = "identical" if result["identical"] else f"{result['psnr']:.1f} dB PSNR, {result['ssim']:.3f} SSIM"
    rows = [(labels[0], large["dense"]), (f"{labels[1]}: {fidelity} against dense", large["sparse"])]
    title = f"“{job.prompt}”, {result['model']}, seed {job.seed}, {job.steps} steps"
    contact_sheet(rows, title).save(folder / "frames.png")
