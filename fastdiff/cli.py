"""The `fastdiff` command: its commands and its exit codes. Each command is a file of fastdiff/commands."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from fastdiff.commands import bench
from fastdiff.commands.calibrate import calibrate
from fastdiff.commands.compare import compare
from fastdiff.commands.doctor import doctor
from fastdiff.commands.failures import exit_code
from fastdiff.commands.generate import generate
from fastdiff.commands.models import models
from fastdiff.commands.plan import plan
from fastdiff.commands.presets import presets

app = typer.Typer(
    name="fastdiff",
    help="Sparse self-attention for diffusers pipelines: generate, compare, calibrate, look at plans, benchmark.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
for command in (generate, compare, plan, presets, calibrate, models, doctor):
    app.command()(command)
app.add_typer(bench.app, name="bench")


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from fastdiff import __version__

        typer.echo(__version__)
        raise typer.Exit


def _once() -> Callable[[logging.LogRecord], bool]:
    """Lets each line through once: a command may put the same method in place several times."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(said)
        said.add(record.getMessage())
        return len(said) > before

    return is_new


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input (one line on stderr), 130 for Ctrl-C."""
    handler = logging.StreamHandler()
    handler.addFilter(_once())
    logging.basicConfig(format="%(name)s: %(message)s", level=logging.WARNING, handlers=[handler])
    if arguments is None:
        arguments = sys.argv[1:]
        # `kill` cleans up as Ctrl-C does: no half-written files stay behind.
        signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    words = list(arguments) or ["--help"]
    return exit_code(lambda: app(words, prog_name="fastdiff", standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main())
