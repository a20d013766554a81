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
        from fastdiff.methods import RadialConfig, build_plan

        plan = build_plan(RadialConfig(decay_factor=0.1), TokenLayout.self_attention(Grid(5, 6, 7), text_before=3))
        found = timing.attention_speedup(plan, heads=2, head_dim=16, repeats=2)
        assert found.dense.median > 0
        assert found.speedup == found.dense.median / found.sparse.median
        assert set(found.to_dict()) == {"dense", "sparse", "speedup"}


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
