"""The video models that the tests of families run."""

from __future__ import annotations

import tiny_video_models as tiny
import tiny_video_text_models as joint
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
    "HunyuanVideoTransformer3DModel": Case(joint.tiny_hunyuan_video, joint.hunyuan_video_inputs, move_wan, VIDEOS),
    "HunyuanVideoTransformer3DModel, token replace": Case(
        lambda: joint.tiny_hunyuan_video(image_condition_type="token_replace"),
        joint.hunyuan_video_inputs,
        move_wan,
        VIDEOS,
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(joint.tiny_framepack, joint.framepack_inputs, move_wan, VIDEOS),
    "HunyuanVideo15Transformer3DModel": Case(
        joint.tiny_hunyuan_video15, joint.hunyuan_video15_inputs, move_latent, VIDEOS
    ),
    "HunyuanVideo15Transformer3DModel, text to video": Case(
        joint.tiny_hunyuan_video15,
        lambda *grid: joint.hunyuan_video15_inputs(*grid, image=False, text=80),
        move_latent,
        VIDEOS,
    ),
    "MotifVideoTransformer3DModel": Case(
        lambda: joint.hunyuan_relative("MotifVideoTransformer3DModel", image_embed_dim=8),
        joint.motif_video_inputs,
        move_wan,
        VIDEOS,
    ),
    "MotifVideoTransformer3DModel, decoder": Case(
        lambda: joint.hunyuan_relative("MotifVideoTransformer3DModel", image_embed_dim=8, num_decoder_layers=1),
        joint.motif_video_inputs,
        move_wan,
        VIDEOS,
    ),
}


def move_packed(inputs, frame, row, column):
    height, width = inputs.get("height"), inputs.get("width")
    if height is None:
        # One frame that conditions the video stands in front of it.
        rows, columns = inputs["video_coords"][0, 1:]
        height, width, frame = len(rows.unique()), len(columns.unique()), frame + 1
    inputs["hidden_states"][:, (frame * height + row) * width + column] += 1


def move_sample(inputs, frame, row, column):
    inputs["sample"][:, :, frame, row, column] += 1


def move_frames_first(frames_in_token=1):
    def move(inputs, frame, row, column):
        inputs["hidden_states"][:, frames_in_token * frame, :, 2 * row + 1, 2 * column] += 1

    return move


def move_channels_last(inputs, frame, row, column):
    inputs["hidden_states"][:, frame, 2 * row + 1, 2 * column] += 1


OTHER_CASES = {
    "MochiTransformer3DModel": Case(joint.tiny_mochi, joint.mochi_inputs, move_wan, VIDEOS),
    "CogVideoXTransformer3DModel": Case(joint.tiny_cogvideox, joint.cogvideox_inputs, move_frames_first(), VIDEOS),
    "CogVideoXTransformer3DModel, 1.5": Case(
        lambda: joint.tiny_cogvideox(
            patch_size_t=2, use_rotary_positional_embeddings=True, patch_bias=False, sample_frames=17
        ),
        lambda *grid: joint.cogvideox_inputs(*grid, frames_in_token=2),
        move_frames_first(2),
        VIDEOS,
    ),
    "ConsisIDTransformer3DModel": Case(
        lambda: joint.tiny_cogvideox("ConsisIDTransformer3DModel"),
        joint.cogvideox_inputs,
        move_frames_first(),
        VIDEOS,
    ),
    "EasyAnimateTransformer3DModel": Case(joint.tiny_easyanimate, joint.easyanimate_inputs, move_wan, VIDEOS),
    "CosmosTransformer3DModel": Case(tiny.tiny_cosmos, tiny.cosmos_inputs, move_wan, VIDEOS),
    "CosmosTransformer3DModel, 2.5": Case(
        lambda: tiny.tiny_cosmos(
            extra_pos_embed_type=None, img_context_dim_in=8, img_context_num_tokens=4, img_context_dim_out=32
        ),
        lambda *grid: tiny.cosmos_inputs(*grid, image=True),
        move_wan,
        VIDEOS,
        needs=("Cosmos2_5_TransferPipeline",),
    ),
    "AllegroTransformer3DModel": Case(tiny.tiny_allegro, tiny.allegro_inputs, move_wan, VIDEOS),
    "LatteTransformer3DModel": Case(tiny.tiny_latte, tiny.video_inputs, move_wan, ((3, 3, 5), (1, 1, 2), (3, 5, 4))),
    "LTXVideoTransformer3DModel": Case(tiny.tiny_ltx, tiny.ltx_inputs, move_packed, VIDEOS),
    "LTXVideoTransformer3DModel, conditions": Case(
        tiny.tiny_ltx, lambda *grid: tiny.ltx_inputs(*grid, clip=1), move_packed, VIDEOS
    ),
    "LTX2VideoTransformer3DModel": Case(tiny.tiny_ltx2, tiny.ltx2_inputs, move_packed, VIDEOS),
    "LTX2VideoTransformer3DModel, keyframes": Case(
        tiny.tiny_ltx2, lambda *grid: tiny.ltx2_inputs(*grid, keyframes=2), move_packed, VIDEOS
    ),
    "UNetMotionModel": Case(
        tiny.tiny_animatediff, tiny.animatediff_inputs, move_sample, ((3, 9, 13), (1, 8, 5), (2, 5, 5))
    ),
    "Kandinsky5Transformer3DModel": Case(tiny.tiny_kandinsky5, tiny.kandinsky5_inputs, move_channels_last, VIDEOS),
}

VIDEO_CASES = {**WAN_CASES, **HUNYUAN_CASES, **OTHER_CASES}
