"""Results on disk: checked before the long run, written under a temporary name, there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from fastdiff_kernels.errors import InvalidInputError

# Room for reports, pictures and what the video encoder buffers.
SPARE_BYTES = 16 * 2**20


@contextlib.contextmanager
def staged(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yields a temporary folder inside `folder`; its files move to `folder` when the body ends without an error.

    Args:
        folder: Where the results go; it is created.
        names: The files that the body may write.

    Raises:
        InvalidInputError: Before the body runs, if `folder` cannot be written, lacks room, or holds a folder of one
            of those names.
    """
    missing = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [name for name in names if _is_folder(folder / name)]
        temporary = Path(tempfile.mkdtemp(prefix=".fastdiff-", dir=folder))
    except OSError as error:
        _remove_empty(missing)
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror
        raise InvalidInputError(f"cannot write to {folder}: {reason}; choose another place.") from error
    done = False
    try:
        for name in taken:
            raise InvalidInputError(f"{folder / name} is a folder; choose another place.")
        check_room(folder)
        yield temporary
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)
        done = True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not done:
            _remove_empty(missing)


def check_room(folder: Path, pixel_bytes: int = 0) -> None:
    """Compares free space with the size of all results uncompressed, the upper limit of what they take.

    Raises:
        InvalidInputError: If there is less.
    """
    free, needed = shutil.disk_usage(folder).free, pixel_bytes + SPARE_BYTES
    if free < needed:
        raise InvalidInputError(
            f"{folder} has {free / 2**20:.0f} MiB of free space and up to {needed / 2**20:.0f} MiB are needed; make "
            "room, or choose another place."
        )


def _is_folder(path: Path) -> bool:
    # Unlike Path.is_dir it raises for a name that cannot exist, such as one that is too long.
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return False


def _remove_empty(folders: Sequence[Path]) -> None:
    for path in folders:
        with contextlib.suppress(OSError):
            path.rmdir()
