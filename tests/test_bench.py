"""`fastdiff bench`: what it records, what it refuses, and that its models are those that were published."""

import inspect
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastdiff import cli
from fastdiff.bench import kernels, record, rivals, shapes
from fastdiff.bench.architectures import ARCHITECTURES
from fastdiff.bench.breakdown import add_up
from fastdiff.bench.models import BUILDERS, MODES, ModelBench, depths, scaled
from fastdiff.bench.published_models import Draw, wan_inputs
from fastdiff.bench.truth import check_agents, check_gradients, check_output
from fastdiff.commands import bench
from fastdiff.methods import AgentConfig, ClearConfig, NeighborhoodConfig, RadialConfig, build_plan
from fastdiff_kernels import Grid, TokenLayout, agent_attention, attention, pool_cells
from fastdiff_kernels.errors import WrongResultError
from fastdiff_kernels.export import fa4_lists

KEYS = {"kernel", "shape", "tokens", "heads", "head_dim", "dtype", "density", "direction", "milliseconds", "spread"}
KEYS |= {"tflops", "gpu", "versions", "commit"}
GRID = Grid(3, 5, 7)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RADIAL = RadialConfig(decay_factor=0.2, near_width=0.4, block_size=32)


def tiny(configs=(RADIAL,), **changes) -> shapes.Shape:
    return shapes.Shape("tiny", "for a test", GRID, 2, 16, lambda: configs, torch.float32, **changes)


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "CPU_SHAPES", (tiny(),))


def random_inputs(tokens=GRID.tokens, heads=2, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, heads, head_dim, generator=generator) for _ in range(3)]


