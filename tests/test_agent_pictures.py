"""Agents on Stable Diffusion and Flux pipelines: the AgentSD policy, levels of a UNet, text kept exact."""

import re

import pytest
import torch
import torch.nn.functional as F
from agent_truth import cell_means, truth
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
from fastdiff.methods import AgentConfig
from fastdiff.methods.agent_planner import rotate
from fastdiff_kernels import InvalidInputError, UnsupportedError
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

POOLED = AgentConfig(35)
MATCHED = AgentConfig(35, source="merge")
MERGED = AgentConfig(35, source="merge", merge_ratio=0.4)


def catch(model, name: str) -> list[dict]:
    """Records the calls of one of the planner's methods."""
    calls, planner = [], find(model).planner
    plain = getattr(planner, name)

    def catching(*args):
        out = plain(*args)
        calls.append({"args": args[:-2], "plan": args[-2], **args[-1].inputs, "out": out})
        return out

    setattr(planner, name, catching)
    return calls


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.mark.parametrize(
    ("build", "config"),
    [(tiny_sd_pipeline, POOLED), (tiny_sd_pipeline, MATCHED), (tiny_sd_pipeline, MERGED), (tiny_flux_pipeline, POOLED)],
    ids=["sd pool", "sd match", "sd merge", "flux"],
)
def test_apply_and_remove_and_a_picture_that_follows_from_the_generator(build, config):
    pipe = build()
    dense = picture(pipe)
    fastdiff.apply(pipe, config)
    first = picture(pipe)
    assert not torch.allclose(first, dense, atol=1e-4)
    torch.manual_seed(99)
    assert torch.equal(picture(pipe), first)
    fastdiff.remove(pipe)
    assert torch.equal(picture(pipe), dense)


def test_seeds_draw_other_tokens():
    pipe = tiny_sd_pipeline()
    fastdiff.apply(pipe, MATCHED)
    calls = catch(pipe.unet, "enter")
    drawn = []
    for seed in (0, 1, 0):
        calls.clear()
        picture(pipe, seed=seed)
        assert len({int(call["seed"]) for call in calls}) == 1
        drawn.append(calls[0]["agent_matching"].destinations)
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])


def test_both_branches_of_guidance_agree_in_one_batch_and_in_two():
    torch.manual_seed(0)
    model = tiny_unet()
    fastdiff.apply(model, AgentConfig(20, source="merge", merge_ratio=0.3, steps=(0.0, 1.0)))
    both = unet_inputs(batch=2)
    both["sample"] = both["sample"][:1].repeat(2, 1, 1, 1)
    together = run(model, both)
    for branch in range(2):
        alone = {**both, "sample": both["sample"][:1], "encoder_hidden_states": both["encoder_hidden_states"][[branch]]}
        torch.testing.assert_close(together[[branch]], run(model, alone), atol=1e-5, rtol=1e-4)


def test_tokens_are_merged_around_the_layer():
    torch.manual_seed(0)
    model = tiny_unet(levels=2)
    fastdiff.apply(model, AgentConfig(20, source="merge", merge_ratio=0.4, steps=(0.0, 1.0)))
    entered, attended = catch(model, "enter"), catch(model, "attend")
    run(model, unet_inputs(9, 13))
    tokens = [(call["block_input"].shape[1], call["out"].shape[1]) for call in entered]
    assert tokens[0] == (117, 117 - 46)
    assert [call["args"][0].shape[1] for call in attended] == [short for _, short in tokens]
    # The features are those of the block, from which its norm makes what the layer gets.
    block = model.down_blocks[0].attentions[0].transformer_blocks[0]
    torch.testing.assert_close(block.norm1(entered[0]["block_input"]), entered[0]["args"][0])


def test_the_backend_that_runs_is_told():
    gpu = torch.device("cuda"), torch.bfloat16, 64
    for config, backend in ((POOLED, "torch"), (fastdiff.ClearConfig(4), "triton")):
        assert config.planner().runs_on("auto", *gpu) == backend
    pipe = tiny_sd_pipeline()
    for asked, told in (("auto", "torch"), ("reference", "reference"), ("triton", "none: .* no kernel for agent")):
        fastdiff.apply(pipe, POOLED, backend=asked)
        assert re.match(told, fastdiff.summary(pipe).models[0].runs_on)


