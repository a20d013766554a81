"""Rules: a method for each layer and step against the plain configs of the methods, and what they refuse."""

import copy
import json
import pickle

import pytest
import torch
from paro_plans import random_masks
from tiny_models import call_arguments, compile_as, forward, model_inputs, tiny_wan, tiny_wan_pipeline, video
from tiny_picture_models import picture, tiny_sd_pipeline, tiny_unet, unet_inputs
from torch._dynamo.testing import CompileCounter

import fastdiff
from fastdiff import AgentConfig, ClearConfig, NeighborhoodConfig, RadialConfig, Rule, RulesConfig
from fastdiff.methods import build_plan
from fastdiff.methods.paro import paro_plan
from fastdiff.methods.rules_planner import RulePlan
from fastdiff_kernels import Grid, InvalidInputError, TokenLayout, UnsupportedError, of_heads
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

WINDOW = NeighborhoodConfig((2, 3, 3), block_size=32)
DISK = ClearConfig(2, block_size=32)
BANDS = RadialConfig(0.1, near_width=0.3, block_size=32)


def ruling(config, layers=8, steps=10):
    """For each layer its config in each step."""
    return [[config.at(layer, layers, step, steps) for step in range(steps)] for layer in range(layers)]


class TestForms:
    @pytest.mark.parametrize(
        ("given", "named"),
        [
            (None, range(8)),
            (3, range(3)),
            (0.25, range(2)),
            ((0.25, 0.75), range(2, 6)),
            ([0, 1.0], range(8)),
            ([1, -1], (1, 7)),
            (range(2, 5), (2, 3, 4)),
            ("3", (3,)),
            ("0-1, 5,-2", (0, 1, 5, 6)),
            ("-3--1", (5, 6, 7)),
            ("2-2", (2,)),
        ],
        ids=str,
    )
    def test_layers_and_steps(self, given, named):
        by_layer = RulesConfig([Rule(WINDOW, layers=given)])
        by_step = RulesConfig([Rule(WINDOW, steps=given)])
        expected = [WINDOW if index in named else None for index in range(8)]
        assert [by_layer.at(layer, 8) for layer in range(8)] == expected
        assert [by_step.at(0, 8, step, 8) for step in range(8)] == expected
        for config in (by_layer, by_step):
            assert fastdiff.load_config(config.to_json()) == config

    def test_json(self):
        config = RulesConfig(
            [
                Rule("dense", layers=[1, 0]),
                Rule(WINDOW, layers="2-4, 7, -1", steps=0.5),
                Rule(DISK, steps=(0.5, 1.0)),
            ]
        )
        data = config.to_dict()
        assert data["version"] == 1
        assert data["rules"][0] == {"layers": "0-1", "config": "dense"}
        assert data["rules"][1] == {"layers": "2-4, 7, -1", "steps": 0.5, "config": WINDOW.to_dict()}
        assert data["rules"][2]["steps"] == [0.5, 1.0]
        assert fastdiff.load_config(json.loads(json.dumps(data))) == config
        assert hash(fastdiff.load_config(data)) == hash(config)

    def test_the_first_rule_decides(self):
        config = RulesConfig([Rule("dense", layers="2"), Rule(WINDOW, layers="1-3", steps="0-4"), Rule(DISK, steps=6)])
        found = ruling(config)
        assert found[2] == [None] * 10
        assert found[1] == found[3] == [WINDOW] * 5 + [DISK] + [None] * 4
        assert found[0] == [DISK] * 6 + [None] * 4

    def test_shares_that_meet_leave_no_gap(self):
        for steps in range(1, 30):
            config = RulesConfig([Rule(WINDOW, steps=(0.0, 0.3)), Rule(DISK, steps=(0.3, 1.0))])
            found = ruling(config, 1, steps)[0]
            assert None not in found
            assert found == ruling(RulesConfig([Rule(WINDOW, steps=0.3), Rule(DISK)]), 1, steps)[0]

    def test_outside_a_run(self):
        config = RulesConfig([Rule("dense", steps=2), Rule(WINDOW, layers="0", steps=(0.5, 1.0)), Rule(DISK)])
        assert config.at(0, 2) == WINDOW
        assert config.at(1, 2) == DISK

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ([], "one rule or more"),
            ("x", "one rule or more"),
            (["x"], "rule 0 .* give a Rule"),
            ([{"layers": 1}], "rule 0 .*must have config"),
            ([{"config": "dense"}, {"config": "dense", "layer": 1}], "rule 1 .*no 'layer'; it takes config, layers"),
            ([{"config": "sparse"}], "'sparse'; give the config of one method, or 'dense'"),
            ([{"config": None}], "give the config of one method"),
            ([{"config": {"method": "nothing"}}], "method is 'nothing'"),
            ([{"config": {"method": "clear", "radius": -1}}], "radius is -1"),
            ([{"config": {"method": "rules", "rules": [{"config": "dense"}]}}], "not in each other"),
            ([{"config": "dense", "steps": 1.5}], "steps is 1.5"),
            ([{"config": "dense", "steps": [0.5, 1.5]}], "two shares"),
            ([{"config": "dense", "steps": [0.5, 0.5]}], "two shares"),
            ([{"config": "dense", "steps": [0.1, 0.2, 0.3]}], "two shares"),
            ([{"config": "dense", "layers": -1}], r"a list such as \[-1\]"),
            ([{"config": "dense", "layers": 0}], "names none"),
            ([{"config": "dense", "layers": []}], "names none"),
            ([{"config": "dense", "layers": ""}], "no index and no range"),
            ([{"config": "dense", "layers": "a"}], "'a' in it is no index"),
            ([{"config": "dense", "layers": "3-1"}], "no range"),
            ([{"config": "dense", "layers": "3--1"}], "no range"),
            ([{"config": "dense", "layers": "0-99999"}], "no range"),
            ([{"config": "dense", "layers": True}], "layers is True"),
        ],
        ids=str,
    )
    def test_bad_input(self, rules, message):
        with pytest.raises(InvalidInputError, match=message):
            fastdiff.load_config({"method": "rules", "rules": rules})

    def test_unknown_keys_and_versions(self):
        with pytest.raises(InvalidInputError, match="rules has no setting 'layers'"):
            fastdiff.load_config({"method": "rules", "rules": [{"config": "dense"}], "layers": 1})
        with pytest.raises(InvalidInputError, match="version 9"):
            fastdiff.load_config({"method": "rules", "version": 9, "rules": [{"config": "dense"}]})
        with pytest.raises(InvalidInputError, match="no default for rules"):
            fastdiff.load_config({"method": "rules"})

    def test_no_density_to_solve_for(self):
        with pytest.raises(UnsupportedError, match="settings of its own"):
            RulesConfig.for_density(0.3, Grid(3, 8, 8))

    def test_plans_without_a_model(self):
        layout = TokenLayout.self_attention(Grid(3, 8, 8))
        config = RulesConfig([Rule("dense", layers="0"), Rule(WINDOW, layers="1"), Rule(DISK, layers="-1")])
        assert build_plan(config, layout) is None
        assert config.build_plan(layout) is None
        assert build_plan(config, layout, layer=1).density() == WINDOW.build_plan(layout).density()
        with pytest.raises(InvalidInputError, match="layers '-1', which takes a model to count"):
            build_plan(config, layout, layer=2)


