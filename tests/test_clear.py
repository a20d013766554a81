"""CLEAR: the disk token by token, pooled keys, the paper's counts, tiles, the solver, JSON, refusals."""

import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import place
from tiny_models import forward, tiny_wan

import fastdiff
from fastdiff.methods import METHODS, ClearConfig, load_config
from fastdiff.methods.clear_planner import KeyPooling
from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError, attention
from fastdiff_kernels.ball import box_tiles_order, choose_order
from fastdiff_kernels.plan import BlockPlan
from fastdiff_kernels.reference import dense_mask
from fastdiff_patches.planner import Extras

CHANNELS = 3072


def truth(layout: TokenLayout, radius, factor: int | None) -> torch.Tensor:
    """The mask as the paper defines it, in plain Python, bool `[queries, keys and pooled keys]`."""
    rt, ry, rx = radius if isinstance(radius, tuple) else (radius,) * 3
    keys = [(span, token) for span in layout.key for token in range(span.tokens)]
    pooled = 0 if factor is None else layout.grid.tokens // factor**2
    rows = []
    for span in layout.query:
        for token in range(span.tokens):
            row = []
            for other, key in keys:
                near = True
                if span.kind == other.kind == "grid":
                    (t, y, x), (kt, ky, kx) = place(span.grid, token), place(other.grid, key)
                    # With whole and half radii every term is exact.
                    near = ((t - kt) * ry * rx) ** 2 + ((y - ky) * rt * rx) ** 2 + ((x - kx) * rt * ry) ** 2
                    near = near < (rt * ry * rx) ** 2
                row.append(near)
            rows.append(row + [span.kind == "grid"] * pooled)
    return torch.tensor(rows)


def disk_pairs(grid: Grid, config: ClearConfig) -> int:
    """Pairs of image tokens that the config's rule keeps, by how often each offset occurs."""
    a, b, _, _, *limits = config.rule(grid).parameters.tolist()
    dy, dx = torch.arange(1 - grid.height, grid.height), torch.arange(1 - grid.width, grid.width)
    occurs = (grid.height - dy.abs())[:, None] * (grid.width - dx.abs())
    return int(occurs[a * dy[:, None] ** 2 + b * dx**2 < limits[0]].sum())


def all_pairs(grid: Grid, config: ClearConfig, text: int) -> int:
    pooled = 0 if config.pool_factor is None else grid.tokens // config.pool_factor**2
    return text * (text + grid.tokens) + grid.tokens * (text + pooled) + disk_pairs(grid, config)


@st.composite
def cases(draw):
    factor = draw(st.sampled_from([None, 2, 3]))
    frames = draw(st.integers(1, 3))
    if factor is None:
        height, width = draw(st.integers(1, 9 - frames)), draw(st.integers(1, 9 - frames))
    else:
        height, width = factor * draw(st.integers(1, 4 - frames)), factor * draw(st.integers(1, 3))
    halves = st.integers(1, 14).map(lambda n: n / 2)
    radius = draw(st.one_of(halves, st.tuples(halves, halves, halves)))
    return Grid(frames, height, width), radius, factor, draw(st.integers(0, 3)), draw(st.integers(0, 3))


@settings(max_examples=500, deadline=None)
@given(cases())
def test_plan_equals_the_definition(case):
    grid, radius, factor, before, after = case
    layout = TokenLayout.self_attention(grid, text_before=before, text_after=after)
    plan = ClearConfig(radius, pool_factor=factor, block_size=32).build_plan(layout)
    assert torch.equal(dense_mask(plan)[0], truth(layout, radius, factor))
    computed = (plan.full_blocks + plan.partial_blocks) * plan.query.block * plan.key.block
    assert plan.density() == pytest.approx(computed / layout.query_tokens**2)
    assert plan.pooled_tokens == plan.key_tokens - layout.key_tokens


