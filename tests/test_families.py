"""Every family row against its model: which modules, which grid, in which order the tokens stand."""

import copy
import pickle

import paro_plans
import peft
import pytest
import torch
from fake_planner import Watching, put_on, rotated
from family_case import present, run, values, without_neighbours
from family_cases_image import IMAGE_CASES
from family_cases_video import VIDEO_CASES
from tiny_models import tiny_wan
from tiny_picture_models import flux_inputs, tiny_flux

import fastdiff
from fastdiff import catalogue
from fastdiff.methods.fingerprint import Fingerprint
from fastdiff.methods.paro_file import Calibration
from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_patches import families, locate
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

ALL_CASES = {**VIDEO_CASES, **IMAGE_CASES}
CASES = present(ALL_CASES)
# The sparsest that a dozen tokens a frame allow.
SMALL = {
    "radial": fastdiff.RadialConfig(decay_factor=0, near_width=0, sink=False, block_size=32),
    "neighborhood": fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32),
    "clear": fastdiff.ClearConfig(1.5, block_size=32),
    "agent": fastdiff.AgentConfig(4, steps=(0, 1)),
}
PAIRS = [(name, grid) for name, case in CASES.items() for grid in case.grids]


def test_every_row_has_a_model_here():
    assert {name.split(",")[0] for name in ALL_CASES} == set(families.FAMILIES)


@pytest.mark.parametrize(("name", "grid"), PAIRS, ids=str)
def test_the_layout_by_perturbation(name, grid, shows):
    """One place is moved in the inputs: the token that the layout names must change in every attention call.

    In transformers it alone changes. In a UNet the pixels change that a token of a coarser level stands for. Modules
    that see one frame at a time have the others in their batch.
    """
    torch.manual_seed(0)
    case = CASES[name]
    model = without_neighbours(case.build())
    shows(model, "layout")
    family, inputs = families.family_of(model), case.arguments(*grid)
    whole = family.layout(model.config, inputs)
    assert whole.grid == Grid(*grid)
    is_unet = family.levels
    before = values(model, inputs)
    # Of the pixels of a UNet, those with multiples of 4 for row and column are there on all levels.
    last = [(size - 1) // 4 * 4 if is_unet and axis else size - 1 for axis, size in enumerate(grid)]
    for place in {(0, 0, 0), tuple(last), (0, 0, last[2])}:
        moved = copy.deepcopy(inputs)
        case.move(moved, *place)
        after = values(model, moved)
        for module, old in before.items():
            layout = family.at(model.config, whole, module)
            frames = grid[0] if layout.grid.frames == 1 else 1
            assert len(old) == frames * layout.key_tokens
            changed = (old - after[module]).abs().amax(1).nonzero().flatten()
            scale = next(s for s in (1, 2, 4) if layout.grid.height == -(-grid[1] // s))
            frame, row, column = place
            start = layout.key_tokens * (frame if frames > 1 else 0)
            starts = [start + offset for offset, span in offsets(layout) if span.grid == layout.grid]
            frame = 0 if frames > 1 else frame
            token = (frame * layout.grid.height + row // scale) * layout.grid.width + column // scale
            if not is_unet:
                assert changed.tolist() == [start + token for start in starts]
            else:
                assert start + token in changed
                far = layout.grid.coordinates()[changed - start] - layout.grid.coordinates()[token]
                assert far.abs().max() < max(4 // scale, 1) + 1


def offsets(layout):
    """(first key token, span) of each span."""
    start = 0
    for span in layout.key:
        yield start, span
        start += span.tokens


@pytest.mark.parametrize("name", CASES)
def test_what_a_family_supplies(name):
    """The query before RoPE, turned by the table, is the query; the block input is what the block was called with."""
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.build(), case.arguments(*case.grids[0])
    for part in model.modules():
        if isinstance(part, (torch.nn.RMSNorm, torch.nn.LayerNorm)) and part.weight is not None:
            torch.nn.init.normal_(part.weight)
    needs = families.family_of(model).supplies
    planner = put_on(model, Watching(needs=needs))
    taken = []
    if "block_input" in needs:
        for layer in find(model).layers:
            block = model.get_submodule(layer.name.rpartition(".")[0])
            block.register_forward_pre_hook(
                lambda module, args, kwargs, active=layer: taken.append((active, args or (kwargs["hidden_states"],))),
                with_kwargs=True,
            )
    run(model, inputs)
    blocks = [args[0] for layer, args in taken if layer.active]
    assert len(planner.extras) == sum(layer.active for layer in find(model).layers)
    for index, extras in enumerate(planner.extras):
        found = extras.inputs
        if "block_input" in needs:
            assert found["block_input"] is blocks[index]
        if "pre_rope_query" in needs:
            turned = found["pre_rope_query"]
            if found.get("rotary") is not None:
                turned = rotated(turned, *found["rotary"])
                assert not torch.allclose(turned, found["pre_rope_query"], atol=1e-2)
            if "rotary" in needs:
                torch.testing.assert_close(turned, found["query"])
            else:
                torch.testing.assert_close(turned.norm(dim=-1), found["query"].norm(dim=-1))


@pytest.mark.parametrize(("name", "grid"), PAIRS, ids=str)
def test_full_density_equals_the_untouched_model_and_remove_is_exact(name, grid, shows):
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.build(), case.arguments(*grid)
    shows(model, "density 1 and remove")
    dense = run(model, inputs)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, None, None), block_size=32))
    torch.testing.assert_close(run(model, inputs), dense, atol=5e-6, rtol=1e-4)
    narrow = min(grid[1:]) > 2
    if narrow:
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32))
        assert not torch.allclose(run(model, inputs), dense, atol=1e-4)
    fastdiff.remove(model)
    assert torch.equal(run(model, inputs), dense)