class TestLayers:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return tiny_wan(layers=4)

    @pytest.mark.parametrize("config", [WINDOW, DISK, BANDS], ids=lambda config: config.method)
    def test_one_rule_is_the_method(self, model, config):
        expected = forward(fastdiff.apply(model, config))
        assert torch.equal(forward(fastdiff.apply(model, RulesConfig([Rule(config)]))), expected)

    @pytest.mark.parametrize("layers", ["1-2", "-2--1", [0, 3], 1, 0.5], ids=str)
    def test_other_layers_are_dense(self, model, layers):
        config = RulesConfig([Rule(BANDS, layers=layers)])
        others = [layer for layer in range(4) if config.at(layer, 4) is None]
        assert 0 < len(others) < 4
        expected = forward(fastdiff.apply(model, BANDS, dense_layers=others))
        assert torch.equal(forward(fastdiff.apply(model, config)), expected)

    def test_each_layer_has_its_own(self, model):
        """Each block gives what it gives under the plain method, on the input that it has under rules."""
        parts = [WINDOW, None, DISK, BANDS]
        config = RulesConfig([Rule(part or "dense", layers=[layer]) for layer, part in enumerate(parts)])
        inputs, outputs = [], []
        handles = [block.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for block in model.blocks]
        handles += [block.register_forward_hook(lambda _, args, out: outputs.append(out)) for block in model.blocks]
        forward(fastdiff.apply(model, config))
        for handle in handles:
            handle.remove()
        for layer, part in enumerate(parts):
            fastdiff.remove(model)
            if part is not None:
                fastdiff.apply(model, part)
            found = []
            block = model.blocks[layer]
            handles = [
                block.register_forward_pre_hook(lambda _, args, layer=layer: (inputs[layer], *args[1:])),
                block.register_forward_hook(lambda _, args, out, found=found: found.append(out)),
            ]
            forward(model)
            for handle in handles:
                handle.remove()
            assert torch.equal(found[0], outputs[layer]), layer

    @pytest.mark.parametrize(
        ("layers", "message"), [("4", "rule 1.*4 layers"), ([-5], "rule 1.*4 layers"), (5, "rule 1 is 5.*4 layers")]
    )
    def test_layers_that_the_model_lacks(self, model, layers, message):
        with pytest.raises(InvalidInputError, match=message):
            fastdiff.apply(model, RulesConfig([Rule(DISK, layers="0"), Rule(WINDOW, layers=layers)]))
        assert find(model) is None

    def test_undo(self, model):
        dense, processors = forward(model), dict(model.attn_processors)
        fastdiff.apply(model, RulesConfig([Rule(ClearConfig(2, pool_factor=2), layers="0"), Rule(WINDOW)]))
        assert hasattr(model.blocks[0].attn1, "fastdiff")
        assert not torch.equal(forward(model), dense)
        fastdiff.remove(model)
        assert not hasattr(model.blocks[0].attn1, "fastdiff")
        assert all(model.attn_processors[name] is processor for name, processor in processors.items())
        assert torch.equal(forward(model), dense)

    def test_copies_and_pickles(self, model):
        config = RulesConfig([Rule(ClearConfig(2, pool_factor=2), layers="-1"), Rule(BANDS, layers=(0.25, 0.75))])
        expected = forward(fastdiff.apply(model, config))
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(forward(other), expected)

    def test_doors_of_diffusers(self, model):
        config = RulesConfig([Rule(WINDOW, layers="-1"), Rule(DISK)])
        expected = forward(fastdiff.apply(model, config))
        fastdiff.remove(model)
        model.set_attn_processor(fastdiff.processors(model, config))
        assert torch.equal(forward(model), expected)
        fastdiff.remove(model)
        model.set_attn_processor(fastdiff.RulesAttnProcessor(config))
        assert torch.equal(forward(model), expected)

    def test_summary_tells_the_methods(self, model):
        config = RulesConfig([Rule("dense", layers="0"), Rule(WINDOW, layers="1"), Rule(DISK)])
        layers = fastdiff.summary(fastdiff.apply(model, config)).models[0].layers
        assert [layer.why for layer in layers] == ["left dense by rules", "neighborhood", "clear", "clear"]
        assert [layer.dense for layer in layers] == [True, False, False, False]
        densities = [layer.density for layer in fastdiff.summary(model, grid="5x6x10").models[0].layers]
        layout = TokenLayout.self_attention(Grid(5, 6, 10))
        expected = [part.build_plan(layout).density() for part in (WINDOW, DISK, DISK)]
        assert densities == [1.0, *expected]


