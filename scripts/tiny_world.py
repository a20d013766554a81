"""The tiny world: procedural clips of coloured shapes, their captions and their truth; it trains nothing.

Lengths are in half short sides of the frame, y points down, time is in frames. Velocities never depend on the
number of frames: a longer clip of the same seed starts with the shorter one and goes on.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.08, 0.10),
    "green": (0.08, 0.65, 0.15),
    "blue": (0.10, 0.22, 0.92),
    "yellow": (0.96, 0.90, 0.10),
    "purple": (0.58, 0.08, 0.78),
    "orange": (1.00, 0.48, 0.00),
    "cyan": (0.10, 0.85, 0.90),
    "white": (1.00, 1.00, 1.00),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
HEADINGS: dict[str, tuple[int, int]] = {
    "up": (0, -1),
    "down": (0, 1),
    "left": (-1, 0),
    "right": (1, 0),
    "up and left": (-1, -1),
    "up and right": (1, -1),
    "down and left": (-1, 1),
    "down and right": (1, 1),
}
GROUNDS = ("grey", "gradient", "striped", "checkered")
SPEEDS = {"slowly": 0.5, "": 1.0, "fast": 1.8}
MOTIONS = {
    "moving": 0.42,
    "rotating": 0.14,
    "bouncing": 0.08,
    "still": 0.06,
    "colliding": 0.15,
    "passing": 0.15,
}
PAIRED = ("colliding", "passing")
UNKNOWN = "<unk>"

WORDS = tuple(
    dict.fromkeys(
        " ".join(
            (
                *COLOURS,
                *SHAPES,
                *HEADINGS,
                *GROUNDS,
                *SPEEDS,
                "a an the object shape moving rotating clockwise anticlockwise bouncing standing still",
                "colliding passing behind over ground and",
            )
        ).split()
    )
)


@dataclass(frozen=True)
class Scene:
    """A batch of clips before they are drawn, on the CPU.

    The first object is drawn first; the second one exists where the motion is in `PAIRED`.

    Attributes:
        motion, heading, speed, turn, ground: `[batch]` indices into the tables (turn: 1 is clockwise).
        shape, colour: `[batch, 2]` indices.
        track: `[batch, 2, frames, 3]`: x, y and angle of both objects.
        radius: `[batch, 2]`, 0 where there is no second object.
        pattern: `[batch, 4]`: level, contrast, period and phase of the ground.
        height, width: pixels.
    """

    motion: Tensor
    heading: Tensor
    speed: Tensor
    turn: Tensor
    ground: Tensor
    shape: Tensor
    colour: Tensor
    track: Tensor
    radius: Tensor
    pattern: Tensor
    height: int
    width: int

    def __len__(self) -> int:
        return len(self.motion)


def sample_scene(batch: int, frames: int, height: int, width: int, generator: torch.Generator) -> Scene:
    """Draws `batch` random clips of `[frames, height, width]` from a CPU generator."""
    draw = torch.rand(24, batch, generator=generator).unbind(0)
    motion = torch.multinomial(torch.tensor(list(MOTIONS.values())), batch, replacement=True, generator=generator)
    names = list(MOTIONS)
    rotating = motion == names.index("rotating")
    paired = motion >= names.index(PAIRED[0])

    first_colour = _index(draw[0], len(COLOURS))
    colour = torch.stack([first_colour, (first_colour + 1 + _index(draw[1], len(COLOURS) - 1)) % len(COLOURS)], 1)
    shape = torch.stack([_index(draw[2], len(SHAPES)), _index(draw[3], len(SHAPES))], 1)
    # A rotating circle or ring looks still.
    cornered = torch.tensor([SHAPES.index(name) for name in ("square", "triangle", "cross")])
    shape[:, 0] = torch.where(rotating, cornered[_index(draw[2], 3)], shape[:, 0])
    heading = torch.where((draw[4] < 0.75) | paired, _index(draw[5], 4), 4 + _index(draw[5], 4))
    speed, turn = _index(draw[6], len(SPEEDS)), _index(draw[7], 2)

    radius = torch.stack([0.22 + 0.16 * draw[8], torch.zeros(batch)], 1)
    radius[paired] = (0.20 + 0.08 * draw[8])[paired, None]
    short = min(height, width)
    track = _track(motion, heading, speed, turn, radius[:, 0], (width / short, height / short), frames, draw[9:14])
    pattern = torch.stack([0.34 + 0.26 * draw[14], 0.06 + 0.05 * draw[15], 0.55 + 0.25 * draw[16], draw[17]], 1)
    return Scene(
        motion,
        heading,
        speed,
        turn,
        _index(draw[18], 4),
        shape,
        colour,
        track,
        radius,
        pattern,
        height,
        width,
    )


def render(scene: Scene, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Draws a batch of clips.

    Returns:
        Pixels `[batch, 3, frames, height, width]` in [-1, 1] and the objects' coverage
        `[batch, 1, frames, height, width]` in [0, 1], float32.
    """
    short = min(scene.height, scene.width)
    x = ((torch.arange(scene.width, device=device) + 0.5) * 2 - scene.width) / short
    y = ((torch.arange(scene.height, device=device) + 0.5) * 2 - scene.height) / short
    track = _send(scene.track, device)[..., None, None]
    radius = _send(scene.radius, device)[:, :, None, None, None]
    palette = torch.tensor(list(COLOURS.values()))
    colour = _send(palette[scene.colour], device)[..., None, None, None]

    across, along = x - track[:, :, :, 0], y[:, None] - track[:, :, :, 1]
    cos, sin = track[:, :, :, 2].cos(), track[:, :, :, 2].sin()
    distance = _distance(
        cos * across + sin * along,
        cos * along - sin * across,
        radius,
        _send(scene.shape, device)[:, :, None, None, None],
    )
    # The edge is one pixel wide, and a pixel measures 2 / short.
    coverage = (0.5 - distance * (short / 2)).clamp(0, 1) * (radius > 0)

    pixels = _ground(scene, x, y, device)
    for item in range(2):
        cover = coverage[:, item, None]
        pixels = pixels + (colour[:, item] - pixels) * cover
    return pixels * 2 - 1, coverage.amax(1, keepdim=True)


