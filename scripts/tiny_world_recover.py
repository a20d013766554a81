"""Reads colour, shape and direction back from a tiny-world clip by image processing; it learns nothing."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from tiny_world import COLOURS, HEADINGS, SHAPES, shape_mask
from torch import Tensor
from torch.nn import functional as F

WINDOW = 48
ANGLES = 12


@dataclass(frozen=True)
class Recovered:
    """What a clip shows: the larger object's colour, shape and heading, and all colours in view.

    `direction` is a key of `HEADINGS` or "still"; all is None (and `colours` empty) when nothing is seen.
    """

    colour: str | None
    shape: str | None
    direction: str | None
    colours: frozenset[str]


def recover(video: Tensor) -> Recovered:
    """Measures one clip.

    Args:
        video: `[3, frames, height, width]` in [-1, 1].
    """
    labels = _label(video.detach().float()).cpu()
    counts = torch.stack([(labels == index).sum() for index in range(len(COLOURS))])
    main = int(counts.argmax())
    # Fewer pixels in the whole clip than a small object has in one frame: nothing was drawn.
    if counts[main] < 0.01 * labels.numel():
        return Recovered(None, None, None, frozenset())
    names = list(COLOURS)
    seen = frozenset(names[index] for index in range(len(names)) if counts[index] > 0.2 * counts[main])
    mask = labels == main
    return Recovered(names[main], _shape(mask), _direction(mask), seen)


def _label(video: Tensor) -> Tensor:
    """`[frames, height, width]`: index of the nearest palette colour, `len(COLOURS)` for the grey ground."""
    pixels = (video.permute(1, 2, 3, 0) + 1) / 2
    palette = torch.tensor(list(COLOURS.values()), device=video.device)
    to_palette = torch.cdist(pixels.reshape(-1, 3), palette)
    grey = pixels.mean(-1, keepdim=True).clamp(0.15, 0.8)
    to_grey = (pixels - grey).norm(dim=-1).reshape(-1, 1)
    return torch.cat([to_palette, to_grey], 1).argmin(1).view(pixels.shape[:3])


def _centres(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Area in pixels `[frames]` and centroid `[frames, 2]` (x, y in half short sides)."""
    height, width = mask.shape[1:]
    short = min(height, width)
    weight = mask.float()
    area = weight.sum((1, 2))
    x = ((torch.arange(width) + 0.5) * 2 - width) / short
    y = ((torch.arange(height) + 0.5) * 2 - height) / short
    total = area.clamp(min=1)
    return area, torch.stack([(weight.sum(1) * x).sum(1) / total, (weight.sum(2) * y).sum(1) / total], 1)


def _shape(mask: Tensor) -> str:
    area, centre = _centres(mask)
    border = mask[:, 0].any(1) | mask[:, -1].any(1) | mask[:, :, 0].any(1) | mask[:, :, -1].any(1)
    whole = (area > 0.75 * area.max()) & ~border
    frames = whole.nonzero().flatten() if whole.any() else area.argmax()[None]
    frames = frames[torch.linspace(0, len(frames) - 1, min(5, len(frames))).round().long()]
    templates = _templates()
    scores = torch.zeros(len(SHAPES))
    for frame in frames.tolist():
        view = _normalised(mask[frame], centre[frame], float(area[frame]))
        both, either = (view & templates).sum((2, 3)), (view | templates).sum((2, 3))
        scores += (both / either.clamp(min=1)).amax(1)
    return SHAPES[int(scores.argmax())]


def _normalised(mask: Tensor, centre: Tensor, area: float) -> Tensor:
    """The object moved to the middle of a square window whose half side is the root of its area."""
    height, width = mask.shape
    short = min(height, width)
    half = math.sqrt(max(area, 1)) * 2 / short
    axis = torch.linspace(-half, half, WINDOW)
    y, x = torch.meshgrid(axis + centre[1], axis + centre[0], indexing="ij")
    grid = torch.stack([x * short / width, y * short / height], -1)
    return F.grid_sample(mask[None, None].float(), grid[None], align_corners=False)[0, 0] > 0.5


@lru_cache(maxsize=1)
def _templates() -> Tensor:
    """`[shapes, angles, WINDOW, WINDOW]` booleans, normalised as the objects are."""
    rows = []
    for shape in range(len(SHAPES)):
        for step in range(ANGLES):
            # All shapes look the same after 120 or 90 degrees; the finer of both steps serves all.
            mask = shape_mask(shape, step / ANGLES * 2 * math.pi / 3, 192, 1.5)
            area, centre = _centres(mask[None])
            scaled = _normalised(mask, centre[0], float(area[0]))
            rows.append(scaled)
    return torch.stack(rows).view(len(SHAPES), ANGLES, WINDOW, WINDOW)


def _direction(mask: Tensor) -> str:
    area, centre = _centres(mask)
    step = max(1, min(4, len(area) // 4))
    if len(area) <= step:
        return "still"
    seen = area > 0.3 * area.max()
    shift = centre[step:] - centre[:-step]
    # A jump across the frame is the wrap from one side to the other, not motion.
    shift = shift[seen[step:] & seen[:-step] & (shift.norm(dim=1) < 1)]
    if not len(shift):
        return "still"
    x, y = (shift.median(0).values / step).tolist()
    length = math.hypot(x, y)
    if length < 0.005:
        return "still"
    signs = tuple(int(math.copysign(1, part)) if abs(part) > 0.4 * length else 0 for part in (x, y))
    return next(name for name, way in HEADINGS.items() if way == signs)
