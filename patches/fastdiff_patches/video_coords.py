"""Reads a video's grid, and the clips beside it, from the coordinates that packed video tokens carry."""

from __future__ import annotations

import torch

from fastdiff_kernels import Grid, InvalidInputError, Span

from .contents import read_once


def video_spans(coordinates: torch.Tensor) -> tuple[Span, ...]:
    """The grid span of the video among the spans of the clips that condition it, in token order.

    Clips follow each other and have frames of the same size; where time does not go on, another one begins. The
    longest is the video, the last of the longest.

    Args:
        coordinates: (time, row, column) of each token, `[batch, 3, tokens]`.

    Raises:
        InvalidInputError: If they are no frames row by row.
    """
    return read_once(coordinates, _read)


def _read(coordinates: torch.Tensor) -> tuple[Span, ...]:
    time, row, column = coordinates[0].detach().double().cpu()
    frame = _run(time)
    width = _run(row[:frame])
    whole = len(time) % frame == 0 and frame % width == 0
    if whole:
        time, row, column = (
            time.view(-1, frame),
            row.view(-1, frame // width, width),
            column.view(-1, frame // width, width),
        )
        whole = (
            torch.equal(time, time[:, :1].expand_as(time))
            and torch.equal(row, row[:1, :, :1].expand_as(row))
            and torch.equal(column, column[:1, :1].expand_as(column))
            and bool((row[0, :, 0].diff() > 0).all() and (column[0, 0].diff() > 0).all())
        )
    if not whole:
        raise InvalidInputError(
            f"video_coords of {coordinates.shape[-1]} tokens are no frames of equal size, row by row, so the grid is "
            "not known. Give num_frames, height and width, or describe the tokens with layout=."
        )
    starts = [0, *((time[:, 0].diff() <= 0).nonzero().flatten() + 1).tolist(), len(time)]
    clips = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    video = max(range(len(clips)), key=lambda index: (clips[index], index))
    grid = Grid(clips[video], frame // width, width)
    return tuple(
        Span("grid", grid.tokens, grid) if index == video else Span("reference", frames * frame)
        for index, frames in enumerate(clips)
    )


def _run(values: torch.Tensor) -> int:
    """How many values at the beginning are the same."""
    return int((values == values[0]).cumprod(0).sum())
