"""What a user sees while waiting: stages and bars on stderr, so that stdout keeps to results."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Stage:
    """One thing that takes a while; `advance` moves its bar, `rename` says what it does now."""

    def __init__(self, progress: Progress | None = None, task=None):
        self._progress, self._task = progress, task

    def advance(self) -> None:
        if self._progress is not None:
            self._progress.advance(self._task)

    def rename(self, text: str) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=text)


def console() -> Console:
    """stderr as it is now (tests exchange it)."""
    return Console(stderr=True, highlight=False)


@contextlib.contextmanager
def stage(text: str, total: int | None = None) -> Iterator[Stage]:
    """Shows a spinner, or a bar of `total` parts, while its body runs; plain lines where stderr is no terminal."""
    where = console()
    if not where.is_terminal:
        start = time.perf_counter()
        where.print(f"{text} …", markup=False)
        yield Stage()
        where.print(f"{text}: {time.perf_counter() - start:.1f} s", markup=False)
        return
    parts = [BarColumn(bar_width=30), MofNCompleteColumn()] if total else []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), *parts, TimeElapsedColumn())
    with Progress(*columns, console=where) as progress:
        task = progress.add_task(text, total=total)
        yield Stage(progress, task)
        if total is None:
            progress.update(task, total=1, completed=1)


@contextlib.contextmanager
def results_only_on_stdout() -> Iterator[None]:
    """Sends to stderr what libraries print while the body runs."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
