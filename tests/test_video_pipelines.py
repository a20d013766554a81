"""Pipelines of video families with tiny models, as a user calls them; text comes as embeddings."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import PIL.Image
import pytest
import tiny_video_models as tiny
import tiny_video_text_models as joint
import torch
from diffusers.pipelines.ltx import pipeline_ltx_condition
from tiny_models import tiny_scheduler, tiny_vae

import fastdiff
from fastdiff.commands import sizes
from fastdiff_kernels import Grid
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

TEXT = ("text_encoder", "tokenizer")
TWO_TEXTS = (*TEXT, "text_encoder_2", "tokenizer_2")
WHOLE = fastdiff.NeighborhoodConfig((None, None, None), block_size=32)
NARROW = fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32)


@dataclass(frozen=True)
class Pipe:
    """A pipeline class, its model, and what the call takes besides the number of steps.

    Attributes:
        model: () -> the model.
        call: () -> the arguments of the call.
        absent: Components that are None.
        scheduler: () -> the scheduler.
        parts: () -> further components by name.
        grid: In tokens.
        component: What the pipeline calls its model.
    """

    model: Callable[[], torch.nn.Module]
    call: Callable[[], dict[str, Any]]
    absent: tuple[str, ...] = ("vae", *TEXT)
    scheduler: Callable[[], Any] = lambda: tiny_scheduler("euler")
    parts: Callable[[], dict[str, Any]] = dict
    grid: tuple[int, int, int] = (3, 3, 5)
    component: str = "transformer"


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


class NoGuard:
    """Stands for the model that looks at prompts, which needs a package of its own."""

    def to(self, device):
        pass

    def check_text_safety(self, prompt):
        return True


PIPES = {
    "HunyuanVideoPipeline": Pipe(joint.tiny_hunyuan_video, hunyuan_video_call, absent=("vae", *TWO_TEXTS)),
    "HunyuanVideo15Pipeline": Pipe(
        lambda: joint.tiny_hunyuan_video15(in_channels=9),
        hunyuan_video15_call,
        absent=TWO_TEXTS,
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


def build(name):
    case = PIPES[name]
    torch.manual_seed(0)
    parts = dict.fromkeys(case.absent) | {case.component: case.model()} | case.parts()
    pipe = getattr(diffusers, name)(scheduler=case.scheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        settings = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        return pipe(**settings, **case.call()).frames

    return pipe, draw


@pytest.mark.parametrize("name", [name for name in PIPES if hasattr(diffusers, name)])
def test_a_pipeline_dense_sparse_and_dense_again(name, shows):
    pipe, draw = build(name)
    case = PIPES[name]
    if sizes.makes_video(pipe):
        asked = (case.call()[name] for name in ("num_frames", "height", "width"))
        assert sizes.grid_of(pipe, *asked) == Grid(*case.grid), "as forecast before a run"
    shows(getattr(pipe, case.component), f"pipeline {type(pipe).__name__}")
    dense = draw()
    fastdiff.apply(pipe, WHOLE)
    torch.testing.assert_close(draw(), dense, atol=1e-4, rtol=1e-3)
    fastdiff.apply(pipe, NARROW, dense_steps=3)
    # Its processor is another one, dense too.
    close = {"atol": 1e-4, "rtol": 1e-3} if name == "HunyuanVideo15Pipeline" else {"atol": 0, "rtol": 0}
    torch.testing.assert_close(draw(), dense, **close)
    fastdiff.apply(pipe, NARROW, dense_steps=1)
    assert not torch.allclose(draw(), dense, atol=1e-5)
    attached = find(getattr(pipe, case.component))
    assert {layout.grid for layout in attached.seen} == {Grid(*case.grid)}
    assert attached.steps_seen == 3
    fastdiff.remove(pipe)
    assert torch.equal(draw(), dense)


def test_clips_that_condition_a_video_are_references():
    pipe, draw = build("LTXConditionPipeline")
    fastdiff.apply(pipe, NARROW)
    draw()
    (layout,) = find(pipe.transformer).seen
    assert [(span.kind, span.tokens) for span in layout.query] == [("reference", 15), ("grid", 45)]


def test_text_slots_that_no_prompt_fills_are_padding():
    """The pipeline hands 729 slots for an image that is not there."""
    pipe, draw = build("HunyuanVideo15Pipeline")
    fastdiff.apply(pipe, NARROW)
    draw()
    (layout,) = find(pipe.transformer).seen
    assert [(span.kind, span.tokens) for span in layout.query] == [("grid", 45), ("text", 64), ("pad", 679)]
