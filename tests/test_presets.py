"""Presets: what is published, which one a name takes on which pipeline, and the refusals."""

import json
import logging

import pytest
import tiny_video_models
import tiny_video_text_models
import torch
from tiny_latent_models import tiny_sd3
from tiny_models import PROMPT, forward, tiny_wan, tiny_wan_pipeline, video
from tiny_picture_models import flux_inputs, picture, tiny_flux, tiny_flux_pipeline, tiny_sd_pipeline, tiny_unet

import fastdiff
from fastdiff import DenseSchedule, Rule, cli
from fastdiff.methods.neighborhood_presets import neighborhood_presets
from fastdiff.published import named
from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_patches.attachment import find
from fastdiff_patches.families import FAMILIES

torch.set_num_threads(1)

NAMES = [preset.name for preset in fastdiff.presets()]


TINY = {
    "wan": tiny_wan,
    "hunyuan-video": tiny_video_text_models.tiny_hunyuan_video,
    "cosmos": tiny_video_models.tiny_cosmos,
    "flux": tiny_flux,
    "unet": tiny_unet,
}


class TestList:
    def test_it_is_data_and_reads_well(self):
        found = fastdiff.presets()
        assert len(set(NAMES)) == len(found)
        assert len(repr(found).splitlines()) == len(found)
        families = {family.name for family in FAMILIES.values()}
        for preset in found:
            assert preset.family in families
            assert preset.method in ("radial", "neighborhood", "clear", "agent")
            assert preset.name.startswith(preset.method)
            assert "arXiv" in preset.source or " at " in preset.source or "parameters of" in preset.source
            assert str(Grid.parse(preset.grid)) == preset.grid
            data = json.loads(json.dumps(preset.to_dict()))
            assert fastdiff.load_config(data["config"]) == preset.config
            assert DenseSchedule.from_dict(data["schedule"]) == preset.schedule
            # The command line has no options for the rest of a schedule.
            assert preset.schedule == DenseSchedule(preset.schedule.first_steps, preset.schedule.layers)
        text = str(named("radial-wan-2.1"))
        assert text.startswith("radial-wan-2.1: radial for wan (Wan2.1-T2V-14B, 18x48x80 tokens); decay_factor 0.2; ")
        assert "dense_steps 0.24; dense_layers 1; arXiv 2506.19852" in text

    @pytest.mark.parametrize(
        ("name", "runs"),
        [
            # Steps of the published runs, and how many of them are dense.
            ("radial-wan-2.1", {50: 12, 8: 2, 4: 1}),
            ("radial-wan-2.2", {40: 11}),
            ("radial-hunyuan-video", {50: 12}),
            ("radial-wan-2.1-long", {50: 2}),
        ],
    )
    def test_dense_steps_of_radial(self, name, runs):
        schedule = named(name).schedule
        for steps, dense in runs.items():
            assert [schedule.is_dense_step(step, steps) for step in range(steps)] == [
                step < dense for step in range(steps)
            ]

    def test_windows_are_those_of_the_paper(self):
        for name, found in neighborhood_presets().items():
            preset = named(f"neighborhood-{name}")
            assert (preset.config.window, preset.config.stride) == (found.config.window, found.config.stride)
            assert preset.config.axis_settings(found.grid) == found.config.axis_settings(found.grid)
            dense = [preset.schedule.is_dense_step(step, found.steps) for step in range(found.steps)]
            assert sum(dense) == found.dense_steps

    @pytest.mark.parametrize(
        ("size", "layers"),
        [
            # For each layer what share of the keys it leaves out, in percent, as published.
            ("2b", "98 98 95 92 92 95 92 92 92 92 95 " + "77 " * 12 + "55 77 77 77 92"),
            ("14b", "98 " * 11 + "95 95 " + "92 " * 10 + "77 55 77 55 0 55 77 77 55 55 77 55 77"),
        ],
    )
    def test_the_schedules_of_cosmos(self, size, layers):
        config, grid = named(f"neighborhood-cosmos-predict2-{size}").config, Grid(24, 44, 80)
        found = []
        for layer in range(len(layers.split())):
            part = config.at(layer, len(layers.split()))
            kept = 1.0
            for axis in () if part is None else part.axis_settings(grid):
                kept *= 1.0 if axis.window is None else axis.window / axis.length
            found.append(round(100 * (1 - kept)))
        assert found == [int(share) for share in layers.split()]

    def test_the_first_window_of_cosmos_spans_the_frame(self):
        part = named("neighborhood-cosmos-predict2-2b").config.at(0)
        assert (part.window, part.dilation) == ((None, 4, 16), (1, 11, 5))


