"""`fastdiff plan`: methods of every kind, the simulator, and its pictures."""

import json

import paro_plans
import pytest

from fastdiff import cli
from fastdiff.methods import METHODS
from fastdiff_kernels import Grid

HUNYUAN = ["--method", "neighborhood", "--grid", "30x48x80", "--window", "18x24x24"]
SMALL = ["--method", "neighborhood", "--grid", "5x8x9", "--window", "3x3x3"]
SIMULATED = {"bound", "flop_bound", "true_density", "visited_density", "worst_density", "full_share", "perfect"}


@pytest.fixture
def plan(capsys):
    """Runs `fastdiff plan … --json` and returns its object."""

    def run(*words):
        assert cli.main(["plan", *map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def picture(plan, tmp_path):
    """Draws a plan and returns the file's bytes."""

    def run(*words):
        plan(*words, "--out", tmp_path / "plan.png")
        return (tmp_path / "plan.png").read_bytes()

    return run


@pytest.fixture
def calibration(tmp_path):
    """A calibration of two layers with three heads on 3x8x8 tokens."""
    path = tmp_path / "calibration.safetensors"
    paro_plans.calibration(Grid(3, 8, 8), heads=3, layers=2).save(path)
    return json.dumps({"calibration": str(path)})


class TestSimulate:
    def test_the_published_setting(self, plan):
        found = plan(*HUNYUAN, "--stride", "16x8x8", "--simulate", "--attention-share", 0.607)
        assert found.keys() >= SIMULATED | {"density", "end_to_end"}
        assert (found["query_tile"], found["key_tile"]) == ([4, 8, 8], [2, 8, 8])
        assert found["perfect"]
        assert found["bound"] == pytest.approx(11.11, abs=0.01)
        assert found["flop_bound"] == pytest.approx(11.11, abs=0.01)
        assert found["end_to_end"] == pytest.approx(2.23, abs=0.01)
        assert found["density"] == pytest.approx(0.09)

    def test_tiles_can_be_given(self, plan):
        words = ["--method", "neighborhood", "--grid", "21x45x80", "--window", "allx24x24", "--stride", "1x8x8"]
        found = plan(*words, "--simulate", "--query-tile", "4x4x8", "--key-tile", "4x4x8")
        assert found["visited_density"] == pytest.approx(0.158, abs=5e-4)
        assert found["worst_density"] == pytest.approx(0.175, abs=5e-4)
        assert not found["perfect"]
        assert "end_to_end" not in found

    def test_search(self, plan):
        found = plan(*HUNYUAN, "--search", "--query-tile", "4x8x8", "--attention-share", 0.607)["search"]
        strides = [[1, 1, 1], [2, 1, 1], [1, 1, 8], [2, 1, 8], [1, 8, 8], [2, 8, 8], [16, 8, 8]]
        assert [entry["stride"] for entry in found] == strides
        assert [round(entry["end_to_end"], 2) for entry in found] == [1.73, 1.78, 1.98, 2.02, 2.18, 2.2, 2.23]
        assert all(entry.keys() >= SIMULATED | {"density", "query_tile", "key_tile"} for entry in found)

    @pytest.mark.parametrize("grid", ["1x24x30", "1x1x1500"])
    def test_pictures_and_sequences(self, plan, grid):
        window = "8x9" if grid == "1x24x30" else "40"
        found = plan("--method", "neighborhood", "--grid", grid, "--window", window, "--search")
        assert found["bound"] > 1
        assert len(found["search"][0]["stride"]) == window.count("x") + 1

    def test_table(self, capsys):
        assert cli.main(["plan", *SMALL, "--search", "--attention-share", "0.5"]) == 0
        out = capsys.readouterr().out
        for word in ("true density", "bound", "end to end", "stride"):
            assert word in out
        assert "…" not in out

    def test_a_config_serves_too(self, plan):
        config = '{"preset": "flux-4k-80x80-s16x1"}'
        found = plan("--method", "neighborhood", "--grid", "256x256", "--config", config, "--simulate")
        assert found["bound"] == pytest.approx(8.53, abs=0.01)


class TestWindow:
    def test_makes_the_config(self, plan):
        words = ["--method", "neighborhood", "--grid", "8x9x10", "--window", "allx3x4"]
        found = plan(*words, "--stride", "1x2x4", "--dilation", "1x1x2", "--causal", "t,x")["config"]
        assert found["window"] == [None, 3, 4]
        assert (found["stride"], found["dilation"]) == ([1, 2, 4], [1, 1, 2])
        assert found["causal"] == [True, False, True]

    def test_one_number_is_for_all_axes(self, plan):
        assert plan(*SMALL, "--stride", "2")["config"]["stride"] == 2

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--window", "3x3x3"], "--method neighborhood"),
            (["--simulate"], "radial does not have"),
            (["--method", "neighborhood"], "no default for window; give --density"),
            (["--method", "paro"], "needs a calibration; give --config, with a file of"),
            (["--method", "paro", "--density", "0.3"], "needs a calibration; give --config"),
            (["--stride", "2"], "--stride goes with --window"),
            (["--query", "0,0,0"], "--query goes with --out"),
            (["--causal", "t"], "--causal goes with --window"),
            ([*SMALL, "--key-tile", "2x2x2"], "--key-tile goes with --simulate or --search"),
            ([*SMALL, "--attention-share", "0.5"], "--attention-share goes with"),
            ([*SMALL, "--config", "{}"], "excludes"),
            ([*SMALL, "--density", "0.5"], "excludes"),
            ([*SMALL, "--window", "3x3"], "2 axes"),
            ([*SMALL, "--window", "3xx3"], "--window is"),
            ([*SMALL, "--window", "3x-3x3"], "--window is"),
            ([*SMALL, "--window", "3x3x3x3"], "up to 3 numbers"),
            ([*SMALL, "--window", "0x3x3"], "from 1"),
            ([*SMALL, "--stride", "4"], "larger than its window"),
            ([*SMALL, "--stride", "2x2"], "each of the 3 axes"),
            ([*SMALL, "--dilation", "0"], "dilation is 0"),
            ([*SMALL, "--causal", "z"], "--causal is 'z'"),
            ([*SMALL, "--simulate", "--query-tile", "0x8x8"], "from 1"),
            ([*SMALL, "--simulate", "--query-tile", "999"], "more than twice"),
            ([*SMALL, "--simulate", "--key-tile", "2x2x2x2"], "up to 3"),
            ([*SMALL, "--simulate", "--attention-share", "1.5"], "from 0 to 1"),
            (["--method", "neighborhood", "--config", '{"preset": "x"}'], "no preset"),
        ],
    )
    def test_bad_input(self, fails, words, says):
        assert says in fails("plan", "--grid", "5x8x9", *words)