class TestLearned:
    """Methods with parameters beside each other, and the needs of all."""

    CONVOLVED = AgentConfig(8, steps=(0.0, 1.0), convolution=True)
    POOLED = ClearConfig(2, pool_factor=2)

    def test_parameters_stand_by_method(self):
        model = tiny_wan(layers=3)
        rules = [Rule(self.POOLED, layers="0-1"), Rule(BANDS, layers="2"), Rule(self.CONVOLVED)]
        fastdiff.apply(model, RulesConfig(rules[:1] + [Rule(self.CONVOLVED, layers="2"), Rule(BANDS)]))
        names = [name for name in model.state_dict() if "fastdiff" in name]
        assert names == [
            "blocks.0.attn1.fastdiff.0.weight",
            "blocks.1.attn1.fastdiff.0.weight",
            "blocks.2.attn1.fastdiff.1.taps",
            "blocks.2.attn1.fastdiff.1.offset",
        ]
        model(**model_inputs(height=8, width=8))[0].square().mean().backward()
        for name in names:
            assert model.get_parameter(name).grad.abs().sum() > 0, name
        fastdiff.remove(model)
        assert not [name for name in model.state_dict() if "fastdiff" in name]

    @pytest.mark.parametrize("part", [POOLED, CONVOLVED], ids=["clear", "agent"])
    def test_it_is_the_method(self, part):
        torch.manual_seed(0)
        model = tiny_wan(layers=2)
        expected = forward(fastdiff.apply(model, part, dense_layers=[1]))
        config = RulesConfig([Rule("dense", layers="1"), Rule(part)])
        assert torch.equal(forward(fastdiff.apply(model, config)), expected)

    def test_two_that_learn_in_one_layer(self):
        pipe = tiny_wan_pipeline(layers=1)
        config = RulesConfig([Rule(self.POOLED, steps=1), Rule(self.CONVOLVED, steps="1"), Rule(BANDS)])
        fastdiff.apply(pipe, config)
        assert list(pipe.transformer.blocks[0].attn1.fastdiff) == ["0", "1"]
        assert video(pipe).isfinite().all()

    def test_a_plan_of_some_heads(self):
        grid = Grid(2, 8, 12)
        whole = paro_plan(TokenLayout.self_attention(grid), [0, 3, 5, 1], random_masks(grid, 4))
        part = RulePlan(DISK.planner(), whole, "0").of_heads(2, 2)
        assert (part.key, part.plan) == ("0", of_heads(whole, 2, 2))
        assert part.plan.heads == 2
        agents = RulePlan(self.CONVOLVED.planner(), self.CONVOLVED.build_plan(TokenLayout.self_attention(grid)), "1")
        assert agents.of_heads(0, 1) is agents

    def test_needs_a_family_that_supplies_them(self):
        from tiny_latent_models import tiny_cogview4

        config = RulesConfig([Rule(WINDOW, layers="0"), Rule(self.CONVOLVED)])
        with pytest.raises(UnsupportedError, match="the method needs"):
            fastdiff.apply(tiny_cogview4(), config)


