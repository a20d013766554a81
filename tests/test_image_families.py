"""What single families on packed tokens do that the tests of all families do not see."""

import pytest
import tiny_packed_models as packed
import torch
from fake_planner import Watching, put_on
from family_case import has, run, spans, sparse_equals_dense
from tiny_picture_models import flux_inputs, image_ids, tiny_flux

import fastdiff
from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_patches import families
from fastdiff_patches.attachment import find
from fastdiff_patches.image_ids import image_spans

torch.set_num_threads(1)


class TestFlux:
    def layout(self, **changed):
        model = tiny_flux()
        return families.family_of(model).layout(model.config, flux_inputs() | changed)

    def test_text_comes_first_and_references_last(self):
        layout = self.layout(**flux_inputs(5, 7, text=3, reference=(2, 4)))
        assert [(span.kind, span.tokens) for span in layout.query] == [("text", 3), ("grid", 35), ("reference", 8)]
        assert layout.grid == Grid(1, 5, 7)
        assert layout.query == layout.key

    def test_two_references_wherever_they_stand(self):
        ids = torch.cat([image_ids(0, 3, 3), image_ids(1, 2, 2), image_ids(2, 2, 3) + torch.tensor([0, 5, 0])])
        layout = self.layout(img_ids=ids, hidden_states=torch.zeros(1, len(ids), 16))
        assert [(span.kind, span.tokens) for span in layout.query[2:]] == [("reference", 4), ("reference", 6)]

    def test_a_batch_of_ids(self):
        assert self.layout(img_ids=image_ids(0, 5, 7).expand(2, -1, -1)).grid == Grid(1, 5, 7)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int64], ids=str)
    def test_ids_that_half_precision_rounds(self, dtype):
        ids = image_ids(0, 2, 300).to(dtype)
        assert self.layout(img_ids=ids, hidden_states=torch.zeros(1, 600, 16)).grid == Grid(1, 2, 300)

    @pytest.mark.parametrize(
        ("changed", "match"),
        [
            ({"hidden_states": torch.zeros(1, 4, 10, 14)}, "takes packed latents"),
            ({"hidden_states": torch.zeros(1, 34, 16)}, r"img_ids is of shape \(35, 3\).*positions of the 34 image"),
            ({"img_ids": None}, "img_ids is missing"),
            ({"encoder_hidden_states": None}, "encoder_hidden_states is missing"),
            ({"img_ids": image_ids(0, 5, 7).flip(0)}, "do not say a grid"),
            ({"img_ids": image_ids(0, 5, 7) * 2}, "do not say a grid"),
            ({"img_ids": image_ids(1, 5, 7)}, "do not say a grid"),
            ({"img_ids": torch.cat([image_ids(0, 5, 7)[:32], image_ids(1, 1, 3)])}, "do not say a grid"),
            ({"img_ids": torch.cat([image_ids(i, 1, w) for i, w in ((0, 7), (1, 21), (0, 7))])}, "do not say a grid"),
        ],
        ids=["unpacked", "length", "no ids", "no text", "order", "scaled", "no picture", "torn", "picture twice"],
    )
    def test_what_says_no_grid_is_refused(self, changed, match):
        with pytest.raises(InvalidInputError, match=match):
            self.layout(**changed)

    def test_ids_are_read_once(self, monkeypatch):
        ids = image_ids(0, 5, 7)
        reads = []
        monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(self) or self)
        for _ in range(3):
            assert image_spans(ids)[0].grid == Grid(1, 5, 7)
        assert len(reads) == 1
        ids[:] = image_ids(0, 7, 5)
        assert image_spans(ids)[0].grid == Grid(1, 7, 5)
        with torch.inference_mode():
            other = image_ids(0, 1, 4)
            assert image_spans(other)[0].grid == image_spans(other)[0].grid == Grid(1, 1, 4)
        assert len(reads) == 3

    def test_a_reference_is_seen_by_all(self):
        torch.manual_seed(0)
        model, inputs = tiny_flux(), flux_inputs(8, 8, reference=(4, 4))
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((3, 3), block_size=32))
        before = run(model, inputs)
        inputs["hidden_states"][:, -1] += 1
        assert ((run(model, inputs) - before).abs().amax(-1) > 0).all()


