"""PARO: orders, plans token by token, all backends, masks by step, the file, and every refusal."""

import json
import pickle

import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paro_plans import calibration, random_masks, truth
from safetensors import safe_open
from safetensors.torch import save_file

import fastdiff
from fastdiff.methods import METHODS, ParoConfig, build_plan, load_config
from fastdiff.methods.fingerprint import Fingerprint
from fastdiff.methods.paro import ParoPlanner, paro_plan
from fastdiff.methods.paro_file import Calibration, _digest, calibration_at, pack, unpack
from fastdiff.methods.planner import PlanCache
from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout, UnsupportedError, attention
from fastdiff_kernels.axis_order import AXIS_ORDERS, axis_order, distinct_axis_orders
from fastdiff_kernels.reference import dense_mask

# The table of the released plans: dims to permute (F, H, W) by, and those of the inverse.
RELEASED = {
    "FHW": ((0, 1, 2), (0, 1, 2)),
    "FWH": ((0, 2, 1), (0, 2, 1)),
    "HWF": ((1, 2, 0), (2, 0, 1)),
    "HFW": ((1, 0, 2), (1, 0, 2)),
    "WHF": ((2, 1, 0), (2, 1, 0)),
    "WFH": ((2, 0, 1), (1, 2, 0)),
}
GRID = Grid(3, 5, 11)
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "paro.safetensors"
    calibration(GRID, heads=2, layers=2, groups=4).save(path)
    return path


def ask(planner, layer=0, step=None, steps=None, heads=2, layout=None):
    layout = layout or TokenLayout.self_attention(GRID)
    return planner.plan(layout, layer=layer, step=step, steps=steps, heads=heads, head_dim=8, device=CPU)


class TestOrders:
    @pytest.mark.parametrize("which", range(6))
    def test_as_released(self, which):
        forward, inverse = RELEASED[AXIS_ORDERS[which]]
        video = torch.arange(GRID.tokens).reshape(3, 5, 11)
        permuted = video.permute(forward)
        assert torch.equal(axis_order(GRID, which), permuted.flatten())
        assert torch.equal(permuted.permute(inverse), video)

    @pytest.mark.parametrize(
        ("grid", "distinct"),
        [
            (Grid(2, 2, 2), (0, 1, 2, 3, 4, 5)),
            (Grid(1, 5, 7), (0, 1)),
            (Grid(4, 1, 7), (0, 2)),
            (Grid(4, 7, 1), (0, 2)),
            (Grid(1, 1, 9), (0,)),
        ],
        ids=str,
    )
    def test_equal_ones_are_left_out(self, grid, distinct):
        assert distinct_axis_orders(grid) == distinct
        all_orders = {tuple(axis_order(grid, which).tolist()) for which in range(6)}
        assert {tuple(axis_order(grid, which).tolist()) for which in distinct} == all_orders


