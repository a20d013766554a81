"""Layer: the handle on an adopted processor. Dense or sparse was decided before the forward; it calls the planner."""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any

import torch
import torch.nn.functional as F

from fastdiff_kernels import InvalidInputError, UnsupportedError

from .families import Family
from .planner import Extras, Plan, Planner
from .recomputation import new_number, witnessed
from .ulysses import Ulysses

_logger = logging.getLogger("fastdiff")

_STRANGER = (
    "this attention processor belongs to no patched model, or to another one: it was removed, replaced, or made for a "
    "different model. Set the processors that fastdiff.processors(...) made for this model, or call fastdiff.apply."
)


class Layer:
    """One self-attention module under a method.

    Compiled code is shared by all layers, so what it reads here must be the same for all of them or a bool:
    a number that differs by layer costs one recompilation per layer until the limit is hit. The pre-hook of the
    model sets `ready`, `active` and `plan` before each forward. They are attributes and no thread-local, because
    checkpointed blocks run again in autograd's threads; hence one forward at a time on one model.

    Attributes:
        index: Place among the model's self-attention modules.
        name: Name of the attention module.
        ready: Whether the pre-hook has prepared this layer for the running forward.
        module: The attention module that it is for, held weakly; the pre-hook sets it.
        active: Whether the running forward is sparse here.
        tokens: How many tokens the layout has here.
        parts: The same by runs that context parallelism splits apart.
        stray: How many tokens the last call had instead, None if it was meant.
        plan: What to compute when it is.
        number: Stands for plan and seed, see `recomputation`.
        needs: What the planner needs, see `NEEDS`.
        seed: The run's number, for a planner that needs it.
        block_input: What the transformer block was just called with, likewise.
    """

    def __init__(
        self,
        index: int,
        name: str,
        heads: int,
        head_dim: int,
        planner: Planner,
        backend: str,
        family: Family,
    ):
        self.index, self.name, self.heads, self.head_dim = index, name, heads, head_dim
        self.planner, self.backend, self.family = planner, backend, family
        self.needs = planner.needs
        # They are to be trained, whatever mode this runs in.
        with torch.inference_mode(False):
            self.parameters = planner.parameters(layer=index, heads=heads, head_dim=head_dim)
        self.module: weakref.ref | None = None
        self.plan: Plan | None = None
        self.number = new_number()
        self.seed: torch.Tensor | None = None
        self.block_input: torch.Tensor | None = None
        self.tokens, self.parts = 0, ()
        self.stray: int | None = None
        self.ready = self.active = False
        self.reached = self.warned = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Layer:
        # A copied model has layers of its own and shares planner and plans, which never change.
        copied = copy.copy(self)
        copied.parameters = copy.deepcopy(self.parameters, memo)
        memo[id(self)] = copied
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "module": None, "plan": None, "block_input": None, "ready": False, "active": False}

    def prepare(self, plan: Plan | None, seed: torch.Tensor | None = None, parts: tuple[int, ...] = ()) -> None:
        """Makes the layer sparse under `plan` for the coming forward, or dense if there is none."""
        if plan is not self.plan or seed is not self.seed:
            self.number = new_number()
        self.plan, self.active, self.ready, self.seed = plan, plan is not None, True, seed
        self.block_input = None
        self.tokens, self.parts = sum(parts), parts

    def retire(self) -> None:
        """Unbinds the layer: a processor that still holds it raises when it is called."""
        self.plan = self.block_input = None
        self.active = self.ready = False

    def takes(self, queries: int, keys: int, parallel: Any = None) -> bool:
        """Whether the running call is for us; IP-adapters attend to their own keys in the same processor."""
        if not self.ready:
            raise InvalidInputError(_STRANGER)
        if not self.active or not self.family.by_length:
            return self.active and queries == keys
        shares = self._shares(parallel)
        meant = queries == keys == (self.tokens if shares is None else shares.own)
        if not meant and not self.reached:
            self.stray = queries
        return meant

    def watches(self) -> bool:
        """Whether to note which calls are made: in compiled code only where their length tells what is meant."""
        return not torch.compiler.is_compiling() or self.family.by_length

    def entered(self, module: Any) -> None:
        """Called before the processor where calls are noted, with the attention module that calls it."""
        self.reached = False
        # What the model that it was made for has prepared would pass for this one's.
        if not torch.compiler.is_compiling() and self.module is not None and self.module() is not module:
            raise InvalidInputError(_STRANGER)

    def reach(self) -> None:
        """Called at the processor's attention call where calls are noted."""
        self.reached, self.stray = True, None

    def left(self, processor: Any) -> None:
        """Called after the processor in eager mode: warns once if its attention call went past us."""
        if self.active and not self.reached and self.stray is None and not self.warned:
            self.warned = True
            _logger.warning(
                "%s ran without calling an attention function that fastdiff replaces (processor %s): it stayed dense.",
                self.name,
                type(processor).__name__,
            )

    def gathers(self) -> bool:
        """Whether the running call must collect what the planner needs."""
        return self.active and bool(self.needs)

    def gather(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What the planner needs and is known before the processor runs, from the processor's arguments by name."""
        inputs: dict[str, Any] = {}
        if "rotary" in self.needs:
            inputs["rotary"] = self.family.rotary(arguments)
        if "seed" in self.needs:
            inputs["seed"] = self.seed
        if "block_input" in self.needs:
            if self.block_input is None:
                raise InvalidInputError(
                    f"{self.name} was called outside its transformer block, whose input the method needs; call the "
                    "block or the whole model."
                )
            inputs["attention"], inputs["block_input"] = arguments["attn"], self.block_input
            self.block_input = None
        return inputs

    def enter(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """What the processor gets instead of its hidden states."""
        if "block_input" not in self.needs:
            return hidden
        return self.planner.enter(hidden, self.plan, self._extras(inputs))

    def leave(self, out: Any, inputs: dict[str, Any]) -> Any:
        """What the block gets instead of the processor's output."""
        if "block_input" not in self.needs:
            return out
        return self.planner.leave(out, self.plan, self._extras(inputs))

    def _extras(self, inputs: dict[str, Any], scale: float | None = None, key_mask: Any = None) -> Extras:
        return Extras(scale, key_mask, self.backend, self.parameters, inputs)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
        parallel: Any,
        inputs: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """The sparse attention of this layer, all tensors `[batch, tokens, heads, head_dim]`.

        `inputs` is what `gather` and the hooks have collected for this call.

        Raises:
            UnsupportedError: If the call asks for what the sparse path cannot do.
        """
        group, rest = divmod(query.shape[2], key.shape[2])
        if causal or dropout or rest:
            raise UnsupportedError(
                f"self-attention was called with is_causal={causal}, dropout_p={dropout}, {query.shape[2]} query heads "
                f"and {key.shape[2]} key heads; sparse attention takes no causal flag, no dropout and as many query "
                "heads for each key head. Keep these layers dense with dense_layers=."
            )
        if group > 1:
            key, value = (x.repeat_interleave(group, 2) for x in (key, value))
        if query.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            query = witnessed(query, self.number)
        inputs = {} if inputs is None else inputs
        if "pre_rope_query" in self.needs:
            inputs["pre_rope_query"] = self._query_before_rope(query, inputs)
        key_mask, shares = _key_mask(self.family.mask(mask), key), self._shares(parallel)
        if shares is not None:
            self._check_shares(shares, query)
            query, key, value = (shares.gather(x) for x in (query, key, value))
            key_mask = None if key_mask is None else shares.gather_mask(key_mask)
        queries = query.shape[1]
        # Compiled code that had read how many tokens the layout has would be for one size alone.
        if not torch.compiler.is_compiling():
            self._check_length(queries)
        if self.family.text_varies:
            # The plan is that of the longest text. No branch, since torch.compile may not know the lengths.
            if torch.compiler.is_compiling():
                torch._check(queries <= self.tokens)
            query, key, value = (F.pad(x, (0, 0, 0, 0, 0, self.tokens - queries)) for x in (query, key, value))
            seen = (torch.arange(self.tokens, device=key.device) < queries).expand(len(key), -1)
            key_mask = seen if key_mask is None else seen & F.pad(key_mask, (0, self.tokens - queries))
        out = self.planner.attend(query, key, value, self.plan, self._extras(inputs, scale, key_mask))[:, :queries]
        return out if shares is None else shares.scatter(out)

    def _check_length(self, queries: int) -> None:
        # Text may come without its padding, and a method may have merged tokens.
        fewer = self.family.text_varies or "block_input" in self.needs
        if queries > self.tokens or (queries < self.tokens and not fewer):
            raise InvalidInputError(
                f"{self.name} was called with {queries} tokens and the layout has {self.tokens}; count all tokens of "
                "the call in layout=, text too where it is in the same sequence."
            )

    def _shares(self, parallel: Any) -> Ulysses | None:
        config = None if parallel is None else parallel.context_parallel_config
        return None if config is None else Ulysses.of(config, self.parts)

    def _check_shares(self, shares: Ulysses, query: torch.Tensor) -> None:
        shares.check_heads(query.shape[2])
        if self.needs or self.family.text_varies:
            raise UnsupportedError(
                f"context parallelism is on, and {self.name} needs {', '.join(sorted(self.needs)) or 'the text'}, of "
                "which a process knows only its share; choose a method or a model that does without, or call "
                "fastdiff.remove."
            )
        if query.shape[1] != shares.own:
            raise UnsupportedError(
                f"context parallelism gave {self.name} {query.shape[1]} tokens; of the parts of "
                f"{', '.join(map(str, self.parts))} tokens, text and picture apart, process {shares.rank} was expected "
                f"to hold {shares.own}. Use the model's own _cp_plan, or call fastdiff.remove."
            )

    def _query_before_rope(self, query: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        norms = self.family.query_norms
        if not norms:
            return query
        parts = [inputs.pop(name) for name in norms if name in inputs]
        if self.family.heads_first:
            parts = [part.transpose(1, 2) for part in parts]
        # Norms across heads see them side by side.
        parts = [part.unflatten(-1, (query.shape[2], -1)) if part.ndim == 3 else part for part in parts]
        tokens = sum(part.shape[1] for part in parts)
        if tokens != query.shape[1]:
            raise UnsupportedError(
                f"the method needs the query before RoPE, and {self.name} gave that of {tokens} of {query.shape[1]} "
                f"tokens: its processor does not call all of {', '.join(norms)}. Set the model's own processors first."
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _key_mask(mask: Any, key: torch.Tensor) -> torch.Tensor | None:
    """A mask that only hides keys as bool `[batch, key tokens]`.

    Raises:
        UnsupportedError: If the mask depends on the query or the head, or is no mask of bools.
    """
    if mask is None:
        return None
    batch, tokens = key.shape[:2]
    is_keys = isinstance(mask, torch.Tensor) and mask.dtype == torch.bool
    if is_keys and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1:
        mask = mask[:, 0, 0]
    if not is_keys or mask.ndim != 2 or mask.shape[1] != tokens or mask.shape[0] not in (1, batch):
        given = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"the attention mask is {given}; sparse attention takes a bool mask of keys, ({batch}, {tokens}) or "
            f"({batch}, 1, 1, {tokens}). Keep these layers dense with dense_layers=, or leave the mask out."
        )
    return mask.expand(batch, tokens)
