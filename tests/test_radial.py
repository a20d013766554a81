"""Radial: the released code's block counts, our modes block by block, the solver, JSON, refusals."""

import json
import pickle
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.methods import METHODS, AgentConfig, ClearConfig, NeighborhoodConfig, RadialConfig, load_config
from fastdiff.methods.planner import PlanCache, Planner
from fastdiff.methods.radial import disc_limits
from fastdiff.methods.radial_reference import block_mask
from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError, attention
from fastdiff_kernels.reference import dense_mask

# The published block counts: grid, settings, active blocks, and those in the first, the middle and the last row.
RELEASED = [
    (Grid(18, 48, 80), {"decay_factor": 0.2}, 83_728, (92, 148, 120)),
    (Grid(18, 48, 80), {"decay_factor": 0.2, "near_width": 0.5}, 76_798, (78, 120, 106)),
    (Grid(18, 48, 80), {}, 125_656, (126, 202, 154)),
    (Grid(20, 48, 80), {"decay_factor": 0.8, "block_size": 64}, 502_720, (214, 364, 272)),
    (Grid(30, 48, 80), {"decay_factor": 0.95, "sink": False}, 222_452, (144, 199, 144)),
    (Grid(21, 36, 64), {"decay_factor": 0.2}, 44_692, (74, 123, 90)),
    (Grid(128, 45, 80), {}, 1_506_926, (218, 373, 247)),
    (Grid(8, 16, 16), {}, 232, (12, 16, 14)),
]
ODD_GRIDS = [Grid(5, 7, 9), Grid(9, 17, 23), Grid(1, 8, 9), Grid(2, 3, 50), Grid(33, 4, 5), Grid(12, 1, 1)]


