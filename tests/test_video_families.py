"""What single video families do that the tests of all families do not see."""

import math

import diffusers
import pytest
import tiny_video_models as tiny
import tiny_video_text_models as joint
import torch
from family_cases_video import wan_inputs

import fastdiff
from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_patches import families

torch.set_num_threads(1)

needs_ltx2 = pytest.mark.skipif(
    not hasattr(diffusers, "LTX2VideoTransformer3DModel"), reason="this diffusers has no LTX-2"
)


def run(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def test_skyreels_block_by_block_in_time_is_refused():
    model = tiny.wan_relative("SkyReelsV2Transformer3DModel", num_frame_per_block=2)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32))
    with pytest.raises(UnsupportedError, match=r"num_frame_per_block is 2.*causal_block_size=1"):
        run(model, wan_inputs(4, 3, 5))
    fastdiff.remove(model)
    assert run(model, wan_inputs(4, 3, 5)).shape == (1, 4, 4, 6, 10)


class TestHunyuanVideo15:
    def test_padding_behind_the_text_is_left_out_of_the_plan(self):
        model = joint.tiny_hunyuan_video15()
        family = families.family_of(model)

        def spans(**changed):
            layout = family.layout(model.config, joint.hunyuan_video15_inputs(3, 4, 5, text=200, batch=2) | changed)
            return [(span.kind, span.tokens) for span in layout.query]

        # 5 and 6 tokens of text, 2 glyphs, 4 of an image.
        assert spans() == [("grid", 60), ("text", 64), ("pad", 146)]
        assert spans(encoder_attention_mask=torch.ones(2, 200)) == [("grid", 60), ("text", 210)]
        assert spans(image_embeds=torch.zeros(2, 4, 8), encoder_attention_mask=torch.ones(2, 200)) == [
            ("grid", 60),
            ("text", 210),
        ]

    def test_no_mask_of_tokens_by_tokens_is_built(self, monkeypatch):
        """Also where a layer stays dense."""
        model, inputs = joint.tiny_hunyuan_video15(), joint.hunyuan_video15_inputs(3, 4, 5, text=80, batch=2)
        dense = run(model, inputs)
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, None, None), block_size=32), dense_layers=[0])
        largest = []
        repeat = torch.Tensor.repeat
        monkeypatch.setattr(
            torch.Tensor,
            "repeat",
            lambda self, *sizes: largest.append(self.numel() * math.prod(sizes)) or repeat(self, *sizes),
        )
        torch.testing.assert_close(run(model, inputs), dense, atol=5e-6, rtol=1e-4)
        tokens = 60 + 90
        assert max(largest, default=0) < tokens**2
        fastdiff.remove(model)
        run(model, inputs)
        assert max(largest) >= tokens**2, "the stock processor builds it"
        assert type(model.transformer_blocks[0].attn.processor).__module__.startswith("diffusers")

    def test_a_processor_that_a_user_has_set_stays(self):
        model = joint.tiny_hunyuan_video15()

        class Own(type(model.transformer_blocks[0].attn.processor)):
            pass

        own = model.transformer_blocks[0].attn.processor = Own()
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, None, None), block_size=32), dense_layers=[0])
        assert isinstance(model.transformer_blocks[0].attn.processor, Own)
        fastdiff.remove(model)
        assert model.transformer_blocks[0].attn.processor is own


