"""torch.compile with fullgraph: blocks make one graph for all sparse layers and one for all dense ones."""

import pytest
import torch
from fake_planner import UsingPlanner, put_on
from tiny_models import compile_as, forward, model_inputs, moved, tiny_wan_pipeline, video
from tiny_picture_models import picture, tiny_flux_pipeline, tiny_sd_pipeline

import fastdiff
from fastdiff_patches.attachment import find
from fastdiff_patches.planner import NEEDS

torch.set_num_threads(1)

COMPILE = "torch.compile and compile_repeated_blocks(fullgraph=True), no recompiles over steps"
NARROW = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=32)
# Needs more of a layer than query, key and value.
AGENTS = fastdiff.AgentConfig(12, steps=(0.0, 1.0))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.together(COMPILE)
@pytest.mark.parametrize("config", [NARROW, AGENTS], ids=["radial", "agent"])
@pytest.mark.parametrize(
    ("way", "backend", "layers", "mixed_graphs"),
    [
        ("torch.compile", "eager", 2, 3),
        ("model.compile", "aot_eager", 2, 3),
        ("blocks", "eager", 12, 2),
        ("blocks", "aot_eager", 12, 2),
        pytest.param("model.compile", "inductor", 2, 3, marks=pytest.mark.gpu),
        pytest.param("blocks", "inductor", 12, 2, marks=pytest.mark.gpu),
    ],
)
def test_a_run(way, backend, layers, mixed_graphs, config):
    pipe = tiny_wan_pipeline(layers=layers).to("cuda" if backend == "inductor" else "cpu")
    dense = video(pipe)
    fastdiff.apply(pipe, config)
    sparse = video(pipe)
    compile_as(pipe, way, backend)
    torch.testing.assert_close(video(pipe), sparse, atol=1e-4, rtol=1e-3)
    assert graphs() == 1
    fastdiff.apply(pipe, config, dense_steps=1, dense_layers=1)
    mixed = video(pipe)
    assert graphs() == mixed_graphs
    assert torch.equal(video(pipe), mixed)
    assert graphs() == mixed_graphs
    fastdiff.remove(pipe)
    torch.testing.assert_close(video(pipe), dense, atol=1e-4, rtol=1e-3)
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.together(COMPILE)
@pytest.mark.parametrize("config", [NARROW, AGENTS], ids=["radial", "agent"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_gradients(backend, config):
    """Of both sparse blocks and a dense one, over two steps of training in as many graphs as there are kinds."""
    device = "cuda" if backend == "inductor" else "cpu"
    pipe = fastdiff.apply(tiny_wan_pipeline(layers=3).to(device), config, dense_layers=1)
    model, found = pipe.transformer, []
    for compiled in (False, True):
        if compiled:
            compile_as(pipe, "blocks", backend)
        for seed in range(2):
            model.zero_grad()
            model(**moved(model_inputs(frames=5, height=12, width=20, seed=seed), device))[0].square().mean().backward()
            found.append([block.attn1.to_q.weight.grad.clone() for block in model.blocks])
    pairs = zip(sum(found[:2], []), sum(found[2:], []), strict=True)
    assert all((other - one).abs().max() < 1e-4 * one.abs().max() for one, other in pairs)
    assert graphs() == 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_every_size_runs_in_as_many_graphs_as_untouched():
    pipe = tiny_wan_pipeline(layers=3)
    sizes = [{}, {"height": 80, "width": 112}, {"height": 112, "width": 144, "num_frames": 17}]
    expected = [video(fastdiff.apply(pipe, NARROW), steps=1, **size) for size in sizes]
    fastdiff.remove(pipe)
    compile_as(pipe, "blocks", "eager")
    counts = []
    for patched in (False, True):
        torch._dynamo.reset()
        before = graphs()
        if patched:
            fastdiff.apply(pipe, NARROW)
        found = [video(pipe, steps=1, **size) for size in sizes]
        counts.append(graphs() - before)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert counts[0] == counts[1]


def test_layers_of_unequal_plans_share_a_graph():
    pipe = tiny_wan_pipeline(layers=12)
    model = pipe.transformer
    fastdiff.apply(model, NARROW)
    compile_as(pipe, "blocks", "eager")
    attached = find(model)
    configs = [fastdiff.RadialConfig(decay_factor=index / 12, block_size=32) for index in range(12)]
    attached.planner.plan = lambda layout, *, layer, **_: configs[layer].build_plan(layout)
    forward(model)
    assert graphs() == 1


# For each family a small and a deep pipeline, and one step of it.
PIPELINES = {
    "wan": (tiny_wan_pipeline, {"layers": 10}, lambda pipe: video(pipe, steps=1, height=48, width=80)),
    "flux": (tiny_flux_pipeline, {"layers": 2, "single_layers": 9}, lambda pipe: picture(pipe, num_inference_steps=1)),
    "unet": (tiny_sd_pipeline, {}, lambda pipe: picture(pipe, num_inference_steps=1)),
}


@pytest.mark.parametrize("way", ["torch.compile", "model.compile", "blocks"])
@pytest.mark.parametrize("name", PIPELINES)
def test_what_planners_need(name, way):
    """All that a family supplies, in full graphs; compiled by blocks, all sparse blocks of a kind share one."""
    build, deep, call = PIPELINES[name]
    if way != "blocks":
        deep = {"levels": 2} if name == "unet" else {}
    component = "unet" if name == "unet" else "transformer"

    def patched(pipe):
        needs = frozenset(NEEDS) - ({"block_input"} if name == "flux" else set())
        put_on(pipe, UsingPlanner(needs=needs, learned=True, keep_extras=False))
        return find(getattr(pipe, component)).layers

    expected_graphs = 1
    if way == "blocks":
        untouched = build(**deep)
        compile_as(untouched, way, "eager")
        call(untouched)
        # The middle of the UNet stays dense, in a graph of its own.
        expected_graphs = graphs() + (name == "unet")
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    pipe, twin = build(**deep), build(**deep)
    layers = patched(pipe)
    # Before anything has run uncompiled, as users do.
    compile_as(pipe, way, "eager")
    found = call(pipe)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs() == expected_graphs
    assert all(layer.block_input is None for layer in layers)
    for layer, other in zip(layers, patched(twin), strict=True):
        other.parameters.load_state_dict(layer.parameters.state_dict())
    torch.testing.assert_close(found, call(twin), atol=1e-4, rtol=1e-3)
