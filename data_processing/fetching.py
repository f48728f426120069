"""Sources -> files on disk: whole, checked, and fetched once.

pooch keeps the cache: it compares checksums, and a file gets its name only when it is whole; `resuming` does the
download for it. The cache has one folder for each address, named after it:

    <cache_dir>/<name>-<hash of the address>/<name>               the file
                                             <name>.sha256        what arrived, where the manifest has no checksum
                                             <name>.part          a download to go on with
"""

import errno
import hashlib
import os
import re
import shutil
import threading
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pooch
from filelock import FileLock
from tqdm.auto import tqdm

from data_processing.resuming import Download, NotFetchedError, Retry, recorded_checksum
from data_processing.sources import Source

_LEFT_BEHIND = re.compile(r"tmp[a-z0-9_]{8}")  # pooch's temporary files, of a process that was killed
_NO_SPACE = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the disk takes no file of this size",
}


@dataclass(frozen=True)
class Fetched:
    """What became of one source.

    Attributes:
        path: the file, the folder that holds the files of a source with several addresses, or None.
        error: one sentence; empty where `path` is not None.
    """

    source: Source
    path: Path | None
    error: str = ""


def fetch_sources(
    sources: Sequence[Source],
    cache_dir: str | os.PathLike,
    num_workers: int = 4,
    progress: bool = True,
    retry: Retry | None = None,
) -> list[Fetched]:
    """Fetch what is not in the cache yet. One source that fails stops no other.

    A file of the cache counts only if its checksum is that of the manifest or, where the manifest has none, of
    `<file>.sha256`, which was written when it arrived; else it is fetched again. A broken download goes on where it
    stopped if the file on the server is still the same (ETag or date, and size). Local paths are used in place.

    Args:
        cache_dir: made where it is missing. Several processes may share it.
        num_workers: sources fetched at a time.
        progress: show one bar over all bytes.
        retry: how patiently; None is `Retry()`.

    Returns:
        One `Fetched` for each source, in their order.
    """
    stop = threading.Event()
    logger = pooch.get_logger()
    level = logger.level
    logger.setLevel("WARNING")  # pooch tells about every download; the bar does
    bar = _Bar(len(sources), progress)
    pool = ThreadPoolExecutor(max(1, num_workers))
    try:
        jobs = [pool.submit(_fetch, s, Path(cache_dir), retry or Retry(), bar, stop) for s in sources]
        return [job.result() for job in jobs]
    finally:
        stop.set()  # on Ctrl-C the threads end at their next piece, and leave a part to go on with
        pool.shutdown(cancel_futures=True)
        bar.close()
        logger.setLevel(level)


def _fetch(source: Source, cache_dir: Path, retry: Retry, bar: "_Bar", stop: threading.Event) -> Fetched:
    try:
        if not source.addresses:
            where = f" of {source.source}" if source.source else ""
            raise NotFetchedError(f"no address is known: put the direct address{where} into url (see notes)")
        path = _local_path(source) if source.is_local else _cached_path(source, cache_dir, retry, bar, stop)
    except NotFetchedError as error:
        return Fetched(source, None, f"{source.id}: {error}.")
    except OSError as error:
        return Fetched(source, None, f"{source.id}: {_describe_os_error(error, cache_dir)}.")
    finally:
        bar.one_done()
    return Fetched(source, path)


def _local_path(source: Source) -> Path:
    (address,), (checksum,) = source.addresses, source.checksums
    if "://" in address:
        parts = urlsplit(address)
        if parts.netloc not in ("", "localhost"):
            raise NotFetchedError(f"{address} lies on another machine: give file:///path with three slashes")
        address = urllib.request.url2pathname(parts.path)
    path = Path(os.path.expanduser(os.path.expandvars(address)))
    if not path.exists():
        hint = " (is the variable set?)" if "$" in str(path) else ""
        raise NotFetchedError(f"{path} does not exist{hint}: correct url in the manifest")
    if checksum and not path.is_file():
        raise NotFetchedError(f"{path} is a folder and has no checksum: leave checksum empty")
    if checksum and not pooch.hashes.hash_matches(str(path), checksum):
        algorithm = checksum.partition(":")[0]
        found = f"{algorithm}:{pooch.file_hash(str(path), alg=algorithm)}"
        raise NotFetchedError(f"{path} has checksum {found}, expected {checksum}: it is damaged, or another file")
    return path


