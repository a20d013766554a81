"""BlockPlan: what a block-sparse kernel has to do, as lists of key blocks for each query block."""

from __future__ import annotations

import itertools
import secrets
import weakref
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

import torch

from .block_list import BlockList, Columns, heavy_places, launch_order
from .errors import InvalidInputError
from .kernel_rule import KernelRule, kernel_rule
from .layout import TokenLayout
from .on_cpu import on_cpu
from .order import GridOrder, Side, natural_order
from .refine import really_touched
from .rule import Rule, RuleKind, classify, pairs_visible

EMPTY, PARTIAL, FULL = 0, 1, 2

# From a place of this process's own: a compiled program that was saved must not find another plan in the next one.
_numbers = itertools.count(secrets.randbits(62))
_plans: weakref.WeakValueDictionary[int, BlockPlan] = weakref.WeakValueDictionary()


@dataclass(frozen=True, eq=False, repr=False)
class BlockPlan:
    """Which key blocks each query block computes whole, and which by an in-block rule.

    A plan is immutable, holds no tensor of query tokens x key tokens, and knows neither the method that made it nor the
    model.

    Attributes:
        query, key: The two sides: token order, block size, and the table that the rules read.
        full: Key blocks computed without a test.
        partial: Key blocks computed with the in-block rule.
        rule: The in-block rule, see rule.py.
        bits: For a BITS rule the bitmap of each partial entry, int32 `[entries]`; else empty.
        handle: The plan's number as a 0-d int64 CPU tensor: operators take it instead of the plan, so that
            compiled code is the same for all layers.

    Raises:
        InvalidInputError: If a BITS plan has not one bitmap for each partial entry.
    """

    query: Side
    key: Side
    full: BlockList
    partial: BlockList
    rule: Rule
    bits: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int32, device="cpu"))
    handle: torch.Tensor = field(init=False)

    def __post_init__(self):
        if self.rule.kind == RuleKind.BITS and len(self.bits) != len(self.partial.indices):
            raise InvalidInputError(
                f"a BITS plan needs one bitmap for each of its {len(self.partial.indices)} partial blocks; "
                f"{len(self.bits)} were given."
            )
        number = next(_numbers)
        # Autograd saves the handle, which it could not if the plan was first wanted in inference mode.
        with torch.inference_mode(False):
            object.__setattr__(self, "handle", torch.tensor(number, device="cpu"))
        _plans[number] = self

    def __repr__(self) -> str:
        blocks = f"{self.query_blocks}x{self.key_blocks} blocks of {self.query.block}x{self.key.block}"
        return f"BlockPlan({self.lists} lists, {blocks}, {self.rule.kind.name}, density {self.density():.4f})"

    def __deepcopy__(self, memo) -> BlockPlan:
        return self

    def __reduce__(self):
        return type(self), tuple(getattr(self, f.name) for f in fields(self) if f.init)

    @classmethod
    @on_cpu
    def from_rule(
        cls,
        layout: TokenLayout,
        rule: Rule,
        *,
        block_q: int,
        block_k: int,
        grid_order: GridOrder = natural_order,
    ) -> BlockPlan:
        """A plan whose truth is a token-level METRIC or BOX rule between grid spans.

        Args:
            layout: Spans of both sides and who sees whom.
            rule: The rule where the layout says `"rule"`.
            block_q, block_k: Slots in a query and in a key block.
            grid_order: Order of the tokens of a grid span; text keeps its own.

        Raises:
            InvalidInputError: If a block size is below 1, or tokens lie farther apart than a METRIC rule knows.
        """
        query, key = arrange_sides(layout, (block_q, block_k), grid_order)
        touched, whole = classify(rule, query.boxes(), key.boxes())
        if torch.equal(touched, whole):
            # Blocks decide alone; a kernel then need not evaluate the rule where a block is partial by padding.
            rule = Rule.none()
        # Spans fill whole blocks, so the first slot of a block speaks for all of it.
        query_first, key_first = query.table[0, ::block_q], key.table[0, None, ::block_k, 3]
        seen_whole = (query_first[:, None, 3] & key_first) != 0
        by_rule = (query_first[:, None, 4] & key_first) != 0
        if rule.kind == RuleKind.BOX:
            unsure = touched & ~whole & by_rule & ~seen_whole
            touched &= really_touched(rule, query, key, unsure) | ~unsure
        state = torch.where(by_rule, touched.to(torch.uint8) + (touched & whole).to(torch.uint8), 0)
        state = torch.where(seen_whole, FULL, state)
        return cls.from_states(query, key, state[None], rule)

    @classmethod
    @on_cpu
    def from_states(
        cls, query: Side, key: Side, state: torch.Tensor, rule: Rule, bits: torch.Tensor | None = None
    ) -> BlockPlan:
        """A plan from the state (EMPTY, PARTIAL or FULL) of every pair of blocks.

        Args:
            query, key: The two sides.
            state: Integers `[1 or heads, query blocks, key blocks]`. Full key blocks with padding become partial,
                blocks of spans that do not see each other empty.
            rule: The rule of the partial blocks.
            bits: For a BITS rule the bitmap of every pair of blocks, int32, of the shape of `state`.

        Raises:
            InvalidInputError: If `state` or `bits` have another shape, or a block has more sub-blocks than bits.
        """
        if state.dim() != 3 or state.shape[1:] != (query.blocks, key.blocks):
            raise InvalidInputError(
                f"state has the shape {list(state.shape)}; this plan needs [lists, {query.blocks}, {key.blocks}]."
            )
        padded, seen = key.padded_blocks()[:, None, :], _may_see(query, key)
        partial = ((state == PARTIAL) | ((state == FULL) & padded)) & seen
        full = (state == FULL) & ~padded & seen
        extra = {}
        if rule.kind == RuleKind.BITS:
            if bits is None or bits.shape != state.shape:
                given = "none" if bits is None else f"the shape {list(bits.shape)}"
                raise InvalidInputError(f"a BITS rule needs a bitmap of each block, {list(state.shape)}; got {given}.")
            _check_word(rule, query.block, key.block)
            extra["bits"] = torch.where(state == FULL, -1, bits)[partial].to(torch.int32)
        return cls(query, key, BlockList.from_mask(full), BlockList.from_mask(partial), rule, **extra)

    def to(self, device) -> BlockPlan:
        """The same plan on another device (itself, if it is there)."""
        if torch.device(device) == self.device:
            return self
        names = ("query", "key", "full", "partial", "rule", "bits")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @property
    def device(self) -> torch.device:
        return self.full.indices.device

    @property
    def lists(self) -> int:
        """1 where all heads share their lists, else the number of heads."""
        return self.full.offsets.shape[0]

    @property
    def heads(self) -> int | None:
        """How many heads the plan is for; None fits any number."""
        return next((n for n in (self.lists, self.query.order.shape[0], self.key.order.shape[0]) if n > 1), None)

    @property
    def query_tokens(self) -> int:
        return self.query.tokens

    @property
    def key_tokens(self) -> int:
        return self.key.tokens

    @property
    def query_blocks(self) -> int:
        return self.query.blocks

    @property
    def key_blocks(self) -> int:
        return self.key.blocks

    @cached_property
    def full_blocks(self) -> int:
        """Full blocks of all lists."""
        return len(self.full.indices)

    @cached_property
    def partial_blocks(self) -> int:
        """Partial blocks of all lists."""
        return len(self.partial.indices)

    @cached_property
    def longest_row(self) -> int:
        """Key blocks of the query block that has most."""
        return int((self.full.counts + self.partial.counts).max())

    @cached_property
    def launch_order(self) -> torch.Tensor:
        """Query blocks in the order to start them, int32 `[lists, query blocks]`."""
        return launch_order(self.query, self.full, self.partial)

    @cached_property
    def heavy_rows(self) -> int:
        """How many places at the head of the launch order hold rows over three times as long as the mean."""
        return heavy_places(self.full, self.partial)

    @cached_property
    def transposed(self) -> Columns:
        """The lists by key block; built when a gradient is first asked for."""
        full, _ = self.full.transposed(self.key_blocks)
        partial, bit_place = self.partial.transposed(self.key_blocks)
        return Columns(full, partial, bit_place, launch_order(self.key, full, partial))

    @cached_property
    def kernel_rule(self) -> KernelRule:
        """The rule as GPU kernels take it."""
        return kernel_rule(self)

    @property
    def mean_row(self) -> float:
        """Key blocks of a query block on average."""
        return (self.full_blocks + self.partial_blocks) / (self.lists * self.query_blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, with what kernels have derived from them; not the torch backend's masks."""
        lists = [self.full, self.partial]
        tensors = [self.query.order, self.query.table, self.key.order, self.key.table, self.rule.parameters]
        order, columns, rule = (self.__dict__.get(name) for name in ("launch_order", "transposed", "kernel_rule"))
        tensors += [self.bits] if order is None else [self.bits, order]
        if columns is not None:
            lists += [columns.full, columns.partial]
            tensors += [columns.bit_place, columns.launch_order]
        if rule is not None:
            # Where it is no shorter it is the plan's own.
            tensors += [x for x in (rule.query, rule.key, rule.parameters) if not any(x is t for t in tensors)]
        return sum(t.nbytes for t in (*tensors, *(x for some in lists for x in (some.offsets, some.indices))))

    def density(self) -> float:
        """Area of the computed tiles / (query tokens x key tokens); padding can push it above 1."""
        computed = (self.full_blocks + self.partial_blocks) * self.query.block * self.key.block
        return computed / (self.lists * self.query_tokens * self.key_tokens)

    def draw(self, head: int = 0) -> torch.Tensor:
        """The block map of one head: 0 empty, 1 partial, 2 full, uint8 `[query blocks, key blocks]`."""
        which = head % self.lists
        partial = self.partial.mask(self.key_blocks)[which]
        full = self.full.mask(self.key_blocks)[which]
        return (partial * PARTIAL + full * FULL).to(torch.uint8).cpu()

    def visible_keys(self, query_token: int, head: int = 0) -> torch.Tensor:
        """The keys that one query token attends to, bool `[key tokens]`.

        Raises:
            InvalidInputError: If there is no such token.
        """
        if not 0 <= query_token < self.query_tokens:
            raise InvalidInputError(f"query token {query_token} does not exist; there are {self.query_tokens}.")
        orders = self.query.order.shape[0]
        slot = int((self.query.order[head % orders] == query_token).nonzero()[0])
        row = slot // self.query.block
        visible = self.slot_mask(head, row)[slot % self.query.block]
        order = self.key.order[head % self.key.order.shape[0]].long()
        keys = torch.zeros(self.key_tokens, dtype=torch.bool, device=self.device)
        keys[order[visible]] = True
        return keys

    def slot_mask(self, head: int, row: int) -> torch.Tensor:
        """Which key slots the slots of one query block see, bool `[block_q, key slots]`."""
        which = head % self.lists
        block_q, block_k = self.query.block, self.key.block
        mask = torch.zeros(block_q, self.key_blocks, block_k, dtype=torch.bool, device=self.device)
        full = self.row(self.full, which, row)
        mask[:, full] = True
        mask[:, self.row(self.partial, which, row)] = self.partial_mask(head, row)
        return mask.reshape(block_q, -1)

    def row(self, blocks: BlockList, which: int, row: int) -> torch.Tensor:
        """Key blocks of one row of a list, int64 `[entries]`."""
        start, end = blocks.offsets[which, row : row + 2].tolist()
        return blocks.indices[start:end].long()

    def partial_mask(self, head: int, row: int) -> torch.Tensor:
        """What the rule says of one query block and its partial key blocks, bool `[block_q, entries, block_k]`."""
        which, block_q, block_k = head % self.lists, self.query.block, self.key.block
        start, end = self.partial.offsets[which, row : row + 2].tolist()
        query = self.query.table[head % self.query.table.shape[0], row * block_q : (row + 1) * block_q]
        key = self.key.table[head % self.key.table.shape[0]].unflatten(0, (-1, block_k))
        key = key[self.partial.indices[start:end].long()]
        bits = self._expand_bits(self.bits[start:end]) if self.rule.kind == RuleKind.BITS else None
        return pairs_visible(self.rule, query[None], key, bits).transpose(0, 1)

    def _expand_bits(self, words: torch.Tensor) -> torch.Tensor:
        query_side, key_side, columns = self.rule.parameters.tolist()
        rows = torch.arange(self.query.block, device=words.device) // query_side
        place = rows[:, None] * columns + torch.arange(self.key.block, device=words.device) // key_side
        return (words[:, None, None] >> place & 1).bool()


def _check_word(rule: Rule, block_q: int, block_k: int) -> None:
    query_side, key_side, columns = rule.parameters.tolist()
    rows, needed = -(-block_q // query_side), -(-block_k // key_side)
    if columns < needed or (rows - 1) * columns + needed > 32:
        raise InvalidInputError(
            f"a bitmap has 32 bits, and blocks of {block_q}x{block_k} have {rows}x{needed} sub-blocks of "
            f"{query_side}x{key_side} in rows of {columns}; give larger sub-blocks, and columns for all."
        )


def _may_see(query: Side, key: Side) -> torch.Tensor:
    """Pairs of blocks with a span on one side that a span on the other sees, bool `[1 or heads, queries, keys]`."""
    seen = _bits_of_blocks(query.table[..., 3] | query.table[..., 4], query.block)
    return (seen[:, :, None] & _bits_of_blocks(key.table[..., 3], key.block)[:, None]) != 0


def _bits_of_blocks(bits: torch.Tensor, block: int) -> torch.Tensor:
    """The bits that any slot of a block has, `[1 or heads, slots]` to `[1 or heads, blocks]`."""
    slots = bits.unflatten(1, (-1, block))
    found = torch.zeros_like(slots[..., 0])
    for bit in range(int(bits.max()).bit_length()):
        found |= (slots >> bit & 1).amax(-1) << bit
    return found


def plan_of(handle: torch.Tensor) -> BlockPlan:
    """The plan that a handle names.

    Raises:
        InvalidInputError: If that plan no longer exists.
    """
    plan = _plans.get(int(handle))
    if plan is None:
        raise InvalidInputError(f"plan {int(handle)} no longer exists; keep the BlockPlan alive while it is in use.")
    return plan


def arrange_sides(
    layout: TokenLayout, blocks: tuple[int, int], grid_order: GridOrder = natural_order, aligned: bool = True
) -> tuple[Side, Side]:
    """The query and the key side of a layout, blocks of so many queries and keys; else as `Side.arrange`."""
    parts = zip((layout.query, layout.key), blocks, visibility_bits(layout), strict=True)
    query, key = (Side.arrange(*part, grid_order, aligned) for part in parts)
    return query, key


def visibility_bits(layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns 3 and 4 of the query table and of the key table for each span, int32 `[spans, 2]`."""
    query = [
        [sum(1 << k for k, cell in enumerate(row) if cell == kind) for kind in ("all", "rule")]
        for row in layout.visibility
    ]
    key = [[0 if span.kind == "pad" else 1 << k, 0] for k, span in enumerate(layout.key)]
    query, key = (torch.tensor(bits, dtype=torch.int32, device="cpu") for bits in (query, key))
    return query, key
