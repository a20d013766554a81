"""Context parallelism over two processes, with gloo on the CPU or NCCL on two GPUs: the same as in one, or refused."""

import json
import os
import re

import pytest
import torch
import torch.multiprocessing as processes
from filelock import FileLock

pytest.importorskip("diffusers.hooks.context_parallel")

import ulysses_worker

from fastdiff_kernels import Grid, Span, TokenLayout
from fastdiff_patches.ulysses import Ulysses, parts_of

REFUSED = {
    "three heads": "InvalidInputError: 3 attention heads do not divide among 2",
    "needs": "UnsupportedError: .*needs pre_rope_query",
    "ring": "UnsupportedError: .*ring_degree=2; sparse attention needs the whole sequence",
}


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, pytest.mark.two_gpus])])
def found(tmp_path_factory, request):
    # Once for all workers of pytest-xdist, whose folders are neighbours.
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / request.param
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            processes.start_processes(ulysses_worker.work, (str(folder), request.param), nprocs=2, start_method="spawn")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.together("context parallelism, Ulysses: two processes equal one")
@pytest.mark.parametrize("name", [*(name for name in ulysses_worker.CASES if name not in REFUSED), "a pipeline"])
def test_two_processes_make_what_one_makes(found, name):
    # Half the tokens may meet other kernels for products than all do, which sum in another order.
    near = 6e-3 if "half precision" in name else 5e-6
    for result in found:
        assert result[name]["apart"] < near
        assert result[name]["removed"] < near
        assert result[name]["effect"] > max(1e-3, 2 * near)


@pytest.mark.together("context parallelism, Ulysses: two processes equal one")
@pytest.mark.parametrize("name", ["gradients", "gradients, compiled"])
def test_gradients_run_back_through_the_exchange(found, name):
    assert all(result[name]["apart"] < 1e-5 for result in found)


@pytest.mark.together("context parallelism, what it cannot do, ring attention too: refused")
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_process_can_know_is_refused(found, name):
    for result in found:
        assert re.match(REFUSED[name], result[name]["error"])


def test_parts_are_text_and_what_is_no_text():
    text, grid, reference = Span("text", 4), Span("grid", 6, Grid(1, 2, 3)), Span("reference", 2)
    spans = (text, text, grid, reference, text)
    assert parts_of(TokenLayout(spans, spans)) == (8, 8, 4)


def test_the_order_of_the_sequence_comes_back():
    shares = Ulysses(None, 0, ((2, 3), (1, 2)))
    by_process = torch.tensor([0, 1, 10, 11, 12, 2, 13, 14])
    in_sequence = shares._ordered(by_process, by_part=True)
    assert in_sequence.tolist() == [0, 1, 2, 10, 11, 12, 13, 14]
    assert torch.equal(shares._ordered(in_sequence, by_part=False), by_process)
