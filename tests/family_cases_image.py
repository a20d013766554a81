"""The picture models that the tests of families run, UNets among them."""

from __future__ import annotations

import tiny_latent_models as latent
import tiny_packed_models as packed
import torch
from family_case import Case
from tiny_picture_models import flux_inputs, tiny_flux, tiny_unet, unet_inputs

PICTURES = ((1, 5, 7), (1, 9, 4), (1, 8, 8))
TWO = ((1, 5, 7), (1, 8, 8))


def picture(inputs, **fixed):
    """Arguments by (frames, height, width) from a function of height and width."""
    return lambda frames, *grid: inputs(*grid, **fixed)


def move_packed(number=0):
    def move(inputs, frame, row, column):
        ids = inputs["img_ids"][:, :3] - torch.tensor([number, 0, 0])
        ids[:, 1:] -= ids[0, 1:].clone()
        inputs["hidden_states"][:, (ids == torch.tensor([frame, row, column])).all(1)] += 1

    return move


def move_latents(patch=2, name="hidden_states"):
    def move(inputs, frame, row, column):
        inputs[name][0][..., patch * row + patch - 1, patch * column] += 1

    return move


def move_qwen(inputs, frame, row, column):
    _, height, width = inputs["img_shapes"][0][0]
    inputs["hidden_states"][:, (frame * height + row) * width + column] += 1


def move_krea2(inputs, frame, row, column):
    ids = inputs["position_ids"][-inputs["hidden_states"].shape[1] :]
    inputs["hidden_states"][:, (ids == torch.tensor([frame, row, column])).all(1)] += 1


def residuals(frames, height, width):
    """What a ControlNet adds to the picture behind each block."""
    samples = [packed.noise(1, height * width, 32)]
    return flux_inputs(height, width, controlnet_block_samples=samples, controlnet_single_block_samples=samples)


PACKED_CASES = {
    "FluxTransformer2DModel": Case(
        lambda: tiny_flux(layers=2, single_layers=2), picture(flux_inputs), move_packed(), PICTURES
    ),
    "FluxTransformer2DModel, Kontext": Case(
        tiny_flux,
        lambda frames, *grid: flux_inputs(*grid, reference=(grid[0] + 1, 3)),
        move_packed(),
        PICTURES,
    ),
    "FluxTransformer2DModel, Fill": Case(
        lambda: tiny_flux(in_channels=24), picture(flux_inputs, channels=24), move_packed(), TWO
    ),
    "FluxTransformer2DModel, ControlNet": Case(tiny_flux, residuals, move_packed(), TWO),
    "Flux2Transformer2DModel": Case(
        packed.tiny_flux2, picture(packed.packed_inputs, columns=4, guidance=torch.ones(1)), move_packed(), TWO
    ),
    "Flux2Transformer2DModel, references": Case(
        packed.tiny_flux2,
        picture(packed.packed_inputs, columns=4, guidance=torch.ones(1), references=((2, 3), (3, 3))),
        move_packed(),
        TWO,
    ),
    "ChromaTransformer2DModel": Case(packed.tiny_chroma, picture(packed.packed_inputs), move_packed(), TWO),
    "BriaTransformer2DModel": Case(packed.tiny_bria, picture(packed.packed_inputs), move_packed(), TWO),
    "BriaFiboTransformer2DModel": Case(packed.tiny_bria_fibo, picture(packed.bria_fibo_inputs), move_packed(), TWO),
    "LongCatImageTransformer2DModel": Case(
        packed.tiny_longcat,
        picture(packed.packed_inputs, channels=64, picture=1, start=8, references=((2, 3),)),
        move_packed(1),
        TWO,
    ),
    "OvisImageTransformer2DModel": Case(packed.tiny_ovis, picture(packed.packed_inputs), move_packed(), TWO),
    "Krea2Transformer2DModel": Case(packed.tiny_krea2, picture(packed.krea2_inputs), move_krea2, TWO),
    "QwenImageTransformer2DModel": Case(
        packed.tiny_qwen, lambda *grid: packed.qwen_inputs(grid, valid=3), move_qwen, TWO
    ),
    "QwenImageTransformer2DModel, edit": Case(
        packed.tiny_qwen, lambda *grid: packed.qwen_inputs(grid, (1, 2, 3), grid), move_qwen, TWO
    ),
    "QwenImageTransformer2DModel, layered": Case(
        lambda: packed.tiny_qwen(use_layer3d_rope=True),
        lambda frames, *grid: packed.qwen_inputs(*[(1, *grid)] * (frames + 1)),
        move_qwen,
        ((3, 4, 3),),
        needs=("QwenImageLayeredPipeline",),
    ),
}

