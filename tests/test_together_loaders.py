"""fastdiff with what diffusers loads into a model: LoRA, IP-adapters, quantised linears; and what it saves."""

import copy
import functools
import logging
import warnings

import diffusers
import pytest
import torch
from tiny_models import compile_as, forward, moved, tiny_wan, tiny_wan_pipeline, video
from tiny_picture_models import (
    flux_inputs,
    picture,
    tiny_flux,
    tiny_flux_pipeline,
    tiny_sd_pipeline,
    tiny_unet,
    unet_inputs,
)

import fastdiff
from fastdiff_kernels import InvalidInputError
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

RADIAL = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=32)
WHOLE = fastdiff.NeighborhoodConfig((None, None, None), block_size=32)
NEAR = fastdiff.NeighborhoodConfig((3, 3), block_size=32)


def lora(model, seed: int) -> dict[str, torch.Tensor]:
    """A state dict of a LoRA as trainers save it."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.endswith(("attn1.to_q", "attn1.to_v", "attn1.to_out.0"))
    }
    found = {}
    for name, module in layers.items():
        found[f"transformer.{name}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
        found[f"transformer.{name}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    return found


@pytest.mark.together("LoRA: load, fuse, unload, hot-swap")
class TestLora:
    @pytest.fixture(autouse=True)
    def needs_peft(self):
        pytest.importorskip("peft")

    @pytest.fixture
    def pipe(self):
        return tiny_wan_pipeline()

    def test_loaded_before_or_after(self, pipe):
        weights = lora(pipe.transformer, 1)
        fastdiff.apply(pipe, RADIAL)
        without = video(pipe)
        pipe.load_lora_weights(dict(weights), adapter_name="one")
        after = video(pipe)
        assert not torch.allclose(after, without, atol=1e-3)
        other = tiny_wan_pipeline()
        other.load_lora_weights(dict(weights), adapter_name="one")
        dense = video(other)
        fastdiff.apply(other, RADIAL)
        assert torch.equal(video(other), after)
        fastdiff.remove(other)
        assert torch.equal(video(other), dense)

    def test_fused_and_unloaded(self, pipe):
        fastdiff.apply(pipe, RADIAL)
        without = video(pipe)
        pipe.load_lora_weights(lora(pipe.transformer, 1))
        active = video(pipe)
        pipe.fuse_lora()
        torch.testing.assert_close(video(pipe), active, atol=1e-4, rtol=1e-3)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        torch.testing.assert_close(video(pipe), without, atol=1e-4, rtol=1e-3)
        assert find(pipe.transformer) is not None

    def test_two_adapters_weighed(self, pipe):
        fastdiff.apply(pipe, RADIAL)
        without = video(pipe)
        for seed, name in enumerate(("one", "two")):
            pipe.load_lora_weights(lora(pipe.transformer, seed), adapter_name=name)
        pipe.set_adapters(["one", "two"], [0.0, 0.0])
        torch.testing.assert_close(video(pipe), without, atol=1e-5, rtol=1e-4)
        pipe.set_adapters(["two"], [1.0])
        assert not torch.allclose(video(pipe), without, atol=1e-3)

    def test_hot_swapped(self, pipe):
        fastdiff.apply(pipe, RADIAL)
        pipe.load_lora_weights(lora(pipe.transformer, 1), adapter_name="one")
        first = video(pipe)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pipe.load_lora_weights(lora(pipe.transformer, 2), adapter_name="one", hotswap=True)
        swapped = video(pipe)
        assert not torch.allclose(swapped, first, atol=1e-3)
        other = fastdiff.apply(tiny_wan_pipeline(), RADIAL)
        other.load_lora_weights(lora(other.transformer, 2), adapter_name="one")
        torch.testing.assert_close(video(other), swapped, atol=1e-5, rtol=1e-4)

    def test_hot_swapped_without_compiling_anew(self):
        def swapped(patched):
            torch._dynamo.reset()
            pipe = tiny_wan_pipeline(layers=3)
            if patched:
                fastdiff.apply(pipe, RADIAL, dense_steps=1)
            pipe.enable_lora_hotswap(target_rank=4)
            pipe.load_lora_weights(lora(pipe.transformer, 1), adapter_name="one")
            compile_as(pipe, "blocks", "eager")
            first = video(pipe)
            with torch._dynamo.config.patch(error_on_recompile=True), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pipe.load_lora_weights(lora(pipe.transformer, 2), adapter_name="one", hotswap=True)
                second = video(pipe)
            assert not torch.allclose(second, first, atol=1e-3)
            return second

        try:
            swapped(patched=False)
        except torch._dynamo.exc.RecompileError:
            pytest.skip("this diffusers or this peft compiles anew without fastdiff too")
        found = swapped(patched=True)
        other = fastdiff.apply(tiny_wan_pipeline(layers=3), RADIAL, dense_steps=1)
        other.load_lora_weights(lora(other.transformer, 2))
        torch.testing.assert_close(found, video(other), atol=1e-4, rtol=1e-3)


def image_projection(width: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "proj.weight": torch.randn(4 * width, 16, generator=generator),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def unet_adapter(unet) -> dict[str, dict[str, torch.Tensor]]:
    """A state dict of an IP-adapter: an image of 16 numbers becomes 4 tokens."""
    generator, found, place = torch.Generator().manual_seed(6), {}, 1
    for name in unet.attn_processors:
        if name.endswith("attn2.processor"):
            for part in ("to_k_ip", "to_v_ip"):
                found[f"{place}.{part}.weight"] = torch.randn(16, 32, generator=generator)
            place += 2
    return {"image_proj": image_projection(32), "ip_adapter": found}


def flux_adapter(model) -> dict[str, dict[str, torch.Tensor]]:
    generator, found = torch.Generator().manual_seed(6), {}
    for place in range(len(model.transformer_blocks)):
        for part in ("to_k_ip", "to_v_ip"):
            found[f"{place}.{part}.weight"] = torch.randn(model.inner_dim, 32, generator=generator)
            found[f"{place}.{part}.bias"] = torch.zeros(model.inner_dim)
    return {"image_proj": image_projection(32), "ip_adapter": found}


@pytest.mark.together("IP-adapters")
class TestImagePrompts:
    @pytest.fixture
    def unet(self):
        torch.manual_seed(0)
        return tiny_unet(levels=2)

    @staticmethod
    def look(unet, seed=7):
        image = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return unet(**unet_inputs(added_cond_kwargs={"image_embeds": [image]}))[0]

    def test_unet_loaded_before_or_after(self, unet, caplog):
        other = copy.deepcopy(unet)
        adapter = unet_adapter(unet)
        other._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
        dense = self.look(other)
        fastdiff.apply(other, NEAR)
        sparse = self.look(other)
        assert not torch.allclose(sparse, dense, atol=1e-3)
        assert not torch.allclose(self.look(other, seed=8), sparse, atol=1e-3)
        fastdiff.apply(unet, NEAR)
        with caplog.at_level(logging.WARNING, logger="fastdiff"):
            # The loader builds the processors of self-attention anew: they are found and stay sparse.
            unet._load_ip_adapter_weights([adapter], low_cpu_mem_usage=False)
            assert torch.equal(self.look(unet), sparse)
        assert "were replaced by others" not in caplog.text
        for model in (unet, other):
            fastdiff.remove(model)
            assert torch.equal(self.look(model), dense)

    def test_unet_in_a_pipeline_and_unloaded(self):
        pipe = fastdiff.apply(tiny_sd_pipeline(levels=2), NEAR)
        without = picture(pipe)
        pipe.unet._load_ip_adapter_weights([unet_adapter(pipe.unet)], low_cpu_mem_usage=False)
        image = torch.cat([torch.zeros(1, 1, 16), torch.ones(1, 1, 16)])
        assert not torch.allclose(picture(pipe, ip_adapter_image_embeds=[image]), without, atol=1e-3)
        pipe.unload_ip_adapter()
        assert torch.equal(picture(pipe), without)

    def test_flux(self, caplog):
        torch.manual_seed(0)
        model = fastdiff.apply(tiny_flux(), NEAR)
        tokens = torch.randn(1, 1, 16, generator=torch.Generator().manual_seed(7))
        inputs = flux_inputs(joint_attention_kwargs={"ip_adapter_image_embeds": [tokens]})

        def look():
            with torch.no_grad():
                return model(**inputs)[0]

        model._load_ip_adapter_weights([flux_adapter(model)], low_cpu_mem_usage=False)
        with caplog.at_level(logging.WARNING, logger="fastdiff"):
            look()
        # The dual blocks have got the adapter's own processors, which is said; the single ones stay sparse.
        assert "1 of the attention processors" in caplog.text
        fastdiff.apply(model, NEAR)
        sparse = look()
        fastdiff.remove(model)
        dense = look()
        assert not torch.allclose(sparse, dense, atol=1e-3)
        fastdiff.apply(model, WHOLE)
        torch.testing.assert_close(look(), dense, atol=5e-6, rtol=1e-4)

    def test_a_processor_object_whose_settings_the_loader_drops_is_refused(self, unet):
        unet.set_attn_processor(fastdiff.RadialAttnProcessor(RADIAL))
        unet._load_ip_adapter_weights([unet_adapter(unet)], low_cpu_mem_usage=False)
        with pytest.raises(InvalidInputError, match="Loading an IP-adapter makes others"):
            self.look(unet)
        fastdiff.apply(unet, NEAR)
        assert self.look(unet).isfinite().all()


def dynamic_int8(model):
    quantization = pytest.importorskip("torch.ao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Not the embeddings, whose dtype Wan looks up in their weights.
        blocks = {name for name, _ in model.named_children() if name.endswith("blocks")}
        return quantization.quantize_dynamic(model, blocks, dtype=torch.qint8)


def torchao_int8(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model


def quanto_int8(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def bitsandbytes_linears(model, make):
    """The linears of the blocks, quantised on their way to a device."""
    for name, linear in [found for found in model.named_modules() if type(found[1]) is torch.nn.Linear]:
        if "blocks." in name:
            quantised = make(linear.in_features, linear.out_features, bias=linear.bias is not None)
            quantised.load_state_dict(linear.state_dict())
            model.set_submodule(name, quantised)
    return model


def bitsandbytes_int8(model):
    # Otherwise weights stay in float16 and are quantised in each call, as for training.
    make = functools.partial(pytest.importorskip("bitsandbytes").nn.Linear8bitLt, has_fp16_weights=False)
    return bitsandbytes_linears(model, make)


def bitsandbytes_nf4(model):
    make = functools.partial(pytest.importorskip("bitsandbytes").nn.Linear4bit, quant_type="nf4")
    return bitsandbytes_linears(model, make)


def quantised(library, quantise, device):
    marks = [pytest.mark.together(f"quantised linears: {library}"), *([pytest.mark.gpu] if device == "cuda" else [])]
    return pytest.param(quantise, device, marks=marks, id=f"{quantise.__name__}-{device}")


@pytest.mark.parametrize(
    ("quantise", "device"),
    [
        quantised("torch", dynamic_int8, "cpu"),
        quantised("torchao", torchao_int8, "cpu"),
        quantised("torchao", torchao_int8, "cuda"),
        quantised("quanto", quanto_int8, "cpu"),
        quantised("quanto", quanto_int8, "cuda"),
        quantised("bitsandbytes", bitsandbytes_int8, "cpu"),
        quantised("bitsandbytes", bitsandbytes_int8, "cuda"),
        quantised("bitsandbytes", bitsandbytes_nf4, "cpu"),
        quantised("bitsandbytes", bitsandbytes_nf4, "cuda"),
    ],
)
class TestQuantised:
    @pytest.mark.parametrize("first", ["quantise", "apply"])
    def test_both_orders(self, quantise, device, first):
        torch.manual_seed(0)
        model = tiny_wan()
        stock = forward(model)
        if first == "apply":
            model = quantise(fastdiff.apply(model, RADIAL)).to(device)
            sparse = forward(model, device)
            dense = forward(fastdiff.remove(model), device)
        else:
            model = quantise(model).to(device)
            dense = forward(model, device)
            sparse = forward(fastdiff.apply(model, RADIAL), device)
            assert torch.equal(forward(fastdiff.remove(model), device), dense)
        assert not torch.allclose(dense.cpu(), stock, atol=1e-4)
        assert not torch.allclose(sparse, dense, atol=1e-3)
        fastdiff.apply(model, WHOLE)
        # Where activations are rounded to 8 bits, the last bits of attention's sum may show.
        torch.testing.assert_close(forward(model, device), dense, atol=2e-2, rtol=1e-2)

    def test_learned_parameters_take_a_dtype_to_compute_in(self, quantise, device):
        torch.manual_seed(0)
        model = quantise(tiny_flux()).to(device)
        fastdiff.apply(model, fastdiff.ClearConfig(radius=2, pool_factor=2, block_size=32))
        with torch.no_grad():
            assert model(**moved(flux_inputs(height=6, width=8), device))[0].isfinite().all()
        assert find(model).layers[0].parameters.weight.dtype == torch.float32


@pytest.mark.together("save_pretrained of a patched model")
class TestSaved:
    def test_a_saved_pipeline_is_a_stock_one(self, tmp_path):
        pipe = tiny_wan_pipeline()
        dense = video(pipe)
        fastdiff.apply(pipe, RADIAL)
        sparse = video(pipe)
        pipe.save_pretrained(tmp_path)
        again = type(pipe).from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        torch.testing.assert_close(video(again), dense, atol=1e-4, rtol=1e-3)
        fastdiff.apply(again, RADIAL)
        torch.testing.assert_close(video(again), sparse, atol=1e-4, rtol=1e-3)

    def test_with_learned_parameters(self, tmp_path):
        pooled = fastdiff.ClearConfig(radius=2, pool_factor=2, block_size=32)
        model = fastdiff.apply(tiny_flux_pipeline().transformer, pooled)
        inputs = flux_inputs(height=6, width=8)
        with torch.no_grad():
            find(model).layers[0].parameters.weight += 1
            sparse = model(**inputs)[0]
            model.save_pretrained(tmp_path)
            again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path)
            dense = again(**inputs)[0]
            torch.testing.assert_close(dense, fastdiff.remove(model)(**inputs)[0], atol=1e-6, rtol=1e-5)
            fastdiff.apply(again, pooled)
            assert not torch.allclose(again(**inputs)[0], sparse, atol=1e-4), "what was learned is not loaded by itself"
