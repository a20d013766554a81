"""apply, remove and summary with the real radial method on tiny Wan pipelines."""

import concurrent.futures
import copy
import gc
import json
import logging
import pickle
import sys

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_models import forward, model_inputs, tiny_wan, tiny_wan_pipeline, video

import fastdiff
from fastdiff_kernels import InvalidInputError, MissingDependencyError, UnsupportedError
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

# On the tiny grids of these tests only bands of single tokens skip anything.
NARROW = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=32)
WIDE = fastdiff.RadialConfig(block_size=32)


@pytest.fixture
def pipe():
    return tiny_wan_pipeline()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_wan()


def test_apply_and_remove_around_a_run(pipe):
    dense = video(pipe)
    assert fastdiff.apply(pipe, NARROW) is pipe
    sparse = video(pipe)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    assert torch.equal(video(pipe), sparse)
    assert fastdiff.remove(pipe) is pipe
    assert torch.equal(video(pipe), dense)
    assert torch.equal(video(fastdiff.remove(pipe)), dense)


def test_full_density_equals_the_untouched_model(model):
    size = {"frames": 2, "height": 10, "width": 14, "batch": 2}
    dense = forward(model, **size)
    fastdiff.apply(model, WIDE)
    torch.testing.assert_close(forward(model, **size), dense, atol=2e-6, rtol=1e-5)


def test_all_dense_steps_equal_the_untouched_pipeline(pipe):
    dense = video(pipe)
    fastdiff.apply(pipe, NARROW, dense_steps=3)
    assert torch.equal(video(pipe), dense)
    fastdiff.apply(pipe, NARROW, dense_steps=2)
    assert not torch.equal(video(pipe), dense)


def test_all_dense_layers_equal_the_untouched_pipeline(pipe):
    dense = video(pipe)
    fastdiff.apply(pipe, NARROW, dense_layers=[0, -1])
    assert torch.equal(video(pipe), dense)


@pytest.mark.parametrize("options", [{"two_experts": True}, {"image_to_video": True}], ids=["two experts", "i2v"])
def test_other_wan_pipelines(options):
    pipe = tiny_wan_pipeline(**options)
    more = {"image": torch.rand(1, 3, 96, 160)} if "image_to_video" in options else {"steps": 6}
    dense = video(pipe, **more)
    fastdiff.apply(pipe, NARROW, dense_steps=1)
    assert not torch.allclose(video(pipe, **more), dense, atol=1e-4)
    assert len(fastdiff.summary(pipe).models) == (2 if "two_experts" in options else 1)
    fastdiff.remove(pipe)
    assert torch.equal(video(pipe, **more), dense)


def test_every_size_in_one_pipeline(pipe):
    fastdiff.apply(pipe, NARROW)
    for size in ({"height": 48, "width": 80}, {"height": 80, "width": 112, "num_frames": 17}, {"num_frames": 1}):
        assert video(pipe, steps=1, **size).isfinite().all()
    assert len(fastdiff.summary(pipe).models[0].grids) == 3


def test_apply_twice_replaces_and_says_so(pipe, caplog):
    dense = video(pipe)
    fastdiff.apply(pipe, WIDE)
    with caplog.at_level(logging.WARNING, logger="fastdiff"):
        fastdiff.apply(pipe, NARROW, dense_layers=1)
    assert "replaced" in caplog.text
    assert fastdiff.summary(pipe).models[0].config == NARROW.to_dict()
    once = video(pipe)
    fastdiff.remove(pipe)
    fastdiff.apply(pipe, NARROW, dense_layers=1)
    assert torch.equal(video(pipe), once)
    fastdiff.remove(pipe)
    assert torch.equal(video(pipe), dense)


def test_a_failing_apply_changes_nothing(pipe):
    fastdiff.apply(pipe, NARROW)
    before = dict(pipe.transformer.attn_processors)
    for arguments in ({"dense_layers": 3}, {"dense_steps": -1}, {"backend": "cuda"}):
        with pytest.raises(InvalidInputError):
            fastdiff.apply(pipe, WIDE, **arguments)
    with pytest.raises(InvalidInputError):
        fastdiff.apply(pipe, {"method": "magic"})
    assert pipe.transformer.attn_processors == before
    assert fastdiff.summary(pipe).models[0].config == NARROW.to_dict()


def test_two_pipelines_with_their_own_configs():
    one, other = tiny_wan_pipeline(seed=1), tiny_wan_pipeline(seed=1)
    dense = video(one)
    fastdiff.apply(one, NARROW)
    sparse = video(one)
    fastdiff.apply(other, fastdiff.RadialConfig(decay_factor=0.5, near_width=0.3, block_size=32), dense_steps=2)
    video(other)
    assert torch.equal(video(one), sparse)
    fastdiff.remove(one)
    assert torch.equal(video(one), dense)
    assert fastdiff.summary(other).models[0].config is not None


