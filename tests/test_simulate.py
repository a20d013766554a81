"""The simulator: the published bounds and densities, and the search for strides."""

import itertools
import math

import pytest

from fastdiff.methods import NeighborhoodConfig
from fastdiff.methods.neighborhood_presets import neighborhood_presets
from fastdiff.methods.neighborhood_search import default_tiles, search, tiles_of
from fastdiff_kernels import Grid, simulate

HUNYUAN, FLUX = Grid(30, 48, 80), Grid(1, 256, 256)
WAN, COG = Grid(21, 45, 80), Grid(13, 30, 45)
PRESETS = neighborhood_presets()


def simulated(grid, window, stride, query_tile, key_tile):
    return simulate(NeighborhoodConfig(window, stride=stride).axes(grid), query_tile, key_tile)


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("hunyuanvideo-18x24x24-s1", 3.27),
        ("hunyuanvideo-18x24x24-s16x8x8", 11.11),
        ("flux-4k-80x80-s1", 6.1),
        ("flux-4k-80x80-s16x1", 8.53),
        ("flux-4k-80x80-s16x16", 10.24),
    ],
)
def test_published_bounds(name, bound):
    preset = PRESETS[name]
    found = simulate(preset.config.axes(preset.grid), preset.query_tile, preset.key_tile)
    assert found.bound == pytest.approx(bound, abs=0.05)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("cosmos-16x24x16-s1", 1.90),
        ("cosmos-16x24x16-s1x8x1", 1.96),
        ("cosmos-16x24x16-s1x1x16", 2.05),
        ("cosmos-16x24x16-s1x8x16", 2.10),
        ("hunyuanvideo-18x24x24-s1", 1.73),
        ("hunyuanvideo-18x24x24-s16x8x8", 2.23),
        ("hunyuanvideo-30x40x40-s1x32x8", 1.55),
        ("flux-4k-80x80-s1", 1.76),
        ("flux-4k-80x80-s16x1", 1.84),
        ("flux-4k-80x80-s16x16", 1.88),
    ],
)
def test_published_end_to_end_bounds(name, published):
    preset = PRESETS[name]
    found = simulate(preset.config.axes(preset.grid), preset.query_tile, preset.key_tile)
    assert found.end_to_end(preset.attention_share) == pytest.approx(published, abs=0.006)


@pytest.mark.parametrize("name", PRESETS)
def test_no_published_run_was_faster_than_its_bound(name):
    preset = PRESETS[name]
    found = simulate(preset.config.axes(preset.grid), preset.query_tile, preset.key_tile)
    assert preset.speedup <= found.end_to_end(preset.attention_share) + 0.005
    assert found.bound <= found.flop_bound * (1 + 1e-9)


def test_one_published_stride_is_explained_by_its_tiles():
    stride = (1, 32, 8)
    assert simulated(HUNYUAN, (30, 40, 40), stride, (2, 16, 8), (2, 8, 8)).perfect
    assert simulated(HUNYUAN, (30, 40, 40), (1, 8, 8), (4, 8, 8), (2, 8, 8)).perfect
    assert not simulated(HUNYUAN, (30, 40, 40), (1, 8, 8), (2, 16, 8), (2, 8, 8)).perfect


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tiles", "true", "visited", "worst", "full"),
    [
        (HUNYUAN, (18, 24, 24), 1, ((4, 8, 8), (2, 8, 8)), 0.090, 0.191, 0.306, 15),
        (HUNYUAN, (30, 40, 40), 1, ((4, 8, 8), (2, 8, 8)), 0.417, 0.533, 0.700, 58),
        (FLUX, (80, 80), 1, ((1, 16, 16), (1, 16, 8)), 0.098, 0.142, 0.164, 43),
        (WAN, (21, 24, 24), 1, ((4, 4, 8), (4, 4, 8)), 0.160, 0.248, 0.292, 30),
        (WAN, (21, 24, 24), (1, 8, 8), ((4, 4, 8), (4, 4, 8)), 0.160, 0.158, 0.175, 95),
        (WAN, (21, 24, 40), (1, 8, 8), ((4, 4, 8), (4, 4, 8)), 0.267, 0.264, 0.292, 95),
        (COG, (13, 16, 24), (1, 8, 8), ((4, 4, 8), (4, 4, 8)), 0.284, 0.295, 0.417, 85),
        (COG, (13, 16, 24), (1, 8, 8), ((2, 8, 8), (2, 8, 8)), 0.284, 0.382, 0.500, 49),
    ],
)
def test_densities_of_tiles(grid, window, stride, tiles, true, visited, worst, full):
    found = simulated(grid, window, stride, *tiles)
    assert found.true_density == pytest.approx(true, abs=6e-4)
    assert found.visited_density == pytest.approx(visited, abs=6e-4)
    assert found.worst_density == pytest.approx(worst, abs=6e-4)
    assert 100 * found.full_share == pytest.approx(full, abs=0.5)
    assert found.padding == pytest.approx(padding(grid, *tiles))


