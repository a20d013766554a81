"""The reorder of tokens by itself: q, k and v into the order of a plan, an output back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fastdiff_kernels import BlockPlan
from fastdiff_kernels.errors import WrongResultError
from fastdiff_kernels.reorder import gather


def there_and_back(inputs: Sequence[torch.Tensor], plan: BlockPlan, what: str) -> Callable[[], None]:
    """The copies that a reorder makes.

    Args:
        inputs: q, k and v, `[1, tokens, heads, head_dim]`.
        plan: Whose order; one for all heads.
        what: For the message.

    Raises:
        WrongResultError: If q does not come back as it was.
    """
    q, k, v = inputs
    order, key_order = plan.query.order, plan.key.order
    slots = order.new_empty(1, plan.query_tokens)
    exists = order[0] >= 0
    slots[0, order[0, exists].long()] = exists.nonzero().flatten().to(order.dtype)
    in_slots, *_ = gather((q, order))

    def run() -> None:
        gather((q, order), (k, key_order), (v, key_order))
        gather((in_slots, slots))

    (back,) = gather((in_slots, slots))
    if not torch.equal(back, q):
        raise WrongResultError(f"{what}: tokens do not come back as they were; the reorder is wrong, so not timed.")
    return run
