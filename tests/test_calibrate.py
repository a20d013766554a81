"""Calibration: statistics against the explicit map, planted structure, masks under a density, whole pipelines."""

import json

import pytest
import tiny_models
import tiny_picture_models
import torch
from paro_plans import BLOCK, places
from safetensors import safe_open

import fastdiff
from fastdiff import cli
from fastdiff.calibration import CalibrationSettings
from fastdiff.calibration.outcome import choose_masks, choose_orders
from fastdiff.calibration.recorder import Recorder
from fastdiff.calibration.search import best_order, choose, kept_mass, paper_score, value_by_row
from fastdiff.calibration.statistics import block_statistics
from fastdiff.methods.paro_file import calibration_at
from fastdiff_kernels import Grid, InvalidInputError, TokenLayout, UnsupportedError
from fastdiff_kernels.axis_order import AXIS_ORDERS, axis_order
from fastdiff_patches.planner import Extras

ODD_GRIDS = [Grid(3, 5, 11), Grid(1, 7, 9), Grid(1, 13, 10), Grid(4, 4, 8)]
WAN_CALL = {"height": 96, "width": 160, "num_frames": 17, "num_inference_steps": 4, "max_sequence_length": 8}


def random_qk(heads, queries, keys, seed=0, size=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(heads, n, 8, generator=generator) for n in (queries, keys))