class TestChoice:
    def test_by_its_own_name_it_is_told_once(self, caplog):
        with caplog.at_level(logging.INFO, logger="fastdiff"):
            fastdiff.apply(tiny_flux_pipeline(), "clear-flux-32")
        assert caplog.text.count("clear-flux-32: ") == 1

    @pytest.mark.parametrize(
        ("build", "method", "name"),
        [
            (tiny_wan_pipeline, "radial", "radial-wan-2.1"),
            (lambda: tiny_wan_pipeline(two_experts=True), "radial", "radial-wan-2.2"),
            (tiny_flux_pipeline, "clear", "clear-flux-32"),
            (tiny_flux_pipeline, "neighborhood", "neighborhood-flux-4k-80x80-s16x16"),
            (tiny_sd_pipeline, "agent", "agent-sd"),
        ],
    )
    def test_by_method(self, build, method, name, caplog):
        pipe = build()
        with caplog.at_level(logging.INFO, logger="fastdiff"):
            fastdiff.apply(pipe, method)
        assert caplog.text.count(f"{method}: settings published as {name}: ") == 1
        preset = named(name)
        assert preset.source in caplog.text
        for model in fastdiff.summary(pipe).models:
            assert model.preset == name
            assert model.config == preset.config.to_dict()
            assert model.schedule == preset.schedule.to_dict()
        assert f"preset    {name}" in str(fastdiff.summary(pipe))

    @pytest.mark.parametrize(
        ("config", "name"),
        [
            ({}, "neighborhood-cosmos-16x32x48-s1x8x16"),
            ({"num_attention_heads": 16, "num_layers": 28}, "neighborhood-cosmos-16x32x48-s1x8x16"),
            (
                {"num_attention_heads": 16, "num_layers": 28, "extra_pos_embed_type": None},
                "neighborhood-cosmos-predict2-2b",
            ),
        ],
        ids=["1.0", "1.0 of that size", "predict 2"],
    )
    def test_by_the_config_of_the_model(self, config, name):
        model = tiny_video_models.tiny_cosmos(**config)
        # The paper's own has dense steps, which a model alone cannot count.
        fastdiff.apply(model, "neighborhood", dense_steps=0)
        assert fastdiff.summary(model).models[0].preset == name

    def test_the_same_as_its_config(self):
        pipe, preset = tiny_wan_pipeline(layers=3), named("radial-wan-2.1")
        expected = video(fastdiff.apply(pipe, preset.config, schedule=preset.schedule))
        assert torch.equal(video(fastdiff.apply(pipe, "radial")), expected)
        assert torch.equal(video(fastdiff.apply(pipe, "radial-wan-2.1")), expected)
        fastdiff.remove(pipe)
        pipe.transformer.set_attn_processor(fastdiff.processors(pipe, "radial"))
        assert torch.equal(video(pipe), expected)

    @pytest.mark.parametrize(
        ("told", "expected"),
        [
            ({"dense_steps": 3}, DenseSchedule(3, 1)),
            ({"dense_layers": 0}, DenseSchedule(0.24, 0)),
            ({"dense_steps": 0, "dense_layers": [1]}, DenseSchedule(0, [1])),
            ({"schedule": DenseSchedule(every=2)}, DenseSchedule(every=2)),
        ],
        ids=str,
    )
    def test_what_a_user_says_stands_above(self, told, expected):
        pipe = fastdiff.apply(tiny_wan_pipeline(), "radial", **told)
        assert find(pipe.transformer).schedule == expected

    def test_a_schedule_of_layers_runs(self):
        model = tiny_video_models.tiny_cosmos(num_attention_heads=16, num_layers=28, extra_pos_embed_type=None)
        with torch.no_grad():
            dense = model(**tiny_video_models.cosmos_inputs(2, 8, 10))[0]
            fastdiff.apply(model, "neighborhood")
            assert not torch.equal(model(**tiny_video_models.cosmos_inputs(2, 8, 10))[0], dense)
            layers = fastdiff.summary(model, grid="2x44x80").models[0].layers
            densities = [layers[index].density for index in (0, 2, 3, 11, 23)]
            assert densities == sorted(set(densities))
            fastdiff.remove(model)
            assert torch.equal(model(**tiny_video_models.cosmos_inputs(2, 8, 10))[0], dense)

    @pytest.mark.parametrize("name", NAMES)
    def test_each_is_built_on_its_family(self, name):
        preset = named(name)
        model = TINY[preset.family]()
        if preset.facts:
            with pytest.raises(InvalidInputError, match="layers of rule .* this model has 2 layers"):
                fastdiff.apply(model, name)
            return
        if preset.config.uses_steps or preset.schedule.uses_steps:
            with pytest.raises(InvalidInputError, match="no scheduler to tell"):
                fastdiff.apply(model, name)
        if not preset.config.uses_steps:
            fastdiff.apply(model, name, dense_steps=0)
            assert fastdiff.summary(model).models[0].preset == name

    def test_pictures(self):
        pipe = fastdiff.apply(tiny_sd_pipeline(), "agent")
        # 16x16 agents are too many for 28x20 tokens with the published share of merged ones.
        with pytest.raises(InvalidInputError, match="give fewer agents"):
            picture(pipe)
        assert picture(pipe, height=128, width=128).isfinite().all()
        model = fastdiff.apply(tiny_flux(), "clear")
        with torch.no_grad():
            assert model(**flux_inputs(height=8, width=8))[0].isfinite().all()