CONFIGS = {
    "radial": {"decay_factor": 0.2},
    "neighborhood": {"window": [3, 4, 4]},
    "clear": {"radius": 3, "pool_factor": 4},
    "agent": {"agents": 12},
    "rules": {"rules": [{"config": {"method": "radial", "decay_factor": 0.2}}]},
}


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    @pytest.fixture
    def words(self, method, calibration):
        config = calibration if method == "paro" else json.dumps(CONFIGS[method])
        return ["--method", method, "--grid", "3x8x8", "--config", config]

    def test_numbers(self, plan, words):
        found = plan(*words, "--text", 5, "--text-after", 7)
        assert found["density"] > 0
        assert found["query_tokens"] == 3 * 8 * 8 + 12
        assert found["text"] == 12
        assert found["plan_bytes"] > 0
        assert found["config"]["method"] == words[1]

    def test_picture(self, picture, words):
        middle, corner = picture(*words, "--text", 5), picture(*words, "--text", 5, "--query", "0,0,7")
        assert middle.startswith(b"\x89PNG")
        assert middle != corner

    def test_table(self, capsys, words):
        assert cli.main(["plan", *words]) == 0
        assert "density" in capsys.readouterr().out


class TestLayersAndHeads:
    WORDS = ("--method", "paro", "--grid", "3x8x8", "--config")

    def test_layers_differ(self, plan, picture, calibration):
        assert plan(*self.WORDS, calibration, "--layer", 1)["lists"] == 3
        assert picture(*self.WORDS, calibration) != picture(*self.WORDS, calibration, "--layer", 1)

    def test_heads_are_drawn_apart(self, picture, calibration):
        assert picture(*self.WORDS, calibration) != picture(*self.WORDS, calibration, "--head", 2)

    def test_rules(self, capsys, plan):
        rules = [{"layers": "0", "config": "dense"}, {"layers": "1", "config": {"method": "clear", "radius": 2}}]
        words = ["--grid", "3x8x8", "--config", json.dumps({"method": "rules", "rules": rules})]
        assert plan("--method", "rules", *words)["density"] == 1
        alone = plan("--method", "clear", "--grid", "3x8x8", "--config", '{"radius": 2}')
        assert plan("--method", "rules", *words, "--layer", 1)["density"] == alone["density"] < 1

    def test_there_are_no_others(self, fails, calibration):
        assert "3, counted from 0" in fails("plan", *self.WORDS, calibration, "--head", 3)
        assert "layer is 2" in fails("plan", *self.WORDS, calibration, "--layer", 2)
        assert "0 or more" in fails("plan", "--layer", "-1")

    def test_a_dense_layer_is_told(self, plan, fails, capsys, monkeypatch, tmp_path):
        monkeypatch.setattr("fastdiff.methods.build_plan", lambda *_, **__: None)
        assert plan("--grid", "5x8x8")["density"] == 1
        assert cli.main(["plan", "--grid", "5x8x8", "--layer", "4"]) == 0
        assert "layer 4 stays dense" in capsys.readouterr().out
        assert "nothing to draw" in fails("plan", "--grid", "5x8x8", "--out", tmp_path / "x.png")


class TestText:
    def test_radial_as_released_takes_it_after_the_grid(self, plan, fails):
        words = ["--grid", "5x8x16", "--config", '{"mode": "reference"}']
        assert plan(*words, "--text-after", 40)["query_tokens"] == 680
        assert "video before text" in fails("plan", *words, "--text", "40")

    def test_counts_in_a_density_on_one_side(self, plan, fails):
        words = ["--method", "neighborhood", "--grid", "9x17x23", "--density", "0.5"]
        assert plan(*words, "--text-after", 300)["density"] <= 0.5
        assert "one side" in fails("plan", *words, "--text", "3", "--text-after", "3")

    def test_is_not_negative(self, fails):
        assert "--text-after is -1" in fails("plan", "--text-after", "-1")


@pytest.mark.parametrize("query", ["1,2", "1,2,3,4", "5,0,0", "0,0,-1", "a,0,0", ""])
def test_a_query_that_is_not_there(fails, query, tmp_path):
    words = ["--grid", "5x8x8", "--out", str(tmp_path / "plan.png")]
    assert "frame, row and column" in fails("plan", *words, "--query", query)


def test_help_names_every_method(capsys):
    assert cli.main(["plan", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(method in out for method in METHODS)
