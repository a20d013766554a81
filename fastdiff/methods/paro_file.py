"""Calibration: the outcome of `fastdiff.calibrate` in memory and as one safetensors file, masks packed to bits."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastdiff_kernels import Grid, InvalidInputError
from fastdiff_kernels.axis_order import AXIS_ORDERS

from .fingerprint import Fingerprint

# Tokens in a block, of queries and of keys: what the paper uses, and what tiles of all kernels divide or hold.
BLOCK = 64
VERSION = 1
_KEY, _CHECKSUM = "fastdiff-paro", "sha256"
_TENSORS = ("orders", "masks", "mass", "density", "margin")


@dataclass(frozen=True, eq=False)
class LayerMasks:
    """What was found for one self-attention layer.

    Attributes:
        name: Name of the attention module.
        grid: The token grid of the layer.
        orders: For each head its place in `AXIS_ORDERS`, uint8 `[heads]`.
        masks: Blocks of the grid's queries and keys that are kept, in the head's order, packed to bits, uint8
            `[groups, heads, bytes]`.
        mass: Attention of the grid's queries that the masks keep, text included, float32 `[groups, heads]`, up to 1.
            What is missing predicts the error.
        density: Kept share of the blocks between grid tokens, float32 `[groups, heads]`.
        margin: How much better the head's order scored than the next, float32 `[heads]`; for the objective `mass`
            in shares of the attention.
    """

    name: str
    grid: Grid
    orders: torch.Tensor
    masks: torch.Tensor
    mass: torch.Tensor
    density: torch.Tensor
    margin: torch.Tensor

    @property
    def heads(self) -> int:
        return len(self.orders)

    @property
    def blocks(self) -> int:
        return blocks_of(self.grid)

    def mask(self, group: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """The kept blocks in one group of steps, bool `[heads, blocks, blocks]`."""
        return unpack(self.masks[group].to(device), self.blocks)


@dataclass(frozen=True, eq=False)
class Calibration:
    """Orders and masks of a whole model.

    Attributes:
        groups: Groups of denoising steps with masks of their own, all of the same share of the steps.
        layers: What was found for each self-attention layer, None for one that stayed dense.
        fingerprint: The model it is for.
        settings: How it was made, plain data: density, objective and the like; nothing here is read at run time.
        digest: Hash of all the file holds.
    """

    groups: int
    layers: tuple[LayerMasks | None, ...]
    fingerprint: Fingerprint
    settings: dict[str, Any]
    digest: str = ""

    def group(self, step: int | None, steps: int | None) -> int:
        """The group of a step; outside a denoising run the last one, whose masks serve most of the detail."""
        if step is None or not steps:
            return self.groups - 1
        return min(self.groups * step // steps, self.groups - 1)

    def save(self, path: str | Path) -> None:
        """Writes the file; see `load`."""
        tensors = {"fingerprint": self.fingerprint.values}
        for index, layer in enumerate(self.layers):
            if layer is not None:
                tensors |= {f"layers.{index}.{name}": getattr(layer, name).contiguous() for name in _TENSORS}
        about = {
            "version": VERSION,
            "block": BLOCK,
            "groups": self.groups,
            "model": self.fingerprint.to_dict(),
            "layers": [layer and {"name": layer.name, "grid": str(layer.grid)} for layer in self.layers],
            "settings": self.settings,
        }
        text = json.dumps(about)
        save_file(tensors, path, metadata={_KEY: text, _CHECKSUM: _digest(text, tensors)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Reads a file that `save` wrote.

        Raises:
            InvalidInputError: If it is missing, damaged, of another kind or of another version.
        """
        about, digest, tensors = _read(path)
        layers = []
        try:
            model = Fingerprint(about["model"]["class"], about["model"]["structure"], tensors["fingerprint"])
            for index, entry in enumerate(about["layers"]):
                found = {name: tensors[f"layers.{index}.{name}"] for name in _TENSORS} if entry else None
                layers.append(entry and LayerMasks(entry["name"], Grid.parse(entry["grid"]), **found))
            return cls(about["groups"], tuple(layers), model, about["settings"], digest)
        except (KeyError, TypeError) as error:
            raise _damaged(path, f"it lacks {error}") from error

    def describe(self) -> dict[str, Any]:
        """What a user wants to know of it, as plain data."""
        found = [layer for layer in self.layers if layer is not None]
        orders = torch.cat([layer.orders for layer in found]).bincount(minlength=len(AXIS_ORDERS)).tolist()
        mass, density = (torch.cat([getattr(layer, name) for layer in found], dim=1) for name in ("mass", "density"))
        margin = torch.cat([layer.margin for layer in found])
        return {
            **self.settings,
            "model_class": self.fingerprint.model,
            "model_hash": self.fingerprint.structure,
            "layers": len(self.layers),
            "dense_layers": len(self.layers) - len(found),
            "grids": sorted({str(layer.grid) for layer in found}),
            "orders": dict(zip(AXIS_ORDERS, orders, strict=True)),
            "mass_by_group": mass.mean(1).tolist(),
            "lowest_mass": float(mass.min()),
            "mean_margin": float(margin.mean()),
            "lowest_head_density": float(density.min()),
            "highest_head_density": float(density.max()),
        }


