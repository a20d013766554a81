"""Picture transformers on packed tokens, with random weights, and the arguments of a forward on a grid.

What a test asks for must be in the installed diffusers; classes are looked up only then.
"""

from __future__ import annotations

import inspect

import diffusers
import torch
from torch import nn


def build(name: str, **options) -> nn.Module:
    """A model of diffusers by the name of its class."""
    return getattr(diffusers, name)(**options).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def image_ids(image: int, height: int, width: int, start: int = 0, columns: int = 3) -> torch.Tensor:
    """Positions of packed tokens as pipelines make them: image, row, column and zeros, `[tokens, columns]`."""
    axes = [torch.tensor([image]), torch.arange(height) + start, torch.arange(width) + start]
    axes += [torch.tensor([0])] * (columns - 3)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, columns).float()


FLUX_LIKE = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "axes_dims_rope": (4, 6, 6),
}


def tiny_flux2():
    return build(
        "Flux2Transformer2DModel",
        **FLUX_LIKE | {"axes_dims_rope": (4, 4, 4, 4)},
        timestep_guidance_channels=16,
    )


def tiny_flux2_klein():
    return build(
        "Flux2Transformer2DModel",
        **FLUX_LIKE | {"axes_dims_rope": (4, 4, 4, 4)},
        timestep_guidance_channels=16,
        guidance_embeds=False,
    )


def tiny_chroma():
    return build(
        "ChromaTransformer2DModel",
        **FLUX_LIKE,
        approximator_num_channels=8,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )


def tiny_bria():
    return build("BriaTransformer2DModel", **FLUX_LIKE, pooled_projection_dim=None, guidance_embeds=False)


def tiny_longcat():
    # Its pipeline draws 16 channels of 2 x 2 latents.
    return build("LongCatImageTransformer2DModel", **FLUX_LIKE | {"in_channels": 64}, pooled_projection_dim=32)


def tiny_ovis():
    return build("OvisImageTransformer2DModel", **FLUX_LIKE, out_channels=16)


def tiny_bria_fibo():
    return build("BriaFiboTransformer2DModel", **FLUX_LIKE, pooled_projection_dim=None, text_encoder_dim=8)


def bria_fibo_inputs(height, width):
    return packed_inputs(height, width, text_encoder_layers=[noise(1, 3, 8), noise(1, 3, 8)])


def packed_inputs(
    height: int,
    width: int,
    *,
    channels: int = 16,
    text: int = 3,
    references: tuple[tuple[int, int], ...] = (),
    picture: int = 0,
    start: int = 0,
    columns: int = 3,
    **more,
):
    """Arguments of models whose packed tokens carry positions."""
    ids = [image_ids(picture, height, width, start, columns)]
    ids += [image_ids(picture + 1 + n, *size, start, columns) for n, size in enumerate(references)]
    ids = torch.cat(ids)
    return {
        "hidden_states": noise(1, len(ids), channels),
        "encoder_hidden_states": noise(1, text, 32),
        "timestep": torch.full((1,), 0.5),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, columns),
        "return_dict": False,
        **more,
    }


def tiny_krea2():
    """Two heads share a key head."""
    return build(
        "Krea2Transformer2DModel",
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=32,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )


def krea2_inputs(height, width, text=5, valid=3):
    ids = torch.cat([torch.zeros(text, 3), image_ids(0, height, width)])
    return {
        "hidden_states": noise(1, height * width, 16),
        "encoder_hidden_states": noise(1, text, 2, 32),
        "encoder_attention_mask": (torch.arange(text) < valid)[None],
        "timestep": torch.full((1,), 0.5),
        "position_ids": ids,
        "return_dict": False,
    }


def tiny_qwen(**options):
    return build(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def qwen_inputs(*images, text=5, valid=None, batch=1, **more):
    mask = torch.ones(batch, text, dtype=torch.bool)
    if valid is not None:
        mask[:, valid:] = False
    if "txt_seq_lens" in inspect.signature(diffusers.QwenImageTransformer2DModel.forward).parameters:
        more["txt_seq_lens"] = [text] * batch  # diffusers 0.36
    return {
        "hidden_states": noise(batch, sum(f * h * w for f, h, w in images), 16),
        "encoder_hidden_states": noise(batch, text, 32),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [list(images)] * batch,
        "return_dict": False,
        **more,
    }
