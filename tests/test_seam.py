"""The seam and the attachment on a tiny Wan, with a fake planner: pass-through, effect, undo, compile, copies."""

import copy
import logging
import pickle

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from fake_planner import FakePlanner
from tiny_models import model_inputs, tiny_wan

from fastdiff.schedule import DenseSchedule
from fastdiff_kernels import InvalidInputError, UnsupportedError
from fastdiff_patches import seam
from fastdiff_patches.attachment import Attachment, find
from fastdiff_patches.families import FAMILIES
from fastdiff_patches.processor import Layer, _key_mask
from fastdiff_patches.steps import StepReader

torch.set_num_threads(1)

WAN = FAMILIES["WanTransformer3DModel"]


def put_on(model, planner=None, dense_layers=0) -> Attachment:
    planner = planner or FakePlanner()
    attached = Attachment(model, planner, DenseSchedule(0, dense_layers), StepReader())
    attached.install(model)
    return attached


def run(model, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**model_inputs(**more))[0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_wan()


@pytest.mark.parametrize("more", [{}, {"batch": 2}, {"frames": 1}, {"height": 2, "width": 2}], ids=str)
def test_full_density_equals_the_untouched_model(model, more):
    before = run(model, **more)
    put_on(model, FakePlanner(window=None))
    torch.testing.assert_close(run(model, **more), before, atol=1e-6, rtol=1e-5)


def test_all_layers_dense_is_bit_exact(model):
    before = run(model)
    put_on(model, dense_layers=2)
    assert torch.equal(run(model), before)


def test_it_has_an_effect_and_remove_is_exact(model):
    before, names = run(model), {name: set(vars(part)) for name, part in model.named_modules()}
    originals = dict(model.attn_processors)
    attached = put_on(model)
    sparse = run(model)
    assert not torch.allclose(sparse, before, atol=1e-4)
    attached.remove()
    assert torch.equal(run(model), before)
    assert all(model.attn_processors[name] is original for name, original in originals.items())
    assert {name: set(vars(part)) for name, part in model.named_modules()} == names
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert all(not vars(processor) for processor in originals.values())
    assert find(model) is None


def test_cross_attention_is_untouched(model):
    originals = dict(model.attn_processors)
    put_on(model)
    changed = {name for name, processor in model.attn_processors.items() if processor is not originals[name]}
    assert changed == {"blocks.0.attn1.processor", "blocks.1.attn1.processor"}


def test_shared_processor_objects_come_back_shared(model):
    shared = WanAttnProcessor()
    model.set_attn_processor(shared)
    attached = put_on(model)
    run(model)
    assert model.blocks[0].attn1.processor is not model.blocks[1].attn1.processor
    attached.remove()
    assert all(processor is shared for processor in model.attn_processors.values())


def test_what_the_user_sets_meanwhile_survives(model):
    attached = put_on(model)
    model.blocks[0].attn1.processor._attention_backend = "_native_math"
    attached.remove()
    assert model.blocks[0].attn1.processor._attention_backend == "_native_math"
    assert "_fastdiff" not in vars(model.blocks[0].attn1.processor)


def test_scale_heads_and_layers_reach_the_planner(model):
    planner = FakePlanner()
    put_on(model, planner)
    run(model)
    assert [asked["layer"] for asked in planner.asked] == [0, 1]
    assert planner.asked[0]["heads"] == 2
    assert str(planner.asked[0]["layout"].grid) == "3x3x5"
    assert len(planner.extras) == 2


def test_two_models_do_not_touch_each_other(model):
    torch.manual_seed(0)
    other = tiny_wan()
    dense = run(model)
    put_on(model, FakePlanner(window=3))
    put_on(other, FakePlanner(window=20))
    narrow, wide = run(model), run(other)
    assert not torch.allclose(narrow, wide, atol=1e-4)
    assert torch.equal(run(model), narrow)
    find(other).remove()
    assert torch.equal(run(other), dense)
    assert torch.equal(run(model), narrow)


def test_replacing_keeps_the_stock_processors(model):
    originals = dict(model.attn_processors)
    put_on(model)
    put_on(model, FakePlanner(window=9))
    assert len(model._forward_pre_hooks) == 1
    find(model).remove()
    assert all(model.attn_processors[name] is original for name, original in originals.items())


def test_users_own_processors_are_left_alone(model, caplog):
    before = run(model)
    put_on(model)
    run(model)
    model.blocks[0].attn1.set_processor(WanAttnProcessor())
    with caplog.at_level(logging.WARNING, logger="fastdiff"):
        run(model)
        run(model)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 of the attention processors" in caplog.text
    model.set_attn_processor(WanAttnProcessor())
    assert torch.equal(run(model), before)
    assert find(model) is None
    assert not model._forward_pre_hooks


def test_processors_without_an_attention_call_are_refused(model):
    class Linear:
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            return hidden_states

    originals = dict(model.attn_processors)
    model.blocks[1].attn1.set_processor(Linear())
    with pytest.raises(UnsupportedError, match="Linear calls neither"):
        put_on(model)
    assert model.blocks[0].attn1.processor is originals["blocks.0.attn1.processor"]
    assert find(model) is None


def test_attention_that_goes_past_us_is_told_once(model, caplog):
    class Hidden(WanAttnProcessor):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
            if hidden_states is None:
                torch.nn.functional.scaled_dot_product_attention(None, None, None)
            return WanAttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)

    model.blocks[1].attn1.set_processor(Hidden())
    put_on(model)
    with caplog.at_level(logging.WARNING, logger="fastdiff"):
        run(model)
        run(model)
    assert len(caplog.records) == 1
    assert "blocks.1.attn1" in caplog.text


