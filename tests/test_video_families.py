"""What single video families do that the tests of all families do not see."""

import math

import pytest
import tiny_video_models as tiny
import torch
from family_cases_video import wan_inputs

import fastdiff
from fastdiff_kernels import UnsupportedError
from fastdiff_patches import families

torch.set_num_threads(1)


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
        model = tiny.tiny_hunyuan_video15()
        family = families.family_of(model)

        def spans(**changed):
            layout = family.layout(model.config, tiny.hunyuan_video15_inputs(3, 4, 5, text=200, batch=2) | changed)
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
        model, inputs = tiny.tiny_hunyuan_video15(), tiny.hunyuan_video15_inputs(3, 4, 5, text=80, batch=2)
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
        model = tiny.tiny_hunyuan_video15()

        class Own(type(model.transformer_blocks[0].attn.processor)):
            pass

        own = model.transformer_blocks[0].attn.processor = Own()
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, None, None), block_size=32), dense_layers=[0])
        assert isinstance(model.transformer_blocks[0].attn.processor, Own)
        fastdiff.remove(model)
        assert model.transformer_blocks[0].attn.processor is own
