"""What single families on plain latents, UNets among them, do that the tests of all families do not see."""

import diffusers
import pytest
import tiny_latent_models as latent
import tiny_packed_models as packed
import torch
from fake_planner import FakePlanner, Watching, put_on
from family_case import has, run, spans, sparse_equals_dense, values
from tiny_picture_models import tiny_unet, unet_inputs

import fastdiff
from fastdiff_kernels import Grid, InvalidInputError, UnsupportedError
from fastdiff_patches import families, locate
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")


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


class TestSD3:
    def test_the_second_attention_of_dual_layers_sees_the_picture_alone(self):
        model = latent.tiny_sd3(dual_attention_layers=(0,))
        family = families.family_of(model)
        whole = family.layout(model.config, latent.latent_inputs(5, 7))
        lengths = {
            name: family.at(model.config, whole, name).query_tokens for name in locate.self_attention(model, family)
        }
        assert lengths == {
            "transformer_blocks.0.attn": 40,
            "transformer_blocks.0.attn2": 35,
            "transformer_blocks.1.attn": 40,
        }

    def test_a_processor_that_modules_share_comes_back_shared(self):
        model = latent.tiny_sd3(dual_attention_layers=(0,))
        block = model.transformer_blocks[0]
        shared = block.attn.processor
        assert block.attn2.processor is shared
        fastdiff.apply(model, fastdiff.NeighborhoodConfig((None, 2, 2)))
        assert block.attn.processor is not block.attn2.processor
        fastdiff.remove(model)
        assert block.attn.processor is block.attn2.processor is shared


class TestZImage:
    def test_padding_is_seen_by_all_and_refiners_stay_dense(self):
        model = latent.tiny_z_image()
        assert spans(model, latent.z_image_inputs(5, 7, texts=(5, 40))) == [("grid", 35), ("text", 29 + 64)]
        assert list(locate.self_attention(model, families.family_of(model))) == [
            "layers.0.attention",
            "layers.1.attention",
        ]

    def test_prompts_of_different_lengths_in_a_batch(self):
        torch.manual_seed(0)
        sparse_equals_dense(latent.tiny_z_image(), latent.z_image_inputs(5, 7, texts=(5, 40)))

    def test_a_batch_has_one_table_of_rope_only_where_prompts_are_alike(self):
        model = latent.tiny_z_image()
        put_on(model, FakePlanner(needs=frozenset({"rotary"})))
        with pytest.raises(UnsupportedError, match="prompts of different lengths give each sample"):
            run(model, latent.z_image_inputs(5, 7, texts=(5, 40)))

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
            spans(latent.tiny_z_image(), latent.z_image_inputs(5, 7) | {"x": images})

    def test_the_seed_comes_from_the_first_picture(self):
        planner = FakePlanner(needs=frozenset({"seed"}))
        put_on(tiny_model := latent.tiny_z_image(), planner)
        run(tiny_model, latent.z_image_inputs(5, 7))
        assert planner.extras[0].inputs["seed"] == planner.extras[1].inputs["seed"] > 0


class TestLumina2:
    def inputs(self, *lengths):
        mask = torch.stack([torch.arange(5) < length for length in lengths]).long()
        inputs = latent.latent_inputs(5, 7, encoder_attention_mask=mask)
        return inputs | {name: inputs[name].repeat(len(lengths), *[1] * (inputs[name].ndim - 1)) for name in BATCHED}

    def test_a_batch_of_equal_lengths(self):
        torch.manual_seed(0)
        model = latent.tiny_lumina2()
        assert spans(model, self.inputs(3, 3)) == [("text", 3), ("grid", 35)]
        sparse_equals_dense(model, self.inputs(3, 3))

    def test_different_lengths_in_a_batch_are_refused(self):
        with pytest.raises(UnsupportedError, match="prompts of 3, 5 tokens are in one batch"):
            spans(latent.tiny_lumina2(), self.inputs(5, 3))

    def test_no_mask_is_refused(self):
        with pytest.raises(InvalidInputError, match="encoder_attention_mask is missing"):
            spans(latent.tiny_lumina2(), self.inputs(3) | {"encoder_attention_mask": None})

    def test_keys_are_repeated_for_all_heads(self):
        planner = put_on(model := latent.tiny_lumina2(), Watching())
        run(model, self.inputs(3))
        assert planner.extras[0].inputs["query"].shape == (1, 38, 4, 12)
        assert [layer.heads for layer in find(model).layers] == [4, 4]


@has("GlmImageTransformer2DModel")
def test_glm_image_with_kept_keys_of_reference_images_is_refused():
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    caches = GlmImageKVCache(num_layers=2)
    inputs = latent.glm_image_inputs(5, 7) | {"kv_caches": caches}
    assert spans(latent.tiny_glm_image(), inputs) == [("text", 5), ("grid", 35)]
    caches.set_mode("read")
    with pytest.raises(UnsupportedError, match="kv_caches hold keys of reference images"):
        spans(latent.tiny_glm_image(), inputs)


def test_hidream_pads_what_is_no_square():
    model = latent.tiny_hidream()
    assert spans(model, latent.hidream_inputs(5, 7)) == [("grid", 35), ("reference", 65), ("text", 11)]
    assert spans(model, latent.hidream_inputs(6, 6)) == [("grid", 36), ("text", 11)]


@pytest.mark.parametrize(
    ("build", "inputs", "name"),
    [
        (latent.tiny_z_image, latent.z_image_inputs, "cap_feats"),
        (latent.tiny_hidream, latent.hidream_inputs, "encoder_hidden_states_llama3"),
        (latent.tiny_hidream, latent.hidream_inputs, "encoder_hidden_states_t5"),
        (latent.tiny_sd3, latent.latent_inputs, "encoder_hidden_states"),
    ],
)
def test_a_forward_without_text_is_refused(build, inputs, name):
    with pytest.raises(InvalidInputError, match=f"{name} is missing; the text"):
        spans(build(), inputs(5, 7) | {name: None})


def test_aura_flow_has_registers_before_the_text():
    assert spans(latent.tiny_aura_flow(), latent.latent_inputs(5, 7)) == [("text", 13), ("grid", 35)]


class TestHunyuanImage:
    def test_the_refiner_takes_frames(self):
        model = latent.tiny_hunyuan_image(patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6))
        inputs = latent.hunyuan_image_inputs(5, 7) | {"hidden_states": packed.noise(1, 4, 2, 5, 7)}
        assert families.family_of(model).layout(model.config, inputs).grid == Grid(2, 5, 7)
        sparse_equals_dense(model, inputs)

    def test_one_text_or_two(self):
        model, inputs = latent.tiny_hunyuan_image(), latent.hunyuan_image_inputs(5, 7)
        assert spans(model, inputs) == [("grid", 35), ("text", 8)]
        assert spans(model, inputs | {"encoder_hidden_states_2": None}) == [("grid", 35), ("text", 5)]


@pytest.mark.parametrize("build", [latent.tiny_sd3, latent.tiny_pixart, latent.tiny_lumina2, latent.tiny_hidream])
@pytest.mark.parametrize("latents", [None, torch.zeros(1, 35, 16)], ids=["missing", "packed"])
def test_inputs_without_latents_are_refused(build, latents):
    model = build()
    with pytest.raises(InvalidInputError, match=r"hidden_states is .*latents \[batch, channels, height, width\]"):
        families.family_of(model).layout(model.config, {"hidden_states": latents})


def test_sdxl_has_no_attention_on_the_first_level_and_two_blocks_on_the_last():
    model = latent.tiny_sdxl()
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
