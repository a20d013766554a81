"""The embedded pipelines by plain diffusers, without a word on dtypes."""

import diffusers
import pytest
import torch

from fastdiff.assets import EMBEDDED, pipeline_path


@pytest.mark.parametrize("name", EMBEDDED)
def test_they_load_in_one_dtype_and_run(name):
    pipe = diffusers.DiffusionPipeline.from_pretrained(pipeline_path(name))
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert {model.dtype for model in models} == {torch.float32}
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent"}
    out = pipe("a red ring", **size, **({"num_frames": 5} if name == "tiny-wan" else {}))
    assert bool(out[0].isfinite().all())
