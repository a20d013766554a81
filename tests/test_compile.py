"""torch.compile with fullgraph: blocks make one graph for all sparse layers and one for all dense ones."""

import pytest
import torch
from tiny_models import compile_as, forward, tiny_wan_pipeline, video

import fastdiff
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

NARROW = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=32)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("way", "backend", "layers", "mixed_graphs"),
    [
        ("torch.compile", "eager", 2, 3),
        ("model.compile", "aot_eager", 2, 3),
        ("blocks", "eager", 12, 2),
        ("blocks", "aot_eager", 12, 2),
    ],
)
def test_a_run(way, backend, layers, mixed_graphs):
    pipe = tiny_wan_pipeline(layers=layers)
    dense = video(pipe)
    fastdiff.apply(pipe, NARROW)
    sparse = video(pipe)
    compile_as(pipe, way, backend)
    torch.testing.assert_close(video(pipe), sparse, atol=1e-4, rtol=1e-3)
    assert graphs() == 1
    fastdiff.apply(pipe, NARROW, dense_steps=1, dense_layers=1)
    mixed = video(pipe)
    assert graphs() == mixed_graphs
    assert torch.equal(video(pipe), mixed)
    assert graphs() == mixed_graphs
    fastdiff.remove(pipe)
    torch.testing.assert_close(video(pipe), dense, atol=1e-4, rtol=1e-3)
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
