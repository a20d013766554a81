"""Grids, spans and layouts: parsing, defaults, refusals."""

import pytest

from fastdiff_kernels import Grid, InvalidInputError, Span, TokenLayout


@pytest.mark.parametrize(
    ("text", "grid"), [("21x45x80", Grid(21, 45, 80)), (" 9X17x23 ", Grid(9, 17, 23)), ("64x48", Grid(1, 64, 48))]
)
def test_grid_parses(text, grid):
    assert Grid.parse(text) == grid
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize("text", ["", "12", "3x4x5x6", "ax4x5", "0x4x5", "-1x4x5", "3x4x", "1" * 5000 + "x4", None])
def test_grid_refuses(text):
    with pytest.raises(InvalidInputError, match="grid"):
        Grid.parse(text)


@pytest.mark.parametrize("tokens", [0, -1, 2.5, True])
def test_spans_of_no_whole_number_of_tokens_are_refused(tokens):
    with pytest.raises(InvalidInputError, match="whole number"):
        Span("text", tokens)


def test_coordinates_are_row_major():
    assert Grid(2, 2, 3).coordinates().tolist()[:4] == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0]]


def test_default_visibility():
    grid = Span("grid", 6, Grid(1, 2, 3))
    spans = (Span("text", 2), grid, Span("pad", 1))
    keys = (*spans, Span("pooled", 4), Span("reference", 6, Grid(1, 2, 3)))
    layout = TokenLayout(spans, keys)
    assert layout.visibility == (
        ("all", "all", "none", "none", "all"),
        ("all", "rule", "none", "all", "all"),
        ("none", "none", "none", "none", "none"),
    )
    assert (layout.query_tokens, layout.key_tokens, layout.grid) == (9, 19, Grid(1, 2, 3))


def test_layout_is_a_cache_key():
    assert TokenLayout.self_attention(Grid(2, 3, 4), 5) == TokenLayout.self_attention(Grid(2, 3, 4), 5)
    assert len({TokenLayout.self_attention(Grid(2, 3, 4)), TokenLayout.self_attention(Grid(2, 3, 4), 0, 1)}) == 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: Grid(1, 2, 0),
        lambda: Grid(1, 2.5, 3),
        lambda: Span("image", 4),
        lambda: Span("text", 0),
        lambda: Span("grid", 4),
        lambda: Span("grid", 4, Grid(1, 2, 3)),
        lambda: TokenLayout((), ()),
        lambda: TokenLayout((Span("text", 1),), (Span("text", 1),), (("some",),)),
        lambda: TokenLayout((Span("text", 1),), (Span("text", 1),), (("all", "all"),)),
        lambda: TokenLayout((Span("text", 1),) * 32, (Span("text", 1),)),
        lambda: TokenLayout((Span("text", 1),), (Span("text", 1),)).grid,
    ],
)
def test_bad_layouts_are_refused(build):
    with pytest.raises(InvalidInputError):
        build()