class TestSteps:
    @pytest.fixture
    def pipe(self):
        return tiny_wan_pipeline(scheduler="euler")

    def after(self, pipe, put=None, **more):
        """Latents after each step; `put` are those to go on with after a step, by its index."""
        found = []

        def on_step_end(pipe, step, timestep, tensors):
            found.append(tensors["latents"].clone())
            return {"latents": (put or {}).get(step, tensors["latents"])}

        pipe(**call_arguments(**{"steps": 4, "height": 96, "width": 160, **more}), callback_on_step_end=on_step_end)
        return found

    def test_step_by_step(self, pipe):
        config = RulesConfig([Rule("dense", steps="-1"), Rule(BANDS, steps=0.5), Rule(WINDOW)])
        found = self.after(fastdiff.apply(pipe, config))
        assert torch.equal(found[1], self.after(fastdiff.apply(pipe, BANDS))[1])
        assert torch.equal(found[2], self.after(fastdiff.apply(pipe, WINDOW), {1: found[1]})[2])
        assert torch.equal(found[3], self.after(fastdiff.remove(pipe), {2: found[2]})[3])
        assert not torch.equal(found[2], self.after(fastdiff.apply(pipe, BANDS))[2])

    def test_a_schedule_stands_above(self, pipe):
        config = RulesConfig([Rule(BANDS, layers="0"), Rule(WINDOW, steps=(0.25, 1.0))])
        above = RulesConfig([Rule("dense", steps=[0, -1]), Rule("dense", layers="1"), *config.rules])
        expected = video(fastdiff.apply(pipe, above))
        assert torch.equal(video(fastdiff.apply(pipe, config, dense_steps=[0, -1], dense_layers=[1])), expected)

    @pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["plain", "guided"])
    def test_both_experts_count_through(self, guidance):
        pipe = tiny_wan_pipeline(two_experts=True)
        expected = video(fastdiff.apply(pipe, WINDOW, dense_steps=2), steps=5, guidance_scale=guidance)
        config = RulesConfig([Rule("dense", steps=2), Rule(WINDOW)])
        assert torch.equal(video(fastdiff.apply(pipe, config), steps=5, guidance_scale=guidance), expected)

    def test_experts_of_unlike_depth(self):
        pipe = tiny_wan_pipeline(two_experts=True)
        pipe.transformer_2 = tiny_wan(layers=3)
        with pytest.raises(InvalidInputError, match="2 and 3 self-attention layers"):
            fastdiff.apply(pipe, RulesConfig([Rule(WINDOW, layers="-1")]))
        assert find(pipe.transformer) is None

    def test_compiled_blocks(self, pipe):
        """A graph for dense blocks and one for each method, however the methods change over layers and steps."""
        config = RulesConfig([Rule("dense", layers="0"), Rule(WINDOW, layers="1"), Rule(BANDS, steps=2), Rule(DISK)])
        pipe = tiny_wan_pipeline(layers=4, scheduler="euler")
        expected = video(fastdiff.apply(pipe, config))
        torch._dynamo.reset()
        graphs = CompileCounter()
        compile_as(pipe, "blocks", graphs)
        assert torch.equal(video(pipe), expected)
        assert graphs.frame_count <= 3
        video(pipe, seed=1)
        assert graphs.frame_count <= 3

    def test_steps_need_a_pipeline(self, pipe):
        for config in (RulesConfig([Rule(WINDOW, steps=2)]), RulesConfig([Rule(AgentConfig(8))])):
            assert config.uses_steps
            with pytest.raises(InvalidInputError, match="no scheduler to tell"):
                fastdiff.apply(pipe.transformer, config)
        assert not RulesConfig([Rule(WINDOW, layers=1)]).uses_steps

    def test_runs_of_one_step_show_all(self):
        config = RulesConfig([Rule("dense", layers="0"), Rule(WINDOW, steps=[4]), Rule(AgentConfig(8), layers="1")])
        window, agents = config.in_one_step()
        assert window == RulesConfig([Rule(WINDOW)])
        assert agents == RulesConfig([Rule(AgentConfig(8, steps=(0.0, 1.0)), layers="1")])


