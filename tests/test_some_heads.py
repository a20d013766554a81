"""The plan of some heads is that of the whole plan for these heads."""

import gc
import weakref

import pytest
import torch
from paro_plans import random_masks
from plans import metric_plan, random_bits_plan

from fastdiff.methods.paro import paro_plan
from fastdiff_kernels import Grid, InvalidInputError, TokenLayout, attention, of_heads


def paro(heads=4):
    grid = Grid(3, 7, 11)
    layout = TokenLayout.self_attention(grid, text_before=5)
    return paro_plan(layout, [0, 3, 5, 1][:heads], random_masks(grid, heads))


@pytest.mark.parametrize("plan", [paro(), random_bits_plan(70, 90, 4)[0]], ids=["orders and lists", "bits"])
@pytest.mark.parametrize(("first", "count"), [(0, 2), (2, 2), (1, 3), (3, 1), (0, 4)])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_attention_of_some_heads(plan, first, count, backend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 4, 16) for n in (plan.query_tokens, plan.key_tokens, plan.key_tokens))
    whole = attention(q, k, v, plan, backend=backend)
    heads = slice(first, first + count)
    part = of_heads(plan, first, count)
    found = attention(*(x[:, :, heads] for x in (q, k, v)), part, backend=backend)
    torch.testing.assert_close(found, whole[:, :, heads])
    for head in range(count):
        assert torch.equal(part.draw(head), plan.draw(first + head))


def test_each_part_is_cut_once_and_dropped_with_its_plan():
    plan = paro()
    part = of_heads(plan, 0, 2)
    assert of_heads(plan, 0, 2) is part
    assert of_heads(plan, 2, 2) is not part
    gone = weakref.ref(part)
    del plan, part
    gc.collect()
    assert gone() is None


def test_a_plan_that_all_heads_share_is_itself():
    plan = metric_plan(Grid(2, 5, 7))
    assert of_heads(plan, 3, 2) is plan


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (3, 2), (0, 0), (0, 5)])
def test_heads_that_a_plan_lacks_are_refused(first, count):
    with pytest.raises(InvalidInputError, match="the plan has 4"):
        of_heads(paro(), first, count)
