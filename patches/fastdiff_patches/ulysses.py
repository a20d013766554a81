"""Ulysses: context parallelism in which each process gets the whole sequence for some of the heads.

Outside attention every process holds a share of the tokens. Models with text in the sequence split it and the picture
apart, so that shares put side by side would read text, picture, text, picture; here each part is whole again. Gradients
run back through the exchange.
"""

from __future__ import annotations

import functools
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from fastdiff_kernels import BlockPlan, InvalidInputError, TokenLayout, UnsupportedError, of_heads


def parts_of(layout: TokenLayout) -> tuple[int, ...]:
    """Tokens of the runs of a layout's queries that a model splits apart: text, and all that is no text."""
    parts, last = [], None
    for span in layout.query:
        is_text = span.kind == "text"
        if is_text == last:
            parts[-1] += span.tokens
        else:
            parts.append(span.tokens)
        last = is_text
    return tuple(parts)


def share_of(plan: Any, config: Any, heads: int) -> Any:
    """The plan of this process's heads; what cannot be shared is left to the attention call, which refuses it."""
    own, rest = divmod(heads, config.ulysses_degree)
    # A plan that holds another's (rules) cuts that one.
    cut = functools.partial(of_heads, plan) if isinstance(plan, BlockPlan) else getattr(plan, "of_heads", None)
    if cut is None or rest or config.ring_degree > 1:
        return plan
    # As where plans are made: it may serve a training step later.
    with torch.inference_mode(False):
        return cut(own * torch.distributed.get_rank(config._ulysses_mesh.get_group()), own)


class Ulysses(NamedTuple):
    """How the tokens of a sequence are spread over processes.

    Attributes:
        group: The processes.
        rank: This one's place among them.
        shares: For each process its tokens of each part.
    """

    group: Any
    rank: int
    shares: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, config: Any, parts: tuple[int, ...]) -> Ulysses:
        """From diffusers' `ContextParallelConfig` and what `parts_of` says.

        Raises:
            UnsupportedError: If it asks for ring attention.
            InvalidInputError: If the parts do not split evenly, and the config does not say `ulysses_anything`.
        """
        if config.ring_degree > 1:
            raise UnsupportedError(
                f"context parallelism has ring_degree={config.ring_degree}; sparse attention needs the whole sequence "
                "of a head in one process. Use ContextParallelConfig(ulysses_degree=...), or call fastdiff.remove."
            )
        degree, group = config.ulysses_degree, config._ulysses_mesh.get_group()
        if not getattr(config, "ulysses_anything", False) and any(part % degree for part in parts):
            raise InvalidInputError(
                f"the sequence has parts of {', '.join(map(str, parts))} tokens, which {degree} processes cannot share "
                "evenly; choose another size or text length, or ContextParallelConfig(..., ulysses_anything=True)."
            )
        # As torch.tensor_split spreads what does not divide.
        shares = tuple(tuple(part // degree + (rank < part % degree) for part in parts) for rank in range(degree))
        return cls(group, torch.distributed.get_rank(group), shares)

    @property
    def own(self) -> int:
        """Tokens of this process."""
        return sum(self.shares[self.rank])

    def check_heads(self, heads: int) -> None:
        """Raises InvalidInputError if the heads do not divide."""
        if heads % len(self.shares):
            raise InvalidInputError(
                f"{heads} attention heads do not divide among {len(self.shares)} processes; choose a ulysses_degree "
                "that divides them, or call fastdiff.remove."
            )

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens of this process's heads: `[batch, own tokens, heads, d]` to `[batch, tokens, own heads, d]`."""
        degree, lengths = len(self.shares), [sum(share) for share in self.shares]
        by_process = x.unflatten(2, (degree, -1)).permute(2, 1, 0, 3, 4).flatten(0, 1).contiguous()
        found = self._exchange(by_process, lengths, [self.own] * degree)
        return self._ordered(found, by_part=True).transpose(0, 1)

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This process's tokens of all heads: undoes `gather`."""
        degree, lengths = len(self.shares), [sum(share) for share in self.shares]
        by_process = self._ordered(x.transpose(0, 1), by_part=False).contiguous()
        found = self._exchange(by_process, [self.own] * degree, lengths)
        return found.unflatten(0, (degree, -1)).permute(2, 1, 0, 3, 4).flatten(2, 3)

    def gather_mask(self, mask: torch.Tensor) -> torch.Tensor:
        """Bool `[batch, own tokens]` to `[batch, tokens]`."""
        spread = mask[:, :, None, None].expand(-1, -1, len(self.shares), 1)
        return self.gather(spread.to(torch.uint8))[:, :, 0, 0].bool()

    def _exchange(self, x: torch.Tensor, received: list[int], sent: list[int]) -> torch.Tensor:
        # Builds of torch without distributed computing lack it. What it returns is waited for at first use.
        from torch.distributed._functional_collectives import all_to_all_single_autograd

        return all_to_all_single_autograd(x, received, sent, self.group)

    def _ordered(self, x: torch.Tensor, *, by_part: bool) -> torch.Tensor:
        """`[tokens, ...]` in the order of the sequence, from the order of the processes; or back again."""
        parts, degree = len(self.shares[0]), len(self.shares)
        if parts == 1:
            return x
        by_process = [(rank, part) for rank in range(degree) for part in range(parts)]
        in_sequence = sorted(by_process, key=lambda place: (place[1], place[0]))
        source, target = (by_process, in_sequence) if by_part else (in_sequence, by_process)
        sizes = [self.shares[rank][part] for rank, part in source]
        starts = dict(zip(source, accumulate(sizes, initial=0), strict=False))
        return torch.cat([x.narrow(0, starts[place], self.shares[place[0]][place[1]]) for place in target])