def test_coarse_levels_stay_dense_where_agents_do_not_pay():
    pipe = tiny_sd_pipeline(levels=2)
    for agents, levels in ((35, {560, 140}), (80, {560})):
        fastdiff.apply(pipe, AgentConfig(agents))
        attended = catch(pipe.unet, "attend")
        picture(pipe)
        assert {call["args"][0].shape[1] for call in attended} == levels
        layers = fastdiff.summary(pipe).models[0].layers
        assert {layer.density < 1 for layer in layers if "down_blocks.0" in layer.name} == {True}
        assert {layer.density < 1 for layer in layers if "down_blocks.1" in layer.name} == {140 in levels}
    fastdiff.apply(pipe, AgentConfig(300))
    with pytest.raises(InvalidInputError, match="twice 300 agents are no fewer than the 560 tokens"):
        picture(pipe)


def test_pooled_agents_of_a_unet_layer_by_hand():
    torch.manual_seed(0)
    model = tiny_unet()
    fastdiff.apply(model, AgentConfig((3, 4), steps=(0.0, 1.0)))
    attended = catch(model, "attend")
    run(model, unet_inputs(9, 13, batch=2))
    call = attended[0]
    q, k, v = (x.double() for x in call["args"])
    assert call["rotary"] is None
    scale = q.shape[3] ** -0.5
    layout = call["plan"].spans.layout
    agents = cell_means(q, call["plan"].cells)
    expected = truth(q, k, v, agents, layout, scale=scale, scale2=scale**0.3, shortcut=0.075)
    torch.testing.assert_close(call["out"].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reference", [(), (4, 3)], ids=["text", "text and reference"])
def test_flux_layers_by_hand(reference):
    torch.manual_seed(0)
    model = tiny_flux()
    fastdiff.apply(model, AgentConfig((2, 3), steps=(0.0, 1.0)))
    attended = catch(model, "attend")
    run(model, flux_inputs(reference=reference))
    assert len(attended) == 2
    for call in attended:
        (q, k, v), (cos, sin), plan = call["args"], call["rotary"], call["plan"]
        torch.testing.assert_close(rotate(call["pre_rope_query"], cos, sin), q)
        agents = cell_means(call["pre_rope_query"][:, 3:38], plan.cells)
        agents = rotate(agents, cos[plan.centres], sin[plan.centres])
        q, k, v, agents = (x.double() for x in (q, k, v, agents))
        expected = truth(q, k, v, agents, plan.spans.layout, scale=0.25, scale2=0.25**0.3, shortcut=0.075)
        torch.testing.assert_close(call["out"].double(), expected, atol=1e-5, rtol=1e-4)
        beside = [*range(3), *range(38, q.shape[1])]
        exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[:, beside], k, v))).transpose(1, 2)
        torch.testing.assert_close(call["out"][:, beside].double(), exact, atol=1e-5, rtol=1e-4)


def test_flux_cannot_compare_tokens():
    with pytest.raises(UnsupportedError, match="block_input"):
        fastdiff.apply(tiny_flux_pipeline(), MATCHED)


@pytest.mark.parametrize("config", [POOLED, MERGED], ids=["pool", "merge"])
def test_a_compiled_run(config):
    pipe = tiny_sd_pipeline(levels=2)
    fastdiff.apply(pipe, config)
    expected = picture(pipe)
    torch._dynamo.reset()
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(picture(pipe), expected, atol=1e-3, rtol=1e-3)
    torch._dynamo.reset()


def test_learned_terms_of_a_unet():
    torch.manual_seed(0)
    model = tiny_unet()
    settings = {"source": "merge", "steps": (0.0, 1.0)}
    fastdiff.apply(model, AgentConfig((3, 4), **settings))
    expected = run(model, unet_inputs())
    fastdiff.apply(model, AgentConfig((3, 4), bias=True, convolution=True, **settings))
    torch.testing.assert_close(run(model, unet_inputs()), expected, atol=1e-5, rtol=1e-4)
    model(**unet_inputs())[0].square().sum().backward()
    grads = {name: value.grad for name, value in model.named_parameters() if ".attn1.fastdiff." in name}
    assert all(grads[name].abs().sum() > 0 for name in grads if "down_blocks.0" in name)
    assert len(grads) > 0
