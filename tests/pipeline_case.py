"""Pipe: how the tests of pipelines run one; `test_video_pipelines.py` and `test_image_pipelines.py` hold the cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tiny_models import tiny_scheduler

import fastdiff
from fastdiff.commands import sizes
from fastdiff_kernels import Grid
from fastdiff_patches.attachment import find

TEXT = ("text_encoder", "tokenizer")
WHOLE = fastdiff.NeighborhoodConfig((None, None, None), block_size=32)
NARROW = fastdiff.NeighborhoodConfig((None, 2, 2), block_size=32)


@dataclass(frozen=True)
class Pipe:
    """A pipeline class, its model, and what the call takes besides the number of steps.

    Attributes:
        model: () -> the model.
        call: () -> the arguments of the call.
        grid: In tokens.
        absent: Components that are None.
        scheduler: () -> the scheduler.
        parts: () -> further components by name.
        settle: pipeline -> changes what stands in the way of tiny models or of embeddings.
        component: What the pipeline calls its model.
        exact: Whether layers that stay dense run the model's own processor.
    """

    model: Callable[[], torch.nn.Module]
    call: Callable[[], dict[str, Any]]
    grid: tuple[int, int, int] = (3, 3, 5)
    absent: tuple[str, ...] = ("vae", *TEXT)
    scheduler: Callable[[], Any] = lambda: tiny_scheduler("euler")
    parts: Callable[[], dict[str, Any]] = dict
    settle: Callable[[Any], None] = lambda pipe: None
    component: str = "transformer"
    exact: bool = True


def present(pipes: dict[str, Pipe]) -> list[str]:
    """Those that the installed diffusers has; a case is named "class" or "class, what is special"."""
    return [name for name in pipes if hasattr(diffusers, name.split(",")[0])]


def build(name: str, case: Pipe) -> tuple[Any, Callable[[], torch.Tensor]]:
    """The pipeline, and () -> the latents that it draws in 3 steps."""
    torch.manual_seed(0)
    parts = dict.fromkeys(case.absent) | {case.component: case.model()} | case.parts()
    pipe = getattr(diffusers, name.split(",")[0])(scheduler=case.scheduler(), **parts)
    case.settle(pipe)
    pipe.set_progress_bar_config(disable=True)

    def draw():
        settings = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        found = pipe(**settings, **case.call())[0]
        return torch.stack(found) if isinstance(found, list) else found

    return pipe, draw


def dense_sparse_and_dense_again(name: str, case: Pipe, shows: Callable[[torch.nn.Module, str], None]) -> None:
    """The grid is as forecast, density 1 and dense steps change nothing, few tokens do, and `remove` is exact."""
    pipe, draw = build(name, case)
    model, asked, grid = getattr(pipe, case.component), case.call(), Grid(*case.grid)
    frames = 1 if grid.frames == 1 else asked.get(sizes.frames_argument(pipe))
    # Segments of an animation have a frame more than they show, the reference.
    if frames is not None:
        assert sizes.grid_of(pipe, frames, asked["height"], asked["width"]) == grid
    shows(model, f"pipeline {type(pipe).__name__}")
    dense = draw()
    fastdiff.apply(pipe, WHOLE)
    torch.testing.assert_close(draw(), dense, atol=1e-4, rtol=1e-3)
    fastdiff.apply(pipe, NARROW, dense_steps=3)
    close = {"atol": 0, "rtol": 0} if case.exact else {"atol": 1e-4, "rtol": 1e-3}
    torch.testing.assert_close(draw(), dense, **close)
    fastdiff.apply(pipe, NARROW, dense_steps=1)
    assert not torch.allclose(draw(), dense, atol=1e-5)
    attached = find(model)
    assert {layout.grid for layout in attached.seen} == {grid}
    assert attached.steps_seen == 3
    fastdiff.remove(pipe)
    assert torch.equal(draw(), dense)
