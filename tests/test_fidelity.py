"""The fidelity script in miniature: every method on every kind of pipeline, floors, limits of time, going on."""

import json
import sys
from pathlib import Path

import pytest
import tiny_models
import tiny_picture_models
import torch

from fastdiff import assets

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import fidelity
import fidelity_bench

DEFAULTS = {"guidance_scale": 2.0, "prompt": "x"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random pipelines under the names of the embedded ones."""
    folder = tmp_path_factory.mktemp("assets")
    tiny_models.tiny_wan_pipeline().save_pretrained(folder / "tiny-wan")
    tiny_picture_models.tiny_flux_pipeline().save_pretrained(folder / "tiny-flux")
    tiny_picture_models.tiny_sd_pipeline().save_pretrained(folder / "tiny-sd")
    return folder


@pytest.fixture(autouse=True)
def embedded(folder, monkeypatch):
    monkeypatch.setattr(assets, "FOLDER", folder)
    monkeypatch.setattr(fidelity, "SMOKE", fidelity.Plan(**{**vars(fidelity.SMOKE), "densities": (0.001, 0.7)}))
    for name in ("tiny-wan", "tiny-flux", "tiny-sd"):
        call = {"max_sequence_length": 8} if name == "tiny-flux" else {}
        monkeypatch.setitem(assets.EMBEDDED, name, assets.GenerationDefaults(**DEFAULTS, call=call))


def run(out, *more):
    code = fidelity.main(["--smoke", "--device", "cpu", "--commit", "abc", "--out", str(out), *more])
    path = out / "fidelity.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def test_all(tmp_path):
    code, found = run(tmp_path)
    assert code == 0
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    assert found["commit"] == "abc"
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["pipelines"]) == ["tiny-wan", "tiny-flux", "tiny-sd"]
    for model, part in found["pipelines"].items():
        entries = [entry.label for entry in fidelity.ENTRIES for _ in (0, 1)]
        assert [cell["label"] for cell in part["cells"]] == entries
        assert part["other_seed"]["psnr"]["mean"] < 60
        assert 0 <= part["dense"]["recovered"] <= 1
        assert ("direction" in part["dense"]) == (model == "tiny-wan")
        for cell in part["cells"]:
            if cell["target"] == 0.001:
                assert cell["floor"] > 0.001
            elif "psnr" in cell:
                assert 0 < cell["density"] <= 0.75
                assert cell["density"] <= cell["mean_density"] <= 1
                assert 0 <= cell["ssim"]["mean"] <= 1
    pictures = [cell for model in ("tiny-flux", "tiny-sd") for cell in found["pipelines"][model]["cells"]]
    high = [cell for cell in pictures if cell["target"] == 0.7]
    assert {cell["label"] for cell in high if "floor" in cell} == {"radial"}
    assert all(cell["floor"] >= 1 for cell in high if "floor" in cell)


def test_goes_on_where_it_stopped(tmp_path, monkeypatch):
    more = ("--pipelines", "tiny-sd", "--methods", "clear", "paro")
    code, found = run(tmp_path, *more, "--seconds", "0")
    assert (code, found["pipelines"]) == (0, {"tiny-sd": {"cells": []}})
    clock = iter([False, False, False, True])
    monkeypatch.setattr(fidelity.Late, "__call__", lambda self: next(clock))
    assert len(run(tmp_path, *more, "--resume")[1]["pipelines"]["tiny-sd"]["cells"]) == 2
    monkeypatch.setattr(fidelity.Late, "__call__", lambda self: False)
    done = run(tmp_path, *more, "--resume")[1]["pipelines"]["tiny-sd"]["cells"]
    assert [cell["label"] for cell in done] == ["clear"] * 2 + ["paro"] * 2
    monkeypatch.setattr(fidelity, "Bench", lambda *_: pytest.fail("nothing is left to do"))
    assert run(tmp_path, *more, "--resume")[1]["pipelines"]["tiny-sd"]["cells"] == done


def test_a_failed_cell_costs_no_other(tmp_path, monkeypatch):
    config = fidelity_bench.Bench.config

    def broken(self, entry, density, folder):
        if density == 0.001:
            raise RuntimeError("a bug")
        return config(self, entry, density, folder)

    monkeypatch.setattr(fidelity_bench.Bench, "config", broken)
    code, found = run(tmp_path, "--pipelines", "tiny-sd", "--methods", "clear")
    assert code == 1
    assert [cell["target"] for cell in found["pipelines"]["tiny-sd"]["cells"]] == [0.7]


def test_does_not_mix_conditions(tmp_path, caplog):
    few = ("--pipelines", "tiny-sd", "--methods", "clear")
    run(tmp_path, *few, "--seconds", "0")
    assert run(tmp_path, *few, "--resume", "--seed", "1")[0] == 2
    assert "other seed" in caplog.text


def test_prompts_of_the_calibration_are_not_measured():
    bench = fidelity_bench.Bench("tiny-sd", fidelity.SMOKE, 0, "cpu")
    prompts = bench.calibration_prompts()
    assert len(set(prompts)) == fidelity_bench.CALIBRATION_PROMPTS
    assert not set(prompts) & {item.prompt for item in bench.prompts}


def test_a_sample_does_not_depend_on_its_batch():
    two = fidelity_bench.Bench("tiny-flux", fidelity.SMOKE, 0, "cpu")
    plan = fidelity.Plan(**{**vars(fidelity.SMOKE), "prompts": 3})
    three = fidelity_bench.Bench("tiny-flux", plan, 0, "cpu")
    torch.testing.assert_close(two.dense[1], three.dense[1], atol=1e-4, rtol=0)
    assert two.measure(two.dense)["psnr"]["mean"] == fidelity_bench.MOST_DECIBEL


@pytest.mark.parametrize(
    ("message", "floor"),
    [
        ("density 0.1 is below the floor of radial on a grid of 1x4x4, which is 1.0000 with blocks of 32; ask", 1.0),
        ("density 0.1 is below the floor of paro on a grid of 1x4x4, which is 0.4375 where each", 0.4375),
        ("agents act from 0 to 0.4 of the run and none of its 2 steps lies there", None),
    ],
)
def test_floors_are_read_from_messages(message, floor):
    assert fidelity.floor_in(message) == floor
