"""CLEAR on a whole Flux pipeline: apply and remove, training, released weights, the way to high resolution."""

import copy
import inspect

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import PROMPT, tiny_wan
from tiny_picture_models import flux_inputs, tiny_flux, tiny_flux_pipeline

import fastdiff
from fastdiff import ClearConfig, HighResolution, high_resolution, load_clear_weights
from fastdiff_kernels import InvalidInputError, UnsupportedError

POOLED = ClearConfig(2, pool_factor=2)


def forward(model, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**flux_inputs(**{"height": 6, "width": 10, **more}))[0]


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(model, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], value) for name, value in before.items())


def released(model, factor: int | None = None, seed: int = 1) -> dict[str, torch.Tensor]:
    """Tensors as the authors' training script saves them, with random values."""
    generator = torch.Generator().manual_seed(seed)
    wanted = (".attn.to_q.", ".attn.to_k.", ".attn.to_v.", ".attn.to_out.")
    found = {name: x for name, x in model.named_parameters() if any(part in name for part in wanted)}
    tensors = {name: torch.randn(x.shape, generator=generator) for name, x in found.items()}
    if factor is not None:
        shape = (1, 1, 1, factor, 1, factor, 1)
        for name in model.attn_processors:
            tensors[f"{name}.spatial_weight"] = torch.randn(shape, generator=generator)
    return tensors


def test_apply_and_remove_are_exact_with_and_without_pooling():
    model = tiny_flux(layers=2, single_layers=2)
    before, dense = state_of(model), forward(model)
    for config in (ClearConfig(2), POOLED):
        fastdiff.apply(model, config)
        sparse = forward(model)
        assert not torch.allclose(sparse, dense)
        assert ("transformer_blocks.0.attn.fastdiff.weight" in model.state_dict()) == (config is POOLED)
        fastdiff.remove(model)
        assert torch.equal(forward(model), dense)
        assert equal(model, before)


def test_everything_in_reach_is_the_dense_model():
    model = tiny_flux(layers=2, single_layers=1)
    dense = forward(model, reference=(2, 3))
    fastdiff.apply(model, ClearConfig(20))
    torch.testing.assert_close(forward(model, reference=(2, 3)), dense, rtol=1e-4, atol=1e-5)


def test_pooling_learns_in_every_layer_and_batches_are_samples():
    model = tiny_flux(layers=1, single_layers=2)
    fastdiff.apply(model, POOLED)
    inputs = flux_inputs(height=6, width=10, batch=2)
    out = model(**inputs)[0]
    out.square().mean().backward()
    grids = [module.fastdiff.weight for module in model.modules() if hasattr(module, "fastdiff")]
    assert len(grids) == 3
    assert all(grid.grad.abs().min() > 0 for grid in grids)
    names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep")
    with torch.no_grad():
        alone = model(**{name: x[1:] if name in names else x for name, x in inputs.items()})[0]
    torch.testing.assert_close(alone, out[1:], rtol=1e-4, atol=1e-5)


def test_grids_follow_the_dtype_of_the_model():
    model = tiny_flux().bfloat16()
    fastdiff.apply(model, POOLED)
    assert model.transformer_blocks[0].attn.fastdiff.weight.dtype == torch.bfloat16
    inputs = {k: v.bfloat16() if torch.is_tensor(v) else v for k, v in flux_inputs(height=6, width=10).items()}
    with torch.no_grad():
        assert model(**inputs)[0].dtype == torch.bfloat16


def test_one_graph_for_all_layers():
    """Pooling weights differ by layer; code compiled for one must serve the others."""
    model = tiny_flux(layers=1, single_layers=4)
    fastdiff.apply(model, ClearConfig(2, pool_factor=2, proportional=True, train_tokens=20))
    with torch.no_grad():
        for index, block in enumerate(model.single_transformer_blocks):
            block.attn.fastdiff.weight.fill_(0.1 * index)
    expected = forward(model)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(forward(model), expected)
    # One for each class of block, and one for the strides of what the first of the single blocks is given.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("factor", [None, 2])
