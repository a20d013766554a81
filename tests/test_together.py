"""fastdiff with what else runs in a pipeline: fused projections, caches, callbacks, threads, shared models."""

import concurrent.futures
import copy
import logging
import pickle

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from fake_planner import FakePlanner, put_on
from tiny_models import PROMPT, call_arguments, forward, tiny_wan_pipeline, video
from tiny_picture_models import (
    flux_inputs,
    picture,
    tiny_flux,
    tiny_flux_pipeline,
    tiny_sd_pipeline,
    tiny_unet,
    unet_inputs,
)

import fastdiff
from fastdiff_kernels import InvalidInputError
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

RADIAL = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=32)
NEAR = fastdiff.NeighborhoodConfig((3, 3), block_size=32)
WHOLE = fastdiff.NeighborhoodConfig((None, None, None), block_size=32)


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.together("fuse_qkv_projections")
class TestFusedProjections:
    def test_wan(self):
        model = fastdiff.apply(tiny_wan_pipeline().transformer, RADIAL)
        before = forward(model)
        model.fuse_qkv_projections()
        torch.testing.assert_close(forward(model), before, atol=1e-5, rtol=1e-4)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(forward(model), before, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("first", ["apply", "fuse"])
    def test_flux(self, first):
        torch.manual_seed(0)
        model, inputs = tiny_flux(), flux_inputs()
        before = run(fastdiff.apply(model, NEAR), inputs)
        if first == "fuse":
            fastdiff.remove(model)
        model.fuse_qkv_projections()
        if first == "fuse":
            fastdiff.apply(model, NEAR)
        torch.testing.assert_close(run(model, inputs), before, atol=1e-5, rtol=1e-4)

    def test_a_unet_gets_other_processors_which_is_said(self, caplog):
        torch.manual_seed(0)
        model, inputs = tiny_unet(levels=2), unet_inputs()
        dense = run(model, inputs)
        before = run(fastdiff.apply(model, NEAR), inputs)
        model.fuse_qkv_projections()
        with caplog.at_level(logging.WARNING, logger="fastdiff"):
            torch.testing.assert_close(run(model, inputs), dense, atol=1e-5, rtol=1e-4)
        assert "were replaced by others" in caplog.text
        torch.testing.assert_close(run(fastdiff.apply(model, NEAR), inputs), before, atol=1e-5, rtol=1e-4)
        fastdiff.remove(model)
        model.unfuse_qkv_projections()
        torch.testing.assert_close(run(fastdiff.apply(model, NEAR), inputs), before, atol=1e-5, rtol=1e-4)
        assert torch.equal(run(fastdiff.remove(model), inputs), dense)


@pytest.mark.together("gradient checkpointing, LoRA training")
@pytest.mark.parametrize(
    ("build", "inputs", "config"),
    [
        (tiny_flux, flux_inputs(height=6, width=8), fastdiff.ClearConfig(radius=2, pool_factor=2, block_size=32)),
        (lambda: tiny_unet(levels=2), unet_inputs(), NEAR),
    ],
    ids=["flux", "unet"],
)
def test_gradient_checkpointing(build, inputs, config):
    torch.manual_seed(0)
    model, found = fastdiff.apply(build(), config).train(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(**inputs)[0].square().mean().backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any("fastdiff" in name for name in found[0]) == (find(model).layers[0].parameters is not None)


def first_block(pipe):
    return diffusers.FirstBlockCacheConfig(threshold=0.3)


def mag(pipe):
    ratios = torch.ones(8)
    return diffusers.MagCacheConfig(mag_ratios=ratios, num_inference_steps=8, retention_ratio=0.25)


def pyramid(pipe):
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe):
    return diffusers.FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 681),
        current_timestep_callback=lambda: pipe.current_timestep,
        is_guidance_distilled=True,
    )


def taylor(pipe):
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=2,
        disable_cache_before_step=2,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"blocks\.\d+\.attn1"],
    )