LATENT_CASES = {
    "SD3Transformer2DModel": Case(
        latent.tiny_sd3, picture(latent.latent_inputs, pooled_projections=packed.noise(1, 16)), move_latents(), TWO
    ),
    "SD3Transformer2DModel, dual layers": Case(
        lambda: latent.tiny_sd3(dual_attention_layers=(0,), qk_norm="rms_norm"),
        picture(latent.latent_inputs, pooled_projections=packed.noise(1, 16)),
        move_latents(),
        TWO,
    ),
    "PixArtTransformer2DModel": Case(
        latent.tiny_pixart,
        picture(latent.latent_inputs, added_cond_kwargs={"resolution": None, "aspect_ratio": None}),
        move_latents(),
        TWO,
    ),
    "CogView3PlusTransformer2DModel": Case(latent.tiny_cogview3, picture(latent.cogview_inputs), move_latents(), TWO),
    "CogView4Transformer2DModel": Case(latent.tiny_cogview4, picture(latent.cogview_inputs), move_latents(), TWO),
    "GlmImageTransformer2DModel": Case(latent.tiny_glm_image, picture(latent.glm_image_inputs), move_latents(), TWO),
    "ErnieImageTransformer2DModel": Case(
        latent.tiny_ernie_image, picture(latent.ernie_image_inputs), move_latents(1), TWO
    ),
    "HunyuanDiT2DModel": Case(latent.tiny_hunyuan_dit, picture(latent.hunyuan_dit_inputs), move_latents(), TWO),
    "AuraFlowTransformer2DModel": Case(latent.tiny_aura_flow, picture(latent.latent_inputs), move_latents(), TWO),
    "Lumina2Transformer2DModel": Case(
        latent.tiny_lumina2,
        picture(latent.latent_inputs, encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]])),
        move_latents(),
        TWO,
    ),
    "ZImageTransformer2DModel": Case(latent.tiny_z_image, picture(latent.z_image_inputs), move_latents(name="x"), TWO),
    "HiDreamImageTransformer2DModel": Case(latent.tiny_hidream, picture(latent.hidream_inputs), move_latents(), TWO),
    "HunyuanImageTransformer2DModel": Case(
        latent.tiny_hunyuan_image, picture(latent.hunyuan_image_inputs), move_latents(1), TWO
    ),
}

UNET_CASES = {
    "UNet2DConditionModel": Case(
        tiny_unet, picture(unet_inputs), move_latents(1, "sample"), ((1, 9, 13), (1, 8, 5), (1, 5, 5))
    ),
    "UNet2DConditionModel, two levels": Case(
        lambda: tiny_unet(levels=2), picture(unet_inputs), move_latents(1, "sample"), ((1, 7, 5),)
    ),
    "UNet2DConditionModel, SD 2": Case(
        lambda: latent.tiny_unet2(("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=(2, 4)),
        picture(unet_inputs),
        move_latents(1, "sample"),
        ((1, 7, 5),),
    ),
    "UNet2DConditionModel, SDXL": Case(
        latent.tiny_sdxl,
        picture(unet_inputs, added_cond_kwargs={"text_embeds": torch.ones(1, 16), "time_ids": torch.ones(1, 6)}),
        move_latents(1, "sample"),
        ((1, 9, 13), (1, 16, 12)),
    ),
}

IMAGE_CASES = {**PACKED_CASES, **LATENT_CASES, **UNET_CASES}