def _cached_path(source: Source, cache_dir: Path, retry: Retry, bar: "_Bar", stop: threading.Event) -> Path:
    """The file, or the folder of several files; each fetched unless a whole one is there."""
    names = _file_names(source.addresses)
    # By address rather than by id: rows that name different members of one archive share one download, and a
    # manifest with a new address never takes the old address' file for the new one.
    places = "\n".join(_without_user(a) for a in source.addresses)
    folder = cache_dir / f"{names[0]}-{hashlib.sha256(places.encode()).hexdigest()[:10]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        for entry in folder.iterdir():
            if _LEFT_BEHIND.fullmatch(entry.name) and entry.name not in names:
                entry.unlink()
        for address, name, checksum in zip(source.addresses, names, source.checksums, strict=True):
            _retrieve(Download(address, folder / name, bool(checksum), retry, bar.tell, stop), checksum)
    return folder / names[0] if len(names) == 1 else folder


def _retrieve(download: Download, checksum: str) -> None:
    """Let pooch bring the file to `download.target`, unless it is there and has the right checksum."""
    target = download.target
    known = checksum or recorded_checksum(target)
    if not known and target.exists():  # nothing vouches for it
        os.replace(target, download.part)
    place = {"fname": target.name, "path": target.parent}
    for last_try in (False, True):
        try:
            # pooch has the address for its messages alone, so it is not given the password.
            pooch.retrieve(download.shown, known or None, **place, downloader=download)
            return
        except ValueError as error:  # another checksum; pooch has thrown away what arrived
            if download.resumed and not last_try:
                continue  # the part may have been bad
            match = re.search(r"got (\w+)", str(error))
            found = f"{known.partition(':')[0]}:{match[1]}" if match else "another one"
            expected = f"expected {known}: the file is damaged, or the manifest is out of date"
            if not checksum:
                expected = f"but had {known} when first fetched: if the change is meant, remove {download.record}"
            raise NotFetchedError(f"{download.shown} has checksum {found}, {expected}") from error


class _Bar:
    """One bar over the bytes of all sources, told by several threads."""

    def __init__(self, num_sources: int, progress: bool) -> None:
        self._num_sources, self._num_done = num_sources, 0
        self._files: dict[Path, tuple[int, int]] = {}  # bytes there, bytes in all
        self._size = 0  # of all files
        self._lock = threading.Lock()
        self._bar = tqdm(desc="fetch", unit="B", unit_scale=True, unit_divisor=1024, disable=not progress)

    def tell(self, target: Path, num_bytes: int, size: int | None) -> None:
        with self._lock:
            before, size_before = self._files.get(target, (0, 0))
            self._files[target] = (num_bytes, size or 0)
            self._size += (size or 0) - size_before
            self._bar.total = self._size or None
            self._bar.update(num_bytes - before)  # less than nothing where a download starts again

    def one_done(self) -> None:
        with self._lock:
            self._num_done += 1
            self._bar.set_postfix_str(f"{self._num_done} of {self._num_sources} sources")

    def close(self) -> None:
        self._bar.close()


def _file_names(addresses: Sequence[str]) -> list[str]:
    """The last part of each path as a safe file name, each once."""
    names: list[str] = []
    for address in addresses:
        last = unquote(urlsplit(address).path).rstrip("/").rpartition("/")[2]
        name = re.sub(r"[^A-Za-z0-9._+-]", "_", last)[-150:].lstrip(".") or "download"
        names.append(name if name not in names else f"{len(names)}_{name}")
    return names


def _without_user(address: str) -> str:
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _describe_os_error(error: OSError, folder: Path) -> str:
    if error.errno in _NO_SPACE:
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        return f"{_NO_SPACE[error.errno]} ({free} bytes are free at {folder}): make room and fetch again, which goes on"
    where = error.filename or folder
    return f"{where} cannot be used ({error.strerror or type(error).__name__}): check folder and permissions"
