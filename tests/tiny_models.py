"""Complete pipelines with random weights in a few hundred kilobytes, built without any download."""

from __future__ import annotations

import tempfile

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

WORDS = ("a", "red", "blue", "circle", "square", "moving", "left", "right", "fast", "on", "grey", "ground")
PROMPT = "a red circle moving left"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer, saved and loaded as a file like a real one."""
    vocabulary = {word: index for index, word in enumerate(("<pad>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(f"{folder}/tokenizer.json")
        return PreTrainedTokenizerFast(
            tokenizer_file=f"{folder}/tokenizer.json",
            pad_token="<pad>",
            eos_token="</s>",
            unk_token="<unk>",
            model_max_length=8,
        )


def tiny_text_encoder(width: int = 32) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(WORDS) + 3, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4, is_encoder_decoder=False
    )
    return UMT5EncoderModel(config).eval()


def tiny_vae() -> AutoencoderKLWan:
    """4 latent channels, 4x in time and 8x in space, as Wan 2.1."""
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    ).eval()


def tiny_wan(
    layers: int = 2, heads: int = 2, head_dim: int = 16, in_channels: int = 4, **options
) -> WanTransformer3DModel:
    """A WanTransformer3DModel; `image_dim=8, added_kv_proj_dim=heads * head_dim` makes it Wan 2.1 image-to-video."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=in_channels,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
        **options,
    )
    return model.eval()


def tiny_wan_pipeline(
    *, two_experts: bool = False, image_to_video: bool = False, scheduler: str = "unipc", seed: int = 0, **model
) -> WanPipeline | WanImageToVideoPipeline:
    """A whole Wan pipeline.

    Args:
        two_experts: Wan 2.2: `transformer_2` takes over below half of the timesteps.
        image_to_video: A `WanImageToVideoPipeline` of the 2.2 kind (the image comes in as latents only).
        scheduler: "unipc" or "euler", both flow matching.
        seed: Of the weights.
        model: For `tiny_wan`.
    """
    torch.manual_seed(seed)
    # Image-to-video concatenates noise, a mask of 4 channels and the encoded image.
    model.setdefault("in_channels", 12 if image_to_video else 4)
    parts = {
        "tokenizer": tiny_tokenizer(),
        "text_encoder": tiny_text_encoder(),
        "vae": tiny_vae(),
        "transformer": tiny_wan(**model),
        "transformer_2": tiny_wan(**model) if two_experts else None,
        "scheduler": tiny_scheduler(scheduler),
        "boundary_ratio": 0.5 if two_experts else None,
    }
    if image_to_video:
        pipe = WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None)
    else:
        pipe = WanPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_scheduler(kind: str) -> UniPCMultistepScheduler | FlowMatchEulerDiscreteScheduler:
    if kind == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


class NoGuard:
    """Stands for the model that looks at prompts, which needs a package of its own."""

    def to(self, device):
        pass

    def check_text_safety(self, prompt):
        return True


def call_arguments(steps: int = 4, seed: int = 0, **more) -> dict:
    """Arguments of a short pipeline call on a grid of 3x3x5 tokens, returning latents."""
    return {
        "prompt": PROMPT,
        "negative_prompt": "",
        "height": 48,
        "width": 80,
        "num_frames": 9,
        "num_inference_steps": steps,
        "max_sequence_length": 8,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
        **more,
    }


def model_inputs(
    frames: int = 3, height: int = 6, width: int = 10, batch: int = 1, channels: int = 4, seed: int = 0, **more
) -> dict:
    """Arguments of one forward of `tiny_wan`: latents, half as high and wide in tokens (default grid 3x3x5)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, channels, frames, height, width, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 8, 32, generator=generator),
        "return_dict": False,
        **more,
    }


def moved(inputs: dict, device: str, dtype: torch.dtype = torch.float32) -> dict:
    """Arguments of a forward with their tensors on a device, floating-point ones in a dtype."""

    def move(x):
        return x.to(device, dtype if x.is_floating_point() else None) if isinstance(x, torch.Tensor) else x

    return {name: move(x) for name, x in inputs.items()}


def video(pipe, **more) -> torch.Tensor:
    """Latents of a run of 3 steps on 3x6x10 tokens, the same whenever it is called."""
    return pipe(**call_arguments(**{"steps": 3, "height": 96, "width": 160, **more})).frames


def forward(model, device: str = "cpu", **more) -> torch.Tensor:
    """One forward on 5x6x10 tokens without gradients."""
    with torch.no_grad():
        return model(**moved(model_inputs(**{"frames": 5, "height": 12, "width": 20, **more}), device))[0]


def compile_as(pipe, way: str, backend: str) -> None:
    """Compiles the pipeline's model in one of three ways: "torch.compile", "model.compile" or "blocks"."""
    name = "unet" if hasattr(pipe, "unet") else "transformer"
    if way == "torch.compile":
        setattr(pipe, name, torch.compile(getattr(pipe, name), fullgraph=True, backend=backend))
    elif way == "model.compile":
        getattr(pipe, name).compile(fullgraph=True, backend=backend)
    else:
        getattr(pipe, name).compile_repeated_blocks(fullgraph=True, backend=backend)
