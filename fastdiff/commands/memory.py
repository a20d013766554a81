"""What cannot fit into this machine's memory is refused here, before the operating system kills without a word."""

from __future__ import annotations

from fastdiff_kernels.errors import InvalidInputError


def check_memory(needed: int, what: str, reduce: str) -> None:
    """Compares bytes with the memory of the machine.

    Args:
        needed: Bytes on the CPU at the least; what fits may still be too much beside other programs.
        what: What needs them, for the message; a plural.
        reduce: The options that would help.

    Raises:
        InvalidInputError: If the machine has less.
    """
    import psutil

    there = psutil.virtual_memory().total
    if needed > there:
        raise InvalidInputError(
            f"out of memory: {what} need at least {needed / 2**30:.0f} GiB and this machine has "
            f"{there / 2**30:.0f}; reduce {reduce}."
        )