class TestKernels:
    def test_the_records(self, tiny_shapes, tmp_path, capsys):
        output = tmp_path / "new" / "bench.json"
        assert cli.main(["bench", "kernels", "--cpu", "--repeats", "2", "--output", str(output), "--json"]) == 0
        printed = json.loads(capsys.readouterr().out)
        assert printed == json.loads(output.read_text())
        assert all(one.keys() == KEYS for one in printed)
        dense, sparse = printed
        assert (dense["kernel"], dense["density"], dense["direction"]) == ("torch SDPA", 1.0, "forward")
        assert sparse["kernel"] == "fastdiff torch, radial tiled, decay 0.2, near 0.4"
        plan = build_plan(RADIAL, TokenLayout.self_attention(GRID))
        assert sparse["density"] == round(plan.density(), 4)
        assert (sparse["tokens"], sparse["heads"], sparse["head_dim"], sparse["dtype"]) == (105, 2, 16, "float32")
        assert sparse["milliseconds"] > 0

    def test_the_table(self, tiny_shapes, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "160")
        assert cli.main(["bench", "kernels", "--cpu", "--repeats", "1", "--output", str(tmp_path / "b.json")]) == 0
        out = capsys.readouterr().out
        assert "tiny: for a test, 105 tokens, 2 heads of 16" in out
        assert "torch SDPA" in out
        assert "1.00x" in out

    @pytest.mark.parametrize("wrong", [lambda out: out * 1.001, lambda out: out * float("nan")])
    def test_a_wrong_kernel_is_not_timed(self, tiny_shapes, tmp_path, fails, monkeypatch, wrong):
        monkeypatch.setattr(kernels, "attention", lambda *call: wrong(attention(*call)))
        said = fails("bench", "kernels", "--cpu", "--output", tmp_path / "b.json")
        assert "fastdiff torch, radial" in said
        assert "not timed" in said
        assert not (tmp_path / "b.json").exists()

    def test_a_wrong_dense_kernel_is_refused_too(self, tiny_shapes, fails, monkeypatch, tmp_path):
        monkeypatch.setattr(kernels, "dense_kernels", lambda device: {"torch SDPA": lambda q, k, v: v})
        assert "torch SDPA on shape tiny" in fails("bench", "kernels", "--cpu", "--output", tmp_path / "b.json")

    @pytest.mark.parametrize(
        "says", ["No available kernel. Aborting execution.", "out of resource: flex", "No choices to select"]
    )
    def test_a_missing_dense_kernel_is_named(self, monkeypatch, says):
        def absent(q, k, v):
            raise RuntimeError(says)

        monkeypatch.setattr(kernels, "dense_kernels", lambda device: {"cuDNN SDPA": absent})
        found = kernels.Bench(tiny(), "cpu", 1)
        assert [one["kernel"].split(",")[0] for one in found.run()] == ["fastdiff torch"]
        assert found.missing == {"cuDNN SDPA": says}

    def test_a_fault_of_a_dense_kernel_is_not_hidden(self, monkeypatch):
        def broken(q, k, v):
            raise RuntimeError("an illegal memory access was encountered")

        monkeypatch.setattr(kernels, "dense_kernels", lambda device: {"cuDNN SDPA": broken})
        with pytest.raises(RuntimeError, match="illegal memory access"):
            kernels.Bench(tiny(), "cpu", 1).run()

    def test_gradients_text_agents_and_lists_of_heads(self):
        configs = (RADIAL, NeighborhoodConfig((3, 3, 3), block_size=32), AgentConfig((1, 2, 2), steps=(0.0, 1.0)))
        by_head = (shapes.RandomParo(2, 0.5), shapes.RandomBlocks(2, 0.5))
        found = kernels.Bench(tiny((*configs, *by_head), text=9), "cpu", 1).run()
        assert [one["kernel"].partition(", ")[2] for one in found] == [
            "",
            "radial tiled, decay 0.2, near 0.4",
            "neighborhood 3x3x3",
            "agent, 1x2x2 agents",
            "paro, random blocks",
            "random blocks for each head",
        ]
        both = kernels.Bench(tiny(backward=True), "cpu", 1).run()
        assert [one["direction"] for one in both] == ["forward", "backward"] * 2
        assert both[2]["density"] == both[3]["density"]

    def test_operations(self):
        forward = 4 * 2 * 114**2 * 16 * 0.5
        assert kernels.operations(tiny(text=9), 0.5, "forward") == forward
        assert kernels.operations(tiny(text=9), 0.5, "backward") == 2.5 * forward

    def test_slow_calls_are_repeated_less(self, monkeypatch):
        monkeypatch.setattr(record, "_PATIENCE", 0.0)
        assert len(record.milliseconds(lambda: None, "cpu", 10)) == 3
        assert len(record.milliseconds(lambda: None, "cpu", 2)) == 2

    def test_a_gpu_rests_and_wakes_before_it_is_timed(self, monkeypatch):
        did = []
        monkeypatch.setattr(record, "_gpu_times", lambda run, count: did.append(count) or [4.0] * count)
        monkeypatch.setattr(record.time, "sleep", did.append)
        assert record.milliseconds(lambda: did.append("call"), "cuda", 10) == [4.0] * 10
        assert did == [1, record._REST, *["call"] * 5, 10]

    def test_without_a_gpu(self, fails, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert "no CUDA device was found; --cpu" in fails("bench", "kernels")
        assert "no CUDA device was found; whole models" in fails("bench", "models")

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["kernels", "--shape", "W", "--cpu"], "allowed are portable-64"),
            (["kernels", "--shape", "square"], "allowed are W, "),
            (["kernels", "--cpu", "--repeats", "0"], "--repeats"),
            (["models", "--model", "tiny"], "allowed are wan-14b"),
            (["models", "--density", "2"], "above 0"),
            (["models", "--mode", "traced"], "--mode is 'traced'; allowed are eager, compiled."),
            (["nothing"], "nothing"),
            ([], "Missing command; see fastdiff bench --help."),
        ],
    )
    def test_bad_input(self, fails, words, says):
        assert says in fails("bench", *words)

    @pytest.mark.parametrize("command", ["kernels", "models"])
    def test_help(self, capsys, command):
        assert cli.main(["bench", command, "--help"]) == 0
        assert "Examples:" in capsys.readouterr().out

    def test_help_names_what_there_is(self):
        assert tuple(shape.name for shape in shapes.GPU_SHAPES) == bench.SHAPES
        assert tuple(shape.name for shape in shapes.CPU_SHAPES) == bench.CPU_SHAPES
        assert tuple(one.name for one in ARCHITECTURES) == bench.MODELS
        assert MODES == bench.MODES


