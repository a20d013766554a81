"""From what a user asked to a loaded pipeline and a checked job, before anything long begins."""

from __future__ import annotations

import inspect
import math
import os
import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fastdiff.assets import EMBEDDED, FOREIGN, GenerationDefaults, pipeline_path
from fastdiff_kernels.errors import InvalidInputError, UnsupportedError

from .failures import is_out_of_memory
from .memory import check_memory
from .options import Request
from .screen import stage

if TYPE_CHECKING:
    import torch

    from fastdiff_kernels import Grid


@dataclass(frozen=True)
class Job:
    """One generation with nothing left open.

    Attributes:
        grid: The visual tokens of the transformer.
    """

    prompt: str
    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float | None
    seed: int
    fps: int
    grid: Grid

    @property
    def video_bytes(self) -> int:
        """Of the video uncompressed, eight bits a channel."""
        return self.num_frames * self.height * self.width * 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"grid": str(self.grid)}


def defaults_for(model: str) -> GenerationDefaults:
    return EMBEDDED.get(model, FOREIGN)


def locate(model: str) -> str:
    """What `from_pretrained` takes: the folder of an embedded pipeline, a local folder, or a Hub id.

    Raises:
        InvalidInputError: If it is none of them.
    """
    if model in EMBEDDED:
        return str(pipeline_path(model))
    # os.path where Path would raise: for a name that is too long, or somebody's home that does not exist.
    path = os.path.expanduser(model)
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "model_index.json")):
            raise InvalidInputError(
                f"{model} is no diffusers pipeline: it has no model_index.json. Give the folder that save_pretrained "
                "wrote, or the id of a Hub repository."
            )
        return path
    if os.path.exists(path):
        raise InvalidInputError(f"{model} is a file; --model takes a diffusers folder.")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) is None:
        raise InvalidInputError(
            f"there is no folder {model}; --model takes {', '.join(EMBEDDED)}, a diffusers folder, or a Hub id such as "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
        )
    return model


