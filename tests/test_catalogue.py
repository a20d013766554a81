"""fastdiff models: what it lists, that its file knows every model, and the script that writes the file."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

from fastdiff import catalogue, cli
from fastdiff_kernels import InvalidInputError
from fastdiff_patches.families import FAMILIES

ROOT = Path(__file__).parent.parent


def models(*words, capsys):
    assert cli.main(["models", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_model_is_listed_and_was_tested(capsys):
    found = models(capsys=capsys)
    assert [one["model"] for one in found["models"]] == list(FAMILIES)
    assert found["published_weights"] == []
    for one in found["models"]:
        shown = {test["shows"]: test for test in one["tested"]}
        assert {"layout", "density 1 and remove"} <= set(shown), one["model"]
        ran = {name.removeprefix("method ") for name in shown if name.startswith("method ")}
        assert ran >= {method for method, use in one["methods"].items() if use["use"] != "no"}, one["model"]
        assert not any(test["failed"] for test in one["tested"]), one["model"]
    assert found["test_run"]["versions"]["diffusers"]


def test_methods_by_what_a_family_has(capsys):
    def uses(name):
        (one,) = models(name, capsys=capsys)["models"]
        return {method: use["use"] for method, use in one["methods"].items()}

    yes = {"radial": "yes", "neighborhood": "yes", "paro": "calibration"}
    assert uses("LTXVideoTransformer3DModel") == yes | {"clear": "training", "agent": "no"}
    assert uses("WanTransformer3DModel") == yes | {"clear": "training", "agent": "training"}
    assert uses("UNet2DConditionModel") == yes | {"radial": "no", "clear": "yes", "agent": "yes"}
    assert uses("LatteTransformer3DModel")["radial"] == "no"


def test_one_family_says_why(capsys):
    assert cli.main(["models", "wan"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "agent in wan: without fine-tuning" in out
    assert "With published weights: none." in out


@pytest.mark.parametrize(
    ("name", "model"),
    [("CHROMA", "ChromaTransformer2DModel"), ("MochiPipeline", "MochiTransformer3DModel")],
)
def test_a_family_in_capitals_and_a_pipeline(name, model, capsys):
    assert [one["model"] for one in models(name, capsys=capsys)["models"]] == [model]


def test_all_families(capsys):
    assert cli.main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(out.count(f"\n{name}: ") == 1 for name in ("wan-vace", "hunyuan-video", "unet-motion"))
    assert out.startswith("wan: radial, neighborhood, clear*, paro+, agent*\n    WanTransformer3DModel: ")
    assert "needs pre_rope_query" not in out


def test_published_weights_and_failures_are_shown(tmp_path, monkeypatch, capsys):
    record = json.loads(catalogue.TESTED.read_text())
    row = {"model": "WanTransformer3DModel", "shows": "pipeline WanPipeline", "weights": "somebody/wan"}
    record["tests"] = [row | {"passed": 1, "failed": ["tests/test_x.py::test_x"]}]
    monkeypatch.setattr(catalogue, "TESTED", tmp_path / "tested.json")
    catalogue.TESTED.write_text(json.dumps(record))
    assert models(capsys=capsys)["published_weights"] == ["WanTransformer3DModel"]
    assert cli.main(["models", "wan"]) == 0
    out = capsys.readouterr().out
    assert "1 of 2" in out
    assert "not tested" in out
    assert "With published weights: WanTransformer3DModel." in out


@pytest.mark.parametrize("name", ["wa", "", "nothing"])
def test_an_unknown_name(fails, name):
    assert f"no family, model or pipeline is named {name!r}; families are wan, " in fails("models", name)
    with pytest.raises(InvalidInputError, match="no family, model or pipeline is named"):
        catalogue.catalogue(name)


def test_too_many_names(fails):
    fails("models", "wan", "flux")


def test_help_loads_no_torch():
    code = (
        "import sys; from fastdiff import cli; assert cli.main(['models', '--help']) == 0; "
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("tested_models", ROOT / "scripts" / "tested_models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Report:
    """What pytest reports of a test."""

    def __init__(self, *shown, when="call", failed=False, skipped=False):
        self.user_properties = [("shows", list(shown))] if shown else []
        self.when, self.failed, self.skipped, self.nodeid = when, failed, skipped, f"test of {shown}"


def test_the_script_counts_what_tests_say(script):
    tests = script.Tests()
    for report in (
        Report("Wan", "layout", "random"),
        Report("Wan", "layout", "random"),
        Report("Wan", "layout", "random", failed=True),
        Report("Wan", "layout", "random", when="teardown"),
        Report("Wan", "layout", "random", skipped=True),
        Report(),
    ):
        tests.pytest_runtest_logreport(report)
    (row,) = tests.found.values()
    assert (row["model"], row["shows"], row["weights"], row["passed"]) == ("Wan", "layout", "random", 2)
    assert len(row["failed"]) == 1


def test_the_script_writes_what_ran(tmp_path):
    out = tmp_path / "tested.json"
    words = [ROOT / "scripts" / "tested_models.py", "--output", out, "-p", "no:cacheprovider"]
    words += ["-k", "density and PixArtTransformer2DModel"]
    subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True, capture_output=True)
    found = json.loads(out.read_text())
    (row,) = found["tests"]
    assert (row["model"], row["shows"]) == ("PixArtTransformer2DModel", "density 1 and remove")
    assert row["passed"] >= 2
    assert not row["failed"]
    assert found["versions"]["diffusers"] == diffusers.__version__


def test_the_script_writes_nothing_over_the_file_for_a_part(script, monkeypatch, capsys):
    before = catalogue.TESTED.read_bytes()
    monkeypatch.setattr(script.pytest, "main", lambda words, plugins: plugins[0].found.update(a={}) or 0)
    assert script.main(["-k", "wan"]) == 0
    assert "nothing is written" in capsys.readouterr().err
    assert catalogue.TESTED.read_bytes() == before
