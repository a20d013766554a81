"""generate and compare on picture pipelines, and every method on every kind of pipeline."""

import json
from pathlib import Path

import pytest
import tiny_models
import tiny_picture_models
import torch
from PIL import Image

from fastdiff import assets, cli
from fastdiff.commands import options, pipelines, running, sizes
from fastdiff.methods import METHODS
from fastdiff_patches import attachment, locate

KINDS = {
    "wan": tiny_models.tiny_wan_pipeline,
    "flux": tiny_picture_models.tiny_flux_pipeline,
    "sd": tiny_picture_models.tiny_sd_pipeline,
}
SIZES = {
    "wan": ["--height", "80", "--width", "96", "--num-frames", "33"],
    "flux": ["--height", "112", "--width", "144"],
    "sd": ["--height", "56", "--width", "72"],
}
# Blocks of 128 tokens are too large for some hundred.
SMALL_BLOCKS = '{"window": [4, 4], "block_size": 32}'


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    made = {}
    for name, build in KINDS.items():
        made[name] = str(tmp_path_factory.mktemp("models") / name)
        build().save_pretrained(made[name])
    return made


@pytest.fixture(autouse=True)
def short_text(monkeypatch):
    """Flux pads prompts to 512 tokens, many times the pictures here."""
    monkeypatch.setattr(assets, "FOREIGN", assets.GenerationDefaults(call={"max_sequence_length": 8}))


