"""Archives -> folders, safely: all of an archive or nothing.

An archive from the web is not trusted. Members that would land outside of the folder, devices, links to anything but a
file of the same archive, passwords, and more bytes than stated are reasons to refuse the archive as a whole. No link is
ever made on disk (a link to a file of the archive becomes a copy), so no member can be written through one.
"""

import errno
import gzip
import lzma
import posixpath
import re
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from filelock import FileLock

MAX_BYTES = 200 * 2**30
MAX_RATIO = 200  # unpacked size to that of the archive; tables of counts are seldom beyond 50
MAX_MEMBERS = 1_000_000
_FREE_OF_RATIO = 64 * 2**20  # bytes; a small archive of zeros is no bomb
_MARKER = ".unpacked"  # inside of the folder: of which archive it is
_PIECE = 1 << 20


def unpack(path: str | Path, folder: str | Path, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO) -> Path:
    """Unpack a zip or tar archive (tar also compressed by gzip, bzip2 or xz; what it is, its content says).

    Archives within the archive, and single `.gz` files, stay as they are.

    Args:
        folder: what the archive's top becomes. It gets its name only when it is whole; where it is there already and
            of the same archive (name, size, time), nothing is done.
        max_bytes: of the unpacked files.
        max_ratio: unpacked bytes to the archive's size, from 64 MiB.

    Returns:
        `folder`.

    Raises:
        ValueError: an archive that is damaged, cut short, unsafe or too large, or a `folder` that is something else.
            Nothing is left behind but an empty lock file.
        OSError: where the disk is full, for example. Nothing is left behind either.
    """
    path, folder = Path(path), Path(folder)
    status = path.stat()
    stamp = f"{path.name} {status.st_size} {status.st_mtime_ns}\n"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            marker = folder / _MARKER
            if not marker.is_file():
                raise ValueError(f"{folder} is there already and not of an archive: name another folder or remove it")
            if marker.read_text(encoding="utf-8") == stamp:
                return folder
        temporary = folder.parent / f".{folder.name}.unpacking"
        _remove(temporary)  # of a process that was killed
        temporary.mkdir()
        try:
            with _one_sentence(path):
                _extract(path, temporary, _Budget(status.st_size, max_bytes, max_ratio))
            (temporary / _MARKER).write_text(stamp, encoding="utf-8")
            _remove(folder)  # of an older archive
            temporary.rename(folder)
        finally:
            _remove(temporary)
    return folder


def gunzip(path: str | Path, target: str | Path, max_bytes: int = MAX_BYTES, max_ratio: float = MAX_RATIO) -> Path:
    """Unpack a single `.gz` file to the file `target`, which is replaced. Raises as `unpack` does."""
    path, target = Path(path), Path(target)
    temporary = target.with_name(f".{target.name}.unpacking")
    try:
        with _one_sentence(path), gzip.open(path) as packed, temporary.open("wb") as file:
            budget = _Budget(path.stat().st_size, max_bytes, max_ratio)
            while piece := packed.read(_PIECE):
                budget.spend(len(piece))
                file.write(piece)
        temporary.replace(target)
    finally:
        _remove(temporary)
    return target


def is_archive(path: str | Path) -> bool:
    """Whether `path` is a zip or tar file, also one that is damaged further on."""
    path = Path(path)
    if not path.is_file():
        return False
    if _is_zip(path):
        return True
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, zlib.error, lzma.LZMAError):  # cut within the first block
        return re.search(r"\.(?:tar\.\w+|tgz)$", path.name.lower()) is not None


class _Refused(ValueError):
    """A reason of ours, as opposed to what a parser says of damage."""


@dataclass(frozen=True)
class _Member:
    """`kind`: "file", "folder", "link" (to `target`, a path in the archive) or anything else, which is refused."""

    name: str
    kind: str
    size: int = 0
    target: str = ""
    open: Callable[[], IO[bytes]] | None = None


class _Budget:
    """How many bytes may still be unpacked."""

    def __init__(self, packed: int, max_bytes: int, max_ratio: float) -> None:
        self.left = self.limit = int(min(max_bytes, max(_FREE_OF_RATIO, max_ratio * packed)))
        self.packed = packed

    def spend(self, num_bytes: int) -> None:
        self.left -= num_bytes
        if self.left < 0:
            raise _Refused(
                f"unpacks to more than {self.limit} bytes from {self.packed}, the most that is allowed: "
                "if it is meant to be that large, unpack it yourself and give the folder"
            )


