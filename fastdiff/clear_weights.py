"""Loads the attention weights that CLEAR's authors released for FLUX from a local file, and takes them back out."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastdiff_kernels import InvalidInputError, UnsupportedError

from .methods.clear_planner import KeyPooling

if TYPE_CHECKING:
    from torch import nn

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
# As the authors' processors are named on the module, and as fastdiff's own are in a state dict.
_GRIDS = ("processor.spatial_weight", "fastdiff.weight")
# How wrappers and whole pipelines begin the names of the same tensors.
_PREFIX = re.compile(r"^(?:module\.|transformer\.(?=(?:single_)?transformer_blocks\.))+")


class ClearWeights:
    """Weights in use on a model, with the originals kept in main memory.

    Attributes:
        tensors: How many tensors were replaced.
    """

    def __init__(self, parameters: dict[str, torch.Tensor], loaded: dict[str, torch.Tensor]):
        self._originals = [(x, x.detach().to("cpu", copy=True)) for x in parameters.values()]
        self.tensors = len(parameters)
        _write([(parameters[name], value) for name, value in loaded.items()])

    def restore(self) -> None:
        """Puts the original values back, bit for bit; a second call has no effect."""
        _write(self._originals)
        self._originals = []


def load_clear_weights(pipe_or_model: Any, path: str | Path) -> ClearWeights:
    """Puts CLEAR's fine-tuned attention weights into a FLUX model, in place.

    The released files are `clear_local_32.safetensors`, `_16`, `_8`, and `_16_down_4` and `_8_down_4` with pooling
    grids; the numbers are `radius` and `pool_factor` of `ClearConfig`. A file holds, under the names of the diffusers
    model, the weights and biases of `attn.to_q`, `to_k`, `to_v` of all blocks, those of `attn.to_out.0` of the
    dual-stream blocks, and the grids as `attn.processor.spatial_weight` of shape `[1, 1, 1, f, 1, f, 1]`. We know
    that from the authors' code, which saves them so, and have not seen the files. Grids may also be named
    `attn.fastdiff.weight`, `[f, f]`, as in a state dict of a model that fastdiff has patched; names may begin with
    `transformer.` or `module.`. Everything else, such as the projections of the text, stays as it is.

        fastdiff.apply(pipe, ClearConfig(8, pool_factor=4))
        weights = fastdiff.load_clear_weights(pipe, "clear_local_8_down_4.safetensors")

    Args:
        pipe_or_model: A FLUX pipeline or its transformer. For a file with grids it must have been patched with a
            `ClearConfig` of their pool factor before, or with rules that have one for every layer.
        path: The safetensors file.

    Returns:
        A handle whose `restore()` brings the original weights back. `fastdiff.remove` does not: it takes the method
        off, and these weights are the model's. The two may come in any order.

    Raises:
        InvalidInputError: If the file cannot be read, lacks a tensor or has others, if a shape differs, or if its
            grids are not those that the model has been patched for. The model is then as it was.
        UnsupportedError: If the model is no FLUX transformer, or its attention weights cannot be set.
    """
    from fastdiff_patches import families, locate

    models = locate.transformers(pipe_or_model)
    model = next(iter(models.values()))
    family = families.find_family(model)
    if len(models) > 1 or family is None or family.name != "flux":
        raise UnsupportedError(
            f"CLEAR's weights are for FLUX and this is {type(model).__name__}; give a FLUX pipeline or its transformer."
        )
    modules = locate.self_attention(model, family)
    targets = {}
    for name, module in modules.items():
        targets.update(_projections(name, module))
    loaded, grids = _read(Path(path))
    _check_names(path, targets, loaded, grids, modules)
    if grids:
        for name, grid in grids.items():
            target = _grid_of(path, name, modules[name], grid)
            targets[f"{name}.{_GRIDS[1]}"], loaded[f"{name}.{_GRIDS[1]}"] = target, grid.reshape(target.shape)
    elif any(_pooling_of(module) is not None for module in modules.values()):
        raise InvalidInputError(
            f"{path} has no pooling grids and the model is patched with a pool_factor; apply ClearConfig(radius) "
            "without one, or load a file that has grids."
        )
    for name, value in loaded.items():
        if targets[name].shape != value.shape or not value.is_floating_point():
            raise InvalidInputError(
                f"{name} in {path} is {value.dtype} {list(value.shape)} and the model has {list(targets[name].shape)}; "
                "load the file into the model that it was trained for."
            )
    return ClearWeights(targets, loaded)


def _projections(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of one attention module that a file must hold, by name."""
    if getattr(module, "fused_projections", False):
        raise UnsupportedError(
            f"{name} has fused projections, which would not see new weights; call unfuse_qkv_projections() first."
        )
    found = {}
    for projection in _PROJECTIONS:
        try:
            linear = module.get_submodule(projection)
        except AttributeError:
            continue
        for part in ("weight", "bias"):
            value = getattr(linear, part, None)
            if value is None:
                continue
            if not value.is_floating_point() or value.is_meta:
                raise UnsupportedError(
                    f"{name}.{projection}.{part} is {value.dtype} on {value.device}; CLEAR's weights go into "
                    "floating-point weights that are in memory, neither quantised nor offloaded layer by layer."
                )
            found[f"{name}.{projection}.{part}"] = value
    return found


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The projections by name and the grids by the name of their module, as the file has them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InvalidInputError(f"there is no file {path}; give the path of a safetensors file with CLEAR's weights.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InvalidInputError(f"{path} cannot be read as safetensors ({error}); download it again.") from error
    loaded, grids = {}, {}
    for full, value in tensors.items():
        name = _PREFIX.sub("", full.replace("_orig_mod.", ""))
        ending = next((grid for grid in _GRIDS if name.endswith(f".{grid}")), None)
        kept, key = (loaded, name) if ending is None else (grids, name.removesuffix(f".{ending}"))
        if key in kept:
            raise InvalidInputError(f"{path} has {key} twice, the second time as {full}; remove one of them.")
        kept[key] = value
    return loaded, grids


def _check_names(path, targets: dict, loaded: dict, grids: dict, modules: dict) -> None:
    missing = [name for name in targets if name not in loaded]
    unknown = [name for name in loaded if name not in targets] + [name for name in grids if name not in modules]
    if grids:
        missing += [f"{name}.{_GRIDS[0]}" for name in modules if name not in grids]
    for names, wrong in (
        (missing, "lacks {} tensors of this model"),
        (unknown, "has {} tensors that this model lacks"),
    ):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise InvalidInputError(
                f"{path} {wrong.format(len(names))} ({some}); load the file into the model that it was trained for."
            )


def _grid_of(path, name: str, module: nn.Module, grid: torch.Tensor) -> torch.Tensor:
    """The parameter that takes a grid from the file."""
    side = math.isqrt(grid.numel())
    if side**2 != grid.numel() or tuple(grid.shape) not in ((1, 1, 1, side, 1, side, 1), (side, side)):
        raise InvalidInputError(
            f"the pooling grid of {name} in {path} has the shape {list(grid.shape)}; it must be [1, 1, 1, f, 1, f, 1] "
            "or [f, f]."
        )
    pooling = _pooling_of(module, side)
    if pooling is None:
        raise InvalidInputError(
            f"{path} has pooling grids of {side}x{side} and the model is not patched for them; call "
            f"fastdiff.apply(pipe, ClearConfig(radius, pool_factor={side})) first."
        )
    return pooling.weight


def _pooling_of(module: nn.Module, side: int | None = None) -> KeyPooling | None:
    """What pools the keys of an attention module; under rules it stands among what other methods learn."""
    learned = getattr(module, "fastdiff", None)
    parts = () if learned is None else learned.modules()
    found = (part for part in parts if isinstance(part, KeyPooling))
    return next((part for part in found if side in (None, part.weight.shape[0])), None)


@torch.no_grad()
def _write(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for target, value in pairs:
        target.copy_(value)