class TestLTX:
    def spans(self, model=None, **inputs):
        model = model or tiny.tiny_ltx()
        return [str(span.grid or span.tokens) for span in families.family_of(model).layout(model.config, inputs).query]

    def test_clips_stand_in_front_of_the_video(self):
        inputs = tiny.ltx_inputs(4, 3, 5, clip=2)
        assert self.spans(**inputs) == ["30", "4x3x5"]
        clips = [tiny.video_coordinates(frames, 3, 5, start=start) for frames, start in ((2, 9), (1, 50), (4, 0))]
        coordinates = torch.cat(clips, dim=1)[None]
        assert self.spans(hidden_states=torch.zeros(1, 105, 4), video_coords=coordinates) == ["45", "4x3x5"]

    def test_or_behind_it(self):
        clips = [tiny.video_coordinates(4, 1, 5), tiny.video_coordinates(2, 1, 5)]
        coordinates = torch.cat(clips, dim=1)[None]
        assert self.spans(hidden_states=torch.zeros(1, 30, 4), video_coords=coordinates) == ["4x1x5", "10"]

    def test_sizes_need_no_coordinates(self):
        sizes = {"num_frames": 2, "height": 3, "width": 5}
        coordinates = torch.full((1, 3, 30), torch.nan)
        assert self.spans(hidden_states=torch.zeros(1, 30, 4), video_coords=coordinates, **sizes) == ["2x3x5"]

    @pytest.mark.parametrize(
        ("inputs", "match"),
        [
            ({"hidden_states": torch.zeros(1, 4, 2, 3, 5)}, "takes packed latents"),
            ({}, "num_frames, height and width are missing and so are video_coords"),
            ({"num_frames": 2, "height": 3, "width": 4}, "has 30 tokens, and its sizes or coordinates tell 24"),
            ({"video_coords": tiny.video_coordinates(2, 3, 4)[None]}, "has 30 tokens, .* tell 24"),
            ({"video_coords": tiny.video_coordinates(2, 3, 5).flip(1)[None]}, "are no frames of equal size"),
            ({"video_coords": tiny.video_coordinates(2, 3, 5)[None, :, :-1]}, "are no frames of equal size"),
        ],
        ids=["unpacked", "no sizes", "sizes", "coordinates", "order", "torn"],
    )
    def test_what_says_no_grid_is_refused(self, inputs, match):
        with pytest.raises(InvalidInputError, match=match):
            self.spans(**{"hidden_states": torch.zeros(1, 30, 4)} | inputs)

    @needs_ltx2
    def test_ltx2_takes_its_sizes(self):
        with pytest.raises(InvalidInputError, match="num_frames, height or width is missing"):
            self.spans(tiny.tiny_ltx2(), hidden_states=torch.zeros(1, 30, 4), num_frames=2)

    @needs_ltx2
    def test_a_mask_of_the_video_is_refused(self):
        """Those of LTX-2's in-context LoRA differ by query."""
        model, inputs = tiny.tiny_ltx2(), tiny.ltx2_inputs(2, 3, 5, keyframes=1)
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32))
        with pytest.raises(UnsupportedError, match="the attention mask is torch.float32"):
            run(model, inputs | {"video_self_attention_mask": torch.ones(1, 45, 45)})


def test_kandinsky_that_is_sparse_already_is_refused():
    model, inputs = tiny.tiny_kandinsky5(), tiny.kandinsky5_inputs(2, 3, 5)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32))
    with pytest.raises(UnsupportedError, match="is sparse already"):
        model(**inputs, sparse_params={"P": 0.9})


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (joint.tiny_cogvideox, r"hidden_states is of shape \(1, 4\); .*\[batch, frames, channels, height, width\]"),
        (tiny.tiny_kandinsky5, r"hidden_states is of shape \(1, 4\); .*\[batch, frames, height, width, channels\]"),
        (joint.tiny_hunyuan_video, r"hidden_states is of shape \(1, 4\); .*\[batch, channels, frames, height, width\]"),
    ],
)
def test_latents_that_are_no_video_are_refused(build, match):
    model = build()
    with pytest.raises(InvalidInputError, match=match):
        families.family_of(model).layout(model.config, {"hidden_states": torch.zeros(1, 4)})


def test_text_that_is_missing_is_refused():
    model = joint.tiny_cogvideox()
    with pytest.raises(InvalidInputError, match="encoder_hidden_states is missing; the text stands in the same"):
        families.family_of(model).layout(model.config, {"hidden_states": torch.zeros(1, 3, 4, 6, 10)})


def test_mochi_compiled():
    """The number of its text tokens is not known when it is traced."""
    torch.manual_seed(0)
    model, inputs = joint.tiny_mochi(), joint.mochi_inputs(2, 5, 4)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((1, 2, 2), block_size=32))
    eager = run(model, inputs)
    model.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, inputs), eager)


def test_mochi_compiled_block_by_block(caplog):
    """Not in full graphs: what stands between two breaks is compiled by itself, dense and sparse."""
    torch.manual_seed(0)
    model, inputs = joint.tiny_mochi(), joint.mochi_inputs(2, 5, 4)
    dense = run(model, inputs)
    for block in model.transformer_blocks:
        block.compile(backend="eager")
    assert torch.equal(run(model, inputs), dense)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((1, 2, 2), block_size=32))
    sparse = run(model, inputs)
    assert torch._dynamo.utils.counters["graph_break"]
    torch._dynamo.reset()
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(run(model, inputs), sparse)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    fastdiff.remove(model)
    assert torch.equal(run(model, inputs), dense)
    assert "stayed dense" not in caplog.text


@pytest.mark.parametrize("compiled", [False, True])
def test_mochi_with_a_layout_that_is_too_short_is_refused(compiled):
    model = joint.tiny_mochi()
    layout = fastdiff.TokenLayout.self_attention(Grid(2, 5, 4))
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((1, 2, 2), block_size=32), layout=lambda inputs: layout)
    if compiled:
        model.compile(fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError if compiled else InvalidInputError, match="assertion" if compiled else "has 40;"):
        run(model, joint.mochi_inputs(2, 5, 4))


def test_hunyuan_video15_compiled_block_by_block():
    torch.manual_seed(0)
    model, inputs = joint.tiny_hunyuan_video15(), joint.hunyuan_video15_inputs(2, 5, 4, text=80)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((1, 2, 2), block_size=32))
    eager = run(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(run(model, inputs), eager)
