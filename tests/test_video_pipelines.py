"""Pipelines of video families with tiny models, as a user calls them; text comes as embeddings."""

import json

import diffusers
import PIL.Image
import pytest
import tiny_video_models as tiny
import tiny_video_text_models as joint
import torch
from diffusers.pipelines.ltx import pipeline_ltx_condition
from pipeline_case import NARROW, TEXT, Pipe, build, dense_sparse_and_dense_again, present
from tiny_models import NoGuard, tiny_scheduler, tiny_text_encoder, tiny_tokenizer, tiny_vae, tiny_wan
from tiny_picture_models import tiny_picture_vae

import fastdiff
from fastdiff import cli
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

TWO_TEXTS = (*TEXT, "text_encoder_2", "tokenizer_2")


def size(frames=9, height=48, width=80):
    return {"num_frames": frames, "height": height, "width": width}


def embeds(text=8, channels=32, names=("prompt_embeds",), mask=None):
    """Embeddings of a prompt, and others for an empty one; with a mask, named so, the last 3 are padding."""
    found = {name: tiny.noise(1, text, channels) for name in names}
    found |= {f"negative_{name}": tiny.noise(1, text, channels, seed=1) for name in names}
    if mask is not None:
        found |= {name: torch.arange(text)[None] < text - 3 for name in (mask, f"negative_{mask}")}
    return found


def guided():
    return {"guider": diffusers.ClassifierFreeGuidance(3.0)}


def hunyuan_video_call():
    pooled = {"pooled_prompt_embeds": tiny.noise(1, 8), "negative_pooled_prompt_embeds": tiny.noise(1, 8, seed=1)}
    return size() | embeds(mask="prompt_attention_mask") | pooled | {"true_cfg_scale": 3.0}


def hunyuan_video15_call():
    text = embeds(mask="prompt_embeds_mask")
    glyphs = embeds(6, 8, names=("prompt_embeds_2",), mask="prompt_embeds_mask_2")
    return size() | text | glyphs


def hunyuan_video15_parts():
    return guided() | {
        "vae": tiny.build(
            "AutoencoderKLHunyuanVideo15", latent_channels=4, block_out_channels=(4,) * 5, layers_per_block=1
        )
    }


def kandinsky5_call():
    ends = {f"{kind}prompt_cu_seqlens": torch.tensor([0, 8], dtype=torch.int32) for kind in ("", "negative_")}
    pooled = {f"{kind}prompt_embeds_clip": tiny.noise(1, 8) for kind in ("", "negative_")}
    return size() | embeds(names=("prompt_embeds_qwen",)) | pooled | ends


def ltx_vae():
    return {
        "vae": tiny.build(
            "AutoencoderKLLTXVideo",
            latent_channels=4,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
        )
    }


def ltx_condition_call():
    """A picture that is to appear at the end."""
    image = PIL.Image.new("RGB", (160, 96), "red")
    condition = pipeline_ltx_condition.LTXVideoCondition(image=image, frame_index=16)
    return size(17, 96, 160) | embeds(mask="prompt_attention_mask") | {"conditions": [condition]}


def magvit():
    return {
        "vae": tiny.build(
            "AutoencoderKLMagvit",
            latent_channels=4,
            block_out_channels=[8, 8, 8, 8],
            layers_per_block=1,
            norm_num_groups=4,
        )
    }


class Connectors:
    """Stands for the model that LTX-2 has between its text encoder and its transformer."""

    def __call__(self, prompt_embeds, mask, padding_side):
        return prompt_embeds, prompt_embeds, mask


