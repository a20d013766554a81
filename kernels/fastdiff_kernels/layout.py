"""Where the tokens of one attention call stand: grids, spans and who sees whom. Knows no model and no method."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from .errors import InvalidInputError

SPAN_KINDS = ("grid", "text", "reference", "pooled", "pad")
VISIBILITIES = ("all", "none", "rule")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Grid:
    """Visual tokens as frames x height x width, width fastest.

    Raises:
        InvalidInputError: If a side is no whole number of at least 1.
    """

    frames: int
    height: int
    width: int

    def __post_init__(self):
        for name in ("frames", "height", "width"):
            value = getattr(self, name)
            if not _is_count(value):
                raise InvalidInputError(f"grid {name} is {value!r}; it must be a whole number of at least 1.")

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Reads `"21x45x80"` (frames x height x width) or `"64x64"` (a picture).

        Raises:
            InvalidInputError: If the text is neither form.
        """
        match = re.fullmatch(r"(?:(\d{1,9})x)?(\d{1,9})x(\d{1,9})", str(text).strip().lower())
        if match is None:
            raise InvalidInputError(
                f"grid is {text!r}; write frames x height x width, such as 21x45x80, or height x width, such as 64x64."
            )
        frames, height, width = match.groups()
        return cls(int(frames or 1), int(height), int(width))

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    def coordinates(self) -> torch.Tensor:
        """Coordinates (t, y, x) of the tokens in their natural order, int32 `[tokens, 3]`."""
        axes = (torch.arange(n, dtype=torch.int32, device="cpu") for n in (self.frames, self.height, self.width))
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Span:
    """A run of neighbouring tokens of one kind; `grid` spans lie on a grid, `pooled` and `reference` ones may.

    Raises:
        InvalidInputError: If there is no such kind, no token, or a grid is missing or of another size.
    """

    kind: str
    tokens: int
    grid: Grid | None = None

    def __post_init__(self):
        if self.kind not in SPAN_KINDS:
            raise InvalidInputError(f"span kind is {self.kind!r}; allowed are {', '.join(SPAN_KINDS)}.")
        if not _is_count(self.tokens):
            raise InvalidInputError(
                f"a {self.kind} span has {self.tokens!r} tokens; give a whole number, and leave empty spans out."
            )
        if self.kind == "grid" and self.grid is None:
            raise InvalidInputError("a grid span needs its grid.")
        if self.grid is not None and self.grid.tokens != self.tokens:
            raise InvalidInputError(f"a {self.kind} span of {self.tokens} tokens cannot lie on a grid of {self.grid}.")


def _default_visibility(query: Span, key: Span) -> str:
    if "pad" in (query.kind, key.kind) or (key.kind == "pooled" and query.kind == "text"):
        return "none"
    return "rule" if query.kind == key.kind == "grid" else "all"


@dataclass(frozen=True)
class TokenLayout:
    """The sequence of one attention call: spans on the query and on the key side, and who sees whom.

    Args:
        query: Spans of the query side, in token order.
        key: Spans of the key side, in token order.
        visibility: For each query span (row) and key span (column) `"all"`, `"none"` or `"rule"` (the
            method decides token by token). Left out, text sees all and is seen by all, pooled keys are
            hidden from text, padding from everyone, and the method rules among grid tokens.

    Raises:
        InvalidInputError: If a side has no span or more than 31, or the table has another shape or other words.
    """

    query: tuple[Span, ...]
    key: tuple[Span, ...]
    visibility: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        if not self.query or not self.key:
            raise InvalidInputError("a layout needs at least one span on the query and one on the key side.")
        if max(len(self.query), len(self.key)) > 31:
            raise InvalidInputError("a layout has at most 31 spans on a side; join neighbours of the same kind.")
        if not self.visibility:
            table = tuple(tuple(_default_visibility(q, k) for k in self.key) for q in self.query)
            object.__setattr__(self, "visibility", table)
        fits = len(self.visibility) == len(self.query) and all(len(row) == len(self.key) for row in self.visibility)
        if not fits or any(cell not in VISIBILITIES for row in self.visibility for cell in row):
            raise InvalidInputError(
                f"visibility must be a {len(self.query)} x {len(self.key)} table of {', '.join(VISIBILITIES)}."
            )

    @classmethod
    def self_attention(cls, grid: Grid, text_before: int = 0, text_after: int = 0) -> TokenLayout:
        """The common case: grid tokens, with text before or after them in the same sequence."""
        spans = [Span("text", text_before)] if text_before else []
        spans.append(Span("grid", grid.tokens, grid))
        spans += [Span("text", text_after)] if text_after else []
        return cls(tuple(spans), tuple(spans))

    @property
    def query_tokens(self) -> int:
        return sum(span.tokens for span in self.query)

    @property
    def key_tokens(self) -> int:
        return sum(span.tokens for span in self.key)

    @property
    def grid(self) -> Grid:
        """The grid of the first grid span on the query side.

        Raises:
            InvalidInputError: If the query side has no grid span.
        """
        for span in self.query:
            if span.kind == "grid":
                return span.grid
        raise InvalidInputError("this layout has no grid span on its query side.")
