"""Reads a picture's grid, and the reference images behind it, from the positions that packed image tokens carry."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastdiff_kernels import Grid, InvalidInputError, Span

from .contents import read_once


class Image(NamedTuple):
    """A run of tokens with one number, and its grid if it is a whole one row by row."""

    number: int
    tokens: int
    grid: Grid | None


def image_spans(ids: torch.Tensor, picture: int = 0, text: int = 0) -> tuple[Span, ...]:
    """The grid span of the picture, and a reference span for each reference image behind it.

    Args:
        ids: (image, row, column, ...) of each token, `[tokens, 3 or more]` or `[batch, tokens, 3 or more]`.
        picture: The number of the image that is drawn; others are references.
        text: How many of the tokens are text that stands before the images.

    Raises:
        InvalidInputError: If the picture does not come first, or is not a whole grid row by row.
    """
    first, *others = read_once(ids, _images) if not text else _images(read_once(ids, _rows)[text:])
    if first.number != picture or first.grid is None or any(image.number == picture for image in others):
        raise InvalidInputError(
            f"positions of {ids.shape[-2] - text} image tokens do not say a grid: the picture must come first, with "
            f"{picture} in the first column and rows and columns counted one by one, row by row, as the model's own "
            "pipeline makes them."
        )
    # All see references, so that where their tokens stand does not matter.
    return Span("grid", first.tokens, first.grid), *(Span("reference", image.tokens) for image in others)


def _rows(ids: torch.Tensor) -> torch.Tensor:
    return (ids if ids.ndim == 2 else ids[0]).detach().cpu()


def _images(ids: torch.Tensor) -> tuple[Image, ...]:
    rows = _rows(ids)
    starts = (rows[1:, 0] != rows[:-1, 0]).nonzero().flatten() + 1
    return tuple(Image(int(image[0, 0]), len(image), _raster(image)) for image in torch.tensor_split(rows, starts))


def _raster(image: torch.Tensor) -> Grid | None:
    row, column = image[:, 1], image[:, 2]
    # Counted and not read off the largest position, which half precision rounds above 256.
    width = int((row == row[0]).cumprod(0).sum())
    height = len(image) // width
    natural = torch.arange(height * width)
    whole = (
        height * width == len(image)
        and torch.equal(row, (natural // width + int(row[0])).to(row.dtype))
        and torch.equal(column, (natural % width + int(column[0])).to(column.dtype))
    )
    return Grid(1, height, width) if whole else None