class TestPlan:
    @settings(max_examples=500, deadline=None)
    @given(data=st.data())
    def test_token_by_token(self, data):
        grid = Grid(*(data.draw(st.integers(1, high)) for high in (6, 9, 13)))
        before, after = (data.draw(st.sampled_from((0, 1, 63, 64, 70))) for _ in range(2))
        orders = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=3))
        density = data.draw(st.sampled_from((0.0, 0.3, 0.8)))
        mask = random_masks(grid, len(orders), data.draw(st.integers(0, 99)), density)
        plan = paro_plan(TokenLayout.self_attention(grid, before, after), orders, mask)
        expected = truth(grid, orders, mask, before, after)
        assert torch.equal(dense_mask(plan).expand_as(expected), expected)
        assert plan.full.counts.add(plan.partial.counts).min() >= 1
        blocks = [-(-n // 64) for n in (before, grid.tokens, after)]
        kept = mask | torch.eye(blocks[1], dtype=torch.bool)
        computed = len(orders) * (sum(blocks) ** 2 - blocks[1] ** 2) + int(kept.sum())
        tokens = before + grid.tokens + after
        assert plan.density() == pytest.approx(computed * 64**2 / (len(orders) * tokens**2))

    def test_a_query_is_drawn(self):
        mask = random_masks(GRID, 3, density=0.2)
        plan = paro_plan(TokenLayout.self_attention(GRID, text_before=7), [2, 2, 4], mask)
        expected = truth(GRID, [2, 2, 4], mask, 7, 0)
        for head, token in ((0, 3), (1, 50), (2, 171)):
            assert torch.equal(plan.visible_keys(token, head), expected[head, token])

    def test_heads_share_a_table(self):
        plan = paro_plan(TokenLayout.self_attention(GRID), [0, 3], random_masks(GRID, 2))
        assert plan.query.table.shape[0] == plan.key.table.shape[0] == 1
        assert plan.query.order.shape[0] == plan.key.order.shape[0] == 2
        same = paro_plan(TokenLayout.self_attention(GRID), [3, 3], random_masks(GRID, 2))
        assert same.query.order.shape[0] == 1

    def test_reference_images_are_seen_whole(self):
        spans = (Span("text", 5), Span("grid", GRID.tokens, GRID), Span("reference", 30, Grid(1, 5, 6)))
        mask = random_masks(GRID, 2, density=0.1)
        seen = dense_mask(paro_plan(TokenLayout(spans, spans), [0, 5], mask))
        assert torch.equal(seen, truth(GRID, [0, 5], mask, 5, 30))

    def test_two_grids(self):
        spans = (Span("grid", GRID.tokens, GRID),) * 2
        with pytest.raises(UnsupportedError, match="one grid of 3 blocks"):
            paro_plan(TokenLayout(spans, spans), [0], random_masks(GRID, 1))


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("with_key_mask", [False, True])
def test_outputs_and_gradients(backend, with_key_mask, poison):
    if backend == "triton":
        pytest.importorskip("triton")
    # Tiny, for the interpreter's sake.
    grid, batch = Grid(2, 5, 13), 1 if backend == "triton" else 2
    plan = paro_plan(TokenLayout.self_attention(grid, text_before=3), [4, 3], random_masks(grid, 2, density=0.3))
    generator = torch.Generator().manual_seed(0)
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    shape = (batch, grid.tokens + 3, 2, 16)
    q, k, v, up = (torch.randn(shape, generator=generator).to(device) for _ in range(4))
    key_mask = torch.rand(shape[:2], generator=generator).to(device) < 0.9 if with_key_mask else None
    results = []
    for which in ("reference", backend):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*inputs, plan, key_mask=key_mask, backend=which)
        results.append((out, *torch.autograd.grad(out, inputs, up)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-5)


class TestPlanner:
    def test_masks_switch_by_group(self, file):
        planner, made = ParoConfig(str(file)).planner(), calibration_at(str(file))
        for steps in (4, 6, 50):
            for step in range(steps):
                layer = made.layers[1]
                expected = truth(GRID, [1, 2], layer.mask(4 * step // steps), 0, 0)
                assert torch.equal(dense_mask(ask(planner, 1, step, steps)), expected)

    def test_the_same_plan_is_the_same_object(self, file):
        planner = ParoConfig(str(file)).planner()
        assert ask(planner, 0, 0, 8) is ask(planner, 0, 1, 8) is ask(ParoConfig(str(file)).planner(), 0, 0, 4)
        assert ask(planner, 0, 2, 8) is not ask(planner, 0, 1, 8)
        assert ask(planner, 1, 1, 8) is not ask(planner, 0, 1, 8)

    def test_outside_a_run_the_last_group(self, file):
        config = ParoConfig(str(file))
        planner = config.planner()
        assert ask(planner) is ask(planner, 0, 7, 8) is config.build_plan(TokenLayout.self_attention(GRID))
        assert build_plan(config, TokenLayout.self_attention(GRID), layer=1) is ask(planner, 1)

    def test_plans_are_kept_under_a_limit(self, file):
        planner = ParoPlanner(ParoConfig(str(file)), PlanCache(limit_bytes=1))
        first = ask(planner, 0)
        ask(planner, 1)
        assert ask(planner, 0) is not first

    def test_pickle(self, file):
        planner = pickle.loads(pickle.dumps(ParoConfig(str(file)).planner()))
        assert ask(planner) is ask(ParoConfig(str(file)).planner())

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"layout": TokenLayout.self_attention(Grid(3, 5, 12))}, "made for 3x5x11 tokens .* this run has 3x5x12"),
            ({"heads": 3}, "made for 2 heads .* this model has 3"),
        ],
    )
    def test_another_size(self, file, changes, says):
        with pytest.raises(InvalidInputError, match=says):
            ask(ParoConfig(str(file)).planner(), **changes)

    def test_a_layer_that_stayed_dense(self, tmp_path):
        made, path = calibration(GRID), tmp_path / "a.safetensors"
        Calibration(1, (*made.layers, None), made.fingerprint, {}).save(path)
        with pytest.raises(UnsupportedError, match="layer 1, which stayed dense"):
            ask(ParoConfig(str(path)).planner(), 1)
        with pytest.raises(InvalidInputError, match="layer is 2; .* with 2 self-attention layers"):
            ask(ParoConfig(str(path)).planner(), 2)