@pytest.mark.parametrize("method", ["radial", "neighborhood", "clear", "paro", "agent"])
@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_a_method_runs_or_is_refused_as_the_catalogue_says(name, method, tmp_path, shows):
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.build(), case.arguments(*case.grids[0])
    use = catalogue.use_of(method, families.family_of(model))["use"]
    dense = run(model, inputs)
    config = SMALL[method] if method != "paro" else paro_for(model, inputs, tmp_path / "calibration.safetensors")
    if use == "no" and method != "radial":
        with pytest.raises(UnsupportedError, match="the method needs"):
            fastdiff.apply(model, config)
        return
    shows(model, f"method {method}")
    fastdiff.apply(model, config)
    sparse = run(model, inputs)
    assert sparse.isfinite().all()
    # So few tokens are one block of a calibration, or two; and radial keeps every token of a picture.
    if method != "paro":
        assert torch.allclose(sparse, dense, atol=1e-4) == (use == "no")
    fastdiff.remove(model)
    assert torch.equal(run(model, inputs), dense)


def paro_for(model, inputs, path):
    """A calibration of a model that has seen one forward."""
    fastdiff.apply(model, SMALL["neighborhood"])
    run(model, inputs)
    (places,) = find(model).seen.values()
    layers = [
        paro_plans.calibration(places[layer.name].layout.grid, heads=layer.heads, names=[layer.name]).layers[0]
        for layer in find(model).layers
    ]
    fastdiff.remove(model)
    Calibration(1, tuple(layers), Fingerprint.of(model), {"density": 1.0}).save(path)
    return fastdiff.ParoConfig(str(path))


@pytest.mark.parametrize("name", CASES)
def test_the_summary_tells_what_ran_in_each_layer(name):
    case = CASES[name]
    model, inputs = case.build(), case.arguments(*case.grids[0])
    fastdiff.apply(model, SMALL["neighborhood"])
    run(model, inputs)
    (found,) = fastdiff.summary(model).models
    layers = find(model).layers
    assert [layer.name for layer in found.layers] == list(locate.self_attention(model, families.family_of(model)))
    assert [layer.density for layer in found.layers] == [
        layer.plan.density() if layer.active else 1 for layer in layers
    ]
    assert [layer.heads * layer.head_dim for layer in found.layers] == [
        layer.heads * layer.head_dim for layer in layers
    ]
    assert found.grid == "x".join(map(str, case.grids[0]))
    assert 0 < found.attention_share < 1
    assert fastdiff.summary(model, grid=found.grid).models == (found,), "a forecast for what has run"