@pytest.mark.parametrize("restore_first", [True, False])
def test_released_weights_come_and_go(tmp_path, factor, restore_first):
    pipe = tiny_flux_pipeline(layers=2, single_layers=1)
    model = pipe.transformer
    tensors = released(model, factor)
    save_file(tensors, tmp_path / "clear.safetensors")
    before, dense = state_of(model), forward(model)
    fastdiff.apply(pipe, ClearConfig(2, pool_factor=factor))
    start = forward(model)
    weights = load_clear_weights(pipe, tmp_path / "clear.safetensors")
    assert weights.tensors == len(tensors) == 2 * 8 + 6 + (0 if factor is None else 3)
    assert torch.equal(
        model.transformer_blocks[1].attn.to_out[0].bias, tensors["transformer_blocks.1.attn.to_out.0.bias"]
    )
    if factor is not None:
        grid = tensors["single_transformer_blocks.0.attn.processor.spatial_weight"]
        assert torch.equal(model.single_transformer_blocks[0].attn.fastdiff.weight, grid[0, 0, 0, :, 0, :, 0])
    assert not torch.allclose(forward(model), start)
    if restore_first:
        weights.restore()
        assert torch.equal(forward(model), start)
        fastdiff.remove(pipe)
    else:
        fastdiff.remove(pipe)
        assert not torch.allclose(forward(model), dense)
        weights.restore()
    weights.restore()
    assert torch.equal(forward(model), dense)
    assert equal(model, before)


def test_two_files_are_restored_one_after_the_other(tmp_path):
    model = tiny_flux()
    before = state_of(model)
    handles = []
    for seed in (1, 2):
        save_file(released(model, seed=seed), tmp_path / "clear.safetensors")
        handles.append(load_clear_weights(model, tmp_path / "clear.safetensors"))
    middle = released(model, seed=1)
    handles[1].restore()
    assert all(torch.equal(model.get_parameter(name), value) for name, value in middle.items())
    handles[0].restore()
    assert equal(model, before)


def test_weights_take_the_dtype_of_the_model(tmp_path):
    model = tiny_flux().bfloat16()
    before = state_of(model)
    tensors = released(model)
    save_file(tensors, tmp_path / "clear.safetensors")
    weights = load_clear_weights(model, tmp_path / "clear.safetensors")
    name = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(model.get_parameter(name), tensors[name].bfloat16())
    weights.restore()
    assert equal(model, before)


@pytest.mark.parametrize("prefix", ["transformer.", "module.", "module.transformer."])
def test_other_spellings_of_the_same_names(tmp_path, prefix):
    model = tiny_flux()
    fastdiff.apply(model, POOLED)
    tensors = released(model, 2)
    renamed = {}
    for name, value in tensors.items():
        if name.endswith("processor.spatial_weight"):
            name, value = name.replace("processor.spatial_weight", "fastdiff.weight"), value.reshape(2, 2)
        renamed[prefix + name] = value
    save_file(renamed, tmp_path / "clear.safetensors")
    load_clear_weights(model, tmp_path / "clear.safetensors")
    grid = tensors["transformer_blocks.0.attn.processor.spatial_weight"]
    assert torch.equal(model.transformer_blocks[0].attn.fastdiff.weight, grid.reshape(2, 2))


def test_released_weights_under_rules(tmp_path):
    model = tiny_flux(layers=1, single_layers=2)
    before = state_of(model)
    tensors = released(model, 2)
    save_file(tensors, tmp_path / "clear.safetensors")
    fastdiff.apply(model, POOLED)
    weights = load_clear_weights(model, tmp_path / "clear.safetensors")
    expected = forward(model)
    fastdiff.remove(model)
    weights.restore()
    fastdiff.apply(model, fastdiff.RulesConfig([fastdiff.Rule(POOLED, layers="0"), fastdiff.Rule(POOLED)]))
    weights = load_clear_weights(model, tmp_path / "clear.safetensors")
    assert torch.equal(forward(model), expected)
    weights.restore()
    fastdiff.remove(model)
    assert equal(model, before)
    fastdiff.apply(model, fastdiff.RulesConfig([fastdiff.Rule("dense", layers="0"), fastdiff.Rule(POOLED)]))
    with pytest.raises(InvalidInputError, match="not patched for them"):
        load_clear_weights(model, tmp_path / "clear.safetensors")


