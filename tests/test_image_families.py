"""What single picture families do that the tests of all families do not see."""

import diffusers
import pytest
import tiny_image_models as tiny
import torch
from fake_planner import FakePlanner, Watching, put_on
from family_case import run, values
from tiny_picture_models import flux_inputs, image_ids, tiny_flux, tiny_unet, unet_inputs

import fastdiff
from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_patches import families, locate
from fastdiff_patches.attachment import find
from fastdiff_patches.image_ids import image_spans

torch.set_num_threads(1)

BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")


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


class TestUNet:
    def test_order_and_levels(self):
        model = tiny_unet()
        family = families.family_of(model)
        whole = family.layout(model.config, unet_inputs(9, 13))
        grids = {name: str(family.at(model.config, whole, name).grid) for name in locate.self_attention(model, family)}
        assert list(grids.values()) == ["1x9x13", "1x5x7", "1x5x7", "1x5x7", "1x9x13", "1x9x13", "1x3x4"]
        assert list(grids)[-1] == "mid_block.attentions.0.transformer_blocks.0.attn1"
        assert all(name.endswith("attn1") for name in grids)

    def test_downsampling_without_padding_in_front(self):
        model = tiny_unet(downsample_padding=0)
        family = families.family_of(model)
        whole = family.layout(model.config, unet_inputs(9, 13))
        for name, found in values(model, unet_inputs(9, 13)).items():
            assert len(found) == family.at(model.config, whole, name).key_tokens

    def test_coarse_levels_stay_dense(self):
        model = tiny_unet()
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((2, 2), block_size=32))
        run(model, unet_inputs(9, 13))
        active = [layer.active for layer in find(model).layers]
        assert active == [True] * 6 + [False]

    def test_layers_that_look_at_text_alone_are_left_out(self):
        model = tiny_unet(only_cross_attention=[True, False, False])
        found = locate.self_attention(model, families.family_of(model))
        assert [name.split(".")[0] for name in found] == ["down_blocks", "up_blocks", "up_blocks", "mid_block"]

    @pytest.mark.parametrize("inputs", [{}, {"sample": torch.zeros(1, 4, 8)}], ids=["missing", "flat"])
    def test_inputs_without_a_picture_are_refused(self, inputs):
        model = tiny_unet()
        with pytest.raises(InvalidInputError, match="sample is"):
            families.family_of(model).layout(model.config, inputs)


def spans(model, inputs):
    """(kind, tokens) of each span of the model's layout."""
    layout = families.family_of(model).layout(model.config, inputs)
    return [(span.kind, span.tokens) for span in layout.query]


def sparse_equals_dense(model, inputs):
    """Under a window of all; density 1."""
    dense = run(model, inputs)
    fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, None, None), block_size=32))
    torch.testing.assert_close(run(model, inputs), dense, atol=5e-6, rtol=1e-4)
    fastdiff.remove(model)
    assert torch.equal(run(model, inputs), dense)


def has(name):
    return pytest.mark.skipif(not hasattr(diffusers, name), reason=f"diffusers has no {name}")


class TestFlux2:
    def test_references(self):
        inputs = tiny.packed_inputs(5, 7, columns=4, references=((2, 3), (3, 3)))
        assert spans(tiny.tiny_flux2(), inputs) == [("text", 3), ("grid", 35), ("reference", 6), ("reference", 9)]

    def test_keys_kept_beside_the_sequence_are_refused(self):
        inputs = tiny.packed_inputs(5, 7, columns=4, kv_cache_mode="extract")
        with pytest.raises(UnsupportedError, match="kv_cache_mode is 'extract'.*Flux2KleinPipeline"):
            spans(tiny.tiny_flux2(), inputs)

    def test_references_in_front_are_refused(self):
        inputs = tiny.packed_inputs(5, 7, columns=4, picture=10)
        with pytest.raises(InvalidInputError, match="picture must come first, with 0 in the first"):
            spans(tiny.tiny_flux2(), inputs)


class TestChroma:
    def inputs(self, dtype):
        mask = torch.cat([torch.tensor([[1, 1, 0, 0]]), torch.ones(1, 35)], 1).to(dtype)
        return tiny.packed_inputs(5, 7, text=4, attention_mask=mask)

    def test_hidden_text_stays_hidden(self):
        torch.manual_seed(0)
        model = tiny.tiny_chroma()
        sparse_equals_dense(model, self.inputs(torch.bool))
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 3, 3), block_size=32))
        inputs = self.inputs(torch.bool)
        before = run(model, inputs)
        inputs["encoder_hidden_states"][:, 2:] += 1
        assert torch.equal(run(model, inputs), before)

    def test_a_mask_that_is_added_to_the_scores_is_refused(self):
        model = tiny.tiny_chroma()
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 3, 3), block_size=32))
        with pytest.raises(UnsupportedError, match=r"attention_mask is torch.float32.*mask.bool\(\)"):
            run(model, self.inputs(torch.float32))


