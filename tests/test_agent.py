"""The agent method: settings and refusals, cells, the window of steps, RoPE, learned terms, pipelines."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from agent_truth import around, cell_means, tensors, truth
from tiny_models import forward, model_inputs, tiny_wan, tiny_wan_pipeline, video

import fastdiff
from fastdiff.methods import AgentConfig, build_plan, load_config
from fastdiff.methods.agent import spread
from fastdiff.methods.agent_planner import AgentPlanner, rotate
from fastdiff.methods.agent_terms import AgentTerms
from fastdiff_kernels import (
    Grid,
    InvalidInputError,
    Span,
    TokenLayout,
    UnsupportedError,
    agent_attention,
    pool_cells,
)
from fastdiff_patches.attachment import find
from fastdiff_patches.planner import Extras

torch.set_num_threads(1)

CPU = torch.device("cpu")
ALWAYS = AgentConfig(12, steps=(0.0, 1.0))
GRID = Grid(3, 5, 7)
TEXTED = TokenLayout.self_attention(GRID, text_before=2, text_after=3)


def extras(inputs=None, parameters=None, scale=None, key_mask=None) -> Extras:
    return Extras(scale, key_mask, "auto", parameters, {} if inputs is None else inputs)


def plan_of(planner, layout, layer=0, step=None, steps=None):
    return planner.plan(layout, layer=layer, step=step, steps=steps, heads=2, head_dim=8, device=CPU)


def table(tokens: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A RoPE table with another angle for each token and pair."""
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * torch.linspace(0.1, 1.3, head_dim // 2)
    return tuple(wave.repeat_interleave(2, dim=1) for wave in (angles.cos(), angles.sin()))


def turned(x: torch.Tensor, angles_of: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """RoPE as a product of complex numbers."""
    cos, sin = angles_of
    turn = torch.complex(cos[:, ::2], sin[:, ::2])
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn[:, None]).flatten(-2)


def test_planner_equals_the_formula_without_rope():
    planner, (q, k, v) = ALWAYS.planner(), tensors(TEXTED)
    plan = plan_of(planner, TEXTED)
    mask = torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.7
    agents = cell_means(q[:, 2:-3], plan.cells)
    settings = {"scale": 8**-0.5, "scale2": 8 ** (-0.5 * 0.3), "shortcut": 0.075, "key_mask": mask}
    out = planner.attend(q, k, v, plan, extras({"rotary": None}, key_mask=mask))
    torch.testing.assert_close(out, truth(q, k, v, agents, TEXTED, **settings), atol=1e-12, rtol=1e-10)
    assert planner.needs == {"pre_rope_query", "rotary"}


def test_with_rope_queries_are_pooled_before_it_and_turned_to_the_middle_of_their_cell():
    planner, (natural, k, v) = ALWAYS.planner(), tensors(TEXTED)
    plan = plan_of(planner, TEXTED)
    rotary = table(natural.shape[1], 8)
    q = turned(natural, rotary)
    torch.testing.assert_close(rotate(natural, *rotary), q)
    agents = turned(cell_means(natural[:, 2:-3], plan.cells), tuple(part[plan.centres] for part in rotary))
    out = planner.attend(q, k, v, plan, extras({"pre_rope_query": natural, "rotary": rotary}, scale=0.5))
    expected = truth(q, k, v, agents, TEXTED, scale=0.5, scale2=0.5**0.3, shortcut=0.075)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize(
    ("count", "grid", "cells"),
    [
        (256, Grid(1, 64, 64), Grid(1, 16, 16)),
        (100, Grid(1, 32, 48), Grid(1, 9, 11)),
        (16, Grid(1, 64, 4), Grid(1, 16, 1)),
        (1024, Grid(21, 45, 80), Grid(5, 12, 17)),
        (64, Grid(2, 32, 32), Grid(1, 8, 8)),
        (1, Grid(3, 5, 7), Grid(1, 1, 1)),
    ],
    ids=str,
)
def test_a_count_is_spread_in_cells_as_square_as_can_be(count, grid, cells):
    assert spread(count, grid) == cells
    assert AgentConfig(count).cells(grid) == cells


def test_cells_may_be_given():
    assert AgentConfig((4, 6)).cells(Grid(1, 16, 24)) == Grid(1, 4, 6)
    assert AgentConfig((2, 4, 6)).cells(Grid(5, 16, 24)) == Grid(2, 4, 6)
    with pytest.raises(InvalidInputError, match=r"give \(frames, height, width\)"):
        AgentConfig((4, 6)).build_plan(around(Grid(2, 16, 24)))


def test_the_window_of_steps():
    def acting(config, steps):
        return [step for step in range(steps) if config.acts(step, steps)]

    assert acting(AgentConfig(4), 50) == list(range(20))
    assert acting(AgentConfig(4, steps=(0.2, 0.6)), 10) == [2, 3, 4, 5]
    assert acting(AgentConfig(4, steps=(0.0, 1.0)), 3) == [0, 1, 2]
    assert AgentConfig(4).acts(None, None)
    assert AgentConfig(4).uses_steps
    assert not ALWAYS.uses_steps
    with pytest.raises(InvalidInputError, match="none of its 2 steps"):
        AgentConfig(4, steps=(0.1, 0.4)).acts(0, 2)


def test_plans_are_dense_outside_the_window_and_identical_inside():
    planner = AgentConfig(12).planner()
    plan = plan_of(planner, TEXTED, step=0, steps=10)
    assert plan_of(planner, TEXTED, layer=3, step=3, steps=10) is plan
    assert plan_of(AgentConfig(12).planner(), TEXTED) is plan
    assert plan_of(planner, TEXTED, step=4, steps=10) is None


def test_coarse_levels_where_agents_do_not_pay_stay_dense():
    planner = AgentConfig(30, steps=(0.0, 1.0)).planner()
    fine, middle, coarse = (around(Grid(1, side, side)) for side in (16, 9, 4))
    for _ in range(2):
        assert plan_of(planner, fine, layer=0).agents == 30
        assert plan_of(planner, middle, layer=1).agents == 30
        assert plan_of(planner, coarse, layer=2) is None
        assert plan_of(planner, fine, layer=4).agents == 30
    with pytest.raises(InvalidInputError, match="30 agents are no fewer than the 16 tokens"):
        plan_of(planner, coarse, layer=0)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (AgentConfig(105), around(GRID), "105 agents are no fewer than the 105 tokens"),
        (AgentConfig(53), around(GRID), "twice 53 agents are no fewer than the 105 tokens kept"),
        (AgentConfig((4, 2, 2)), around(GRID), f"4x2x2 cells do not fit a grid of {GRID}; give fewer"),
        (AgentConfig(40, source="merge", merge_ratio=0.3), around(GRID), "no fewer than the 74 tokens kept"),
        (AgentConfig(50), TokenLayout.self_attention(GRID, text_after=900), "density of 1.042"),
    ],
)
def test_agents_that_do_not_pay_are_refused(config, layout, message):
    with pytest.raises(InvalidInputError, match=message):
        build_plan(config, layout)


