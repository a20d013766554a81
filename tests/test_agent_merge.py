"""Agents of similar tokens: the draw, the matching, merging and its inverse, the AgentSD policy on UNets and Wan."""

import pytest
import torch
import torch.nn.functional as F
from agent_truth import around, truth
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import forward, tiny_wan, tiny_wan_pipeline, video

import fastdiff
from fastdiff.methods import AgentConfig
from fastdiff.methods.agent_merge import draw, match, merge, pool_matched, unmerge
from fastdiff.methods.agent_planner import rotate
from fastdiff_kernels import AgentPlan, Grid, InvalidInputError, UnsupportedError
from fastdiff_patches.attachment import find
from fastdiff_patches.planner import Extras

torch.set_num_threads(1)

CPU = torch.device("cpu")


def plan_for(grid: Grid, cells: Grid, merged: int = 0) -> AgentPlan:
    return AgentPlan.from_cells(around(grid), cells, merged=merged)


def slow_match(x: torch.Tensor, destinations: list[int], merged: int):
    """Of one sample: the agent of every token, and the destination that the most similar ones are merged into."""
    unit = F.normalize(x, dim=-1)
    agent, best = {}, []
    for token in range(len(x)):
        if token in destinations:
            agent[token] = destinations.index(token)
            continue
        scores = [float(unit[token] @ unit[other]) for other in destinations]
        agent[token] = scores.index(max(scores))
        best.append((-max(scores), token))
    gone = {token: destinations[agent[token]] for _, token in sorted(best)[:merged]}
    return agent, gone


side = st.integers(1, 6).flatmap(lambda tokens: st.tuples(st.just(tokens), st.integers(1, tokens)))


