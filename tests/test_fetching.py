"""Fetching from a server that breaks, lies and changes: what arrives is whole, and told in one sentence where not."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from loopback import Loopback, serving

from data_processing.fetching import Fetched, fetch_sources
from data_processing.resuming import Retry
from data_processing.sources import Source

CONTENT = np.random.default_rng(0).bytes(300_000)
OTHER = np.random.default_rng(1).bytes(300_000)
QUICK = Retry(num_tries=3, first_wait=0.01, longest_wait=0.1, timeout=(10.0, 10.0))


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.h5ad").write_bytes(CONTENT)
    (folder / "b.h5ad").write_bytes(OTHER)
    with serving(folder) as loopback:
        yield loopback


def source(server: Loopback, name: str = "a.h5ad", **fields) -> Source:
    return Source(**{"id": name.split(".")[0], "url": server.address(name), "layout": "h5ad", **fields})


def fetch(tmp_path: Path, *sources: Source, retry: Retry = QUICK) -> list[Fetched]:
    return fetch_sources(sources, tmp_path / "cache", num_workers=2, progress=False, retry=retry)


def fetch_one(tmp_path: Path, row: Source, retry: Retry = QUICK) -> Fetched:
    (fetched,) = fetch(tmp_path, row, retry=retry)
    assert (fetched.path is None) == bool(fetched.error)
    assert "\n" not in fetched.error
    return fetched


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def leftovers(tmp_path: Path) -> list[str]:
    """All files of the cache but locks, in order."""
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != ".lock")


# What goes well


def test_files_arrive_once(tmp_path, server, capfd):
    rows = [source(server, checksum=f"sha256:{sha256(CONTENT)}"), source(server, "b.h5ad")]
    first = fetch(tmp_path, *rows)
    assert [f.source for f in first] == rows
    assert [f.path.read_bytes() for f in first] == [CONTENT, OTHER]
    assert [f.path.name for f in first] == ["a.h5ad", "b.h5ad"]
    assert leftovers(tmp_path) == ["a.h5ad", "b.h5ad", "b.h5ad.sha256"]
    record = first[1].path.with_name("b.h5ad.sha256").read_text()
    assert record == f"{sha256(OTHER)}  b.h5ad\n"
    assert fetch(tmp_path, *rows) == first
    assert len(server.requests) == 2  # the second time none
    assert capfd.readouterr() == ("", "")


def test_md5_and_the_bar(tmp_path, server, capfd):
    row = source(server, checksum=f"md5:{hashlib.md5(CONTENT).hexdigest()}")
    (fetched,) = fetch_sources([row], tmp_path / "cache", retry=QUICK)
    assert fetched.path.read_bytes() == CONTENT
    out, err = capfd.readouterr()
    assert out == ""
    assert "293k/293k" in err
    assert "1 of 1 sources" in err
    assert "127.0.0.1" not in err  # pooch is silent


def test_local_files_are_used_in_place(tmp_path, monkeypatch):
    path = tmp_path / "my slide.h5ad"
    path.write_bytes(CONTENT)
    monkeypatch.setenv("SLIDES", str(tmp_path))
    for url in (str(path), "$SLIDES/my slide.h5ad", path.as_uri()):
        assert fetch_one(tmp_path, Source("a", url=url, checksum=f"sha256:{sha256(CONTENT)}")).path == path
    assert fetch_one(tmp_path, Source("a", url=str(tmp_path))).path == tmp_path
    wrong = fetch_one(tmp_path, Source("a", url=str(path), checksum=f"sha256:{sha256(OTHER)}"))
    assert wrong.error == (
        f"a: {path} has checksum sha256:{sha256(CONTENT)}, expected sha256:{sha256(OTHER)}: "
        "it is damaged, or another file."
    )
    for url, message in (
        (str(tmp_path / "no"), "no does not exist: correct url in the manifest"),
        ("$NOT_SET/a.h5ad", "is the variable set"),
        ("file://elsewhere/a.h5ad", "another machine"),
        ("", "no address is known"),
    ):
        assert message in fetch_one(tmp_path, Source("a", url=url)).error


def test_several_addresses_make_a_folder(tmp_path, server):
    addresses = [server.address("a.h5ad"), server.address("b.h5ad")]
    row = Source("two", url=" | ".join(addresses), layout="geo", checksum=f"|sha256:{sha256(OTHER)}")
    folder = fetch_one(tmp_path, row).path
    assert (folder / "a.h5ad").read_bytes() == CONTENT
    assert (folder / "b.h5ad").read_bytes() == OTHER
    assert fetch_one(tmp_path, row).path == folder
    assert len(server.requests) == 2


def test_rows_of_one_archive_share_a_download(tmp_path, server):
    """And a new address of the same name is another file."""
    rows = [source(server, id=f"s{i}", url=f"{server.address('a.h5ad')}#part{i}") for i in range(4)]
    fetched = fetch(tmp_path, *rows)
    assert len({f.path for f in fetched}) == 1
    assert len(server.requests) == 1
    (server.folder / "v2").mkdir()
    (server.folder / "v2" / "a.h5ad").write_bytes(OTHER)
    assert fetch_one(tmp_path, source(server, url=server.address("v2/a.h5ad"))).path.read_bytes() == OTHER


@pytest.mark.parametrize("name", ["39055556", "..", "%2e%2e%2fa%20b", "x" * 300])
def test_any_address_gives_a_safe_file_name(tmp_path, server, name):
    (server.folder / "39055556").write_bytes(CONTENT)
    fetched = fetch_one(tmp_path, Source("a", url=server.address(name)))
    if name == "39055556":
        assert fetched.path.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("served", "cache")] == []


# Connections that break


@pytest.mark.parametrize("checksum", ["", f"sha256:{sha256(CONTENT)}"])
def test_a_dropped_connection_goes_on(tmp_path, server, checksum):
    server.misbehave("a.h5ad", drop_after=200_000, times=1)
    assert fetch_one(tmp_path, source(server, checksum=checksum)).path.read_bytes() == CONTENT
    first, second = server.requests
    assert (first.range, first.status, first.sent) == ("", 200, 200_000)
    assert second.status == 206
    start = int(second.range.removeprefix("bytes=").removesuffix("-"))
    assert 200_000 - (1 << 15) <= start <= 200_000
    assert second.sent == len(CONTENT) - start  # only the rest
    assert second.if_range


def test_dropped_again_and_again(tmp_path, server):
    """Every connection brings a little: tries in a row count, and they do run out."""
    server.misbehave("a.h5ad", drop_after=60_000)
    fetched = fetch_one(tmp_path, source(server))
    assert fetched.path is None
    assert fetched.error.endswith("breaks the connection (3 tries in a row): try again later.")
    assert [name for name in leftovers(tmp_path) if ".part" not in name] == []
    assert len(server.requests) == 3
    server.behave()
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT
    assert server.requests[-1].status == 206
    assert server.requests[-1].sent < 230_000


def test_without_ranges_it_starts_again(tmp_path, server):
    server.misbehave("a.h5ad", drop_after=200_000, no_ranges=True, times=1)
    server.misbehave("a.h5ad", no_ranges=True)
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT
    assert [(r.status, r.sent) for r in server.requests] == [(200, 200_000), (200, len(CONTENT))]


@pytest.mark.parametrize("etag", ["", 'W/"weak"'])
def test_a_version_that_cannot_be_known_again_is_not_gone_on_with(tmp_path, server, etag):
    server.misbehave("a.h5ad", drop_after=200_000, etag=etag, times=1)
    server.misbehave("a.h5ad", etag=etag)
    server.during = lambda number: (server.folder / "a.h5ad").write_bytes(OTHER) if number else None
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == OTHER
    assert [r.range for r in server.requests] == ["", ""]


def test_a_file_that_changes_in_between_is_fetched_anew(tmp_path, server):
    server.misbehave("a.h5ad", drop_after=200_000, times=1)
    server.during = lambda number: (server.folder / "a.h5ad").write_bytes(OTHER[:250_000]) if number else None
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == OTHER[:250_000]
    assert [r.status for r in server.requests] == [200, 200]
    assert server.requests[1].range


def test_a_range_of_another_version_is_not_taken(tmp_path, server):
    """Of the same size, from a server that does not know If-Range."""
    server.misbehave("a.h5ad", drop_after=200_000, times=1)
    server.misbehave("a.h5ad", any_version=True)
    server.during = lambda number: (server.folder / "a.h5ad").write_bytes(OTHER) if number else None
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == OTHER
    assert [r.status for r in server.requests] == [200, 206, 200]


def test_the_rest_in_several_pieces(tmp_path, server):
    server.misbehave("a.h5ad", drop_after=200_000, times=1)
    server.misbehave("a.h5ad", at_most=80_000)
    assert fetch_one(tmp_path, source(server), Retry(num_tries=9, first_wait=0.01)).path.read_bytes() == CONTENT
    assert [r.status for r in server.requests] == [200, 206, 206]


def test_an_answer_that_is_not_the_rest_is_refused(tmp_path, server):
    """A range of a file of another size, though the ETag is the same."""
    server.misbehave("a.h5ad", drop_after=200_000, etag='"one"', times=1)
    fetch_one(tmp_path, source(server), Retry(num_tries=1))
    version = next((tmp_path / "cache").rglob("*.part.json"))
    version.write_text(version.read_text().replace("300000", "299999"))  # the range will be of another size
    server.misbehave("a.h5ad", etag='"one"')
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT
    assert [r.status for r in server.requests] == [200, 206, 200]


def test_a_shorter_file_answers_416_and_is_fetched_anew(tmp_path, server):
    server.misbehave("a.h5ad", drop_after=200_000, etag='"one"', times=1)
    server.misbehave("a.h5ad", etag='"one"')
    server.during = lambda number: (server.folder / "a.h5ad").write_bytes(OTHER[:100_000]) if number else None
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == OTHER[:100_000]
    assert [r.status for r in server.requests] == [200, 416, 200]


def test_a_bad_part_costs_one_more_download(tmp_path, server):
    row = source(server, checksum=f"sha256:{sha256(CONTENT)}")
    server.misbehave("a.h5ad", drop_after=200_000, times=1)
    fetch_one(tmp_path, row, Retry(num_tries=1))
    part = next((tmp_path / "cache").rglob("*.part"))
    part.write_bytes(b"x" + part.read_bytes()[1:])
    assert fetch_one(tmp_path, row).path.read_bytes() == CONTENT
    assert [r.status for r in server.requests] == [200, 206, 200]


def test_slow_but_alive(tmp_path, server):
    (server.folder / "small").write_bytes(CONTENT[:8192])
    server.misbehave("small", delay=0.2)  # 1.6 s in all, longer than the time without a byte
    row = source(server, "small")
    assert fetch_one(tmp_path, row, Retry(timeout=(10.0, 1.2))).path.read_bytes() == CONTENT[:8192]
    assert [r.status for r in server.requests] == [200]


def test_stalled(tmp_path, server):
    (server.folder / "small").write_bytes(CONTENT[:4096])
    server.misbehave("small", delay=1.0)
    error = fetch_one(tmp_path, source(server, "small"), Retry(num_tries=2, first_wait=0.01, timeout=(10.0, 0.2))).error
    assert error.endswith("sends nothing for 0.2 s (2 tries in a row): try again later.")


# Servers that refuse


def test_busy_servers_are_asked_again(tmp_path, server):
    server.misbehave("a.h5ad", status=503, times=1)
    server.misbehave("a.h5ad", status=429, headers={"Retry-After": "0"}, times=1)
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT
    assert [r.status for r in server.requests] == [503, 429, 200]


def test_retry_after_is_kept(tmp_path, server):
    server.misbehave("a.h5ad", status=429, headers={"Retry-After": "1"}, times=1)
    begin = time.monotonic()
    assert fetch_one(tmp_path, source(server), Retry(first_wait=0.01)).path is not None
    assert time.monotonic() - begin >= 1
    for asked in ("7200", "Wed, 21 Oct 2115 07:28:00 GMT"):
        server.misbehave("b.h5ad", status=503, headers={"Retry-After": asked}, times=1)
        assert "answers 503 and asks for a pause of" in fetch_one(tmp_path, source(server, "b.h5ad")).error


def test_waits_double(tmp_path, server):
    server.misbehave("a.h5ad", status=500)
    begin = time.monotonic()
    fetched = fetch_one(tmp_path, source(server), Retry(num_tries=4, first_wait=0.05))
    assert time.monotonic() - begin >= 0.35  # 0.05 + 0.1 + 0.2
    assert fetched.error.endswith("answers 500 (4 tries in a row): try again later.")
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("status", "message"), [(404, "there is no such file"), (403, "access is refused"), (418, "expected 200")]
)
def test_refusals_are_final(tmp_path, server, status, message):
    server.misbehave("a.h5ad", status=status)
    assert f"answers {status}, {message}" in fetch_one(tmp_path, source(server)).error
    assert len(server.requests) == 1
    assert leftovers(tmp_path) == []


def test_nobody_there(tmp_path, server):
    with serving(tmp_path) as gone:
        address = gone.address("a.h5ad")
    error = fetch_one(tmp_path, Source("gone", url=address)).error
    assert error == f"gone: {address} is not reachable, the connection is refused (3 tries in a row): try again later."
    error = fetch_one(tmp_path, Source("lost", url="http://no-such-host.invalid/a.h5ad")).error
    assert "is not reachable, the name no-such-host.invalid is unknown (DNS)" in error


def test_a_web_page_is_no_file(tmp_path, server):
    server.misbehave("a.h5ad", content_type="text/html; charset=utf-8")
    assert "is a web page, expected a file" in fetch_one(tmp_path, source(server)).error
    assert leftovers(tmp_path) == []


def test_others_go_on_when_one_fails(tmp_path, server):
    server.misbehave("a.h5ad", drop_after=10)
    rows = [source(server), source(server, "missing.h5ad"), Source("nowhere"), source(server, "b.h5ad")]
    fetched = fetch(tmp_path, *rows)
    assert [f.path is None for f in fetched] == [True, True, True, False]
    assert fetched[3].path.read_bytes() == OTHER
    assert [f.error.split(":")[0] for f in fetched] == ["a", "missing", "nowhere", ""]


# What must not be taken for whole


def test_wrong_checksum(tmp_path, server):
    expected = f"sha256:{sha256(OTHER)}"
    error = fetch_one(tmp_path, source(server, checksum=expected)).error
    assert f"has checksum sha256:{sha256(CONTENT)}, expected {expected}" in error
    assert leftovers(tmp_path) == []
    assert len(server.requests) == 1


@pytest.mark.parametrize("checksum", ["", f"sha256:{sha256(CONTENT)}"])
def test_a_body_shorter_than_stated(tmp_path, server, checksum):
    server.misbehave("a.h5ad", longer=7)
    assert fetch_one(tmp_path, source(server, checksum=checksum)).path is None
    assert [name for name in leftovers(tmp_path) if ".part" not in name] == []


def test_lengths_that_are_not_stated(tmp_path, server):
    """Chunks show a cut; without them and without a length only a checksum does."""
    server.misbehave("a.h5ad", chunked=True, drop_after=100_000, times=1)
    server.misbehave("a.h5ad", chunked=True)
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT
    assert [r.range for r in server.requests] == ["", ""]
    server.misbehave("b.h5ad", no_length=True)
    assert "comes without its length" in fetch_one(tmp_path, source(server, "b.h5ad")).error
    row = source(server, "b.h5ad", checksum=f"sha256:{sha256(OTHER)}")
    assert fetch_one(tmp_path, row).path.read_bytes() == OTHER


@pytest.mark.parametrize("checksum", ["", f"sha256:{sha256(CONTENT)}"])
def test_a_file_cut_in_the_cache_is_fetched_again(tmp_path, server, checksum):
    row = source(server, checksum=checksum)
    path = fetch_one(tmp_path, row).path
    path.write_bytes(CONTENT[:1000])
    assert fetch_one(tmp_path, row).path.read_bytes() == CONTENT
    assert len(server.requests) == 2


def test_a_file_that_nothing_vouches_for_is_fetched_again(tmp_path, server):
    path = fetch_one(tmp_path, source(server)).path
    path.write_bytes(CONTENT[:1000])
    path.with_name("a.h5ad.sha256").unlink()
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT


def test_a_later_change_of_the_file_is_noticed(tmp_path, server):
    path = fetch_one(tmp_path, source(server)).path
    path.unlink()
    (server.folder / "a.h5ad").write_bytes(OTHER)
    error = fetch_one(tmp_path, source(server)).error
    assert f"has checksum sha256:{sha256(OTHER)}, but had sha256:{sha256(CONTENT)} when first fetched" in error
    record = path.with_name("a.h5ad.sha256")
    assert str(record) in error
    assert not path.exists()
    record.unlink()
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == OTHER


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
CHILD = """
import resource, sys
from data_processing.fetching import fetch_sources
from data_processing.resuming import Retry
from data_processing.sources import Source
if int(sys.argv[3]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
row = Source("a", url=sys.argv[1], layout="h5ad")
print(fetch_sources([row], sys.argv[2], progress=False, retry=Retry(num_tries=2, first_wait=0.01))[0].error)
"""


def child(tmp_path: Path, server: Loopback, largest: int = 0) -> subprocess.Popen:
    arguments = [sys.executable, "-c", CHILD, server.address("a.h5ad"), str(tmp_path / "cache"), str(largest)]
    return subprocess.Popen(arguments, cwd=Path(__file__).parents[1], **PIPES, text=True)


def test_killed_in_the_middle_it_goes_on(tmp_path, server):
    server.misbehave("a.h5ad", delay=0.02, times=1)
    process = child(tmp_path, server)
    deadline = time.monotonic() + 20
    while not any(p.stat().st_size > 50_000 for p in (tmp_path / "cache").rglob("*.part")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not any(path.name == "a.h5ad" for path in (tmp_path / "cache").rglob("*"))
    assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT
    last = server.requests[-1]
    assert last.status == 206
    assert last.sent < len(CONTENT) - 40_000
    assert leftovers(tmp_path) == ["a.h5ad", "a.h5ad.sha256"]  # nothing of the killed process either


def test_full_disk(tmp_path, server):
    disk = tmp_path / "cache"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted ({mounted.stderr.decode().strip()})")
    try:
        error = fetch_one(tmp_path, source(server)).error
        assert error.startswith("a: the disk is full (0 bytes are free at")
        assert error.endswith("make room and fetch again, which goes on.")
        assert len(server.requests) == 1  # no use in asking again
        assert not any(path.name == "a.h5ad" for path in disk.rglob("*"))
        subprocess.run(["mount", "-o", "remount,size=2m", disk], check=True)
        assert fetch_one(tmp_path, source(server)).path.read_bytes() == CONTENT
        assert server.requests[-1].status == 206
    finally:
        subprocess.run(["umount", disk], check=True)


def test_files_of_limited_size(tmp_path, server):
    pytest.importorskip("resource", reason="no limits on the size of files here")
    output, told = child(tmp_path, server, largest=100_000).communicate(timeout=60)
    assert told == ""  # pooch is silent
    assert output.startswith("a: the disk takes no file of this size")
    assert not any(path.name == "a.h5ad" for path in (tmp_path / "cache").rglob("*"))


def test_a_folder_that_cannot_be_written(tmp_path, server):
    (tmp_path / "cache").write_text("a file")
    error = fetch_one(tmp_path, source(server)).error
    assert error.startswith("a: ")
    assert "cannot be used" in error


# Secrets


def test_no_password_is_shown(tmp_path, server, capfd):
    address = f"http://me:secret@127.0.0.1:{server.port}/a.h5ad?token=hidden"
    for plan in ({"status": 404}, {"status": 500}, {"drop_after": 5}, {"content_type": "text/html"}):
        server.behave()
        server.misbehave("a.h5ad", **plan)
        row = Source("a", url=address)
        error = fetch_one(tmp_path, row).error
        assert f"http://127.0.0.1:{server.port}/a.h5ad?..." in error
        assert "secret" not in error + repr(row)
        assert "hidden" not in error + repr(row)
    server.behave()
    wrong = fetch_one(tmp_path, Source("a", url=address, checksum="md5:" + "0" * 32)).error
    arrived = fetch_one(tmp_path, Source("a", url=address))
    assert arrived.path.read_bytes() == CONTENT
    assert server.requests[-1].authorization.startswith("Basic ")
    shown = "".join(capfd.readouterr()) + wrong + repr(arrived) + "".join(map(str, (tmp_path / "cache").rglob("*")))
    assert "secret" not in shown
    assert "hidden" not in shown


def test_environment_of_the_caller_is_left_alone(tmp_path, server):
    import pooch

    level, before = pooch.get_logger().level, dict(os.environ)
    fetch_one(tmp_path, source(server))
    assert pooch.get_logger().level == level
    assert dict(os.environ) == before
