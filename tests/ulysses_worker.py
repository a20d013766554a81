"""What each of two processes runs for test_ulysses.py: models whole, then shared, and how far apart the two are.

With gloo both work on the CPU, with NCCL each on a GPU of its own.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import diffusers
import torch
import torch.distributed as dist
from fake_planner import FakePlanner, put_on
from paro_plans import random_masks
from tiny_models import model_inputs, moved, tiny_wan, tiny_wan_pipeline, video
from tiny_packed_models import packed_inputs, qwen_inputs, tiny_flux2, tiny_qwen
from tiny_picture_models import flux_inputs, tiny_flux

import fastdiff
from fastdiff.methods.paro import paro_plan
from fastdiff.methods.planner import Planner

# Of this process; `work` sets it.
DEVICE = "cpu"
RADIAL = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=32)
NEAR = fastdiff.NeighborhoodConfig((3, 3), block_size=32)
POOLED = fastdiff.ClearConfig(radius=2, pool_factor=2, block_size=32)
RULES = fastdiff.RulesConfig([fastdiff.Rule(POOLED, layers="0"), fastdiff.Rule(NEAR)])
LARGE = fastdiff.RadialConfig(decay_factor=0.0, near_width=0.0, sink=False, block_size=128)
FLUX = {"height": 6, "width": 8, "text": 4}


def flux2_inputs(*size):
    inputs = packed_inputs(*size, text=4, columns=4, guidance=torch.ones(1))
    # As its pipeline gives them.
    return inputs | {name: inputs[name][None] for name in ("img_ids", "txt_ids")}


# The model, its arguments, the method, and what the context parallelism is told besides its degree.
CASES = {
    "wan": (tiny_wan, model_inputs(frames=4, height=12, width=20), RADIAL, {}),
    "wan, batch of 2": (tiny_wan, model_inputs(frames=4, height=12, width=20, batch=2), RADIAL, {}),
    # Blocks, heads and a dtype for which Hopper GPUs have a kernel of their own.
    "wan, half precision": (
        lambda: tiny_wan(head_dim=64).half(),
        moved(model_inputs(frames=4, height=24, width=40), "cpu", torch.float16),
        LARGE,
        {},
    ),
    "flux": (tiny_flux, flux_inputs(**FLUX), NEAR, {}),
    "flux, pooled keys": (tiny_flux, flux_inputs(**FLUX), POOLED, {}),
    "flux, a reference image": (tiny_flux, flux_inputs(**FLUX, reference=(2, 3)), NEAR, {}),
    "flux, rules": (tiny_flux, flux_inputs(**FLUX), RULES, {}),
    "qwen": (tiny_qwen, qwen_inputs((1, 6, 8), text=6), NEAR, {}),
    "flux, its layout given": (tiny_flux, flux_inputs(**FLUX), "layout", {}),
    "flux2": (tiny_flux2, flux2_inputs(6, 8), NEAR, {}),
    "qwen, masked text": (tiny_qwen, qwen_inputs((1, 6, 8), text=6, valid=4), NEAR, {}),
    # gloo gathers only what all processes have equally much of, so the picture's tokens stay even.
    "flux, odd text": (tiny_flux, flux_inputs(**FLUX | {"text": 3}), NEAR, {"ulysses_anything": True}),
    "three heads": (lambda: tiny_flux(heads=3), flux_inputs(**FLUX), NEAR, {}),
    "a plan for each head": (lambda: tiny_flux(heads=4), flux_inputs(height=12, width=16, text=4), "each head", {}),
    "needs": (tiny_flux, flux_inputs(**FLUX), "needs", {}),
    "ring": (tiny_wan, model_inputs(frames=4, height=12, width=20), RADIAL, {"ring_degree": 2}),
}


# Older releases lack some options and models.
_OPTIONS = {field.name for field in dataclasses.fields(diffusers.ContextParallelConfig)}
CASES = {name: case for name, case in CASES.items() if case[-1].keys() <= _OPTIONS}
if not hasattr(diffusers, "Flux2Transformer2DModel"):
    del CASES["flux2"]


class EachHead(Planner):
    """Other orders of tokens and other blocks for each head, as PARO's file says them."""

    def plan(self, layout, *, heads, **more):
        masks = random_masks(layout.grid, heads)
        return self._cache.get(("each head", layout), lambda: paro_plan(layout, [0, 3, 5, 1], masks))


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs)[0]


def put(model, method):
    if method == "each head":
        put_on(model, EachHead(RADIAL))
    elif method == "needs":
        put_on(model, FakePlanner(needs=frozenset({"pre_rope_query"})))
    elif method == "layout":
        layout = fastdiff.TokenLayout.self_attention(fastdiff.Grid(1, 6, 8), text_before=4)
        fastdiff.apply(model, NEAR, layout=lambda inputs: layout)
    else:
        fastdiff.apply(model, method)


def share(model, more):
    degree = {} if "ring_degree" in more else {"ulysses_degree": 2}
    model.enable_parallelism(config=diffusers.ContextParallelConfig(**degree, **more))


def compare(build, inputs, method, more) -> dict:
    torch.manual_seed(0)
    model = build().to(DEVICE)
    inputs = moved(inputs, DEVICE, model.dtype)
    dense = run(model, inputs)
    put(model, method)
    whole = run(model, inputs)
    share(model, more)
    try:
        shared = run(model, inputs)
    except (fastdiff.FastDiffError, AssertionError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    fastdiff.remove(model)
    return {
        "apart": (shared - whole).abs().max().item(),
        "effect": (dense - whole).abs().max().item(),
        "removed": (run(model, inputs) - dense).abs().max().item(),
    }


def pipeline() -> dict:
    """A whole run, whose first step is dense."""
    pipe = tiny_wan_pipeline().to(DEVICE)
    dense = video(pipe)
    whole = video(fastdiff.apply(pipe, RADIAL, dense_steps=1))
    share(pipe.transformer, {})
    shared = video(pipe)
    removed = video(fastdiff.remove(pipe))
    apart = {"apart": (shared, whole), "effect": (dense, whole), "removed": (removed, dense)}
    return {name: (one - other).abs().max().item() for name, (one, other) in apart.items()}


def gradients(compiled: bool) -> dict:
    """Each process has the gradient of its tokens; together that of all."""
    torch.manual_seed(0)
    model = fastdiff.apply(tiny_flux().to(DEVICE), NEAR)
    inputs = moved(flux_inputs(**FLUX), DEVICE)
    found = []
    for shared in (False, True):
        model.zero_grad()
        if shared:
            share(model, {})
            if compiled:
                model.compile_repeated_blocks(fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
        model(**inputs)[0].square().mean().backward()
        # The last layer works on gathered tokens, and the embeddings of the timestep on none of the sequence's.
        block = model.single_transformer_blocks[0].attn
        found.append([part.weight.grad.clone() for part in (block.to_q, block.to_k, block.to_v)])
    for gradient in found[1]:
        dist.all_reduce(gradient)
    pairs = zip(*found, strict=True)
    return {"apart": max(((one - other).abs().max() / one.abs().max()).item() for one, other in pairs)}


def work(rank: int, folder: str, backend: str) -> None:
    global DEVICE
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    logging.disable(logging.WARNING)
    if backend == "nccl":
        DEVICE = "cuda"
        torch.cuda.set_device(rank)
    else:
        # diffusers counts accelerators to place the process, and a CPU is none.
        torch.accelerator.device_count = lambda: 1
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {name: compare(*case) for name, case in CASES.items()}
    found["a pipeline"] = pipeline()
    found["gradients"] = gradients(False)
    found["gradients, compiled"] = gradients(True)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
