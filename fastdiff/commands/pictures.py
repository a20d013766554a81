"""Videos and contact sheets from frames. Knows tensors and files; knows no model."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdiff_kernels.errors import InvalidInputError, MissingDependencyError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

INSTALL = 'pip install "fastdiff-attention[demo]"'
INK, PAPER, GAP = (24, 24, 24), (250, 250, 250), 8


def require_writers(video: bool) -> None:
    """Checks before a long run that pictures and, if asked, videos can be written.

    Raises:
        MissingDependencyError: If a package is missing; the message says how to get it.
    """
    try:
        import PIL.Image  # noqa: F401

        if video:
            import imageio_ffmpeg

            imageio_ffmpeg.get_ffmpeg_exe()
    except ImportError as error:
        what = "videos needs imageio, imageio-ffmpeg and pillow" if video else "pictures needs pillow"
        raise MissingDependencyError(f"writing {what}: {INSTALL}.") from error
    except RuntimeError as error:
        raise MissingDependencyError(
            f"no ffmpeg was found: {INSTALL} brings one, or set IMAGEIO_FFMPEG_EXE to yours."
        ) from error


def write_video(path: Path, frames: Sequence[Image], fps: int) -> None:
    """Writes pictures of one even size as an H.264 video.

    Raises:
        InvalidInputError: If the encoder stopped, as it does on a full disk.
    """
    import imageio.v2 as imageio
    import numpy as np

    try:
        with imageio.get_writer(
            path, format="FFMPEG", fps=fps, codec="libx264", quality=8, macro_block_size=2, ffmpeg_log_level="error"
        ) as writer:
            for frame in frames:
                writer.append_data(np.asarray(frame))
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInputError(f"ffmpeg could not write {path.name} ({reason}); is the disk full?") from error


def images(video: torch.Tensor, least_side: int = 0) -> list[Image]:
    """Frames `[frames, 3, height, width]` in [0, 1] as pictures, enlarged by a whole factor to a least height."""
    from PIL import Image

    array = (video.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    factor = max(1, -(-least_side // array.shape[1]))
    size = (array.shape[2] * factor, array.shape[1] * factor)
    return [Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC) for frame in array]


def write(path: Path, frames: Sequence[Image], fps: int | None) -> None:
    """Writes a video, or one picture where there are no frames per second.

    Raises:
        InvalidInputError: If the video encoder stopped, as it does on a full disk.
    """
    if fps is None:
        frames[0].save(path)
    else:
        write_video(path, frames, fps)


def beside(left: Sequence[Image], right: Sequence[Image], labels: tuple[str, str]) -> list[Image]:
    """Two videos or pictures next to each other, each under its label."""
    from PIL import Image, ImageDraw

    width, height = left[0].size
    font = _font(max(13, height // 18))
    lines = [_wrapped(label, width - GAP, font) for label in labels]
    bar = _even(max(_text_height(text, font) for text in lines) + GAP)
    head = Image.new("RGB", (_even(2 * width + GAP), bar + _even(height)), PAPER)
    draw = ImageDraw.Draw(head)
    for column, text in enumerate(lines):
        draw.multiline_text((column * (width + GAP) + GAP // 2, GAP // 2), text, fill=INK, font=font)
    frames = []
    for one, other in zip(left, right, strict=True):
        frame = head.copy()
        frame.paste(one, (0, bar))
        frame.paste(other, (width + GAP, bar))
        frames.append(frame)
    return frames


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image]]], title: str, columns: int = 6) -> Image:
    """Some frames of each video in a row, under a label; frames of one column are from the same time."""
    from PIL import Image, ImageDraw

    width, height = rows[0][1][0].size
    count = min(columns, len(rows[0][1]))
    chosen = [round(i * (len(rows[0][1]) - 1) / max(1, count - 1)) for i in range(count)]
    font, small = _font(18), _font(15)
    sheet_width = count * (width + GAP) + GAP
    title = _wrapped(title, sheet_width - 2 * GAP, font)
    labels = [_wrapped(label, sheet_width - 2 * GAP, small) for label, _ in rows]
    top = _text_height(title, font) + 2 * GAP
    label_heights = [_text_height(label, small) + GAP for label in labels]
    number_height = _text_height("0", small) + GAP
    sheet = Image.new(
        "RGB", (sheet_width, top + sum(label_heights) + len(rows) * (height + GAP) + number_height), PAPER
    )
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((GAP, GAP), title, fill=INK, font=font)
    y = top
    for label, label_height, (_, frames) in zip(labels, label_heights, rows, strict=True):
        draw.multiline_text((GAP, y), label, fill=INK, font=small)
        y += label_height
        for column, index in enumerate(chosen):
            sheet.paste(frames[index], (GAP + column * (width + GAP), y))
        y += height + GAP
    for column, index in enumerate(chosen):
        draw.text((GAP + column * (width + GAP), y), f"frame {index}", fill=INK, font=small)
    return sheet


def _font(size: int) -> FreeTypeFont:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(text: str, width: int, font: FreeTypeFont) -> str:
    letters = max(8, int(width / font.getlength("n")))
    return "\n".join(textwrap.wrap(text, letters)) or " "


def _text_height(text: str, font: FreeTypeFont) -> int:
    from PIL import Image, ImageDraw

    box = ImageDraw.Draw(Image.new("RGB", (1, 1))).multiline_textbbox((0, 0), text, font=font)
    return int(box[3]) + 2


def _even(pixels: int) -> int:
    return pixels + pixels % 2