CACHES = {
    "first-block cache": ("FirstBlockCacheConfig", first_block),
    "MagCache": ("MagCacheConfig", mag),
    "Pyramid Attention Broadcast": ("PyramidAttentionBroadcastConfig", pyramid),
    "FasterCache": ("FasterCacheConfig", faster),
    "TaylorSeer": ("TaylorSeerCacheConfig", taylor),
}


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(*cache, marks=pytest.mark.together(name), id=name) for name, cache in CACHES.items()],
)
def test_caches(name, config):
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers has no {name}")

    def cached(method=None):
        """A run with the cache, and how many calls of sparse layers it took."""
        pipe, planner = tiny_wan_pipeline(scheduler="euler", layers=3), None
        if isinstance(method, FakePlanner):
            planner = put_on(pipe, method)
        elif method is not None:
            fastdiff.apply(pipe, method)
        pipe.transformer.enable_cache(config(pipe))
        return video(pipe, steps=8), len(planner.extras) if planner else None, pipe

    dense, _, _ = cached()
    sparse, _, pipe = cached(RADIAL)
    assert sparse.isfinite().all()
    assert not torch.allclose(sparse, dense, atol=1e-3)
    assert torch.equal(video(pipe, steps=8), sparse), "the next run starts with an empty cache"
    assert torch.equal(video(fastdiff.remove(pipe), steps=8), dense)
    torch.testing.assert_close(cached(WHOLE)[0], dense, atol=1e-4, rtol=1e-3)
    assert cached(FakePlanner())[1] < 3 * 8 * 2, "the cache has spared calls"


@pytest.mark.together("set_attention_backend for what stays dense")
class TestAttentionBackend:
    @pytest.mark.parametrize("first", ["apply", "choose"])
    def test_dense_layers_take_it(self, first, monkeypatch):
        calls, registry = [], attention_dispatch._AttentionBackendRegistry
        name = attention_dispatch.AttentionBackendName._NATIVE_MATH
        real = registry._backends[name]
        # What a model chooses is from then on the default of the whole process.
        monkeypatch.setattr(registry, "_active_backend", registry._active_backend)
        monkeypatch.setitem(registry._backends, name, lambda *args, **more: calls.append(1) or real(*args, **more))
        pipe = tiny_wan_pipeline(layers=3)
        if first == "choose":
            pipe.transformer.set_attention_backend("_native_math")
        fastdiff.apply(pipe, RADIAL, dense_layers=1)
        expected = forward(pipe.transformer)
        if first == "apply":
            pipe.transformer.set_attention_backend("_native_math")
        calls.clear()
        torch.testing.assert_close(forward(pipe.transformer), expected, atol=1e-5, rtol=1e-4)
        assert len(calls) == 1 + 3, "one dense self-attention and three cross-attentions"
        fastdiff.remove(pipe)
        calls.clear()
        forward(pipe.transformer)
        assert len(calls) == 3 + 3


@pytest.mark.together("pickling and deepcopy")
class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
    def test_a_patched_model(self, copied):
        torch.manual_seed(0)
        model, inputs = tiny_flux(), flux_inputs(height=6, width=8)
        dense = run(model, inputs)
        fastdiff.apply(model, fastdiff.ClearConfig(radius=2, pool_factor=2, block_size=32))
        sparse = run(model, inputs)
        twin = copied(model)
        fastdiff.remove(model)
        assert torch.equal(run(twin, inputs), sparse)
        with torch.no_grad():
            find(twin).layers[0].parameters.weight += 1
        assert not torch.equal(run(twin, inputs), sparse)
        assert torch.equal(run(fastdiff.remove(twin), inputs), dense)
        assert torch.equal(run(model, inputs), dense)

    def test_a_copied_pipeline_reads_its_own_scheduler(self):
        pipe = fastdiff.apply(tiny_wan_pipeline(), RADIAL, dense_steps=1)
        before = video(pipe)
        twin = copy.deepcopy(pipe)
        assert find(twin.transformer).steps.pipes() == [twin]
        fastdiff.remove(pipe)
        assert torch.equal(video(twin), before)


@pytest.mark.together("callbacks and interrupted runs")
class TestCallbacks:
    def test_a_callback_that_changes_the_latents(self):
        pipe, seen = fastdiff.apply(tiny_wan_pipeline(), RADIAL, dense_steps=[1]), []
        attached = find(pipe.transformer)

        def halve(pipe, step, timestep, tensors):
            seen.append((step, [layer.active for layer in attached.layers]))
            return {"latents": tensors["latents"] / 2}

        changed = video(pipe, callback_on_step_end=halve)
        assert seen == [(0, [True] * 2), (1, [False] * 2), (2, [True] * 2)]
        assert not torch.allclose(changed, video(pipe), atol=1e-3)

    def test_a_callback_that_removes_and_applies(self):
        pipe = tiny_wan_pipeline()
        dense = video(pipe)

        def off(pipe, step, timestep, tensors):
            fastdiff.remove(pipe) if step == 0 else fastdiff.apply(pipe, RADIAL)
            return tensors

        fastdiff.apply(pipe, RADIAL, dense_steps=1)
        found = video(pipe, callback_on_step_end=off)
        fastdiff.apply(pipe, RADIAL, dense_steps=[0, 1])
        assert torch.equal(found, video(pipe))
        assert not torch.equal(found, dense)

    def test_a_run_that_is_interrupted_or_fails(self):
        pipe = tiny_wan_pipeline()
        planner = put_on(pipe, FakePlanner())

        def stop(pipe, step, timestep, tensors):
            pipe._interrupt = step == 1
            return tensors

        def fail(pipe, step, timestep, tensors):
            raise KeyboardInterrupt

        short = {"steps": 4, "guidance_scale": 1.0}
        pipe(**call_arguments(**short), callback_on_step_end=stop)
        assert planner.steps_asked() == [0, 1]
        with pytest.raises(KeyboardInterrupt):
            pipe(**call_arguments(**short), callback_on_step_end=fail)
        planner.asked.clear()
        pipe(**call_arguments(**short))
        assert planner.steps_asked() == [0, 1, 2, 3]