def device_and_dtype(request: Request) -> tuple[torch.device, torch.dtype]:
    """Where and in which type to run.

    Raises:
        InvalidInputError: If the device is not there.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    kind = request.device
    if kind == "auto":
        kind = next(name for name in ("cuda", "mps", "cpu") if there[name])
    if not there[kind]:
        found = ", ".join(name for name, present in there.items() if present)
        raise InvalidInputError(f"--device is {kind} and this machine has none that torch sees; it has {found}.")
    dtype = request.dtype
    if dtype == "auto":
        dtype = "bfloat16" if kind == "cuda" else "float32"
    return torch.device(kind), getattr(torch, dtype)


def load(source: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline on its device.

    Raises:
        InvalidInputError: If diffusers cannot load it; the message has diffusers' own first line.
        UnsupportedError: If it makes no videos.
    """
    import diffusers
    import torch
    import transformers

    # One bar of our own instead of one for each component.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # diffusers 0.40 renamed the argument.
    name = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
    try:
        # Video VAEs lose visible detail in half precision and cost little in float32.
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **{name: {"default": dtype, "vae": torch.float32}})
    except Exception as error:
        # Broken files raise whatever their reader likes (SafetensorError derives from Exception alone).
        if is_out_of_memory(error):
            raise
        raise InvalidInputError(_why_not_loaded(source, error)) from error
    parameters = inspect.signature(pipe.__call__).parameters
    # Older pipelines from text to video have a U-Net.
    transformer = getattr(pipe, "transformer", None)
    if "num_frames" not in parameters or "prompt" not in parameters or transformer is None:
        raise UnsupportedError(
            f"{source} is a {type(pipe).__name__}; this command needs a pipeline from text to video with a "
            "transformer, such as WanPipeline. From Python, fastdiff.apply takes others."
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _why_not_loaded(source: str, error: Exception) -> str:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if len(reason) > 300:
        reason = reason[:300] + " …"
    if os.path.isdir(source):
        return f"{source} could not be loaded as a diffusers pipeline. {reason}"
    return (
        f"there is no folder {source}, and it could not be loaded from the Hub: check the id, the network and "
        f"HF_HUB_OFFLINE. {reason}"
    )


def prepare(request: Request) -> tuple[Any, Job]:
    """Loads the pipeline and settles every option, with a progress bar.

    Raises:
        FastDiffError: If the model cannot be loaded or cannot take the sizes.
    """
    source = locate(request.model)
    if request.prompt is None and defaults_for(request.model).prompt is None:
        raise InvalidInputError(f'--model {request.model} needs a prompt: add --prompt "…".')
    with stage(f"Loading {request.model}"):
        device, dtype = device_and_dtype(request)
        pipe = load(source, device, dtype)
    return pipe, settle(pipe, request)


def settle(pipe: Any, request: Request) -> Job:
    """The job of a request: its options, else the model's defaults, else the pipeline's own.

    Raises:
        InvalidInputError: If the pipeline cannot take a size, or this machine cannot hold it.
    """
    defaults = defaults_for(request.model)
    parameters = inspect.signature(pipe.__call__).parameters

    def pick(name: str, parameter: str | None = None) -> Any:
        for value in (getattr(request, name), getattr(defaults, name)):
            if value is not None:
                return value
        own = parameters.get(parameter or name)
        return None if own is None or own.default is inspect.Parameter.empty else own.default

    sizes = {name: pick(name) for name in ("height", "width", "num_frames")}
    for name, value in sizes.items():
        if value is None:
            raise InvalidInputError(f"this pipeline has no default {name}; add --{name.replace('_', '-')}.")
    job = Job(
        prompt=pick("prompt"),
        steps=pick("steps", "num_inference_steps"),
        guidance_scale=pick("guidance_scale"),
        seed=pick("seed"),
        fps=defaults.fps,
        grid=None,
        **sizes,
    )
    job = replace(job, grid=_grid(pipe, job))
    _check_inputs(pipe, job)
    _check_memory(pipe, job)
    return job


def _grid(pipe: Any, job: Job) -> Grid:
    # diffusers rounds what does not fit to another size with a warning; here it is refused.
    from fastdiff_kernels import Grid

    config = pipe.transformer.config
    patch = getattr(config, "patch_size", 1)
    patch = (1, patch, patch) if isinstance(patch, int) else tuple(patch)
    space = getattr(pipe, "vae_scale_factor_spatial", None) or getattr(pipe, "vae_scale_factor", 1)
    time = getattr(pipe, "vae_scale_factor_temporal", 1)
    if (job.num_frames - 1) % time:
        low = (job.num_frames - 1) // time * time + 1
        raise InvalidInputError(
            f"--num-frames is {job.num_frames}; this model takes one more than a multiple of {time}, such as {low} or "
            f"{low + time}."
        )
    frames = (job.num_frames - 1) // time + 1
    if frames % patch[0]:
        raise InvalidInputError(
            f"--num-frames is {job.num_frames}, {frames} latent frames; this model takes multiples of {patch[0]}."
        )
    for name, value, multiple in (("height", job.height, space * patch[1]), ("width", job.width, space * patch[2])):
        if value % multiple:
            near = sorted({max(multiple, value // multiple * multiple), -(-value // multiple) * multiple})
            raise InvalidInputError(
                f"--{name} is {value}; this model takes multiples of {multiple}, such as {' or '.join(map(str, near))}."
            )
    grid = Grid(frames // patch[0], job.height // (space * patch[1]), job.width // (space * patch[2]))
    longest, allowed = max(grid.frames, grid.height, grid.width), getattr(config, "rope_max_seq_len", math.inf)
    if longest > allowed:
        raise InvalidInputError(f"the token grid would be {grid}; this model takes up to {allowed} along each axis.")
    return grid


def _check_inputs(pipe: Any, job: Job) -> None:
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    parameters = inspect.signature(check).parameters
    known = {"prompt": job.prompt, "height": job.height, "width": job.width, "num_frames": job.num_frames}
    arguments = {
        name: known.get(name)
        for name, parameter in parameters.items()
        if name in known or parameter.default is inspect.Parameter.empty
    }
    try:
        check(**arguments)
    except ValueError as error:
        raise InvalidInputError(f"{type(pipe).__name__} refuses this: {error}") from error


def _check_memory(pipe: Any, job: Job) -> None:
    # A lower bound: the decoded video as floats with one copy, and the activations of one block.
    if pipe.device.type != "cpu":
        return
    config = pipe.transformer.config
    width = getattr(config, "num_attention_heads", 1) * getattr(config, "attention_head_dim", 1)
    needed = 2 * 4 * job.video_bytes + 6 * 4 * job.grid.tokens * width
    check_memory(needed, f"{job.num_frames} frames of {job.height}x{job.width}", "--num-frames, --height or --width")
