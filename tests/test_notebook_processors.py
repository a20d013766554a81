"""Processors of modules that change while they run: notebooks, and files that are loaded again."""

import sys
import types

import pytest
import torch
from tiny_picture_models import tiny_unet, unet_inputs

import fastdiff
from fastdiff import ClearConfig

PROCESSOR = """
import torch.nn.functional as F

SCALE = 1.0

class {name}:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        pairs = ((attn.to_q, hidden_states), (attn.to_k, states), (attn.to_v, states))
        q, k, v = (part(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for part, x in pairs)
        return {wrap}(attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)) * SCALE)
"""


@pytest.fixture
def notebook(monkeypatch):
    module = types.ModuleType("their_notebook")
    monkeypatch.setitem(sys.modules, "their_notebook", module)

    def run(text):
        exec(text, vars(module))
        return module

    yield run
    monkeypatch.undo()


def sparse_and_dense(processor):
    """A config that computes every score, so that only the processor's own code can make a difference."""
    torch.manual_seed(0)
    model, inputs = tiny_unet(levels=2), unet_inputs(16, 16)
    model.set_attn_processor(processor)
    with torch.no_grad():
        fastdiff.apply(model, ClearConfig(radius=99.0))
        sparse = model(**inputs)[0]
        return model, inputs, sparse, fastdiff.remove(model)(**inputs)[0]


def test_a_global_changes_later(notebook):
    module = notebook(PROCESSOR.format(name="Mine", wrap=""))
    model, inputs, sparse, dense = sparse_and_dense(module.Mine())
    torch.testing.assert_close(sparse, dense)
    fastdiff.apply(model, ClearConfig(radius=99.0))
    module.SCALE = 0.5
    with torch.no_grad():
        sparse, other = model(**inputs)[0], fastdiff.remove(model)(**inputs)[0]
    torch.testing.assert_close(sparse, other)
    assert not torch.allclose(other, dense)


def test_a_later_cell_has_a_class_and_a_helper(notebook):
    module = notebook(PROCESSOR.format(name="Mine", wrap=""))
    sparse_and_dense(module.Mine())
    notebook("def helper(x):\n    return x * 2\n" + PROCESSOR.format(name="Other", wrap="helper"))
    _, _, sparse, dense = sparse_and_dense(module.Other())
    torch.testing.assert_close(sparse, dense)
