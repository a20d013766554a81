"""torch's default device has no say in plans: users set it to build their models on a GPU.

Here it is `meta`, whose tensors have no values.
"""

import dataclasses

import pytest
import torch
from tiny_models import model_inputs, tiny_wan
from tiny_picture_models import tiny_unet, unet_inputs

import fastdiff
from fastdiff import AgentConfig, ClearConfig, NeighborhoodConfig, RadialConfig, Rule, RulesConfig
from fastdiff.methods.paro import paro_plan
from fastdiff.methods.paro_file import blocks_of
from fastdiff_kernels import Grid, TokenLayout
from fastdiff_kernels import Rule as BlockRule

VIDEO = TokenLayout.self_attention(Grid(5, 6, 10), text_after=3)
PICTURE = TokenLayout.self_attention(Grid(1, 12, 20), text_before=3)


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (RadialConfig(), VIDEO),
        (RadialConfig(mode="raster"), VIDEO),
        (RadialConfig(mode="reference"), TokenLayout.self_attention(Grid(5, 6, 10))),
        (NeighborhoodConfig(window=(3, 3, 5), dilation=(1, 2, 1)), TokenLayout.self_attention(Grid(5, 6, 10))),
        (ClearConfig(radius=3), PICTURE),
        (AgentConfig(agents=16), PICTURE),
    ],
    ids=lambda x: getattr(x, "method", ""),
)
def test_plans_are_built_on_the_cpu(config, layout):
    plan = config.build_plan(layout)
    with torch.device("meta"):
        same = config.build_plan(layout)
        assert same.density() == plan.density()
    for field in dataclasses.fields(same):
        value = getattr(same, field.name)
        assert not isinstance(value, torch.Tensor) or value.device.type == "cpu", field.name


def test_plans_of_a_calibration():
    blocks = blocks_of(VIDEO.grid)
    mask = torch.rand(2, blocks, blocks) < 0.5
    plan = paro_plan(VIDEO, [0, 3], mask)
    with torch.device("meta"):
        same = paro_plan(VIDEO, [0, 3], mask)
    assert torch.equal(same.query.order, plan.query.order)
    assert torch.equal(same.full.indices, plan.full.indices)


def test_kernels_find_their_tables():
    plan = NeighborhoodConfig(window=(3, 3, 5)).build_plan(VIDEO)
    with torch.device("meta"):
        same = NeighborhoodConfig(window=(3, 3, 5)).build_plan(VIDEO)
        for table in ("query", "key", "parameters"):
            assert torch.equal(getattr(same.kernel_rule, table), getattr(plan.kernel_rule, table))
        assert torch.equal(same.launch_order, plan.launch_order)


def test_densities_are_solved():
    for config in (RadialConfig, NeighborhoodConfig, ClearConfig, AgentConfig):
        grid = Grid(9, 16, 16) if config is RadialConfig else Grid(1, 48, 48)
        wanted = config.for_density(0.5, grid)
        with torch.device("meta"):
            assert config.for_density(0.5, grid) == wanted


def test_rules_made_by_hand():
    ends = (torch.arange(3),) * 3
    with torch.device("meta"):
        assert BlockRule.box(ends, ends).parameters.device.type == "cpu"
        assert BlockRule.metric(torch.tensor([4, 1], device="cpu")).parameters.tolist()[-2:] == [4, 1]


@pytest.mark.parametrize(
    ("build", "inputs", "config"),
    [
        (tiny_wan, model_inputs(5, 12, 20), RadialConfig(decay_factor=0.2)),
        (tiny_wan, model_inputs(5, 12, 20), RulesConfig([Rule(NeighborhoodConfig(window=(3, 3, 3)))])),
        (lambda: tiny_unet(levels=2), unet_inputs(16, 16), ClearConfig(radius=3, pool_factor=2)),
        (lambda: tiny_unet(levels=2), unet_inputs(16, 16), AgentConfig(agents=16, steps=(0.0, 1.0))),
    ],
    ids=["radial", "rules", "pooled", "agent"],
)
def test_models_run(build, inputs, config):
    torch.manual_seed(0)
    model = fastdiff.apply(build(), config)
    with torch.no_grad():
        wanted = model(**inputs)[0]
        fastdiff.apply(fastdiff.remove(model), config)
        with torch.device("meta"):
            assert torch.equal(model(**inputs)[0], wanted)
