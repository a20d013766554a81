"""What planners get besides query, key and value: queries before RoPE, its table, block inputs, seeds, parameters."""

import concurrent.futures
import copy
import pickle

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from fake_planner import FakePlanner, UsingPlanner, Watching, put_on, rotated
from tiny_models import model_inputs, tiny_wan
from tiny_picture_models import (
    flux_inputs,
    picture,
    tiny_flux,
    tiny_sd_pipeline,
    tiny_unet,
    unet_inputs,
)

from fastdiff_kernels import InvalidInputError, UnsupportedError
from fastdiff_patches.attachment import find
from fastdiff_patches.planner import NEEDS

torch.set_num_threads(1)

MODELS = {
    "wan": (tiny_wan, model_inputs),
    "flux": (lambda: tiny_flux(layers=2, single_layers=2), flux_inputs),
    "unet": (tiny_unet, unet_inputs),
}
SUPPLIED = {"wan": frozenset(NEEDS), "flux": frozenset(NEEDS) - {"block_input"}, "unet": frozenset(NEEDS)}


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def hooks_of(model) -> list:
    return [
        hook for part in model.modules() for hook in (*part._forward_hooks.items(), *part._forward_pre_hooks.items())
    ]


@pytest.mark.parametrize("name", MODELS)
def test_the_query_before_rope_becomes_the_query(name):
    """Also proves the order of text and picture in it, and the form of the table."""
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build()
    for part in model.modules():
        if isinstance(part, torch.nn.RMSNorm):
            torch.nn.init.normal_(part.weight)
    planner = put_on(model, Watching(needs=frozenset({"pre_rope_query", "rotary"})))
    run(model, inputs(batch=2))
    assert len(planner.extras) == sum(layer.active for layer in find(model).layers) > 1
    for extras in planner.extras:
        found = extras.inputs
        assert set(found) == {"pre_rope_query", "rotary", "query"}
        if name == "unet":
            assert found["rotary"] is None
            assert torch.equal(found["pre_rope_query"], found["query"])
            continue
        tokens, head_dim = found["query"].shape[1::2]
        assert all(table.shape == (tokens, head_dim) for table in found["rotary"])
        assert not torch.allclose(found["pre_rope_query"], found["query"], atol=1e-2)
        torch.testing.assert_close(rotated(found["pre_rope_query"], *found["rotary"]), found["query"])


@pytest.mark.parametrize("end", ["remove", "a dense forward"])
def test_the_input_of_a_block_that_skips_its_attention_is_let_go(end, monkeypatch):
    model = tiny_wan(layers=1)
    put_on(model, Watching(needs=frozenset({"block_input"})))
    attached, attention = find(model), model.blocks[0].attn1
    (layer,) = attached.layers
    monkeypatch.setattr(attention, "forward", lambda hidden, *args, **kwargs: hidden)
    run(model, model_inputs())
    assert layer.block_input is not None
    attached.remove() if end == "remove" else layer.prepare(None)
    assert layer.block_input is None