def test_own_grids_travel_by_the_state_dict(tmp_path):
    """What was trained with fastdiff is saved and loaded in the same form."""
    model = tiny_flux()
    fastdiff.apply(model, POOLED)
    wanted = (".to_q.", ".to_k.", ".to_v.", ".to_out.", ".fastdiff.")
    own = {name: x + 1 for name, x in model.state_dict().items() if ".attn." in name and any(w in name for w in wanted)}
    save_file(own, tmp_path / "own.safetensors")
    load_clear_weights(model, tmp_path / "own.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in own.items())


def broken(tensors: dict[str, torch.Tensor], how: str) -> dict[str, torch.Tensor]:
    query, grid = "transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.processor.spatial_weight"
    changes = {
        "missing": lambda t: t.pop(query),
        "missing grid": lambda t: t.pop(grid),
        "unknown": lambda t: t.update({"transformer_blocks.7.attn.to_q.weight": torch.zeros(32, 32)}),
        "unknown grid": lambda t: t.update({"transformer_blocks.7.attn.processor.spatial_weight": t[grid].clone()}),
        "text": lambda t: t.update({"transformer_blocks.0.attn.add_q_proj.weight": torch.zeros(32, 32)}),
        "shape": lambda t: t.update({query: torch.zeros(16, 32)}),
        "whole numbers": lambda t: t.update({query: torch.zeros(32, 32, dtype=torch.int8)}),
        "grid shape": lambda t: t.update({grid: torch.zeros(1, 1, 1, 2, 1, 3, 1)}),
        "other grid": lambda t: t.update({grid: torch.zeros(1, 1, 1, 3, 1, 3, 1)}),
        "twice": lambda t: t.update({f"module.{query}": t[query].clone()}),
    }
    changes[how](tensors)
    return tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"lacks 1 tensors of this model \(transformer_blocks.0.attn.to_q.weight\)"),
        ("missing grid", r"lacks 1 tensors of this model \(transformer_blocks.0.attn.processor.spatial_weight\)"),
        ("unknown", "has 1 tensors that this model lacks"),
        ("unknown grid", "has 1 tensors that this model lacks"),
        ("text", "add_q_proj"),
        ("shape", r"float32 \[16, 32\] and the model has \[32, 32\]"),
        ("whole numbers", "int8"),
        ("grid shape", "must be"),
        ("other grid", "pooling grids of 3x3 and the model is not patched"),
        ("twice", "has transformer_blocks.0.attn.to_q.weight twice"),
    ],
)
def test_files_of_another_model_change_nothing(tmp_path, how, message):
    model = tiny_flux()
    fastdiff.apply(model, POOLED)
    before = state_of(model)
    save_file(broken(released(model, 2), how), tmp_path / "clear.safetensors")
    with pytest.raises(InvalidInputError, match=message):
        load_clear_weights(model, tmp_path / "clear.safetensors")
    assert equal(model, before)


def test_grids_and_patch_must_agree(tmp_path):
    model = tiny_flux()
    save_file(released(model, 2), tmp_path / "grids.safetensors")
    save_file(released(model), tmp_path / "plain.safetensors")
    with pytest.raises(InvalidInputError, match=r"call fastdiff.apply\(pipe, ClearConfig\(radius, pool_factor=2\)\)"):
        load_clear_weights(model, tmp_path / "grids.safetensors")
    fastdiff.apply(model, POOLED)
    with pytest.raises(InvalidInputError, match="has no pooling grids"):
        load_clear_weights(model, tmp_path / "plain.safetensors")


