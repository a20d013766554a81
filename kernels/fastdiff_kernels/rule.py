"""In-block rules: which pairs of a partial block are computed, and which blocks a rule leaves empty, partial or full.

A slot is a place in a plan's token order. Each slot has a row in a table of int32:

    query side  [t, y, x, spans it sees whole (bits), spans it sees by the rule (bits)]
    key side    [t, y, x, its own span (one bit, 0 for padding), 0]

A pair is computed where the key's bit is among the bits seen whole, or among those seen by the rule and the
rule holds. Padding has no bits on either side, so it is never seen. The rules:

    NONE    always holds: whole blocks are the truth
    METRIC  a dy^2 + b dx^2 < limit[|dt|], or the key's t is below the number of sink frames
    BOX     first[q] <= k <= last[q] on each of the three axes
    BITS    one bit for each sub-block of a partial block

Coordinates are whatever the method stored: a raster band is a METRIC with the raster index as y and b = 0, and
a dilated neighborhood is a BOX over coordinates sorted by dilation group.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch

from .errors import InvalidInputError


class RuleKind(IntEnum):
    """The forms of an in-block rule; kernels take the number as a compile-time constant."""

    NONE = 0
    METRIC = 1
    BOX = 2
    BITS = 3


METRIC_HEADER = 4
BOX_HEADER = 3


@dataclass(frozen=True, eq=False)
class Rule:
    """A kind and its parameters, int32 `[n]`; use the constructors below."""

    kind: RuleKind
    parameters: torch.Tensor

    @classmethod
    def none(cls) -> Rule:
        return cls(RuleKind.NONE, torch.zeros(1, dtype=torch.int32, device="cpu"))

    @classmethod
    def metric(cls, limits: torch.Tensor, *, a: int = 1, b: int = 1, sink_frames: int = 0) -> Rule:
        """`limits[d]` bounds the squared distance between frames d apart; -1 computes nothing at that distance.

        Raises:
            InvalidInputError: If there are no limits, or numbers beyond int32.
        """
        numbers = [a, b, sink_frames, *limits.flatten().tolist()]
        if limits.dim() != 1 or not len(limits) or not all(-(2**31) <= number < 2**31 for number in numbers):
            raise InvalidInputError(
                f"a METRIC rule got limits of the shape {list(limits.shape)}, a {a}, b {b}, {sink_frames} sink frames; "
                "give one limit at least, and numbers that fit int32."
            )
        header = torch.tensor([a, b, sink_frames, len(limits)], dtype=torch.int32, device="cpu")
        return cls(RuleKind.METRIC, torch.cat([header, limits.to(torch.int32).cpu()]))

    @classmethod
    def box(cls, first: tuple[torch.Tensor, ...], last: tuple[torch.Tensor, ...]) -> Rule:
        """For each axis (t, y, x) the first and the last key coordinate of every query coordinate, both inclusive.

        Raises:
            InvalidInputError: If tables do not belong together, or decrease along an axis.
        """
        if len(first) != 3 or len(last) != 3 or any(len(f) != len(z) for f, z in zip(first, last, strict=True)):
            raise InvalidInputError("a box rule needs first and last of equal length for each of the axes t, y, x.")
        for axis, tables in zip("tyx", zip(first, last, strict=True), strict=True):
            if any(bool((table.diff() < 0).any()) for table in tables):
                raise InvalidInputError(
                    f"a box rule's first and last must not decrease along an axis; on {axis} they are "
                    f"{tables[0].tolist()[:8]} and {tables[1].tolist()[:8]}."
                )
        header = torch.tensor([len(f) for f in first], dtype=torch.int32, device="cpu")
        tables = [table.to(torch.int32).cpu() for pair in zip(first, last, strict=True) for table in pair]
        return cls(RuleKind.BOX, torch.cat([header, *tables]))

    @classmethod
    def bits(cls, query_side: int, key_side: int, columns: int) -> Rule:
        """Sub-blocks of `query_side` x `key_side` slots, `columns` of them across a block, bit 0 first.

        Raises:
            InvalidInputError: If a number is below 1.
        """
        if min(query_side, key_side, columns) < 1:
            raise InvalidInputError(
                f"a BITS rule got sub-blocks of {query_side} x {key_side}, {columns} across; give 1 at least for each."
            )
        return cls(RuleKind.BITS, torch.tensor([query_side, key_side, columns], dtype=torch.int32, device="cpu"))

    def to(self, device) -> Rule:
        return Rule(self.kind, self.parameters.to(device))

    def limits(self) -> torch.Tensor:
        """Of a METRIC rule: the bound of the squared distance at each distance of frames, int32 `[distances]`."""
        return self.parameters[METRIC_HEADER:]

    def axis_tables(self, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
        """First and last key coordinate of a box rule on one axis, each int32 `[axis length]`."""
        lengths = self.parameters[:BOX_HEADER].tolist()
        start = BOX_HEADER + 2 * sum(lengths[:axis])
        middle, end = start + lengths[axis], start + 2 * lengths[axis]
        return self.parameters[start:middle], self.parameters[middle:end]


def pairs_visible(rule: Rule, query: torch.Tensor, key: torch.Tensor, bits: torch.Tensor | None = None) -> torch.Tensor:
    """Token-level truth of partial blocks.

    Args:
        rule: The in-block rule.
        query: Table rows of the query slots, int32 `[..., queries, 5]`.
        key: Table rows of the key slots, int32 `[..., keys, 5]`.
        bits: For BITS, whether each pair's sub-block is on, bool `[..., queries, keys]`; the other rules
            need no more than the tables.

    Returns:
        bool `[..., queries, keys]`.
    """
    span = key[..., None, :, 3]
    whole = (query[..., :, None, 3] & span) != 0
    by_rule = (query[..., :, None, 4] & span) != 0
    if rule.kind == RuleKind.METRIC:
        by_rule = by_rule & _metric_holds(rule, query, key)
    elif rule.kind == RuleKind.BOX:
        for axis in range(3):
            first, last = rule.axis_tables(axis)
            # Tokens that no rule is for, of a reference image say, may stand beyond the tables.
            q, k = query[..., axis].long().clamp(max=len(first) - 1), key[..., None, :, axis]
            by_rule = by_rule & (first[q][..., :, None] <= k) & (k <= last[q][..., :, None])
    elif rule.kind == RuleKind.BITS:
        by_rule = by_rule & bits
    return whole | by_rule


def _metric_holds(rule: Rule, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    a, b, sink_frames, _ = rule.parameters[:METRIC_HEADER].tolist()
    dt, dy, dx = (query[..., :, None, axis] - key[..., None, :, axis] for axis in range(3))
    near = a * dy * dy + b * dx * dx < rule.limits()[dt.abs().long()]
    return near | (key[..., None, :, 0] < sink_frames)


def _check_reach(rule: Rule, query: torch.Tensor, key: torch.Tensor) -> None:
    """Raises InvalidInputError unless a METRIC rule has limits for all distances in time, and squares within int32."""
    # Blocks without a token have a lowest place above their highest.
    boxes = torch.cat([query, key])
    boxes = boxes[(boxes[:, 0] <= boxes[:, 1]).all(1)]
    frames, height, width = boxes[:, 1].amax(0).tolist()
    if frames >= len(rule.limits()):
        raise InvalidInputError(
            f"tokens lie up to {frames} frames apart, a reference's included, and the rule has limits for distances "
            f"below {len(rule.limits())}. Lay references out on the frames of the grid, or give more limits."
        )
    a, b = rule.parameters[:2].tolist()
    if abs(a) * height**2 + abs(b) * width**2 >= 2**31:
        raise InvalidInputError(
            f"places lie up to {height} and {width} apart, and the rule weights their squares by {a} and {b}: that is "
            "more than int32 holds. Use smaller weights or grids."
        )


def classify(rule: Rule, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Which pairs of blocks a METRIC or BOX rule touches, and which it holds in throughout.

    A block is its bounding box. Where boxes are not filled, `touched` may name a block that turns out empty and
    `whole` may miss one: both err on the side of computing and testing.

    Args:
        rule: A METRIC or BOX rule.
        query: Bounding boxes of query blocks, int32 `[query blocks, 2, 3]` (lowest and highest t, y, x).
        key: The same of key blocks.

    Returns:
        touched, whole: bool `[query blocks, key blocks]`.

    Raises:
        InvalidInputError: If the rule is of another kind, or tokens lie farther apart than a METRIC rule knows.
    """
    if rule.kind == RuleKind.METRIC:
        _check_reach(rule, query, key)
        return _classify_metric(rule, query, key)
    if rule.kind == RuleKind.BOX:
        return _classify_box(rule, query, key)
    raise InvalidInputError(f"blocks of a {rule.kind.name} rule are given by its method; only METRIC and BOX classify.")


