"""Tables and numbers as the README writes them. Standard library only."""

from __future__ import annotations


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def significant(value: float, digits: int = 3) -> str:
    """A number with so many digits at least, never in powers of ten."""
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, digits - max(whole, 1))}f}"


def versions(found: dict[str, str | None]) -> str:
    """`Python 3.12.3, torch 2.11.0`: those that are installed, fastdiff itself left out."""
    names = {"python": "Python", "threads": "CPU threads"}
    kept = ("python", "torch", "triton", "diffusers", "transformers", "flash-attn-4", "threads")
    return ", ".join(f"{names.get(name, name)} {found[name]}" for name in kept if found.get(name))