def test_unreadable_files_and_other_models_are_refused(tmp_path):
    model = tiny_flux()
    whole = tmp_path / "clear.safetensors"
    save_file(released(model), whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("<html>not found</html>")
    for name in ("cut", "text"):
        with pytest.raises(InvalidInputError, match="cannot be read as safetensors"):
            load_clear_weights(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(InvalidInputError, match="there is no file"):
        load_clear_weights(model, tmp_path / "absent.safetensors")
    with pytest.raises(UnsupportedError, match="for FLUX and this is WanTransformer3DModel"):
        load_clear_weights(tiny_wan(), whole)
    assert set(load_file(whole)) == set(released(model))
    model.fuse_qkv_projections()
    with pytest.raises(UnsupportedError, match="fused projections"):
        load_clear_weights(model, whole)


SETTINGS = HighResolution(clear=ClearConfig(3, pool_factor=2, proportional=True, train_tokens=20), upscale=2, steps=4)


class Watched:
    """Notes what a Flux pipeline looks like at each forward of its transformer."""

    def __init__(self, pipe):
        self.pipe, self.calls, self.fail_at = pipe, [], None
        pipe.transformer.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model, args, kwargs):
        self.calls.append(
            {
                "tokens": kwargs["hidden_states"].shape[1],
                "theta": model.pos_embed.theta,
                "tiling": self.pipe.vae.use_tiling,
                "pooled": hasattr(model.transformer_blocks[0].attn, "fastdiff"),
                "query": model.transformer_blocks[0].attn.to_q.weight[0, 0].item(),
                "timestep": kwargs["timestep"][0].item(),
                "guidance": kwargs["guidance"],
            }
        )
        if self.fail_at == len(self.calls):
            raise RuntimeError("stopped on purpose")


def settings_of(pipe) -> dict:
    return {
        "scheduler": pipe.scheduler,
        "config": dict(pipe.scheduler.config),
        "theta": pipe.transformer.pos_embed.theta,
        "tiling": pipe.vae.use_tiling,
        "processors": list(map(id, pipe.transformer.attn_processors.values())),
        "dtypes": {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)},
    }


def call(pipe, settings=SETTINGS, height=32, width=48, **more) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    return high_resolution(
        pipe, PROMPT, height, width, settings=settings, generator=generator, max_sequence_length=8, **more
    )


def test_high_resolution_runs_both_passes_and_leaves_no_trace(tmp_path):
    pipe = tiny_flux_pipeline(layers=1, single_layers=1)
    weights = tmp_path / "clear.safetensors"
    tensors = released(pipe.transformer, 2)
    save_file({name: 0.1 * value for name, value in tensors.items()}, weights)
    before, state = settings_of(pipe), state_of(pipe.transformer)
    watched = Watched(pipe)
    settings = HighResolution(**{**vars(SETTINGS), "weights": str(weights)})
    (image,) = call(pipe, settings)
    assert image.size == (48, 32)
    first, second = watched.calls[:4], watched.calls[4:]
    # 0.7 of 4 steps are 2.8, which diffusers rounds up.
    assert len(second) == 3
    assert {call["tokens"] for call in first} == {4 * 6}
    assert {call["tokens"] for call in second} == {8 * 12}
    assert {(call["theta"], call["tiling"], call["pooled"]) for call in first} == {(10_000, False, False)}
    assert {(call["theta"], call["tiling"], call["pooled"]) for call in second} == {(100_000, True, True)}
    query = "transformer_blocks.0.attn.to_q.weight"
    assert first[0]["query"] == state[query][0, 0]
    assert second[0]["query"] == 0.1 * tensors[query][0, 0]
    assert settings_of(pipe) == before
    assert equal(pipe.transformer, state)


def test_weights_that_do_not_fit_are_found_before_the_first_pass(tmp_path):
    pipe = tiny_flux_pipeline()
    save_file({"nonsense": torch.zeros(2)}, tmp_path / "other.safetensors")
    before, state = settings_of(pipe), state_of(pipe.transformer)
    watched = Watched(pipe)
    settings = HighResolution(**{**vars(SETTINGS), "weights": str(tmp_path / "other.safetensors")})
    with pytest.raises(InvalidInputError, match="lacks 14 tensors"):
        call(pipe, settings)
    assert watched.calls == []
    assert settings_of(pipe) == before
    assert equal(pipe.transformer, state)


def test_the_shift_of_the_second_pass_is_the_one_given():
    pipe = tiny_flux_pipeline()
    pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    watched = Watched(pipe)
    begins = []
    for shift in (1.0, 3.0):
        call(pipe, HighResolution(clear=ClearConfig(3), upscale=2, steps=10, strength=0.5, shift=shift))
        begins.append(watched.calls[10]["timestep"])
        watched.calls.clear()
    # At strength 0.5 the second pass begins at sigma = 0.5, shifted s sigma / (1 + (s - 1) sigma).
    assert begins == pytest.approx([0.5, 0.75], abs=0.01)