@pytest.mark.together("several pipelines in threads")
def test_pipelines_in_threads():
    pipes = [tiny_wan_pipeline(seed=seed) for seed in range(3)]
    settings = [{"dense_steps": 1}, {"dense_layers": 1}, {"dense_steps": [2]}]
    for pipe, setting in zip(pipes, settings, strict=True):
        fastdiff.apply(pipe, RADIAL, **setting)
    alone = [video(pipe) for pipe in pipes]
    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            together = list(pool.map(video, pipes))
        assert all(torch.equal(one, other) for one, other in zip(together, alone, strict=True))


@pytest.mark.together("from_pipe pipelines that share a model")
class TestSharedModels:
    def test_both_are_sparse_and_read_the_same_steps(self):
        pipe = tiny_sd_pipeline(levels=2, sample_size=32)
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        dense, dense_other = picture(pipe), repaint(other)
        fastdiff.apply(pipe, NEAR, dense_steps=2)
        sparse, sparse_other = picture(pipe), repaint(other)
        assert not torch.equal(sparse, dense)
        assert not torch.equal(sparse_other, dense_other)
        assert torch.equal(picture(pipe), sparse)
        with pytest.raises(InvalidInputError, match="pipelines that share a model share one config"):
            fastdiff.apply(other, NEAR)
        fastdiff.apply(other, NEAR, dense_steps=2)
        fastdiff.remove(other)
        assert torch.equal(picture(pipe), dense)
        assert torch.equal(repaint(other), dense_other)

    def test_one_with_a_scheduler_of_its_own_must_be_told(self):
        pipe = tiny_sd_pipeline(levels=2, sample_size=32)
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        fastdiff.apply(pipe, NEAR, dense_steps=2)
        fastdiff.apply(other, NEAR, dense_steps=2)
        other.scheduler = diffusers.DDIMScheduler.from_config(other.scheduler.config)
        with pytest.raises(InvalidInputError, match="different schedulers"):
            repaint(other)

    def test_one_that_nobody_knows_is_told_of(self, caplog):
        pipe = fastdiff.apply(tiny_sd_pipeline(levels=2, sample_size=32), NEAR, dense_steps=2)
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        other.scheduler = diffusers.DDIMScheduler.from_config(other.scheduler.config)
        with caplog.at_level(logging.WARNING, logger="fastdiff"):
            picture(pipe)
            assert "outside a denoising run" not in caplog.text
            repaint(other)
            repaint(other)
        assert caplog.text.count("runs outside a denoising run") == 1


def repaint(pipe, strength=0.5, steps=4):
    """An image-to-image run from a grey picture of 40x56 pixels."""
    more = {"max_sequence_length": 8} if "Flux" in type(pipe).__name__ else {}
    return pipe(
        PROMPT,
        image=torch.full((1, 3, 40, 56), 0.5),
        height=40,
        width=56,
        strength=strength,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **more,
    ).images


@pytest.mark.together("image to image with strength")
@pytest.mark.parametrize(
    ("build", "cls"),
    [
        (tiny_flux_pipeline, "FluxImg2ImgPipeline"),
        (lambda: tiny_sd_pipeline(levels=2, sample_size=32), "StableDiffusionImg2ImgPipeline"),
    ],
    ids=["flux", "sd"],
)
@pytest.mark.parametrize(("strength", "steps"), [(0.5, [2, 3]), (0.75, [1, 2, 3]), (1.0, [0, 1, 2, 3])])
def test_steps_are_noise_levels(build, cls, strength, steps):
    """Half the strength begins at the third of four steps, which are numbered as in a full run."""
    pipe = getattr(diffusers, cls).from_pipe(build())
    pipe.set_progress_bar_config(disable=True)
    planner = put_on(pipe, FakePlanner())
    repaint(pipe, strength)
    assert planner.steps_asked() == steps
    assert {asked["steps"] for asked in planner.asked} == {4}