class TestUNet:
    """Layers have the grid of their level, the coarse ones stay dense, and methods have unlike needs."""

    SMALL = NeighborhoodConfig((3, 3), block_size=32)
    MERGED = AgentConfig(16, source="merge", steps=(0.0, 1.0), merge_ratio=0.25)

    def test_methods_by_level(self):
        model = tiny_unet()
        with torch.no_grad():
            dense = model(**unet_inputs(16, 16))[0]
            for part, others in ((self.SMALL, [5, 6]), (self.MERGED, [0, 1, 2, 3, 6])):
                config = RulesConfig([Rule("dense", layers=others), Rule(part)])
                expected = fastdiff.apply(model, part, dense_layers=others)(**unet_inputs(16, 16))[0]
                assert torch.equal(fastdiff.apply(model, config)(**unet_inputs(16, 16))[0], expected)
            config = RulesConfig([Rule(self.MERGED, layers="-2"), Rule(self.SMALL)])
            mixed = fastdiff.apply(model, config)(**unet_inputs(16, 16))[0]
            layers = fastdiff.summary(model).models[0].layers
            assert {layer.why.split(":")[0] for layer in layers} == {"neighborhood", "agent", "coarse level"}
            assert not torch.equal(mixed, dense)
            fastdiff.remove(model)
            assert torch.equal(model(**unet_inputs(16, 16))[0], dense)

    def test_agents_early_windows_late(self):
        pipe = tiny_sd_pipeline()
        early = RulesConfig([Rule(self.MERGED, steps=0.5), Rule(self.SMALL)])
        first = picture(fastdiff.apply(pipe, early))
        assert torch.equal(picture(pipe), first)
        assert first.isfinite().all()
        whys = {layer.why.split(":")[0] for layer in fastdiff.summary(pipe).models[0].layers}
        assert whys == {"agent, neighborhood", "coarse level"}