@pytest.mark.parametrize("fail_at", [2, 5])
def test_high_resolution_leaves_no_trace_when_a_pass_fails(fail_at):
    pipe = tiny_flux_pipeline()
    before, state = settings_of(pipe), state_of(pipe.transformer)
    watched = Watched(pipe)
    watched.fail_at = fail_at
    with pytest.raises(RuntimeError, match="on purpose"):
        call(pipe)
    assert settings_of(pipe) == before
    assert equal(pipe.transformer, state)
    watched.fail_at = None
    assert call(pipe)[0].size == (48, 32)


def test_models_keep_their_dtypes():
    pipe = tiny_flux_pipeline().to(torch.bfloat16)
    before = settings_of(pipe)
    call(pipe)
    assert settings_of(pipe) == before


def test_a_cascade_starts_from_its_own_picture():
    pipe = tiny_flux_pipeline()
    watched = Watched(pipe)
    start = Image.new("RGB", (20, 12), (200, 30, 30))
    images = call(pipe, image=[start, start], num_images_per_prompt=2)
    assert [image.size for image in images] == [(48, 32)] * 2
    assert {call["tokens"] for call in watched.calls} == {96}


def test_results_depend_on_seed_and_settings_alone():
    pipe = tiny_flux_pipeline()
    first, again = call(pipe)[0], call(copy.deepcopy(pipe))[0]
    assert first.tobytes() == again.tobytes()
    other = HighResolution(**{**vars(SETTINGS), "ntk_factor": 1.0})
    assert call(pipe, other)[0].tobytes() != first.tobytes()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"clear": {"radius": 8}}, "give a ClearConfig"),
        ({"upscale": 1}, "upscale is 1"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"strength": 0}, "strength is 0; it must be a number above 0 and up to 1"),
        ({"strength": 1.5}, "strength is 1.5"),
        ({"guidance": -1}, "guidance is -1"),
        ({"ntk_factor": 0.5}, "ntk_factor is 0.5"),
        ({"shift": 0}, "shift is 0"),
        ({"vae_tiling": 1}, "vae_tiling is 1"),
    ],
)
def test_bad_settings_are_refused(values, message):
    with pytest.raises(InvalidInputError, match=message):
        HighResolution(**values)


def test_bad_calls_are_refused_before_the_first_pass():
    pipe = tiny_flux_pipeline()
    watched = Watched(pipe)
    cases = [
        ({"height": 30}, "height is 30; give a multiple of 4"),
        ({"width": 0}, "width is 0"),
        ({"height": 36}, "pool_factor 2 does not divide a grid of 1x9x12"),
        ({"guidance_scale": 2.0}, "guidance_scale cannot be given here"),
        ({"settings": HighResolution(weights="absent.safetensors")}, "weights is 'absent.safetensors'"),
    ]
    for more, message in cases:
        with pytest.raises(InvalidInputError, match=message):
            call(pipe, **more)
    fastdiff.apply(pipe, ClearConfig(2))
    with pytest.raises(InvalidInputError, match=r"call fastdiff.remove\(pipe\) first"):
        call(pipe)
    assert not watched.calls
    fastdiff.remove(pipe)
    with pytest.raises(InvalidInputError, match="image is a Tensor"):
        call(pipe, image=torch.zeros(3, 8, 8))
    with pytest.raises(UnsupportedError, match="takes a FluxPipeline"):
        call(pipe.transformer)


def test_defaults_are_those_of_the_notebook():
    values = {name: p.default for name, p in inspect.signature(HighResolution).parameters.items()}
    assert values["clear"] == ClearConfig(8, pool_factor=4, proportional=True)
    assert (values["strength"], values["steps"], values["guidance"], values["low_guidance"]) == (0.7, 20, 7.5, 3.5)
    assert (values["ntk_factor"], values["shift"], values["vae_tiling"]) == (10, 3.0, True)