class TestFile:
    @pytest.mark.parametrize("blocks", [1, 2, 3, 8, 19])
    def test_bits(self, blocks):
        mask = torch.rand(2, 3, blocks, blocks) < 0.5
        packed = pack(mask)
        assert packed.shape == (2, 3, -(-(blocks**2) // 8))
        assert torch.equal(unpack(packed, blocks), mask)

    def test_round_trip(self, file):
        made, read = calibration(GRID, heads=2, layers=2, groups=4), Calibration.load(file)
        assert (read.groups, read.settings, len(read.layers)) == (made.groups, made.settings, 2)
        for before, after in zip(made.layers, read.layers, strict=True):
            assert (before.name, before.grid) == (after.name, after.grid)
            for name in ("orders", "masks", "mass", "density", "margin"):
                assert torch.equal(getattr(before, name), getattr(after, name))
        assert read.layers[0].masks.dtype == torch.uint8

    def test_read_once_until_it_changes(self, file):
        first = calibration_at(str(file))
        assert calibration_at(str(file)) is first
        calibration(GRID, heads=2, layers=3).save(file)
        assert len(calibration_at(str(file)).layers) == 3

    def test_any_damage_is_found(self, file):
        whole = file.read_bytes()
        for position in range(8, len(whole), 97):
            damaged = bytearray(whole)
            damaged[position] ^= 0x10
            file.write_bytes(damaged)
            with pytest.raises(InvalidInputError, match="safetensors"):
                Calibration.load(file)

    @pytest.mark.parametrize("size", [0, 5, 100, -1])
    def test_truncated(self, file, size):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(InvalidInputError, match=r"cannot be read \(.+\); make it anew"):
            Calibration.load(file)

    def test_another_kind(self, file):
        save_file({"weight": torch.zeros(3)}, file)
        with pytest.raises(InvalidInputError, match="no calibration"):
            Calibration.load(file)

    @pytest.mark.parametrize("lacking", ["groups", "model", "layers", "settings"])
    def test_whole_and_lacking_a_key(self, file, lacking):
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            about = json.loads(opened.metadata()["fastdiff-paro"])
        del about[lacking]
        text = json.dumps(about)
        save_file(tensors, file, metadata={"fastdiff-paro": text, "sha256": _digest(text, tensors)})
        with pytest.raises(InvalidInputError, match=f"it lacks '{lacking}'"):
            Calibration.load(file)

    def test_another_version(self, file, monkeypatch):
        monkeypatch.setattr("fastdiff.methods.paro_file.VERSION", 2)
        with pytest.raises(InvalidInputError, match="version 1; this fastdiff reads version 2"):
            Calibration.load(file)

    def test_missing(self, tmp_path):
        config = ParoConfig(str(tmp_path / "none.safetensors"))
        for use in (config.planner, lambda: config.uses_steps):
            with pytest.raises(InvalidInputError, match="fastdiff calibrate"):
                use()


class TestModel:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return tiny_models.tiny_wan()

    @pytest.fixture
    def planner(self, model, tmp_path):
        path = tmp_path / "model.safetensors"
        calibration(GRID, layers=2, model=model).save(path)
        return ParoConfig(str(path)).planner()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_in_any_dtype(self, model, planner, dtype):
        planner.check_model(model.to(dtype), ["a", "b"])

    def test_under_an_adapter(self, model, planner):
        peft = pytest.importorskip("peft")
        model.add_adapter(peft.LoraConfig(target_modules=["to_q", "to_k"]))
        planner.check_model(model, ["a", "b"])

    def test_offloaded_weights_are_not_compared(self, model, planner):
        planner.check_model(model.to("meta"), ["a", "b"])

    def test_others_are_refused(self, planner):
        torch.manual_seed(1)
        for other, layers, says in (
            (tiny_models.tiny_wan(), 2, "other weights"),
            (tiny_models.tiny_wan(heads=4, head_dim=8), 2, "another model"),
            (tiny_models.tiny_wan(layers=3), 3, "with 2 self-attention layers .* has 3"),
        ):
            with pytest.raises(InvalidInputError, match=says):
                planner.check_model(other, ["a"] * layers)

    def test_apply_refuses_and_leaves_the_model_alone(self, planner):
        torch.manual_seed(1)
        other = tiny_models.tiny_wan()
        before = dict(other.attn_processors)
        with pytest.raises(InvalidInputError, match="other weights"):
            fastdiff.apply(other, planner.config)
        assert other.attn_processors == before

    def test_one_changed_weight_is_named(self, model):
        print_of = Fingerprint.of(model)
        model.blocks[1].attn1.to_q.weight.data[0, 0] += 1
        with pytest.raises(InvalidInputError, match=r"1 of its .* blocks\.1\.attn1\.to_q\.weight"):
            print_of.check(model, "this")


class TestConfig:
    def test_json(self, file):
        config = ParoConfig(str(file))
        assert METHODS["paro"] is ParoConfig
        assert ParoConfig(file) == config == load_config(config.to_json()) == load_config(json.loads(config.to_json()))
        assert config.to_dict() == {"method": "paro", "version": 1, "calibration": str(file)}

    def test_steps_matter_with_several_groups(self, file, tmp_path):
        assert ParoConfig(str(file)).uses_steps
        calibration(GRID).save(tmp_path / "one.safetensors")
        assert not ParoConfig(str(tmp_path / "one.safetensors")).uses_steps

    @pytest.mark.parametrize("value", ["", None, 3])
    def test_no_path(self, value):
        with pytest.raises(InvalidInputError, match="calibration is"):
            ParoConfig(value)

    def test_no_default(self):
        with pytest.raises(InvalidInputError, match="no default for calibration"):
            load_config({"method": "paro"})

    def test_a_density_needs_a_calibration(self):
        with pytest.raises(UnsupportedError, match=r"fastdiff\.calibrate\(pipe, prompts, density=0\.3"):
            ParoConfig.for_density(0.3, GRID)
        with pytest.raises(InvalidInputError, match="density is 7"):
            ParoConfig.for_density(7, GRID)
