"""Settings of all tests: one thread each, Triton's interpreter where no GPU is, NaN-poisoned memory on request."""

from __future__ import annotations

import os
import sys

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Before anything imports triton, which reads it once.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
# Convolutions in full float32, so that what differs is the attention.
torch.backends.cudnn.allow_tf32 = False


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    needs_gpu = pytest.mark.skip(reason="needs a CUDA device, and torch sees none")
    needs_two = pytest.mark.skip(reason="needs two CUDA devices, and torch sees one")
    needs_time = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(needs_gpu)
        elif "two_gpus" in item.keywords and torch.cuda.device_count() < 2:
            item.add_marker(needs_two)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(needs_time)
        # Reports carry them, from the processes of pytest-xdist too; scripts/together.py gathers them.
        item.user_properties += [("together", marker.args[0]) for marker in item.iter_markers("together")]


@pytest.fixture
def fails(capsys):
    """Runs a command that must fail as bad input does; returns its line."""
    from fastdiff import cli

    def run(*words):
        assert cli.main([str(word) for word in words]) == 2
        out, err = capsys.readouterr()
        said = [line for line in err.splitlines() if line.startswith("fastdiff: ")]
        assert out == ""
        assert len(said) == 1
        assert "Traceback" not in err
        return said[0]

    return run


@pytest.fixture
def shows(record_property):
    """Says of which model a test shows something and what; scripts/tested_models.py gathers it."""

    def say(model, what, weights="random"):
        record_property("shows", [type(model).__name__, what, weights])

    return say


@pytest.fixture
def fake_fa4(monkeypatch):
    """A stand-in for FlashAttention-4, installed."""
    from fake_flash_attn import install

    install(monkeypatch)


@pytest.fixture
def poison(monkeypatch):
    """Fills what fastdiff_kernels allocates uninitialised, so that an element a kernel forgot to write shows.

    Floats become NaN, integers their lowest value. Covers torch.empty, torch.empty_like, torch.empty_strided and
    Tensor.new_empty as called from the package itself.
    """
    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        result = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] != "fastdiff_kernels":
            return result
        if result.is_floating_point():
            return result.fill_(float("nan"))
        return result if result.dtype == torch.bool else result.fill_(torch.iinfo(result.dtype).min)

    return wrapper
