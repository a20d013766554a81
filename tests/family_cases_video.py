"""The video models that the tests of families run."""

from __future__ import annotations

import tiny_video_models as tiny
import torch
from family_case import Case
from tiny_models import model_inputs, tiny_wan

VIDEOS = ((3, 3, 5), (1, 1, 2), (2, 5, 4))


def wan_inputs(frames, height, width, **more):
    return model_inputs(frames=frames, height=2 * height, width=2 * width, **more)


def move_wan(inputs, frame, row, column):
    inputs["hidden_states"][:, :, frame, 2 * row + 1, 2 * column] += 1


def move_latent(inputs, frame, row, column):
    inputs["hidden_states"][:, :, frame, row, column] += 1


WAN_CASES = {
    "WanTransformer3DModel": Case(lambda: tiny_wan(layers=2), wan_inputs, move_wan, VIDEOS),
    "WanTransformer3DModel, image to video": Case(
        lambda: tiny_wan(layers=1, in_channels=12, image_dim=8, added_kv_proj_dim=32),
        lambda *grid: wan_inputs(
            *grid,
            channels=12,
            encoder_hidden_states=torch.zeros(1, 512, 32),
            encoder_hidden_states_image=torch.zeros(1, 4, 8),
        ),
        move_wan,
        VIDEOS,
    ),
    "WanVACETransformer3DModel": Case(tiny.tiny_wan_vace, tiny.wan_vace_inputs, move_wan, VIDEOS),
    "WanAnimateTransformer3DModel": Case(
        tiny.tiny_wan_animate, tiny.wan_animate_inputs, move_wan, ((3, 3, 5), (2, 5, 4))
    ),
    "ChronoEditTransformer3DModel": Case(
        lambda: tiny.wan_relative("ChronoEditTransformer3DModel", head_dim=24), wan_inputs, move_wan, VIDEOS
    ),
    "SkyReelsV2Transformer3DModel": Case(
        lambda: tiny.wan_relative("SkyReelsV2Transformer3DModel"), wan_inputs, move_wan, VIDEOS
    ),
}

HUNYUAN_CASES = {
    "HunyuanVideoTransformer3DModel": Case(tiny.tiny_hunyuan_video, tiny.hunyuan_video_inputs, move_wan, VIDEOS),
    "HunyuanVideoTransformer3DModel, token replace": Case(
        lambda: tiny.tiny_hunyuan_video(image_condition_type="token_replace"),
        tiny.hunyuan_video_inputs,
        move_wan,
        VIDEOS,
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        tiny.tiny_hunyuan_video15, tiny.hunyuan_video15_inputs, move_latent, VIDEOS
    ),
    "HunyuanVideo15Transformer3DModel, text to video": Case(
        tiny.tiny_hunyuan_video15,
        lambda *grid: tiny.hunyuan_video15_inputs(*grid, image=False, text=80),
        move_latent,
        VIDEOS,
    ),
    "MotifVideoTransformer3DModel": Case(
        lambda: tiny.hunyuan_relative("MotifVideoTransformer3DModel", image_embed_dim=8),
        tiny.motif_video_inputs,
        move_wan,
        VIDEOS,
    ),
    "MotifVideoTransformer3DModel, decoder": Case(
        lambda: tiny.hunyuan_relative("MotifVideoTransformer3DModel", image_embed_dim=8, num_decoder_layers=1),
        tiny.motif_video_inputs,
        move_wan,
        VIDEOS,
    ),
}

VIDEO_CASES = {**WAN_CASES, **HUNYUAN_CASES}
