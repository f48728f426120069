"""Files that appear whole or not at all, and what is said where a disk has no room for them."""

import errno
import functools
import io
import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

# No room; a quota, or a limit to the size of files, that is used up.
_NO_ROOM = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is larger than it may be",
}
# Half the time of the usual level 4 without a shuffle, and smaller files.
_OF_NUMBERS = {"compression": "gzip", "compression_opts": 1, "shuffle": True}
_PAGE = 1 << 16
_TOLD = re.compile(r"errno = (\d+)")  # as HDF5 words it


class NoRoomError(OSError):
    """There is no room for a file: the next one will not find any either."""


def check_place(path: Path, *inputs: str | os.PathLike) -> None:
    """Raise before the work where a file could not be written after it.

    Args:
        path: of the file. inputs: what is read, and must not be written over.

    Raises:
        FileNotFoundError, NotADirectoryError: no folder to write in. OSError: one that takes no files.
        ValueError: the file is one of the inputs.
    """
    for source in inputs:
        if path.resolve() == Path(source).expanduser().resolve():
            raise ValueError(f"{path} is read, and would be overwritten: name another file to write.")
    folder = path.parent
    if not folder.is_dir():
        if folder.exists():
            raise NotADirectoryError(f"The folder of {path} is a file: name a place in a folder.")
        raise FileNotFoundError(f"The folder of {path} does not exist: make it first.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}): name another folder.") from error


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
    """Write a compressed .h5ad, arrays with their bytes shuffled. Ctrl-C waits until it is written.

    Raises:
        OSError: there is no room, or another fault of the disk.
    """
    import h5py
    from anndata.experimental import write_dispatched

    adata.strings_to_categoricals()
    if adata.raw is not None:
        adata.strings_to_categoricals(adata.raw.var)
    with _PatientFile(path) as patient:
        try:
            with _ctrl_c_waits(), h5py.File(patient, "w") as file:
                write_dispatched(file, "/", adata, functools.partial(_write_compressed, patient))
        except Exception as error:
            if patient.error is None or error is patient.error:
                raise
            raise patient.error from error
        if patient.error is not None:
            raise patient.error


def _write_compressed(
    patient: "_PatientFile", write: Any, group: Any, key: str, element: Any, *, dataset_kwargs: Any, iospec: Any
) -> None:
    """A callback of `write_dispatched`: what is worth the time is compressed.

    Of names, HDF5 would compress nothing but the pointers, and digits of embeddings are as good as random.
    """
    if patient.error is not None:
        raise patient.error  # what is left of the slide would be written for nothing
    kind = iospec.encoding_type
    numbers = kind in ("csr_matrix", "csc_matrix") or (kind == "array" and np.ndim(element) > 0)
    random = group.name == "/obsm" and np.asarray(element).dtype.kind == "f"
    write(group, key, element, dataset_kwargs=_OF_NUMBERS if numbers and not random else {})


class _PatientFile(io.FileIO):
    """A new file for HDF5, which cannot close one that has no room, and crashes when the process ends, if not before.

    After the first error, which is kept in `error`, everything else is written to memory, and read from there: HDF5
    reads again what it has written, and crashes where that is not there.
    """

    def __init__(self, path: str | os.PathLike):
        super().__init__(path, "w+")
        self.error: OSError | None = None
        self._pages: dict[int, bytearray] = {}  # what the file lacks, by number of the page
        self._end = 0  # of the file, had there been room

    def write(self, content: Any) -> int:
        """Write all of it, where there is room."""
        whole = memoryview(content).cast("B")
        start, written = self.tell(), 0
        try:
            while self.error is None and written < len(whole):
                written += super().write(whole[written:])
        except OSError as error:
            self._keep(error)
        if self.error is not None:
            self._write_pages(start + written, whole[written:])
            self.seek(start + len(whole))
        return len(whole)

    def readinto(self, buffer: Any) -> int:
        """Read what was written, wherever it is."""
        if self.error is None:
            return super().readinto(buffer)
        view = memoryview(buffer).cast("B")
        start = self.tell()
        size = max(min(len(view), self._end - start), 0)
        for number in range(start // _PAGE, -(-(start + size) // _PAGE)):
            first, last = max(number * _PAGE, start), min((number + 1) * _PAGE, start + size)
            page = self._page(number)
            view[first - start : last - start] = page[first - number * _PAGE : last - number * _PAGE]
        self.seek(start + size)
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """As of a file with everything in it."""
        if self.error is not None and whence == os.SEEK_END:
            offset, whence = self._end + offset, os.SEEK_SET
        return super().seek(offset, whence)

    def truncate(self, size: int | None = None) -> int:
        """Make the file as long as that, where there is room."""
        try:
            if self.error is None:
                return super().truncate(size)
        except OSError as error:
            self._keep(error)
        self._end = self.tell() if size is None else size
        return self._end

    def _keep(self, error: OSError) -> None:
        self.error, self._end = error, os.fstat(self.fileno()).st_size

    def _page(self, number: int) -> bytearray:
        if number in self._pages:
            return self._pages[number]
        return bytearray(os.pread(self.fileno(), _PAGE, number * _PAGE).ljust(_PAGE, b"\0"))

    def _write_pages(self, start: int, content: memoryview) -> None:
        end = start + len(content)
        for number in range(start // _PAGE, -(-end // _PAGE)):
            first, last = max(number * _PAGE, start), min((number + 1) * _PAGE, end)
            page = self._pages[number] = self._page(number)
            page[first - number * _PAGE : last - number * _PAGE] = content[first - start : last - start]
        self._end = max(self._end, end)


@contextmanager
def _ctrl_c_waits() -> Iterator[None]:
    """Ctrl-C is heard at the end: in the middle, HDF5 would be left with a file that it cannot close."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pressed: list[tuple[Any, ...]] = []
    before = signal.signal(signal.SIGINT, lambda *press: pressed.append(press))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed and callable(before):
            before(*pressed[0])


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
