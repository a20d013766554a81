"""Picture transformers and UNets on plain latents, with random weights, and the arguments of a forward on a grid."""

from __future__ import annotations

import torch
from tiny_packed_models import build, noise


def tiny_sd3(**options):
    return build(
        "SD3Transformer2DModel",
        sample_size=32,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=16,
        **options,
    )


def latent_inputs(height, width, *, text=5, text_channels=32, patch=2, channels=4, **more):
    """Arguments of models that take latents as they are, `[batch, channels, height, width]`."""
    return {
        "hidden_states": noise(1, channels, patch * height, patch * width),
        "encoder_hidden_states": noise(1, text, text_channels),
        "timestep": torch.full((1,), 500.0),
        "return_dict": False,
        **more,
    }


def tiny_pixart():
    return build(
        "PixArtTransformer2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        attention_bias=True,
    )


def tiny_lumina2():
    return build(
        "Lumina2Transformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(32, 32, 32),
        cap_feat_dim=32,
    )


def tiny_aura_flow():
    model = build(
        "AuraFlowTransformer2DModel",
        sample_size=32,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        out_channels=4,
        pos_embed_max_size=256,
    )
    # Untrained, what attention gives is small beside the rest.
    for name, parameter in model.named_parameters():
        if "to_out" in name or "to_add_out" in name:
            parameter.data *= 10
    return model


def tiny_hidream():
    return build(
        "HiDreamImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=[32, 16],
        text_emb_dim=64,
        num_routed_experts=2,
        num_activated_experts=1,
        axes_dims_rope=(4, 2, 2),
        max_resolution=(20, 20),
        llama_layers=(0, 1),
        force_inference_output=True,
    )


def hidream_inputs(height, width):
    inputs = latent_inputs(height, width)
    return {
        "hidden_states": inputs["hidden_states"],
        "encoder_hidden_states_t5": noise(1, 3, 32),
        "encoder_hidden_states_llama3": noise(2, 1, 4, 16),
        "pooled_embeds": noise(1, 64),
        "timesteps": torch.full((1,), 500),
        "return_dict": False,
    }


def tiny_hunyuan_dit():
    return build(
        "HunyuanDiT2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=4,
        hidden_size=16,
        text_len=4,
        text_len_t5=4,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )


def hunyuan_dit_inputs(height, width):
    angles = noise(height * width, 4).repeat_interleave(2, 1)
    return latent_inputs(
        height,
        width,
        text=4,
        text_channels=8,
        text_embedding_mask=torch.ones(1, 4),
        encoder_hidden_states_t5=noise(1, 4, 8),
        text_embedding_mask_t5=torch.ones(1, 4),
        image_rotary_emb=(angles.cos(), angles.sin()),
    )


def tiny_cogview3():
    return build(
        "CogView3PlusTransformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=2,
        pos_embed_max_size=16,
        sample_size=16,
    )


def tiny_cogview4():
    return build(
        "CogView4Transformer2DModel",
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        out_channels=4,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
    )


def cogview_inputs(height, width):
    size = torch.tensor([[2.0 * height, 2.0 * width]])
    return latent_inputs(height, width, original_size=size, target_size=size, crop_coords=0 * size)


def tiny_glm_image():
    return build(
        "GlmImageTransformer2DModel",
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=32,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    )


def glm_image_inputs(height, width):
    size, tokens = torch.tensor([[2.0 * height, 2.0 * width]]), height * width
    return latent_inputs(
        height,
        width,
        prior_token_id=torch.arange(tokens)[None] % 16,
        prior_token_drop=torch.zeros(1, tokens, dtype=torch.bool),
        target_size=size,
        crop_coords=0 * size,
    )


def tiny_ernie_image():
    model = build(
        "ErnieImageTransformer2DModel",
        hidden_size=32,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=64,
        in_channels=4,
        out_channels=4,
        patch_size=1,
        text_in_dim=32,
        rope_axes_dim=(4, 6, 6),
    )
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)  # untrained, its last layer and its gates are zero
    return model


def ernie_image_inputs(height, width):
    inputs = latent_inputs(height, width, patch=1)
    text = inputs.pop("encoder_hidden_states")
    return inputs | {"text_bth": text, "text_lens": torch.tensor([3])}


def tiny_hunyuan_image(patch_size: tuple[int, ...] = (1, 1), rope_axes_dim: tuple[int, ...] = (8, 8)):
    return build(
        "HunyuanImageTransformer2DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=patch_size,
        text_embed_dim=32,
        text_embed_2_dim=16,
        rope_axes_dim=rope_axes_dim,
    )


def hunyuan_image_inputs(height, width):
    return latent_inputs(
        height,
        width,
        patch=1,
        encoder_attention_mask=torch.tensor([[1, 1, 1, 0, 0]]),
        encoder_hidden_states_2=noise(1, 3, 16),
        encoder_attention_mask_2=torch.tensor([[1, 1, 0]]),
    )


def tiny_z_image():
    model = build(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    for token in (model.x_pad_token, model.cap_pad_token):
        # The oldest diffusers leaves in them what the memory held before.
        torch.nn.init.normal_(token)
    return model


def z_image_inputs(height, width, texts=(5,)):
    return {
        "x": [noise(4, 1, 2 * height, 2 * width) for _ in texts],
        "t": torch.full((len(texts),), 0.5),
        "cap_feats": [noise(tokens, 32) for tokens in texts],
        "return_dict": False,
    }


def tiny_unet2(down: tuple[str, ...], **options):
    """A Stable Diffusion UNet of the second kind: linear projections, heads by level."""
    return build(
        "UNet2DConditionModel",
        block_out_channels=(16,) * len(down),
        down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=4,
        use_linear_projection=True,
        **options,
    )


def tiny_sdxl():
    """Three levels, the first without attention, the last with two transformer blocks in each attention."""
    return tiny_unet2(
        ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(1, 2, 4),
        transformer_layers_per_block=(1, 1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=64,
    )