@has("LongCatImageTransformer2DModel")
def test_longcat_counts_the_text_as_image_0():
    model = tiny.tiny_longcat()
    assert spans(model, tiny.packed_inputs(5, 7, picture=1, start=512))[1] == ("grid", 35)
    with pytest.raises(InvalidInputError, match="with 1 in the first column"):
        spans(model, tiny.packed_inputs(5, 7))


class TestQwen:
    def test_prompts_of_different_lengths_in_a_batch(self):
        torch.manual_seed(0)
        inputs = tiny.qwen_inputs((1, 5, 7), batch=2)
        inputs["encoder_hidden_states_mask"] = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
        sparse_equals_dense(tiny.tiny_qwen(), inputs)

    def test_one_shape_for_each_sample(self):
        inputs = tiny.qwen_inputs((1, 5, 7), batch=2) | {"img_shapes": [(1, 5, 7)] * 2}
        assert spans(tiny.tiny_qwen(), inputs) == [("text", 5), ("grid", 35)]

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
            spans(tiny.tiny_qwen(), tiny.qwen_inputs((1, 5, 7)) | {"img_shapes": shapes})

    @has("QwenImageLayeredPipeline")
    def test_layers_are_frames_and_the_last_image_a_reference(self):
        model = tiny.tiny_qwen(use_layer3d_rope=True)
        inputs = tiny.qwen_inputs((1, 3, 4), (1, 3, 4), (1, 2, 5))
        assert families.family_of(model).layout(model.config, inputs).grid == Grid(2, 3, 4)
        assert spans(model, inputs) == [("text", 5), ("grid", 24), ("reference", 10)]
        with pytest.raises(InvalidInputError, match="layers must have one size"):
            spans(model, tiny.qwen_inputs((1, 3, 4), (1, 4, 3), (1, 2, 5)))


class TestSD3:
    def test_the_second_attention_of_dual_layers_sees_the_picture_alone(self):
        model = tiny.tiny_sd3(dual_attention_layers=(0,))
        family = families.family_of(model)
        whole = family.layout(model.config, tiny.latent_inputs(5, 7))
        lengths = {
            name: family.at(model.config, whole, name).query_tokens for name in locate.self_attention(model, family)
        }
        assert lengths == {
            "transformer_blocks.0.attn": 40,
            "transformer_blocks.0.attn2": 35,
            "transformer_blocks.1.attn": 40,
        }

    def test_a_processor_that_modules_share_comes_back_shared(self):
        model = tiny.tiny_sd3(dual_attention_layers=(0,))
        block = model.transformer_blocks[0]
        shared = block.attn.processor
        assert block.attn2.processor is shared
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2)))
        assert block.attn.processor is not block.attn2.processor
        fastdiff.remove(model)
        assert block.attn.processor is block.attn2.processor is shared


class TestZImage:
    def test_padding_is_seen_by_all_and_refiners_stay_dense(self):
        model = tiny.tiny_z_image()
        assert spans(model, tiny.z_image_inputs(5, 7, texts=(5, 40))) == [("grid", 35), ("text", 29 + 64)]
        assert list(locate.self_attention(model, families.family_of(model))) == [
            "layers.0.attention",
            "layers.1.attention",
        ]

    def test_prompts_of_different_lengths_in_a_batch(self):
        torch.manual_seed(0)
        sparse_equals_dense(tiny.tiny_z_image(), tiny.z_image_inputs(5, 7, texts=(5, 40)))

    def test_a_batch_has_one_table_of_rope_only_where_prompts_are_alike(self):
        model = tiny.tiny_z_image()
        put_on(model, FakePlanner(needs=frozenset({"rotary"})))
        with pytest.raises(UnsupportedError, match="prompts of different lengths give each sample"):
            run(model, tiny.z_image_inputs(5, 7, texts=(5, 40)))

    @pytest.mark.parametrize(
        ("images", "match"),
        [
            ([], "x is missing"),
            ([[torch.zeros(4, 1, 2, 2)]], "x is a list of a list.*omni mode"),
            ([torch.zeros(4, 1, 4, 2), torch.zeros(4, 1, 2, 4)], "unequal sizes"),
        ],
        ids=["missing", "omni", "unequal"],
    )
    def test_what_says_no_grid_is_refused(self, images, match):
        with pytest.raises(InvalidInputError, match=match):
            spans(tiny.tiny_z_image(), tiny.z_image_inputs(5, 7) | {"x": images})

    def test_the_seed_comes_from_the_first_picture(self):
        planner = FakePlanner(needs=frozenset({"seed"}))
        put_on(tiny_model := tiny.tiny_z_image(), planner)
        run(tiny_model, tiny.z_image_inputs(5, 7))
        assert planner.extras[0].inputs["seed"] == planner.extras[1].inputs["seed"] > 0


