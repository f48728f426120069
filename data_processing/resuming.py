"""One file over HTTP that goes on where a broken download stopped: a downloader for pooch, which cannot.

What has arrived lies in `<file>.part`, and `<file>.part.json` says of which version of the file it is a part. A later
request asks for the rest only (Range), and only of that version (If-Range); a server that has another one, or knows no
ranges, sends all of it, and the part is written anew.
"""

import json
import os
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
import urllib3
from pooch import file_hash

_PIECE = 1 << 15  # bytes; what is lost of a connection that breaks
_PROGRESS = 1 << 23  # bytes; a connection that brought as many was no failed try


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a download is tried.

    Attributes:
        num_tries: tries in a row that bring nothing (less than 8 MiB).
        first_wait: seconds before the second try; doubled before every further one.
        longest_wait: seconds; a server that asks for a longer pause (Retry-After) is given up.
        timeout: seconds to connect, and seconds without a byte.
    """

    num_tries: int = 6
    first_wait: float = 1.0
    longest_wait: float = 120.0
    timeout: tuple[float, float] = (15.0, 60.0)


class NotFetchedError(Exception):
    """The end of trying, with a reason to show."""


class _TryAgainError(Exception):
    """A reason that may pass. `wait`: seconds that the server asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Download:
    """The downloader for one address, which pooch is given.

    Attributes:
        shown: the address as it may be printed.
        resumed: whether some of what was fetched last comes from an earlier connection.
    """

    def __init__(
        self,
        address: str,
        target: Path,
        has_checksum: bool,
        retry: Retry,
        tell: Callable[[Path, int, int | None], None],
        stop: threading.Event,
    ) -> None:
        """`target`: where the file will lie in the end. `has_checksum`: pooch will compare it, so that no record of
        what arrived is needed. `tell(target, num_bytes, size)`: called at every piece. `stop`: end at the next one."""
        self.address, self.target, self.has_checksum = address, target, has_checksum
        self.retry, self.tell, self.stop = retry, tell, stop
        self.shown = shown_address(address)
        self.part, self.version_file = beside(target, ".part"), beside(target, ".part.json")
        self.record = beside(target, ".sha256")
        self.resumed = False

    def __call__(self, url: str, output_file: str, pooch: Any = None, check_only: bool = False) -> None:
        """Fetch the whole file to `output_file`. `url` is for pooch's messages alone: it lacks the password.

        Raises:
            NotFetchedError: in one sentence, why not.
            OSError: where the disk is full, for example.
        """
        self.resumed = self._size() > 0
        failures, before = 0, self._size()
        while True:
            try:
                self._try()
                break
            except _TryAgainError as problem:
                failures = 1 if self._size() - before >= _PROGRESS else failures + 1
                before = max(before, self._size())
                self._pause(problem, failures)
        if not self.has_checksum and not recorded_checksum(self.target):
            # Before the file has its name: then no file is ever without its record.
            checksum = file_hash(str(self.part), alg="sha256")
            _write_whole(self.record, f"{checksum}  {self.target.name}\n")
        os.replace(self.part, output_file)
        self.version_file.unlink(missing_ok=True)

    def _pause(self, problem: _TryAgainError, failures: int) -> None:
        tries = self.retry.num_tries
        if failures >= tries:
            raise NotFetchedError(f"{self.shown} {problem} ({tries} tries in a row): try again later") from problem
        wait = min(self.retry.first_wait * 2.0 ** (failures - 1), self.retry.longest_wait)
        wait = max(wait, problem.wait)
        if wait > self.retry.longest_wait:
            raise NotFetchedError(f"{self.shown} {problem} and asks for a pause of {wait:.0f} s: try again then")
        if self.stop.wait(wait):
            raise NotFetchedError(f"{self.shown} was interrupted: fetch again to go on")

    def _try(self) -> None:
        """One request. Returns with a whole part."""
        version = self._version()
        have = self._size() if version else 0
        if version and version.get("size") == have:
            return  # was whole already: killed before it had its name
        headers = {"Accept-Encoding": "identity"}  # the bytes of the file, so that lengths and ranges mean the same
        if have:
            headers |= {"Range": f"bytes={have}-", "If-Range": version["validator"]}
        with self._answer(headers) as answer:
            self._check_status(answer)
            if answer.status_code == 206:
                self._check_range(answer, version, have)
                self.resumed = True
            else:
                have, version, self.resumed = 0, self._new_version(answer), False
            with self.part.open("ab" if have else "wb") as file:
                if not have:
                    _write_whole(self.version_file, json.dumps(version) + "\n")
                for piece in self._pieces(answer):
                    file.write(piece)
                    have += len(piece)
                    self.tell(self.target, have, version["size"])
        size, expected = self._size(), version["size"]
        if expected is not None and size != expected:
            if size > expected:
                self._forget()
            raise _TryAgainError(f"ended after {size} of {expected} bytes")

    def _answer(self, headers: dict[str, str]) -> requests.Response:
        host = urlsplit(self.address).hostname
        try:
            return requests.get(self.address, headers=headers, stream=True, timeout=self.retry.timeout)
        # No exception's own text is shown: it may hold the address with its password, or where it leads with a key.
        except requests.exceptions.Timeout as error:
            raise _TryAgainError(f"gives no answer within {max(self.retry.timeout):g} s") from error
        except requests.exceptions.SSLError as error:
            raise NotFetchedError(f"{self.shown} has no valid certificate: check the address and the clock") from error
        except requests.exceptions.ConnectionError as error:
            causes = list(_causes(error))
            if any(isinstance(c, socket.gaierror) for c in causes):
                raise _TryAgainError(f"is not reachable, the name {host} is unknown (DNS)") from error
            if any(isinstance(c, ConnectionRefusedError) for c in causes):
                raise _TryAgainError("is not reachable, the connection is refused") from error
            raise _TryAgainError("is not reachable, the connection broke") from error
        except requests.exceptions.RequestException as error:
            raise NotFetchedError(f"{self.shown} is no usable address ({type(error).__name__}): correct url") from error

    def _check_status(self, answer: requests.Response) -> None:
        status = answer.status_code
        if status in (404, 410):
            raise NotFetchedError(f"{self.shown} answers {status}, there is no such file: correct url in the manifest")
        if status in (401, 403):
            raise NotFetchedError(f"{self.shown} answers {status}, access is refused: it needs a login or consent")
        if status == 416:  # the file has become shorter than the part
            self._forget()
            raise _TryAgainError("answers 416 to a range")
        if status in (408, 429) or status >= 500:
            raise _TryAgainError(f"answers {status}", _retry_after(answer))
        if status not in (200, 206):
            raise NotFetchedError(f"{self.shown} answers {status}, expected 200: correct url in the manifest")
        if answer.headers.get("Content-Type", "").lower().startswith("text/html"):
            raise NotFetchedError(f"{self.shown} is a web page, expected a file: give the file's own address")

    def _check_range(self, answer: requests.Response, version: dict[str, Any] | None, have: int) -> None:
        """The rest that was asked for, of the file that the part is of."""
        etag = answer.headers.get("ETag")
        same = version is not None and (etag is None or etag == version["etag"])
        found = re.match(r"bytes (\d+)-\d+/(\d+)$", answer.headers.get("Content-Range", ""))
        if not same or found is None or (int(found[1]), int(found[2])) != (have, version["size"]):
            self._forget()
            raise _TryAgainError("answers with another range than was asked for")

    def _new_version(self, answer: requests.Response) -> dict[str, Any]:
        """How to know this version of the file again: size, ETag, and what a later request may go on with."""
        headers = answer.headers
        framed = "Transfer-Encoding" in headers  # then a cut shows, though the length is not told
        size = headers.get("Content-Length") if not framed else None
        if size is None and not framed and not self.has_checksum:
            raise NotFetchedError(f"{self.shown} comes without its length, so a cut would not show: give a checksum")
        etag = headers.get("ETag", "")
        # A weak ETag may stand for different bytes, and without a size the end would not be known.
        strong = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
        number = int(size) if size and size.isdecimal() else None
        return {"size": number, "etag": etag, "validator": strong if number else ""}

    def _pieces(self, answer: requests.Response) -> Iterator[bytes]:
        try:
            for piece in answer.raw.stream(_PIECE, decode_content=False):
                if self.stop.is_set():
                    raise NotFetchedError(f"{self.shown} was interrupted: fetch again to go on")
                yield piece
        except urllib3.exceptions.ReadTimeoutError as error:
            raise _TryAgainError(f"sends nothing for {self.retry.timeout[1]:g} s") from error
        except (urllib3.exceptions.HTTPError, ConnectionError, ssl.SSLError) as error:
            raise _TryAgainError("breaks the connection") from error

    def _version(self) -> dict[str, Any] | None:
        """The version that the part belongs to; None where there is none to go on with."""
        if not (self.part.is_file() and self.version_file.is_file()):
            return None
        try:
            version = json.loads(self.version_file.read_text(encoding="utf-8"))
        except ValueError:  # cut short: as good as none
            return None
        return version if isinstance(version, dict) and version.get("validator") else None

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.is_file() else 0

    def _forget(self) -> None:
        self.part.unlink(missing_ok=True)
        self.version_file.unlink(missing_ok=True)


def shown_address(address: str) -> str:
    """An address as it may be printed: without user, password and query, which may hold a key."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    query = "?..." if parts.query else ""
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def recorded_checksum(target: Path) -> str:
    """ "sha256:..." of the file that once arrived as `target`; "" where there is no readable record."""
    record = beside(target, ".sha256")
    if not record.is_file():
        return ""
    match = re.match(r"[0-9a-f]{64}\b", record.read_text(encoding="utf-8", errors="replace"))
    return f"sha256:{match[0]}" if match else ""


def beside(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)


def _write_whole(path: Path, text: str) -> None:
    temporary = beside(path, ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _retry_after(answer: requests.Response) -> float:
    """Seconds that the server asks for, as a number or as a date; 0 where it does not say."""
    text = answer.headers.get("Retry-After", "")
    if text.strip().isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    date = date if date.tzinfo else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, those it was raised from, and those that requests and urllib3 carry as arguments."""
    waiting, seen = [error], set()
    while waiting:
        cause = waiting.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        yield cause
        nearby = (cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args)
        waiting += [near for near in nearby if isinstance(near, BaseException)]
