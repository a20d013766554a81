"""Measuring: quality against known values, timing of calls of known length, records that are whole or absent."""

import json
import math
import time

import pytest
import torch

from fastdiff.measure import quality, report, timing
from fastdiff_kernels import Grid, InvalidInputError, MissingDependencyError, TokenLayout


@pytest.fixture
def video():
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0)) * 0.5


class TestQuality:
    def test_psnr_of_a_constant_error_is_its_formula(self, video):
        assert quality.psnr(video + 0.1, video) == pytest.approx(20.0, abs=1e-3)

    def test_equal_videos(self, video):
        assert quality.psnr(video, video) == math.inf
        assert quality.ssim(video, video) == pytest.approx(1.0, abs=1e-5)

    def test_ssim_falls_with_noise(self, video):
        noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
        scores = [quality.ssim((video + size * noise).clamp(0, 1), video) for size in (0.01, 0.1, 0.5)]
        assert scores == sorted(scores, reverse=True)

    def test_ssim_is_the_mean_over_frames_whatever_is_taken_at_once(self, video, monkeypatch):
        noisy = (video + 0.1 * torch.rand(video.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
        alone = [quality.ssim(noisy[i : i + 1], video[i : i + 1]) for i in range(3)]
        for pixels in (1, 2 * 16 * 24, 2**30):
            monkeypatch.setattr(quality, "_PIXELS_AT_ONCE", pixels)
            assert quality.ssim(noisy, video) == pytest.approx(sum(alone) / 3, abs=1e-6)

    @pytest.mark.parametrize("measure", [quality.psnr, quality.ssim])
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            (lambda v: v[:2], "one shape"),
            (lambda v: v[0], r"\[frames, 3, height, width\]"),
            (lambda v: v.permute(0, 2, 3, 1), r"\[frames, 3, height, width\]"),
            (lambda v: v[:0], r"\[frames, 3, height, width\]"),
            (lambda v: v * 255, r"\[0, 1\]"),
            (lambda v: (v * 255).byte(), "floating-point"),
            (lambda v: v / 0, "not finite"),
        ],
    )
    def test_refuses(self, video, measure, change, says):
        with pytest.raises(InvalidInputError, match=says):
            measure(change(video), video)

    def test_ssim_refuses_frames_below_its_window(self, video):
        with pytest.raises(InvalidInputError, match="11x11"):
            quality.ssim(video[..., :8, :], video[..., :8, :])

    def test_says_what_to_install(self, video, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional", None)
        with pytest.raises(MissingDependencyError, match=r"fastdiff-attention\[demo\]"):
            quality.psnr(video, video)


class TestTiming:
    def test_measures_a_known_wait(self):
        found = timing.time_call(lambda: time.sleep(0.02), repeats=3, warm_up=0)
        assert 0.02 <= found.median < 0.2
        assert found.repeats == 3
        assert found.spread >= 0

    def test_calls_warm_up_and_repeats(self):
        calls = []
        assert timing.time_call(lambda: calls.append(1), repeats=1, warm_up=2).spread == 0
        assert len(calls) == 3

    @pytest.mark.parametrize("arguments", [{"repeats": 0}, {"warm_up": -1}])
    def test_refuses(self, arguments):
        with pytest.raises(InvalidInputError, match="at least"):
            timing.time_call(lambda: None, **arguments)

    def test_attention_alone(self):
        from fastdiff.methods import RadialConfig

        layout = TokenLayout.self_attention(Grid(5, 6, 7), text_before=3)
        found = timing.attention_speedup(RadialConfig(decay_factor=0.1).planner(), layout, heads=2, head_dim=16)
        assert found.dense.median > 0
        assert found.speedup == found.dense.median / found.sparse.median
        assert set(found.to_dict()) == {"dense", "sparse", "speedup"}

    def test_times_all_that_a_method_does(self):
        layout, seen = TokenLayout.self_attention(Grid(1, 6, 7), text_before=3), []
        planner = CountingPlanner(seen)
        timing.attention_speedup(planner, layout, heads=2, head_dim=16, layer=3, dtype=torch.bfloat16, repeats=2)
        assert seen[0] == ("plan", 3, 2, 16)
        assert seen.count("enter") == seen.count("attend") == seen.count("leave") == 3

    def test_a_dense_layer_is_not_timed(self):
        planner = CountingPlanner([])
        planner.plan = lambda *_, **__: None
        with pytest.raises(InvalidInputError, match="dense"):
            timing.attention_speedup(planner, TokenLayout.self_attention(Grid(1, 2, 2)), heads=1, head_dim=16)


class CountingPlanner:
    """Merges half of the tokens away, checks what it is handed, and writes down who called."""

    needs = frozenset({"block_input", "pre_rope_query", "seed"})

    def __init__(self, seen):
        self.seen = seen

    def plan(self, layout, *, layer, step, steps, heads, head_dim, device):
        self.seen.append(("plan", layer, heads, head_dim))
        return layout

    def parameters(self, *, layer, heads, head_dim):
        return torch.nn.Linear(head_dim, head_dim)

    def enter(self, hidden, plan, extras):
        self.seen.append("enter")
        assert hidden.shape == extras.inputs["block_input"].shape == (1, plan.query_tokens, 32)
        extras.inputs["merged"] = True
        return hidden[:, ::2]

    def attend(self, q, k, v, plan, extras):
        self.seen.append("attend")
        assert extras.inputs["merged"]
        assert extras.parameters.weight.dtype == q.dtype == torch.bfloat16
        return extras.parameters(q)

    def leave(self, out, plan, extras):
        self.seen.append("leave")
        assert out.shape == (1, (plan.query_tokens + 1) // 2, 32)
        return out


class TestReport:
    def test_environment_names_what_a_number_depends_on(self):
        found = report.environment("cpu")
        assert found["device"] == "cpu"
        assert found["versions"]["torch"] == torch.__version__
        assert found["versions"]["python"].startswith("3.")

    def test_json_is_strict(self):
        text = report.to_json({"psnr": math.inf, "nan": [math.nan], "t": torch.tensor(2.5), "tuple": (1, True)})
        assert json.loads(text) == {"psnr": None, "nan": [None], "t": 2.5, "tuple": [1, True]}

    def test_writes_whole_files(self, tmp_path):
        target = tmp_path / "report.json"
        target.write_text("old")
        report.write_json(target, {"density": 0.25})
        assert json.loads(target.read_text()) == {"density": 0.25}
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]

    def test_leaves_nothing_half_written(self, tmp_path, monkeypatch):
        target = tmp_path / "report.json"
        target.write_text("old")
        monkeypatch.setattr(report.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            report.write_json(target, {})
        assert target.read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
