"""Agent attention: a few agents gather the values of all keys, and every query asks the agents."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from fastdiff_kernels import AgentPlan, Grid, InvalidInputError, TokenLayout, UnsupportedError
from fastdiff_kernels.agent_spans import AgentSpans

from .base import (
    MethodConfig,
    below_floor,
    check_choice,
    check_density,
    check_number,
    check_unknowns,
    is_whole,
    largest_within,
)

if TYPE_CHECKING:
    from .agent_planner import AgentPlanner

SOURCES = ("pool", "merge")


@dataclass(frozen=True)
class AgentConfig(MethodConfig):
    """Two small softmaxes instead of a large one: agents attend to the keys, then queries attend to the agents.

    An agent is the mean query of some tokens that belong together. Cost is linear in the number of tokens.
    It is no approximation of softmax attention that would become exact with more agents: **it changes the picture**,
    more than a mask of the same density does. Without training it was only ever shown in the early steps of UNets;
    on diffusion transformers it is experimental, and fine-tuned ones lost much to it (CLEAR, arXiv 2412.16112).
    Text in the sequence, and all else beside the grid, stays exact. The density is that of the steps in which
    agents act; all other steps are dense.

        queries  q q q q q q q q q q q q         every query asks all agents (and the text)
                 \\_____/ \\_____/ \\_____/
        agents      a       a       a            the mean query of each cell
                 /-----------------------\\
        keys     k k k k k k k k k k k k t t     every agent asks all keys

    Reference: Han et al., "Agent Attention: On the Integration of Softmax and Linear Attention", arXiv 2312.08874.

    Args:
        agents: Their number, spread over the grid in cells of nearly equal sides (frames count as a side), or the
            cells on each axis, (height, width) for pictures or (frames, height, width). Fewer is faster, more is
            safer.
        source: Which tokens share an agent. `"pool"`: those of one cell; where there is RoPE, queries are pooled
            before it and turned to the cell's middle. `"merge"`: each token joins the most similar of one random
            token per cell, as in AgentSD; a little slower for the matching, which is not part of the density, and
            safer. It draws from the pipeline's generator, and needs a model without text in its sequence.
        steps: Share of the denoising run in which agents act, from (included) to (excluded). A longer one is
            faster, a shorter one safer. Outside a run they act.
        k_scale2: The scores of the agents are scaled by head_dim ** (-0.5 * k_scale2), 0 to 1; no matter of speed.
            Smaller lets a query choose its agents more sharply, 1 is what trained models have.
        k_shortcut: What part of its own value every grid token gets besides, 0 to 1; no matter of speed. It gives
            back some of the detail that agents lose; the published 0.075 is the safe choice.
        merge_ratio: With `"merge"`, the share of the tokens that are replaced by the one they resemble, from 0 up to
            below 1, before the layer and undone after it. More is faster, less is safer.
        bias: Learned biases of both softmaxes, zero at first; they need `agents` as cells. Slower, and safer once
            they are trained.
        convolution: A learned depth-wise convolution of the values instead of `k_shortcut`, which is its start;
            likewise.

    Raises:
        InvalidInputError: If a value is of the wrong kind or out of its range; it says which.
    """

    method: ClassVar[str] = "agent"

    agents: int | tuple[int, ...]
    source: str = "pool"
    steps: tuple[float, float] = (0.0, 0.4)
    k_scale2: float = 0.3
    k_shortcut: float = 0.075
    merge_ratio: float = 0.0
    bias: bool = False
    convolution: bool = False

    def __post_init__(self):
        for name in ("agents", "steps"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, list) else value)
        counts = self.agents if isinstance(self.agents, tuple) else (self.agents,)
        whole = all(is_whole(count, 1) for count in counts)
        if not whole or (isinstance(self.agents, tuple) and len(counts) not in (2, 3)):
            raise InvalidInputError(
                f"agents is {self.agents!r}; give a whole number from 1, or cells as (height, width) or (frames, "
                "height, width)."
            )
        check_choice("source", self.source, SOURCES)
        if not isinstance(self.steps, tuple) or len(self.steps) != 2:
            raise InvalidInputError(f"steps is {self.steps!r}; give two shares of the run, such as (0.0, 0.4).")
        for name in ("start", "end"):
            check_number(f"the {name} of steps", self.steps[name == "end"], 0, 1)
        if self.steps[0] >= self.steps[1]:
            raise InvalidInputError(f"steps is {self.steps}, which is empty; give a start below the end.")
        object.__setattr__(self, "steps", tuple(float(share) for share in self.steps))
        check_number("k_scale2", self.k_scale2, 0, 1)
        check_number("k_shortcut", self.k_shortcut, 0, 1)
        check_number("merge_ratio", self.merge_ratio, 0, 1)
        check_choice("bias", self.bias, (True, False))
        check_choice("convolution", self.convolution, (True, False))
        self._check_together()

    def _check_together(self) -> None:
        if self.merge_ratio == 1:
            raise InvalidInputError("merge_ratio is 1, which leaves no token; give less.")
        if self.merge_ratio and self.source != "merge":
            raise InvalidInputError(
                f"merge_ratio is {self.merge_ratio} and source is {self.source!r}; only source='merge' finds similar "
                "tokens. Set it, or merge_ratio=0."
            )
        if self.merge_ratio and (self.bias or self.convolution):
            raise InvalidInputError(
                "bias and convolution need every token in its place, and merge_ratio takes some away; set "
                "merge_ratio=0, or leave them out."
            )
        if self.bias and isinstance(self.agents, int):
            raise InvalidInputError(
                f"bias=True learns a map for each agent and agents={self.agents} makes other cells on another grid; "
                "give agents as cells, (height, width) or (frames, height, width)."
            )

    @classmethod
    def agent_sd(cls, grid: Grid | str = "64x64", *, merge_ratio: float = 0.4) -> AgentConfig:
        """AgentSD for Stable Diffusion: an agent for each 4x4 tokens in the first 40 % of the steps.

        The released code goes on to merge tokens, of 2x2 cells and without agents, in the later steps; here these
        are dense, which is slower and safer.

        Args:
            grid: Tokens of the finest attention layer: 64x64 for Stable Diffusion 1.5 at 512x512.
            merge_ratio: Share of the tokens merged in those steps, 0.1 to 0.5 in the paper.
        """
        grid = Grid.parse(grid) if isinstance(grid, str) else grid
        cells = (max(1, grid.height // 4), max(1, grid.width // 4))
        return cls(cells, source="merge", steps=(0.0, 0.4), k_scale2=0.3, k_shortcut=0.075, merge_ratio=merge_ratio)

    @property
    def uses_steps(self) -> bool:
        """Whether some steps are dense."""
        return self.steps != (0.0, 1.0)

    def acts(self, step: int | None, steps: int | None) -> bool:
        """Whether agents act at a step of a run; outside a run they do.

        Raises:
            InvalidInputError: If no step of this run lies within `steps`.
        """
        if step is None or steps is None:
            return True
        start, end = self.steps
        if start <= step / steps < end:
            return True
        if not any(start <= other / steps < end for other in range(steps)):
            raise InvalidInputError(
                f"agents act from {start:g} to {end:g} of the run and none of its {steps} steps lies there; give a "
                "wider range as steps=, or run more of them."
            )
        return False

    @property
    def says_dense_steps(self) -> bool:
        return True

    def in_one_step(self) -> tuple[AgentConfig, ...]:
        # A run of one step has no early and no late part.
        return (replace(self, steps=(0.0, 1.0)),)

    def planner(self) -> AgentPlanner:
        from .agent_planner import AgentPlanner

        return AgentPlanner(self)

    def cells(self, grid: Grid) -> Grid:
        """The cells on each axis of a grid, as they would be if they fitted."""
        if isinstance(self.agents, int):
            return spread(self.agents, grid)
        if len(self.agents) == 3:
            return Grid(*self.agents)
        if grid.frames > 1:
            raise InvalidInputError(
                f"agents is {self.agents}, cells of a picture, and the grid is {grid}; give (frames, height, width)."
            )
        return Grid(1, *self.agents)

    def obstacle(self, layout: TokenLayout) -> str | None:
        """Why agents do not pay on a layout, None if they do."""
        grid = layout.grid
        cells = self.cells(grid)
        asked = self.agents if isinstance(self.agents, int) else cells.tokens
        slower = "so that dense attention is faster"
        if asked >= grid.tokens:
            return f"{asked} agents are no fewer than the {grid.tokens} tokens of a grid of {grid}, {slower}"
        if any(getattr(cells, axis) > getattr(grid, axis) for axis in ("frames", "height", "width")):
            return f"{cells} cells do not fit a grid of {grid}"
        kept = grid.tokens - self._merged(grid, cells)
        if 2 * asked >= kept:
            return f"twice {asked} agents are no fewer than the {kept} tokens kept of a grid of {grid}, {slower}"
        density = self._density(layout)
        if density >= 1:
            return f"with so much beside the grid of {grid}, {asked} agents reach a density of {density:.3f}, {slower}"
        return None

    def build_plan(self, layout: TokenLayout) -> AgentPlan:
        """The plan for one layout, on the CPU.

        Raises:
            InvalidInputError: If agents would not pay: too many for the grid, or too much beside it.
            UnsupportedError: If the layout has no single grid, or `"merge"` meets text.
        """
        if self.source == "merge" and len(layout.query) > 1:
            raise UnsupportedError(
                "source 'merge' compares the tokens of a sequence that is all grid, and this one has "
                f"{', '.join(span.kind for span in layout.query)}; use source='pool'."
            )
        obstacle = self.obstacle(layout)
        if obstacle is not None:
            raise InvalidInputError(f"{obstacle}; give fewer agents.")
        cells = self.cells(layout.grid)
        return AgentPlan.from_cells(layout, cells, merged=self._merged(layout.grid, cells))

    def _density(self, layout: TokenLayout) -> float:
        cells = self.cells(layout.grid)
        return AgentSpans(layout, self._merged(layout.grid, cells)).density(cells.tokens)

    def _merged(self, grid: Grid, cells: Grid) -> int:
        return min(int(grid.tokens * self.merge_ratio), grid.tokens - cells.tokens)

    @classmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> AgentConfig:
        """The largest number of agents whose plan stays within a density, in the steps in which they act.

        Args:
            density: Computed share of the scores, text included, above 0 and up to 1.
            grid: The token grid of the run.
            text_tokens: Text tokens in the same sequence.
            **settings: `source`, `steps` and the like.

        Raises:
            InvalidInputError: If the density is out of range, or below the floor of this grid, which is named.
        """
        check_density(density)
        check_unknowns(settings, "agents")
        if settings.get("bias"):
            raise InvalidInputError("bias is of given cells and their number is solved for here; leave it out.")
        layout = TokenLayout.self_attention(grid, text_after=text_tokens)
        floor = cls(1, **settings).build_plan(layout).density()

        def fits(more: int) -> bool:
            config = cls(1 + more, **settings)
            return config.obstacle(layout) is None and config._density(layout) <= density

        if floor > density:
            text = f" and {text_tokens} text tokens" if text_tokens else ""
            raise below_floor(cls.method, density, f"{grid}{text}", floor, "with one agent", "use more tokens")
        return cls(1 + largest_within(grid.tokens, fits), **settings)


def spread(count: int, grid: Grid) -> Grid:
    """The cells, `count` at most, with the shortest diagonal: as many as can be, and of nearly equal sides."""
    best, shortest = Grid(1, 1, 1), math.inf
    for frames in range(1, min(grid.frames, count) + 1):
        for height in range(1, min(grid.height, count // frames) + 1):
            width = min(grid.width, count // (frames * height))
            sides = (grid.frames / frames, grid.height / height, grid.width / width)
            diagonal = sum(side * side for side in sides)
            if diagonal < shortest:
                best, shortest = Grid(frames, height, width), diagonal
    return best
