"""Pipelines of picture families with tiny models, as a user calls them; text comes as embeddings."""

import diffusers
import PIL.Image
import pytest
import tiny_latent_models as latent
import tiny_packed_models as packed
import torch
from pipeline_case import TEXT, Pipe, dense_sparse_and_dense_again, present
from tiny_models import NoGuard
from tiny_picture_models import tiny_flux, tiny_picture_vae, tiny_unet
from tiny_video_models import tiny_cosmos

torch.set_num_threads(1)


def picture(model, call, *, pixels=(80, 112), **rest):
    """A pipeline that draws 5 x 7 tokens."""
    height, width = pixels
    return Pipe(model, lambda: call() | {"height": height, "width": width}, (1, 5, 7), **rest)


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
    "Flux2Pipeline": picture(packed.tiny_flux2, embeds, parts=flux2_vae),
    "Flux2Pipeline, with an image": picture(
        packed.tiny_flux2, lambda: embeds() | {"image": PIL.Image.new("RGB", (64, 80), "red")}, parts=flux2_vae
    ),
    "Flux2KleinPipeline": picture(packed.tiny_flux2_klein, lambda: both(**embeds()), parts=flux2_vae),
    "FluxPipeline": picture(
        tiny_flux,
        lambda: embeds() | {"pooled_prompt_embeds": packed.noise(1, 32)},
        absent=("vae", *numbered(*TEXT, count=2)),
    ),
    "ChromaPipeline": picture(
        packed.tiny_chroma,
        lambda: both(**embeds(), prompt_attention_mask=torch.tensor([[True, True, True, False, False]])),
    ),
    "BriaPipeline": picture(
        packed.tiny_bria,
        lambda: both(**embeds()),
        absent=TEXT,
        parts=lambda: {"vae": tiny_picture_vae()},
        pixels=(20, 28),
    ),
    "Krea2Pipeline": picture(
        packed.tiny_krea2,
        lambda: both(prompt_embeds=packed.noise(1, 5, 2, 32), prompt_embeds_mask=mask().bool()),
    ),
    "OvisImagePipeline": picture(packed.tiny_ovis, lambda: both(**embeds()) | {"negative_prompt": None}),
    "LongCatImagePipeline": picture(
        packed.tiny_longcat,
        lambda: {"prompt": "a", "negative_prompt": "b", "guidance_scale": 3.0, "enable_prompt_rewrite": False},
        absent=("vae", *TEXT, "text_processor"),
        settle=encode_anything,
    ),
    "QwenImagePipeline": picture(
        packed.tiny_qwen,
        lambda: both(**embeds(), prompt_embeds_mask=mask()) | {"guidance_scale": None, "true_cfg_scale": 3.0},
    ),
    "StableDiffusion3Pipeline": picture(
        latent.tiny_sd3,
        lambda: both(**embeds(), pooled_prompt_embeds=packed.noise(1, 16)),
        absent=("vae", *numbered(*TEXT, count=3)),
    ),
    "ZImagePipeline": picture(
        latent.tiny_z_image,
        lambda: {
            "prompt_embeds": [packed.noise(5, 32)],
            "negative_prompt_embeds": [packed.noise(40, 32)],
            "guidance_scale": 3.0,
        },
    ),
    "Lumina2Pipeline": picture(latent.tiny_lumina2, lambda: both(**embeds(), prompt_attention_mask=mask())),
    "AuraFlowPipeline": picture(latent.tiny_aura_flow, lambda: both(**embeds(), prompt_attention_mask=mask())),
    "PixArtSigmaPipeline": picture(
        latent.tiny_pixart,
        lambda: (
            both(**embeds(), prompt_attention_mask=mask()) | {"use_resolution_binning": False, "negative_prompt": None}
        ),
        scheduler=lambda: diffusers.DPMSolverMultistepScheduler(),
    ),
    "ErnieImagePipeline": picture(
        latent.tiny_ernie_image,
        lambda: {
            "prompt_embeds": [packed.noise(5, 32)],
            "negative_prompt_embeds": [packed.noise(3, 32)],
            "guidance_scale": 3.0,
        },
    ),
    "CogView3PlusPipeline": picture(
        latent.tiny_cogview3, lambda: both(**embeds()), scheduler=lambda: diffusers.CogVideoXDDIMScheduler()
    ),
    "CogView4Pipeline": picture(latent.tiny_cogview4, lambda: both(**embeds())),
    "HiDreamImagePipeline": picture(
        latent.tiny_hidream,
        lambda: both(
            prompt_embeds_t5=packed.noise(1, 3, 32),
            prompt_embeds_llama3=packed.noise(2, 1, 4, 16),
            pooled_prompt_embeds=packed.noise(1, 64),
        ),
        absent=("vae", *numbered(*TEXT, count=4)),
        settle=start_small,
    ),
    "HunyuanImagePipeline": picture(
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
    "HunyuanDiTPipeline": picture(
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
    "Cosmos2TextToImagePipeline": picture(
        tiny_cosmos,
        lambda: both(**embeds()),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        parts=lambda: {"safety_checker": NoGuard()},
    ),
    "StableDiffusionPipeline": picture(
        tiny_unet,
        lambda: both(**embeds()),
        absent=("vae", *TEXT, "safety_checker", "feature_extractor"),
        scheduler=lambda: diffusers.EulerDiscreteScheduler(),
        parts=lambda: {"requires_safety_checker": False},
        pixels=(40, 56),
        component="unet",
    ),
    "StableDiffusionXLPipeline": picture(
        latent.tiny_sdxl,
        lambda: both(**embeds(), pooled_prompt_embeds=packed.noise(1, 16)),
        absent=("vae", *numbered(*TEXT, count=2)),
        scheduler=lambda: diffusers.EulerDiscreteScheduler(),
        pixels=(40, 56),
        component="unet",
    ),
}


@pytest.mark.parametrize("name", present(PIPES))
def test_a_pipeline_dense_sparse_and_dense_again(name, shows):
    dense_sparse_and_dense_again(name, PIPES[name], shows)
