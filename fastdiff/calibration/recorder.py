"""Recorder: a planner that keeps attention dense, looks at it, and adds up what its blocks hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastdiff.methods.paro_file import BLOCK, blocks_of
from fastdiff.methods.planner import Planner
from fastdiff_kernels import Grid, InvalidInputError, TokenLayout, UnsupportedError
from fastdiff_kernels.axis_order import axis_order

from .statistics import BlockStatistics, block_sizes, block_statistics

Candidates = Callable[[int, Grid, int], torch.Tensor]
"""(layer, grid, heads) -> the orders in which each head is looked at, places in `AXIS_ORDERS`, int64
`[candidates, heads]`, all of a head different."""


@dataclass(eq=False)
class LayerRecord:
    """What was seen in one layer.

    Attributes:
        layout: The layout with the most tokens that ran; text may differ between calls.
        orders: In which orders each head was looked at, int64 `[candidates, heads]`.
        rows: The query blocks that were looked at, int64 `[rows]`.
        sums: Attention in each block, added up over the calls, float32 `[groups, candidates, heads, rows, blocks]`.
        small: Share of the blocks that the paper would skip, added up likewise, `[candidates, heads]`.
        incoherence: Largest / mean entry, mean over the blocks, likewise.
        samples: Attention maps of each group that were added up.
        calls: All of them together.
    """

    layout: TokenLayout
    orders: torch.Tensor
    rows: torch.Tensor
    sums: torch.Tensor
    small: torch.Tensor
    incoherence: torch.Tensor
    samples: list[int]
    calls: int = 0

    @property
    def grid(self) -> Grid:
        return self.layout.grid

    def outside(self) -> float:
        """Share of the scores, by area of tiles, that text and its like take."""
        spans = [(span.kind == "grid", -(-span.tokens // BLOCK)) for span in self.layout.query]
        total = sum(blocks for _, blocks in spans)
        return self.cost * (total**2 - sum(blocks for is_grid, blocks in spans if is_grid) ** 2)

    @property
    def cost(self) -> float:
        """What one block of one head's map adds to that head's density."""
        return BLOCK**2 / self.pairs

    @property
    def pairs(self) -> int:
        """Scores of one head."""
        return self.layout.query_tokens * self.layout.key_tokens

    def mean(self) -> torch.Tensor:
        """The mean map of each group, `[groups, candidates, heads, rows, blocks]`; divides in place, once."""
        for sums, samples in zip(self.sums, self.samples, strict=True):
            sums /= samples
        self.samples = [1] * len(self.samples)
        return self.sums


@dataclass(eq=False)
class _Seen:
    """The plan of a recorded call: it says where to add."""

    layer: int
    group: int
    layout: TokenLayout
    record: LayerRecord

    def density(self) -> float:
        return 1.0


@dataclass(eq=False)
class Recorder(Planner):
    """Attention as it is, with statistics of every call.

    Args:
        groups: Groups of denoising steps, all of the same share.
        candidates: In which orders to look.
        sample: Share of the query blocks to look at, evenly spread.
        epsilon: Entries below it are small; None records sums alone.
        sigma: Share of small entries from which on the paper would skip a block.
        check: Called with the records after the first forward, to raise before a long run is wasted.
    """

    # `plan` says itself where the step is unknown.
    uses_steps = False

    groups: int
    candidates: Candidates
    sample: float = 1.0
    epsilon: float | None = None
    sigma: float = 0.9
    check: Callable[[dict[int, LayerRecord]], None] | None = None
    records: dict[int, LayerRecord] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)

    def __reduce__(self):
        raise UnsupportedError("a model cannot be copied or pickled while it is calibrated; wait for the end.")

    def check_model(self, model: torch.nn.Module, layers: list[str]) -> None:
        self.names = layers

    def plan(self, layout, *, layer, step, steps, heads, head_dim, device) -> _Seen:
        if step is None:
            raise UnsupportedError(
                "the scheduler does not tell the denoising step, so its group is unknown; calibrate a pipeline whose "
                "scheduler does, by calling it."
            )
        if steps < self.groups:
            raise InvalidInputError(
                f"groups is {self.groups} and the run has {steps} steps; give at most as many groups as steps."
            )
        if layer in self.records and self.check is not None:
            check, self.check = self.check, None
            check(self.records)
        if layer not in self.records:
            self.records[layer] = self._begin(layer, layout, heads)
        record = self.records[layer]
        if layout.grid != record.grid:
            raise InvalidInputError(
                f"the grid of layer {layer} changed from {record.grid} to {layout.grid} during the run; calibrate one "
                "size at a time."
            )
        if layout.query_tokens > record.layout.query_tokens:
            record.layout = layout
        return _Seen(layer, min(self.groups * step // steps, self.groups - 1), layout, record)

    def _begin(self, layer: int, layout: TokenLayout, heads: int) -> LayerRecord:
        blocks = blocks_of(layout.grid)
        count = max(1, min(blocks, round(self.sample * blocks)))
        rows = torch.linspace(0, blocks - 1, count).round().long()
        orders = self.candidates(layer, layout.grid, heads)
        sums = torch.zeros(self.groups, *orders.shape, count, blocks)
        scores = (torch.zeros(orders.shape) for _ in range(2))
        return LayerRecord(layout, orders, rows, sums, *scores, [0] * self.groups)

    def attend(self, q, k, v, plan: _Seen, extras) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise UnsupportedError("calibration looks at every attention call; calibrate the model uncompiled.")
        with torch.no_grad():
            for sample in range(len(q)):
                hidden = None if extras.key_mask is None else ~extras.key_mask[sample]
                self._record(q[sample], k[sample], plan, extras.scale, hidden)
        mask = None if extras.key_mask is None else extras.key_mask[:, None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=extras.scale)
        return out.transpose(1, 2)

    def _record(self, q, k, plan: _Seen, scale: float | None, hidden: torch.Tensor | None) -> None:
        """Adds one sample, q and k `[tokens, heads, head_dim]`."""
        record, grid = plan.record, plan.record.grid
        spans = plan.layout.query
        place = next(place for place, span in enumerate(spans) if span.kind == "grid")
        start = sum(span.tokens for span in spans[:place])
        q = q[start : start + grid.tokens].transpose(0, 1).float()
        k = k.transpose(0, 1).float()
        options = {
            "scale": q.shape[-1] ** -0.5 if scale is None else scale,
            "start": start,
            "hidden": hidden,
            "rows": record.rows.to(q.device) if len(record.rows) < blocks_of(grid) else None,
            "epsilon": self.epsilon,
        }
        for heads, members in _passes(record.orders):
            orders = [axis_order(grid, which).to(q.device) for which, _ in members]
            found = block_statistics(q[heads.to(q.device)], k[heads.to(q.device)], orders, **options)
            for (_, slots), statistics in zip(members, found, strict=True):
                record.sums[plan.group, slots, heads] += statistics.sums.cpu()
                if self.epsilon is not None:
                    skipped, incoherence = self._paper(statistics, record)
                    record.small[slots, heads] += skipped.cpu()
                    record.incoherence[slots, heads] += incoherence.cpu()
        record.samples[plan.group] += 1
        record.calls += 1

    def _paper(self, found: BlockStatistics, record: LayerRecord) -> tuple[torch.Tensor, torch.Tensor]:
        """Share of blocks that can be skipped, and mean over blocks of largest / mean entry, both `[heads]`."""
        sizes = block_sizes(record.grid.tokens)
        mean = found.sums / (sizes[record.rows, None] * sizes).to(found.sums.device)
        # An empty block is even, not infinitely uneven.
        uneven = torch.where(mean > 0, found.peaks / mean, 1.0)
        return (found.small >= self.sigma).float().mean((1, 2)), uneven.mean((1, 2))


def _passes(orders: torch.Tensor) -> list[tuple[torch.Tensor, list[tuple[int, torch.Tensor]]]]:
    """Heads that are looked at in the same orders, and these orders with the candidates that they are, by head."""
    found: dict[tuple[int, ...], list[tuple[int, torch.Tensor]]] = {}
    for which in orders.unique().tolist():
        heads, slots = (orders.t() == which).nonzero(as_tuple=True)
        found.setdefault(tuple(heads.tolist()), []).append((which, slots))
    return [(torch.tensor(heads), members) for heads, members in found.items()]
