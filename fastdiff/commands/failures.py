"""The one place where errors become exit codes: 2 with one line for what the user can mend, 130 for Ctrl-C."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

import typer

USER_ERROR, INTERRUPTED = 2, 130

# typer carries its own copy of click or uses click itself, by version; this is the base of both.
UsageError = typer.BadParameter.__mro__[1]

_OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "Invalid buffer size")
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)


def exit_code(command: Callable[[], object]) -> int:
    """Runs a command and returns the exit code of the process.

    What is not the user's to mend, a fault of the program, keeps its traceback.
    """
    try:
        result = command()
    except (KeyboardInterrupt, typer.Abort):
        _tell("interrupted; nothing was written.")
        return INTERRUPTED
    except UsageError as error:
        where = "fastdiff" if error.ctx is None else error.ctx.command_path
        _tell(f"{error.format_message().rstrip('.')}; see {where} --help.")
        return USER_ERROR
    except _fastdiff_error() as error:
        _tell(str(error))
        return USER_ERROR
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _tell(
            "out of memory. Reduce the frames, the height or the width; on a GPU --dtype bfloat16 takes half of "
            f"float32. Nothing was written. ({_first_line(error)})"
        )
        return USER_ERROR
    except BrokenPipeError:
        # The reader of stdout has gone (`fastdiff … | head`); Python would complain again at exit.
        sys.stderr.close()
        return 1
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = f" {error.filename}" if error.filename else ""
        _tell(f"cannot write{place}: {error.strerror}. Nothing was written; choose another place or make room.")
        return USER_ERROR
    return result if isinstance(result, int) else 0


def _fastdiff_error() -> type[Exception]:
    # Its package brings torch, for which `fastdiff --help` should not wait.
    from fastdiff_kernels.errors import FastDiffError

    return FastDiffError


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was short, of the machine or of a GPU."""
    # torch.OutOfMemoryError is a RuntimeError that says "out of memory"; the CPU's has no type of its own.
    return isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tell(message: str) -> None:
    typer.echo("fastdiff: " + " ".join(message.split()), err=True)