def words(folders, command: str, kind: str, *more: str) -> list[str]:
    steps = ["--steps", "2", "--prompt", tiny_models.PROMPT]
    return [command, "--model", folders[kind], *SIZES[kind], *steps, *more]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestPictures:
    @pytest.mark.parametrize(("kind", "grid"), [("flux", "1x28x36"), ("sd", "1x28x36")])
    def test_generate(self, folders, capsys, tmp_path, kind, grid):
        out = tmp_path / "deep" / "x.png"
        more = ["--method", "neighborhood", "--config", SMALL_BLOCKS, "--dense-steps", "1", "--json"]
        assert cli.main(words(folders, "generate", kind, *more, "--output", str(out))) == 0
        found = json.loads(capsys.readouterr().out)
        assert files(out.parent) == ["x.json", "x.png"]
        assert found == json.loads(out.with_suffix(".json").read_text())
        size = (found["width"], found["height"])
        assert Image.open(out).size == size == tuple(int(SIZES[kind][place]) for place in (3, 1))
        assert found["grid"] == grid
        assert found["text_tokens"] == (8 if kind == "flux" else 0)
        assert found["fps"] is None
        assert found["density"] < found["mean_density"] < 1

    def test_compare(self, folders, capsys, tmp_path):
        more = ["--method", "clear", "--config", '{"radius": 4, "block_size": 32}', "--output", str(tmp_path)]
        assert cli.main(words(folders, "compare", "flux", *more)) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "a picture of 144x112, 1008 tokens and 8 of text" in said
        assert files(tmp_path) == ["dense.png", "report.json", "side_by_side.png", "sparse.png"]
        found = json.loads((tmp_path / "report.json").read_text())
        assert (found["heads"], found["head_dim"]) == (2, 16)
        assert 0 < found["density"] < 1
        assert found["psnr"] > 0

    def test_a_plan_that_drops_nothing_changes_nothing_visible(self, folders, tmp_path):
        more = ["--method", "clear", "--config", '{"radius": 99}', "--output", str(tmp_path)]
        assert cli.main(words(folders, "compare", "sd", *more)) == 0
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["identical"] or found["psnr"] > 50

    def test_a_seed_names_a_picture(self, folders, tmp_path):
        seeds = {"a": "1", "b": "1", "c": "2"}
        for name, seed in seeds.items():
            more = ["--method", "dense", "--seed", seed, "--output", str(tmp_path / f"{name}.png")]
            assert cli.main(words(folders, "generate", "sd", *more)) == 0
        a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in seeds)
        assert a == b != c

    def test_default_place(self, folders, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert cli.main(words(folders, "generate", "sd", "--method", "dense")) == 0
        assert files(tmp_path / "outputs") == ["picture.json", "picture.png"]


class TestMethods:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("method", options.METHODS)
    def test_every_method_on_every_pipeline(self, folders, capsys, tmp_path, fails, kind, method):
        # Agents act in the early steps by themselves.
        dense = "0" if method == "agent" else "1"
        more = ["--method", method, "--dense-steps", dense, "--output", str(tmp_path / "out"), "--density", "0.85"]
        if (method, kind) == ("neighborhood", "wan"):
            more[-2:] = ["--config", '{"window": [4, 4, 4], "block_size": 32}']
        if method == "rules":
            rules = [{"layers": 1, "config": "dense"}, {"config": {"method": "clear", "radius": 3, "block_size": 32}}]
            more[-2:] = ["--config", json.dumps({"rules": rules})]
        if method == "radial" and kind != "wan":
            assert "floor" in fails(*words(folders, "compare", kind, *more))
            assert files(tmp_path) == []
            return
        assert cli.main(words(folders, "compare", kind, *more, "--json")) == 0
        out, err = capsys.readouterr()
        found = json.loads(out)
        assert found["config"]["method"] == method
        # A UNet's coarser level, with a sixteenth of the scores, may lie above what was solved for.
        assert 0 < found["density"] <= 0.9
        assert found["density"] < found["mean_density"] < 1
        assert found["attention_speedup"] > 0
        assert ("Calibrating" in err) == (method == "paro")
        assert ("calibration.safetensors" in files(tmp_path / "out")) == (method == "paro")

    def test_a_calibration_serves_again(self, folders, capsys, tmp_path):
        first = tmp_path / "first" / "x.png"
        more = ["--method", "paro", "--density", "0.85"]
        assert cli.main(words(folders, "generate", "sd", *more, "--output", str(first))) == 0
        config = json.loads(first.with_suffix(".json").read_text())["config"]
        assert config["calibration"] == str(first.with_suffix(".safetensors"))
        second = tmp_path / "second.png"
        more = ["--method", "paro", "--config", json.dumps(config), "--output", str(second)]
        assert cli.main(words(folders, "generate", "sd", *more)) == 0
        assert "Calibrating" not in capsys.readouterr().err.split("Writing x.png")[1]
        assert first.read_bytes() == second.read_bytes()
        assert files(tmp_path) == ["first", "second.json", "second.png"]

    def test_calibrates_on_another_prompt(self, folders, monkeypatch, tmp_path):
        from fastdiff import calibration
        from fastdiff.commands import attention

        seen = []
        monkeypatch.setattr(calibration, "calibrate", lambda pipe, prompts, **call: seen.append((prompts, call)))
        pipe = pipelines.load(folders["sd"], torch.device("cpu"), torch.float32)
        for prompt in ("x", attention._ANYTHING[0]):
            request = request_for(
                folders["sd"], method="paro", density=0.4, prompt=prompt, steps=2, height=32, width=32
            )
            attention.config_for(pipe, request, pipelines.settle(pipe, request), tmp_path / "c.safetensors")
        assert [prompts for prompts, _ in seen] == [[text] for text in attention._ANYTHING]
        call = seen[0][1]
        assert (call["density"], call["groups"], call["num_inference_steps"]) == (0.4, 2, 2)
        assert call["path"] == tmp_path / "c.safetensors"

    def test_agents_keep_their_own_steps_unless_told(self, folders, monkeypatch):
        from fastdiff.commands.attention import sparse_attention

        monkeypatch.setattr(assets, "FOREIGN", assets.GenerationDefaults(dense_share=0.5))
        pipe = pipelines.load(folders["sd"], torch.device("cpu"), torch.float32)
        for method, dense in (("agent", 0), ("clear", 2)):
            asked = {"method": method, "prompt": "x", "steps": 4, "height": 64, "width": 64}
            for dense_steps, expected in ((None, dense), (1, 1)):
                request = request_for(folders["sd"], **asked, dense_steps=dense_steps)
                job = pipelines.settle(pipe, request)
                config = METHODS[method].for_density(0.5, job.grid)
                with sparse_attention(pipe, request, job, config) as described:
                    assert described.dense_steps == expected

    def test_late_agents(self, folders, tmp_path):
        more = ["--method", "agent", "--config", '{"agents": 16, "steps": [0.5, 1.0]}', "--output", str(tmp_path)]
        assert cli.main(words(folders, "compare", "sd", *more)) == 0
        found = json.loads((tmp_path / "report.json").read_text())
        assert found["sparse_steps"] == [1]
        assert found["mean_density"] == pytest.approx((1 + found["density"]) / 2, abs=0.01)

    def test_the_model_names_a_method_where_none_is_asked_for(self, monkeypatch):
        asked = {"dense_steps": None, "dense_layers": "0", "device": "auto", "dtype": "auto"}
        blank = dict.fromkeys(options.Request.__dataclass_fields__) | asked
        monkeypatch.setattr(assets, "FOREIGN", assets.GenerationDefaults(method="clear", density=0.2))
        assert options.Request.parse(blank | {"model": "some/where"}).method == "clear"
        config = '{"method": "neighborhood", "window": [3, 3]}'
        assert options.Request.parse(blank | {"model": "some/where", "config": config}).method == "neighborhood"

    def test_names_in_the_help_are_all(self):
        assert set(METHODS) == set(options.METHODS)
        assert set(assets.EMBEDDED) == set(options.MODELS)
        assert {assets.EMBEDDED[name].method for name in assets.EMBEDDED} <= set(METHODS)


class TestSizes:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_expected_layout_is_what_runs(self, folders, kind):
        pipe = pipelines.load(folders[kind], torch.device("cpu"), torch.float32)
        frames = 33 if kind == "wan" else None
        request = request_for(folders[kind], prompt="x", height=112, width=144, num_frames=frames, steps=1)
        job = pipelines.settle(pipe, request)
        from fastdiff import NeighborhoodConfig
        from fastdiff.commands.attention import sparse_attention
        from fastdiff.commands.running import warm_up

        config = NeighborhoodConfig((2, 4, 4), block_size=32)
        with sparse_attention(pipe, request, job, config) as described:
            warm_up(pipe, job)
            (model,) = locate.transformers(pipe).values()
            ((layout, places),) = attachment.find(model).seen.items()
        assert layout.grid == job.grid
        assert layout.query_tokens == job.grid.tokens + job.text_tokens
        finest = max((place.layout for place in places.values()), key=lambda found: found.query_tokens)
        assert sizes.finest_layer(pipe, job.grid, job.text_tokens).layout == finest
        assert described.density < 1

    def test_defaults_of_picture_pipelines_are_their_own(self, folders):
        for kind, size in (("flux", 256), ("sd", 64)):
            pipe = pipelines.load(folders[kind], torch.device("cpu"), torch.float32)
            if kind == "sd":
                pipe.unet.register_to_config(sample_size=32)
            job = pipelines.settle(pipe, request_for(folders[kind], prompt="x"))
            assert (job.height, job.width, job.num_frames) == (size, size, 1)
            assert job.steps == {"flux": 28, "sd": 50}[kind]

    def test_guidance_reaches_a_flux_that_takes_none_as_input(self, folders):
        pipe = pipelines.load(folders["flux"], torch.device("cpu"), torch.float32)
        unset = pipelines.settle(pipe, request_for(folders["flux"], prompt="x", height=32, width=32))
        assert "true_cfg_scale" not in unset.call
        asked = request_for(folders["flux"], prompt="x", height=32, width=32, guidance_scale=3.0)
        assert pipelines.settle(pipe, asked).call["true_cfg_scale"] == 3.0
        pipe.transformer.register_to_config(guidance_embeds=True)
        assert "true_cfg_scale" not in pipelines.settle(pipe, asked).call

    @pytest.mark.parametrize(
        ("kind", "more", "says"),
        [
            ("flux", ["--num-frames", "5"], "makes pictures"),
            ("sd", ["--num-frames", "5"], "makes pictures"),
            ("flux", ["--height", "54"], "multiples of 4, such as 52 or 56"),
            ("sd", ["--width", "33"], "multiples of 2, such as 32 or 34"),
            ("sd", ["--width", "34"], "divisible by 8"),
            ("sd", ["--output", "x.mp4"], "end it in .png"),
            ("wan", ["--output", "x.png"], "end it in .mp4"),
            ("sd", ["--output", "x.jpg"], ".png for a picture"),
            ("sd", ["--method", "clear"], "no default for radius"),
            ("sd", ["--method", "paro"], "give --density"),
            ("sd", ["--method", "paro", "--config", '{"calibration": "none.safetensors"}'], "none.safetensors"),
            ("sd", ["--method", "paro", "--density", "0.001"], "floor of paro"),
            ("wan", ["--method", "radial", "--num-frames", "5", "--density", "0.001"], "floor of radial"),
        ],
    )
    def test_refuses(self, folders, fails, tmp_path, monkeypatch, kind, more, says):
        monkeypatch.chdir(tmp_path)
        assert says in fails(*words(folders, "generate", kind, *more))
        assert files(tmp_path) == []

    @pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusion3Pipeline"])
    def test_other_pipelines(self, folders, fails, monkeypatch, name):
        import diffusers

        kind = getattr(diffusers, name)
        pipe = kind.__new__(kind)
        model = diffusers.PriorTransformer if name == "StableDiffusion3Pipeline" else diffusers.UNet2DConditionModel
        object.__setattr__(pipe, "transformer", model.__new__(model))
        monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", lambda *_, **__: pipe)
        line = fails("generate", "--model", folders["sd"], "--prompt", "x")
        assert name in line if "Img2Img" in name else "PriorTransformer is not described" in line

    def test_larger_than_memory(self, folders, fails, monkeypatch):
        import psutil

        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"total": 2**20}))
        line = fails(*words(folders, "generate", "flux", "--height", "512", "--width", "512", "--device", "cpu"))
        assert "out of memory" in line
        assert "--num-frames" not in line


def request_for(model: str, **asked) -> options.Request:
    blank = dict.fromkeys(options.Request.__dataclass_fields__)
    return options.Request(**{**blank, "method": "dense", "dense_layers": 0, "model": model, **asked})


class TestRun:
    @pytest.mark.parametrize(
        ("steps", "expected"), [((), [2, 3, 4]), ((0,), [9]), ((0, 2), [3]), ((2, 3), [3, 4]), ((7,), [20])]
    )
    def test_the_first_step_counts_only_alone(self, steps, expected):
        run = running.Run(torch.zeros(1, 3, 2, 2), 20.0, (9.0, 2.0, 3.0, 4.0))
        assert run.timed(steps) == expected