def ltx2_parts():
    """Of the VAEs the pipeline reads statistics alone, for latents as for pictures."""
    video = tiny.build(
        "AutoencoderKLLTX2Video",
        latent_channels=4,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    audio = tiny.build("AutoencoderKLLTX2Audio", base_channels=4, latent_channels=1, ch_mult=(1, 1, 1), mel_bins=16)
    return {"vae": video, "audio_vae": audio, "connectors": Connectors(), "vocoder": None}


def wan_animate_call():
    def clip(frames, height, width):
        return [PIL.Image.new("RGB", (width, height), (20 * frame, 0, 90)) for frame in range(frames)]

    images = {"image": clip(1, 48, 80)[0], "pose_video": clip(5, 48, 80), "face_video": clip(5, 16, 16)}
    return images | {
        "height": 48,
        "width": 80,
        "segment_frame_length": 5,
        **embeds(512),
    }


def image_to_video_call():
    return hunyuan_video_call() | {"image": PIL.Image.new("RGB", (80, 48), "red")}


def hunyuan_video_vae():
    vae = tiny.build(
        "AutoencoderKLHunyuanVideo",
        latent_channels=4,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
    )
    return {"vae": vae, "image_processor": None}


def see_anything(pipe):
    pipe.encode_image = lambda image, device: tiny.noise(1, 4, 8)


PIPES = {
    "HunyuanVideoPipeline": Pipe(joint.tiny_hunyuan_video, hunyuan_video_call, absent=("vae", *TWO_TEXTS)),
    "HunyuanVideoImageToVideoPipeline": Pipe(
        lambda: joint.tiny_hunyuan_video(image_condition_type="token_replace"),
        image_to_video_call,
        absent=TWO_TEXTS,
        parts=hunyuan_video_vae,
    ),
    "HunyuanVideo15Pipeline": Pipe(
        lambda: joint.tiny_hunyuan_video15(in_channels=9),
        hunyuan_video15_call,
        absent=TWO_TEXTS,
        exact=False,
        parts=hunyuan_video15_parts,
    ),
    "MotifVideoPipeline": Pipe(
        lambda: joint.hunyuan_relative("MotifVideoTransformer3DModel", in_channels=9),
        lambda: size() | embeds(mask="prompt_attention_mask"),
        absent=TEXT,
        parts=lambda: guided() | {"vae": tiny_vae()},
    ),
    "MochiPipeline": Pipe(
        joint.tiny_mochi, lambda: size(13) | embeds(mask="prompt_attention_mask") | {"guidance_scale": 3.0}
    ),
    "CogVideoXPipeline": Pipe(
        joint.tiny_cogvideox, lambda: size() | embeds(), scheduler=lambda: diffusers.CogVideoXDDIMScheduler()
    ),
    "EasyAnimatePipeline": Pipe(
        joint.tiny_easyanimate, lambda: size() | embeds(mask="prompt_attention_mask"), absent=TEXT, parts=magvit
    ),
    "LTXPipeline": Pipe(tiny.tiny_ltx, lambda: size(17, 96, 160) | embeds(mask="prompt_attention_mask")),
    "LTXConditionPipeline": Pipe(tiny.tiny_ltx, ltx_condition_call, absent=TEXT, parts=ltx_vae),
    "CosmosTextToWorldPipeline": Pipe(
        tiny.tiny_cosmos,
        lambda: size(17) | embeds(),
        scheduler=lambda: diffusers.EDMEulerScheduler(),
        parts=lambda: {"safety_checker": NoGuard()},
    ),
    "Cosmos2_5_PredictBasePipeline": Pipe(
        lambda: tiny.tiny_cosmos(in_channels=5, extra_pos_embed_type=None),
        lambda: size() | embeds(),
        absent=TEXT,
        scheduler=lambda: tiny_scheduler("unipc"),
        parts=lambda: {"vae": tiny_vae(), "safety_checker": NoGuard()},
    ),
    "LTX2Pipeline": Pipe(
        tiny.tiny_ltx2,
        lambda: size(17, 96, 160) | embeds(mask="prompt_attention_mask") | {"spatio_temporal_guidance_blocks": [1]},
        absent=TEXT,
        parts=ltx2_parts,
    ),
    "WanPipeline": Pipe(tiny_wan, lambda: size() | embeds(), absent=TEXT, parts=lambda: {"vae": tiny_vae()}),
    # A segment has a frame more than it shows, the reference.
    "WanAnimatePipeline": Pipe(
        tiny.tiny_wan_animate,
        wan_animate_call,
        absent=(*TEXT, "image_encoder", "image_processor"),
        scheduler=lambda: tiny_scheduler("unipc"),
        parts=lambda: {"vae": tiny_vae()},
        settle=see_anything,
    ),
    "ChronoEditPipeline": Pipe(
        lambda: tiny.wan_relative(
            "ChronoEditTransformer3DModel", head_dim=24, in_channels=12, image_dim=8, added_kv_proj_dim=48
        ),
        lambda: size(5) | embeds() | {"image": PIL.Image.new("RGB", (80, 48), "red")},
        absent=(*TEXT, "image_encoder", "image_processor"),
        parts=lambda: {"vae": tiny_vae()},
        settle=see_anything,
        grid=(2, 3, 5),
    ),
    "AllegroPipeline": Pipe(
        tiny.tiny_allegro,
        lambda: size() | embeds(mask="prompt_attention_mask") | {"negative_prompt": None},
        scheduler=lambda: diffusers.EulerAncestralDiscreteScheduler(),
    ),
    "LattePipeline": Pipe(
        lambda: tiny.tiny_latte(out_channels=8),
        lambda: embeds() | {"video_length": 3, "height": 48, "width": 80, "negative_prompt": None},
        scheduler=lambda: diffusers.DDIMScheduler(),
    ),
    "AnimateDiffPipeline": Pipe(
        tiny.tiny_animatediff,
        lambda: size(3, 40, 56) | embeds(),
        absent=("vae", "motion_adapter", *TEXT),
        scheduler=lambda: diffusers.DDIMScheduler(),
        grid=(3, 5, 7),
        component="unet",
    ),
    "Kandinsky5T2VPipeline": Pipe(
        tiny.tiny_kandinsky5,
        kandinsky5_call,
        absent=("vae", *TWO_TEXTS),
    ),
    "WanVACEPipeline": Pipe(
        lambda: tiny.tiny_wan_vace(control_channels=72),
        lambda: size() | embeds(),
        absent=TEXT,
        parts=lambda: {"vae": tiny_vae()},
    ),
    # It steps copies of its scheduler, one for each frame.
    "SkyReelsV2DiffusionForcingPipeline": Pipe(
        lambda: tiny.wan_relative("SkyReelsV2Transformer3DModel"),
        lambda: size() | embeds() | {"prompt": None, "ar_step": 0},
        scheduler=lambda: tiny_scheduler("unipc"),
    ),
    "SkyReelsV2Pipeline": Pipe(lambda: tiny.wan_relative("SkyReelsV2Transformer3DModel"), lambda: size() | embeds()),
}


@pytest.mark.parametrize("name", present(PIPES))
def test_a_pipeline_dense_sparse_and_dense_again(name, shows):
    dense_sparse_and_dense_again(name, PIPES[name], shows)


def test_clips_that_condition_a_video_are_references():
    pipe, draw = build("LTXConditionPipeline", PIPES["LTXConditionPipeline"])
    fastdiff.apply(pipe, NARROW)
    draw()
    (layout,) = find(pipe.transformer).seen
    assert [(span.kind, span.tokens) for span in layout.query] == [("reference", 15), ("grid", 45)]


def test_text_slots_that_no_prompt_fills_are_padding():
    """The pipeline hands 729 slots for an image that is not there."""
    pipe, draw = build("HunyuanVideo15Pipeline", PIPES["HunyuanVideo15Pipeline"])
    fastdiff.apply(pipe, NARROW)
    draw()
    (layout,) = find(pipe.transformer).seen
    assert [(span.kind, span.tokens) for span in layout.query] == [("grid", 45), ("text", 64), ("pad", 679)]


def test_latte_on_the_command_line(tmp_path, capsys):
    """Its call has another name for the number of frames."""
    vae = tiny_picture_vae()
    vae.register_to_config(shift_factor=None)
    pipe = diffusers.LattePipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=vae,
        transformer=tiny.tiny_latte(out_channels=8),
        scheduler=diffusers.DDIMScheduler(),
    )
    pipe.save_pretrained(tmp_path / "latte")
    words = ["compare", "--model", str(tmp_path / "latte"), "--prompt", "a red circle", "--num-frames", "3"]
    words += ["--height", "32", "--width", "48", "--steps", "2", "--method", "clear", "--config", '{"radius": 2}']
    assert cli.main([*words, "--output", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["num_frames"], report["grid"]) == (3, "3x8x12")
    assert report["density"] > 0
