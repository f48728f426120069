"""A small file server on the loopback interface that knows ranges and ETags, and misbehaves where it is told to."""

import hashlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    """What was asked and answered; `sent`: bytes of the body that were handed to the connection."""

    path: str
    range: str
    if_range: str
    authorization: str
    status: int
    sent: int = 0


@dataclass
class Misbehaviour:
    """What the answers to one path lack.

    Attributes:
        times: for how many requests; None for all.
        status, headers: answer with these, and no file.
        drop_after: bytes after which the connection is cut.
        longer: what is added to Content-Length, so that the body looks cut.
        delay: seconds between pieces of 1024 bytes.
        etag: in place of the right one; "" for none.
        no_ranges: send all of the file, whatever is asked.
        any_version: send the range, whatever version is asked for.
        at_most: bytes of a range that are sent at a time.
        no_length: neither Content-Length nor chunks.
        chunked: chunks in place of Content-Length.
        content_type: of the answer.
    """

    times: int | None = None
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    drop_after: int | None = None
    longer: int = 0
    delay: float = 0.0
    etag: str | None = None
    no_ranges: bool = False
    any_version: bool = False
    at_most: int | None = None
    no_length: bool = False
    chunked: bool = False
    content_type: str = "application/octet-stream"


class Loopback:
    """Serves the files of `folder`. `requests` logs every request before it is answered, so that a client that has its
    answer finds it there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Request] = []
        self.during: Callable[[int], None] = lambda number: None  # called at every request, with how many came before
        self._plans: dict[str, list[Misbehaviour]] = {}
        self._lock = threading.Lock()
        self._server = QuietServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]

    def address(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def misbehave(self, name: str, **plan) -> None:
        """Add a `Misbehaviour`; those of one path follow each other."""
        self._plans.setdefault(f"/{name}", []).append(Misbehaviour(**plan))

    def behave(self) -> None:
        self._plans.clear()

    def plan(self, path: str) -> Misbehaviour:
        """What to do this time."""
        with self._lock:
            plans = self._plans.get(path, [])
            while plans and plans[0].times == 0:
                plans.pop(0)
            if not plans:
                return Misbehaviour()
            if plans[0].times is not None:
                plans[0].times -= 1
            return plans[0]

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(folder: Path) -> Iterator[Loopback]:
    server = Loopback(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


class QuietServer(ThreadingHTTPServer):
    """Says nothing of clients that have gone."""

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # the client has gone
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, loopback: Loopback, *args) -> None:
        self.loopback = loopback
        super().__init__(*args)

    def log_message(self, *args) -> None:
        """Nothing on stderr: `Loopback.requests` is the log."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        plan = self.loopback.plan(path)
        self.loopback.during(len(self.loopback.requests))
        file = self.loopback.folder / path.lstrip("/")
        if plan.status or not file.is_file():
            self._answer(path, plan.status or 404)
            for name, value in {"Content-Length": "0", **plan.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            return
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"' if plan.etag is None else plan.etag
        start = 0 if plan.no_ranges else self._start(etag, plan.any_version)
        if start >= len(content) > 0:
            self._answer(path, 416)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = content[start:] if not start or plan.at_most is None else content[start : start + plan.at_most]
        request = self._answer(path, 206 if start else 200)
        self._send_headers(plan, len(body), start, len(content), etag)
        self._send_body(plan, body, request)

    def _answer(self, path: str, status: int) -> Request:
        """Begin an answer, and log it."""
        wanted = (self.headers.get(name, "") for name in ("Range", "If-Range", "Authorization"))
        request = Request(path, *wanted, status)
        self.loopback.requests.append(request)
        self.send_response(status)
        return request

    def _start(self, etag: str, any_version: bool) -> int:
        """The first byte that is asked for; 0 where it is asked of another version."""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match is None or (self.headers.get("If-Range", etag) != etag and not any_version):
            return 0
        return int(match[1])

    def _send_headers(self, plan: Misbehaviour, length: int, start: int, size: int, etag: str) -> None:
        self.send_header("Content-Type", plan.content_type)
        if plan.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif plan.no_length:
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(length + plan.longer))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{start + length - 1}/{size}")
        if etag:
            self.send_header("ETag", etag)
        self.end_headers()

    def _send_body(self, plan: Misbehaviour, body: bytes, request: Request) -> None:
        body = body if plan.drop_after is None else body[: plan.drop_after]
        step = 1024 if plan.delay else 1 << 16
        try:
            for begin in range(0, len(body), step):
                piece = body[begin : begin + step]
                request.sent += len(piece)
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if plan.chunked else piece)
                time.sleep(plan.delay)
            if plan.chunked and plan.drop_after is None:
                self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:  # the client has gone
            self.close_connection = True
        if plan.drop_after is not None or plan.longer:
            self.close_connection = True