class TestTruth:
    PLAN = build_plan(RADIAL, TokenLayout.self_attention(GRID))

    def test_gradients(self):
        inputs = [x.requires_grad_() for x in random_inputs()]
        out = attention(*inputs, self.PLAN)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out, inputs, upstream)
        inputs = [x.detach() for x in inputs]
        check_gradients("it", inputs, upstream, grads, self.PLAN)
        for which, name in enumerate("qkv"):
            wrong = [x * (1.1 if place == which else 1) for place, x in enumerate(grads)]
            with pytest.raises(WrongResultError, match=f"gradient of {name}"):
                check_gradients("it", inputs, upstream, wrong, self.PLAN)

    def test_another_plan_is_noticed(self):
        inputs = random_inputs()
        with pytest.raises(WrongResultError, match="query"):
            check_output("it", inputs, attention(*inputs, self.PLAN), None)

    def test_agents(self):
        inputs = random_inputs()
        plan = build_plan(AgentConfig((1, 2, 2), steps=(0.0, 1.0)), TokenLayout.self_attention(GRID))
        agents = pool_cells(inputs[0], plan)
        out = agent_attention(*inputs, agents, plan, shortcut=0.1)
        check_agents("it", inputs, agents, out, plan, shortcut=0.1)
        with pytest.raises(WrongResultError, match="it"):
            check_agents("it", inputs, agents, out, plan, shortcut=0.2)


def test_a_reorder_that_loses_tokens_is_not_timed(monkeypatch):
    from fastdiff.bench import reorder

    # Five rows of seven tokens leave padding in blocks of 32.
    plan = build_plan(RADIAL, TokenLayout.self_attention(GRID)).to(DEVICE)
    inputs = [x.to(DEVICE) for x in random_inputs()]
    reorder.there_and_back(inputs, plan, "it")()
    gather = reorder.gather
    monkeypatch.setattr(reorder, "gather", lambda *pairs: tuple(x.flip(1) for x in gather(*pairs)))
    with pytest.raises(WrongResultError, match="it: tokens do not come back"):
        reorder.there_and_back(inputs, plan, "it")


def test_every_block_stands_in_token_order():
    plan = shapes.EveryBlock().build_plan(TokenLayout.self_attention(Grid(4, 9, 20), text_before=26))
    assert plan.key.in_token_order
    assert plan.density() == pytest.approx((6 * 128 / 746) ** 2)
    q, k, v = (torch.randn(1, 746, 2, 16) for _ in range(3))
    dense = rivals.dense_kernels("cpu")["torch SDPA"](q, k, v)
    torch.testing.assert_close(attention(q, k, v, plan), dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (NeighborhoodConfig((None, 10, 10), stride=(1, 2, 2)), "neighborhood allx10x10, stride 1x2x2"),
        (shapes.EveryBlock(), "every block"),
        (RadialConfig(decay_factor=0.2, mode="reference"), "radial reference, decay 0.2, near 1"),
    ],
)
def test_names(config, name):
    assert kernels.name_of(config) == name


_every_order = pytest.mark.parametrize(
    "config",
    [RADIAL, NeighborhoodConfig((1, 3, 3), block_size=32), ClearConfig(2, block_size=32), shapes.RandomParo(2, 0.5)],
    ids=kernels.name_of,
)


