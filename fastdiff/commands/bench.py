"""`fastdiff bench`: kernels alone, and one denoising forward of whole models, on this machine's GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options as o

if TYPE_CHECKING:
    from fastdiff.bench.kernels import Bench
    from fastdiff.bench.models import ModelBench

# The names of fastdiff.bench.shapes, .models and .architectures, whose packages bring torch.
SHAPES = (
    "W", "W-8-heads", "W-509-frames", "wan-1.3b", "hunyuan", "flux-4k", "flux-8k", "cogvideox", "sd-1.5",
    "head-dim-40", "head-dim-48", "head-dim-80", "head-dim-96", "head-dim-256",
)  # fmt: skip
CPU_SHAPES = ("portable-64", "portable-128")
MODES = ("eager", "compiled")
MODELS = ("wan-14b", "wan-1.3b", "hunyuan", "cogvideox", "mochi", "flux", "flux-8k", "sdxl")

app = typer.Typer(help="Time kernels alone, or whole models, on this machine's GPU.", rich_markup_mode=None)

Repeats = Annotated[int, typer.Option(min=1, help="Timed calls. More is slower and steadier.")]
Commit = Annotated[str | None, typer.Option(help="Of fastdiff, for the record, where this is no git checkout.")]


@app.command()
def kernels(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Which attention call, repeatable: {', '.join(SHAPES)}; with --cpu {', '.join(CPU_SHAPES)}. All by "
            "default.",
        ),
    ] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Time the portable backend on the CPU.")] = False,
    repeats: Repeats = 10,
    output: Annotated[Path, typer.Option(help="The JSON file for the records.")] = Path("outputs/bench-kernels.json"),
    commit: Commit = None,
    as_json: o.AsJson = False,
) -> None:
    """Time fastdiff's kernels against the dense kernels found here.

    Those are cuDNN, flash and efficient SDPA, FlexAttention, compiled, and FlashAttention-4 where it is installed.
    Every kernel is compared with float64 attention first; a wrong one ends the run and is not timed. The records are a
    list of objects, one for each kernel and direction, written after each shape.

    \b
    Examples:
      fastdiff bench kernels
      fastdiff bench kernels --shape W --shape hunyuan --repeats 20
      fastdiff bench kernels --cpu
    """
    from fastdiff.bench import shapes
    from fastdiff.bench.kernels import Bench
    from fastdiff.bench.record import conditions

    from . import bench_tables

    there = shapes.CPU_SHAPES if cpu else shapes.GPU_SHAPES
    chosen = _chosen("--shape", shape or [], {some.name: some for some in there})
    if not cpu:
        _require_gpu("--cpu times the portable backend instead")
    device = "cpu" if cpu else "cuda"

    def bench(some: Any) -> Bench:
        return Bench(some, device, repeats)

    _run(chosen, bench, conditions(device, commit), output, as_json, bench_tables.kernels)


@app.command()
def models(
    model: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Which, repeatable: {', '.join(MODELS)}. All by default.")
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Build all layers; by default a few, and times are scaled to all.")
    ] = False,
    mode: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"{' or '.join(MODES)}, repeatable. Both by default.")
    ] = None,
    density: Annotated[float, typer.Option(help="What methods are solved for, where they can be.")] = 0.3,
    repeats: Repeats = 3,
    output: Annotated[Path, typer.Option(help="The JSON file for the records.")] = Path("outputs/bench-models.json"),
    commit: Commit = None,
    as_json: o.AsJson = False,
) -> None:
    """Time one forward of published models with random weights.

    A denoising forward, dense as diffusers does it, with the fastest dense kernel, and by each method; eager and with
    compiled blocks. Models are built in bfloat16 from their published configs; nothing is downloaded. Records say the
    time of one forward, the peak memory, the density, and where the time goes: attention, linears, element-wise work,
    the reorder of tokens, and building the plan, which a run does once.

    \b
    Examples:
      fastdiff bench models --model wan-14b --mode compiled
      fastdiff bench models --model flux --model sdxl --full
    """
    from fastdiff.bench.architectures import ARCHITECTURES
    from fastdiff.bench.models import ModelBench
    from fastdiff.bench.record import conditions
    from fastdiff.methods.base import check_density

    from . import bench_tables

    check_density(density)
    chosen = _chosen("--model", model or [], {some.name: some for some in ARCHITECTURES})
    timed = _chosen("--mode", mode or [], {name: name for name in MODES})
    _require_gpu("whole models are timed on a GPU only")

    def bench(some: Any) -> ModelBench:
        return ModelBench(some, density=density, full=full, repeats=repeats, modes=timed)

    _run(chosen, bench, conditions("cuda", commit), output, as_json, bench_tables.models)


def _run(
    chosen: list[Any],
    bench: Callable[[Any], Bench | ModelBench],
    common: dict[str, Any],
    output: Path,
    as_json: bool,
    show: Callable[[Any, list[dict[str, Any]], dict[str, str]], None],
) -> None:
    """Measures one after the other; what is done stays in the file if a later one fails."""
    from fastdiff.measure.report import to_json, write_json

    from .outputs import staged
    from .screen import results_only_on_stdout, stage

    with staged(output.parent, [output.name]):
        # What cannot be written shows before minutes of measuring.
        pass
    records: list[dict[str, Any]] = []
    for some in chosen:
        with results_only_on_stdout(), stage(f"{some.name} ({some.what})"):
            measured = bench(some)
            found = measured.run()
            records += [{**one, **common} for one in found]
            write_json(output, records)
        if not as_json:
            show(some, found, measured.missing)
    if as_json:
        typer.echo(to_json(records))
    else:
        typer.echo(f"Records in {output}")


def _chosen(option: str, names: list[str], there: dict[str, Any]) -> list[Any]:
    """What was asked for by name, in the order of `there`; all of it for no name."""
    from fastdiff_kernels import InvalidInputError

    for name in names:
        if name not in there:
            raise InvalidInputError(f"{option} is {name!r}; allowed are {', '.join(there)}.")
    return [found for name, found in there.items() if not names or name in names]


def _require_gpu(instead: str) -> None:
    import torch

    from fastdiff_kernels import UnsupportedError

    if not torch.cuda.is_available():
        raise UnsupportedError(f"no CUDA device was found; {instead}.")
