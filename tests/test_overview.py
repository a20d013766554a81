"""summary on models whose layers differ: levels of a UNet, layers and steps that a method leaves dense, forecasts."""

import pytest
import torch
from fake_planner import FakePlanner
from tiny_models import tiny_wan, tiny_wan_pipeline
from tiny_picture_models import flux_inputs, picture, tiny_flux, tiny_flux_pipeline, tiny_sd_pipeline

import fastdiff
from fastdiff.methods.planner import Planner
from fastdiff_kernels import Grid, TokenLayout
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

WINDOW = fastdiff.NeighborhoodConfig((3, 3), block_size=32)


def layout(grid):
    return TokenLayout.self_attention(Grid.parse(grid))


class Varying(fastdiff.RadialConfig):
    """Stands for a method with its own plan for each step and layer; `planner` is set by the tests."""

    @property
    def uses_steps(self) -> bool:
        return True

    def planner(self) -> Planner:
        return planners[-1]


planners: list = []


@pytest.fixture
def varying():
    def with_planner(planner):
        planners.append(planner)
        return Varying()

    yield with_planner
    planners.clear()


@pytest.mark.parametrize("way", ["not set", "replaced before it ran", "one of two"])
def test_processors_that_do_not_stand(way):
    pipe = tiny_wan_pipeline()
    wan, stock = pipe.transformer, pipe.transformer.attn_processors
    first = next(iter(stock))
    config = fastdiff.RadialConfig(block_size=32)
    if way == "not set":
        made = fastdiff.processors(pipe, config)
        assert made.keys() == stock.keys()
    else:
        fastdiff.apply(pipe, config)
        kept = wan.attn_processors if way == "one of two" else stock
        wan.set_attn_processor({**kept, first: stock[first]})
    layers = fastdiff.summary(pipe, grid="5x6x7").models[0].layers
    assert [layer.why for layer in layers if layer.dense][:1] == [
        "its processor is not fastdiff's: not set, or replaced"
    ]
    assert sum(layer.dense for layer in layers) == (1 if way == "one of two" else len(layers))


def test_levels_of_a_unet():
    pipe = fastdiff.apply(tiny_sd_pipeline(), WINDOW, dense_steps=1, dense_layers=[1])
    picture(pipe)
    model = fastdiff.summary(pipe).models[0]
    assert (model.component, model.family, model.grid, model.steps) == ("unet", "unet", "1x20x28", 3)
    grids = "1x20x28 1x10x14 1x10x14 1x10x14 1x20x28 1x20x28 1x5x7"
    assert [layer.grid for layer in model.layers] == grids.split()
    fine, coarse = (WINDOW.build_plan(layout(side)).density() for side in ("1x20x28", "1x10x14"))
    assert [layer.density for layer in model.layers] == [fine, 1.0, coarse, coarse, fine, fine, 1.0]
    assert [layer.why for layer in model.layers if layer.dense] == ["named by dense_layers", "coarse level: 35 tokens"]
    pairs = [560**2, 140**2, 140**2, 140**2, 560**2, 560**2, 35**2]
    share = [count * (1 + 2 * layer.density) / 3 for count, layer in zip(pairs, model.layers, strict=True)]
    assert model.mean_density == pytest.approx(sum(share) / sum(pairs))
    text = str(model)
    assert "dense (coarse level: 35 tokens), density 1.000 at 1x5x7 tokens" in text


def test_a_grid_that_has_not_run():
    pipe = fastdiff.apply(tiny_sd_pipeline(), WINDOW)
    model = fastdiff.summary(pipe, grid="32x32", steps=4).models[0]
    assert {layer.grid for layer in model.layers} == {"1x32x32", "1x16x16", "1x8x8"}
    assert model.layers[-1].why == "coarse level: 64 tokens"
    assert all(layer.grid is None and layer.density is None for layer in fastdiff.summary(pipe).models[0].layers)
    picture(pipe)
    assert fastdiff.summary(pipe, grid="32x32", steps=4).models[0].layers == model.layers


def test_text_is_counted_as_it_ran_or_as_is_usual():
    pipe = fastdiff.apply(tiny_flux_pipeline(), WINDOW)
    usual = fastdiff.summary(pipe, grid="10x14").models[0].layers[0].density
    picture(pipe)
    ran = fastdiff.summary(pipe).models[0].layers[0].density
    assert fastdiff.summary(pipe, grid="10x14").models[0].layers[0].density == ran
    assert usual > 0.7, "512 of 652 tokens are text"
    assert usual != ran


def test_references_are_counted():
    model = fastdiff.apply(tiny_flux(), WINDOW)
    densities = []
    for reference in ((), (16, 16)):
        with torch.no_grad():
            model(**flux_inputs(16, 16, reference=reference))
        densities.append(fastdiff.summary(model).models[0].mean_density)
    assert densities[1] > densities[0]


def test_layers_that_the_method_leaves_dense():
    model = fastdiff.apply(tiny_wan(), fastdiff.RadialConfig())
    find(model).planner = FakePlanner(sparse=lambda layer, step: layer == 1)
    first, second = fastdiff.summary(model, grid="2x3x4").models[0].layers
    assert (first.dense, first.why, first.density) == (True, "left dense by radial", 1.0)
    assert not second.dense
    assert second.density < 1


def test_steps_count_one_by_one(varying):
    planner = FakePlanner(sparse=lambda layer, step: step is None or step + layer > 1)
    pipe = fastdiff.apply(tiny_wan_pipeline(), varying(planner), dense_steps=[-1])
    model = fastdiff.summary(pipe, grid="2x3x4", steps=4).models[0]
    assert [(asked["step"], asked["layer"]) for asked in planner.asked] == [
        (step, layer) for step in range(3) for layer in range(2)
    ], "as in a run, without the dense step"
    window = planner.plan(layout("2x3x4"), layer=1, step=2, steps=4, heads=1, head_dim=1, device="cpu").density()
    first, second = model.layers
    assert first.density == pytest.approx((2 + window) / 3)
    assert second.density == pytest.approx((1 + 2 * window) / 3)
    assert model.mean_density == pytest.approx((5 + 3 * window) / 8)
    assert not first.dense


def test_a_method_that_is_dense_in_every_open_step(varying):
    planner = FakePlanner(sparse=lambda layer, step: step == 0)
    pipe = fastdiff.apply(tiny_wan_pipeline(), varying(planner), dense_steps=1)
    model = fastdiff.summary(pipe, grid="2x3x4", steps=4).models[0]
    assert all(layer.dense for layer in model.layers)
    assert model.mean_density == 1.0
    pipe = fastdiff.apply(tiny_wan_pipeline(), varying(FakePlanner()), dense_steps=4)
    model = fastdiff.summary(pipe, grid="2x3x4", steps=4).models[0]
    assert not model.layers[0].dense
    assert model.mean_density == 1.0
