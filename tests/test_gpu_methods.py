"""Every method on every family on a GPU: the same as the reference on a CPU, trainable, and undone bit for bit."""

import pytest
import torch
from tiny_models import PROMPT, model_inputs, moved, tiny_wan, tiny_wan_pipeline, video
from tiny_picture_models import flux_inputs, tiny_flux, tiny_unet, unet_inputs

import fastdiff

pytestmark = pytest.mark.gpu

FAMILIES = {
    "wan": (tiny_wan, lambda: model_inputs(frames=5, height=12, width=20)),
    "flux": (tiny_flux, lambda: flux_inputs(height=8, width=12)),
    "unet": (tiny_unet, lambda: unet_inputs(height=16, width=24)),
}
CONFIGS = {
    "radial": fastdiff.RadialConfig(decay_factor=0.3, near_width=0.4, block_size=32),
    "neighborhood": fastdiff.NeighborhoodConfig((3, 3, 3), dilation=(1, 2, 1), block_size=32),
    "clear": fastdiff.ClearConfig(3, block_size=32),
    "clear, pooled": fastdiff.ClearConfig(3, pool_factor=2, proportional=True, block_size=32),
    "agent": fastdiff.AgentConfig(8, steps=(0, 1)),
    "rules": fastdiff.RulesConfig(
        [
            fastdiff.Rule(fastdiff.ClearConfig(3, pool_factor=2, block_size=32), layers="0"),
            fastdiff.Rule(fastdiff.NeighborhoodConfig((3, 3, 3), block_size=32)),
        ]
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_it_equals_the_reference_on_a_cpu_and_is_undone(family, method):
    build, inputs = FAMILIES[family]
    torch.manual_seed(0)
    model = build()
    fastdiff.apply(model, CONFIGS[method], backend="reference")
    with torch.no_grad():
        truth = model(**inputs())[0]
    fastdiff.remove(model)
    model.to("cuda")
    there = moved(inputs(), "cuda")
    with torch.no_grad():
        dense = model(**there)[0]
        out = model(**there)[0] if fastdiff.apply(model, CONFIGS[method]) is model else None
        torch.testing.assert_close(out.cpu(), truth, atol=2e-4, rtol=1e-3)
        fastdiff.remove(model)
        assert torch.equal(model(**there)[0], dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", CONFIGS)
def test_it_trains_in_half_precision(family, method):
    build, inputs = FAMILIES[family]
    torch.manual_seed(0)
    model = build().to("cuda", torch.bfloat16)
    fastdiff.apply(model, CONFIGS[method])
    out = model(**moved(inputs(), "cuda", torch.bfloat16))[0]
    out.float().square().mean().backward()
    learnt = [p for name, p in model.named_parameters() if "to_q" in name or "fastdiff" in name]
    assert out.isfinite().all()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learnt)
    assert all(p.grad.isfinite().all() for p in learnt if p.grad is not None)


def test_paro_is_calibrated_and_runs(tmp_path):
    pipe = tiny_wan_pipeline().to("cuda")
    dense = video(pipe)
    call = {"height": 96, "width": 160, "num_frames": 9, "num_inference_steps": 3, "max_sequence_length": 8}
    config = fastdiff.calibrate(pipe, PROMPT, path=tmp_path / "paro.safetensors", density=0.8, groups=2, **call)
    found = [video(fastdiff.apply(pipe, config, backend=backend)) for backend in ("triton", "reference")]
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-3)
    assert not torch.equal(found[0], dense)
    fastdiff.remove(pipe)
    assert torch.equal(video(pipe), dense)
