"""CalibrationSettings: how orders and masks are chosen, checked."""

from __future__ import annotations

from dataclasses import dataclass

from fastdiff.methods.base import check_choice, check_density, check_number, check_share, check_whole

OBJECTIVES = ("mass", "paper")
MASKS = ("global", "row")


@dataclass(frozen=True)
class CalibrationSettings:
    """The settings of `fastdiff.calibrate`, which explains them."""

    density: float = 0.3
    groups: int = 4
    objective: str = "mass"
    mask: str = "global"
    sample: float = 1.0
    alpha: float = 1.0
    epsilon: float = 1e-3
    sigma: float = 0.9

    def __post_init__(self):
        check_density(self.density)
        check_whole("groups", self.groups, 1)
        check_choice("objective", self.objective, OBJECTIVES)
        check_choice("mask", self.mask, MASKS)
        check_share("sample", self.sample)
        for name in ("alpha", "epsilon", "sigma"):
            check_number(name, getattr(self, name), 0, 1)

    def needed_bytes(self, layers: int, heads: int, tokens: int, block: int) -> int:
        """Memory for the statistics, on the CPU."""
        blocks = -(-tokens // block)
        rows = max(1, round(self.sample * blocks))
        maps = 6 * rows if rows == blocks else max(6 * rows, blocks)
        return 4 * layers * self.groups * heads * maps * blocks
