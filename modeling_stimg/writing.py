"""Files that appear whole or not at all, and what is said where a disk has no room for them."""

import errno
import gc
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anndata import AnnData

# No room; a quota, or a limit to the size of files, that is used up.
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than it may be",
}
_TOLD = re.compile(r"errno = (\d+)")  # as HDF5 words it


class NoRoomError(OSError):
    """There is no room for a file: the next one will not find any either."""


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, with the same suffix; renamed at the end, removed after any error or Ctrl-C.

    Raises:
        NoRoomError: in one sentence.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        number = _number_of_no_room(error)
        if number is None or isinstance(error, NoRoomError):
            raise
        raise NoRoomError(
            f"{path} could not be written, {_NO_ROOM[number]} ({errno.errorcode[number]}): make room, or name another "
            "place; nothing of it was left behind."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_h5ad(adata: "AnnData", path: str | os.PathLike) -> None:
    """Write a compressed .h5ad. Where there is no room, an OSError says so, and HDF5 no more than that.

    Every object that HDF5 cannot close any more prints a traceback of its own, whenever it is collected.
    """
    said, hook, number = StringIO(), sys.unraisablehook, None

    def others(unraisable: Any) -> None:
        if _number_of_no_room(unraisable.exc_value) is None:
            hook(unraisable)

    sys.unraisablehook = others
    try:
        with redirect_stderr(said):
            try:
                adata.write_h5ad(path, compression="gzip")
            except (OSError, RuntimeError) as error:
                number = _number_of_no_room(error)
                if number is None:
                    raise
                for link in _chain(error):
                    traceback.clear_frames(link.__traceback__)
            if number is not None:
                gc.collect()
    finally:
        sys.unraisablehook = hook
        if number is None:
            sys.stderr.write(said.getvalue())
    if number is not None:
        raise OSError(number, os.strerror(number), str(path))


def _number_of_no_room(error: BaseException) -> int | None:
    """Which of `_NO_ROOM` an error, or what it came from, tells of."""
    for link in _chain(error):
        # HDF5's own errors tell it in their text alone.
        told = _TOLD.search(str(link))
        number = link.errno if isinstance(link, OSError) and link.errno is not None else told and int(told[1])
        if number in _NO_ROOM:
            return number
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
