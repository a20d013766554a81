"""Reads a picture's grid, and the reference images behind it, from the positions that packed image tokens carry."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from fastdiff_kernels import Grid, InvalidInputError, Span

# A pipeline hands the same tensor to every step, so that a run waits for the device once.
_known = WeakTensorKeyDictionary()


def image_spans(ids: torch.Tensor) -> tuple[Span, ...]:
    """The grid span of the picture, and a reference span for each reference image behind it.

    Args:
        ids: (image, row, column) of each token, `[tokens, 3]` or `[batch, tokens, 3]`; image 0 is the picture.

    Raises:
        InvalidInputError: If the picture does not come first, or is not a whole grid row by row.
    """
    version = None if ids.is_inference() else ids._version
    known = _known.get(ids)
    if known is None or known[0] != version:
        known = _known[ids] = version, _read(ids)
    return known[1]


def _read(ids: torch.Tensor) -> tuple[Span, ...]:
    rows = (ids if ids.ndim == 2 else ids[0]).detach().cpu()
    starts = (rows[1:, 0] != rows[:-1, 0]).nonzero().flatten() + 1
    picture, *references = torch.tensor_split(rows, starts)
    grid = _raster(picture)
    if rows[0, 0] != 0 or grid is None or any(image[0, 0] == 0 for image in references):
        raise InvalidInputError(
            f"img_ids of {len(rows)} tokens do not say a grid: the picture must come first, with 0 in the first column "
            "and rows and columns counted from 0, row by row, as FluxPipeline makes them."
        )
    # All see references, so that where their tokens stand does not matter.
    return Span("grid", grid.tokens, grid), *(Span("reference", len(image)) for image in references)


def _raster(image: torch.Tensor) -> Grid | None:
    row, column = image[:, 1], image[:, 2]
    # Counted and not read off the largest position, which half precision rounds above 256.
    width = int((row == row[0]).cumprod(0).sum())
    height = len(image) // width
    natural = torch.arange(height * width)
    whole = (
        height * width == len(image)
        and torch.equal(row, (natural // width).to(row.dtype))
        and torch.equal(column, (natural % width).to(column.dtype))
    )
    return Grid(1, height, width) if whole else None