def _extract(path: Path, into: Path, budget: _Budget) -> None:
    """All members below `into`, links last."""
    files: dict[str, Path] = {}
    links: list[tuple[str, str]] = []
    members = _zip_members(path) if _is_zip(path) else _tar_members(path, budget)
    with closing(members):
        for number, member in enumerate(members):
            if number >= MAX_MEMBERS:
                raise _Refused(f"holds more than {MAX_MEMBERS} members: unpack it yourself and give the folder")
            name = _safe_name(member.name)
            if name and member.kind == "folder":
                (into / name).mkdir(parents=True, exist_ok=True)
            elif name and member.kind == "link":
                links.append((name, member.target))
            elif name and member.kind == "file":
                budget.spend(member.size)
                files[name] = into / name
                _write(member, files[name])
            elif name:
                raise _Refused(f"holds {member.name!r}, which is {member.kind}: it is not unpacked")
    for name, target in links:
        place = posixpath.normpath(target)
        if target.startswith("/") or place.split("/")[0] == "..":
            raise _Refused(f"holds the link {name!r} that points outside, to {target!r}: it is not unpacked")
        if place not in files:
            raise _Refused(f"holds the link {name!r} to {target!r}, which is no file of it: it is not unpacked")
        budget.spend(files[place].stat().st_size)
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[place], into / name)


def _write(member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as packed, path.open("wb") as file:
        while left and (piece := packed.read(min(_PIECE, left))):
            file.write(piece)
            left -= len(piece)
        if left or packed.read(1):
            raise EOFError(f"{member.name} is not of the size that is stated")


def _safe_name(name: str) -> str:
    """A member's path below the folder, "" for the folder itself. Refused where it would leave it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or re.match(r"[A-Za-z]:", name) or "\0" in name:
        raise _Refused(f"holds {name!r}, which lies outside of the folder: it is not unpacked")
    return "/".join(parts)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"PK\3\4", b"PK\5\6")


def _zip_members(path: Path) -> Iterator[_Member]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.replace("\\", "/")
            mode = stat.S_IFMT(info.external_attr >> 16) if info.create_system == 3 else 0  # 3: Unix
            if info.flag_bits & 1:
                raise _Refused("needs a password: unpack it yourself and give the folder")
            if info.is_dir():
                yield _Member(name, "folder")
            elif mode == stat.S_IFLNK:
                if info.file_size > 4096:
                    raise _Refused(f"holds the link {name!r} to a path of {info.file_size} bytes: it is not unpacked")
                target = archive.read(info).decode("utf-8", errors="replace")
                yield _Member(name, "link", target=posixpath.join(posixpath.dirname(name), target))
            elif mode in (0, stat.S_IFREG):
                yield _Member(name, "file", info.file_size, open=lambda info=info: archive.open(info))
            else:
                yield _Member(name, "a device or pipe")


def _tar_members(path: Path, budget: _Budget) -> Iterator[_Member]:
    with tarfile.open(path, "r:*") as archive:
        for info in archive:
            if info.isdir():
                yield _Member(info.name, "folder")
            elif info.issym():
                yield _Member(info.name, "link", target=posixpath.join(posixpath.dirname(info.name), info.linkname))
            elif info.islnk():
                yield _Member(info.name, "link", target=info.linkname)
            elif info.isreg():
                yield _Member(info.name, "file", info.size, open=lambda info=info: archive.extractfile(info))
            else:
                yield _Member(info.name, "a device or pipe")
        # tarfile takes a cut between two members, or a damaged header, for the end; a whole archive ends in zeros.
        archive.fileobj.seek(archive.offset)
        if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError("no end mark")
        while piece := archive.fileobj.read(_PIECE):  # to the checksum at the end of a compressed one
            budget.spend(len(piece))


@contextmanager
def _one_sentence(path: Path) -> Iterator[None]:
    """Whatever may be wrong with an archive as one ValueError that names it; a full disk as OSError."""
    try:
        yield
    except _Refused as error:
        raise ValueError(f"{path} {error}") from error
    except NotImplementedError as error:
        raise ValueError(f"{path} is compressed in an unknown way ({error}): unpack it yourself") from error
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{path} holds a file and a folder of one name: it is not unpacked") from error
    except MemoryError:
        raise
    # Damage makes the parsers raise nearly anything: BadZipFile, TarError, EOFError, zlib.error, RuntimeError, and
    # OSError without a number, or with that of a seek to nowhere.
    except Exception as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"The disk is full: make room to unpack {path}, nothing was left behind.") from error
        if isinstance(error, OSError) and number not in (None, errno.EINVAL):
            raise
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ValueError(f"{path} is cut short, damaged or no archive ({reason}): fetch it again") from error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
