"""diffusers' own door: the dict of `fastdiff.processors`, and the single `RadialAttnProcessor`."""

import copy
import gc
import inspect

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from tiny_models import compile_as, forward, model_inputs, tiny_wan, tiny_wan_pipeline, video
from torch.nn.modules import module as torch_module

import fastdiff
from fastdiff_kernels import InvalidInputError
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

NARROW = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=32)
WIDE = fastdiff.RadialConfig(block_size=32)


@pytest.fixture
def pipe():
    return tiny_wan_pipeline()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_wan()


def applied(pipe, steps=3, **options) -> torch.Tensor:
    """The video of the same pipeline under `apply`."""
    found = video(fastdiff.apply(pipe, NARROW, **options), steps=steps)
    fastdiff.remove(pipe)
    return found


class TestDict:
    def test_it_equals_apply(self, pipe):
        expected, dense = applied(pipe, dense_steps=1, dense_layers=[1]), video(pipe)
        originals = dict(pipe.transformer.attn_processors)
        ours = fastdiff.processors(pipe, NARROW, dense_steps=1, dense_layers=[1])
        assert list(ours) == list(originals)
        assert {name for name in ours if ours[name] is not originals[name]} == {
            "blocks.0.attn1.processor",
            "blocks.1.attn1.processor",
        }
        assert torch.equal(video(pipe), dense), "nothing may change before the dict is set"
        pipe.transformer.set_attn_processor(ours)
        assert torch.equal(video(pipe), expected)
        assert not fastdiff.summary(pipe).models[0].layers[0].dense
        fastdiff.remove(pipe)
        assert torch.equal(video(pipe), dense)
        assert all(pipe.transformer.attn_processors[name] is original for name, original in originals.items())
        assert not pipe.transformer._forward_pre_hooks

    def test_a_schedule(self, pipe):
        schedule = fastdiff.DenseSchedule(last_steps=1)
        expected = applied(pipe, schedule=schedule)
        pipe.transformer.set_attn_processor(fastdiff.processors(pipe, NARROW, schedule=schedule))
        assert torch.equal(video(pipe), expected)

    def test_each_expert_needs_its_own(self):
        pipe = tiny_wan_pipeline(two_experts=True)
        expected = applied(pipe, steps=6, dense_steps=1)
        with pytest.raises(InvalidInputError, match="transformer, transformer_2"):
            fastdiff.processors(pipe, NARROW)
        for name in ("transformer", "transformer_2"):
            ours = fastdiff.processors(pipe, NARROW, dense_steps=1, component=name)
            getattr(pipe, name).set_attn_processor(ours)
        assert torch.equal(video(pipe, steps=6), expected)

    def test_a_dict_on_another_model_raises(self, pipe, model):
        model.set_attn_processor(fastdiff.processors(pipe, NARROW))
        with pytest.raises(InvalidInputError, match="belongs to no patched model"):
            forward(model)

    def test_an_outdated_dict_raises(self, model):
        old = fastdiff.processors(model, NARROW)
        fastdiff.processors(model, WIDE)
        model.set_attn_processor(old)
        with pytest.raises(InvalidInputError, match="belongs to no patched model"):
            forward(model)

    def test_after_apply_the_originals_are_kept(self, model):
        originals = dict(model.attn_processors)
        fastdiff.apply(model, WIDE)
        model.set_attn_processor(fastdiff.processors(model, NARROW))
        forward(model)
        fastdiff.apply(model, WIDE)
        fastdiff.remove(model)
        assert all(model.attn_processors[name] is original for name, original in originals.items())

    def test_dense_steps_need_a_pipeline(self, model):
        with pytest.raises(InvalidInputError, match="no scheduler"):
            fastdiff.processors(model, NARROW, dense_steps=1)


def test_processors_of_another_model_are_refused_after_that_one_has_run(pipe):
    other = tiny_wan_pipeline()
    made = fastdiff.processors(pipe, NARROW)
    pipe.transformer.set_attn_processor(dict(made))
    expected = video(pipe)
    other.transformer.set_attn_processor(dict(made))
    with pytest.raises(InvalidInputError, match="made for a different model"):
        video(other)
    fastdiff.remove(other)
    assert torch.equal(video(pipe), expected)


