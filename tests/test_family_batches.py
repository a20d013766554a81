"""Every family with two samples in one forward, as guidance and several pictures at once have them."""

import pytest
import torch
from family_case import present, run
from family_cases_image import IMAGE_CASES
from family_cases_video import VIDEO_CASES

import fastdiff

torch.set_num_threads(1)

CASES = present({**VIDEO_CASES, **IMAGE_CASES})
# Lists of samples, and lists of layers.
SAMPLES = ("x", "cap_feats", "img_shapes")
LAYERS = (
    "encoder_hidden_states_llama3",
    "text_encoder_layers",
    "controlnet_block_samples",
    "controlnet_single_block_samples",
)


def two(name, value):
    """An argument of one sample for two, whose values and whose lengths of text differ."""
    if isinstance(value, dict):
        return {key: two(key, part) for key, part in value.items()}
    if name in SAMPLES:
        return value + [part.flip(-1) if isinstance(part, torch.Tensor) else part for part in value]
    if name in LAYERS:
        return [two("", part) for part in value]
    if isinstance(value, tuple):
        return tuple(two("", part) for part in value)
    if not isinstance(value, torch.Tensor) or (name != "encoder_hidden_states" and value.shape[:1] != (1,)):
        return value
    if "mask" in name:
        return torch.cat([value, torch.ones_like(value)])
    return torch.cat([value, value.flip(-1) if value.is_floating_point() else value])


@pytest.mark.parametrize("name", CASES)
def test_two_samples(name):
    torch.manual_seed(0)
    case = CASES[name]
    model, one = case.build(), case.arguments(*case.grids[0])
    inputs = two("", one)
    if name == "Lumina2Transformer2DModel":  # which refuses texts of unequal lengths
        inputs["encoder_attention_mask"] = one["encoder_attention_mask"].expand(2, -1)
    dense = run(model, inputs)
    assert len(dense) == 2
    assert not torch.allclose(dense[0], dense[1], atol=1e-2)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, None, None), block_size=32))
    torch.testing.assert_close(run(model, inputs), dense, atol=5e-6, rtol=1e-4)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32))
    sparse = run(model, inputs)
    torch.testing.assert_close(run(model, one), sparse[:1], atol=5e-6, rtol=1e-4)
    assert not torch.allclose(sparse, dense, atol=1e-4)