def shape_mask(shape: int, angle: float, size: int, extent: float) -> Tensor:
    """A shape of radius 1 at the origin as `[size, size]` booleans, over [-extent, extent] in both axes."""
    axis = torch.linspace(-extent, extent, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(angle), math.sin(angle)
    return _distance(cos * x + sin * y, cos * y - sin * x, torch.ones(()), torch.tensor(shape)) < 0


def describe(scene: Scene, index: int, dice: random.Random | None = None, motion: bool = True) -> str:
    """The caption of one clip.

    Args:
        dice: leaves out parts at random so that short prompts are learnt; None keeps them all.
        motion: False for still images, where only the look is told.
    """

    def keep(chance: float) -> bool:
        return dice is None or dice.random() < chance

    def thing(item: int) -> str:
        colour = list(COLOURS)[scene.colour[index, item]] if keep(0.93) else ""
        shape = SHAPES[scene.shape[index, item]] if keep(0.94) else dice.choice(("object", "shape"))
        word = f"{colour} {shape}".strip()
        return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"

    kind = list(MOTIONS)[scene.motion[index]]
    speed = list(SPEEDS)[scene.speed[index]] if motion and kind != "still" and keep(0.7) else ""
    if kind in PAIRED:
        join = " passing behind " if kind == "passing" and motion else " and "
        parts = [thing(0) + join + thing(1), "colliding" if kind == "colliding" and motion else "", speed]
    else:
        phrase = {
            "moving": f"moving {list(HEADINGS)[scene.heading[index]]}",
            "rotating": f"rotating {('anticlockwise', 'clockwise')[scene.turn[index]]}",
            "bouncing": "bouncing",
            "still": "standing still",
        }[kind]
        parts = [thing(0), *((phrase, speed) if motion and keep(0.92) else ())]
    if keep(0.5):
        parts.append(f"over a {GROUNDS[scene.ground[index]]} ground")
    words = " ".join(part for part in parts if part).split()
    # The unknown word has to be learnt too: a prompt with a foreign word in it must not fall apart.
    if dice is not None and dice.random() < 0.05:
        words.insert(dice.randrange(len(words)), UNKNOWN)
    return " ".join(words)


def _send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """To the device without waiting for its queue, which a blocking copy would do once per batch."""
    return tensor.to(device, non_blocking=True)


def _index(uniform: Tensor, count: int) -> Tensor:
    return (uniform * count).long().clamp_(max=count - 1)


def _wrap(position: Tensor, limit: Tensor) -> Tensor:
    """Leaves at one side and comes back at the other once the whole object is outside."""
    return torch.remainder(position + limit, 2 * limit) - limit


def _track(
    motion: Tensor,
    heading: Tensor,
    speed: Tensor,
    turn: Tensor,
    radius: Tensor,
    extent: tuple[float, float],
    frames: int,
    draw: tuple[Tensor, ...],
) -> Tensor:
    """x, y and angle of both objects, `[batch, 2, frames, 3]`."""
    time = torch.arange(frames, dtype=torch.float32)[:, None]
    factor = torch.tensor(list(SPEEDS.values()))[speed][:, None, None] * (0.85 + 0.3 * draw[0])[:, None, None]
    way = torch.tensor(list(HEADINGS.values()), dtype=torch.float32)[heading]
    way = (way / way.norm(dim=1, keepdim=True))[:, None]
    side = 1 - way.abs().ceil()
    edge = torch.tensor(extent)
    free = (edge - radius[:, None])[:, None]
    place = (torch.stack([draw[1], draw[2]], 1)[:, None] * 2 - 1) * 0.85 * free
    reach = free + 2 * radius[:, None, None]

    start = -way * edge * (0.1 + 0.5 * draw[3])[:, None, None] + side * place
    moving = _wrap(start + way * 0.03 * factor * time, reach)
    height = torch.sin(math.pi * (time * factor / 15 + draw[4][:, None, None])).abs()
    bouncing = torch.cat([place[..., :1].expand_as(height), free[..., 1:] * (1 - 1.8 * height)], -1)

    # Colliding objects meet at the middle, part, turn round at the walls and meet again: a triangle wave.
    contact = 0.95 * radius[:, None, None]
    room = (way.abs() * (free - contact)).sum(-1, keepdim=True)
    phase = room * (0.6 + 0.4 * draw[3])[:, None, None] - 0.025 * factor * time
    half = contact + (torch.remainder(phase + room, 2 * room) - room).abs()
    drift = side * place * 0.5
    colliding = torch.stack([drift + way * half, drift - way * half], 1)

    front = side * place * 0.5 + way * 0.2 * place
    behind = _wrap(
        front * side - way * edge * (0.5 + 0.25 * draw[3])[:, None, None] + way * 0.035 * factor * time, reach
    )
    passing = torch.stack([behind, front.expand_as(behind)], 1)

    still = place.expand_as(moving)
    single = torch.stack([moving, still, bouncing, still], 0)
    single = torch.stack([single, torch.zeros_like(single)], 2)
    table = torch.cat([single, torch.stack([colliding, passing], 0)], 0)
    position = table[motion, torch.arange(len(motion))]

    spin = (
        (turn * 2 - 1)[:, None, None]
        * 0.07
        * factor
        * time
        * (motion == list(MOTIONS).index("rotating"))[:, None, None]
    )
    angle = torch.stack([spin, torch.zeros_like(spin)], 1)
    return torch.cat([position, angle], -1)


def _distance(x: Tensor, y: Tensor, radius: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the shape's edge, negative inside; `shape` and `radius` broadcast."""
    across, along = x.abs(), y.abs()
    centre = torch.sqrt(x * x + y * y)
    bar, arm = 0.33 * radius, radius
    choices = {
        "circle": centre - radius,
        "square": torch.maximum(across, along) - 0.82 * radius,
        "triangle": torch.maximum(across * (math.sqrt(3) / 2) - y * 0.5, y) - 0.57 * radius,
        "ring": (centre - 0.75 * radius).abs() - 0.25 * radius,
        "cross": torch.minimum(torch.maximum(across - arm, along - bar), torch.maximum(across - bar, along - arm)),
    }
    result = choices["circle"]
    for index, name in enumerate(SHAPES[1:], start=1):
        result = torch.where(shape == index, choices[name], result)
    return result


def _ground(scene: Scene, x: Tensor, y: Tensor, device: torch.device | str) -> Tensor:
    """`[batch, 3, 1, height, width]` in [0, 1]: grey, so that no ground is taken for an object."""
    level, contrast, period, phase = _send(scene.pattern, device)[:, :, None, None].unbind(1)
    turn = 2 * math.pi * phase
    slope = x * turn.cos() + y[:, None] * turn.sin()
    stripe = torch.tanh(3 * torch.sin(2 * math.pi * slope / period))
    cells = torch.sin(2 * math.pi * (x / period + phase)) * torch.sin(2 * math.pi * (y[:, None] / period + phase))
    kinds = torch.stack([torch.zeros_like(slope), slope, stripe, torch.tanh(4 * cells)], 1)
    chosen = _send(F.one_hot(scene.ground, len(GROUNDS)), device)[:, :, None, None]
    return (level + contrast * (kinds * chosen).sum(1))[:, None, None].expand(-1, 3, -1, -1, -1)
