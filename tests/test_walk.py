"""Walks: every token once, nothing padded but the end, and fewer computed blocks than boxes of a fixed shape."""

import pytest
import torch

from fastdiff.methods import NeighborhoodConfig
from fastdiff_kernels import Grid, TokenLayout, natural_order
from fastdiff_kernels.box import box_order, box_rule, choose_tile, touched_tiles
from fastdiff_kernels.plan import BlockPlan
from fastdiff_kernels.reference import dense_mask
from fastdiff_kernels.walk import candidates, choose_order, walk_order


@pytest.mark.parametrize("dilation", [1, (2, 1, 3), (1, 3, 2)], ids=str)
def test_every_walk_takes_every_token_once(dilation):
    grid = Grid(5, 7, 11)
    axes = NeighborhoodConfig((2, 2, 3), dilation=dilation).axes(grid)
    walks = candidates(axes, 32)
    assert len(walks) > 30
    natural = grid.coordinates().long()
    for walk in walks:
        order, places = walk_order(axes, walk)(grid, 32)
        assert torch.equal(order.sort().values, torch.arange(grid.tokens))
        on_grid = [axis.natural[column] for axis, column in zip(axes, places.long().unbind(1), strict=True)]
        assert torch.equal(torch.stack(on_grid, dim=1), natural[order])


def test_neighbours_on_a_walk_are_neighbours_on_the_grid():
    grid = Grid(6, 8, 10)
    axes = NeighborhoodConfig((3, 3, 3)).axes(grid)
    for walk in candidates(axes, 32)[:10]:
        _, places = walk_order(axes, walk)(grid, 32)
        widest = max(width for bands in walk.bands for piece in bands for _, width in piece)
        assert int(places.diff(dim=0).abs().amax()) <= 2 * widest


@pytest.mark.parametrize(
    ("grid", "window", "stride", "most"),
    [
        (Grid(21, 45, 80), (21, 24, 24), (1, 8, 8), 0.17),
        (Grid(21, 45, 80), (21, 24, 24), 1, 0.195),
        (Grid(13, 30, 45), (13, 16, 24), (1, 8, 8), 0.335),
        (Grid(30, 48, 80), (18, 24, 24), 1, 0.145),
        (Grid(30, 48, 80), (18, 24, 24), (16, 8, 8), 0.0901),
        (Grid(1, 256, 256), (80, 80), 1, 0.1335),
        (Grid(17, 16, 16), (17, 6, 6), 1, 0.305),
        (Grid(1, 64, 64), (20, 20), 1, 0.235),
        (Grid(1, 32, 32), (12, 12), 1, 0.532),
    ],
    ids=str,
)
def test_density_on_grids_of_models(grid, window, stride, most):
    config = NeighborhoodConfig(window, stride=stride)
    axes = config.axes(grid)
    boxes = touched_tiles(axes, choose_tile(axes, 128)) * 128**2 / grid.tokens**2
    density = config.build_plan(TokenLayout.self_attention(grid)).density()
    assert density <= min(most, boxes * (1 + 1e-9))


def test_boxes_stay_where_they_are_perfect():
    grid = Grid(8, 16, 16)
    axes = NeighborhoodConfig((8, 8, 8), stride=(8, 8, 8)).axes(grid)
    order, _ = choose_order(axes, 128)(grid, 128)
    assert torch.equal(order, box_order(axes, choose_tile(axes, 128))(grid, 128)[0])


def test_only_the_end_is_padded():
    grid = Grid(3, 7, 11)
    plan = NeighborhoodConfig((3, 4, 4), block_size=32).build_plan(TokenLayout.self_attention(grid))
    assert (plan.query.order[0, : grid.tokens] >= 0).all()
    assert plan.query.slots < grid.tokens + 32


class TestRaggedBlocks:
    """Bounding boxes may touch where no token sees another; such pairs of blocks are left out."""

    def test_all_of_them(self):
        # Even tokens first, then odd ones: both blocks have the same box, and tokens see only themselves.
        grid = Grid(1, 1, 32)
        order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2)])
        plan = self.plan(TokenLayout.self_attention(grid), (1,), (16, 16), order)
        assert plan.full_blocks + plan.partial_blocks == 2
        assert torch.equal(dense_mask(plan)[0], torch.eye(32, dtype=torch.bool))

    @pytest.mark.parametrize("blocks", [(16, 32), (32, 16), (64, 64)], ids=str)
    def test_and_no_others(self, blocks):
        grid = Grid(2, 9, 13)
        layout = TokenLayout.self_attention(grid, text_before=3)
        shuffled = torch.randperm(grid.tokens, generator=torch.Generator().manual_seed(0))
        plan = self.plan(layout, (1, 2, 2), blocks, shuffled)
        assert torch.equal(dense_mask(plan), dense_mask(self.plan(layout, (1, 2, 2), (16, 16), None)))
        rows = [plan.slot_mask(0, row).unflatten(1, (-1, blocks[1])) for row in range(plan.query_blocks)]
        assert plan.full_blocks + plan.partial_blocks == sum(int(row.any(2).any(0).sum()) for row in rows)

    def plan(self, layout, window, blocks, order):
        def shuffled(grid, block):
            return order, grid.coordinates()[order]

        return BlockPlan.from_rule(
            layout,
            box_rule(NeighborhoodConfig(window).axes(layout.grid)),
            block_q=blocks[0],
            block_k=blocks[1],
            grid_order=natural_order if order is None else shuffled,
        )