class TestLumina2:
    def inputs(self, *lengths):
        mask = torch.stack([torch.arange(5) < length for length in lengths]).long()
        inputs = tiny.latent_inputs(5, 7, encoder_attention_mask=mask)
        return inputs | {name: inputs[name].repeat(len(lengths), *[1] * (inputs[name].ndim - 1)) for name in BATCHED}

    def test_a_batch_of_equal_lengths(self):
        torch.manual_seed(0)
        model = tiny.tiny_lumina2()
        assert spans(model, self.inputs(3, 3)) == [("text", 3), ("grid", 35)]
        sparse_equals_dense(model, self.inputs(3, 3))

    def test_different_lengths_in_a_batch_are_refused(self):
        with pytest.raises(UnsupportedError, match="prompts of 3, 5 tokens are in one batch"):
            spans(tiny.tiny_lumina2(), self.inputs(5, 3))

    def test_no_mask_is_refused(self):
        with pytest.raises(InvalidInputError, match="encoder_attention_mask is missing"):
            spans(tiny.tiny_lumina2(), self.inputs(3) | {"encoder_attention_mask": None})

    def test_keys_are_repeated_for_all_heads(self):
        planner = put_on(model := tiny.tiny_lumina2(), Watching())
        run(model, self.inputs(3))
        assert planner.extras[0].inputs["query"].shape == (1, 38, 4, 12)
        assert [layer.heads for layer in find(model).layers] == [4, 4]


def test_hidream_pads_what_is_no_square():
    model = tiny.tiny_hidream()
    assert spans(model, tiny.hidream_inputs(5, 7)) == [("grid", 35), ("reference", 65), ("text", 11)]
    assert spans(model, tiny.hidream_inputs(6, 6)) == [("grid", 36), ("text", 11)]


def test_aura_flow_has_registers_before_the_text():
    assert spans(tiny.tiny_aura_flow(), tiny.latent_inputs(5, 7)) == [("text", 13), ("grid", 35)]


class TestHunyuanImage:
    def test_the_refiner_takes_frames(self):
        model = tiny.tiny_hunyuan_image(patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6))
        inputs = tiny.hunyuan_image_inputs(5, 7) | {"hidden_states": tiny.noise(1, 4, 2, 5, 7)}
        assert families.family_of(model).layout(model.config, inputs).grid == Grid(2, 5, 7)
        sparse_equals_dense(model, inputs)

    def test_one_text_or_two(self):
        model, inputs = tiny.tiny_hunyuan_image(), tiny.hunyuan_image_inputs(5, 7)
        assert spans(model, inputs) == [("grid", 35), ("text", 8)]
        assert spans(model, inputs | {"encoder_hidden_states_2": None}) == [("grid", 35), ("text", 5)]


@pytest.mark.parametrize("build", [tiny.tiny_sd3, tiny.tiny_pixart, tiny.tiny_lumina2, tiny.tiny_hidream])
@pytest.mark.parametrize("latents", [None, torch.zeros(1, 35, 16)], ids=["missing", "packed"])
def test_inputs_without_latents_are_refused(build, latents):
    model = build()
    with pytest.raises(InvalidInputError, match=r"hidden_states is .*latents \[batch, channels, height, width\]"):
        families.family_of(model).layout(model.config, {"hidden_states": latents})


def test_sdxl_has_no_attention_on_the_first_level_and_two_blocks_on_the_last():
    model = tiny.tiny_sdxl()
    family = families.family_of(model)
    whole = family.layout(model.config, unet_inputs(16, 12))
    grids = [str(family.at(model.config, whole, name).grid) for name in locate.self_attention(model, family)]
    assert grids == ["1x8x6", "1x4x3", "1x4x3"] + ["1x4x3"] * 4 + ["1x8x6"] * 2 + ["1x4x3"] * 2


def test_linear_attention_is_refused():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
    )
    with pytest.raises(UnsupportedError, match="SanaTransformer2DModel is linear.*Use the model as it is"):
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2)))
