"""diffusers' layer skipping, with which its perturbed-attention guidance works, on sparse layers."""

import pytest
import torch
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from tiny_latent_models import cogview_inputs, tiny_cogview4

import fastdiff
from fastdiff import ClearConfig

WHOLE = ClearConfig(radius=99.0)
SKIPS = {
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    "attention": {"skip_attention": True, "skip_attention_scores": False, "skip_ff": False},
}


def output(skip, config, config_first=False):
    torch.manual_seed(0)
    model = tiny_cogview4()
    if config and config_first:
        fastdiff.apply(model, config)
    if skip:
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks", **skip))
    if config and not config_first:
        fastdiff.apply(model, config)
    with torch.no_grad():
        return model(**cogview_inputs(6, 8))[0]


@pytest.mark.parametrize("config_first", [False, True], ids=["skip first", "apply first"])
@pytest.mark.parametrize("skip", SKIPS.values(), ids=SKIPS)
def test_skipping_does_what_it_does_dense(skip, config_first):
    wanted = output(skip, None)
    assert not torch.allclose(wanted, output(None, None), atol=1e-3)
    torch.testing.assert_close(output(skip, WHOLE, config_first), wanted)
