"""CLEAR: every image query sees the keys in a disk around it, all text, and optionally a pooled copy of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch

from fastdiff_kernels import Grid, InvalidInputError, Rule, TokenLayout
from fastdiff_kernels.ball import choose_order
from fastdiff_kernels.on_cpu import on_cpu

from .base import (
    BLOCK_SIZES,
    MethodConfig,
    below_floor,
    block_on,
    check_choice,
    check_density,
    check_whole,
    is_positive,
    is_whole,
    largest_within,
    smaller_blocks,
)
from .clear_planner import ClearPlan, ClearPlanner, pooled_layout

_INT32 = 2**31 - 1
# Ratios of unlike radii are read as fractions up to this denominator; their squares stand in an int32 rule.
_RATIO = 1000
# In such parts of a token for_density solves the radius.
_PARTS = 16


@dataclass(frozen=True)
class ClearConfig(MethodConfig):
    """A query of the image sees the image keys nearer than `radius`, as a convolution does, and all of the text.

    Text stays dense, and at a border a query simply has fewer neighbours. In a video the disk becomes an ellipsoid
    over frames, rows and columns. Compute grows linearly with the size, but for the pooled keys.

        radius 3.5   . . # # # . .      pool_factor 4: f x f keys        text   image      pooled
                     . # # # # # .      become one more, which    text   ####   #########  .......
                     # # # # # # #      the whole image sees      image  ####   ..#####..  #######
                     # # # Q # # #
                     # # # # # # #
                     . # # # # # .
                     . . # # # . .

    Reference: Liu, Tan and Wang, "CLEAR: Conv-Like Linearization Revs Pre-Trained Diffusion Transformers Up",
    arXiv 2412.16112. The paper fine-tunes the attention layers; without that expect more change from small radii.

    Args:
        radius: Tokens at which a key is too far: dy^2 + dx^2 < radius^2. One number, or (frames, rows, columns) for
            (dt/rt)^2 + (dy/ry)^2 + (dx/rx)^2 < 1. The paper has 8, 16 and 32 for FLUX, where a token is 16 pixels.
            Smaller is faster, larger is safer. Where the radii of rows and columns differ, their ratio is rounded to
            the nearest fraction with a denominator up to 1000.
        pool_factor: Side f of the f x f tiles of keys that are pooled, frame by frame, into one more key each, with
            trainable weights that start as the mean; None for no pooled keys. Height and width of the grid must be
            multiples of it. None is faster; 4, as in the paper, is safer at a small radius, and larger cheaper.
        proportional: Whether scores are sharpened for sizes that the model was not trained at: by
            sqrt(log n / log train_tokens), n being the number of tokens, ten times it with pooled keys. True is
            safer far above the training size. It costs nothing.
        train_tokens: Tokens of the model's training size, text included; 4608 is FLUX at 1024 x 1024.
        block_size: Tokens in a block, 32, 64 or 128; small grids take 32 or 64 at most. Smaller follows the disk
            more closely, larger runs faster for each block.

    Raises:
        InvalidInputError: If a value is of the wrong kind or out of its range; it says which.
    """

    method: ClassVar[str] = "clear"

    radius: float | tuple[float, float, float]
    pool_factor: int | None = None
    proportional: bool = False
    train_tokens: int = 4608
    block_size: int = 128

    def __post_init__(self):
        if isinstance(self.radius, list):
            object.__setattr__(self, "radius", tuple(self.radius))
        radii = self.radius if isinstance(self.radius, tuple) else (self.radius,) * 3
        if len(radii) != 3 or not all(map(is_positive, radii)):
            raise InvalidInputError(
                f"radius is {self.radius!r}; give a number of tokens above 0, or three for (frames, rows, columns)."
            )
        if self.pool_factor is not None and not is_whole(self.pool_factor, 2):
            raise InvalidInputError(
                f"pool_factor is {self.pool_factor!r}; give a whole number from 2, or None for no pooled keys."
            )
        check_choice("proportional", self.proportional, (True, False))
        check_whole("train_tokens", self.train_tokens, 2)
        check_choice("block_size", self.block_size, BLOCK_SIZES)

    def planner(self) -> ClearPlanner:
        return ClearPlanner(self)

    @on_cpu
    def build_plan(self, layout: TokenLayout) -> ClearPlan:
        """The plan for one layout, on the CPU; with pooled keys its key side is longer than the layout's.

        Raises:
            InvalidInputError: If the pool factor does not divide the grid, or the ratio of the radii is too odd for
                the grid.
            UnsupportedError: If keys are to be pooled of several grids.
        """
        grid, block = layout.grid, self.block_for(layout.grid)
        frames = max(span.grid.frames for span in (*layout.query, *layout.key) if span.grid is not None)
        rule = self.rule(grid, frames)
        whole = layout if self.pool_factor is None else pooled_layout(layout, self.pool_factor)
        others = sum(-(-span.tokens // block) for span in (*layout.query, *whole.key) if span.kind != "grid")
        order = choose_order(rule, grid, block, others)
        plan = ClearPlan.from_rule(whole, rule, block_q=block, block_k=block, grid_order=order)
        return plan.belonging(layout, self.pool_factor, self._sharpening(layout))

    def block_for(self, grid: Grid) -> int:
        """The block size on this grid: below 8,192 tokens at most 64, below 4,096 at most 32."""
        return block_on(grid, self.block_size)

    def rule(self, grid: Grid, frames: int | None = None) -> Rule:
        """Which keys of a grid a query sees, in whole numbers.

        Args:
            grid: The grid.
            frames: For how many frames, if more than the grid has.

        Raises:
            InvalidInputError: If the ratio of the radii is too odd for the grid.
        """
        one = not isinstance(self.radius, tuple)
        # As written: the binary number next to 2.2 is above it, and a key on the border would be within.
        rt, ry, rx = (Fraction(str(r)) for r in ((self.radius,) * 3 if one else self.radius))
        # dy^2/ry^2 + dx^2/rx^2 < c, times (q rx)^2 with p/q = rx/ry: p^2 dy^2 + q^2 dx^2 < c (q rx)^2.
        ratio = (rx / ry).limit_denominator(_RATIO) if rx >= ry else 1 / (ry / rx).limit_denominator(_RATIO)
        a, b = ratio.numerator**2, ratio.denominator**2
        farthest = a * (grid.height - 1) ** 2 + b * (grid.width - 1) ** 2
        if farthest >= _INT32:
            raise InvalidInputError(
                f"radius {self.radius} has rows and columns in the ratio {ratio.denominator}:{ratio.numerator}, too "
                f"odd for whole numbers on a grid of {grid}; choose radii of a simpler ratio, such as 2:3."
            )
        limits = []
        for distance in range(frames or grid.frames):
            limit = math.ceil(b * rx**2 * (1 - distance**2 / rt**2))
            limits.append(min(limit, farthest + 1) if limit > 0 else -1)
        return Rule.metric(torch.tensor(limits), a=a, b=b)

    def _sharpening(self, layout: TokenLayout) -> float:
        if not self.proportional:
            return 1.0
        tokens = layout.key_tokens * (1 if self.pool_factor is None else 10)
        return math.sqrt(math.log(tokens) / math.log(self.train_tokens))

    @classmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> ClearConfig:
        """The largest radius whose plan stays within a density; whole blocks may leave it well below.

        Args:
            density: Computed share of the scores, text included, above 0 and up to 1.
            grid: The token grid of the run.
            text_tokens: Text tokens in the same sequence.
            **settings: `pool_factor`, `block_size` and the like. A `radius` of three numbers gives the proportions.

        Raises:
            InvalidInputError: If the density is out of range, or below the floor of this grid, which is named.
        """
        check_density(density)
        layout = TokenLayout.self_attention(grid, text_after=text_tokens)
        shape = cls(settings.pop("radius", 1)).radius
        radii = tuple(map(Fraction, shape if isinstance(shape, tuple) else (shape,) * 3))
        # Up from radii that reach no neighbour, to the first at which each corner sees the others.
        smallest = tuple(r / max(radii) / _PARTS for r in radii)
        corner = zip((grid.frames, grid.height, grid.width), smallest, strict=True)
        steps = math.ceil(math.hypot(*((side - 1) / r for side, r in corner))) + 1

        def config(step: int) -> ClearConfig:
            scaled = tuple(float(r * (step + 1)) for r in smallest)
            return cls(scaled if isinstance(shape, tuple) else scaled[0], **settings)

        def reached(step: int) -> float:
            return config(step).build_plan(layout).density()

        if reached(0) > density:
            block = config(0).block_for(grid)
            pooled = settings.get("pool_factor") is not None
            instead = f"use {'a larger pool_factor' if pooled else smaller_blocks(block, 'more tokens')}"
            raise below_floor(cls.method, density, grid, reached(0), f"with blocks of {block}", instead)
        return config(largest_within(steps, lambda step: reached(step) <= density))