def _classify_metric(rule: Rule, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a, b, sink_frames, _ = rule.parameters[:METRIC_HEADER].tolist()
    q_low, q_high = query[:, None, 0], query[:, None, 1]
    k_low, k_high = key[None, :, 0], key[None, :, 1]
    least = torch.maximum(k_low - q_high, q_low - k_high).clamp_(min=0)
    most = torch.maximum(k_high - q_low, q_high - k_low)
    loosest, tightest = _range_extremes(rule.limits())
    near, far = least[..., 0].long(), most[..., 0].long()
    touched = a * least[..., 1] ** 2 + b * least[..., 2] ** 2 < loosest[near, far]
    whole = a * most[..., 1] ** 2 + b * most[..., 2] ** 2 < tightest[near, far]
    return touched | (k_low[..., 0] < sink_frames), whole | (k_high[..., 0] < sink_frames)


def _range_extremes(limits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest and smallest limit over every range of frame distances, int32 `[first, last]`; first <= last."""
    n = len(limits)
    square = limits.expand(n, n)
    inside = torch.ones(n, n, dtype=torch.bool, device=limits.device).triu()
    lowest, highest = torch.iinfo(limits.dtype).min, torch.iinfo(limits.dtype).max
    loosest = square.masked_fill(~inside, lowest).cummax(dim=1).values
    tightest = square.masked_fill(~inside, highest).cummin(dim=1).values
    return loosest, tightest


def _classify_box(rule: Rule, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # First and last never decrease along an axis, so the outermost queries of a block decide for all of it.
    touched = whole = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
    for axis in range(3):
        first, last = rule.axis_tables(axis)
        q_low, q_high = query[:, :, axis].long().clamp(max=len(first) - 1).unbind(1)
        k_low, k_high = key[None, :, 0, axis], key[None, :, 1, axis]
        touched = touched & (k_low <= last[q_high][:, None]) & (k_high >= first[q_low][:, None])
        whole = whole & (k_low >= first[q_high][:, None]) & (k_high <= last[q_low][:, None])
    return touched, whole
