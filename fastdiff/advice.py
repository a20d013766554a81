"""What a user is told once: what a method can gain at the size that runs, and where it wants fine-tuned weights."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from .methods import AgentConfig, ClearConfig, MethodConfig

if TYPE_CHECKING:
    from fastdiff_kernels import TokenLayout
    from fastdiff_patches.attachment import Attachment
    from fastdiff_patches.families import Family

_logger = logging.getLogger("fastdiff")

# FLUX at 1024 x 1024 has about this under CLEAR, whose authors see no gain in time there: what the estimate leaves out
# (the order of tokens, uneven blocks, element-wise work) eats up as much.
LEAST_GAIN = 1.2
# In tokens; the published weights are fine-tuned for 8, 16 and 32, of which the last sees most of a picture.
SMALL_RADIUS = 16

_USUAL_FFN = 4.0
_LEVELS = re.compile(r"(down_blocks|up_blocks)\.\d+\.|mid_block\.")


def dense_work(model: nn.Module, attached: Attachment, layout: TokenLayout) -> tuple[dict[str, float], float]:
    """FLOPs of a dense forward of one sample: of the scores in each layer by name, and of everything else.

    With n tokens and a width of d channels a layer's scores and sums of values take 4 n^2 d. Its projections take
    8 n d^2, and a feed-forward of r d hidden channels 4 r n d^2. The scores' share of a transformer is therefore
    n / (n + (2 + r) d). In a UNet the convolutions count too, each at the size of its level. Cross-attention,
    modulation, norms and activations are left out, so that the true share is a little smaller.
    """
    config, family = getattr(model, "config", None), attached.family
    places, scores, rest = attached.places(config, layout), {}, 0.0
    for layer in attached.layers:
        own, width = places[layer.name].layout, layer.heads * layer.head_dim
        scores[layer.name] = 4.0 * own.query_tokens * own.key_tokens * width
        rest += (8 + 4 * _ffn_ratio(config, width)) * own.query_tokens * width**2
    if family.levels:
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and _LEVELS.match(name):
                rest += 2.0 * module.weight.numel() * family.at(config, layout, name).query_tokens
    return scores, rest


def expected_gain(scores: Mapping[str, float], rest: float, densities: Mapping[str, float]) -> tuple[float, float]:
    """The share of the scores in a dense forward, and the gain end to end if they cost their density.

    Layers without a density are dense.
    """
    whole = sum(scores.values()) + rest
    spared = sum(scores[name] * (1 - density) for name, density in densities.items())
    return sum(scores.values()) / whole, whole / max(whole - spared, 1e-9 * whole)


def tell_gain(model: nn.Module, attached: Attachment, layout: TokenLayout) -> None:
    """Warns if the running forward is sparse and can gain little; for `Attachment`, which calls it once."""
    if attached.family.by_length:
        # Which modules are meant shows in this very forward.
        return
    densities = {layer.name: layer.plan.density() for layer in attached.layers if layer.active}
    share, gain = expected_gain(*dense_work(model, attached, layout), densities)
    if gain >= LEAST_GAIN:
        return
    density = sum(densities.values()) / len(densities)
    _logger.warning(
        "%s on %s tokens: self-attention is about %.0f %% of the FLOPs of a dense forward, so %s at density %.2f makes "
        "a step at most %.2fx as fast, and may make it slower. Larger sizes and lower densities gain more.",
        type(model).__name__,
        layout.grid,
        100 * share,
        attached.settings.config.method,
        density,
        gain,
    )


def tell_training(model: nn.Module, family: Family, config: MethodConfig) -> None:
    """Warns of each method in a config that wants fine-tuned weights in this model."""
    for part in getattr(config, "parts", (config,)):
        wants = training_wanted(part, family)
        if wants is not None:
            _logger.warning("%s in %s: %s", part.method, type(model).__name__, wants)


def training_wanted(config: MethodConfig, family: Family) -> str | None:
    """Why a method wants fine-tuned weights in the models of a family, None if it does without."""
    if isinstance(config, AgentConfig) and not family.levels:
        return (
            "without fine-tuning agents change the picture; training-free they were shown in the early steps of UNets "
            "alone (arXiv 2312.08874)."
        )
    if isinstance(config, ClearConfig) and not family.levels and _radius(config) < SMALL_RADIUS:
        return (
            f"radius {_radius(config):g} is small, and the paper fine-tunes the attention layers (arXiv 2412.16112); "
            f"without that take {SMALL_RADIUS} or more, or keep the first steps dense."
        )
    return None


def _radius(config: ClearConfig) -> float:
    """The smaller one of rows and columns."""
    return min(config.radius[1:]) if isinstance(config.radius, tuple) else config.radius


def _ffn_ratio(config: Any, width: int) -> float:
    """Hidden channels of the feed-forward by the width, as the config says it, or the usual 4."""
    names = ("ffn_dim", "ff_dim", "intermediate_size")
    hidden = next((size for size in (getattr(config, name, None) for name in names) if size), None)
    return hidden / width if hidden else getattr(config, "mlp_ratio", None) or _USUAL_FFN
