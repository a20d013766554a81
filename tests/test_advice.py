"""What a user is told once: little gain at a size, and methods that want fine-tuned weights."""

import copy
import logging
import pickle

import diffusers
import pytest
import torch
from tiny_models import call_arguments, forward, tiny_wan, tiny_wan_pipeline
from tiny_picture_models import flux_inputs, picture, tiny_flux, tiny_sd_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff import advice
from fastdiff_kernels import Grid, TokenLayout
from fastdiff_patches.attachment import Attachment
from fastdiff_patches.families import family_of
from fastdiff_patches.steps import StepReader

torch.set_num_threads(1)

NARROW = fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32)


@pytest.fixture
def told(caplog):
    """The lines that were logged since the last look."""
    caplog.set_level(logging.WARNING, logger="fastdiff")

    def look():
        lines = [record.getMessage() for record in caplog.records if record.name == "fastdiff"]
        caplog.clear()
        return lines

    return look


def work(model, grid):
    family = family_of(model)
    attached = Attachment(model, NARROW.planner(), fastdiff.DenseSchedule(), StepReader([]), family=family)
    return advice.dense_work(model, attached, TokenLayout.self_attention(Grid.parse(grid)))


def counted(model, **inputs):
    """FLOPs that torch counts in one forward: of scores, and of the rest."""
    # Only in this kernel scores are products that torch counts on a CPU, and the only batches of products.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs)
    counts = counter.get_flop_counts()["Global"]
    return counts[torch.ops.aten.bmm], counter.get_total_flops() - counts[torch.ops.aten.bmm]


def test_the_share_of_a_transformer():
    """Wan 2.1 14B at 81 frames of 1280x720: a forward of 40 layers of 5120 channels, 13824 in the feed-forward."""
    with torch.device("meta"):
        scores, rest = work(diffusers.WanTransformer3DModel(num_layers=2), "21x45x80")
    share, gain = advice.expected_gain(scores, rest, dict.fromkeys(scores, 0.2))
    assert share == pytest.approx(75600 / (75600 + 2 * 5120 + 13824))
    assert gain == pytest.approx(1 / (1 - share + 0.2 * share))


def test_flops_are_those_that_torch_counts():
    """But for cross-attention, of which Wan has much, and the embedding of the text."""
    model = tiny_wan(heads=4, head_dim=32)
    scores, rest = work(model, "3x20x20")
    all_scores, all_rest = counted(
        model,
        hidden_states=torch.zeros(1, 4, 3, 40, 40),
        timestep=torch.tensor([1]),
        encoder_hidden_states=torch.zeros(1, 8, 32),
    )
    assert 0.9 * all_scores < sum(scores.values()) < all_scores
    assert 0.6 * all_rest < rest < all_rest


def test_flops_of_a_unet_are_those_that_torch_counts():
    unet = tiny_sd_pipeline().unet
    scores, rest = work(unet, "1x32x32")
    all_scores, all_rest = counted(
        unet, sample=torch.zeros(1, 4, 32, 32), timestep=1, encoder_hidden_states=torch.zeros(1, 8, 32)
    )
    assert 0.9 * all_scores < sum(scores.values()) < all_scores
    assert 0.8 * all_rest < rest < all_rest


def test_little_gain_is_told_once_and_with_the_numbers(told):
    pipe = fastdiff.apply(tiny_wan_pipeline(), NARROW, dense_steps=1)
    assert told() == [], "the grid is not known yet"
    pipe(**call_arguments(steps=1))
    (line,) = told()
    assert "stays dense in every step" in line
    pipe(**call_arguments())
    (line,) = told()
    assert line.startswith("WanTransformer3DModel on 3x3x5 tokens: self-attention is about 32 % of the FLOPs")
    assert "so neighborhood at density" in line
    assert "x as fast" in line
    pipe(**call_arguments())
    assert told() == []


def test_a_size_that_pays_goes_without_a_word(told):
    model = fastdiff.apply(tiny_wan(), fastdiff.NeighborhoodConfig((None, 4, 4), block_size=32))
    forward(model, frames=5, height=24, width=40)
    assert told() == []


def test_dense_layers_gain_nothing(told):
    model = fastdiff.apply(tiny_wan(), fastdiff.NeighborhoodConfig((None, 4, 4), block_size=32), dense_layers=1)
    forward(model, frames=5, height=24, width=40)
    scores, rest = work(model, "5x12x20")
    first, second = scores
    assert advice.expected_gain(scores, rest, {second: 0.0})[1] == pytest.approx(
        (scores[first] + scores[second] + rest) / (scores[first] + rest)
    )


def test_a_unet_is_told_of_by_all_its_levels(told):
    pipe = fastdiff.apply(tiny_sd_pipeline(), fastdiff.NeighborhoodConfig((None, None), block_size=32))
    picture(pipe)
    (line,) = told()
    assert line.startswith("UNet2DConditionModel on 1x20x28 tokens")
    assert "may make it slower" in line


def test_copies_tell_too_and_removal_ends_it(told):
    model = fastdiff.apply(tiny_wan(), NARROW)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        forward(other, frames=1, height=6, width=10)
        assert len(told()) == 1
    fastdiff.remove(model)
    forward(model, frames=1, height=6, width=10)
    assert told() == []


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (fastdiff.AgentConfig(4, steps=(0, 1)), "agent in FluxTransformer2DModel: without fine-tuning"),
        (fastdiff.ClearConfig(2), "clear in FluxTransformer2DModel: radius 2 is small"),
        (fastdiff.ClearConfig((9, 16, 3.5)), "clear in FluxTransformer2DModel: radius 3.5 is small"),
        (fastdiff.ClearConfig(16), None),
        (NARROW, None),
    ],
    ids=str,
)
def test_methods_that_want_training_say_so_once(told, config, line):
    model = fastdiff.apply(tiny_flux(), config)
    assert [text[: len(line)] for text in told()] == [line] if line else told() == []
    fastdiff.apply(model, config)
    assert not [text for text in told() if "is small" in text or "without fine-tuning" in text]
    with torch.no_grad():
        model(**flux_inputs(12, 12))
    assert not [text for text in told() if "fine-tun" in text]


def test_rules_say_it_for_each_method(told):
    rules = [
        fastdiff.Rule("dense", layers="0"),
        fastdiff.Rule(fastdiff.ClearConfig(2), layers="1"),
        fastdiff.Rule(fastdiff.AgentConfig(4, steps=(0, 1))),
    ]
    model = fastdiff.apply(tiny_flux(layers=3), fastdiff.RulesConfig(rules))
    assert [line.split(" in ")[0] for line in told()] == ["clear", "agent"]
    with torch.no_grad():
        model(**flux_inputs())
    (line,) = told()
    assert "so rules at density" in line


@pytest.mark.parametrize("config", [fastdiff.AgentConfig(4), fastdiff.ClearConfig(2)], ids=str)
def test_unets_do_without_training(told, config):
    fastdiff.apply(tiny_sd_pipeline(), config)
    assert told() == []


def test_every_door_tells(told):
    model = tiny_flux()
    model.set_attn_processor(fastdiff.ClearAttnProcessor(radius=2))
    with torch.no_grad():
        model(**flux_inputs())
    clear, gain = told()
    assert "radius 2 is small" in clear
    assert "on 1x5x7 tokens" in gain
    fastdiff.processors(tiny_flux(), fastdiff.ClearConfig(2))
    assert len(told()) == 1