def test_pipelines_that_share_a_model_share_a_config(pipe):
    other = type(pipe)(**pipe.components)
    fastdiff.apply(pipe, NARROW)
    with pytest.raises(InvalidInputError, match="fastdiff.remove first"):
        fastdiff.apply(other, WIDE)
    fastdiff.apply(other, NARROW)
    assert find(pipe.transformer).steps.pipes() == [pipe, other]
    fastdiff.apply(other, NARROW)
    assert torch.equal(video(pipe), video(other))
    for one in (pipe, other):
        with pytest.raises(InvalidInputError, match="fastdiff.remove first"):
            fastdiff.apply(one, NARROW, dense_steps=1)
    fastdiff.remove(other)
    assert find(pipe.transformer) is None


def test_a_model_copied_alone_is_no_longer_the_pipelines(pipe):
    fastdiff.apply(pipe, NARROW)
    parts = pipe.components | {"transformer": copy.deepcopy(pipe.transformer), "scheduler": copy.copy(pipe.scheduler)}
    other = fastdiff.apply(type(pipe)(**parts), WIDE, dense_steps=1)
    assert find(pipe.transformer).settings.config == NARROW
    assert not torch.equal(video(other), video(pipe))


def test_processors_that_were_put_back_are_undone_too(pipe):
    dense = video(pipe)
    fastdiff.apply(pipe, NARROW)
    found = dict(pipe.transformer.attn_processors)
    pipe.transformer.set_attn_processor(WanAttnProcessor())
    assert torch.equal(video(pipe), dense)
    pipe.transformer.set_attn_processor(found)
    with pytest.raises(InvalidInputError, match="call fastdiff.apply"):
        video(pipe)
    fastdiff.remove(pipe)
    assert torch.equal(video(pipe), dense)
    assert {type(one) for one in pipe.transformer.attn_processors.values()} == {WanAttnProcessor}


def test_some_that_were_put_back_go_on(pipe):
    fastdiff.apply(pipe, NARROW)
    sparse, module = video(pipe), pipe.transformer.blocks[0].attn1
    ours, module.processor = module.processor, WanAttnProcessor()
    assert not torch.equal(video(pipe), sparse)
    video(pipe, height=64)
    module.processor = ours
    video(pipe, height=64)
    assert torch.equal(video(pipe), sparse)
    fastdiff.remove(pipe)
    assert type(module.processor) is WanAttnProcessor


def test_a_run_without_a_sparse_step_says_so(pipe, caplog):
    fastdiff.apply(pipe, NARROW, dense_steps=3)
    with caplog.at_level(logging.WARNING, logger="fastdiff"):
        video(pipe, steps=4)
        assert "stays dense" not in caplog.text
        video(pipe, steps=3)
        video(pipe, steps=3)
    assert caplog.text.count("WanTransformer3DModel stays dense in every step of this run of 3") == 1


def test_methods_that_change_with_the_step_say_where_it_is_unknown(pipe, caplog):
    fastdiff.apply(pipe, fastdiff.RulesConfig([fastdiff.Rule(NARROW, steps=(0.5, 1.0))]))
    twin = pickle.loads(pickle.dumps(pipe))
    with caplog.at_level(logging.WARNING, logger="fastdiff"):
        video(pipe)
        assert "outside a denoising run" not in caplog.text
        video(twin)
    assert "outside a denoising run" in caplog.text


def test_what_is_learned_can_be_trained_whatever_mode_it_was_applied_in(model):
    with torch.inference_mode():
        fastdiff.apply(model, fastdiff.ClearConfig(2, pool_factor=2))
    out = model(**model_inputs(frames=3, height=12, width=20))[0]
    out.sum().backward()
    assert find(model).layers[0].parameters.weight.grad is not None


@pytest.mark.parametrize("given", [{"grid": 5}, {"grid": (3, 8, 8)}, {"steps": 0}, {"steps": 1.5}, {"steps": True}])
def test_summary_refuses_what_is_no_grid_and_no_number_of_steps(pipe, given):
    (name,) = given
    with pytest.raises(InvalidInputError, match=f"{name} is"):
        fastdiff.summary(fastdiff.apply(pipe, NARROW), **given)


def test_after_the_first_pipeline_is_gone_another_may_apply():
    pipe = fastdiff.apply(tiny_wan_pipeline(), NARROW)
    other = type(pipe)(**pipe.components)
    del pipe
    gc.collect()
    fastdiff.apply(other, WIDE)
    assert fastdiff.summary(other).models[0].config == WIDE.to_dict()


def test_a_schedule_says_more_than_the_first_steps(pipe):
    dense = video(pipe, steps=5)
    fastdiff.apply(pipe, NARROW, schedule=fastdiff.DenseSchedule(0.4, last_steps=2, every=2))
    assert torch.equal(video(pipe, steps=5), dense), "0 and 1, 3 and 4, and 2"
    fastdiff.apply(pipe, NARROW, schedule=fastdiff.DenseSchedule(last_steps=2, every=2))
    assert not torch.allclose(video(pipe, steps=5), dense, atol=1e-4)
    assert fastdiff.summary(pipe).models[0].schedule["dense_every"] == 2


