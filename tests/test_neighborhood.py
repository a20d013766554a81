"""Neighborhood: the published semantics token by token, its shapes and presets, layouts, refusals."""

import logging
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.methods import NeighborhoodConfig, load_config
from fastdiff.methods.neighborhood_axis import neighborhood_axis
from fastdiff.methods.neighborhood_presets import neighborhood_presets
from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError
from fastdiff_kernels.reference import dense_mask


def window_of(query: int, length: int, width: int, stride: int, dilation: int, causal: bool) -> set[int]:
    """The keys of one query on one axis, as the papers define them, in plain Python."""
    group, place = query % dilation, query // dilation
    size = len(range(group, length, dilation))
    if causal:
        leader = min(place // stride * stride + stride - 1, size - 1)
        inside = range(max(leader - width + 1, 0), place + 1)
    else:
        leader = min(place // stride * stride + stride // 2, size - 1)
        start = min(max(leader - width // 2, 0), size - width)
        inside = range(start, start + width)
    return {group + dilation * i for i in inside}


def truth(grid: Grid, axes: list[tuple]) -> torch.Tensor:
    """The mask of a grid, bool `[tokens, tokens]`; axes are (width, stride, dilation, causal)."""
    lengths = (grid.frames, grid.height, grid.width)
    seen = []
    for length, setting in zip(lengths, axes, strict=True):
        mask = torch.zeros(length, length, dtype=torch.bool)
        for query in range(length):
            mask[query, sorted(window_of(query, length, *setting))] = True
        seen.append(mask)
    t, y, x = seen
    mask = t[:, None, None, :, None, None] & y[None, :, None, None, :, None] & x[None, None, :, None, None, :]
    return mask.reshape(grid.tokens, grid.tokens)


def counted_density(plan) -> float:
    """Area of the blocks in which any token sees any other / pairs of tokens."""
    blocks = 0
    for row in range(plan.query_blocks):
        seen = plan.slot_mask(0, row).unflatten(1, (-1, plan.key.block))
        blocks += int(seen.any(2).any(0).sum())
    return blocks * plan.query.block * plan.key.block / (plan.query_tokens * plan.key_tokens)


axis_settings = st.integers(1, 11).flatmap(
    lambda length: (
        st.just((1, 1, 1, 1, False))
        if length < 2
        else st.tuples(st.just(length), st.integers(1, length // 2)).flatmap(
            lambda pair: st.tuples(st.just(pair[0]), st.just(pair[1]), st.integers(2, pair[0] // pair[1])).flatmap(
                lambda triple: st.tuples(
                    st.just(triple[0]), st.just(triple[2]), st.integers(1, triple[2]), st.just(triple[1]), st.booleans()
                )
            )
        )
    )
)


@settings(max_examples=500, deadline=None)
@given(st.tuples(axis_settings, axis_settings, axis_settings), st.integers(0, 3), st.integers(0, 3))
def test_plan_equals_the_definition(axes, before, after):
    grid = Grid(*(axis[0] for axis in axes))
    columns = list(zip(*(axis[1:] for axis in axes), strict=True))
    window = tuple(max(2, width) for width in columns[0])
    config = NeighborhoodConfig(window, stride=columns[1], dilation=columns[2], causal=columns[3], block_size=32)
    layout = TokenLayout.self_attention(grid, text_before=before, text_after=after)
    expected = torch.ones(layout.query_tokens, layout.key_tokens, dtype=torch.bool)
    inner = slice(before, before + grid.tokens)
    expected[inner, inner] = truth(grid, [axis[1:] for axis in axes])
    plan = config.build_plan(layout)
    assert torch.equal(dense_mask(plan)[0], expected)
    assert plan.density() == counted_density(plan)


@pytest.mark.parametrize(("length", "width"), [(9, 4), (12, 5), (7, 7)])
def test_every_query_sees_exactly_its_window(length, width):
    axis = neighborhood_axis(length, width)
    assert (axis.last - axis.first + 1 == width).all()
    assert (axis.first <= torch.arange(length)).all()
    assert (torch.arange(length) <= axis.last).all()


def test_small_grids_are_clipped_with_a_warning_or_refused(caplog):
    grid = Grid(1, 5, 9)
    with caplog.at_level(logging.WARNING):
        axes = NeighborhoodConfig((7, 7, 7)).axes(grid)
    assert [len(axis.first) for axis in axes] == [1, 5, 9]
    assert (axes[1].last - axes[1].first + 1 == 5).all()
    assert "clipped" in caplog.text
    assert "frames" not in caplog.text
    with pytest.raises(InvalidInputError, match="height axis"):
        NeighborhoodConfig((7, 7, 7), small_grid="error").axes(grid)


def test_clipping_never_widens_a_window(caplog):
    own = NeighborhoodConfig((1, 4, 4), dilation=(8, 1, 1)).axis_settings(Grid(5, 8, 8))[0]
    assert (own.window, own.dilation) == (1, 5)
    assert "clipped" not in caplog.text
    thin = NeighborhoodConfig((2,), dilation=2).axis_settings(Grid(1, 1, 3))[2]
    assert (thin.window, thin.dilation) == (2, 1)


def test_a_window_is_solved_for_the_grid_that_is_also_its_base():
    grid = Grid(7, 16, 16)
    solved = NeighborhoodConfig.for_density(0.5, grid, base_grid="7X16X16")
    assert replace(solved, base_grid=None) == NeighborhoodConfig.for_density(0.5, grid)
    with pytest.raises(InvalidInputError, match="leave it out"):
        NeighborhoodConfig.for_density(0.5, grid, base_grid="7x16x17")


def test_a_clipped_window_is_told_once(caplog):
    config = NeighborhoodConfig((None, 47, 3))
    for text in range(3):
        config.build_plan(TokenLayout.self_attention(Grid(2, 6, 7), text_after=text))
    assert caplog.text.count("clipped to a window of 6") == 1


class TestBaseGrid:
    """Settings that grow and shrink with the grid, as in the code of Cosmos-Predict2."""

    CONFIG = NeighborhoodConfig((None, 12, 16), (1, 4, 1), (1, 1, 5), base_grid="24x44x80")

    def test_on_its_own_grid_nothing_changes(self):
        grid = Grid(24, 44, 80)
        plain = replace(self.CONFIG, base_grid=None)
        assert self.CONFIG.axis_settings(grid) == plain.axis_settings(grid)

    @pytest.mark.parametrize(
        ("grid", "height", "width"),
        [
            (Grid(20, 22, 40), (6, 2, 1), (8, 1, 2)),
            (Grid(24, 88, 80), (24, 8, 1), (16, 1, 5)),
            (Grid(2, 3, 5), (2, 1, 1), (2, 1, 1)),
            (Grid(24, 30, 52), (8, 3, 1), (10, 1, 3)),
        ],
        ids=str,
    )
    def test_on_others_it_is_scaled(self, grid, height, width, caplog):
        frames, *sides = self.CONFIG.axis_settings(grid)
        assert (frames.window, frames.length) == (None, grid.frames)
        assert [(side.window, side.stride, side.dilation) for side in sides] == [height, width]
        assert "clipped" not in caplog.text

    def test_a_window_of_one_stays(self):
        config = NeighborhoodConfig((1, None, 1), stride=(1, 2, 1), base_grid="2x4x4")
        assert [side.window for side in config.axis_settings(Grid(8, 16, 16))] == [1, None, 1]

    def test_json_and_bad_input(self):
        assert NeighborhoodConfig.from_dict(self.CONFIG.to_dict()) == self.CONFIG
        assert NeighborhoodConfig((3, 3), base_grid=Grid(1, 8, 9)).base_grid == "1x8x9"
        with pytest.raises(InvalidInputError, match="frames x height x width"):
            NeighborhoodConfig((3, 3), base_grid="8")
        with pytest.raises(InvalidInputError, match="solved for a grid of 3x8x8"):
            NeighborhoodConfig.for_density(0.5, Grid(3, 8, 8), base_grid="1x8x9")


def test_pictures_and_sequences_take_fewer_axes():
    assert NeighborhoodConfig((3, 5)).axes(Grid(1, 6, 7))[0].first.tolist() == [0]
    assert NeighborhoodConfig((3,)).axes(Grid(1, 1, 7))[2].last.tolist()[0] == 2
    with pytest.raises(InvalidInputError, match="one number for each axis"):
        NeighborhoodConfig((3, 5)).axes(Grid(2, 6, 7))
    whole = NeighborhoodConfig((None, 3, 3)).build_plan(TokenLayout.self_attention(Grid(4, 5, 6)))
    assert dense_mask(whole)[0][0].reshape(4, 5, 6)[:, 0, 0].all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"window": 5}, "1 to 3 numbers"),
        ({"window": ()}, "1 to 3 numbers"),
        ({"window": (0, 3)}, "from 1"),
        ({"window": (3, 2.5)}, "from 1"),
        ({"window": (3, 3), "stride": 4}, "stride 4 is larger"),
        ({"window": (3, 3), "stride": 0}, "stride is 0"),
        ({"window": (3, 3), "stride": (1, 1, 1)}, "stride is"),
        ({"window": (3, 3), "dilation": 0}, "dilation is 0"),
        ({"window": (3, 3), "causal": 1}, "causal is 1"),
        ({"window": (3, 3), "block_size": 48}, "block_size"),
        ({"window": (3, 3), "small_grid": "shrink"}, "small_grid"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(InvalidInputError, match=message):
        NeighborhoodConfig(**values)


class TestShapes:
    GRID = Grid(5, 6, 8)

    def seen(self, config, t, y, x) -> torch.Tensor:
        plan = config.build_plan(TokenLayout.self_attention(self.GRID))
        return plan.visible_keys((t * self.GRID.height + y) * self.GRID.width + x).reshape(5, 6, 8)

    def test_sliding(self):
        assert NeighborhoodConfig.sliding((3, 3, 5), causal=True) == NeighborhoodConfig((3, 3, 5), causal=True)

    def test_blocked(self):
        seen = self.seen(NeighborhoodConfig.blocked((None, 3, 4)), 2, 4, 1)
        assert seen[:, 3:6, 0:4].all()
        assert seen.sum() == 5 * 3 * 4

    def test_tiled(self):
        # The tile of the query and its neighbours; at the border the tiles shift inwards.
        seen = self.seen(NeighborhoodConfig.tiled((None, 2, 2), (1, 3, 3)), 0, 5, 4)
        assert seen[:, 0:6, 2:8].all()
        assert seen.sum() == 5 * 6 * 6
        assert NeighborhoodConfig.tiled((6, 8, 8)) == NeighborhoodConfig((18, 24, 24), stride=(6, 8, 8))

    @pytest.mark.parametrize(("axis", "place"), [("frames", 0), ("height", 1), ("width", 2)])
    def test_axial(self, axis, place):
        seen = self.seen(NeighborhoodConfig.axial(axis), 1, 2, 3)
        line = [slice(None) if other == place else index for other, index in enumerate((1, 2, 3))]
        assert seen[tuple(line)].all()
        assert seen.sum() == seen.shape[place]

    def test_dilated(self):
        with pytest.raises(InvalidInputError, match="window"):
            NeighborhoodConfig.dilated((3, 3, 3, 3), self.GRID)
        config = NeighborhoodConfig.dilated((None, 3, 2), self.GRID)
        assert config.dilation == (1, 2, 4)
        seen = self.seen(config, 0, 3, 6)
        assert seen.sum() == 5 * 3 * 2
        assert seen[:, 1::2, 2::4].all()

    def test_a_whole_axis_with_dilation_is_all_of_its_group(self):
        seen = self.seen(NeighborhoodConfig((1, None, 1), dilation=(1, 4, 1)), 2, 4, 0)
        assert seen.nonzero().tolist() == [[2, 0, 0], [2, 4, 0]]

    @pytest.mark.parametrize(
        ("shape", "arguments"),
        [("tiled", ((4, 4), 0)), ("tiled", ((4, 4), (3,))), ("axial", ("depth",)), ("blocked", ((0, 4),))],
    )
    def test_bad_shapes_are_refused(self, shape, arguments):
        with pytest.raises(InvalidInputError):
            getattr(NeighborhoodConfig, shape)(*arguments)


class TestPresets:
    @pytest.mark.parametrize("name", neighborhood_presets())
    def test_fit_their_grid_exactly(self, name):
        preset = neighborhood_presets()[name]
        axes = replace(preset.config, small_grid="error").axes(preset.grid)
        assert [len(axis.first) for axis in axes] == [preset.grid.frames, preset.grid.height, preset.grid.width]

    def test_by_name(self):
        config = NeighborhoodConfig.preset("hunyuanvideo-18x24x24-s16x8x8", block_size=64)
        assert config == NeighborhoodConfig((18, 24, 24), stride=(16, 8, 8), block_size=64)
        with pytest.raises(InvalidInputError, match="flux-4k-80x80-s16x16"):
            NeighborhoodConfig.preset("hunyuan")

    def test_in_json(self):
        config = load_config({"method": "neighborhood", "preset": "flux-4k-80x80-s16x1", "block_size": 64})
        assert config == NeighborhoodConfig((80, 80), stride=(16, 1), block_size=64)
        assert load_config(config.to_json()) == config
        with pytest.raises(InvalidInputError, match="no preset"):
            load_config({"preset": ["x"]}, "neighborhood")


class TestLayouts:
    GRID = Grid(3, 5, 6)
    CONFIG = NeighborhoodConfig((3, 3, 3), block_size=32)

    @pytest.mark.parametrize("other", [Grid(3, 5, 6), Grid(1, 9, 11), Grid(1, 2, 2)], ids=str)
    def test_reference_pictures_are_seen_whole(self, other):
        spans = (Span("text", 5), Span("grid", 90, self.GRID), Span("reference", other.tokens, other), Span("text", 2))
        plan = self.CONFIG.build_plan(TokenLayout(spans, spans))
        mask = dense_mask(plan)[0]
        expected = torch.ones_like(mask)
        expected[5:95, 5:95] = truth(self.GRID, [(3, 1, 1, False)] * 3)
        assert torch.equal(mask, expected)

    def test_unlike_grids_are_refused(self):
        query, key = Span("grid", 90, self.GRID), Span("grid", 60, Grid(2, 5, 6))
        with pytest.raises(UnsupportedError, match="one grid for queries and keys"):
            self.CONFIG.build_plan(TokenLayout((query,), (key,)))


@pytest.mark.parametrize("grid", [Grid(17, 16, 16), Grid(1, 33, 40), Grid(9, 17, 23)], ids=str)
def test_for_density_comes_from_below(grid):
    config = NeighborhoodConfig.for_density(0.5, grid, block_size=32)
    layout = TokenLayout.self_attention(grid)
    assert config.build_plan(layout).density() <= 0.5
    with pytest.raises(InvalidInputError, match="below the floor of neighborhood"):
        NeighborhoodConfig.for_density(0.001, grid)


def test_for_density_keeps_stride_and_dilation():
    config = NeighborhoodConfig.for_density(0.5, Grid(9, 17, 23), stride=(1, 4, 4), dilation=(1, 1, 2), block_size=32)
    assert config.stride == (1, 4, 4)
    assert config.window[1] >= 4
    assert 4 <= config.window[2] <= 23 // 2


def test_window_has_no_default():
    with pytest.raises(InvalidInputError, match="no default for window"):
        load_config({}, "neighborhood")


def test_config_travels_as_json():
    config = NeighborhoodConfig((18, 24, None), stride=(2, 8, 8), causal=(True, False, False))
    assert load_config(config.to_json()) == config
    assert hash(load_config(config.to_json())) == hash(config)
