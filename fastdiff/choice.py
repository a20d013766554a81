"""A choice of steps or layers: the first n, a first share, or indices; negative ones count from the end."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

from fastdiff_kernels import InvalidInputError

Choice = int | float | tuple[int, ...]


def read_choice(name: str, given: Any) -> Choice:
    """What a user gave, checked; indices sorted, those from the end last.

    Raises:
        InvalidInputError: If it is out of range or of another kind; `name` says what it was given as.
    """
    single = _whole(given)
    if single is not None:
        if single < 0:
            raise InvalidInputError(f"{name} is {given}; give 0 or more, or a list such as [-1] for the last.")
        return single
    if isinstance(given, float) and 0 < given < 1:
        return given
    if isinstance(given, Iterable) and not isinstance(given, str | bytes | dict):
        entries = list(given)
        indices = [_whole(entry) for entry in entries]
        if None not in indices:
            return tuple(sorted(set(indices), key=lambda index: (index < 0, index)))
        given = entries
    raise InvalidInputError(
        f"{name} is {given!r}; give a whole number (the first n), a share between 0 and 1, or a list of whole numbers "
        "(indices, negative ones from the end)."
    )


def check_range(name: str, choice: Choice, total: int, has: str) -> None:
    """Raises InvalidInputError where a choice names more than the `total` that there are; `has` says who has them."""
    if not isinstance(choice, tuple):
        if choice > total:
            raise InvalidInputError(f"{name} is {choice}; {has}. Give less.")
        return
    missing = [index for index in choice if not -total <= index < total]
    if missing:
        raise InvalidInputError(f"{name} names {missing}; {has}, so give {-total} to {total - 1}.")


def _whole(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def is_named(choice: Choice, index: int, total: int) -> bool:
    """Whether a choice among `total` steps or layers names the one of this index."""
    if isinstance(choice, tuple):
        return index in choice or index - total in choice
    return index < count(choice, total)


def count(choice: int | float, total: int) -> int:
    """How many a number or a share names; shares are rounded to whole steps."""
    return round(choice * total) if isinstance(choice, float) else choice