@pytest.mark.parametrize(
    "given",
    [{"schedule": fastdiff.DenseSchedule(1), "dense_steps": 1}, {"schedule": 3}],
    ids=["twice", "a number"],
)
def test_what_stays_dense_is_said_once(pipe, given):
    with pytest.raises(InvalidInputError, match="give a DenseSchedule alone"):
        fastdiff.apply(pipe, NARROW, **given)


def test_a_bare_model_takes_no_dense_steps(model):
    with pytest.raises(InvalidInputError, match="no scheduler to tell the step"):
        fastdiff.apply(model, NARROW, dense_steps=1)
    fastdiff.apply(model, NARROW, dense_steps=0)


@pytest.mark.parametrize("form", ["dict", "json", "file"])
def test_forms_of_the_config(model, form, tmp_path):
    config = {"dict": NARROW.to_dict(), "json": NARROW.to_json(), "file": tmp_path / "config.json"}[form]
    (tmp_path / "config.json").write_text(NARROW.to_json())
    fastdiff.apply(model, config)
    assert fastdiff.summary(model).models[0].config == NARROW.to_dict()


@pytest.mark.parametrize("backend", ["triton", "fa4"])
def test_a_backend_that_is_not_installed_is_refused_at_once(backend, monkeypatch):
    monkeypatch.setattr(sys.modules["fastdiff_kernels.attention"], "_HAS_TRITON", False)
    monkeypatch.setattr("fastdiff_kernels.export.fa4_version", lambda: None)
    model = tiny_wan(layers=1)
    with pytest.raises(MissingDependencyError, match="pip install"):
        fastdiff.apply(model, fastdiff.RadialConfig(block_size=32), backend=backend)
    assert find(model) is None


def test_unknown_models_are_refused():
    with pytest.raises(UnsupportedError, match="Linear is not described"):
        fastdiff.apply(torch.nn.Linear(1, 1), NARROW)
    with pytest.raises(InvalidInputError, match="holds no model"):
        fastdiff.apply("pipe", NARROW)


def test_backends_agree(model):
    found = []
    for backend in ("torch", "reference"):
        fastdiff.apply(model, NARROW, backend=backend)
        found.append(forward(model))
    torch.testing.assert_close(*found, atol=2e-6, rtol=1e-5)


@pytest.mark.together("gradient checkpointing, LoRA training")
def test_lora_gradients_reach_the_adapters(model):
    peft = pytest.importorskip("peft")
    fastdiff.apply(model, NARROW)
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], lora_alpha=2))
    model.enable_gradient_checkpointing()
    model.train()
    model(**model_inputs(frames=5, height=12, width=20))[0].square().mean().backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in trained)


def test_a_plan_made_in_inference_mode_serves_training(model):
    fastdiff.apply(model, fastdiff.RadialConfig(decay_factor=0.123, block_size=32))
    with torch.inference_mode():
        model(**model_inputs(frames=5, height=12, width=20))
    model(**model_inputs(frames=5, height=12, width=20))[0].square().mean().backward()
    assert model.blocks[0].attn1.to_q.weight.grad.isfinite().all()


@pytest.mark.together("several pipelines in threads")
def test_two_models_in_two_threads():
    torch.manual_seed(0)
    models = [fastdiff.apply(tiny_wan(), config) for config in (NARROW, WIDE)]
    alone = [forward(model) for model in models]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda index: forward(models[index % 2]), range(16)))
    assert all(torch.equal(found, alone[index % 2]) for index, found in enumerate(together))


def test_summary_before_and_after_a_run(pipe):
    assert "not patched" in str(fastdiff.summary(pipe))
    fastdiff.apply(pipe, NARROW, dense_steps=1, dense_layers=1)
    model = fastdiff.summary(pipe).models[0]
    assert model.mean_density is None
    assert "known after the first forward" in str(model)
    assert model.runs_on == "torch"

    planned = fastdiff.summary(pipe, grid="3x6x10", steps=4).models[0]
    video(pipe, steps=4)
    model = fastdiff.summary(pipe).models[0]
    assert model == fastdiff.summary(pipe, grid="3x6x10").models[0]
    assert (planned.mean_density, planned.layers) == (model.mean_density, model.layers)
    first, second = model.layers
    assert (first.dense, first.density, first.why) == (True, 1.0, "named by dense_layers")
    assert not second.dense
    assert second.density < 1
    assert model.mean_density == pytest.approx(1 / 4 + 3 / 4 * (1 + second.density) / 2)
    assert model.grids == ("3x6x10",)
    text = str(fastdiff.summary(pipe))
    for part in (
        '"method": "radial"',
        '"dense_steps": 1',
        "blocks.0.attn1: dense",
        "blocks.1.attn1: sparse",
        "over layers",
    ):
        assert part in text
    json.dumps(fastdiff.summary(pipe).to_dict())


def test_summary_of_a_bad_grid(pipe):
    with pytest.raises(InvalidInputError, match="grid is"):
        fastdiff.summary(pipe, grid="large")