def explicit(q, k, scale, grid, start, order, hidden=None, epsilon=1e-3):
    """Sum, peak and share of small entries of each block, from the whole map, block by block."""
    scores = torch.einsum("hqd,hkd->hqk", q.double(), k.double()) * scale
    if hidden is not None:
        scores[..., hidden] = float("-inf")
    weights = scores.softmax(-1)[..., start : start + grid.tokens]
    block = places(grid, order) // BLOCK
    blocks = int(block.max()) + 1
    found = torch.zeros(3, len(q), blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(blocks):
            entries = weights[:, block == i][:, :, block == j].flatten(1)
            found[:, :, i, j] = torch.stack([entries.sum(1), entries.amax(1), (entries < epsilon).double().mean(1)])
    return found


class TestStatistics:
    @pytest.mark.parametrize("grid", ODD_GRIDS, ids=str)
    @pytest.mark.parametrize("tile", [1, 5000, None])
    def test_equal_the_explicit_map(self, grid, tile):
        before, after = 7, 70
        q, k = random_qk(2, grid.tokens, before + grid.tokens + after)
        hidden = torch.zeros(k.shape[1], dtype=torch.bool)
        hidden[[2, 9, before + 20, -1]] = True
        orders = [axis_order(grid, which) for which in range(6)]
        found = block_statistics(q, k, orders, 0.3, start=before, hidden=hidden, epsilon=1e-3, tile=tile)
        for which, statistics in enumerate(found):
            expected = explicit(q, k, 0.3, grid, before, AXIS_ORDERS[which], hidden)
            for part, truth in zip(statistics, expected, strict=True):
                torch.testing.assert_close(part.double(), truth, rtol=1e-4, atol=1e-6)

    def test_a_sample_has_the_rows_of_the_whole(self):
        grid = Grid(5, 7, 9)
        q, k = random_qk(3, grid.tokens, grid.tokens)
        orders, rows = [axis_order(grid, which) for which in (1, 4)], torch.tensor([0, 3, 4])
        whole = block_statistics(q, k, orders, 0.3, epsilon=1e-3)
        some = block_statistics(q, k, orders, 0.3, epsilon=1e-3, rows=rows)
        for all_rows, sampled in zip(whole, some, strict=True):
            for full, part in zip(all_rows, sampled, strict=True):
                torch.testing.assert_close(part, full[:, rows])


class TestChoosing:
    def test_kept_mass(self):
        sums = torch.rand(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        found, error = kept_mass(sums, 0.5, torch.arange(6), 6 * BLOCK)
        for i in range(2):
            for j in range(3):
                off = sums[i, j][~torch.eye(6, dtype=torch.bool)].sort(descending=True).values
                expected = sums[i, j].diagonal().sum() + off[: 18 - 6].sum()
                assert found[i, j] == pytest.approx(float(expected) / (6 * BLOCK), rel=1e-5)
        assert not error.any()

    def test_a_sample_tells_its_error(self):
        """The spread of estimates from many samples is about what each of them says."""
        generator = torch.Generator().manual_seed(0)
        sharpness = 1 + 9 * torch.rand(64, 1, generator=generator)
        sums = BLOCK * (sharpness * torch.rand(64, 64, generator=generator)).softmax(-1)
        estimates, errors = [], []
        for _ in range(200):
            rows = torch.randperm(64, generator=generator)[:16].sort().values
            found, error = kept_mass(sums[rows], 0.3, rows, 64 * BLOCK)
            estimates.append(found)
            errors.append(error)
        said, spread = float(torch.stack(errors).mean()), float(torch.stack(estimates).std())
        assert 0.6 * spread < said < 2.5 * spread

    def test_the_papers_score_is_mended(self):
        """More that can be skipped is better; so is less unevenness."""
        skipped, even = torch.tensor([0.2, 0.6, 0.4]), torch.tensor([10.0, 30.0, 20.0])
        assert paper_score(skipped, even, 1.0).argmin() == 1
        assert paper_score(skipped, even, 0.0).argmin() == 0
        expected = 0.7 * torch.tensor([0.8, 0.4, 0.6]) / 1.8 + 0.3 * even / 60
        torch.testing.assert_close(paper_score(skipped, even, 0.7), expected)

    def test_of_equal_orders_the_first(self):
        best, second, margin = best_order(torch.tensor([[1.0, 2.0], [1.0, 3.0], [0.0, 1.0]]))
        assert (best.tolist(), second.tolist(), margin.tolist()) == ([0, 1], [1, 0], [0.0, 1.0])
        assert best_order(torch.ones(1, 2))[2].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("budget", [0.2, 0.31, 0.5, 0.999, 1.0])
    def test_a_global_threshold_is_the_best_choice(self, budget):
        sums = [torch.rand(3, 9, 9, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
        masks = choose([x.clone() for x in sums], [1 / (2 * 3 * 81)] * 2, budget)
        values = torch.stack(sums)
        diagonal = torch.eye(9, dtype=torch.bool).expand_as(values)
        count = int(budget * values.numel() + 1e-6)
        rest = values[~diagonal].sort(descending=True).values[: count - int(diagonal.sum())]
        kept = torch.stack(masks)
        assert int(kept.sum()) == count
        assert kept[diagonal].all()
        assert float(values[kept].sum()) == pytest.approx(float(rest.sum() + values[diagonal].sum()), rel=1e-5)

    def test_ties_do_not_waste_the_budget(self):
        masks = choose([torch.full((2, 8, 8), 0.5), torch.zeros(2, 8, 8)], [1 / 256] * 2, 0.4)
        assert sum(int(mask.sum()) for mask in masks) == int(0.4 * 256)
        assert all(mask.diagonal(dim1=1, dim2=2).all() for mask in masks)

    def test_costs_differ_by_layer(self):
        """At equal value the threshold is the same, and the budget pays for what it reaches."""
        masks = choose([torch.rand(1, 4, 4), torch.rand(1, 16, 16)], [1 / 32, 1 / 512], 0.5)
        assert int(masks[0].sum()) / 32 + int(masks[1].sum()) / 512 == pytest.approx(0.5, abs=1 / 32)

    def test_rows_keep_equal_shares(self):
        sums = torch.rand(2, 12, 12, generator=torch.Generator().manual_seed(3)) ** 4
        (mask,) = choose([value_by_row(sums)], [1 / 288], 0.4)
        kept = (sums * mask).sum(-1) / sums.sum(-1)
        without_least = kept - (sums / sums.sum(-1, keepdim=True)).masked_fill(~mask, 1).amin(-1)
        forced = mask & (value_by_row(sums) < value_by_row(sums)[mask & ~torch.eye(12, dtype=torch.bool)].min())
        rows = ~forced.any(-1)
        assert float(kept[rows].min()) >= float(without_least[rows].max()) - 1e-6
        assert int(mask.sum()) == int(0.4 * 288)


def planted(grid, head_orders, seed=0):
    """q, k, v `[1, tokens, heads, 16]` of heads whose attention is made of blocks in one order each."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-grid.tokens // BLOCK)
    code = torch.nn.functional.normalize(torch.randn(blocks, 16, generator=generator), dim=-1)
    own = torch.stack([code[places(grid, AXIS_ORDERS[which]) // BLOCK] for which in head_orders], dim=1)
    noise = (0.02 * torch.randn(own.shape, generator=generator) for _ in range(2))
    q, k = (9 * (own + x) for x in noise)
    return q[None], k[None], torch.randn(own[None].shape, generator=generator)


@pytest.mark.parametrize("objective", ["mass", "paper"])
@pytest.mark.parametrize("sample", [1.0, 0.5])
def test_planted_orders_are_found(objective, sample):
    # No axis fills blocks, so that the six orders make six different sets of them.
    grid, head_orders = Grid(6, 10, 9), (3, 0, 5, 1, 4, 2)
    settings = CalibrationSettings(density=0.25, groups=1, objective=objective)
    recorder = Recorder(1, lambda layer, grid, heads: torch.arange(6)[:, None].expand(-1, heads), sample, 1e-3)
    q, k, v = planted(grid, head_orders)
    layout = TokenLayout.self_attention(grid)
    plan = recorder.plan(layout, layer=0, step=0, steps=1, heads=6, head_dim=16, device=q.device)
    out = recorder.attend(q, k, v, plan, Extras(0.25, None, "auto", None, {}))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.25)
    assert torch.equal(out, dense.transpose(1, 2))
    found = choose_orders(recorder.records[0], settings)
    assert found.order.tolist() == list(head_orders)
    assert float(found.margin.min()) > 0.02
    if sample == 1:
        (layer,) = choose_masks(["a"], recorder.records, {0: found}, settings)
        assert float(layer.mass.min()) > 0.9
        assert float(layer.density.mean()) * 9**2 * BLOCK**2 / grid.tokens**2 == pytest.approx(0.25, abs=1 / 100)


@pytest.fixture(scope="module")
def pipe():
    return tiny_models.tiny_wan_pipeline(heads=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_models.tiny_wan_pipeline().save_pretrained(folder)
    return str(folder)


class TestWan:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "new" / "wan.safetensors"

    def test_calibrate_apply_remove(self, pipe, path):
        call = {"steps": 4, "num_frames": 17}
        dense, before = tiny_models.video(pipe, **call), dict(pipe.transformer.attn_processors)
        config = fastdiff.calibrate(pipe, [tiny_models.PROMPT, "a blue square"], path=path, density=0.5, **WAN_CALL)
        assert pipe.transformer.attn_processors == before
        assert [file.name for file in path.parent.iterdir()] == ["wan.safetensors"]
        found = calibration_at(str(path)).describe()
        assert (found["prompts"], found["steps"], found["grids"]) == (2, 4, ["5x6x10"])
        assert sum(found["orders"].values()) == 6
        fastdiff.apply(pipe, config, dense_steps=1)
        sparse = tiny_models.video(pipe, **call)
        mean = fastdiff.summary(pipe, steps=4).models[0].mean_density
        assert not torch.equal(sparse, dense)
        assert mean <= 0.25 + 0.75 * 0.5
        assert mean == pytest.approx(0.25 + 0.75 * 0.5, abs=0.02)
        fastdiff.remove(pipe)
        assert torch.equal(tiny_models.video(pipe, **call), dense)

    def test_at_full_density_it_is_dense(self, pipe, path):
        config = fastdiff.calibrate(pipe, tiny_models.PROMPT, path=path, density=1.0, groups=1, **WAN_CALL)
        # Padding makes the area of all tiles larger than the number of scores.
        layer = calibration_at(str(path)).layers[0]
        assert float(layer.mass.min()) > 0.7
        assert not config.uses_steps

    @pytest.mark.parametrize("settings", [{"mask": "row"}, {"objective": "paper", "alpha": 0.5}], ids=str)
    def test_other_ways(self, pipe, path, settings):
        fastdiff.calibrate(pipe, tiny_models.PROMPT, path=path, density=0.5, **settings, **WAN_CALL)
        found = calibration_at(str(path)).describe()
        assert {name: found[name] for name in settings} == settings

    def test_a_sample_takes_a_second_run(self, pipe, path, monkeypatch):
        runs = []
        monkeypatch.setattr(type(pipe), "check_inputs", lambda *_, **__: runs.append(1))
        fastdiff.calibrate(pipe, tiny_models.PROMPT, path=path, density=0.5, **WAN_CALL)
        whole = calibration_at(str(path))
        fastdiff.calibrate(pipe, tiny_models.PROMPT, path=path, density=0.5, sample=0.6, **WAN_CALL)
        sampled = calibration_at(str(path))
        assert len(runs) == 3
        assert sampled.describe()["heads_within_sampling_error"] > 0
        for full, part in zip(whole.layers, sampled.layers, strict=True):
            same = full.orders == part.orders
            assert (full.density[:, same] - part.density[:, same]).abs().max() < 0.2

    def test_the_floor_is_told_after_the_first_forward(self, pipe, path, monkeypatch):
        steps = []
        monkeypatch.setattr(pipe.transformer, "forward", counted(pipe.transformer.forward, steps))
        with pytest.raises(InvalidInputError, match=r"below the floor of paro on a grid of 5x6x10, which is 0\.22"):
            fastdiff.calibrate(pipe, tiny_models.PROMPT, path=path, density=0.1, **WAN_CALL)
        assert len(steps) == 1
        assert not path.parent.exists()

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"density": 0}, "density is 0"),
            ({"density": 1.5}, "density is 1.5"),
            ({"groups": 0}, "groups is 0"),
            ({"groups": 5}, "groups is 5 and the run has 4 steps"),
            ({"objective": "best"}, "allowed are mass, paper"),
            ({"mask": "column"}, "allowed are global, row"),
            ({"sample": 0}, "sample is 0"),
            ({"sigma": 2}, "sigma is 2"),
            ({"prompts": []}, "prompts is"),
            ({"prompts": [" "]}, "prompts is"),
            ({"path": "a.pt"}, r"end in \.safetensors"),
            ({"prompt": "a"}, "use prompts"),
            ({"generator": None}, "use seed"),
        ],
        ids=str,
    )
    def test_bad_settings(self, pipe, path, changes, says):
        arguments = {"prompts": tiny_models.PROMPT, "path": path, "density": 0.5, **WAN_CALL, **changes}
        before = dict(pipe.transformer.attn_processors)
        with pytest.raises(InvalidInputError, match=says):
            fastdiff.calibrate(pipe, **arguments)
        assert not path.parent.exists()
        assert pipe.transformer.attn_processors == before

    def test_what_cannot_be_calibrated(self, pipe, path):
        with pytest.raises(InvalidInputError, match="calibrate the pipeline, not the model"):
            fastdiff.calibrate(pipe.transformer, "a", path=path)
        with pytest.raises(UnsupportedError, match="2 transformers"):
            fastdiff.calibrate(tiny_models.tiny_wan_pipeline(two_experts=True), "a", path=path)
        fastdiff.apply(pipe, fastdiff.RadialConfig())
        with pytest.raises(InvalidInputError, match=r"is patched.*fastdiff\.remove"):
            fastdiff.calibrate(pipe, "a", path=path)
        fastdiff.remove(pipe)

    def test_a_place_that_cannot_be_written(self, pipe, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InvalidInputError, match="cannot write"):
            fastdiff.calibrate(pipe, "a", path=tmp_path / "file" / "a.safetensors", **WAN_CALL)


def counted(forward, calls):
    def count(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    return count


def test_flux(tmp_path):
    """Text before the grid counts in the density, and a picture has two orders."""
    pipe = tiny_picture_models.tiny_flux_pipeline()
    call = {"height": 96, "width": 80, "num_inference_steps": 2, "max_sequence_length": 8}
    path = tmp_path / "flux.safetensors"
    config = fastdiff.calibrate(pipe, "a red circle", path=path, density=0.5, groups=2, **call)
    found = calibration_at(str(path))
    assert {int(order) for layer in found.layers for order in layer.orders} <= {0, 1}
    dense = tiny_picture_models.picture(pipe, **call)
    fastdiff.apply(pipe, config)
    sparse = tiny_picture_models.picture(pipe, **call)
    assert not torch.equal(sparse, dense)
    assert fastdiff.summary(pipe, steps=2).models[0].mean_density <= 0.5
    fastdiff.remove(pipe)
    assert torch.equal(tiny_picture_models.picture(pipe, **call), dense)


def test_unet(tmp_path):
    """Layers of different grids share one density; coarse ones stay dense and have no masks."""
    pipe = tiny_picture_models.tiny_sd_pipeline()
    call = {"height": 56, "width": 48, "num_inference_steps": 2}
    path = tmp_path / "unet.safetensors"
    config = fastdiff.calibrate(pipe, "a red circle", path=path, density=0.5, groups=1, **call)
    found = calibration_at(str(path))
    assert len({layer.grid for layer in found.layers if layer is not None}) > 1
    assert None in found.layers
    dense = tiny_picture_models.picture(pipe, **call)
    fastdiff.apply(pipe, config)
    assert not torch.equal(tiny_picture_models.picture(pipe, **call), dense)
    pairs = {layer.name: layer.grid.tokens**2 for layer in found.layers if layer is not None}
    sparse = [
        (pairs[layer.name], layer.density) for layer in fastdiff.summary(pipe).models[0].layers if not layer.dense
    ]
    mean = sum(count * density for count, density in sparse) / sum(pairs.values())
    assert mean <= 0.5
    assert mean == pytest.approx(0.5, abs=0.02)
    fastdiff.remove(pipe)
    assert torch.equal(tiny_picture_models.picture(pipe, **call), dense)


class TestCommand:
    def test_file_and_json(self, model, capsys, tmp_path):
        prompts, out = tmp_path / "prompts.txt", tmp_path / "deep" / "paro.safetensors"
        prompts.write_text(f"{tiny_models.PROMPT}\n\na blue square\n")
        size = ["--height", "96", "--width", "160", "--num-frames", "17", "--steps", "4"]
        words = ["calibrate", "--model", model, "--prompts", str(prompts), "--density", "0.5", *size]
        assert cli.main([*words, "--output", str(out), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["prompts"], found["steps"], found["config"]["calibration"]) == (2, 4, str(out))
        with safe_open(out, "pt") as file:
            assert json.loads(file.metadata()["fastdiff-paro"])["groups"] == 4
        words = ["plan", "--method", "paro", "--grid", "5x6x10", "--config", json.dumps(found["config"]), "--json"]
        assert cli.main(words) == 0
        assert 0 < json.loads(capsys.readouterr().out)["density"] < 1

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--method", "radial"], "only paro"),
            (["--density", "2"], "density is 2"),
            (["--output", "a.pt"], ".safetensors"),
            (["--prompts", "missing.txt"], "missing.txt cannot be read"),
            (["--model", "somebody/model"], "needs prompts"),
            (["--groups", "many"], "--groups"),
        ],
    )
    def test_bad_input(self, capsys, words, says):
        assert cli.main(["calibrate", *words]) == 2
        assert says in capsys.readouterr().err