class TestMarker:
    def test_the_global_hooks_live_as_long_as_a_marker(self):
        gc.collect()
        markers = [fastdiff.RadialAttnProcessor(), fastdiff.RadialAttnProcessor()]
        for left in (1, 0):
            markers.pop()
            torch.nn.Identity()(0)
            assert bool(torch_module._global_forward_pre_hooks) == bool(left)

    def test_it_equals_apply_and_remove_leaves_stock(self, pipe):
        expected, dense = applied(pipe), video(pipe)
        classes = {name: type(processor) for name, processor in pipe.transformer.attn_processors.items()}
        pipe.transformer.set_attn_processor(fastdiff.RadialAttnProcessor(config=NARROW))
        assert torch.equal(video(pipe), expected)
        assert torch.equal(video(pipe), expected)
        fastdiff.remove(pipe)
        assert torch.equal(video(pipe), dense)
        assert {name: type(processor) for name, processor in pipe.transformer.attn_processors.items()} == classes

    def test_fields_positional_arguments_and_backend(self, model):
        fastdiff.apply(model, NARROW, dense_layers=1)
        expected = forward(model)
        fastdiff.remove(model)
        marker = fastdiff.RadialAttnProcessor(
            decay_factor=0.0, near_width=0.0, sink=False, block_size=32, dense_layers=1, backend="torch"
        )
        model.set_attn_processor(marker)
        del marker
        inputs = model_inputs(frames=5, height=12, width=20)
        with torch.no_grad():
            out = model(*(inputs[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")))
        assert torch.equal(out.sample, expected)

    def test_the_chosen_attention_backend_survives(self, model):
        model.set_attn_processor(fastdiff.RadialAttnProcessor(NARROW))
        model.blocks[0].attn1.processor._attention_backend = "_native_math"
        forward(model)
        assert model.blocks[0].attn2.processor._attention_backend == "_native_math"

    def test_one_object_for_both_experts(self):
        pipe = tiny_wan_pipeline(two_experts=True)
        expected = applied(pipe, steps=6)
        marker = fastdiff.RadialAttnProcessor(NARROW)
        pipe.transformer.set_attn_processor(marker)
        pipe.transformer_2.set_attn_processor(marker)
        assert torch.equal(video(pipe, steps=6), expected)
        torch.manual_seed(3)
        other = tiny_wan()
        other.set_attn_processor(marker)
        forward(other)
        assert find(other) is not None

    @pytest.mark.parametrize("attention", ["attn1", "attn2"])
    def test_it_stands_for_no_single_module(self, model, attention):
        getattr(model.blocks[0], attention).set_processor(fastdiff.RadialAttnProcessor(NARROW))
        with pytest.raises(InvalidInputError, match=r"of the 2 self-attention modules"):
            forward(model)
        assert find(model) is None

    def test_apply_after_the_marker_and_the_marker_after_apply(self, model):
        fastdiff.apply(model, NARROW)
        narrow = forward(model)
        fastdiff.apply(model, WIDE)
        model.set_attn_processor(fastdiff.RadialAttnProcessor(NARROW))
        assert torch.equal(forward(model), narrow)
        assert len(model._forward_pre_hooks) == 1

    def test_apply_and_remove_before_the_first_forward(self, model):
        dense = forward(model)
        model.set_attn_processor(fastdiff.RadialAttnProcessor(NARROW))
        assert "marked" in str(fastdiff.summary(model))
        fastdiff.remove(model)
        assert torch.equal(forward(model), dense)
        model.set_attn_processor(fastdiff.RadialAttnProcessor(NARROW))
        fastdiff.apply(model, WIDE)
        assert fastdiff.summary(model).models[0].config == WIDE.to_dict()
        fastdiff.remove(model)
        assert torch.equal(forward(model), dense)

    def test_copies_of_a_marked_model(self, model):
        fastdiff.apply(model, NARROW)
        expected = forward(model)
        fastdiff.remove(model)
        model.set_attn_processor(fastdiff.RadialAttnProcessor(NARROW))
        twin = copy.deepcopy(model)
        forward(model)
        assert torch.equal(forward(twin), expected)

    def test_only_marked_modules_change(self, model):
        own = WanAttnProcessor()
        model.set_attn_processor(fastdiff.RadialAttnProcessor(NARROW))
        model.blocks[1].attn2.set_processor(own)
        forward(model)
        assert model.blocks[1].attn2.processor is own

    @pytest.mark.parametrize("way", ["torch.compile", "model.compile", "blocks"])
    @pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
    def test_compiled(self, pipe, way, kept):
        torch._dynamo.reset()
        expected = applied(pipe)
        marker = fastdiff.RadialAttnProcessor(NARROW)
        pipe.transformer.set_attn_processor(marker)
        if not kept:
            del marker
        compile_as(pipe, way, "eager")
        torch.testing.assert_close(video(pipe), expected, atol=1e-4, rtol=1e-3)
        torch._dynamo.reset()

    def test_a_model_that_fails_stays_marked(self, model):
        marker = fastdiff.RadialAttnProcessor(NARROW, dense_layers=5)
        model.set_attn_processor(marker)
        for _ in range(2):
            with pytest.raises(InvalidInputError, match="this model has 2 layers"):
                forward(model)
        assert all(processor is marker for processor in model.attn_processors.values())

    def test_a_failing_call_leaves_the_marks(self, pipe):
        marker = fastdiff.RadialAttnProcessor(NARROW)
        pipe.transformer.set_attn_processor(marker)
        for call in (fastdiff.apply, fastdiff.processors):
            with pytest.raises(InvalidInputError, match="this model has 2 layers"):
                call(pipe, WIDE, dense_layers=5)
            assert all(processor is marker for processor in pipe.transformer.attn_processors.values())

    def test_outside_a_supported_model_it_raises(self, model):
        attention = model.blocks[0].attn1
        attention.set_processor(fastdiff.RadialAttnProcessor(NARROW))
        with pytest.raises(InvalidInputError, match="outside a supported model"):
            attention(torch.zeros(1, 4, 32))

    def test_refused_arguments(self):
        with pytest.raises(InvalidInputError, match="knows no scheduler"):
            fastdiff.RadialAttnProcessor(NARROW, dense_steps=4)
        with pytest.raises(InvalidInputError, match="one or the other"):
            fastdiff.RadialAttnProcessor(NARROW, decay_factor=0.5)
        with pytest.raises(InvalidInputError, match="width"):
            fastdiff.RadialAttnProcessor(width=0.5)

    def test_its_signature_names_what_modules_filter_by(self):
        stock = set(inspect.signature(WanAttnProcessor.__call__).parameters)
        assert stock <= set(inspect.signature(fastdiff.RadialAttnProcessor.__call__).parameters)
