"""CLEAR's way to high resolution: a small picture, enlarged, and drawn again at the full size with local attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdiff_kernels import Grid, InvalidInputError, TokenLayout, UnsupportedError

from .api import apply, remove
from .clear_weights import load_clear_weights
from .methods.base import check_choice, check_number, check_share, check_whole
from .methods.clear import ClearConfig

if TYPE_CHECKING:
    from PIL.Image import Image

_TAKEN = ("strength", "num_inference_steps", "guidance_scale", "sigmas", "latents", "output_type", "return_dict")


@dataclass(frozen=True)
class HighResolution:
    """Settings of `high_resolution`; the defaults are those of the paper's notebook.

    Args:
        clear: Attention of the second pass. The radius is the paper's fastest; larger is safer, above all without
            `weights`.
        weights: One of the weight files that CLEAR's authors released, for the second pass; see
            `load_clear_weights`. It must belong to the radius and the pool factor. None takes the model as it is.
        upscale: How many times smaller the first pass is on each side. Larger is faster and leaves more to invent.
        steps: Denoising steps of the first pass; the second makes this times `strength`. Fewer is faster.
        strength: How much of the enlarged picture is drawn anew, above 0 and up to 1. Smaller is faster and keeps
            more of the first pass, larger adds more detail and more risk of repeated patterns.
        guidance: Guidance scale of the second pass.
        low_guidance: Guidance scale of the first pass.
        ntk_factor: Factor on the base of the rotary embedding in the second pass, 1 to leave it. Positions beyond the
            training size then fall among those that the model knows.
        shift: Static timestep shift of the second pass, in place of the scheduler's dynamic one. Larger spends more
            steps on noise and so on the composition. The notebook asks for 10 by a name that no scheduler reads; what
            it runs with is the 3.0 of FLUX.1-dev.
        vae_tiling: Whether the VAE works tile by tile in the second pass. True needs far less memory; False has no
            seams.
        backend: As in `apply`.

    Raises:
        InvalidInputError: If a value is of the wrong kind or out of its range; it says which.
    """

    clear: ClearConfig = ClearConfig(8, pool_factor=4, proportional=True)
    weights: str | Path | None = None
    upscale: int = 4
    steps: int = 20
    strength: float = 0.7
    guidance: float = 7.5
    low_guidance: float = 3.5
    ntk_factor: float = 10.0
    shift: float = 3.0
    vae_tiling: bool = True
    backend: str = "auto"

    def __post_init__(self):
        if not isinstance(self.clear, ClearConfig):
            raise InvalidInputError(f"clear is {self.clear!r}; give a ClearConfig.")
        for name, low in (("upscale", 2), ("steps", 1)):
            check_whole(name, getattr(self, name), low)
        check_share("strength", self.strength)
        for name, low, high in (("guidance", 0, 1e3), ("low_guidance", 0, 1e3), ("ntk_factor", 1, 1e4)):
            check_number(name, getattr(self, name), low, high)
        check_number("shift", self.shift, 0.01, 100)
        check_choice("vae_tiling", self.vae_tiling, (True, False))


def high_resolution(
    pipe: Any,
    prompt: str | list[str],
    height: int,
    width: int,
    *,
    settings: HighResolution | None = None,
    image: Image | list[Image] | None = None,
    generator: Any = None,
    **arguments: Any,
) -> list[Image]:
    """Pictures above the training size of a FLUX pipeline.

    First a dense pass at a size that the model knows; then the picture is enlarged, noised, and denoised at the full
    size, with CLEAR in all layers, a rotary embedding stretched by the NTK factor, a static shift, and tiles in the
    VAE. Afterwards the pipeline is bit for bit what it was, even if the second pass fails.

        images = fastdiff.high_resolution(pipe, "a harbour at dawn", 2048, 4096)

    Reference: Liu, Tan and Wang, arXiv 2412.16112, and its notebook for high resolutions; SDEdit (Meng et al., arXiv
    2108.01073). The paper climbs 1024 -> 2048 -> 4096 instead of once by four: `upscale=2`, and each picture as the
    `image` of the next call.

    Args:
        pipe: A `FluxPipeline` without fastdiff on it.
        prompt: One or several.
        height, width: Size of the result in pixels, multiples of a token (16 pixels), and of `pool_factor` tokens.
        settings: See `HighResolution`.
        image: Pictures to start from instead of the first pass, one for each result.
        generator: Of random numbers, for both passes.
        **arguments: Of both calls of the pipeline, such as `max_sequence_length` or `num_images_per_prompt`.

    Returns:
        PIL images.

    Raises:
        InvalidInputError: If a size does not fit, fastdiff is on the pipeline already, or an argument is set here.
        UnsupportedError: If this is no FLUX pipeline with a flow-matching scheduler.
    """
    settings = HighResolution() if settings is None else settings
    _check(pipe, height, width, settings, arguments)
    arguments = {**arguments, "prompt": prompt, "generator": generator, "num_inference_steps": settings.steps}
    if image is None:
        if settings.weights is not None:
            # A file that does not fit is found before the first pass, and not after it.
            with _second_pass(pipe, settings):
                pass
        token = 2 * pipe.vae_scale_factor
        low = {
            name: max(1, round(size / settings.upscale / token)) * token
            for name, size in (("height", height), ("width", width))
        }
        image = pipe(guidance_scale=settings.low_guidance, **low, **arguments).images
    images = [_enlarged(one, height, width) for one in (image if isinstance(image, list) else [image])]
    with _second_pass(pipe, settings) as refine:
        return refine(
            image=images,
            height=height,
            width=width,
            strength=settings.strength,
            guidance_scale=settings.guidance,
            **arguments,
        ).images


def _enlarged(image: Any, height: int, width: int) -> Image:
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise InvalidInputError(f"image is a {type(image).__name__}; give a PIL image, or a list of them.")
    return image.resize((width, height))


@contextlib.contextmanager
def _second_pass(pipe: Any, settings: HighResolution) -> Iterator[Any]:
    """The image-to-image pipeline on the same models, set up for the second pass, and all undone afterwards."""
    from diffusers import FluxImg2ImgPipeline

    from fastdiff_patches import locate

    scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, use_dynamic_shifting=False, shift=settings.shift
    )
    # Not by from_pipe, which casts the models that both share to float32.
    refine = FluxImg2ImgPipeline(**{**pipe.components, "scheduler": scheduler})
    refine.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    position = locate.unwrap(pipe.transformer).pos_embed
    with contextlib.ExitStack() as undo:
        undo.callback(remove, refine)
        apply(refine, settings.clear, backend=settings.backend)
        if settings.weights is not None:
            undo.callback(load_clear_weights(refine, settings.weights).restore)
        undo.callback(setattr, position, "theta", position.theta)
        position.theta = position.theta * settings.ntk_factor
        undo.callback(setattr, pipe.vae, "use_tiling", pipe.vae.use_tiling)
        pipe.vae.use_tiling = settings.vae_tiling
        yield refine


def _check(pipe: Any, height: int, width: int, settings: HighResolution, arguments: dict[str, Any]) -> None:
    from diffusers import FluxPipeline

    from fastdiff_patches import attachment, marker

    if not isinstance(pipe, FluxPipeline):
        raise UnsupportedError(f"this is a {type(pipe).__name__}; high_resolution takes a FluxPipeline.")
    if "use_dynamic_shifting" not in pipe.scheduler.config:
        raise UnsupportedError(
            f"{type(pipe.scheduler).__name__} has no timestep shift; give the pipeline a "
            "FlowMatchEulerDiscreteScheduler."
        )
    if attachment.find(pipe.transformer) is not None or marker.is_marked(pipe.transformer):
        raise InvalidInputError(
            "fastdiff is on this pipeline already and high_resolution puts its own settings on it for the second pass; "
            "call fastdiff.remove(pipe) first."
        )
    taken = [name for name in _TAKEN if name in arguments]
    if taken:
        raise InvalidInputError(
            f"{', '.join(taken)} cannot be given here: the two passes differ in it; see the fields of HighResolution."
        )
    token = 2 * pipe.vae_scale_factor
    for name, size in (("height", height), ("width", width)):
        if isinstance(size, bool) or not isinstance(size, int) or size < token or size % token:
            raise InvalidInputError(f"{name} is {size!r}; give a multiple of {token} pixels.")
    # What can be seen of the second pass without loading weights is refused at once.
    if settings.weights is not None and not Path(settings.weights).is_file():
        raise InvalidInputError(f"weights is {settings.weights!r}; give the path of a file that exists, or None.")
    settings.clear.build_plan(TokenLayout.self_attention(Grid(1, height // token, width // token)))
