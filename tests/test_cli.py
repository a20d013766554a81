"""The command line: what it writes, what it says, and that bad input ends in one line and exit code 2."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch

from fastdiff import cli
from fastdiff.commands import doctor, failures, outputs, pipelines
from fastdiff_kernels import InvalidInputError

PLAN_KEYS = {"density", "query_blocks", "key_blocks", "full_blocks", "partial_blocks", "longest_row", "mean_row"}
PLAN_KEYS |= {"plan_bytes", "build_seconds"}
REPORT_KEYS = {"density", "seconds_dense", "seconds_sparse", "speedup", "psnr", "ssim", "attention_speedup"}
SMALL = ["--prompt", tiny_models.PROMPT, "--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2"]
BLOCKS = '{"decay_factor": 0.1, "block_size": 32}'


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "pipeline"
    tiny_models.tiny_wan_pipeline().save_pretrained(folder)
    return str(folder)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestPlan:
    def test_json(self, capsys):
        assert cli.main(["plan", "--method", "radial", "--grid", "9x17x23", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.keys() >= PLAN_KEYS
        assert found["query_tokens"] == 9 * 17 * 23
        assert 0 < found["density"] <= 1.2
        assert found["full_blocks"] + found["partial_blocks"] == round(found["mean_row"] * found["query_blocks"])

    def test_text_and_config(self, capsys):
        assert cli.main(["plan", "--grid", "5x8x8", "--text", "7", "--config", BLOCKS, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["query_tokens"] == 7 + 5 * 8 * 8
        assert found["config"]["decay_factor"] == 0.1

    def test_density_is_solved(self, capsys):
        assert cli.main(["plan", "--grid", "17x16x16", "--density", "0.4", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["density"] <= 0.4

    def test_text_counts_in_the_density(self, capsys):
        words = ["plan", "--grid", "9x17x23", "--text", "512", "--json"]
        assert cli.main([*words, "--density", "0.5"]) == 0
        assert json.loads(capsys.readouterr().out)["density"] <= 0.5

    @pytest.mark.parametrize("size", [["--grid", "1000x1000x1000"], ["--grid", "9000000x1x1"], ["--text", "9" * 20]])
    def test_larger_than_memory(self, fails, size):
        line = fails("plan", *size)
        assert "out of memory" in line
        assert "--grid" in line

    def test_table_and_picture(self, capsys, tmp_path):
        out = tmp_path / "new" / "plan.png"
        assert cli.main(["plan", "--grid", "5x9x7", "--text", "3", "--out", str(out)]) == 0
        assert "density" in capsys.readouterr().out
        assert out.read_bytes().startswith(b"\x89PNG")
        assert files(out.parent) == ["plan.png"]

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--method", "magic"], "allowed are"),
            (["--method", "dense"], "sparse method"),
            (["--grid", "21x"], "frames x height x width"),
            (["--grid", "0x4x4"], "at least 1"),
            (["--config", '{"decay": 1}'], "decay_factor"),
            (["--config", '{"decay_factor": 7}'], "from 0 to 1"),
            (["--config", '{"decay_factor": }'], "JSON"),
            (["--config", '{"method": "magic"}'], "magic"),
            (["--config", '{"method": ["radial"]}'], "allowed are"),
            (["--config", "missing.json"], "missing.json"),
            (["--density", "0"], "above 0"),
            (["--density", "0.001", "--grid", "5x8x8"], "floor"),
            (["--density", "0.5", "--config", "{}"], "exclude"),
            (["--text", "-1"], "0 or more"),
            (["--text", "many"], "--text"),
            (["--out", "plan.gif"], ".png"),
            (["--out", "x" * 300 + ".png"], "cannot write"),
            (["--bogus"], "--bogus"),
        ],
    )
    def test_bad_input(self, fails, words, says):
        assert says in fails("plan", *words)


class TestGenerate:
    def test_dense(self, model, capsys, tmp_path):
        out = tmp_path / "deep" / "clip.mp4"
        assert cli.main(["generate", "--model", model, "--method", "dense", *SMALL, "--output", str(out)]) == 0
        assert "5 frames of 48x32, dense" in " ".join(capsys.readouterr().out.split())
        assert files(out.parent) == ["clip.json", "clip.mp4"]
        assert shape_of(out) == (5, 32, 48, 3)
        assert json.loads(out.with_suffix(".json").read_text())["density"] == 1.0

    def test_sparse(self, model, capsys, tmp_path):
        out = tmp_path / "clip.mp4"
        words = ["generate", "--model", model, *SMALL, "--config", BLOCKS, "--dense-steps", "0,-1", "--json"]
        assert cli.main([*words, "--output", str(out)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == json.loads(out.with_suffix(".json").read_text())
        assert found["config"]["block_size"] == 32
        assert found["grid"] == "2x2x3"
        assert found["dense_steps"] == [0, -1]
        assert found["mean_density"] == 1.0
        assert found["seconds_per_step"] > 0
        assert {"python", "torch", "diffusers", "fastdiff"} <= found["versions"].keys()

    def test_a_share_of_the_steps_stays_dense(self, model, capsys, tmp_path):
        words = ["generate", "--model", model, *SMALL, "--config", BLOCKS, "--dense-steps", "0.5", "--json"]
        assert cli.main([*words, "--output", str(tmp_path / "clip.mp4")]) == 0
        assert json.loads(capsys.readouterr().out)["dense_steps"] == 1

    def test_a_seed_names_a_video(self, model, tmp_path):
        seeds = {"a": "1", "b": "1", "c": "2"}
        for name, seed in seeds.items():
            words = ["generate", "--model", model, "--method", "dense", *SMALL, "--seed", seed]
            assert cli.main([*words, "--output", str(tmp_path / f"{name}.mp4")]) == 0
        a, b, c = ((tmp_path / f"{name}.mp4").read_bytes() for name in seeds)
        assert a == b != c


class TestCompare:
    def test_writes_everything(self, model, capsys, tmp_path):
        out = tmp_path / "results"
        words = ["compare", "--model", model, *SMALL, "--config", BLOCKS, "--output", str(out), "--json"]
        assert cli.main(words) == 0
        found = json.loads(capsys.readouterr().out)
        assert found.keys() >= REPORT_KEYS
        assert files(out) == ["dense.mp4", "frames.png", "report.json", "side_by_side.mp4", "sparse.mp4"]
        assert json.loads((out / "report.json").read_text()) == found
        assert shape_of(out / "dense.mp4") == shape_of(out / "sparse.mp4") == (5, 32, 48, 3)
        assert found["speedup"] == found["seconds_dense"] / found["seconds_sparse"]

    def test_a_plan_that_drops_nothing_changes_nothing_visible(self, model, capsys, tmp_path):
        everything = '{"decay_factor": 1.0, "near_width": 1.0, "mode": "tiled"}'
        words = ["compare", "--model", model, *SMALL, "--config", everything, "--output", str(tmp_path)]
        assert cli.main(words) == 0
        assert "against dense" in " ".join(capsys.readouterr().out.split())
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["identical"] or found["psnr"] > 50

    def test_keeps_older_files_and_replaces_its_own(self, model, tmp_path):
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "report.json").write_text("old")
        assert cli.main(["compare", "--model", model, *SMALL, "--output", str(tmp_path)]) == 0
        assert "notes.txt" in files(tmp_path)
        assert json.loads((tmp_path / "report.json").read_text())["model"] == model

    def test_warns_once(self, model, capsys, tmp_path, monkeypatch):
        monkeypatch.setattr(logging.root, "handlers", [])
        assert cli.main(["compare", "--model", model, *SMALL, "--output", str(tmp_path)]) == 0
        assert capsys.readouterr().err.count("% of the FLOPs of a dense forward") == 1

    def test_dense_is_no_method_to_compare(self, fails, model):
        assert "sparse method" in fails("compare", "--model", model, "--method", "dense")


class TestBadInput:
    def test_a_default_density_that_the_size_does_not_allow_is_told_from_one_that_was_given(self, fails):
        words = ["generate", "--num-frames", "5", "--steps", "1", "--device", "cpu"]
        assert "is the default for tiny-wan; --density" in fails(*words)
        line = fails(*words, "--density", "0.01")
        assert "density 0.01 is below" in line
        assert "default" not in line

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            (["--height", "40"], "multiples of 16"),
            (["--width", "50"], "such as 48 or 64"),
            (["--num-frames", "6"], "such as 5 or 9"),
            (["--height", "16384"], "token grid"),
            (["--steps", "0"], "at least 1"),
            (["--steps", "x"], "--steps"),
            (["--seed", "-1"], "from 0"),
            (["--guidance-scale", "nan"], "from 0 to 100"),
            (["--prompt", " "], "empty"),
            (["--method", "magic"], "allowed are"),
            (["--dense-steps", "some"], "indices"),
            (["--dense-steps", "1.5"], "share such as 0.25"),
            (["--dense-layers", "5"], "2 layers"),
            (["--dense-steps", "3"], "2 steps"),
            (["--dense-steps", "0,2"], "2 steps"),
            (["--method", "dense", "--dense-steps", "1"], "sparse method"),
            (["--method", "dense", "--config", "{}"], "sparse method"),
            (["--method", "rules"], "rules from --config"),
            (["--method", "rules", "--density", "0.5"], "rules from --config"),
            (["--device", "tpu"], "allowed are"),
            (["--dtype", "int4"], "allowed are"),
            (["--output", "x.avi"], ".mp4"),
            (["--output", "x" * 300 + ".mp4"], "cannot write"),
        ],
    )
    def test_options(self, fails, model, tmp_path, monkeypatch, words, says):
        monkeypatch.chdir(tmp_path)
        assert says in fails("generate", "--model", model, *SMALL, *words)
        assert files(tmp_path) == []

    def test_a_config_is_read_before_the_model(self, fails, capsys, monkeypatch):
        monkeypatch.setattr(pipelines, "prepare", lambda request: pytest.fail("too late"))
        for config in ('{"decay": 1}', '{"decay_factor": 7}', "{", "missing.json"):
            fails("compare", "--config", config)

    @pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has one")
    def test_no_such_device(self, fails, model, tmp_path):
        line = fails("compare", "--model", model, *SMALL, "--device", "cuda", "--output", tmp_path / "out")
        assert "--device is cuda" in line
        assert files(tmp_path) == []

    def test_models(self, fails, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("")
        assert "no folder ./none" in fails("generate", "--model", "./none", *SMALL)
        assert "no model_index.json" in fails("generate", "--model", "empty", *SMALL)
        assert "is a file" in fails("generate", "--model", "file", *SMALL)
        assert "HF_HUB_OFFLINE" in fails("generate", "--model", "nobody/none", *SMALL)
        assert "needs a prompt" in fails("generate", "--model", "nobody/none")
        for content in ("{", "{}", '{"_class_name": "Nope"}', '{"_class_name": "WanPipeline"}'):
            (tmp_path / "empty" / "model_index.json").write_text(content)
            assert "could not be loaded" in fails("generate", "--model", "empty", *SMALL)
        assert files(tmp_path) == ["empty", "file"]

    @pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/pipeline"])
    def test_models_that_cannot_be(self, fails, name):
        assert "there is no folder" in fails("generate", "--model", name, *SMALL)

    @pytest.mark.parametrize("part", ["text_encoder", "transformer", "vae"])
    def test_broken_weights(self, fails, model, tmp_path, part):
        broken = shutil.copytree(model, tmp_path / "pipeline")
        next((broken / part).glob("*.safetensors")).write_bytes(b"\xff" * 64)
        line = fails("generate", "--model", broken, *SMALL, "--output", tmp_path / "out" / "x.mp4")
        assert "could not be loaded" in line
        assert files(tmp_path) == ["pipeline"]

    def test_a_pipeline_without_a_transformer(self, fails, model, monkeypatch):
        class UNetPipeline:
            def __call__(self, prompt, num_frames=16): ...

        monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: UNetPipeline())
        assert "UNetPipeline" in fails("generate", "--model", model, *SMALL)

    def test_no_permission_to_write(self, fails, model, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot write" in fails("compare", "--model", model, *SMALL, "--output", tmp_path / "file" / "out")
        assert "it is a file" in fails("plan", "--out", tmp_path / "file" / "x.png")
        assert files(tmp_path) == ["file"]

    def test_no_space(self, fails, model, tmp_path, monkeypatch):
        monkeypatch.setattr(outputs, "SPARE_BYTES", 2**62)
        assert "free space" in fails("compare", "--model", model, *SMALL, "--output", tmp_path / "out")
        assert files(tmp_path) == []

    def test_disk_full_at_the_end(self, fails, model, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device", "sparse.mp4")

        monkeypatch.setattr("fastdiff.commands.pictures.write_video", full)
        assert "No space left" in fails("compare", "--model", model, *SMALL, "--output", tmp_path / "out")
        assert files(tmp_path) == []

    def test_larger_than_memory(self, fails, model, tmp_path):
        size = (*SMALL, "--num-frames", str(4 * 31 + 1), "--device", "cpu")
        line = fails("generate", "--model", model, *size, "--output", tmp_path / "x.mp4")
        assert "out of memory" in line
        assert "--num-frames" in line

    @pytest.fixture(autouse=True)
    def little_memory(self, request, monkeypatch):
        if "memory" in request.node.name:
            import psutil

            small = type("Memory", (), {"total": 2**20})
            monkeypatch.setattr(psutil, "virtual_memory", lambda: small)


class TestFailures:
    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            MemoryError(),
        ],
    )
    def test_out_of_memory_says_what_to_reduce(self, capsys, error):
        def command():
            raise error

        assert failures.exit_code(command) == 2
        assert "Reduce the frames" in capsys.readouterr().err

    def test_faults_of_the_program_keep_their_traceback(self):
        def command():
            raise RuntimeError("shape mismatch")

        with pytest.raises(RuntimeError, match="shape mismatch"):
            failures.exit_code(command)

    def test_interrupt(self, capsys):
        def command():
            raise KeyboardInterrupt

        assert failures.exit_code(command) == 130
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.skipif(os.name == "nt", reason="signals are POSIX here")
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupted_run_leaves_nothing(self, model, tmp_path, number):
        words = [sys.executable, "-m", "fastdiff", "compare", "--model", model, *SMALL, "--steps", "1000"]
        process = subprocess.Popen([*words, "--output", tmp_path / "out"], stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if line.startswith("Generating"):
                break
        time.sleep(0.3)
        process.send_signal(number)
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 130
        assert "Traceback" not in err
        assert files(tmp_path) == []


class TestStaging:
    def test_moves_on_success_only(self, tmp_path):
        target = tmp_path / "a" / "b"
        with outputs.staged(target, ["x"]) as folder:
            (folder / "x").write_text("new")
            assert not (target / "x").exists()
        assert files(target) == ["x"]
        with pytest.raises(KeyError), outputs.staged(target, ["x"]) as folder:  # noqa: PT012
            (folder / "x").write_text("newer")
            raise KeyError
        assert (target / "x").read_text() == "new"
        assert files(target) == ["x"]

    def test_refuses_a_folder_in_the_place_of_a_file(self, tmp_path):
        (tmp_path / "x").mkdir()
        with pytest.raises(InvalidInputError, match="is a folder"), outputs.staged(tmp_path, ["x"]):
            pass


class TestDoctor:
    def test_table(self, capsys):
        assert cli.main(["doctor"]) == 0
        assert "Backends" in capsys.readouterr().out

    def test_json(self, capsys):
        assert cli.main(["doctor", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["backend"] in {entry["name"] for entry in found["backends"]}
        assert "cpu" in found["devices"]

    def test_names_the_wrong_distribution(self, monkeypatch):
        from fastdiff.measure import report

        monkeypatch.setattr(report, "version", lambda name: "0.3.0" if name == "fastdiff" else "9.9")
        assert any("text-diff" in problem["why"] for problem in doctor.examine()["problems"])

    def test_names_what_is_missing_and_how_to_get_it(self, monkeypatch):
        monkeypatch.setitem(doctor.OPTIONAL, "no_such_module", "miracles")
        problem = next(p for p in doctor.examine()["problems"] if "no_such_module" in p["what"])
        assert "pip install" in problem["do"]


class TestHelp:
    @pytest.mark.parametrize("command", ["generate", "compare", "plan", "presets", "calibrate", "models", "doctor"])
    def test_has_examples_and_json(self, capsys, command):
        assert cli.main([command, "--help"]) == 0
        out = capsys.readouterr().out
        assert f"Examples:\n    fastdiff {command}" in out
        assert "--json" in out

    @pytest.mark.parametrize("words", [["--help"], ["bench", "--help"]])
    def test_says_of_each_command_what_it_does(self, capsys, monkeypatch, words):
        monkeypatch.setenv("COLUMNS", "80")
        assert cli.main(words) == 0
        lines = capsys.readouterr().out.partition("Commands:")[2].splitlines()
        assert [line for line in lines[1:] if not line.endswith(".") or line.endswith("...")] == []

    @pytest.mark.parametrize("words", [[], ["--help"], ["--version"]])
    def test_top_level(self, capsys, words):
        assert cli.main(words) == 0
        assert capsys.readouterr().out

    def test_is_quick(self):
        code = "import sys; from fastdiff import cli; cli.main(['--help']); print(*sys.modules)"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert not {"torch", "diffusers", "transformers", "matplotlib"} & set(loaded.splitlines()[-1].split())


def test_defaults_of_a_foreign_model_are_its_pipelines(model):
    request = dict.fromkeys(pipelines.Request.__dataclass_fields__)
    request |= {"model": model, "method": "dense", "prompt": "x", "dense_steps": 0, "dense_layers": 0}
    pipe = pipelines.load(model, torch.device("cpu"), torch.float32)
    pipe.transformer.register_to_config(rope_max_seq_len=1024)
    job = pipelines.settle(pipe, pipelines.Request(**request))
    assert (job.height, job.width, job.num_frames, job.steps) == (480, 832, 81, 50)
    assert str(job.grid) == "21x30x52"


def shape_of(video: Path) -> tuple[int, ...]:
    import imageio.v3

    return imageio.v3.imread(video).shape
