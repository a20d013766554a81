"""diffusers' own door on UNets and Flux, and for every method: dicts, single objects, and what they refuse."""

import pytest
import torch
from tiny_picture_models import flux_inputs, picture, tiny_flux, tiny_sd_pipeline, tiny_unet, unet_inputs

import fastdiff
from fastdiff.methods import METHODS
from fastdiff_kernels import InvalidInputError
from fastdiff_patches.attachment import find

torch.set_num_threads(1)

WIDE = fastdiff.RadialConfig(block_size=32)
WINDOW = fastdiff.NeighborhoodConfig((3, 3), block_size=32)


class TestUNet:
    @pytest.fixture
    def pipe(self):
        return tiny_sd_pipeline()

    def applied(self, pipe, **options) -> torch.Tensor:
        found = picture(fastdiff.apply(pipe, WINDOW, **options))
        fastdiff.remove(pipe)
        return found

    def test_dict(self, pipe):
        dense, expected = picture(pipe), self.applied(pipe, dense_steps=1, dense_layers=[0])
        originals = dict(pipe.unet.attn_processors)
        ours = fastdiff.processors(pipe, WINDOW, dense_steps=1, dense_layers=[0])
        changed = {name for name in ours if ours[name] is not originals[name]}
        assert len(changed) == 7
        assert all(name.endswith("attn1.processor") for name in changed)
        pipe.unet.set_attn_processor(ours)
        assert torch.equal(picture(pipe), expected)
        fastdiff.remove(pipe)
        assert torch.equal(picture(pipe), dense)
        assert dict(pipe.unet.attn_processors) == originals

    def test_one_object(self, pipe):
        dense, expected = picture(pipe), self.applied(pipe)
        pipe.unet.set_attn_processor(fastdiff.NeighborhoodAttnProcessor(window=(3, 3), block_size=32))
        assert "marked" in str(fastdiff.summary(pipe))
        assert torch.equal(picture(pipe), expected)
        assert fastdiff.summary(pipe).models[0].component == "unet"
        fastdiff.remove(pipe)
        assert torch.equal(picture(pipe), dense)


def plain_config(method):
    """A config of any method that is the same in all steps, None where it takes a file."""
    settings = {"neighborhood": {"window": (3, 3)}, "clear": {"radius": 3}, "agent": {"agents": 4, "steps": (0, 1)}}
    settings["rules"] = {"rules": [fastdiff.Rule(WINDOW, layers="-1"), fastdiff.Rule(fastdiff.ClearConfig(3))]}
    return None if method == "paro" else METHODS[method](**settings.get(method, {}))


@pytest.mark.parametrize("method", METHODS)
class TestEveryMethod:
    def test_its_processor_has_its_name(self, method):
        kind = getattr(fastdiff, f"{method.capitalize()}AttnProcessor")
        assert kind.method == method
        other = WIDE if method != "radial" else WINDOW
        with pytest.raises(InvalidInputError, match=f"give a {METHODS[method].__name__}"):
            kind(other)
        with pytest.raises(InvalidInputError, match=f"nonsense.*see {METHODS[method].__name__}"):
            kind(nonsense=1)

    @pytest.mark.parametrize(
        ("build", "inputs"), [(tiny_unet, unet_inputs), (tiny_flux, flux_inputs)], ids=["unet", "flux"]
    )
    def test_it_equals_apply(self, method, build, inputs):
        config = plain_config(method)
        if config is None:
            pytest.skip("its config needs a calibration file of the model")
        model, arguments = build(), inputs(8, 8)
        with torch.no_grad():
            expected = fastdiff.apply(model, config)(**arguments)[0]
            fastdiff.remove(model)
            model.set_attn_processor(getattr(fastdiff, f"{method.capitalize()}AttnProcessor")(config))
            assert torch.equal(model(**arguments)[0], expected)


class TestStepsNeedAPipeline:
    """A config whose plans change with the step, on what knows no step."""

    CONFIG = fastdiff.AgentConfig(agents=4, steps=(0.0, 0.5))

    def test_it_is_refused(self):
        model = tiny_unet()
        for call in (fastdiff.apply, fastdiff.processors):
            with pytest.raises(InvalidInputError, match="changes with the denoising step .* has no scheduler to tell"):
                call(model, self.CONFIG)
        with pytest.raises(InvalidInputError, match="a processor object knows no scheduler"):
            fastdiff.AgentAttnProcessor(self.CONFIG)
        assert find(model) is None

    def test_with_a_pipeline_it_is_taken(self):
        pipe = tiny_sd_pipeline()
        fastdiff.apply(pipe, self.CONFIG)
        pipe.unet.set_attn_processor(fastdiff.processors(pipe, self.CONFIG))
        assert picture(pipe).isfinite().all()