class TestRefusals:
    @pytest.mark.parametrize(
        ("build", "name", "message"),
        [
            (tiny_wan, "clear", "'clear' are for flux; for family 'wan' there are radial-wan-2.2, radial-wan-2.1,"),
            (tiny_wan, "paro", "nobody has published .*'paro'.*or a ParoConfig of your own"),
            (tiny_wan, "rules", "nobody has published .*'rules'.*or a RulesConfig of your own"),
            (tiny_wan, "clear-flux-32", "'clear-flux-32' are for flux; for family 'wan'"),
            (tiny_wan, "radail", r"'radail', which is no method with published settings \(radial, neighborhood, clear"),
            (tiny_sd3, "radial", "'radial' are for wan, hunyuan-video; for family 'sd3' there are none"),
        ],
    )
    def test_names(self, build, name, message):
        model = build()
        with pytest.raises(InvalidInputError, match=message):
            fastdiff.apply(model, name)
        assert find(model) is None

    def test_an_unknown_model(self):
        with pytest.raises(UnsupportedError, match="not described"):
            fastdiff.apply(torch.nn.Linear(2, 2), "radial")

    def test_a_preset_that_is_not_there(self):
        with pytest.raises(InvalidInputError, match="no preset 'radial-wan'; there are .*, such as .*radial-wan-2.1"):
            named("radial-wan")

    def test_files_and_json_are_still_read(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        config = fastdiff.RulesConfig([Rule(fastdiff.RadialConfig(0.5))])
        (tmp_path / "rules.json").write_text(config.to_json())
        (tmp_path / "plain").write_text(config.to_json())
        model = tiny_wan()
        for source in ("rules.json", "plain", "./plain", tmp_path / "plain", config.to_json()):
            fastdiff.apply(model, source)
            assert find(model).settings.config == config
        assert forward(model).isfinite().all()
        with pytest.raises(InvalidInputError, match="cannot be read"):
            fastdiff.apply(model, "missing.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wan"
    tiny_wan_pipeline().save_pretrained(path)
    return path


class TestCommands:
    def words(self, folder, *more):
        size = ["--height", "80", "--width", "96", "--num-frames", "33", "--steps", "4", "--prompt", PROMPT]
        return ["generate", "--model", str(folder), *size, "--preset", "radial-wan-2.1", *more]

    def test_list(self, capsys):
        assert cli.main(["presets"]) == 0
        out = capsys.readouterr().out
        assert all(f"  {name}\n" in out for name in NAMES)
        assert "Family hunyuan-video\n" in out
        assert cli.main(["presets", "--json"]) == 0
        expected = json.dumps([preset.to_dict() for preset in fastdiff.presets()])
        assert json.loads(capsys.readouterr().out) == json.loads(expected)

    @pytest.mark.parametrize(
        ("more", "steps", "layers"),
        [((), 1, 1), (("--dense-steps", "2"), 2, 1), (("--dense-layers", "0"), 1, 0)],
        ids=["as published", "steps", "layers"],
    )
    def test_generate(self, folder, tmp_path, more, steps, layers):
        assert cli.main(self.words(folder, *more, "--output", str(tmp_path / "x.mp4"))) == 0
        found = json.loads((tmp_path / "x.json").read_text())
        assert (found["method"], found["preset"]) == ("radial", "radial-wan-2.1")
        assert found["config"] == named("radial-wan-2.1").config.to_dict()
        assert (found["dense_steps"], found["dense_layers"]) == (steps, layers)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--preset", "radial"), "no preset 'radial'"),
            (("--preset", "agent-sd"), "'agent-sd' are for unet; for family 'wan' there are radial-wan-2.2"),
            (("--method", "radial"), "--preset and --method exclude each other"),
            (("--density", "0.5"), "--preset and --density exclude each other"),
        ],
        ids=str,
    )
    def test_refusals(self, fails, folder, tmp_path, words, message):
        assert message in fails(*self.words(folder, *words, "--output", tmp_path / "x.mp4"))
