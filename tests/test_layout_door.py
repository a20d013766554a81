"""Models that no family describes: a user tells their layout and, if it takes that, their modules."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from tiny_models import forward, tiny_wan
from torch import nn

import fastdiff
from fastdiff_kernels import InvalidInputError, UnsupportedError
from fastdiff_patches.attachment import find

torch.set_num_threads(1)


class Painter(nn.Module):
    """Pixels are tokens behind the text; two towers of text, cross-attention, and no config."""

    def __init__(self):
        super().__init__()
        self.text = Attention(32, heads=2, dim_head=16)
        self.joint = nn.ModuleList(Attention(32, heads=2, dim_head=16) for _ in range(2))
        self.cross = Attention(32, cross_attention_dim=32, heads=2, dim_head=16)
        self.other = Attention(32, heads=2, dim_head=16)

    def forward(self, picture, prompt):
        height, width = picture.shape[-2:]
        prompt = prompt + self.text(prompt)
        tokens = torch.cat([prompt, picture.flatten(2).transpose(1, 2)], dim=1)
        for layer in self.joint:
            tokens = tokens + layer(tokens)
        tokens = tokens + self.cross(tokens, prompt)
        tokens = tokens + self.other(tokens, prompt)
        return tokens[:, prompt.shape[1] :].transpose(1, 2).unflatten(-1, (height, width))


def layout(inputs):
    grid = fastdiff.Grid(1, *inputs["picture"].shape[-2:])
    return fastdiff.TokenLayout.self_attention(grid, text_before=inputs["prompt"].shape[1])


@pytest.fixture
def painter():
    torch.manual_seed(0)
    return Painter().eval()


def inputs(height=6, width=7, text=5):
    generator = torch.Generator().manual_seed(0)
    return {
        "picture": torch.randn(1, 32, height, width, generator=generator),
        "prompt": torch.randn(1, text, 32, generator=generator),
    }


def run(model, **size):
    with torch.no_grad():
        return model(**inputs(**size))


NARROW = fastdiff.NeighborhoodConfig((3, 3), block_size=32)
NARROW_VIDEO = fastdiff.NeighborhoodConfig((3, 3, 3), block_size=32)
WHOLE = fastdiff.NeighborhoodConfig((None, None), block_size=32)


def test_without_a_layout_the_error_says_how(painter):
    with pytest.raises(UnsupportedError, match=r"Painter is not described.*layout=lambda inputs: .*`fastdiff models`"):
        fastdiff.apply(painter, NARROW)


@pytest.mark.parametrize("modules", [None, r"joint\.\d+"])
def test_the_modules_are_found_or_named(painter, modules):
    dense = run(painter)
    processors = {name: module.processor for name, module in painter.named_modules() if hasattr(module, "processor")}
    fastdiff.apply(painter, WHOLE, layout=layout, modules=modules)
    torch.testing.assert_close(run(painter), dense)
    fastdiff.apply(painter, NARROW, layout=layout, modules=modules)
    sparse = run(painter)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    summary = fastdiff.summary(painter).models[0]
    assert [layer.name for layer in summary.layers] == ["joint.0", "joint.1"]
    assert summary.family == "Painter"
    assert summary.grid == "1x6x7"
    assert summary.mean_density == pytest.approx(summary.layers[0].density)
    assert run(painter, height=5, width=9).shape == (1, 32, 5, 9)
    assert fastdiff.summary(painter).models[0].grid == "1x5x9"
    assert torch.equal(run(copy.deepcopy(painter)), sparse)
    fastdiff.remove(painter)
    assert all(painter.get_submodule(name).processor is processor for name, processor in processors.items())
    assert torch.equal(run(painter), dense)


def test_found_and_named_modules_give_the_same(painter):
    fastdiff.apply(painter, NARROW, layout=layout)
    found = run(painter)
    fastdiff.apply(painter, NARROW, layout=layout, modules=r"joint\.\d+")
    assert torch.equal(run(painter), found)


def test_compiled(painter):
    fastdiff.apply(painter, NARROW, layout=layout)
    eager = run(painter)
    torch.testing.assert_close(run(torch.compile(painter, fullgraph=True, backend="eager")), eager)


def test_a_wrong_length_is_refused_in_compiled_code_too(painter):
    fastdiff.apply(painter, NARROW, layout=lambda inputs: fastdiff.TokenLayout.self_attention(fastdiff.Grid(1, 5, 7)))
    compiled = torch.compile(painter, fullgraph=True, backend="eager")
    run(compiled)
    with pytest.raises(InvalidInputError, match=r"tells 35 tokens and no self-attention call had so many"):
        run(compiled)


def test_summary_says_when_no_call_has_the_length(painter):
    dense = run(painter)
    fastdiff.apply(painter, NARROW, layout=lambda inputs: fastdiff.TokenLayout.self_attention(fastdiff.Grid(1, 6, 7)))
    assert torch.equal(run(painter), dense)
    told = str(fastdiff.summary(painter))
    assert "none: layout= tells 42 tokens and no self-attention call had so many; queries had 5, 47." in told


def test_the_device_is_that_of_the_first_tensor_of_numbers(painter):
    fastdiff.apply(painter, NARROW, layout=layout)
    family, picture = find(painter).family, torch.zeros(1, 32, 5, 7)
    assert family.visual({"ids": torch.zeros(3, dtype=torch.int64), "residuals": [], "picture": picture}) is picture
    whole = {"picture": picture.long(), "prompt": torch.zeros(1, 3, 32, dtype=torch.int64)}
    with pytest.raises(InvalidInputError, match="no tensor of numbers as any argument"):
        painter(**whole)


def test_no_warning_for_modules_that_are_not_meant(painter, caplog):
    fastdiff.apply(painter, NARROW, layout=layout)
    run(painter)
    assert not caplog.records


def test_a_processor_that_cannot_be_adopted_stays(painter):
    painter.cross.set_processor(AttnProcessor())
    fastdiff.apply(painter, NARROW, layout=layout)
    assert "cross" not in [layer.name for layer in find(painter).layers]
    painter.joint[0].set_processor(AttnProcessor())
    with pytest.raises(UnsupportedError, match="AttnProcessor calls neither"):
        fastdiff.apply(painter, NARROW, layout=layout, modules=r"joint\.\d+")


def test_a_layout_of_another_length_is_refused(painter):
    fastdiff.apply(painter, NARROW, layout=lambda inputs: fastdiff.TokenLayout.self_attention(fastdiff.Grid(1, 6, 7)))
    run(painter)
    with pytest.raises(InvalidInputError, match=r"layout= tells 42 tokens and .* queries had 5, 47"):
        run(painter)
    named = r"joint\.\d+"
    wrong = fastdiff.TokenLayout.self_attention(fastdiff.Grid(1, 6, 6))
    fastdiff.apply(painter, NARROW, layout=lambda inputs: wrong, modules=named)
    with pytest.raises(InvalidInputError, match=r"joint.0 was called with 47 tokens and the layout has 36; .*layout="):
        run(painter)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"layout": lambda inputs: (6, 7)}, r"layout= gave \(6, 7\); it must give the TokenLayout"),
        ({"layout": 5}, "layout is 5; give a function"),
        ({"layout": layout, "modules": "joint("}, r"modules is 'joint\(', which is no regular expression"),
        (
            {"layout": layout, "modules": r"blocks\.\d+"},
            "has no module named like .*modules=.* it has text, joint.0, joint.1, cross, other\\.",
        ),
        ({"layout": lambda inputs: inputs["latents"]}, "asks for the argument 'latents'; .* was given picture, prompt"),
    ],
    ids=["no layout", "no function", "no pattern", "no module", "no argument"],
)
def test_refusals(painter, arguments, match):
    with pytest.raises((InvalidInputError, UnsupportedError), match=match):
        run(fastdiff.apply(painter, NARROW, **arguments))


def test_what_an_unknown_model_does_not_supply_is_refused(painter):
    with pytest.raises(UnsupportedError, match="pre_rope_query.*'Painter' does not supply"):
        fastdiff.apply(painter, fastdiff.AgentConfig(agents=4, steps=(0.0, 1.0)), layout=layout)


def test_a_layout_in_the_place_of_a_familys():
    model = tiny_wan(layers=2)
    fastdiff.apply(model, NARROW_VIDEO)
    known = forward(model)
    asked = []

    def told(inputs):
        asked.append(set(inputs))
        frames, height, width = inputs["hidden_states"].shape[2:]
        return fastdiff.TokenLayout.self_attention(fastdiff.Grid(frames, height // 2, width // 2))

    fastdiff.apply(model, NARROW_VIDEO, layout=told)
    assert torch.equal(forward(model), known)
    assert "encoder_hidden_states" in asked[0]
    fastdiff.apply(model, NARROW_VIDEO, modules=r"blocks\.1\.attn1")
    assert [layer.name for layer in find(model).layers] == ["blocks.1.attn1"]
