"""Every family row against its model: which modules, which grid, in which order the tokens stand."""

import pytest
import torch
from tiny_models import model_inputs, tiny_wan

from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_patches import families, locate

torch.set_num_threads(1)

# A new family adds its line: class name -> (builds a model, its forward arguments for a size of latents).
MODELS = {
    "WanTransformer3DModel": (lambda: tiny_wan(layers=2), lambda **size: model_inputs(**size)),
    "WanTransformer3DModel, image to video": (
        lambda: tiny_wan(layers=1, in_channels=12, image_dim=8, added_kv_proj_dim=32),
        lambda **size: model_inputs(
            channels=12,
            encoder_hidden_states=torch.zeros(1, 512, 32),
            encoder_hidden_states_image=torch.zeros(1, 4, 8),
            **size,
        ),
    ),
}


def test_every_row_has_a_model_here():
    assert {name.split(",")[0] for name in MODELS} == set(families.FAMILIES)


def values_without_attention(model, modules, inputs) -> list[torch.Tensor]:
    """The values of each self-attention call when no token sees another, `[tokens, channels]` each."""
    seen = []
    originals = {module: module.processor for module in model.modules() if hasattr(module, "processor")}

    class Zero:
        def __call__(self, attn, hidden_states, *args, **kwargs):
            if attn in modules:
                seen.append(attn.to_v(hidden_states)[0])
            return torch.zeros_like(hidden_states)

    try:
        for module in originals:
            module.processor = Zero()
        with torch.no_grad():
            model(**inputs)
    finally:
        for module, processor in originals.items():
            module.processor = processor
    return seen


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 3, 9), (2, 5, 4), (2, 0, 1)], ids=str)
def test_the_layout_by_perturbation(name, place):
    """One latent pixel is moved: exactly the token that the grid names must change, in every attention call."""
    torch.manual_seed(0)
    build, arguments = MODELS[name]
    model, inputs = build(), arguments(frames=3, height=6, width=10)
    family = families.family_of(model)
    layout = family.layout(model.config, inputs)
    modules = list(locate.self_attention(model, family).values())
    before = values_without_attention(model, modules, inputs)
    moved = inputs | {family.latents: inputs[family.latents].clone()}
    moved[family.latents][:, :, place[0], place[1], place[2]] += 1
    after = values_without_attention(model, modules, moved)

    patch = model.config.patch_size
    t, y, x = (where // size for where, size in zip(place, patch, strict=True))
    grid = layout.grid
    token = (t * grid.height + y) * grid.width + x
    assert len(before) == len(modules)
    for old, new in zip(before, after, strict=True):
        assert len(old) == layout.key_tokens
        assert (old - new).abs().amax(1).nonzero().flatten().tolist() == [token]


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
    with pytest.raises(UnsupportedError, match=r"Linear is not described; supported are .*Wan.*FAMILIES\[class name\]"):
        families.family_of(torch.nn.Linear(1, 1))


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
