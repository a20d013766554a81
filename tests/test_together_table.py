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


def test_rows_of_a_run(pytester):
    pytester.makepyfile(TESTS)
    pytester.makeini("[pytest]\nmarkers = together(name): as in the project\n")
    rows = together.Rows()
    pytester.inline_run("-m", "together", "-p", "no:xdist", "-p", "no:cacheprovider", plugins=[rows])
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

    versions = {"torch": "2.13.0", "torchao": None, "threads": "1"}
    text = readme_together.together(
        {"gpu": "none, x86_64 CPU", "versions": versions, "commit": "abc", "rows": rows.outcomes()}
    )
    assert "| rain | red | 1 | 1 |  |" in text
    assert "| sun | green | 2 | 0 | 1: no clouds here |" in text
    assert "on a CPU; torch 2.13.0; commit abc." in text