@_every_order
def test_our_own_kernel_without_the_reorder(config, monkeypatch):
    taken = []
    monkeypatch.setattr(rivals, "attention", lambda *call: taken.append(call[3]) or attention(*call))
    inputs = random_inputs(tokens=GRID.tokens + 9)
    plan = config.build_plan(TokenLayout.self_attention(GRID, text_before=9))
    blocks = rivals.OwnBlocks(plan)
    (out,) = blocks.tokens(blocks.attend(*blocks.slots(*inputs)))
    torch.testing.assert_close(out, attention(*inputs, plan, backend="reference"), atol=1e-5, rtol=1e-4)
    assert [one.key.in_token_order and one.query.in_token_order for one in taken] == [True]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@_every_order
def test_flex_on_the_blocks_of_a_plan(config, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    inputs = random_inputs(tokens=GRID.tokens + 9)
    plan = config.build_plan(TokenLayout.self_attention(GRID, text_before=9))
    blocks = rivals.FlexBlocks(plan)
    slots = blocks.slots(*inputs)
    assert all(torch.equal(x, back) for x, back in zip(inputs, blocks.tokens(*slots), strict=True))
    # What a query of padding would add to a gradient.
    (upstream,) = blocks.slots(torch.ones_like(inputs[0]))
    assert int(upstream.count_nonzero()) == inputs[0].numel() < upstream.numel()
    (out,) = blocks.tokens(blocks.attend(*slots))
    torch.testing.assert_close(out, attention(*inputs, plan, backend="reference"), atol=1e-5, rtol=1e-4)


class TestFlashAttention4:
    def test_the_blocks_of_a_plan(self, fake_fa4):
        inputs = random_inputs()
        plan = shapes.RandomParo(2, 0.5).build_plan(TokenLayout.self_attention(GRID))
        blocks = rivals.FA4Blocks(plan)
        slots = blocks.slots(*inputs)
        assert all(torch.equal(x, back) for x, back in zip(inputs, blocks.tokens(*slots), strict=True))
        (out,) = blocks.tokens(blocks.attend(*slots))
        torch.testing.assert_close(out, attention(*inputs, plan, backend="reference"), atol=1e-5, rtol=1e-4)

    def test_it_takes_random_blocks_for_each_head(self):
        grid = Grid(4, 9, 20)
        plan = shapes.RandomBlocks(3, 0.3).build_plan(TokenLayout.self_attention(grid))
        assert plan.lists == 3
        assert not torch.equal(plan.draw(0), plan.draw(1))
        lists = fa4_lists(plan)
        assert torch.equal(lists.full_block_cnt[0] + lists.mask_block_cnt[0], plan.full.counts + plan.partial.counts)

    def test_dense(self, fake_fa4, monkeypatch):
        ours = rivals.dense_kernels("cuda")["FlashAttention-4, dense"]
        inputs = random_inputs()
        torch.testing.assert_close(ours(*inputs), rivals.dense_kernels("cpu")["torch SDPA"](*inputs))
        monkeypatch.setattr(rivals, "fa4_version", lambda: None)
        assert "FlashAttention-4, dense" not in rivals.dense_kernels("cuda")
        assert set(rivals.dense_kernels("cuda")) < set(rivals.DENSE)

    def test_its_version_is_recorded(self, fake_fa4, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        assert record.conditions("cuda", "abc")["versions"]["flash-attn-4"] == "4.0"
        assert "flash-attn-4" not in record.conditions("cpu", "abc")["versions"]

    def test_what_it_cannot_take_is_named(self, fake_fa4):
        found = kernels.Bench(tiny(), "cpu", 1)
        for config in (shapes.RandomParo(2, 0.5), NeighborhoodConfig((3, 3, 3), block_size=32)):
            found._beside(config.build_plan(found.shape.layout), kernels.name_of(config), first=False)
        assert [one["kernel"] for one in found.records] == ["FlashAttention-4, paro, random blocks"]
        assert list(found.missing) == ["FlashAttention-4, neighborhood 3x3x3"]
        assert "BOX rule decides" in found.missing["FlashAttention-4, neighborhood 3x3x3"]


class TestModels:
    # Of the published models.
    PARAMETERS = {
        "wan-14b": 14_288_491_584,
        "wan-1.3b": 1_418_996_800,
        "hunyuan": 12_821_012_544,
        "cogvideox": 5_570_283_072,
        "mochi": 10_027_677_744,
        "flux": 11_901_408_320,
        "flux-8k": 11_901_408_320,
        "sdxl": 2_567_463_684,
    }

    @pytest.mark.parametrize("one", ARCHITECTURES, ids=lambda one: one.name)
    def test_the_config_is_the_published_one(self, one):
        model = one.build("meta", one.depth())
        assert sum(parameter.numel() for parameter in model.parameters()) == self.PARAMETERS[one.name]

    # Mochi enters autocast, which meta tensors have not.
    @pytest.mark.parametrize("one", [one for one in ARCHITECTURES if one.name != "mochi"], ids=lambda one: one.name)
    def test_inputs_fit_and_have_the_tokens_that_are_named(self, one, monkeypatch):
        found = set()
        sdpa = torch.nn.functional.scaled_dot_product_attention

        def watch(query, key, value, **others):
            if query.shape == key.shape:
                found.add(tuple(query.shape[1:]))
            return sdpa(query, key, value, **others)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watch)
        model = one.build("meta", dict.fromkeys(one.layers, 1))
        inputs = one.inputs(Draw("meta"))
        with torch.no_grad():
            out = model(**inputs, return_dict=False)[0]
        assert out.shape == inputs["sample" if one.name == "sdxl" else "hidden_states"].shape
        assert (one.heads, one.tokens, one.head_dim) in found

    def test_parts_that_the_class_keeps_exact(self):
        model = next(one for one in ARCHITECTURES if one.name == "wan-1.3b").build("meta", {"blocks": 1})
        assert model.scale_shift_table.dtype == torch.float32
        assert model.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16

    def test_times_are_scaled_by_list(self):
        depth = {"double": 19, "single": 38}
        points = depths(depth, 2, full=False)
        assert points == [{"double": 2, "single": 2}, {"double": 4, "single": 2}, {"double": 2, "single": 4}]
        readings = [7 + 3 * point["double"] + 5 * point["single"] for point in points]
        assert scaled(readings, points, depth) == 7 + 3 * 19 + 5 * 38

    @pytest.mark.parametrize(("depth", "full"), [({"blocks": 40}, True), ({}, False), ({"blocks": 2}, False)])
    def test_whole_models_are_not_scaled(self, depth, full):
        points = depths(depth, 2, full)
        assert points == [depth]
        assert scaled([3.5], points, depth) == 3.5

    # Those with the highest floors.
    @pytest.mark.parametrize(("model", "method"), [("cogvideox", "radial"), ("flux", "neighborhood")])
    def test_methods_can_be_solved_for_the_density_that_is_usual(self, model, method):
        one = next(one for one in ARCHITECTURES if one.name == model)
        usual = inspect.signature(bench.models).parameters["density"].default
        plan = BUILDERS[method][0](one, usual).build_plan(TokenLayout.self_attention(one.grid, text_before=one.text))
        assert usual - 0.1 < plan.density() <= usual

    def test_the_breakdown(self):
        ops, device = [], []

        def op(name, start, stop, kernels=(), thread=1):
            number = len(ops) + 1
            span = {"ts": start, "dur": stop - start, "pid": 7, "tid": thread}
            ops.append({"cat": "cpu_op", "name": name, "args": {"External id": number}, **span})
            device.extend(on_device(kernel, us, number) for kernel, us in kernels)

        def on_device(name, us, number=None, cat="kernel"):
            args = {} if number is None else {"External id": number}
            return {"cat": cat, "name": name, "ts": 999, "dur": us, "args": args}

        fused = "triton_poi_fused__scaled_dot_product_cudnn_attention_add_cat_3"
        op("fastdiff::block_sparse", 0, 50, [("_forward_kernel", 4000), ("_gather_kernel", 100)])
        op("aten::index_select", 10, 20, [("indexSelectLargeIndex", 300)])
        op("aten::linear", 50, 80)
        op("aten::addmm", 50, 70, [("nvjet", 2000)])
        op("aten::add", 70, 80, [("vectorized", 40)])
        op("aten::scaled_dot_product_attention", 80, 100)
        op("aten::_scaled_dot_product_cudnn_attention", 85, 95, [("cudnn_sm90", 1000)])
        op("aten::add", 100, 110, [("vectorized", 10)])
        op("aten::mul", 90, 95, [("vectorized", 5)], thread=2)
        op(fused, 110, 120, [(fused, 60)])
        others = [
            # Its number is that of the addmm, by chance.
            {"cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 55, "dur": 2, "args": {"correlation": 4}},
            on_device("Memset (Device)", 20, cat="gpu_memset"),
            on_device("a range", 10_000, cat="gpu_user_annotation"),
            {"ph": "M", "name": "process_name", "args": {"name": "python"}},
        ]
        found = add_up([*ops, *device, *others])
        assert found == pytest.approx({"attention": 5.0, "linears": 2.0, "element-wise": 0.135, "reorder": 0.4})

    def test_the_breakdown_reads_the_profilers_file(self, tmp_path):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(4))
        profiler.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        (product,) = (event for event in events if event.get("cat") == "cpu_op" and event["name"] == "aten::addmm")
        kernel = {"cat": "kernel", "name": "gemm", "dur": 3000, "args": {"External id": product["args"]["External id"]}}
        assert add_up([*events, kernel])["linears"] == 3


def test_a_commit_is_not_that_of_somebody_elses_checkout(monkeypatch):
    done = iter([SimpleNamespace(returncode=1, stdout="")])
    monkeypatch.setattr(record.subprocess, "run", lambda *words, **more: next(done))
    assert record.conditions("cpu", None)["commit"] == "unknown"
    assert record.conditions("cpu", "abc")["commit"] == "abc"


@pytest.mark.gpu
class TestOnAGpu:
    def test_kernels(self):
        grid = Grid(4, 16, 16)
        shape = shapes.Shape("tiny", "for a test", grid, 2, 64, lambda: (RADIAL,), backward=True, reorder=True)
        found = kernels.Bench(shape, "cuda", 2)
        names = [one["kernel"] for one in found.run()] + list(found.missing)
        assert {*rivals.SDPA_BACKENDS, "FlexAttention, dense", kernels.REORDER} <= set(names)
        ours = [one for one in found.records if one["kernel"].startswith("fastdiff triton")]
        assert [one["direction"] for one in ours] == ["forward", "backward", "forward"]
        assert [one["kernel"].endswith("tokens in its order") for one in ours] == [False, False, True]

    def test_models(self):
        small = next(one for one in ARCHITECTURES if one.name == "wan-1.3b")
        sizes = {"num_attention_heads": 2, "attention_head_dim": 64, "ffn_dim": 256, "num_layers": 7}
        grid = Grid(5, 16, 16)
        small = replace(small, config=small.config | sizes, grid=grid, inputs=wan_inputs(grid), heads=2, head_dim=64)
        found = ModelBench(small, density=0.5, full=False, repeats=2)
        records = found.run()
        assert found.missing == {}
        assert [one["mode"] for one in records] == ["eager"] * 5 + ["compiled"] * 5
        for one in records:
            assert one["milliseconds"] > 0
            assert one["breakdown"]["attention"] > 0
            assert one["breakdown"]["linears"] > 0
            assert (one["config"] is None) == (one["density"] == 1) == (one["plan_milliseconds"] is None)
            assert one["config"] is None or one["breakdown"]["reorder"] > 0
