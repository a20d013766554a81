"""Gradients of checkpointed calls where the model runs again before the backward pass."""

import pytest
import torch
from tiny_models import model_inputs, tiny_wan
from torch.utils.checkpoint import CheckpointError

import fastdiff
from fastdiff import AgentConfig, NeighborhoodConfig, RadialConfig
from fastdiff_kernels import InvalidInputError

CONFIGS = {
    "radial": RadialConfig(decay_factor=0.2, near_width=0.5),
    "neighborhood": NeighborhoodConfig(window=(3, 5, 5)),
    "agent": AgentConfig(agents=16, steps=(0.0, 1.0)),
}


def gradient(config, checkpointing, between):
    torch.manual_seed(0)
    model = fastdiff.apply(tiny_wan().train(), config)
    if checkpointing:
        model.enable_gradient_checkpointing()
    loss = model(**model_inputs(5, 12, 20))[0].square().mean()
    between(model)
    loss.backward()
    return model.blocks[0].attn1.to_q.weight.grad


@pytest.mark.parametrize("name", CONFIGS)
def test_another_size_before_backward_is_refused(name):
    def portrait(model):
        with torch.no_grad():
            model(**model_inputs(5, 20, 12))

    # Agents of another grid are of other shapes, which torch sees first.
    by_torch = (CheckpointError, "different metadata")
    error, text = by_torch if name == "agent" else (InvalidInputError, "call backward before the model runs again")
    gradient(CONFIGS[name], False, portrait)
    with pytest.raises(error, match=text):
        gradient(CONFIGS[name], True, portrait)


def test_another_config_before_backward_is_refused():
    def other(model):
        fastdiff.apply(model, RadialConfig(decay_factor=0.9))
        model(**model_inputs(5, 12, 20))

    with pytest.raises(InvalidInputError, match="switch checkpointing off"):
        gradient(CONFIGS["radial"], True, other)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_same_size_again_is_exact(config):
    def again(model):
        with torch.no_grad():
            model(**model_inputs(5, 12, 20))

    assert torch.equal(gradient(config, True, again), gradient(config, False, again))
