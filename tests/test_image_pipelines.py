"""Pipelines of picture families with tiny models, as a user calls them; text comes as embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import PIL.Image
import pytest
import tiny_latent_models as latent
import tiny_packed_models as packed
import torch
from tiny_models import NoGuard, tiny_scheduler
from tiny_picture_models import tiny_flux, tiny_picture_vae, tiny_unet
from tiny_video_models import tiny_cosmos

import fastdiff
from fastdiff.commands import sizes
from fastdiff_kernels import Grid
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

TEXT = ("text_encoder", "tokenizer")


@dataclass(frozen=True)
class Pipe:
    """A pipeline class, its model, and what the call takes besides size and steps.

    Attributes:
        model: () -> the model.
        call: () -> the arguments of the call.
        absent: Components that are None.
        scheduler: () -> the scheduler.
        parts: () -> further components by name.
        settle: pipeline -> changes what stands in the way of tiny models or of embeddings.
        pixels: Height and width in pixels; in tokens they are 5 x 7.
        component: What the pipeline calls its model.
    """

    model: Callable[[], torch.nn.Module]
    call: Callable[[], dict[str, Any]]
    absent: tuple[str, ...] = ("vae", *TEXT)
    scheduler: Callable[[], Any] = lambda: tiny_scheduler("euler")
    parts: Callable[[], dict[str, Any]] = dict
    settle: Callable[[Any], None] = lambda pipe: None
    pixels: tuple[int, int] = (80, 112)
    component: str = "transformer"


def embeds(text=5, channels=32):
    return {"prompt_embeds": packed.noise(1, text, channels)}


def both(**arguments):
    """Arguments for the prompt, and the same for an empty one, half as strong."""
    negative = {
        f"negative_{name}": value / 2 if value.is_floating_point() else value for name, value in arguments.items()
    }
    return arguments | negative | {"guidance_scale": 3.0}


def mask(text=5):
    return torch.ones(1, text, dtype=torch.int64)


def numbered(*names, count):
    return tuple(f"{name}_{index}" if index > 1 else name for name in names for index in range(1, count + 1))


def flux2_vae():
    return {
        "vae": packed.build("AutoencoderKLFlux2", block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4)
    }


def encode_anything(pipe):
    pipe._encode_prompt = lambda prompt: packed.noise(1, 5, 32)


def start_small(pipe):
    pipe.default_sample_size = 12


PIPES = {
    "Flux2Pipeline": Pipe(packed.tiny_flux2, embeds, parts=flux2_vae),
    "Flux2Pipeline, with an image": Pipe(
        packed.tiny_flux2, lambda: embeds() | {"image": PIL.Image.new("RGB", (64, 80), "red")}, parts=flux2_vae
    ),
    "Flux2KleinPipeline": Pipe(packed.tiny_flux2_klein, lambda: both(**embeds()), parts=flux2_vae),
    "FluxPipeline": Pipe(
        tiny_flux,
        lambda: embeds() | {"pooled_prompt_embeds": packed.noise(1, 32)},
        absent=("vae", *numbered(*TEXT, count=2)),
    ),
    "ChromaPipeline": Pipe(
        packed.tiny_chroma,
        lambda: both(**embeds(), prompt_attention_mask=torch.tensor([[True, True, True, False, False]])),
    ),
    "BriaPipeline": Pipe(
        packed.tiny_bria,
        lambda: both(**embeds()),
        absent=TEXT,
        parts=lambda: {"vae": tiny_picture_vae()},
        pixels=(20, 28),
    ),
    "Krea2Pipeline": Pipe(
        packed.tiny_krea2,
        lambda: both(prompt_embeds=packed.noise(1, 5, 2, 32), prompt_embeds_mask=mask().bool()),
    ),
    "OvisImagePipeline": Pipe(packed.tiny_ovis, lambda: both(**embeds()) | {"negative_prompt": None}),
    "LongCatImagePipeline": Pipe(
        packed.tiny_longcat,
        lambda: {"prompt": "a", "negative_prompt": "b", "guidance_scale": 3.0, "enable_prompt_rewrite": False},
        absent=("vae", *TEXT, "text_processor"),
        settle=encode_anything,
    ),
    "QwenImagePipeline": Pipe(
        packed.tiny_qwen,
        lambda: both(**embeds(), prompt_embeds_mask=mask()) | {"guidance_scale": None, "true_cfg_scale": 3.0},
    ),
    "StableDiffusion3Pipeline": Pipe(
        latent.tiny_sd3,
        lambda: both(**embeds(), pooled_prompt_embeds=packed.noise(1, 16)),
        absent=("vae", *numbered(*TEXT, count=3)),
    ),
    "ZImagePipeline": Pipe(
        latent.tiny_z_image,
        lambda: {
            "prompt_embeds": [packed.noise(5, 32)],
            "negative_prompt_embeds": [packed.noise(40, 32)],
            "guidance_scale": 3.0,
        },
    ),
    "Lumina2Pipeline": Pipe(latent.tiny_lumina2, lambda: both(**embeds(), prompt_attention_mask=mask())),
    "AuraFlowPipeline": Pipe(latent.tiny_aura_flow, lambda: both(**embeds(), prompt_attention_mask=mask())),
    "PixArtSigmaPipeline": Pipe(
        latent.tiny_pixart,
        lambda: (
            both(**embeds(), prompt_attention_mask=mask()) | {"use_resolution_binning": False, "negative_prompt": None}
        ),
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(),
    ),
    "ErnieImagePipeline": Pipe(
        latent.tiny_ernie_image,
        lambda: {
            "prompt_embeds": [packed.noise(5, 32)],
            "negative_prompt_embeds": [packed.noise(3, 32)],
            "guidance_scale": 3.0,
        },
    ),
    "CogView3PlusPipeline": Pipe(
        latent.tiny_cogview3, lambda: both(**embeds()), scheduler=lambda: diffusers.CogVideoXDDIMScheduler()
    ),
    "CogView4Pipeline": Pipe(latent.tiny_cogview4, lambda: both(**embeds())),
    "HiDreamImagePipeline": Pipe(
        latent.tiny_hidream,
        lambda: both(
            prompt_embeds_t5=packed.noise(1, 3, 32),
            prompt_embeds_llama3=packed.noise(2, 1, 4, 16),
            pooled_prompt_embeds=packed.noise(1, 64),
        ),
        absent=("vae", *numbered(*TEXT, count=4)),
        settle=start_small,
    ),
    "HunyuanImagePipeline": Pipe(
        latent.tiny_hunyuan_image,
        lambda: {
            **embeds(),
            "prompt_embeds_mask": mask(),
            "prompt_embeds_2": packed.noise(1, 3, 16),
            "prompt_embeds_mask_2": mask(3),
        },
        absent=("vae", *numbered(*TEXT, count=2)),
        pixels=(160, 224),
    ),
    "HunyuanDiTPipeline": Pipe(
        latent.tiny_hunyuan_dit,
        lambda: (
            both(
                **embeds(4, 8),
                prompt_attention_mask=mask(4),
                prompt_embeds_2=packed.noise(1, 4, 8),
                prompt_attention_mask_2=mask(4),
            )
            | {"use_resolution_binning": False}
        ),
        absent=("vae", "safety_checker", "feature_extractor", *numbered(*TEXT, count=2)),
        scheduler=lambda: diffusers.DDPMScheduler(),
    ),
    "Cosmos2TextToImagePipeline": Pipe(
        tiny_cosmos,
        lambda: both(**embeds()),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        parts=lambda: {"safety_checker": NoGuard()},
    ),
    "StableDiffusionPipeline": Pipe(
        tiny_unet,
        lambda: both(**embeds()),
        absent=("vae", *TEXT, "safety_checker", "feature_extractor"),
        scheduler=lambda: diffusers.EulerDiscreteScheduler(),
        parts=lambda: {"requires_safety_checker": False},
        pixels=(40, 56),
        component="unet",
    ),
    "StableDiffusionXLPipeline": Pipe(
        latent.tiny_sdxl,
        lambda: both(**embeds(), pooled_prompt_embeds=packed.noise(1, 16)),
        absent=("vae", *numbered(*TEXT, count=2)),
        scheduler=lambda: diffusers.EulerDiscreteScheduler(),
        pixels=(40, 56),
        component="unet",
    ),
}


def build(name):
    case = PIPES[name]
    torch.manual_seed(0)
    parts = dict.fromkeys(case.absent) | {case.component: case.model()} | case.parts()
    pipe = getattr(diffusers, name.split(",")[0])(scheduler=case.scheduler(), **parts)
    case.settle(pipe)
    pipe.set_progress_bar_config(disable=True)
    height, width = case.pixels
    settings = {"height": height, "width": width, "num_inference_steps": 3, "output_type": "latent"}

    def draw():
        found = pipe(**settings, **case.call(), generator=torch.Generator().manual_seed(0)).images
        return torch.stack(found) if isinstance(found, list) else found

    return pipe, draw


@pytest.mark.parametrize("name", [name for name in PIPES if hasattr(diffusers, name.split(",")[0])])
def test_a_pipeline_dense_sparse_and_dense_again(name, shows):
    pipe, draw = build(name)
    assert sizes.grid_of(pipe, 1, *PIPES[name].pixels) == Grid(1, 5, 7), "as forecast before a run"
    shows(getattr(pipe, PIPES[name].component), f"pipeline {type(pipe).__name__}")
    dense = draw()
    fastdiff.apply(pipe, fastdiff.NeighborhoodConfig((None, None, None), block_size=32))
    torch.testing.assert_close(draw(), dense, atol=1e-4, rtol=1e-3)
    fastdiff.apply(pipe, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32), dense_steps=3)
    assert torch.equal(draw(), dense)
    fastdiff.apply(pipe, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32), dense_steps=1)
    assert not torch.allclose(draw(), dense, atol=1e-5)
    attached = find(getattr(pipe, PIPES[name].component))
    assert {layout.grid for layout in attached.seen} == {Grid(1, 5, 7)}
    assert attached.steps_seen == 3
    fastdiff.remove(pipe)
    assert torch.equal(draw(), dense)