def test_merging_is_refused_where_text_is():
    with pytest.raises(UnsupportedError, match="use source='pool'"):
        build_plan(AgentConfig(4, source="merge"), TEXTED)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"agents": 0}, "agents is 0"),
        ({"agents": True}, "agents is True"),
        ({"agents": 4.0}, "agents is 4.0"),
        ({"agents": (4,)}, "agents is"),
        ({"agents": (4, 0)}, "agents is"),
        ({"agents": 4, "source": "learned"}, "source is 'learned'"),
        ({"agents": 4, "steps": 0.4}, "steps is 0.4"),
        ({"agents": 4, "steps": (0.0, 1.2)}, "end of steps is 1.2"),
        ({"agents": 4, "steps": (0.4, 0.4)}, "which is empty"),
        ({"agents": 4, "k_scale2": -1}, "k_scale2 is -1"),
        ({"agents": 4, "k_shortcut": 2}, "k_shortcut is 2"),
        ({"agents": 4, "source": "merge", "merge_ratio": 1.0}, "leaves no token"),
        ({"agents": 4, "source": "merge", "merge_ratio": -0.1}, "merge_ratio is -0.1"),
        ({"agents": 4, "merge_ratio": 0.2}, "only source='merge'"),
        ({"agents": 4, "source": "merge", "merge_ratio": 0.2, "convolution": True}, "merge_ratio=0, or leave"),
        ({"agents": 4, "bias": True}, "give agents as cells"),
        ({"agents": 4, "bias": 1}, "bias is 1"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(InvalidInputError, match=message):
        AgentConfig(**values)


def test_config_travels_as_json():
    for config in (
        AgentConfig((2, 4, 6), steps=(0.1, 0.5), bias=True, convolution=True),
        AgentConfig(64, source="merge", merge_ratio=0.3),
        AgentConfig.agent_sd("48x64"),
    ):
        again = load_config(config.to_json())
        assert again == config
        assert hash(again) == hash(config)
        assert json.loads(config.to_json())["version"] == 1
    with pytest.raises(InvalidInputError, match="no default for agents"):
        load_config({}, "agent")


def test_the_published_preset():
    config = AgentConfig.agent_sd()
    plan = config.build_plan(around(Grid(1, 64, 64)))
    assert (plan.agents, plan.query_tokens) == (256, 2458)
    # The table of the published schedule at ratio 0.4 has 0.075.
    assert plan.density() == pytest.approx(0.075, abs=5e-4)


@pytest.mark.parametrize(("grid", "text"), [(Grid(17, 16, 16), 0), (Grid(1, 33, 40), 77), (GRID, 0)], ids=str)
def test_for_density_comes_from_below(grid, text):
    layout = TokenLayout.self_attention(grid, text_after=text)
    config = AgentConfig.for_density(0.4, grid, text_tokens=text, steps=(0.0, 1.0))
    assert 0.3 < config.build_plan(layout).density() <= 0.4
    assert config.steps == (0.0, 1.0)
    with pytest.raises(InvalidInputError, match="below the floor of agent on a grid"):
        AgentConfig.for_density(0.0001, grid, text_tokens=text)
    most = AgentConfig.for_density(1.0, grid, text_tokens=text)
    assert 2 * most.agents < grid.tokens
    AgentConfig.for_density(0.15, grid, source="merge", merge_ratio=0.5)


@pytest.mark.parametrize(("cells", "grid"), [((2, 3), Grid(1, 5, 7)), ((2, 3), Grid(1, 9, 4)), ((2, 2, 3), GRID)])
def test_learned_terms_start_as_the_training_free_method(cells, grid):
    layout = TokenLayout.self_attention(grid, text_before=2, text_after=1)
    plain, learned = (AgentConfig(cells, bias=on, convolution=on, k_shortcut=0.25).planner() for on in (False, True))
    assert plain.parameters(layer=0, heads=2, head_dim=8) is None
    terms = learned.parameters(layer=0, heads=2, head_dim=8).double()
    q, k, v = tensors(layout)
    mask = torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.8
    plan = plan_of(learned, layout)
    out = learned.attend(q, k, v, plan, extras(parameters=terms, key_mask=mask))
    torch.testing.assert_close(out, plain.attend(q, k, v, plan, extras(key_mask=mask)), atol=1e-12, rtol=1e-10)
    out.square().sum().backward()
    used = {"first", "second", "taps", "offset"}
    assert {name for name, value in terms.named_parameters() if value.grad.abs().sum() > 0} == used


def stretch(points: torch.Tensor, sides: tuple[int, ...]) -> torch.Tensor:
    """What torch's own interpolation makes of a map `[heads, agents, ...]`, tokens last."""
    mode = ("linear", "bilinear", "trilinear")[len(sides) - 1]
    return F.interpolate(points, sides, mode=mode, align_corners=False)


def test_a_bias_is_a_map_and_a_vector_for_each_axis_stretched_to_the_grid():
    torch.manual_seed(0)
    terms = AgentTerms(2, 8, (2, 3), None).double()
    for part in terms.parameters():
        torch.nn.init.normal_(part)
    for grid in (Grid(1, 9, 11), Grid(1, 5, 40)):
        bias = terms.bias(grid, torch.zeros(1, dtype=torch.float64))
        for part in (terms.first, terms.second):
            maps, rows, columns = part.split((49, 32, 32), dim=-1)
            expected = stretch(maps.unflatten(-1, (7, 7)), (grid.height, grid.width))
            expected = expected + stretch(rows, (grid.height,))[..., None] + stretch(columns, (grid.width,))[:, :, None]
            torch.testing.assert_close(part @ bias.tokens.T, expected.flatten(2), atol=1e-10, rtol=1e-10)


def test_a_bias_of_video_cells():
    torch.manual_seed(0)
    terms = AgentTerms(1, 8, (2, 2, 3), None).double()
    torch.nn.init.normal_(terms.first)
    bias = terms.bias(GRID, torch.zeros(1, dtype=torch.float64))
    maps, *vectors = terms.first.split((4 * 7 * 7, 32, 32, 32), dim=-1)
    expected = stretch(maps.unflatten(-1, (4, 7, 7)), (3, 5, 7))
    for axis, vector in enumerate(vectors):
        shape = [1, 12, 1, 1, 1]
        shape[2 + axis] = expected.shape[2 + axis]
        expected = expected + stretch(vector, (shape[2 + axis],)).reshape(shape)
    torch.testing.assert_close(terms.first @ bias.tokens.T, expected.flatten(2), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("grid", [GRID, Grid(1, 5, 7)], ids=str)
def test_the_convolution_is_over_neighbours(grid):
    torch.manual_seed(0)
    terms = AgentTerms(2, 4, None, 0.5).double()
    for part in terms.parameters():
        torch.nn.init.normal_(part)
    values = torch.randn(2, grid.tokens, 2, 4, dtype=torch.float64)
    places = grid.coordinates().long()
    expected = terms.offset.reshape(2, 4).expand(values.shape).clone()
    for token, here in enumerate(places):
        for other, there in enumerate(places):
            tap = there - here + 1
            if ((tap >= 0) & (tap <= 2)).all():
                expected[:, token] += values[:, other] * terms.taps[:, 0, tap[0], tap[1], tap[2]].reshape(2, 4)
    torch.testing.assert_close(terms.convolve(values, grid), expected, atol=1e-10, rtol=1e-10)


def test_masked_values_do_not_leak_through_the_convolution():
    planner = AgentConfig((2, 3), convolution=True).planner()
    layout = around(Grid(1, 5, 7))
    terms = planner.parameters(layer=0, heads=2, head_dim=8).double()
    torch.nn.init.normal_(terms.taps)
    (q, k, v), plan = tensors(layout), plan_of(planner, layout)
    mask = torch.rand(k.shape[:2], generator=torch.Generator().manual_seed(0)) < 0.7
    before = planner.attend(q, k, v, plan, extras(parameters=terms, key_mask=mask))
    v = torch.where(mask[..., None, None], v, 100.0)
    assert torch.equal(planner.attend(q, k, v, plan, extras(parameters=terms, key_mask=mask)), before)


@pytest.mark.parametrize("rope", [False, True])
def test_one_graph(rope):
    config = AgentConfig((2, 2, 3), steps=(0.0, 1.0), bias=True, convolution=True)
    planner, (q, k, v) = config.planner(), tensors(TEXTED, dtype=torch.float32)
    plan, terms = plan_of(planner, TEXTED), planner.parameters(layer=0, heads=2, head_dim=8)
    inputs = {"pre_rope_query": q, "rotary": tuple(part.float() for part in table(q.shape[1], 8)) if rope else None}

    def call(q, k, v):
        return planner.attend(q, k, v, plan, extras(inputs, terms))

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), call(q, k, v))


