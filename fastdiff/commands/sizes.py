"""What a pipeline makes, in which sizes, and the tokens that its attention layers get then."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdiff_kernels.errors import InvalidInputError, UnsupportedError

from .memory import check_memory

if TYPE_CHECKING:
    from torch import nn

    from fastdiff_kernels import Grid, TokenLayout

    from .pipelines import Job


@dataclass(frozen=True)
class LayerShape:
    """One self-attention layer at one size.

    Attributes:
        layout: The tokens of its attention call.
        index: Its place among the model's self-attention layers.
    """

    layout: TokenLayout
    index: int
    heads: int
    head_dim: int


def core(pipe: Any) -> nn.Module | None:
    """The model that denoises, None if the pipeline has none that is known here."""
    found = getattr(pipe, "transformer", None)
    return getattr(pipe, "unet", None) if found is None else found


def makes_video(pipe: Any) -> bool:
    return frames_argument(pipe) is not None


def frames_argument(pipe: Any) -> str | None:
    """What a pipeline's call takes its number of frames as, None if it makes pictures; Latte has a name of its own."""
    return next((name for name in ("num_frames", "video_length") if name in _parameters(pipe)), None)


def check_pipeline(source: str, pipe: Any) -> None:
    """Whether the commands can run a pipeline.

    Raises:
        UnsupportedError: If it does not go from text alone to a video or a picture, or its model is not described.
    """
    parameters = _parameters(pipe)
    has_model = core(pipe) is not None and (not makes_video(pipe) or getattr(pipe, "transformer", None) is not None)
    if "prompt" not in parameters or "image" in parameters or not has_model:
        raise UnsupportedError(
            f"{source} is a {type(pipe).__name__}; this command needs a pipeline from text to video with a "
            "transformer, such as WanPipeline, or from text to a picture, such as FluxPipeline or "
            "StableDiffusionPipeline. From Python, fastdiff.apply takes others."
        )
    if not makes_video(pipe):
        from fastdiff_patches.families import family_of

        family_of(core(pipe))


def own_size(pipe: Any) -> tuple[int, int] | None:
    """Height and width in pixels that a picture pipeline takes by itself."""
    size = getattr(pipe, "default_sample_size", None) or getattr(core(pipe).config, "sample_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height * pipe.vae_scale_factor, width * pipe.vae_scale_factor


def grid_of(pipe: Any, num_frames: int, height: int, width: int) -> Grid:
    """The grid of visual tokens at a size; a UNet's is that of its latents, one token for each.

    Raises:
        InvalidInputError: If the pipeline cannot take the size. diffusers would round it, with a warning.
    """
    from fastdiff_kernels import Grid
    from fastdiff_patches.families import find_family, patch_of
    from fastdiff_patches.locate import unwrap

    model = unwrap(core(pipe))
    family, config = find_family(model), model.config
    patch = patch_of(config) if family is None else family.patch(config)
    space = _vae_factor(pipe, "spatial")
    frames = _latent_frames(pipe, num_frames, patch[0])
    for name, value, multiple in (("height", height, space * patch[1]), ("width", width, space * patch[2])):
        if value % multiple:
            near = sorted({max(multiple, value // multiple * multiple), -(-value // multiple) * multiple})
            raise InvalidInputError(
                f"--{name} is {value}; this model takes multiples of {multiple}, such as {' or '.join(map(str, near))}."
            )
    grid = Grid(frames, height // (space * patch[1]), width // (space * patch[2]))
    longest, allowed = max(grid.frames, grid.height, grid.width), getattr(config, "rope_max_seq_len", math.inf)
    if longest > allowed:
        raise InvalidInputError(f"the token grid would be {grid}; this model takes up to {allowed} along each axis.")
    return grid


def _vae_factor(pipe: Any, axis: str) -> int:
    """How many pixels or frames make a latent; pipelines have different names for it."""
    names = [f"vae_scale_factor_{axis}", f"vae_{axis}_compression_ratio", f"vae_{axis}_scale_factor"]
    if axis == "spatial":
        names.append("vae_scale_factor")
    return next((factor for factor in (getattr(pipe, name, None) for name in names) if factor), 1)


def _latent_frames(pipe: Any, num_frames: int, patch: int) -> int:
    time = _vae_factor(pipe, "temporal") if makes_video(pipe) else 1
    if (num_frames - 1) % time:
        low = (num_frames - 1) // time * time + 1
        raise InvalidInputError(
            f"--num-frames is {num_frames}; this model takes one more than a multiple of {time}, such as {low} or "
            f"{low + time}."
        )
    frames = (num_frames - 1) // time + 1
    if frames % patch:
        raise InvalidInputError(
            f"--num-frames is {num_frames}, {frames} latent frames; this model takes multiples of {patch}."
        )
    return frames // patch


def text_tokens(pipe: Any, call: dict[str, Any]) -> int:
    """Text tokens in the same sequence, at most where prompts are not padded.

    Args:
        call: Further arguments of the pipeline's call.
    """
    from fastdiff_patches.families import find_family

    family, parameter = find_family(core(pipe)), _parameters(pipe).get("max_sequence_length")
    usual = 0 if family is None else sum(family.usual_text)
    if not usual or parameter is None:
        return usual
    # HiDream has three texts of that length; others add a few tokens of their own.
    default = parameter.default
    return usual + usual // default * (call.get("max_sequence_length", default) - default)


def finest_layer(pipe: Any, grid: Grid, text: int) -> LayerShape:
    """The first of the self-attention layers with the most tokens; a transformer's are all alike.

    Raises:
        UnsupportedError: If the model's family is not described.
    """
    from fastdiff_kernels import TokenLayout
    from fastdiff_patches.families import family_of
    from fastdiff_patches.locate import heads_of, self_attention, unwrap

    model = unwrap(core(pipe))
    family = family_of(model)
    whole = TokenLayout.self_attention(grid, text_before=text)
    modules = self_attention(model, family)
    layouts = [family.at(model.config, whole, name) for name in modules]
    index = max(range(len(layouts)), key=lambda i: (layouts[i].query_tokens, -i))
    return LayerShape(layouts[index], index, *heads_of(list(modules.values())[index]))


def check_room_for(pipe: Any, job: Job) -> None:
    """Compares a lower bound of what a run takes with the memory of the machine, if it runs there.

    Raises:
        InvalidInputError: If the machine has less.
    """
    if pipe.device.type != "cpu":
        return
    config = core(pipe).config
    channels = getattr(config, "block_out_channels", None)
    if channels is None:
        channels = (getattr(config, "num_attention_heads", 1) * getattr(config, "attention_head_dim", 1),)
    # The decoded result as floats with one copy, and the activations of one block.
    needed = 2 * 4 * job.pixel_bytes + 6 * 4 * job.grid.tokens * channels[0]
    what = f"{job.num_frames} frames of {job.height}x{job.width}" if job.is_video else f"pictures of {job.size}"
    check_memory(needed, what, "--num-frames, --height or --width" if job.is_video else "--height or --width")


def _parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(pipe.__call__).parameters)
