"""Plans are built on CPUs, whatever torch's default device is."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def on_cpu(build: Callable[..., Any]) -> Callable[..., Any]:
    """Has a function make its tensors on the CPU where `torch.set_default_device` or `with torch.device` says else."""

    @functools.wraps(build)
    def on_it(*args, **kwargs):
        with torch.device("cpu"):
            return build(*args, **kwargs)

    return on_it
