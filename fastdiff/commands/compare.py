"""`fastdiff compare`: the same video or picture dense and sparse, side by side, with time and fidelity."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from .attention import SparseAttention
    from .pipelines import Job
    from .running import Run

RESULTS = ("dense", "sparse", "side_by_side")
CALIBRATION = "calibration.safetensors"
FILES = (*(name + suffix for suffix in (".mp4", ".png") for name in RESULTS), "frames.png", "report.json", CALIBRATION)
# Height to which small videos and pictures are enlarged where they stand under labels.
LEAST_SIDE = 256


def compare(
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
    output: Annotated[Path, typer.Option(help="The folder for the results.")] = Path("outputs"),
    as_json: o.AsJson = False,
) -> None:
    """Generate a video or picture dense and sparse, and compare.

    Time and fidelity, at the same seed and noise, after one warm-up step each. Writes dense.mp4, sparse.mp4,
    side_by_side.mp4, frames.png (a contact sheet) and report.json; for a picture dense.png, sparse.png,
    side_by_side.png and report.json. The method paro without --config calibrates first and adds
    calibration.safetensors.

    \b
    Examples:
      fastdiff compare
      fastdiff compare --prompt "a blue square moving up" --density 0.3 --output outputs/square
      fastdiff compare --config '{"decay_factor": 0.2, "block_size": 32}' --dense-steps 2
      fastdiff compare --model tiny-flux --method clear --density 0.3 --prompt "a red ring over a striped ground"
      fastdiff compare --model tiny-sd --method agent
      fastdiff compare --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "a cat on a surfboard" --dense-steps 12
    """
    from fastdiff_kernels.errors import InvalidInputError

    from .screen import results_only_on_stdout

    request = o.Request.parse(locals())
    if request.method == "dense":
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

    from .attention import config_for, sparse_attention, warm_up_sparse
    from .outputs import check_room, staged
    from .pictures import require_writers
    from .pipelines import prepare
    from .running import generate_once, warm_up
    from .screen import stage

    require_writers(video=False)
    with staged(output, FILES) as folder:
        pipe, job = prepare(request)
        require_writers(video=job.is_video)
        # Two results, and both again, enlarged, side by side.
        check_room(output, 2 * job.pixel_bytes + beside_bytes(job))
        config = config_for(pipe, request, job, folder / CALIBRATION)
        with sparse_attention(pipe, request, job, config) as sparse:
            # What the method refuses shows before the dense run.
            pass
        with stage("Warming up"):
            warm_up(pipe, job)
            warm_up_sparse(pipe, job, config)
        dense_run = generate_once(pipe, job, "Generating (dense)")
        with sparse_attention(pipe, request, job, config):
            sparse_run = generate_once(pipe, job, f"Generating ({request.method}, density {sparse.density:.2f})")
        with stage("Measuring"):
            result = _measure(pipe, request, job, sparse, dense_run, sparse_run) | sparse.to_dict(folder, output)
        with stage("Writing results"):
            _write(folder, job, result, dense_run, sparse_run)
        report.write_json(folder / "report.json", result)
    return result


def _measure(
    pipe: Any, request: o.Request, job: Job, sparse: SparseAttention, dense_run: Run, sparse_run: Run
) -> dict[str, Any]:
    from fastdiff.measure import quality, report
    from fastdiff.measure.timing import attention_speedup

    from .sizes import core, finest_layer

    layer = sparse.layer or finest_layer(pipe, job.grid, job.text_tokens)
    dtype = core(pipe).dtype
    alone = attention_speedup(
        sparse.planner,
        layer.layout,
        heads=layer.heads,
        head_dim=layer.head_dim,
        layer=layer.index,
        device=pipe.device,
        dtype=dtype,
    )
    return {
        "model": request.model,
        "method": request.method,
        "preset": request.preset,
        "density": sparse.density,
        "seconds_dense": dense_run.seconds,
        "seconds_sparse": sparse_run.seconds,
        "speedup": dense_run.seconds / sparse_run.seconds,
        "psnr": quality.psnr(sparse_run.frames, dense_run.frames),
        "ssim": quality.ssim(sparse_run.frames, dense_run.frames),
        "attention_speedup": alone.speedup,
        "attention": alone.to_dict(),
        "seconds_per_step_dense": dense_run.seconds_per_step(),
        "seconds_per_step_sparse": sparse_run.seconds_per_step(sparse.sparse_steps),
        "timed_steps_dense": len(dense_run.timed()),
        "timed_steps_sparse": len(sparse_run.timed(sparse.sparse_steps)),
        "identical": bool((sparse_run.frames == dense_run.frames).all()),
        **job.to_dict(),
        "tokens": job.grid.tokens,
        "heads": layer.heads,
        "head_dim": layer.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        **report.environment(str(pipe.device)),
    }


def beside_bytes(job: Job) -> int:
    """Of the side-by-side result uncompressed."""
    return 2 * job.pixel_bytes * max(1, -(-LEAST_SIDE // job.height)) ** 2


def _write(folder: Path, job: Job, result: dict[str, Any], dense_run: Run, sparse_run: Run) -> None:
    from .pictures import beside, contact_sheet, images, write

    suffix = ".mp4" if job.is_video else ".png"
    runs = {"dense": dense_run, "sparse": sparse_run}
    for name, run in runs.items():
        write(folder / (name + suffix), images(run.frames), job.fps)
    large = {name: images(run.frames, LEAST_SIDE) for name, run in runs.items()}
    method = f"{result['method']}, density {result['density']:.2f}"
    times = {name: f"{result[f'seconds_per_step_{name}']:.2f} s/step" for name in runs}
    labels = (f"dense, {times['dense']}", f"{method}, {times['sparse']}")
    write(folder / f"side_by_side{suffix}", beside(large["dense"], large["sparse"], labels), job.fps)
    if not job.is_video:
        return
    fidelity = "identical" if result["identical"] else f"{result['psnr']:.1f} dB PSNR, {result['ssim']:.3f} SSIM"
    rows = [(labels[0], large["dense"]), (f"{labels[1]}: {fidelity} against dense", large["sparse"])]
    title = f"“{job.prompt}”, {result['model']}, seed {job.seed}, {job.steps} steps"
    contact_sheet(rows, title).save(folder / "frames.png")
