"""From what a user asked to a loaded pipeline and a checked job, before anything long begins."""

from __future__ import annotations

import inspect
import logging
import os
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastdiff.assets import EMBEDDED, pipeline_path
from fastdiff_kernels.errors import InvalidInputError

from . import sizes
from .failures import is_out_of_memory
from .options import Request, defaults_for
from .screen import stage

if TYPE_CHECKING:
    import torch

    from fastdiff_kernels import Grid


@dataclass(frozen=True)
class Job:
    """One generation with nothing left open.

    Attributes:
        num_frames: 1 for a picture.
        fps: Frames per second of the written video, None for a picture.
        grid: The visual tokens of the model.
        text_tokens: Text tokens in the same sequence.
        call: Further arguments of the pipeline's call, by name.
    """

    prompt: str
    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float | None
    seed: int
    fps: int | None
    grid: Grid
    text_tokens: int
    call: dict[str, Any]

    @property
    def is_video(self) -> bool:
        return self.fps is not None

    @property
    def size(self) -> str:
        """For people: "65 frames of 128x128", or "512x512" for a picture."""
        size = f"{self.width}x{self.height}"
        return f"{self.num_frames} frames of {size}" if self.is_video else size

    @property
    def pixel_bytes(self) -> int:
        """Of the result uncompressed, eight bits a channel."""
        return self.num_frames * self.height * self.width * 3

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"grid": str(self.grid)}


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
        UnsupportedError: If it makes neither videos nor pictures from text, or its model is not described.
    """
    import diffusers
    import torch

    _quieten()
    # diffusers 0.40 renamed the argument.
    name = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
    try:
        kind = getattr(diffusers, diffusers.DiffusionPipeline.load_config(source)["_class_name"])
        # Video VAEs lose visible detail in half precision and cost little in float32. Picture pipelines hand their
        # VAE latents of the model's type, and it has to be of the same.
        vae = torch.float32 if sizes.makes_video(kind) else dtype
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, **{name: {"default": dtype, "vae": vae}})
    except Exception as error:
        # Broken files raise whatever their reader likes (SafetensorError derives from Exception alone).
        if is_out_of_memory(error):
            raise
        raise InvalidInputError(_why_not_loaded(source, error)) from error
    sizes.check_pipeline(source, pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _quieten() -> None:
    import diffusers
    import transformers

    # One bar of our own instead of one for each component.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Text to picture needs no torchvision, but the modules that these pipelines import complain that it is not there.
    for handler in transformers.utils.logging.get_logger("transformers").handlers:
        handler.addFilter(_says_something)


def _says_something(record: logging.LogRecord) -> bool:
    return "torchvision" not in record.getMessage()


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

    def given(name: str) -> Any:
        asked = getattr(request, name)
        return getattr(defaults, name) if asked is None else asked

    def pick(name: str, parameter: str | None = None) -> Any:
        own = parameters.get(parameter or name)
        value = None if own is None or own.default is inspect.Parameter.empty else own.default
        return value if given(name) is None else given(name)

    is_video = sizes.makes_video(pipe)
    if not is_video and request.num_frames is not None:
        raise InvalidInputError(f"--num-frames is for videos and {request.model} makes pictures; leave it out.")
    size = {name: pick(name) for name in ("height", "width")}
    if not is_video and None in size.values():
        own = dict(zip(size, sizes.own_size(pipe) or (None, None), strict=True))
        size = {name: own[name] if value is None else value for name, value in size.items()}
    size["num_frames"] = pick("num_frames", sizes.frames_argument(pipe)) if is_video else 1
    for name, value in size.items():
        if value is None:
            raise InvalidInputError(f"this pipeline has no default {name}; add --{name.replace('_', '-')}.")
    grid = sizes.grid_of(pipe, **size)
    call = {**defaults.call, **_guidance(pipe, given("guidance_scale"))}
    job = Job(
        prompt=pick("prompt"),
        steps=pick("steps", "num_inference_steps"),
        guidance_scale=pick("guidance_scale"),
        seed=pick("seed"),
        fps=defaults.fps if is_video else None,
        grid=grid,
        text_tokens=sizes.text_tokens(pipe, call),
        call=call,
        **size,
    )
    _check_inputs(pipe, job)
    sizes.check_room_for(pipe, job)
    return job


def _guidance(pipe: Any, scale: float | None) -> dict[str, Any]:
    """Guidance for a model that was not trained to take it as an input and would not feel it otherwise."""
    takes_true = "true_cfg_scale" in inspect.signature(pipe.__call__).parameters
    if scale is None or not takes_true or getattr(sizes.core(pipe).config, "guidance_embeds", True):
        return {}
    return {"true_cfg_scale": scale, "negative_prompt": ""}


def _check_inputs(pipe: Any, job: Job) -> None:
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    parameters = inspect.signature(check).parameters
    known = {"prompt": job.prompt, "height": job.height, "width": job.width, "num_frames": job.num_frames, **job.call}
    arguments = {
        name: known.get(name)
        for name, parameter in parameters.items()
        if name in known or parameter.default is inspect.Parameter.empty
    }
    try:
        check(**arguments)
    except ValueError as error:
        raise InvalidInputError(f"{type(pipe).__name__} refuses this: {error}") from error
