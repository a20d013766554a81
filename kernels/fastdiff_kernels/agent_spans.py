"""AgentSpans: who stands beside the grid in agent attention, who sees whom, and how many scores that makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .errors import UnsupportedError
from .layout import Grid, Span, TokenLayout

Ranges = tuple[tuple[int, int], ...]
"""Tokens of one side as (first, one past the last), ascending."""


@dataclass(frozen=True)
class AgentSpans:
    """The spans of a layout as agent attention treats them: one grid on each side, and what stands beside it.

    Attributes:
        layout: Spans of both sides and who sees whom.
        merged: Grid tokens that a call lacks, because they were merged into others before it.
        query_grid, key_grid: First and one past the last grid token of each side, as a call has them.
        seen: The keys that agents see.
        beside: The same without the grid's own: the keys that queries of the grid see directly.
        rows: For each span of queries its ends, and the keys that it sees; None stands for the grid's own rule.

    Raises:
        UnsupportedError: If a side has no grid span or several, the two differ, grid tokens do not see each other by
            the method's rule, or it should rule elsewhere.
    """

    layout: TokenLayout
    merged: int = 0
    query_grid: tuple[int, int] = field(init=False)
    key_grid: tuple[int, int] = field(init=False)
    seen: Ranges = field(init=False)
    beside: Ranges = field(init=False)
    rows: tuple[tuple[int, int, Ranges | None], ...] = field(init=False)

    def __post_init__(self):
        layout = self.layout
        own = _only_grid(layout.query), _only_grid(layout.key)
        _check(layout, own)
        query, key = _ends(layout.query, self.merged), _ends(layout.key, self.merged)
        seen = _visible(layout.visibility[own[0]], key)
        rows = zip(query, layout.visibility, strict=True)
        derived = {
            "query_grid": query[own[0]],
            "key_grid": key[own[1]],
            "seen": _joined(seen),
            "beside": _joined(tuple(ends for ends in seen if ends != key[own[1]])),
            "rows": tuple(
                (*ends, None if index == own[0] else _joined(_visible(cells, key)))
                for index, (ends, cells) in enumerate(rows)
            ),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def grid(self) -> Grid:
        return self.layout.grid

    @property
    def grid_tokens(self) -> int:
        """Grid tokens of a call."""
        return self.query_grid[1] - self.query_grid[0]

    def scores(self, agents: int) -> int:
        """Scores that one head computes: both softmaxes, and the rows of the queries beside the grid."""
        total = agents * _count(self.seen) + self.grid_tokens * (agents + _count(self.beside))
        return total + sum((stop - start) * _count(ranges) for start, stop, ranges in self.rows if ranges is not None)

    def density(self, agents: int) -> float:
        """Computed scores / (query tokens x key tokens) of the layout: text counts, and so do tokens merged away."""
        return self.scores(agents) / (self.layout.query_tokens * self.layout.key_tokens)


def _check(layout: TokenLayout, own: tuple[int, int]) -> None:
    query, key = layout.query[own[0]], layout.key[own[1]]
    if query.grid != key.grid:
        raise UnsupportedError(
            f"the queries lie on a grid of {query.grid} and the keys on {key.grid}; agents need one grid for both."
        )
    for row, cells in enumerate(layout.visibility):
        for column, cell in enumerate(cells):
            if (cell == "rule") != ((row, column) == own):
                raise UnsupportedError(
                    f"{layout.query[row].kind} queries see {layout.key[column].kind} keys by {cell!r}; agents take "
                    "'rule' among the tokens of the grid, and 'all' or 'none' elsewhere."
                )


def _only_grid(spans: tuple[Span, ...]) -> int:
    found = [index for index, span in enumerate(spans) if span.kind == "grid"]
    if len(found) != 1:
        raise UnsupportedError(f"a side of this layout has {len(found)} grid spans; agents take one on each side.")
    return found[0]


def _ends(spans: tuple[Span, ...], merged: int) -> Ranges:
    ends, start = [], 0
    for span in spans:
        stop = start + span.tokens - (merged if span.kind == "grid" else 0)
        ends.append((start, stop))
        start = stop
    return tuple(ends)


def _visible(cells: tuple[str, ...], key: Ranges) -> Ranges:
    return tuple(ends for cell, ends in zip(cells, key, strict=True) if cell != "none")


def _joined(ranges: Ranges) -> Ranges:
    """The same tokens in as few ranges as can be: one range costs no copy."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    return tuple(joined)


def _count(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)