class _Loaded:
    """The files that are in use and the last one that was read, so that a config and its planners share one copy."""

    def __init__(self):
        self._lock = threading.Lock()
        self._found: weakref.WeakValueDictionary[tuple, Calibration] = weakref.WeakValueDictionary()
        self._last: Calibration | None = None

    def get(self, path: str) -> Calibration:
        try:
            state = os.stat(path)
        except OSError as error:
            raise InvalidInputError(
                f"the calibration {path} cannot be read ({error.strerror}); make it with fastdiff calibrate."
            ) from error
        key = (os.path.abspath(path), state.st_mtime_ns, state.st_size, state.st_ino)
        with self._lock:
            found = self._found.get(key)
            if found is None:
                found = self._found[key] = Calibration.load(path)
            self._last = found
            return found


calibration_at = _Loaded().get
"""The calibration in a file; read again only when the file has changed."""


def blocks_of(grid: Grid) -> int:
    """Blocks on a side of the grid's map; the last may be padded."""
    return -(-grid.tokens // BLOCK)


def pack(mask: torch.Tensor) -> torch.Tensor:
    """bool `[..., blocks, blocks]` to uint8 `[..., bytes]`, lowest bit first."""
    flat = mask.flatten(-2).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (flat << _places(mask.device)).sum(-1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse of `pack`."""
    flat = (packed[..., None] >> _places(packed.device) & 1).flatten(-2)[..., : blocks**2]
    return flat.bool().unflatten(-1, (blocks, blocks))


def _places(device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)


def _read(path: str | Path) -> tuple[dict[str, Any], str, dict[str, torch.Tensor]]:
    """Metadata, digest and tensors of a file that is whole and of this version."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if _KEY in metadata else {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _damaged(path, (str(error).splitlines() or [type(error).__name__])[0]) from error
    if _KEY not in metadata:
        raise InvalidInputError(
            f"{path} is a safetensors file and no calibration; give one that fastdiff calibrate wrote."
        )
    text = metadata[_KEY]
    try:
        about = json.loads(text)
        version = about["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"its metadata is no JSON with a version: {error}") from error
    if version != VERSION:
        raise InvalidInputError(
            f"the calibration {path} has version {version!r}; this fastdiff reads version {VERSION}. Calibrate anew, "
            "or use the fastdiff that wrote it."
        )
    digest = _digest(text, tensors)
    if digest != metadata.get(_CHECKSUM):
        raise _damaged(path, "its contents do not match its checksum")
    return about, digest, tensors


def _damaged(path: str | Path, why: str) -> InvalidInputError:
    return InvalidInputError(f"the calibration {path} cannot be read ({why}); make it anew with fastdiff calibrate.")


def _digest(text: str, tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()