@pytest.mark.parametrize(("grid", "settings", "blocks", "rows"), RELEASED, ids=str)
def test_reference_mode_has_the_released_blocks(grid, settings, blocks, rows):
    mask = block_mask(RadialConfig(mode="reference", **settings), grid)
    counts = mask.sum(1)
    assert int(mask.sum()) == blocks
    assert (int(counts[0]), int(counts[len(counts) // 2]), int(counts[-1])) == rows


def test_reference_mode_rounds_as_the_slow_definition():
    """Frames that do not fit blocks, drawn token by token as the released code does."""
    config, grid = RadialConfig(mode="reference", block_size=32, decay_factor=0.5), Grid(5, 7, 11)
    tokens, block = grid.frame_tokens, 32
    slow = torch.zeros(grid.tokens // block, grid.tokens // block, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            d = abs(i - j)
            width = tokens if d < 2 or j == 0 else max(0.5 * 2 ** tokens.bit_length() / 2 ** d.bit_length(), block)
            if d > 1 and j and d % int(max(1, 128 // (2 ** tokens.bit_length() / 2 ** d.bit_length()))):
                continue
            top, left = i * tokens % block, j * tokens % block
            side = -(-tokens // block) * block
            canvas = torch.zeros(side + top, side + left)
            for k in range(tokens):
                for m in range(tokens):
                    canvas[top + k, left + m] = abs(k - m) <= width
            for a in range(side // block):
                for b in range(side // block):
                    row, column = i * tokens // block + a, j * tokens // block + b
                    share = canvas[a * block : (a + 1) * block, b * block : (b + 1) * block].mean(0)
                    some, many = int((share > 0).sum()), int((share > 1 / 3).sum())
                    if some and many / some > 0.6 and max(row, column) < len(slow):
                        slow[row, column] = True
    assert torch.equal(block_mask(config, grid), slow)


def test_reference_plan_is_those_blocks_and_a_dense_rest():
    config, grid = RadialConfig(mode="reference", decay_factor=0.3, block_size=32), Grid(7, 9, 11)
    for text in (0, 13):
        layout = TokenLayout.self_attention(grid, text_after=text)
        mask = dense_mask(config.build_plan(layout))[0]
        inner = grid.tokens // 32 * 32
        expected = torch.ones_like(mask)
        blocks = block_mask(config, grid).repeat_interleave(32, 0).repeat_interleave(32, 1)
        expected[:inner, :inner] = blocks
        assert torch.equal(mask, expected)


def slow_mask(config, layout, plan, before):
    """Whole blocks, by the distance between block centres, written with loops; bool `[queries, keys]`."""
    grid = layout.grid
    widths = config.widths(grid)
    limits, widths = disc_limits(grid, widths).tolist(), widths.tolist()
    order = plan.query.order[0].reshape(-1, plan.query.block)
    blocks = [[t - before for t in row.tolist() if t >= 0] for row in order]
    blocks = [row for row in blocks if 0 <= row[0] < grid.tokens]

    def centre(tokens):
        frame = tokens[0] // grid.frame_tokens
        inside = [t - frame * grid.frame_tokens for t in tokens]
        assert all(0 <= t < grid.frame_tokens for t in inside)  # no block crosses a frame
        if config.mode == "raster":
            return frame, (min(inside) + max(inside)) // 2, 0
        ys, xs = [t // grid.width for t in inside], [t % grid.width for t in inside]
        return frame, (min(ys) + max(ys)) // 2, (min(xs) + max(xs)) // 2

    places = [centre(row) for row in blocks]
    expected = torch.ones(layout.query_tokens, layout.key_tokens, dtype=torch.bool)
    for row, (i, y, x) in zip(blocks, places, strict=True):
        for column, (j, v, u) in zip(blocks, places, strict=True):
            d = abs(i - j)
            near = (y - v) ** 2 + (x - u) ** 2 < limits[d] if config.mode == "tiled" else abs(y - v) < widths[d]
            seen = near or (config.sink and j == 0)
            expected[torch.tensor(row)[:, None] + before, torch.tensor(column)[None] + before] = seen
    return expected


@pytest.mark.parametrize("mode", ["tiled", "raster"])
@pytest.mark.parametrize("grid", ODD_GRIDS, ids=str)
@pytest.mark.parametrize("sink", [True, False])
def test_improved_modes_equal_the_definition_block_by_block(grid, mode, sink):
    config = RadialConfig(decay_factor=0.4, near_width=0.5, sink=sink, mode=mode, block_size=32)
    layout = TokenLayout.self_attention(grid, text_before=3, text_after=2)
    plan = config.build_plan(layout)
    assert torch.equal(dense_mask(plan)[0], slow_mask(config, layout, plan, 3))


@settings(max_examples=500, deadline=None)
@given(
    st.builds(Grid, st.integers(1, 7), st.integers(1, 9), st.integers(1, 9)),
    st.builds(
        RadialConfig,
        decay_factor=st.floats(0, 1),
        near_width=st.floats(0, 1),
        sink=st.booleans(),
        block_size=st.sampled_from([32, 64]),
        mode=st.sampled_from(["tiled", "raster"]),
    ),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_random_plans_equal_the_definition_and_their_density_a_count(grid, config, before, after):
    layout = TokenLayout.self_attention(grid, text_before=before, text_after=after)
    plan = config.build_plan(layout)
    mask = dense_mask(plan)[0]
    assert torch.equal(mask, slow_mask(config, layout, plan, before))
    order, block = plan.query.order[0].long(), plan.query.block
    slots = torch.zeros(len(order), len(order), dtype=torch.bool)
    there = (order >= 0).nonzero().flatten()
    slots[there[:, None], there] = mask[order[there]][:, order[there]]
    tiles = slots.unflatten(0, (-1, block)).unflatten(2, (-1, block)).any(3).any(1).sum()
    assert plan.density() == pytest.approx(int(tiles) * block**2 / (layout.query_tokens * layout.key_tokens))


@pytest.mark.parametrize("mode", ["tiled", "raster"])
@pytest.mark.parametrize("grid", ODD_GRIDS, ids=str)
def test_improved_modes_never_leave_a_row_empty(grid, mode):
    config = RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, mode=mode)
    mask = dense_mask(config.build_plan(TokenLayout.self_attention(grid)))[0]
    assert mask.diagonal().all()


def test_discs_hold_as_many_pairs_as_bands():
    grid = Grid(9, 13, 22)
    config = RadialConfig(decay_factor=0.5)
    widths = config.widths(grid)
    y, x = grid.coordinates()[: grid.frame_tokens, 1:].unbind(1)
    squares = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2
    raster = torch.arange(grid.frame_tokens)
    for width, limit in zip(widths.tolist(), disc_limits(grid, widths).tolist(), strict=True):
        if width < 0:
            assert limit < 0
            continue
        band = int(((raster[:, None] - raster).abs() < width).sum())
        assert int((squares < limit).sum()) >= band
        assert int((squares < limit - 1).sum()) < band or limit == 1


def test_a_long_thin_frame_takes_no_memory_of_its_squares():
    limits = disc_limits(Grid(2, 1, 40_000), torch.tensor([40_000, 20_000]))
    assert limits.tolist() == [39_999**2 + 1, 19_999**2 + 1]
    with pytest.raises(InvalidInputError, match="46340 tokens at most"):
        RadialConfig().build_plan(TokenLayout.self_attention(Grid(1, 1, 100_000)))


def test_width_does_not_jump_where_a_frame_passes_a_power_of_two():
    widths = [RadialConfig(decay_factor=0.5).widths(Grid(8, 1, tokens))[4].item() for tokens in (2047, 2048, 2049)]
    assert max(widths) - min(widths) <= 1


def test_smaller_settings_are_faster():
    layout = TokenLayout.self_attention(Grid(21, 30, 52))
    densities = [RadialConfig(decay_factor=d).build_plan(layout).density() for d in (0.1, 0.3, 1.0)]
    assert densities == sorted(densities)
    assert RadialConfig(sink=False).build_plan(layout).density() < densities[-1]
    assert RadialConfig(near_width=0.3).build_plan(layout).density() < densities[-1]


def test_reference_rows_without_keys_are_zero():
    """The released rounding drops blocks at frame borders; a row may stay empty and must give zeros."""
    config = RadialConfig(mode="reference", sink=False, decay_factor=0.0, near_width=0.0, block_size=32)
    plan = config.build_plan(TokenLayout.self_attention(Grid(6, 3, 11)))
    empty = ~dense_mask(plan)[0].any(-1)
    q, k, v = (torch.randn(1, plan.query_tokens, 1, 16) for _ in range(3))
    for backend in ("torch", "reference"):
        out = attention(q, k, v, plan, backend=backend)
        assert out.isfinite().all()
        assert (out[0, empty] == 0).all()


def test_plan_for_720p_takes_milliseconds():
    layout = TokenLayout.self_attention(Grid(21, 45, 80))
    RadialConfig().build_plan(layout)
    start = time.perf_counter()
    plan = RadialConfig(decay_factor=0.2).build_plan(layout)
    assert time.perf_counter() - start < 1
    assert 0.25 < plan.density() < 0.28


@pytest.mark.parametrize("grid", [Grid(21, 45, 80), Grid(13, 16, 16), Grid(31, 22, 40)], ids=str)
@pytest.mark.parametrize("density", [0.25, 0.4])
def test_for_density_comes_close_from_below(grid, density):
    config = RadialConfig.for_density(density, grid)
    reached = config.build_plan(TokenLayout.self_attention(grid)).density()
    assert density * 0.8 < reached <= density


def test_for_density_gives_up_decay_then_near_width_then_sink():
    grid = Grid(21, 45, 80)
    assert RadialConfig.for_density(0.35, grid).near_width == 1.0
    narrow = RadialConfig.for_density(0.2, grid)
    assert (narrow.decay_factor, narrow.sink) == (0.0, True)
    assert narrow.near_width < 1
    assert not RadialConfig.for_density(0.3, Grid(9, 16, 16)).sink
    assert not RadialConfig.for_density(0.9, grid, sink=False).sink


def test_for_density_names_the_floor():
    with pytest.raises(InvalidInputError, match=r"floor of radial on a grid of 9x16x16, which is 0\.2"):
        RadialConfig.for_density(0.05, Grid(9, 16, 16))
    for bad in (0, -1, 1.5, "0.3", True):
        with pytest.raises(InvalidInputError, match="density is"):
            RadialConfig.for_density(bad, Grid(9, 16, 16))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (RadialConfig, {"near_width": 0.5}),
        (RadialConfig, {"decay_factor": 0.5}),
        (NeighborhoodConfig, {"window": (3, 3, 3)}),
        (AgentConfig, {"agents": 3}),
    ],
)
def test_what_a_density_is_solved_for_is_not_given(kind, given):
    with pytest.raises(InvalidInputError, match=f"{next(iter(given))} is what a density is solved for"):
        kind.for_density(0.5, Grid(9, 16, 16), **given)


@pytest.mark.parametrize("kind", [RadialConfig, NeighborhoodConfig, ClearConfig])
def test_a_floor_above_that_of_dense_attention_is_not_to_be_asked_for(kind):
    with pytest.raises(InvalidInputError, match=r"which is [\d.]+ with .*; dense attention computes less; use "):
        kind.for_density(0.5, Grid(2 if kind is RadialConfig else 1, 5, 5))


@pytest.mark.parametrize("kind", [RadialConfig, NeighborhoodConfig, ClearConfig])
def test_smaller_blocks_are_advised_where_there_are_any(kind):
    grid = Grid(2 if kind is RadialConfig else 1, 70, 70)
    with pytest.raises(InvalidInputError, match="a smaller block_size"):
        kind.for_density(0.001, grid, block_size=64)
    with pytest.raises(InvalidInputError, match="use .*more tokens"):
        kind.for_density(0.001, grid, block_size=32)


def test_radial_is_not_for_pictures():
    with pytest.raises(InvalidInputError, match="radial leaves out nothing within a frame: take neighborhood"):
        RadialConfig.for_density(0.5, Grid(1, 64, 64))


@pytest.mark.parametrize(
    "settings",
    [
        {"decay_factor": -0.1},
        {"decay_factor": 1.1},
        {"decay_factor": "0.2"},
        {"decay_factor": True},
        {"decay_factor": float("nan")},
        {"near_width": 2},
        {"sink": 1},
        {"block_size": 100},
        {"block_size": 128.0},
        {"mode": "fast"},
    ],
)
def test_values_out_of_range_are_refused(settings):
    with pytest.raises(InvalidInputError, match=next(iter(settings))):
        RadialConfig(**settings)


def test_layouts_that_cannot_be_are_refused():
    with pytest.raises(UnsupportedError, match="video before text"):
        RadialConfig(mode="reference").build_plan(TokenLayout.self_attention(Grid(2, 8, 8), text_before=3))
    spans = (Span("grid", 128, Grid(2, 8, 8)), Span("text", 3))
    with pytest.raises(UnsupportedError, match="all see the text"):
        RadialConfig(mode="reference").build_plan(TokenLayout(spans, spans, (("rule", "none"), ("all", "all"))))
    with pytest.raises(InvalidInputError, match="Use mode 'tiled'"):
        RadialConfig(mode="raster").build_plan(TokenLayout.self_attention(Grid(2, 300, 300)))


def test_config_travels_as_json(tmp_path):
    config = RadialConfig(decay_factor=0.2, sink=False, mode="raster")
    assert json.loads(config.to_json())["method"] == "radial"
    path = tmp_path / "radial.json"
    path.write_text(config.to_json())
    marked = tmp_path / "marked.json"
    marked.write_text(config.to_json(), encoding="utf-8-sig")
    for source in (config, config.to_dict(), config.to_json(), path, str(path), marked):
        assert load_config(source) == config
    assert load_config({"decay_factor": 0.5}, method="radial") == RadialConfig(decay_factor=0.5)
    assert METHODS["radial"] is RadialConfig


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"method": "radial", "decay": 0.2}, "no setting 'decay'"),
        ({"method": "nothing"}, "allowed are radial"),
        ({"decay_factor": 0.2}, "names no method"),
        ({"method": "radial", "version": 99}, "version 99"),
        ("{", "no valid JSON"),
        ("[1]", "must be a JSON object"),
        (" ", "is empty"),
        ("a\0b", "cannot be read"),
        pytest.param('{"decay_factor": ' + "9" * 5000 + "}", "no valid JSON", id="5000 digits"),
        pytest.param('{"a":' * 100_000, "no valid JSON", id="deep"),
        ("missing.json", "cannot be read"),
        ({"method": ["radial"]}, "allowed are radial"),
        (None, "config is None"),
        (RadialConfig, "config is <class"),
        (["radial"], "config is"),
    ],
)
def test_bad_configs_are_refused(source, message):
    with pytest.raises(InvalidInputError, match=message):
        load_config(source)


def test_planner_shares_plans_and_forgets_the_oldest():
    config, layout = RadialConfig(), TokenLayout.self_attention(Grid(4, 5, 6))
    call = {"step": 0, "steps": 10, "heads": 2, "head_dim": 16, "device": torch.device("cpu")}
    planner = Planner(config, PlanCache())
    first = planner.plan(layout, layer=0, **call)
    assert planner.plan(layout, layer=7, **call) is first
    cache = PlanCache(limit_bytes=1)
    planner = Planner(config, cache)
    first = planner.plan(layout, layer=0, **call)
    assert pickle.loads(pickle.dumps(planner)).config == config
    other = planner.plan(TokenLayout.self_attention(Grid(4, 6, 6)), layer=0, **call)
    assert planner.plan(layout, layer=0, **call) is not first
    assert other.query_tokens == 144