def padding(grid, query_tile, key_tile):
    slots = 1.0
    for tile in (query_tile, key_tile):
        for length, side in zip((grid.frames, grid.height, grid.width), tile, strict=True):
            slots *= -(-length // side) * side / length
    return slots


@pytest.mark.parametrize("setting", [{}, {"causal": (True, False, True)}, {"dilation": (1, 2, 3)}], ids=str)
def test_counts_are_those_of_the_mask(setting):
    """Tiles counted pair by pair from what single tokens see."""
    grid, query_tile, key_tile = Grid(5, 7, 9), (2, 4, 4), (2, 2, 4)
    axes = NeighborhoodConfig((3, 3, 3), stride=(1, 2, 3), **setting).axes(grid)
    found = simulate(axes, query_tile, key_tile)
    rows, true, full, visited = [1.0], 1.0, 1.0, 1.0
    for axis, q_side, k_side in zip(axes, query_tile, key_tile, strict=True):
        tiles = [[[i for i in tile if i >= 0] for tile in axis.slots(side).tolist()] for side in (q_side, k_side)]
        sees = [range(int(low), int(high) + 1) for low, high in zip(axis.first, axis.last, strict=True)]
        touched = [[any(k in sees[q] for q in a for k in b) for b in tiles[1]] for a in tiles[0]]
        whole = [[all(k in sees[q] for q in a for k in b) for b in tiles[1]] for a in tiles[0]]
        rows = [row * sum(line) / len(line) for row, line in itertools.product(rows, touched)]
        true *= sum(map(len, sees)) / len(sees) ** 2
        visited *= sum(map(sum, touched)) / (len(touched) * len(touched[0]))
        full *= sum(map(sum, whole)) / sum(map(sum, touched))
    assert found.worst_density == pytest.approx(max(rows))
    assert found.visited_density == pytest.approx(visited)
    assert found.true_density == pytest.approx(true)
    assert found.full_share == pytest.approx(full)


class TestSearch:
    def test_finds_the_published_strides(self):
        tiles = default_tiles(HUNYUAN)
        assert tiles == ((4, 8, 8), (2, 8, 8))
        found = search(NeighborhoodConfig((18, 24, 24)), HUNYUAN, [tiles[0]], [tiles[1]])
        published = [preset.config.stride for name, preset in PRESETS.items() if name.startswith("hunyuanvideo-18")]
        assert [entry.stride for entry in found] == published

    def test_every_entry_raises_the_bound(self):
        grid = Grid(9, 17, 23)
        config = NeighborhoodConfig((5, 8, 8), stride=5)
        found = search(config, grid, tiles_of(32, grid), tiles_of(16, grid))
        gains = [entry.simulation.bound / entry.simulation.padding for entry in found]
        assert len(found) > 2
        assert gains == sorted(set(gains))
        assert found[0].stride == (1, 1, 1)
        for entry in found:
            assert simulated(grid, (5, 8, 8), entry.stride, entry.query_tile, entry.key_tile) == entry.simulation

    def test_nothing_on_a_small_grid_beats_the_best_of_all_strides_and_tiles(self):
        grid = Grid(1, 9, 12)
        found = search(NeighborhoodConfig((4, 5)), grid, tiles_of(16, grid), tiles_of(8, grid))
        every = [
            simulated(grid, (4, 5), stride, query, key)
            for stride in itertools.product(range(1, 5), range(1, 6))
            for query in tiles_of(16, grid)
            for key in tiles_of(8, grid)
        ]
        assert found[-1].simulation.bound / found[-1].simulation.padding == pytest.approx(
            max(entry.bound / entry.padding for entry in every)
        )

    def test_pictures_and_sequences(self):
        assert default_tiles(FLUX) == ((1, 16, 16), (1, 16, 8))
        long = Grid(1, 1, 4096)
        assert default_tiles(long) == ((1, 1, 256), (1, 1, 128))
        found = search(NeighborhoodConfig((512,)), long, [(1, 1, 256)], [(1, 1, 128)])
        assert found[0].stride == (1,)
        assert found[-1].simulation.perfect

    def test_tiles_of_a_grid_smaller_than_any(self):
        (tile,) = tiles_of(128, Grid(1, 3, 5))
        assert math.prod(tile) == 128
