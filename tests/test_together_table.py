"""scripts/together.py says what a run of tests found, and readme_together.py writes it."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import readme_together
import together

pytest_plugins = ["pytester"]

TESTS = """
import pytest

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.mark.together("sun")
@pytest.mark.parametrize("number", range(3))
def test_passes(number):
    if number == 2:
        pytest.skip("no clouds here")

@pytest.mark.together("rain")
def test_fails():
    assert False

@pytest.mark.together("rain")
def test_passes_too():
    pass

@pytest.mark.together("hail")
def test_its_fixture_fails(broken):
    pass

@pytest.mark.together("snow")
@pytest.mark.skip(reason="too warm")
def test_skipped():
    pass

def test_of_something_else():
    assert False
"""


def test_some_of_the_tests_are_written_only_where_one_says(tmp_path, monkeypatch, capsys):
    def run(arguments, plugins):
        (rows,) = plugins
        rows.rows["sun"] = {"name": "sun", "passed": 1, "failed": [], "skipped": {}}
        return pytest.ExitCode.OK

    monkeypatch.setattr(together.pytest, "main", run)
    monkeypatch.setattr(together, "ROOT", tmp_path)
    assert together.main(["-k", "sun"]) == 0
    assert "give --output" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert together.main(["-k", "sun", "--output", str(tmp_path / "some.json")]) == 0
    assert json.loads((tmp_path / "some.json").read_text())["rows"][0]["outcome"] == "green"


def test_the_devices_must_be_there(monkeypatch, capsys):
    monkeypatch.setattr(together.torch.cuda, "device_count", lambda: 1)
    with pytest.raises(SystemExit) as failure:
        together.main(["--gpus", "2"])
    assert failure.value.code == 2
    assert "torch sees 1" in capsys.readouterr().err


@pytest.mark.parametrize("way", [("-p", "no:xdist"), ("-n", "2")], ids=["one process", "two"])
def test_rows_of_a_run(pytester, way):
    pytester.makepyfile(TESTS)
    pytester.makeconftest(Path(__file__).with_name("conftest.py").read_text(encoding="utf-8"))
    pytester.makeini("[pytest]\nmarkers =\n    together(name): as in the project\n    gpu\n    slow\n")
    rows = together.Rows()
    pytester.inline_run("-m", "together", "-p", "no:cacheprovider", *way, plugins=[rows])
    found = {row["name"]: row for row in rows.outcomes()}
    assert {name: row["outcome"] for name, row in found.items()} == {
        "hail": "red",
        "rain": "red",
        "snow": "not run",
        "sun": "green",
    }
    assert (found["sun"]["passed"], found["sun"]["skipped"]) == (2, {"no clouds here": 1})
    assert [name.split("::")[1] for name in found["rain"]["failed"]] == ["test_fails"]
    assert found["rain"]["passed"] == 1


def test_the_table_has_a_column_for_each_run():
    def row(name, outcome, passed=0, failed=(), skipped=()):
        return {"name": name, "outcome": outcome, "passed": passed, "failed": failed, "skipped": dict(skipped)}

    def report(gpu, *rows, **versions):
        return {"gpu": gpu, "versions": versions, "commit": "abc", "rows": list(rows)}

    text = readme_together.together(
        report(
            "none", row("rain", "red", 1, ["a", "b"]), row("sun", "green", 2, skipped={"no clouds": 1}), torch="2.13"
        ),
        report("G", row("sun", "green", 5), torch="2.11", torchao=None),
        report("H", row("snow", "not run", skipped={"too warm": 3}), torch="2.12"),
    )
    assert text.splitlines()[2:5] == [
        "| rain | red, 2 of 3 failed |  |  |  |",
        "| snow |  |  | not run | two GPUs, 3: too warm |",
        "| sun | green, 2 | green, 5 |  | CPU, 1: no clouds |",
    ]
    assert text.endswith(
        "CPU: torch 2.13; commit abc. one GPU (G): torch 2.11; commit abc. two GPUs (H): torch 2.12; commit abc."
    )
    alone = readme_together.together(report("none", row("sun", "green", 2), torch="2.13"))
    assert alone.startswith("| together with | CPU | tests not run |\n")