@settings(max_examples=500, deadline=None)
@given(st.tuples(st.just((1, 1)), side, side), st.floats(0, 0.99), st.integers(0, 2**62))
def test_matching_equals_the_slow_one(sides, ratio, seed):
    grid, cells = (Grid(*numbers) for numbers in zip(*sides, strict=True))
    merged = min(int(ratio * grid.tokens), grid.tokens - cells.tokens)
    plan = plan_for(grid, cells, merged)
    x = torch.randn(2, grid.tokens, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = match(x, plan, torch.tensor(seed))
    short = merge(x, found) if merged else x
    agents = pool_matched(short.unflatten(2, (5, 1)), found, plan).flatten(2)
    assert short.shape[1] == grid.tokens - merged
    for sample in range(2):
        agent, gone = slow_match(x[sample], found.destinations.tolist(), merged)
        for number in range(plan.agents):
            members = [token for token in agent if agent[token] == number]
            torch.testing.assert_close(agents[sample, number], x[sample, members].mean(0))
        if not merged:
            continue
        kept = [token for token in range(grid.tokens) if token not in gone]
        assert found.kept[sample].tolist() == kept
        expected = torch.stack(
            [x[sample, [token, *(other for other in gone if gone[other] == token)]].mean(0) for token in kept]
        )
        torch.testing.assert_close(short[sample], expected)
        back = unmerge(short, found)[sample]
        for token in range(grid.tokens):
            torch.testing.assert_close(back[token], expected[kept.index(gone.get(token, token))])


def test_the_sum_of_many_half_precision_tokens_stays_finite():
    plan = plan_for(Grid(1, 40, 50), Grid(1, 1, 2), merged=1000)
    x = torch.full((1, plan.grid.tokens, 3), 100.0, dtype=torch.float16)
    found = match(x, plan, torch.tensor(0))
    assert found.members.sum(-1).max() > 660
    short = merge(x, found)
    assert (short == 100).all()
    assert (pool_matched(short[..., None], found, plan) == 100).all()


def test_the_draw_takes_one_token_of_each_cell_and_all_of_them_in_time():
    plan = plan_for(Grid(2, 5, 7), Grid(1, 2, 3))
    taken = torch.stack([draw(torch.tensor(seed), plan) for seed in range(400)])
    assert (plan.cells[taken] == torch.arange(plan.agents)).all()
    assert taken.unique().numel() == 70
    counts = torch.bincount(taken.flatten(), minlength=70) * plan.sizes.prod(1)[plan.cells.long()]
    assert 400 * 0.5 < counts.min() < counts.max() < 400 * 1.6
    assert torch.equal(draw(torch.tensor(7), plan), taken[7])


def test_neighbouring_cells_are_drawn_apart():
    plan = plan_for(Grid(1, 64, 64), Grid(1, 16, 16))
    place = (draw(torch.tensor(2**61 + 5), plan) - plan.corners).long()
    place = (place // 64 * 4 + place % 64).double()
    assert len(place.unique()) == 16
    for shift in (1, 16):
        assert torch.corrcoef(torch.stack([place[shift:], place[:-shift]]))[0, 1].abs() < 0.25


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_the_planner_equals_agent_sd_written_out(ratio):
    config = AgentConfig(6, source="merge", merge_ratio=ratio)
    planner, layout = config.planner(), around(Grid(1, 7, 9))
    plan = planner.plan(layout, layer=0, step=None, steps=None, heads=2, head_dim=4, device=CPU)
    assert planner.needs == {"pre_rope_query", "rotary", "block_input", "seed"}
    torch.manual_seed(0)
    x, project = torch.randn(2, 63, 8, dtype=torch.float64), torch.randn(3, 8, 8, dtype=torch.float64)
    inputs = {"block_input": x, "seed": torch.tensor(11), "rotary": None}
    extras, normed = Extras(None, None, "auto", None, inputs), F.layer_norm(x, (8,))
    hidden = planner.enter(normed, plan, extras)
    q, k, v = (hidden @ matrix for matrix in project)
    out = planner.attend(*(part.unflatten(2, (2, 4)) for part in (q, k, v)), plan, extras).flatten(2)
    out = planner.leave(out, plan, extras)

    destinations, merged = draw(torch.tensor(11), plan).tolist(), int(63 * ratio)
    for sample in range(2):
        agent, gone = slow_match(x[sample], destinations, merged)
        kept = [token for token in range(63) if token not in gone]
        short = torch.stack(
            [normed[sample, [token, *(other for other in gone if gone[other] == token)]].mean(0) for token in kept]
        )
        # The published agents: the query projection of the merged tokens.
        means = [normed[sample, [token for token in agent if agent[token] == number]].mean(0) for number in range(6)]
        rows = [
            part.unflatten(1, (2, 4))[None] for part in (short @ project[0], short @ project[1], short @ project[2])
        ]
        agents = (torch.stack(means) @ project[0]).unflatten(1, (2, 4))[None]
        expected = truth(*rows, agents, around(Grid(1, 1, len(kept))), scale=0.5, scale2=4**-0.15, shortcut=0.075)
        for token in range(63):
            place = kept.index(gone.get(token, token))
            torch.testing.assert_close(out[sample, token], expected[0, place].flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_close_and_keeps_its_dtype(dtype):
    plan = plan_for(Grid(1, 40, 40), Grid(1, 1, 2), 1500)
    x = torch.randn(1, 1600, 8, dtype=torch.float64).to(dtype)
    found = match(x, plan, torch.tensor(5))
    # One of the two stands for more tokens than these types count in ones.
    assert found.members.sum(-1).max() > 256
    short = merge(x, found)
    agents = pool_matched(short.unflatten(2, (2, 4)), found, plan)
    assert short.dtype == agents.dtype == dtype
    exact = merge(x.double(), found)
    torch.testing.assert_close(short.double(), exact, atol=2e-2, rtol=2e-2)
    expected = pool_matched(exact.unflatten(2, (2, 4)), found, plan)
    torch.testing.assert_close(agents.double(), expected, atol=2e-2, rtol=2e-2)


def test_gradients_flow_through_merging():
    planner, layout = AgentConfig(4, source="merge", merge_ratio=0.3).planner(), around(Grid(1, 5, 5))
    plan = planner.plan(layout, layer=0, step=None, steps=None, heads=1, head_dim=4, device=CPU)
    x = torch.randn(1, 25, 4, dtype=torch.float64)

    def call(hidden):
        extras = Extras(None, None, "auto", None, {"block_input": x, "seed": torch.tensor(3), "rotary": None})
        short = planner.enter(hidden, plan, extras).unflatten(2, (1, 4))
        return planner.leave(planner.attend(short, short, short, plan, extras).flatten(2), plan, extras)

    assert torch.autograd.gradcheck(call, torch.randn(1, 25, 4, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("ratio", [0.0, 0.4])
def test_one_graph(ratio):
    planner, layout = AgentConfig(6, source="merge", merge_ratio=ratio).planner(), around(Grid(1, 7, 9))
    plan = planner.plan(layout, layer=0, step=None, steps=None, heads=2, head_dim=4, device=CPU)

    def call(hidden, x, seed):
        extras = Extras(None, None, "auto", None, {"block_input": x, "seed": seed, "rotary": None})
        short = planner.enter(hidden, plan, extras).unflatten(2, (2, 4))
        return planner.leave(planner.attend(short, short, short, plan, extras).flatten(2), plan, extras)

    hidden, x = torch.randn(2, 63, 8), torch.randn(2, 63, 8)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for seed in (1, 2**60):
        torch.testing.assert_close(compiled(hidden, x, torch.tensor(seed)), call(hidden, x, torch.tensor(seed)))


def test_an_input_of_another_length_is_refused():
    planner, layout = AgentConfig(4, source="merge").planner(), around(Grid(1, 5, 5))
    plan = planner.plan(layout, layer=0, step=None, steps=None, heads=1, head_dim=4, device=CPU)
    inputs = {"block_input": torch.zeros(1, 24, 4), "seed": torch.tensor(3), "rotary": None}
    with pytest.raises(InvalidInputError, match="this plan is for"):
        planner.enter(torch.zeros(1, 25, 4), plan, Extras(None, None, "auto", None, inputs))


# --- on a Wan pipeline, which has RoPE ---------------------------------------------------------------------------


def test_rope_turns_agents_to_their_destination():
    torch.manual_seed(0)
    model = tiny_wan(layers=1)
    fastdiff.apply(model, AgentConfig(12, source="merge", steps=(0.0, 1.0)))
    caught, planner = {}, find(model).planner
    attend = planner.attend

    def catching(q, k, v, plan, got):
        caught.update(q=q, k=k, v=v, plan=plan, **got.inputs, out=attend(q, k, v, plan, got))
        return caught["out"]

    planner.attend = catching
    forward(model)
    natural, (cos, sin), plan = caught["pre_rope_query"], caught["rotary"], caught["plan"]
    destinations = draw(caught["seed"], plan)
    agent, _ = slow_match(caught["block_input"][0], destinations.tolist(), 0)
    means = [natural[:, [token for token in agent if agent[token] == number]].mean(1) for number in range(plan.agents)]
    agents = rotate(torch.stack(means, 1), cos[destinations], sin[destinations])
    q, k, v, agents = (x.double() for x in (caught["q"], caught["k"], caught["v"], agents))
    expected = truth(q, k, v, agents, plan.spans.layout, scale=0.25, scale2=0.25**0.3, shortcut=0.075)
    torch.testing.assert_close(caught["out"].double(), expected, atol=1e-5, rtol=1e-4)


def test_tokens_with_positions_are_not_merged():
    pipe = tiny_wan_pipeline()
    fastdiff.apply(pipe, AgentConfig(12, source="merge", merge_ratio=0.2))
    with pytest.raises(UnsupportedError, match="merge_ratio=0"):
        video(pipe)


def test_apply_and_remove_on_wan_and_the_seed_is_the_generators():
    pipe = tiny_wan_pipeline()
    dense = video(pipe)
    fastdiff.apply(pipe, AgentConfig(12, source="merge"))
    first = video(pipe)
    assert not torch.allclose(first, dense, atol=1e-4)
    torch.manual_seed(99)
    assert torch.equal(video(pipe), first)
    assert not torch.equal(video(pipe, seed=1), first)
    fastdiff.remove(pipe)
    assert torch.equal(video(pipe), dense)
