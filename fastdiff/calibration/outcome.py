"""From the records of a run to orders and masks: the choices of search.py for all layers and groups of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from fastdiff.methods.base import below_floor
from fastdiff.methods.paro_file import BLOCK, LayerMasks, pack
from fastdiff_kernels import InvalidInputError
from fastdiff_kernels.errors import NotFiniteError

from .recorder import LayerRecord
from .search import best_order, choose, kept_mass, paper_score, value_by_row
from .settings import CalibrationSettings


class ChosenOrders(NamedTuple):
    """The orders of one layer's heads, each `[heads]`.

    Attributes:
        candidate: Which of the record's candidates it is, int64.
        order: Its place in `AXIS_ORDERS`, int64.
        margin: How much better it scored than the next.
        error: Standard error of the margin that comes from looking at a sample; NaN where it is not known.
    """

    candidate: torch.Tensor
    order: torch.Tensor
    margin: torch.Tensor
    error: torch.Tensor


def check_records(records: Mapping[int, LayerRecord], groups: int) -> None:
    """Whether there is something to choose from.

    Raises:
        InvalidInputError: If no layer or not every group of steps was seen.
        NotFiniteError: If the model's attention was not finite.
    """
    if not records:
        raise InvalidInputError("no attention call was seen; the pipeline must run the model that is calibrated.")
    for layer, record in records.items():
        for group, samples in enumerate(record.samples):
            if samples == 0:
                raise InvalidInputError(
                    f"group {group + 1} of {groups} saw no denoising step; give at most as many groups as steps."
                )
        if not bool(torch.isfinite(record.sums).all()):
            raise NotFiniteError(f"the attention of layer {layer} has values that are not finite; try float32.")


def check_floor(records: Mapping[int, LayerRecord], density: float) -> None:
    """Whether the density pays for what is always kept.

    Raises:
        InvalidInputError: If it does not.
    """
    floors = [record.outside() + record.sums.shape[-1] * record.cost for record in records.values()]
    floor = _mean(floors, records)
    if density < floor:
        grids = sorted({str(record.grid) for record in records.values()})
        kept = "where each query keeps its own block, and text all"
        raise below_floor("paro", density, ", ".join(grids), floor, kept, "use more tokens")


def choose_orders(record: LayerRecord, settings: CalibrationSettings) -> ChosenOrders:
    """The best order of each head of one layer."""
    tokens, blocks = record.grid.tokens, record.sums.shape[-1]
    if settings.objective == "mass":
        share = (settings.density - record.outside()) / (record.cost * blocks**2)
        found = [kept_mass(sums, share, record.rows, tokens) for sums in record.mean()]
        score, error = (torch.stack(part).mean(0) for part in zip(*found, strict=True))
    else:
        score = -paper_score(record.small / record.calls, record.incoherence / record.calls, settings.alpha)
        error = torch.full_like(score, float("nan"))
    best, second, margin = best_order(score)
    errors = (error.gather(0, which[None])[0] for which in (best, second))
    heads = torch.arange(len(best))
    return ChosenOrders(best, record.orders[best, heads], margin, torch.hypot(*errors))


def choose_masks(
    names: list[str],
    records: Mapping[int, LayerRecord],
    orders: Mapping[int, ChosenOrders],
    settings: CalibrationSettings,
) -> list[LayerMasks | None]:
    """Masks of all layers, under one budget for each group of steps.

    Args:
        names: Names of all self-attention layers; those without a record get None.
        records: What was seen, all query blocks of the chosen orders among it.
        orders: The chosen orders, whose `candidate` says where in the records their maps stand.
    """
    budget = settings.density - _mean([record.outside() for record in records.values()], records)
    pairs = sum(record.pairs for record in records.values())
    costs = [BLOCK**2 / (len(orders[layer].order) * pairs) for layer in records]
    packed: dict[int, list[torch.Tensor]] = {layer: [] for layer in records}
    mass: dict[int, list[torch.Tensor]] = {layer: [] for layer in records}
    density: dict[int, list[torch.Tensor]] = {layer: [] for layer in records}
    for group in range(settings.groups):
        maps = {}
        for layer, record in records.items():
            candidate = orders[layer].candidate
            maps[layer] = record.mean()[group][candidate, torch.arange(len(candidate))]
        # Their diagonals are overwritten, and kept, so that they do not count in what is lost.
        values = [value_by_row(sums) if settings.mask == "row" else sums for sums in maps.values()]
        masks = choose(values, costs, budget)
        for (layer, record), mask in zip(records.items(), masks, strict=True):
            packed[layer].append(pack(mask))
            mass[layer].append(1 - maps[layer].masked_fill(mask, 0).sum((1, 2)) / record.grid.tokens)
            density[layer].append(mask.float().mean((1, 2)))
    layers: list[LayerMasks | None] = [None] * len(names)
    for layer, record in records.items():
        layers[layer] = LayerMasks(
            names[layer],
            record.grid,
            orders[layer].order.to(torch.uint8),
            torch.stack(packed[layer]),
            torch.stack(mass[layer]),
            torch.stack(density[layer]),
            orders[layer].margin,
        )
    return layers


def _mean(densities: list[float], records: Mapping[int, LayerRecord]) -> float:
    """The mean density over layers, which count by their pairs of tokens, as in `summary`."""
    pairs = [record.pairs for record in records.values()]
    return sum(density * count for density, count in zip(densities, pairs, strict=True)) / sum(pairs)