# --- on a Wan pipeline -------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    return tiny_wan_pipeline()


def test_apply_and_remove_around_a_run(pipe):
    dense = video(pipe)
    fastdiff.apply(pipe, AgentConfig(12))
    sparse = video(pipe)
    assert not torch.allclose(sparse, dense, atol=1e-4)
    assert torch.equal(video(pipe), sparse)
    fastdiff.remove(pipe)
    assert torch.equal(video(pipe), dense)


def test_agents_act_in_their_steps_alone(pipe, monkeypatch):
    acted, plain = [], AgentPlanner.plan

    def recording(self, layout, *, layer, step, **more):
        plan = plain(self, layout, layer=layer, step=step, **more)
        if plan is not None and layer == 0:
            acted.append(step)
        return plan

    monkeypatch.setattr(AgentPlanner, "plan", recording)
    fastdiff.apply(pipe, AgentConfig(12, steps=(0.2, 0.6)))
    video(pipe, steps=5)
    # Two forwards for each step: guidance.
    assert acted == [1, 1, 2, 2]


def test_a_window_that_ends_early_costs_less_quality(pipe):
    dense = video(pipe, steps=5)
    errors = []
    for end in (0.2, 1.0):
        fastdiff.apply(pipe, AgentConfig(4, steps=(0.0, end)))
        errors.append((video(pipe, steps=5) - dense).square().mean())
    assert 0 < errors[0] < errors[1]