def test_a_retired_processor_raises(model):
    attached = put_on(model)
    stale = model.blocks[0].attn1.processor
    attached.remove()
    model.blocks[0].attn1.processor = stale
    with pytest.raises(InvalidInputError, match="belongs to no patched model"):
        run(model)
    put_on(model)
    run(model)
    find(model).remove()
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor


def test_class_name_signature_and_type_stay(model):
    import inspect

    put_on(model)
    processor = model.blocks[0].attn1.processor
    assert type(processor).__name__ == "WanAttnProcessor"
    assert isinstance(processor, WanAttnProcessor)
    assert inspect.signature(type(processor).__call__) == inspect.signature(WanAttnProcessor.__call__)


def test_a_processor_built_from_the_class_runs_dense(model):
    before = run(model)
    attached = put_on(model)
    adopted = type(model.blocks[0].attn1.processor)
    attached.remove()
    model.set_attn_processor(adopted())
    assert torch.equal(run(model), before)


@pytest.mark.together("pickling and deepcopy")
def test_deepcopy_is_a_patched_model_of_its_own(model):
    dense = run(model)
    put_on(model)
    sparse = run(model)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), sparse)
    assert find(twin) is not find(model)
    assert find(twin).layers[0] is twin.blocks[0].attn1.processor._fastdiff
    find(model).remove()
    assert torch.equal(run(model), dense)
    assert torch.equal(run(twin), sparse)
    find(twin).remove()
    assert torch.equal(run(twin), dense)
    assert not twin._forward_pre_hooks


@pytest.mark.together("pickling and deepcopy")
def test_pickle_round_trip(model):
    put_on(model)
    sparse = run(model)
    twin = pickle.loads(pickle.dumps(model))
    assert torch.equal(run(twin), sparse)
    find(twin).remove()
    assert not twin._forward_pre_hooks


def test_learned_parameters_sit_on_the_module(model):
    attached = put_on(model, FakePlanner(learned=True))
    assert "blocks.1.attn1.fastdiff.weight" in model.state_dict()
    assert attached.layers[1].parameters is model.blocks[1].attn1.fastdiff
    attached.remove()
    assert not any("fastdiff" in name for name in model.state_dict())


def test_needs_that_no_family_supplies_are_refused(model):
    with pytest.raises(UnsupportedError, match="needs pixels, which family 'wan' does not supply"):
        put_on(model, FakePlanner(needs=frozenset({"pixels", "seed"})))


@pytest.mark.together("gradient checkpointing, LoRA training")
def test_gradients_and_checkpointing(model):
    def gradients(checkpointing):
        model.zero_grad()
        model.train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        else:
            model.disable_gradient_checkpointing()
        model(**model_inputs())[0].square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    put_on(model)
    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, None),
        (torch.ones(2, 5, dtype=torch.bool), (2, 5)),
        (torch.ones(2, 1, 1, 5, dtype=torch.bool), (2, 5)),
        (torch.ones(1, 1, 1, 5, dtype=torch.bool), (2, 5)),
    ],
)
def test_key_masks(mask, expected):
    found = _key_mask(mask, torch.zeros(2, 5, 1, 4))
    assert (found if found is None else tuple(found.shape)) == expected


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 1, 5, 5, dtype=torch.bool), torch.zeros(2, 5), torch.ones(3, 5, dtype=torch.bool), "causal"],
    ids=["square", "float", "batch", "object"],
)
def test_other_masks_are_refused(mask):
    with pytest.raises(UnsupportedError, match="the attention mask is"):
        _key_mask(mask, torch.zeros(2, 5, 1, 4))


def test_what_the_sparse_path_cannot_do_is_refused():
    layer = Layer(0, "attn1", 2, 4, FakePlanner(), "auto", WAN)
    query, key = torch.zeros(1, 5, 2, 4), torch.zeros(1, 5, 1, 4)
    with pytest.raises(UnsupportedError, match="is_causal=True"):
        layer.attend(query, query, query, None, 0.0, True, None, None)
    with pytest.raises(UnsupportedError, match="1 query heads and 2 key heads"):
        layer.attend(key, query, query, None, 0.0, False, None, None)


def test_query_heads_may_share_a_key_head():
    torch.manual_seed(0)
    layer = Layer(0, "attn1", 4, 8, planner := FakePlanner(window=None), "auto", WAN)
    layer.prepare(planner.plan(_line(6), layer=0, step=None, steps=None, heads=4, head_dim=8, device="cpu"), parts=(6,))
    query, key, value = torch.randn(1, 6, 4, 8), torch.randn(1, 6, 2, 8), torch.randn(1, 6, 2, 8)
    out = layer.attend(query, key, value, None, 0.0, False, None, None)
    heads_first = [x.transpose(1, 2) for x in (query, key, value)]
    truth = torch.nn.functional.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, truth)


def test_processors_that_call_sdpa_themselves():
    """CogVideoX calls F.scaled_dot_product_attention with [batch, heads, tokens, head_dim]."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    attention = Attention(query_dim=16, heads=2, dim_head=8, processor=AttnProcessor2_0())
    x = torch.randn(1, 6, 16)
    before = attention(x)
    planner = FakePlanner(window=None)
    layer = Layer(0, "attn1", 2, 8, planner, "auto", WAN)
    plan = planner.plan(_line(6), layer=0, step=None, steps=None, heads=2, head_dim=8, device="cpu")
    attention.processor = seam.adopt(attention.processor, layer)
    layer.prepare(plan, parts=(6,))
    torch.testing.assert_close(attention(x), before)
    assert len(planner.extras) == 1
    layer.prepare(None)
    assert torch.equal(attention(x), before)


def _line(tokens):
    from fastdiff_kernels import Grid, TokenLayout

    return TokenLayout.self_attention(Grid(1, 1, tokens))
