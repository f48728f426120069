"""Files that appear whole or not at all, and what is said where a disk has no room for them."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from anndata import AnnData

# No room; a quota, or a limit to the size of files, that is used up.
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than it may be",
}
_TOLD = re.compile(r"errno = (\d+)")  # as HDF5 words it


@contextmanager
def written_whole(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary name beside `path`, with the same suffix; renamed at the end, removed after any error or Ctrl-C.

    Raises:
        OSError: no room, in one sentence.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        reason = _no_room(error)
        if reason is None:
            raise
        raise OSError(
            f"{path} could not be written, {reason} ({error_name(error)}): make room, or name another --output; "
            "nothing of it was left behind."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_h5ad(adata: AnnData, path: str | os.PathLike) -> None:
    """Write an AnnData, compressed, whole or not at all."""
    with written_whole(path) as temporary:
        adata.write_h5ad(temporary, compression="gzip")


def error_name(error: BaseException) -> str:
    """ENOSPC and the like of an error that has one, else the name of its class."""
    return errno.errorcode.get(_number(error) or -1, type(error).__name__)


def _no_room(error: BaseException | None) -> str | None:
    """Why there was no room, where that is what an error, or what it came from, says."""
    while error is not None:
        if _number(error) in _NO_ROOM:
            return _NO_ROOM[_number(error)]
        error = error.__cause__ or error.__context__
    return None


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _TOLD.search(str(error))  # HDF5's own errors tell it in their text alone
    return int(found[1]) if found else None
