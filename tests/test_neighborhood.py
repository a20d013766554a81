"""Neighborhood: the published semantics token by token, the published bounds, tiles, refusals."""

import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.methods import NeighborhoodConfig, load_config
from fastdiff.methods.neighborhood_axis import neighborhood_axis
from fastdiff_kernels import Grid, InvalidInputError, TokenLayout
from fastdiff_kernels.box import choose_tile, simulate
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
    assert torch.equal(dense_mask(config.build_plan(layout))[0], expected)


@pytest.mark.parametrize(("length", "width"), [(9, 4), (12, 5), (7, 7)])
def test_every_query_sees_exactly_its_window(length, width):
    axis = neighborhood_axis(length, width)
    assert (axis.last - axis.first + 1 == width).all()
    assert (axis.first <= torch.arange(length)).all()
    assert (torch.arange(length) <= axis.last).all()


def axes_of(lengths, windows, strides):
    return tuple(neighborhood_axis(*axis) for axis in zip(lengths, windows, strides, strict=True))


HUNYUAN, FLUX, COSMOS = (30, 48, 80), (1, 256, 256), (16, 44, 80)


@pytest.mark.parametrize(
    ("lengths", "window", "stride", "query_tile", "key_tile", "bound"),
    [
        (HUNYUAN, (18, 24, 24), (1, 1, 1), (4, 8, 8), (2, 8, 8), 3.27),
        (HUNYUAN, (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 11.11),
        (FLUX, (1, 80, 80), (1, 1, 1), (1, 16, 16), (1, 16, 8), 6.1),
        (FLUX, (1, 80, 80), (1, 16, 1), (1, 16, 16), (1, 16, 8), 8.53),
        (FLUX, (1, 80, 80), (1, 16, 16), (1, 16, 16), (1, 16, 8), 10.24),
    ],
)
def test_published_bounds(lengths, window, stride, query_tile, key_tile, bound):
    found = simulate(axes_of(lengths, window, stride), query_tile, key_tile)
    assert found.bound == pytest.approx(bound, abs=0.05)


@pytest.mark.parametrize(
    ("lengths", "window", "stride", "tiles", "share", "published"),
    [
        (COSMOS, (16, 24, 16), (1, 1, 1), ((8, 4, 8), (4, 4, 8)), 0.587, 1.90),
        (COSMOS, (16, 24, 16), (1, 8, 1), ((8, 4, 8), (4, 4, 8)), 0.587, 1.96),
        (COSMOS, (16, 24, 16), (1, 1, 16), ((8, 4, 8), (4, 4, 8)), 0.587, 2.05),
        (COSMOS, (16, 24, 16), (1, 8, 16), ((8, 4, 8), (4, 4, 8)), 0.587, 2.10),
        (HUNYUAN, (18, 24, 24), (1, 1, 1), ((4, 8, 8), (2, 8, 8)), 0.607, 1.73),
        (HUNYUAN, (18, 24, 24), (16, 8, 8), ((4, 8, 8), (2, 8, 8)), 0.607, 2.23),
        (FLUX, (1, 80, 80), (1, 1, 1), ((1, 16, 16), (1, 16, 8)), 0.518, 1.76),
        (FLUX, (1, 80, 80), (1, 16, 16), ((1, 16, 16), (1, 16, 8)), 0.518, 1.88),
    ],
)
def test_published_end_to_end_bounds(lengths, window, stride, tiles, share, published):
    found = simulate(axes_of(lengths, window, stride), *tiles)
    assert found.end_to_end(share) == pytest.approx(published, abs=0.006)


def test_simulated_density_is_that_of_the_plan():
    config = NeighborhoodConfig((5, 7, 9), stride=(1, 2, 3))
    grid = Grid(8, 12, 16)
    axes = config.axes(grid)
    tile = choose_tile(axes, 128)
    plan = config.build_plan(TokenLayout.self_attention(grid))
    slots = plan.query.slots
    assert plan.density() == pytest.approx(simulate(axes, tile, tile).visited_density * (slots / grid.tokens) ** 2)


def test_chosen_tile_is_the_cheapest():
    axes = NeighborhoodConfig((21, 24, 24), stride=(1, 8, 8)).axes(Grid(21, 45, 80))
    config = NeighborhoodConfig((21, 24, 24), stride=(1, 8, 8))
    layout = TokenLayout.self_attention(Grid(21, 45, 80))
    chosen = config.build_plan(layout).density()
    for tile in itertools.islice(itertools.permutations((4, 4, 8)), 6):
        slots = 1
        for axis, side in zip(axes, tile, strict=True):
            slots *= axis.slots(side).numel()
        assert chosen <= simulate(axes, tile, tile).visited_density * (slots / layout.query_tokens) ** 2 + 1e-9


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


@pytest.mark.parametrize("grid", [Grid(17, 16, 16), Grid(1, 33, 40), Grid(9, 17, 23)], ids=str)
def test_for_density_comes_from_below(grid):
    config = NeighborhoodConfig.for_density(0.5, grid, block_size=32)
    layout = TokenLayout.self_attention(grid)
    assert config.build_plan(layout).density() <= 0.5
    with pytest.raises(InvalidInputError, match="below the floor of neighborhood"):
        NeighborhoodConfig.for_density(0.001, grid)


def test_window_has_no_default():
    with pytest.raises(InvalidInputError, match="no default for window"):
        load_config({}, "neighborhood")


def test_config_travels_as_json():
    config = NeighborhoodConfig((18, 24, None), stride=(2, 8, 8), causal=(True, False, False))
    assert load_config(config.to_json()) == config
    assert hash(load_config(config.to_json())) == hash(config)
