"""In-block rules in the form that GPU kernels test fastest, made once for each plan from its tables.

Where every block of a plan lies in one span, its rules become shorter than the tables of rule.py:

    BOX (and NONE)  A coordinate (t, y, x) is one word of three fields, each with a guard bit above it. Subtracting
                    words subtracts all fields at once, and a field's guard bit survives where its difference is not
                    negative. So first <= k <= last on three axes takes two subtractions and one comparison.
    DISC            METRIC on one frame: a dy^2 + b dx^2 < r is N_k - 2a y_q y_k - 2b x_q x_k < r - N_q, with
                    N = a y^2 + b x^2: two products for each pair, exact in float32 while whole numbers are. Places
                    count from the centre of the grid, which keeps them small.
    BALL            METRIC whose limits fall as r - c dt^2 does, with a third product for the frames.
    BITS            The bits of a row of sub-blocks are one word, and a key is a mask of one bit.

    query rows      BOX [first - guards, last + guards, spans seen whole], BITS [shift to its bits, spans seen by
                    the rule, spans seen whole], DISC and BALL [-2a y, -2b x, (-2c t,) r - N, spans seen whole]
    key rows        BOX [word], BITS [mask], DISC and BALL [N, y, x(, t)], these column by column
    parameters      BOX [guards, last + guards of a query that sees all], DISC and BALL [length of a column], then for
                    all the span of each key block

Floats stand in the int32 tables bit for bit. All other plans keep their own tables and rule; BITS among them is
MIXED_BITS.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .errors import UnsupportedError
from .on_cpu import on_cpu
from .rule import METRIC_HEADER, Rule, RuleKind

if TYPE_CHECKING:
    from .order import Side
    from .plan import BlockPlan

MIXED_BITS, DISC, BALL = range(len(RuleKind), len(RuleKind) + 3)
BOX_PARAMETERS = 2
# Largest whole number up to which float32 has all of them.
_EXACT = 2**24
# Where frames have few places, `_EXACT` leaves room for far more tries than are worth their time.
_MOST_SCALE = 4096
_FAR = 1e30
# The highest bit, which no sub-block has.
_PADDING = -(2**31)


@dataclass(frozen=True, eq=False)
class KernelRule:
    """What a kernel reads: the kind, and int32 tensors `[1 or heads, slots, n]`, the same (or by column), and `[m]`."""

    kind: int
    query: torch.Tensor
    key: torch.Tensor
    parameters: torch.Tensor

    def to(self, device) -> KernelRule:
        return KernelRule(self.kind, *(x.to(device) for x in (self.query, self.key, self.parameters)))


@on_cpu
def kernel_rule(plan: BlockPlan) -> KernelRule:
    """The rule of a plan as its kernels take it.

    Raises:
        UnsupportedError: If a BOX plan has blocks of several spans, or coordinates take over 28 bits together.
    """
    kind = plan.rule.kind
    spans = _spans_of_blocks(plan)
    if spans is not None and kind in (RuleKind.NONE, RuleKind.BOX):
        return _box(plan, spans)
    if kind == RuleKind.BOX:
        raise UnsupportedError(
            "this BOX plan has blocks that hold tokens of several spans, which the Triton kernels do not take; pad "
            "spans to whole blocks (aligned=True), or use backend='torch'."
        )
    if spans is not None and kind == RuleKind.BITS and int(plan.rule.parameters[2]) < 32:
        return _bits(plan, spans)
    if spans is not None and kind == RuleKind.METRIC:
        places = torch.cat([side.table[..., :3].flatten(0, 1) for side in (plan.query, plan.key)])
        last = tuple(places.amax(0).tolist())
        ball = whole_ball(plan.rule, last)
        if ball is not None:
            return _ball(plan, spans, last, ball)
    kind = MIXED_BITS if kind == RuleKind.BITS else int(kind)
    return KernelRule(kind, plan.query.table, plan.key.table, plan.rule.parameters)


def _spans_of_blocks(plan: BlockPlan) -> torch.Tensor | None:
    """The span of each key block, int32 `[key blocks]`, or None where blocks of either side lie in several."""
    whole, ruled, span = plan.query.table[..., 3], plan.query.table[..., 4], plan.key.table[..., 3]
    # Keys of a pad span are as good as padding; queries of one see nothing, which a block with others cannot say.
    exists = plan.query.order >= 0
    found = [_uniform(x, side, x_exists) for x, side, x_exists in (
        (whole, plan.query, exists), (ruled, plan.query, exists), (span, plan.key, span != 0),
    )]  # fmt: skip
    return None if any(x is None for x in found) else found[2]


def _uniform(values: torch.Tensor, side: Side, exists: torch.Tensor) -> torch.Tensor | None:
    """The value that all tokens of a block share, int32 `[blocks]`; None if any block has several."""
    blocks = values.unflatten(1, (side.blocks, side.block))
    padding = ~exists.unflatten(1, (side.blocks, side.block))
    low = blocks.masked_fill(padding, torch.iinfo(values.dtype).max).amin((0, 2))
    high = blocks.masked_fill(padding, 0).amax((0, 2))
    empty = padding.all(0).all(1)
    return high if bool(((low == high) | empty).all()) else None


def _box(plan: BlockPlan, spans: torch.Tensor) -> KernelRule:
    boxed = plan.rule.kind == RuleKind.BOX
    query = plan.query.table[..., :3].long() * boxed
    key, exists = plan.key.table[..., :3].long() * boxed, plan.key.table[..., 3] != 0
    tables = [plan.rule.axis_tables(axis) for axis in range(3)] if boxed else []
    last = [int(tables[axis][1].max()) if boxed else 0 for axis in range(3)]
    highest = [max(int(key[..., axis].max()), last[axis]) for axis in range(3)]
    # Padding stands one place beyond the last column, where nobody sees it.
    widths = [highest[0].bit_length(), highest[1].bit_length(), (highest[2] + 1).bit_length()]
    shift_y = widths[2] + 1
    shifts = (shift_y + widths[1] + 1, shift_y, 0)
    if shifts[0] + widths[0] + 1 > 31:
        raise UnsupportedError(
            f"a grid of {' x '.join(str(n + 1) for n in highest)} places is larger than what a BOX rule takes on a GPU."
        )
    guards = sum(1 << shift + width for shift, width in zip(shifts, widths, strict=True))

    def word(t, y, x):
        return (t << shifts[0]) + (y << shifts[1]) + x

    if boxed:
        # Tokens that no rule is for, of a reference image say, may stand beyond the grid.
        place = [query[..., axis].clamp(max=len(tables[axis][0]) - 1) for axis in range(3)]
        first, final = (word(*(tables[axis][end][place[axis]].long() for axis in range(3))) for end in (0, 1))
    else:
        first = final = query[..., 0]
    table = torch.stack([first - guards, final + guards, plan.query.table[..., 3].long()], dim=-1)
    words = torch.where(exists, word(*key.unbind(-1)), highest[2] + 1)[..., None]
    every = torch.tensor([guards, word(*highest) + guards])
    parameters = torch.cat([every.to(spans), spans])
    return KernelRule(int(RuleKind.BOX), table.to(torch.int32), words.to(torch.int32), parameters)


def whole_ball(rule: Rule, last: tuple[int, int, int]) -> tuple[int, int, int, int] | None:
    """Whole numbers a, b, c, r with which a METRIC rule is a dy^2 + b dx^2 + c dt^2 < r, exact in float32.

    Args:
        rule: A METRIC rule.
        last: The highest t, y and x of any token.

    Returns:
        The numbers, or None if there are none.
    """
    a, b, sink_frames, _ = rule.parameters[:METRIC_HEADER].tolist()
    limits, (t, y, x) = rule.limits().long().cpu(), last
    if sink_frames or t >= len(limits):
        return None
    # Beyond the farthest pair all limits say the same. From the centre, every sum stays below four times `half`.
    farthest, half = (a * n * n + b * m * m for n, m in ((y, x), ((y + 1) // 2, (x + 1) // 2)))
    if t == 0:
        return (a, b, 0, min(int(limits[0]), farthest + 1)) if 4 * half < _EXACT else None
    apart, limits = torch.arange(1, t + 1) ** 2, limits[: t + 1]
    beyond = limits[1:].clamp(min=0)
    scale = 1
    while scale <= _MOST_SCALE and 4 * scale * half < _EXACT:
        # In one frame r stands between the last square that is near enough and the first that is not.
        r = (scale * limits[0] - torch.arange(scale))[:, None]
        least = torch.where(beyond > farthest, 0, -((scale * beyond - r) // apart)).amax(1).clamp(min=0)
        most = torch.where(beyond > 0, (r - scale * (beyond - 1) - 1) // apart, _EXACT).amin(1)
        fits = (least <= most) & (4 * (scale * half + least * ((t + 1) // 2) ** 2) < _EXACT) & (r[:, 0] < _EXACT)
        if bool(fits.any()):
            best = int(fits.nonzero()[0])
            return scale * a, scale * b, int(least[best]), int(r[best])
        scale *= 2
    return None


def _ball(plan: BlockPlan, spans: torch.Tensor, last: tuple[int, int, int], ball: tuple[int, ...]) -> KernelRule:
    a, b, c, r = ball
    centre = torch.tensor([n // 2 for n in last], device=spans.device)
    (t, y, x), (k_t, k_y, k_x) = ((side.table[..., :3] - centre).double().unbind(-1) for side in (plan.query, plan.key))
    norm = torch.where(plan.key.table[..., 3] != 0, a * k_y**2 + b * k_x**2 + c * k_t**2, _FAR)
    frames = [-2 * c * t] if c else []
    columns = [-2 * a * y, -2 * b * x, *frames, r - a * y**2 - b * x**2 - c * t**2]
    query = [column.float().view(torch.int32) for column in columns] + [plan.query.table[..., 3]]
    key = [column.float().view(torch.int32) for column in (norm, k_y, k_x, *([k_t] if c else []))]
    parameters = torch.cat([spans.new_tensor([plan.key.slots]), spans])
    return KernelRule(BALL if c else DISC, torch.stack(query, -1), torch.stack(key, 1), parameters)


def _bits(plan: BlockPlan, spans: torch.Tensor) -> KernelRule:
    query_side, key_side, columns = plan.rule.parameters.tolist()
    row, column = (torch.arange(side.slots, device=spans.device) % side.block for side in (plan.query, plan.key))
    shift = (row // query_side * columns).to(torch.int32).expand(plan.query.table.shape[:2])
    query = torch.stack([shift, plan.query.table[..., 4], plan.query.table[..., 3]], -1)
    mask = torch.where(plan.key.table[..., 3] != 0, 1 << column // key_side, _PADDING)
    return KernelRule(int(RuleKind.BITS), query, mask[..., None].to(torch.int32), spans)
