"""Records of single benchmarks in a file of results/: what was measured again is replaced, all else stays."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import join_records

ROOT = Path(__file__).resolve().parents[1]


def model(name, mode, ms):
    return {"model": name, "mode": mode, "milliseconds": ms}


def join(tmp_path, old, *new):
    files = []
    for records in (old, *new):
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps(records))
    join_records.main([str(path) for path in files])
    return json.loads(files[0].read_text())


def test_a_mode_of_a_model_is_replaced_whole(tmp_path):
    old = [model("a", "eager", 1), model("a", "compiled", 2), model("a", "compiled", 3), model("b", "compiled", 4)]
    found = join(tmp_path, old, [model("a", "compiled", 5)], [model("b", "eager", 6), model("c", "eager", 7)])
    assert [(one["model"], one["milliseconds"]) for one in found] == [("a", 1), ("a", 5), ("b", 6), ("b", 4), ("c", 7)]


def test_a_shape_is_replaced_whole(tmp_path):
    old = [{"shape": "W", "direction": "forward"}, {"shape": "W", "direction": "backward"}, {"shape": "X"}]
    assert join(tmp_path, old, [{"shape": "W", "new": True}]) == [{"shape": "W", "new": True}, {"shape": "X"}]


def test_files_of_two_benchmarks_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        join(tmp_path, [{"shape": "W"}], [model("a", "eager", 1)])
    assert "not of the same benchmark" in capsys.readouterr().err
    assert json.loads((tmp_path / "0.json").read_text()) == [{"shape": "W"}]


@pytest.mark.parametrize("name", ["bench-kernels.json", "bench-models.json", "bench-portable.json"])
def test_nothing_new_leaves_a_file_as_it_is(tmp_path, name):
    text = (ROOT / "results" / name).read_bytes()
    (tmp_path / name).write_bytes(text)
    join_records.main([str(tmp_path / name), str(tmp_path / name)])
    assert (tmp_path / name).read_bytes() == text
