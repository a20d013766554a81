"""PARO attention: each head's tokens reordered so that its pattern becomes blocks, and static masks of blocks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from fastdiff_kernels import EMPTY, FULL, BlockPlan, Grid, InvalidInputError, Rule, TokenLayout, UnsupportedError
from fastdiff_kernels.axis_order import sides_by_head

from .base import MethodConfig, check_density
from .paro_file import BLOCK, Calibration, LayerMasks, calibration_at
from .planner import PlanCache, Planner


@dataclass(frozen=True)
class ParoConfig(MethodConfig):
    """Per head one of six orders of the tokens, and per head and group of steps a mask of blocks, both calibrated.

    A head that attends along an axis that is not the innermost shows thin diagonals all over its map. With that axis
    innermost they become dense blocks near the diagonal, and most other blocks can be left out. Which order and which
    blocks is found once for a model and a size, by `fastdiff.calibrate`, and kept in a file.

        order FHW    # . # . # .        order HWF    # # # . . .
                     . # . # . #                     # # # . . .
                     # . # . # .                     # # # . . .
                     . # . # . #                     . . . # # #
                     # . # . # .                     . . . # # #
                     . # . # . #                     . . . # # #

    The softmax runs over the kept blocks. Text tokens see all and are seen by all; every query sees its own block.

    Reference: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in
    Visual Generation Models", arXiv 2506.16054.

    Args:
        calibration: Path of the safetensors file that `fastdiff.calibrate` or `fastdiff calibrate` wrote. Its density
            is set there: less is faster, more is safer.

    Raises:
        InvalidInputError: If it is no path.
    """

    method: ClassVar[str] = "paro"

    calibration: str

    def __post_init__(self):
        if isinstance(self.calibration, Path):
            object.__setattr__(self, "calibration", str(self.calibration))
        if not isinstance(self.calibration, str) or not self.calibration:
            raise InvalidInputError(
                f"calibration is {self.calibration!r}; give the path of a file that fastdiff calibrate wrote."
            )

    def build_plan(self, layout: TokenLayout) -> BlockPlan:
        """The plan of the first layer in the last group of steps, on the CPU.

        Raises:
            InvalidInputError: If the file cannot be read, or was made for another grid.
            UnsupportedError: If the layout has not exactly one grid.
        """
        return self.planner().plan(
            layout, layer=0, step=None, steps=None, heads=None, head_dim=None, device=torch.device("cpu")
        )

    def planner(self) -> ParoPlanner:
        return ParoPlanner(self)

    @property
    def uses_steps(self) -> bool:
        return calibration_at(self.calibration).groups > 1

    @classmethod
    def for_density(cls, density: float, grid: Grid, *, text_tokens: int = 0, **settings) -> ParoConfig:
        """PARO has no settings to solve for: a density is reached by calibrating a model at it.

        Raises:
            UnsupportedError: Always.
        """
        check_density(density)
        raise UnsupportedError(
            "paro reaches a density by calibrating a model on prompts: call fastdiff.calibrate(pipe, prompts, "
            f"density={density:g}, path=...), or run fastdiff calibrate, and give the file as calibration."
        )


class ParoPlanner(Planner):
    """A calibration at work: plans by layer and group of steps; its masks stay packed until a plan is built.

    Raises:
        InvalidInputError: If the config's file cannot be read.
    """

    def __init__(self, config: ParoConfig, cache: PlanCache | None = None):
        super().__init__(config, cache)
        self.calibration: Calibration = calibration_at(config.calibration)

    def check_model(self, model: torch.nn.Module, layers: list[str]) -> None:
        """Whether the file was made for this model.

        Raises:
            InvalidInputError: If class, config, weights or layers differ.
        """
        what = f"the calibration {self.config.calibration}"
        if len(layers) != len(self.calibration.layers):
            raise InvalidInputError(
                f"{what} was made for a {self.calibration.fingerprint.model} with {len(self.calibration.layers)} "
                f"self-attention layers and this {type(model).__name__} has {len(layers)}; calibrate this model, or "
                "give the file that belongs to it."
            )
        self.calibration.fingerprint.check(model, what)

    def plan(
        self,
        layout: TokenLayout,
        *,
        layer: int,
        step: int | None,
        steps: int | None,
        heads: int | None,
        head_dim: int | None,
        device: torch.device,
    ) -> BlockPlan:
        """The plan of one layer in the group of one step.

        Raises:
            InvalidInputError: If the file was made for another grid or number of heads, or for fewer layers.
            UnsupportedError: If the layout has not exactly one grid, or the file left this layer out.
        """
        masks = self._masks(layer)
        self._check(masks, layout, layer, heads)
        group = self.calibration.group(step, steps)
        device = torch.device(device)
        key = ("paro", self.calibration.digest, layer, group, layout, device)
        return self._cache.get(key, lambda: paro_plan(layout, masks.orders.tolist(), masks.mask(group, device)))

    def _masks(self, layer: int) -> LayerMasks:
        layers = self.calibration.layers
        if layer >= len(layers):
            raise InvalidInputError(
                f"layer is {layer}; the calibration {self.config.calibration} was made for a model with {len(layers)} "
                "self-attention layers, counted from 0."
            )
        masks = layers[layer]
        if masks is None:
            raise UnsupportedError(
                f"the calibration {self.config.calibration} has no masks for layer {layer}, which stayed dense when it "
                "was made; keep the layer dense with dense_layers=, or calibrate anew."
            )
        return masks

    def _check(self, masks: LayerMasks, layout: TokenLayout, layer: int, heads: int | None) -> None:
        what = f"the calibration {self.config.calibration} was made for"
        if layout.grid != masks.grid:
            raise InvalidInputError(
                f"{what} {masks.grid} tokens in layer {layer} ({masks.name}) and this run has {layout.grid}; run at "
                "the size of the calibration, or calibrate this one."
            )
        if heads not in (None, masks.heads):
            raise InvalidInputError(
                f"{what} {masks.heads} heads in layer {layer} ({masks.name}) and this model has {heads}; give the file "
                "that belongs to it."
            )


def paro_plan(layout: TokenLayout, orders: list[int], mask: torch.Tensor) -> BlockPlan:
    """A plan of whole blocks in per-head token orders, on the device of the mask.

    Args:
        layout: Spans of both sides and who sees whom; the mask rules where the layout says `"rule"`.
        orders: For each head the place of its order in `AXIS_ORDERS`.
        mask: Kept blocks between the grid's queries and keys, bool `[heads, blocks, blocks]`. Blocks on the diagonal
            are kept whatever it says, so that no query is left without keys.

    Raises:
        UnsupportedError: If the layout has not exactly one grid.
    """
    query, key = (side.to(mask.device) for side in sides_by_head(layout, BLOCK, orders))
    # Spans fill whole blocks, so the first slot of a block speaks for all of it.
    sees = query.table[0, ::BLOCK, None, 3:]
    span = key.table[0, None, ::BLOCK, 3]
    always, ruled = (sees[..., 0] & span) != 0, (sees[..., 1] & span) != 0
    rows, columns = ruled.any(1).nonzero().flatten().tolist(), ruled.any(0).nonzero().flatten().tolist()
    blocks = mask.shape[-1]
    if len(rows) != blocks or len(columns) != blocks or int(ruled.sum()) != blocks**2:
        raise UnsupportedError(
            f"paro needs one grid of {blocks} blocks of {BLOCK} tokens that rules itself; this layout has "
            f"{', '.join(f'{span.kind} {span.tokens}' for span in layout.query)}. Choose another method for this model."
        )
    state = torch.where(always, FULL, EMPTY).to(torch.uint8).repeat(len(mask), 1, 1)
    kept = mask | torch.eye(blocks, dtype=torch.bool, device=mask.device)
    state[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = torch.where(kept, FULL, EMPTY).to(torch.uint8)
    return BlockPlan.from_states(query, key, state, Rule.none().to(mask.device))