def test_a_wan_layer_equals_the_method_by_hand():
    torch.manual_seed(0)
    model = tiny_wan(layers=1, heads=2, head_dim=16)
    fastdiff.apply(model, AgentConfig(12, steps=(0.0, 1.0)))
    caught, planner = {}, find(model).planner
    attend = planner.attend

    def catching(q, k, v, plan, got):
        caught.update(q=q, k=k, v=v, plan=plan, **got.inputs, out=attend(q, k, v, plan, got))
        return caught["out"]

    planner.attend = catching
    forward(model)
    natural, (cos, sin), plan = caught["pre_rope_query"], caught["rotary"], caught["plan"]
    # The table and the queries before RoPE are those of this model: they give its own queries.
    torch.testing.assert_close(rotate(natural, cos, sin), caught["q"])
    agents = rotate(cell_means(natural, plan.cells), cos[plan.centres], sin[plan.centres])
    q, k, v, agents = (x.double() for x in (caught["q"], caught["k"], caught["v"], agents))
    expected = truth(q, k, v, agents, plan.spans.layout, scale=0.25, scale2=0.25**0.3, shortcut=0.075)
    torch.testing.assert_close(caught["out"].double(), expected, atol=1e-5, rtol=1e-4)


def test_learned_terms_live_on_the_attention_module():
    torch.manual_seed(0)
    model = tiny_wan(layers=2)
    plain = AgentConfig((2, 3, 5), steps=(0.0, 1.0))
    fastdiff.apply(model, plain)
    size = {"frames": 4, "height": 12, "width": 20}
    expected = forward(model, **size)
    stock = set(model.state_dict())
    fastdiff.apply(model, AgentConfig((2, 3, 5), steps=(0.0, 1.0), bias=True, convolution=True))
    torch.testing.assert_close(forward(model, **size), expected, atol=1e-5, rtol=1e-4)
    learned = set(model.state_dict()) - stock
    assert learned == {
        f"blocks.{block}.attn1.fastdiff.{name}" for block in range(2) for name in ("first", "second", "taps", "offset")
    }
    model(**model_inputs(**size))[0].square().sum().backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in learned)
    with torch.no_grad():
        for name in learned:
            torch.nn.init.normal_(model.get_parameter(name), std=0.3)
    trained = forward(model, **size)
    assert not torch.allclose(trained, expected, atol=1e-3)
    torch.manual_seed(1)
    other = tiny_wan(layers=2)
    fastdiff.apply(other, find(model).settings.config)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(forward(other, **size), trained)
    fastdiff.remove(model)
    assert set(model.state_dict()) == stock


def test_too_many_agents_stop_the_run(pipe):
    fastdiff.apply(pipe, AgentConfig(200))
    with pytest.raises(InvalidInputError, match="200 agents are no fewer than the 180 tokens"):
        video(pipe)


def test_a_bare_model_has_no_steps():
    with pytest.raises(InvalidInputError, match="step"):
        fastdiff.apply(tiny_wan(), AgentConfig(12))


def test_a_compiled_run(pipe):
    fastdiff.apply(pipe, AgentConfig(12, steps=(0.0, 1.0)))
    sparse = video(pipe)
    torch._dynamo.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(video(pipe), sparse, atol=1e-4, rtol=1e-3)
    torch._dynamo.reset()


def test_references_stay_exact():
    layout = around(Grid(1, 8, 8), (Span("text", 3),), (Span("reference", 9, Grid(1, 3, 3)),))
    (q, k, v), plan = tensors(layout), build_plan(AgentConfig(6), layout)
    agents = pool_cells(q[:, 3:67], plan)
    out = agent_attention(q, k, v, agents, plan)
    beside = [*range(3), *range(67, 76)]
    dense = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q[:, beside], k, v))).transpose(1, 2)
    torch.testing.assert_close(out[:, beside], dense)