def test_a_processor_that_skips_the_norm_is_refused():
    class Skips(FluxAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
            query = hidden_states.unflatten(-1, (2, -1))
            return dispatch_attention_fn(query, query, query).flatten(2)

    model = tiny_flux(layers=0)
    model.single_transformer_blocks[0].attn.set_processor(Skips())
    put_on(model, FakePlanner(needs=frozenset({"pre_rope_query"})))
    with pytest.raises(UnsupportedError, match="gave that of 0 of .* norm_added_q, norm_q"):
        run(model, flux_inputs())


@pytest.mark.parametrize("name", ["wan", "unet"])
def test_the_block_input(name):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build()
    planner = put_on(model, FakePlanner(needs=frozenset({"block_input"})))
    layers = [layer.name for layer in find(model).layers]
    taken = []
    for layer in layers:
        block = model.get_submodule(layer.rpartition(".")[0])
        block.register_forward_pre_hook(
            lambda module, args, kwargs: taken.append((module.attn1, args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
    run(model, inputs(batch=2))
    taken = [(attention, value) for attention, value in taken if attention.processor._fastdiff.active]
    assert len(planner.extras) == len(taken) > 1
    for extras, (attention, value) in zip(planner.extras, taken, strict=True):
        assert extras.inputs["attention"] is attention
        assert extras.inputs["block_input"] is value
        assert extras.inputs["entered"].shape == value.shape, "what enter left for attend"
    assert all(layer.block_input is None for layer in find(model).layers)


def test_enter_and_leave_stand_around_the_module():
    class Around(FakePlanner):
        def enter(self, hidden, plan, extras):
            extras.inputs["mark"] = hidden
            return hidden * 0

        def leave(self, out, plan, extras):
            return out + extras.inputs["mark"]

    torch.manual_seed(0)
    model = tiny_unet()
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    put_on(model, Around(needs=frozenset({"block_input"})), dense_layers=[1, 2, 3, 4, 5])
    seen = []
    block.norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    block.attn1.register_forward_hook(lambda module, args, out: seen.append(out))
    run(model, unet_inputs())
    before, after = seen
    torch.testing.assert_close(after, before + block.attn1.to_out[0].bias)


def test_an_attention_module_alone_has_no_block_input():
    model = tiny_unet()
    put_on(model, FakePlanner(needs=frozenset({"block_input"})))
    run(model, unet_inputs())
    with pytest.raises(InvalidInputError, match="attn1 was called outside its transformer block"):
        model.down_blocks[0].attentions[0].transformer_blocks[0].attn1(torch.zeros(1, 117, 16))


@pytest.mark.parametrize("name", MODELS)
class TestHooks:
    def test_remove_takes_all_off(self, name):
        torch.manual_seed(0)
        build, inputs = MODELS[name]
        model = build()
        dense, names = run(model, inputs()), {name: set(vars(part)) for name, part in model.named_modules()}
        put_on(model, UsingPlanner(needs=SUPPLIED[name], learned=True))
        assert not torch.allclose(run(model, inputs()), dense, atol=1e-4)
        assert len(hooks_of(model)) > 2
        find(model).remove()
        assert not hooks_of(model)
        assert {name: set(vars(part)) for name, part in model.named_modules()} == names
        assert torch.equal(run(model, inputs()), dense)

    def test_a_second_planner_takes_the_hooks_of_the_first_along(self, name):
        build, inputs = MODELS[name]
        model = build()
        put_on(model, UsingPlanner(needs=SUPPLIED[name]))
        put_on(model, FakePlanner())
        assert len(hooks_of(model)) == 1

    def test_copies(self, name):
        torch.manual_seed(0)
        build, inputs = MODELS[name]
        model = build()
        dense = run(model, inputs())
        put_on(model, UsingPlanner(needs=SUPPLIED[name], learned=True, keep_extras=False))
        sparse = run(model, inputs())
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        find(model).remove()
        assert torch.equal(run(model, inputs()), dense)
        for twin in twins:
            assert torch.equal(run(twin, inputs()), sparse)
            find(twin).remove()
            assert not hooks_of(twin)
            assert torch.equal(run(twin, inputs()), dense)

    def test_checkpointing_gives_the_same_gradients(self, name):
        torch.manual_seed(0)
        build, inputs = MODELS[name]
        model = build().train()
        put_on(model, UsingPlanner(needs=SUPPLIED[name], learned=True))
        found = []
        for switch in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
            switch()
            model.zero_grad()
            loss = model(**inputs())[0].square().mean()
            # Checkpointed blocks run again where backward runs, on GPUs in a thread of its own.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(loss.backward).result()
            found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert len(found[0]) == len(found[1])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=0, rtol=0)
        learned = model.get_submodule(find(model).layers[0].name).fastdiff.weight
        assert learned.grad.abs().sum() > 0


@pytest.mark.parametrize("name", MODELS)
def test_a_planner_may_leave_layers_and_steps_dense(name):
    torch.manual_seed(0)
    build, inputs = MODELS[name]
    model = build()
    dense = run(model, inputs())
    planner = put_on(model, FakePlanner(needs=SUPPLIED[name], sparse=lambda layer, step: layer == 1))
    assert not torch.equal(run(model, inputs()), dense)
    assert len(planner.extras) == 1
    put_on(model, FakePlanner(needs=SUPPLIED[name], sparse=lambda layer, step: False))
    assert torch.equal(run(model, inputs()), dense)


def test_a_planner_may_leave_steps_dense():
    pipe = tiny_sd_pipeline()
    dense = picture(pipe)
    planner = put_on(pipe, FakePlanner(sparse=lambda layer, step: step == 1))
    assert not torch.equal(picture(pipe), dense)
    assert len(planner.extras) == 6
    assert {asked["step"] for asked in planner.asked} == {0, 1, 2}
    assert {asked["steps"] for asked in planner.asked} == {3}
    put_on(pipe, FakePlanner(sparse=lambda layer, step: step == 7))
    assert torch.equal(picture(pipe), dense)


class TestParameters:
    def test_they_take_the_dtype_of_their_module(self):
        model = tiny_wan().to(torch.bfloat16)
        put_on(model, FakePlanner(learned=True))
        learned = model.blocks[0].attn1.fastdiff
        assert learned.weight.dtype == torch.bfloat16
        model.to(torch.float64)
        assert learned.weight.dtype == torch.float64

    def test_storage_types_are_none_to_compute_in(self):
        model = tiny_wan()
        for projection in (model.blocks[0].attn1.to_q, model.blocks[0].attn1.to_k):
            projection.to(torch.float8_e4m3fn)
        model.blocks[1].attn1.to(torch.float8_e4m3fn)
        put_on(model, FakePlanner(learned=True))
        assert model.blocks[0].attn1.fastdiff.weight.dtype == torch.float32
        assert model.blocks[1].attn1.fastdiff.weight.dtype == torch.float32

    def test_a_module_on_the_meta_device_keeps_them(self):
        model = tiny_wan()
        model.blocks[0].attn1.to("meta")
        put_on(model, FakePlanner(learned=True))
        assert model.blocks[0].attn1.fastdiff.weight.device.type == "cpu"

    def test_they_are_saved_and_removed(self):
        model = tiny_unet()
        names = set(model.state_dict())
        put_on(model, FakePlanner(learned=True))
        added = set(model.state_dict()) - names
        assert "mid_block.attentions.0.transformer_blocks.0.attn1.fastdiff.weight" in added
        assert len(added) == 2 * 7
        find(model).remove()
        assert set(model.state_dict()) == names


def test_flux_has_no_block_input():
    with pytest.raises(UnsupportedError, match="needs block_input, which family 'flux' does not supply"):
        put_on(tiny_flux(), FakePlanner(needs=frozenset(NEEDS)))


def test_the_planner_checks_the_model_before_anything_changes():
    class Refuses(FakePlanner):
        def check_model(self, model, layers):
            super().check_model(model, layers)
            raise InvalidInputError("not this one")

    model, planner = tiny_wan(), Refuses()
    with pytest.raises(InvalidInputError, match="not this one"):
        put_on(model, planner)
    assert planner.checked == [(model, ["blocks.0.attn1", "blocks.1.attn1"])]
    assert find(model) is None
    assert not hooks_of(model)


def test_an_ip_adapter_attends_to_its_own_keys():
    """Flux adapters call attention a second time in the same processor; that call is not ours."""
    torch.manual_seed(0)
    model = tiny_flux(single_layers=0)
    model.transformer_blocks[0].attn.set_processor(FluxIPAdapterAttnProcessor(32, 32, scale=0.5))
    inputs = flux_inputs() | {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 4, 32)]}}
    dense = run(model, inputs)
    planner = put_on(model, FakePlanner(window=None, needs=SUPPLIED["flux"]))
    torch.testing.assert_close(run(model, inputs), dense)
    assert len(planner.extras) == 1