def test_reference_images_are_seen_whole_and_see_no_pooled_keys():
    grid, other = Grid(1, 6, 9), Grid(1, 4, 11)
    spans = (Span("text", 3), Span("grid", 54, grid), Span("reference", 44, other), Span("text", 2))
    layout = TokenLayout(spans, spans)
    plan = ClearConfig(2.5, pool_factor=3).build_plan(layout)
    mask = dense_mask(plan)[0]
    assert torch.equal(mask, truth(layout, 2.5, 3))
    assert not mask[57:101, -6:].any()
    assert mask[3:57, -6:].all()
    assert mask[3:57, 57:101].all()


@pytest.mark.parametrize(("radius", "neighbours"), [(8, 193), (16, 793), (32, 3205)])
def test_published_neighbours(radius, neighbours):
    grid = Grid(1, 2 * radius + 1, 2 * radius + 1)
    plan = ClearConfig(radius).build_plan(TokenLayout.self_attention(grid))
    assert int(plan.visible_keys(grid.tokens // 2).sum()) == neighbours


@pytest.mark.parametrize(
    ("side", "published"),
    [
        (1024, {8: 63.5, 32: 154.1}),
        (2048, {8: 246.2, 16: 352.6, 32: 724.3}),
        (4096, {8: 979.3, 16: 1433.2, 32: 3141.7}),
        (8192, {8: 3920, 16: 5790, 32: 13090}),
    ],
)
def test_published_gigaflops(side, published):
    grid = Grid(1, side // 16, side // 16)
    for radius, expected in published.items():
        found = 4 * CHANNELS * all_pairs(grid, ClearConfig(radius), 512) / 1e9
        # The last row is printed in whole hundredths of a teraflop, rounded from tenths of a gigaflop.
        assert found == pytest.approx(expected, abs=0.05 if side < 8192 else 5.05)


def test_published_gigaflops_of_dense_attention_and_at_radius_16():
    grid = Grid(1, 64, 64)
    assert 4 * CHANNELS * (grid.tokens + 512) ** 2 / 1e9 == pytest.approx(260.9, abs=0.05)
    # One table of the paper prints 80.6, which the definition does not give.
    assert 4 * CHANNELS * all_pairs(grid, ClearConfig(16), 512) / 1e9 == pytest.approx(86.6, abs=0.05)


@pytest.mark.parametrize("factor", [None, 4])
def test_plans_hold_the_counted_pairs(factor):
    grid, config = Grid(1, 64, 64), ClearConfig(8, pool_factor=factor)
    plan = config.build_plan(TokenLayout.self_attention(grid, text_before=512))
    assert int(dense_mask(plan).sum()) == all_pairs(grid, config, 512)


# Height and width in tokens, radius, pooling; shares of pairs and of 128 x 128 blocks in boxes of 8 x 16.
DENSITIES = [
    ((64, 64), 8, None, 0.243, 0.380),
    ((64, 64), 16, None, 0.332, 0.472),
    ((64, 64), 32, None, 0.591, 0.772),
    ((64, 64), 8, 4, 0.293, 0.429),
    ((64, 64), 16, 4, 0.382, 0.522),
    ((128, 128), 8, None, 0.0702, 0.118),
    ((128, 128), 16, None, 0.1005, 0.153),
    ((128, 128), 32, None, 0.2065, 0.302),
    ((128, 256), 8, None, 0.0360, 0.062),
    ((128, 256), 16, None, 0.0522, 0.081),
    ((128, 256), 32, None, 0.111, 0.166),
    ((256, 256), 8, None, 0.0183, 0.0317),
    ((256, 256), 16, None, 0.0267, 0.0420),
    ((256, 256), 32, None, 0.0586, 0.0899),
    ((256, 256), 8, 4, 0.0798, 0.0932),
    ((256, 256), 16, 4, 0.0883, 0.104),
    ((45, 80), 8, None, 0.270, 0.426),
    ((45, 80), 16, None, 0.365, 0.522),
    ((45, 80), 32, None, 0.625, 0.828),
]


@pytest.mark.parametrize(("size", "radius", "factor", "token", "tile"), DENSITIES, ids=str)
def test_published_densities(size, radius, factor, token, tile):
    grid, config = Grid(1, *size), ClearConfig(radius, pool_factor=factor)
    tokens = grid.tokens + 512
    digits = len(f"{token:g}") - 2
    assert all_pairs(grid, config, 512) / tokens**2 == pytest.approx(token, abs=0.6 * 10**-digits)
    plan = config.build_plan(TokenLayout.self_attention(grid, text_before=512))
    assert plan.density() <= tile + 0.0005


@pytest.mark.parametrize("grid", [Grid(1, 45, 80), Grid(1, 64, 64), Grid(3, 17, 23), Grid(1, 3, 200)], ids=str)
def test_no_box_makes_fewer_tiles_than_the_chosen_order(grid):
    layout, config = TokenLayout.self_attention(grid, text_after=40), ClearConfig(6, block_size=64)
    block = config.block_for(grid)
    chosen = config.build_plan(layout).density()
    for t, y in [(1, 2), (1, 4), (1, 8), (1, 16), (2, 4), (4, 4), (1, 1)]:
        order = box_tiles_order((t, y, block // (t * y)))
        plan = BlockPlan.from_rule(layout, config.rule(grid), block_q=block, block_k=block, grid_order=order)
        assert chosen <= plan.density() + 1e-9


def test_snakes_are_chosen_where_boxes_would_be_padding():
    config, grid = ClearConfig(8), Grid(1, 33, 40)
    order = choose_order(config.rule(grid), grid, 64)
    assert len(order(grid, 64)[0]) == 21 * 64
    assert len(box_tiles_order((1, 8, 8))(grid, 64)[0]) == 25 * 64


def test_small_grids_take_small_blocks():
    sizes = [ClearConfig(8).block_for(Grid(1, side, side)) for side in (63, 64, 90, 91)]
    assert sizes == [32, 64, 64, 128]
    assert ClearConfig(8, block_size=32).block_for(Grid(1, 256, 256)) == 32


@pytest.mark.parametrize("radius", [(1, 3, 2.2), (1.5, 3, 2.2), (1, 4, 1.1)], ids=str)
def test_keys_on_the_border_are_not_seen(radius):
    plan = ClearConfig(radius, block_size=32).build_plan(TokenLayout.self_attention(Grid(1, 9, 9)))
    seen = plan.visible_keys(4 * 9 + 4).view(9, 9)
    assert not seen[4 - radius[1], 4]
    assert seen[5 - radius[1], 4]


def test_unlike_radii_are_whole_numbers_in_the_rule():
    rule = ClearConfig((2, 3.5, 5.25)).rule(Grid(4, 20, 20))
    assert rule.parameters.tolist() == [9, 4, 0, 4, 111, 83, -1, -1]
    with pytest.raises(InvalidInputError, match=r"ratio 997:1000, too odd.*simpler ratio"):
        ClearConfig((1, 9.97, 10)).rule(Grid(1, 64, 64))


def random_tensors(layout: TokenLayout, batch: int = 2, heads: int = 2, head_dim: int = 16, **options):
    generator = torch.Generator().manual_seed(0)
    shape = (batch, layout.query_tokens, heads, head_dim)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_(**options) for _ in range(3)]


def by_hand(q, k, v, layout, radius, factor, weight, scale, key_mask=None):
    """Pooled keys built tile by tile, and a softmax over the plain-Python mask."""
    before = layout.key[0].tokens if layout.key[0].kind == "text" else 0
    grid = layout.grid
    pooled = []
    for x in (k, v):
        new = []
        for t in range(grid.frames):
            for i in range(grid.height // factor):
                for j in range(grid.width // factor):
                    total = 0
                    for a in range(factor):
                        for b in range(factor):
                            token = (t * grid.height + i * factor + a) * grid.width + j * factor + b
                            total = total + weight[a, b] * x[:, before + token]
                    new.append(total)
        pooled.append(torch.cat([x, torch.stack(new, dim=1)], dim=1))
    keys, values = pooled
    mask = truth(layout, radius, factor)[None, None]
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, values)


def run(config, layout, q, k, v, parameters=None, key_mask=None, scale=None, backend="torch"):
    planner = config.planner()
    plan = planner.plan(layout, layer=0, step=None, steps=None, heads=2, head_dim=16, device=torch.device("cpu"))
    return planner.attend(q, k, v, plan, Extras(scale, key_mask, backend, parameters, {}))


@pytest.mark.parametrize("grid", [Grid(1, 6, 10), Grid(3, 4, 6)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_pooled_output_and_gradients_equal_the_construction(grid, backend):
    layout = TokenLayout.self_attention(grid, text_before=3, text_after=2)
    config = ClearConfig(2.5, pool_factor=2)
    outcomes = []
    for route in ("planner", "by hand"):
        q, k, v = random_tensors(layout)
        pooling = config.planner().parameters(layer=0, heads=2, head_dim=16).double()
        with torch.no_grad():
            pooling.weight.copy_(torch.tensor([[0.1, 0.9], [-0.3, 0.4]]))
        if route == "planner":
            out = run(config, layout, q, k, v, pooling, backend=backend)
        else:
            out = by_hand(q, k, v, layout, 2.5, 2, pooling.weight, 16**-0.5)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        outcomes.append([out, pooling.weight.grad, q.grad, k.grad, v.grad])
    for found, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert outcomes[0][1].abs().min() > 0


def test_pooling_starts_as_the_mean():
    pooling = KeyPooling(4)
    assert pooling.weight.tolist() == [[1 / 16] * 4] * 4
    x = torch.randn(1, 64, 1, 2)
    expected = x.unflatten(1, (8, 8))[:, :4, 4:].mean(dim=(1, 2))
    torch.testing.assert_close(pooling(x, Grid(1, 8, 8))[:, 1], expected)
    assert pooling(x.bfloat16(), Grid(1, 8, 8)).dtype == torch.bfloat16


def test_key_mask_reaches_over_pooled_keys():
    grid = Grid(1, 4, 6)
    layout = TokenLayout.self_attention(grid, text_before=5)
    config = ClearConfig(2, pool_factor=2)
    q, k, v = random_tensors(layout, requires_grad=False)
    key_mask = torch.ones(2, layout.key_tokens, dtype=torch.bool)
    key_mask[0, 3:5] = False
    key_mask[1, 5 + 8] = False  # row 1, column 2: in the second tile
    extended = torch.cat([key_mask, torch.ones(2, 6, dtype=torch.bool)], dim=1)
    extended[1, -5] = False
    pooling = KeyPooling(2).double()
    found = run(config, layout, q, k, v, pooling, key_mask)
    expected = by_hand(q, k, v, layout, 2, 2, pooling.weight, 16**-0.5, extended)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("factor", "multiplier"), [(None, 1), (4, 10)])
def test_proportional_scale(factor, multiplier):
    layout = TokenLayout.self_attention(Grid(1, 8, 12), text_before=4)
    config = ClearConfig(3, pool_factor=factor, proportional=True, train_tokens=30)
    q, k, v = random_tensors(layout, requires_grad=False)
    pooling = None if factor is None else KeyPooling(4).double()
    plain = ClearConfig(3, pool_factor=factor)
    for given_scale in (None, 0.4):
        scale = (16**-0.5 if given_scale is None else given_scale) * math.sqrt(math.log(multiplier * 100, 30))
        found = run(config, layout, q, k, v, pooling, scale=given_scale)
        torch.testing.assert_close(found, run(plain, layout, q, k, v, pooling, scale=scale), rtol=1e-9, atol=1e-11)


def test_published_multipliers_of_the_scale():
    def multiplier(height, width, factor=None):
        layout = TokenLayout.self_attention(Grid(1, height // 16, width // 16), text_before=512)
        return ClearConfig(8, pool_factor=factor, proportional=True).build_plan(layout).sharpening

    assert multiplier(1024, 1024) == 1
    assert multiplier(2048, 4096) == pytest.approx(1.111, abs=0.001)
    assert multiplier(2048, 4096, 4) == pytest.approx(1.228, abs=0.001)
    assert multiplier(4096, 4096) == pytest.approx(1.147, abs=0.001)
    assert multiplier(4096, 4096, 4) == pytest.approx(1.260, abs=0.001)


def test_radius_over_the_whole_grid_is_dense_attention():
    layout = TokenLayout.self_attention(Grid(2, 5, 7), text_after=3)
    q, k, v = random_tensors(layout, requires_grad=False)
    found = run(ClearConfig(100), layout, q, k, v)
    natural = (x.transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*natural).transpose(1, 2)
    torch.testing.assert_close(found, expected)


def test_compiled_without_breaks_and_again_for_another_grid():
    config = ClearConfig(2.5, pool_factor=2, proportional=True, train_tokens=20)
    planner, pooling = config.planner(), KeyPooling(2).double()

    def call(q, k, v, plan):
        return planner.attend(q, k, v, plan, Extras(None, None, "torch", pooling, {}))

    compiled = torch.compile(call, fullgraph=True, backend="eager")
    for grid in (Grid(1, 6, 8), Grid(1, 4, 12), Grid(1, 8, 10)):
        layout = TokenLayout.self_attention(grid, text_before=3)
        plan = config.build_plan(layout)
        q, k, v = random_tensors(layout)
        out = compiled(q, k, v, plan)
        (grad,) = torch.autograd.grad(out.square().sum(), pooling.weight)
        expected = call(q, k, v, plan)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), pooling.weight)[0])


@pytest.mark.parametrize(
    "config", [ClearConfig(2.5), ClearConfig((1.5, 4, 6), pool_factor=2, proportional=True)], ids=["disk", "pooled"]
)
def test_videos_are_patched_and_given_back(config):
    model = tiny_wan()
    names, dense = list(model.state_dict()), forward(model)
    fastdiff.apply(model, config)
    assert not torch.allclose(forward(model), dense)
    fastdiff.remove(model)
    assert torch.equal(forward(model), dense)
    assert list(model.state_dict()) == names
    fastdiff.apply(model, ClearConfig(50))
    torch.testing.assert_close(forward(model), dense, rtol=1e-4, atol=1e-5)


def test_plans_travel():
    layout = TokenLayout.self_attention(Grid(1, 4, 8), text_before=2)
    plan = ClearConfig(2, pool_factor=2, proportional=True).build_plan(layout)
    again = pickle.loads(pickle.dumps(plan))
    assert (again.start, again.grid, again.pool_factor) == (2, Grid(1, 4, 8), 2)
    assert again.sharpening == plan.sharpening
    moved = plan.to("meta")
    assert moved.device.type == "meta"
    assert moved.grid == plan.grid
    assert plan.to("cpu") is plan
    assert torch.equal(dense_mask(again), dense_mask(plan))


@pytest.mark.parametrize("grid", [Grid(1, 33, 40), Grid(1, 32, 32), Grid(5, 9, 14)], ids=str)
@pytest.mark.parametrize("shape", [{}, {"radius": (2, 4, 6)}], ids=str)
def test_for_density_comes_from_below(grid, shape):
    config = ClearConfig.for_density(0.5, grid, text_tokens=8, block_size=32, **shape)
    layout = TokenLayout.self_attention(grid, text_after=8)
    assert config.build_plan(layout).density() <= 0.5
    if isinstance(config.radius, tuple):
        larger = tuple(r * 1.3 for r in config.radius)
        assert config.radius[2] / config.radius[1] == pytest.approx(1.5)
    else:
        larger = config.radius * 1.3
    assert ClearConfig(larger, block_size=32).build_plan(layout).density() > 0.5
    with pytest.raises(InvalidInputError, match=r"below the floor of clear on a grid of .* which is 0\.\d+"):
        ClearConfig.for_density(0.001, grid)


def test_for_density_reaches_everything_and_keeps_settings():
    layout = TokenLayout.self_attention(Grid(1, 32, 32))
    config = ClearConfig.for_density(1.0, Grid(1, 32, 32), proportional=True)
    assert config.proportional
    assert dense_mask(config.build_plan(layout)).all()
    pooled = ClearConfig.for_density(0.4, Grid(1, 32, 32), pool_factor=2)
    assert pooled.pool_factor == 2
    assert pooled.radius < ClearConfig.for_density(0.4, Grid(1, 32, 32)).radius
    with pytest.raises(InvalidInputError, match="larger pool_factor"):
        ClearConfig.for_density(0.05, Grid(1, 32, 32), pool_factor=4)
    with pytest.raises(InvalidInputError, match="density is 0"):
        ClearConfig.for_density(0, Grid(1, 32, 32))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"radius": 0}, "radius is 0; give a number of tokens above 0"),
        ({"radius": -1.5}, "radius is -1.5"),
        ({"radius": math.nan}, "radius is nan"),
        ({"radius": math.inf}, "radius is inf"),
        ({"radius": True}, "radius is True"),
        ({"radius": "8"}, "radius is '8'"),
        ({"radius": (8, 8)}, "or three for"),
        ({"radius": (8, 8, 0)}, "radius is"),
        ({"radius": 8, "pool_factor": 1}, "whole number from 2, or None"),
        ({"radius": 8, "pool_factor": 4.0}, "pool_factor is 4.0"),
        ({"radius": 8, "pool_factor": False}, "pool_factor is False"),
        ({"radius": 8, "proportional": 1}, "proportional is 1"),
        ({"radius": 8, "train_tokens": 1}, "train_tokens is 1"),
        ({"radius": 8, "block_size": 48}, "block_size"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(InvalidInputError, match=message):
        ClearConfig(**values)


@pytest.mark.parametrize("grid", [Grid(1, 10, 8), Grid(1, 8, 10), Grid(2, 3, 3)], ids=str)
def test_pool_factor_must_divide_the_grid(grid):
    with pytest.raises(InvalidInputError, match=f"pool_factor 4 does not divide a grid of {grid}"):
        ClearConfig(2, pool_factor=4).build_plan(TokenLayout.self_attention(grid))


def test_pooling_wants_one_grid():
    span = Span("grid", 16, Grid(1, 4, 4))
    two = TokenLayout((span, span), (span, span))
    with pytest.raises(UnsupportedError, match="has 2 on its key side"):
        ClearConfig(2, pool_factor=2).build_plan(two)
    assert ClearConfig(2).build_plan(two).key_tokens == 32


def test_radius_has_no_default():
    with pytest.raises(InvalidInputError, match="no default for radius"):
        load_config({}, "clear")


def test_config_travels_as_json():
    assert METHODS["clear"] is ClearConfig
    for config in (ClearConfig(8, pool_factor=4, proportional=True), ClearConfig((2.5, 8, 12), train_tokens=1000)):
        again = load_config(config.to_json())
        assert again == config
        assert hash(again) == hash(config)
        assert '"version": 1' in config.to_json()


def test_triton_and_portable_agree_on_pooled_plans():
    """On a GPU, or in Triton's interpreter, at a tiny size; head_dim as small as the kernel takes."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = TokenLayout.self_attention(Grid(1, 8, 12), text_before=3)
    plan = ClearConfig(3, pool_factor=4).build_plan(layout)
    q, k, v = (x.float() for x in random_tensors(layout, batch=1, requires_grad=False))
    k, v = (torch.cat([x, torch.randn(1, 6, 2, 16)], dim=1) for x in (k, v))
    q, k, v = (x.to(device) for x in (q, k, v))
    outs = [attention(q, k, v, plan, backend=backend) for backend in ("torch", "triton", "reference")]
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outs[1], outs[2], rtol=1e-4, atol=1e-5)