@pytest.mark.parametrize("name", CASES)
def test_which_families_span_the_frames(name):
    case = CASES[name]
    model = case.build()
    family = families.family_of(model)
    whole = family.layout(model.config, case.arguments(*max(case.grids)))
    layouts = [family.at(model.config, whole, module) for module in locate.self_attention(model, family)]
    assert family.frames == (name in VIDEO_CASES and max(layout.grid.frames for layout in layouts) > 1)


@pytest.mark.parametrize("name", [name for name in CASES if "," not in name])
def test_a_pickled_model_and_a_processor_object_do_the_same(name):
    torch.manual_seed(0)
    case = CASES[name]
    model, inputs = case.build(), case.arguments(*case.grids[0])
    narrow = fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32)
    fastdiff.apply(model, narrow)
    sparse = run(model, inputs)
    assert torch.equal(run(pickle.loads(pickle.dumps(model)), inputs), sparse)
    fastdiff.remove(model)
    if hasattr(model, "set_attn_processor"):
        model.set_attn_processor(fastdiff.NeighborhoodAttnProcessor(narrow))
        assert torch.equal(run(model, inputs), sparse)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((21, 90, 160), "21x45x80"), ((1, 4, 6), "1x2x3"), ((3, 7, 11), "3x3x5")],
)
def test_wan_grid(size, grid):
    model = tiny_wan(layers=1)
    latents = torch.empty(1, 4, *size, device="meta")
    layout = families.family_of(model).layout(model.config, {"hidden_states": latents})
    assert layout.grid == Grid.parse(grid)
    assert layout.query_tokens == layout.grid.tokens


@pytest.mark.parametrize("inputs", [{}, {"hidden_states": torch.zeros(1, 5, 4)}], ids=["missing", "packed"])
def test_inputs_without_a_video_are_refused(inputs):
    model = tiny_wan(layers=1)
    with pytest.raises(InvalidInputError, match="hidden_states is"):
        families.family_of(model).layout(model.config, inputs)


def test_forecasts():
    flux = families.FAMILIES["FluxTransformer2DModel"]
    assert [span.tokens for span in flux.forecast(Grid(1, 4, 4)).query] == [512, 16]
    model = tiny_flux()
    ran = flux.layout(model.config, flux_inputs(text=3, reference=(2, 2)))
    assert [span.tokens for span in flux.forecast(Grid(1, 4, 4), ran).query] == [3, 16, 4]


def test_only_self_attention_in_order():
    model = tiny_wan(layers=12)
    found = locate.self_attention(model, families.family_of(model))
    assert list(found) == [f"blocks.{index}.attn1" for index in range(12)]


def test_derived_classes_are_found():
    class MyWan(type(tiny_wan(layers=1))):
        pass

    model = tiny_wan(layers=1)
    model.__class__ = MyWan
    assert families.family_of(model).name == "wan"


def test_unknown_models_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedError, match=r"Linear is not described.*layout=lambda inputs: .*denoiser"):
        families.family_of(torch.nn.Linear(1, 1))


def test_wrapped_models_are_refused_with_what_to_give():
    model = tiny_wan(layers=1)
    with pytest.raises(UnsupportedError, match=r"DataParallel wraps the model; give \.module of it"):
        fastdiff.apply(torch.nn.DataParallel(model), fastdiff.RadialConfig())
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["to_q"]))
    with pytest.raises(UnsupportedError, match=r"PeftModel wraps the model; give \.get_base_model\(\) of it"):
        fastdiff.apply(adapted, fastdiff.RadialConfig())
    fastdiff.apply(adapted.get_base_model(), fastdiff.RadialConfig())


def test_a_family_whose_modules_are_missing_is_refused():
    model = tiny_wan(layers=1)
    del model.blocks[0]
    with pytest.raises(UnsupportedError, match="has no module named like"):
        locate.self_attention(model, families.family_of(model))


def test_pipelines_models_and_compiled_models():
    class Pipe:
        transformer, transformer_2, scheduler = tiny_wan(layers=1), tiny_wan(layers=1), None

    assert list(locate.transformers(Pipe())) == ["transformer", "transformer_2"]
    model = tiny_wan(layers=1)
    assert locate.transformers(torch.compile(model))["model"] is model
    with pytest.raises(InvalidInputError, match="object holds no model as transformer or transformer_2"):
        locate.transformers(object())