class TestFlux2:
    def test_references(self):
        inputs = packed.packed_inputs(5, 7, columns=4, references=((2, 3), (3, 3)))
        assert spans(packed.tiny_flux2(), inputs) == [("text", 3), ("grid", 35), ("reference", 6), ("reference", 9)]

    def test_keys_kept_beside_the_sequence_are_refused(self):
        inputs = packed.packed_inputs(5, 7, columns=4, kv_cache_mode="extract")
        with pytest.raises(UnsupportedError, match="kv_cache_mode is 'extract'.*Flux2KleinPipeline"):
            spans(packed.tiny_flux2(), inputs)

    def test_references_in_front_are_refused(self):
        inputs = packed.packed_inputs(5, 7, columns=4, picture=10)
        with pytest.raises(InvalidInputError, match="picture must come first, with 0 in the first"):
            spans(packed.tiny_flux2(), inputs)


class TestChroma:
    def inputs(self, dtype):
        mask = torch.cat([torch.tensor([[1, 1, 0, 0]]), torch.ones(1, 35)], 1).to(dtype)
        return packed.packed_inputs(5, 7, text=4, attention_mask=mask)

    def test_hidden_text_stays_hidden(self):
        torch.manual_seed(0)
        model = packed.tiny_chroma()
        sparse_equals_dense(model, self.inputs(torch.bool))
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 3, 3), block_size=32))
        inputs = self.inputs(torch.bool)
        before = run(model, inputs)
        inputs["encoder_hidden_states"][:, 2:] += 1
        assert torch.equal(run(model, inputs), before)

    def test_a_mask_that_is_added_to_the_scores_is_refused(self):
        model = packed.tiny_chroma()
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 3, 3), block_size=32))
        with pytest.raises(UnsupportedError, match=r"attention_mask is torch.float32.*mask.bool\(\)"):
            run(model, self.inputs(torch.float32))


@has("Krea2Transformer2DModel")
class TestKrea2:
    def test_text_comes_first_in_its_positions(self):
        inputs = packed.krea2_inputs(5, 7)
        assert spans(packed.tiny_krea2(), inputs) == [("text", 5), ("grid", 35)]
        with pytest.raises(InvalidInputError, match=r"position_ids is of shape \(39, 3\).*5 text and 35 image"):
            spans(packed.tiny_krea2(), inputs | {"position_ids": inputs["position_ids"][1:]})
        with pytest.raises(InvalidInputError, match="positions of 35 image tokens do not say a grid"):
            spans(packed.tiny_krea2(), inputs | {"position_ids": inputs["position_ids"] * 2})

    def test_heads_share_keys(self):
        planner = put_on(model := packed.tiny_krea2(), Watching())
        run(model, packed.krea2_inputs(5, 7))
        assert planner.extras[0].inputs["query"].shape == (1, 40, 4, 16)
        assert [(layer.heads, layer.head_dim) for layer in find(model).layers] == [(4, 16)] * 2


@has("LongCatImageTransformer2DModel")
def test_longcat_counts_the_text_as_image_0():
    model = packed.tiny_longcat()
    assert spans(model, packed.packed_inputs(5, 7, picture=1, start=512))[1] == ("grid", 35)
    with pytest.raises(InvalidInputError, match="with 1 in the first column"):
        spans(model, packed.packed_inputs(5, 7))


class TestQwen:
    def test_one_shape_for_each_sample(self):
        inputs = packed.qwen_inputs((1, 5, 7), batch=2) | {"img_shapes": [(1, 5, 7)] * 2}
        assert spans(packed.tiny_qwen(), inputs) == [("text", 5), ("grid", 35)]

    @pytest.mark.parametrize(
        ("shapes", "match"),
        [
            (None, "img_shapes is None"),
            ([[(1, 5, 7)], [(1, 7, 5)]], "the same list of"),
            ([[(1, 5, 6)]], r"img_shapes is \[\(1, 5, 6\)\] for 35 image tokens"),
        ],
        ids=["missing", "unequal", "too few"],
    )
    def test_shapes_that_say_no_grid_are_refused(self, shapes, match):
        with pytest.raises(InvalidInputError, match=match):
            spans(packed.tiny_qwen(), packed.qwen_inputs((1, 5, 7)) | {"img_shapes": shapes})

    @has("QwenImageLayeredPipeline")
    def test_layers_are_frames_and_the_last_image_a_reference(self):
        model = packed.tiny_qwen(use_layer3d_rope=True)
        inputs = packed.qwen_inputs((1, 3, 4), (1, 3, 4), (1, 2, 5))
        assert families.family_of(model).layout(model.config, inputs).grid == Grid(2, 3, 4)
        assert spans(model, inputs) == [("text", 5), ("grid", 24), ("reference", 10)]
        with pytest.raises(InvalidInputError, match="layers must have one size"):
            spans(model, packed.qwen_inputs((1, 3, 4), (1, 4, 3), (1, 2, 5)))
