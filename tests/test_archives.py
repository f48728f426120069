"""Unpacking: all of a good archive, nothing of a bad one."""

import gzip
import io
import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from modeling_stimg import archives
from modeling_stimg.archives import gunzip, is_archive, unpack

FILES = {"outs/a.txt": b"first", "outs/spatial/b.bin": bytes(range(256)) * 40, "empty": b""}
KINDS = ("zip", "tar", "tar.gz", "tar.bz2", "tar.xz")


def write_archive(path: Path, files: dict[str, bytes], extra: list[tarfile.TarInfo] = ()) -> Path:
    """A zip or tar archive, as the name says; `extra`: members of tar archives without content."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return path
    mode = "w" if path.suffix == ".tar" else f"w:{path.suffix.removeprefix('.')}"
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra:
            archive.addfile(info)
    return path


def member(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_link(path: Path, name: str, target: str) -> Path:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, target)
    return path


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".unpacked")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def everything(folder: Path) -> list[Path]:
    """All files and folders but the lock and its place."""
    return sorted(path for path in folder.rglob("*") if path.name not in ("place", ".folder.lock"))


def assert_refused(path: Path, message: str, **limits) -> None:
    """One sentence that names the archive, and nothing left, inside or outside of the folder."""
    place = path.parent / "place"
    before = everything(path.parent)
    with pytest.raises(ValueError, match=message) as caught:
        unpack(path, place / "folder", **limits)
    assert str(caught.value).startswith(f"{path} ")
    assert "\n" not in str(caught.value)
    assert everything(path.parent) == before


@pytest.mark.parametrize("kind", KINDS)
def test_archives_arrive_whole(tmp_path, kind):
    path = write_archive(tmp_path / f"a.{kind}", FILES)
    assert is_archive(path)
    folder = unpack(path, tmp_path / "deep" / "folder")
    assert folder == tmp_path / "deep" / "folder"
    assert content(folder) == FILES
    nameless = path.rename(tmp_path / "39055556")  # what it is, the content says
    assert is_archive(nameless)
    assert content(unpack(nameless, tmp_path / "again")) == FILES


def test_unpacked_once_and_again_when_it_changes(tmp_path):
    path = write_archive(tmp_path / "a.zip", FILES)
    folder = unpack(path, tmp_path / "folder")
    (folder / "empty").write_bytes(b"changed")
    unpack(path, folder)
    assert content(folder)["empty"] == b"changed"
    write_archive(path, {"new": b"1"})
    assert content(unpack(path, folder)) == {"new": b"1"}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").touch()
    with pytest.raises(ValueError, match="is there already and not of an archive"):
        unpack(path, tmp_path / "mine")
    assert (tmp_path / "mine" / "precious").exists()


def test_what_a_killed_process_left_is_replaced(tmp_path):
    path = write_archive(tmp_path / "a.tar", FILES)
    (tmp_path / ".folder.unpacking" / "half").mkdir(parents=True)
    assert content(unpack(path, tmp_path / "folder")) == FILES
    assert not (tmp_path / ".folder.unpacking").exists()


def test_inner_archives_stay(tmp_path):
    matrix = gzip.compress(b"%%MatrixMarket")
    path = write_archive(tmp_path / "GSE1_RAW.tar", {"GSM1_matrix.mtx.gz": matrix, "GSM1_spatial.tar.gz": b"inner"})
    folder = unpack(path, tmp_path / "folder")
    assert content(folder) == {"GSM1_matrix.mtx.gz": matrix, "GSM1_spatial.tar.gz": b"inner"}


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "C:/evil", "outs/.."])
def test_members_outside_are_refused(tmp_path, kind, name):
    path = write_archive(tmp_path / f"a.{kind}", FILES | {name: b"evil"})
    assert_refused(path, "lies outside of the folder: it is not unpacked")


def test_backslashes_of_windows(tmp_path):
    path = write_archive(tmp_path / "a.zip", {"outs/a": b"1"})
    path.write_bytes(path.read_bytes().replace(b"outs/a", b"outs\\a"))
    assert content(unpack(path, tmp_path / "folder")) == {"outs/a": b"1"}
    path.write_bytes(path.read_bytes().replace(b"outs\\a", b"..\\..a").replace(b"..\\..a", b"..\\x\\a"))
    assert_refused(path, "lies outside")


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", ".."])
@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_links_that_point_outside_are_refused(tmp_path, kind, target):
    path = write_archive(tmp_path / "a.tar", FILES, [member("outs/link", kind, target)])
    if target == ".." and kind == tarfile.SYMTYPE:  # outs/.. is the folder itself
        assert_refused(path, "which is no file of it")
    else:
        assert_refused(path, "points outside")


def test_links_of_zip_archives(tmp_path):
    assert_refused(zip_link(write_archive(tmp_path / "a.zip", FILES), "outs/l", "../../etc/passwd"), "points outside")
    good = zip_link(write_archive(tmp_path / "b.zip", FILES), "outs/l", "a.txt")
    assert content(unpack(good, tmp_path / "folder")) == FILES | {"outs/l": b"first"}


def test_links_to_files_of_the_archive_are_copies(tmp_path):
    links = [member("outs/soft", tarfile.SYMTYPE, "./a.txt"), member("hard", tarfile.LNKTYPE, "outs/a.txt")]
    folder = unpack(write_archive(tmp_path / "a.tar.gz", FILES, links), tmp_path / "folder")
    assert content(folder) == FILES | {"outs/soft": b"first", "hard": b"first"}
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_nothing_is_written_through_a_link(tmp_path):
    """A link to a folder, and a member below it; and a chain of links each of which looks harmless."""
    through = [member("d", tarfile.SYMTYPE, "/tmp"), member("d/evil", tarfile.REGTYPE)]
    assert_refused(write_archive(tmp_path / "a.tar", {}, through), "points outside")
    chain = [member("a", tarfile.SYMTYPE, "."), member("a/b", tarfile.SYMTYPE, ".."), member("a/b/c", tarfile.REGTYPE)]
    assert_refused(write_archive(tmp_path / "b.tar", {}, chain), "which is no file of it|points outside")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices_are_refused(tmp_path, kind):
    assert_refused(write_archive(tmp_path / "a.tar", FILES, [member("dev", kind)]), "holds 'dev', which is a device")


@pytest.mark.parametrize("kind", KINDS)
def test_truncated_archives(tmp_path, kind):
    """Cut anywhere: nothing of it is taken for whole."""
    path = write_archive(tmp_path / f"a.{kind}", FILES | {"random": os.urandom(5000)})
    whole = path.read_bytes()
    end = len(whole) - (10240 if kind == "tar" else 1)  # a plain tar ends in zeros that nobody needs
    for size in sorted({20, 600, 1536, len(whole) // 3, len(whole) // 2, end - 600, end}):
        if size < len(whole):
            path.write_bytes(whole[:size])
            assert_refused(path, "cut short, damaged or no archive")


def test_a_tar_cut_between_members(tmp_path):
    """Where tarfile itself sees no damage: after a member, and at a header that is garbage."""
    path = write_archive(tmp_path / "a.tar", {"a": b"1", "b": b"2"})
    whole = path.read_bytes()
    path.write_bytes(whole[:1024])
    assert_refused(path, "no end mark")
    path.write_bytes(whole[:1024] + b"garbage!" * 64 + whole[1536:])
    assert_refused(path, "no end mark")


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2"])
def test_damaged_bytes(tmp_path, kind):
    path = write_archive(tmp_path / f"a.{kind}", {"random": os.urandom(5000)})
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)
    assert_refused(path, "damaged")


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_bombs_are_refused(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(archives, "_FREE_OF_RATIO", 10_000)
    path = write_archive(tmp_path / f"a.{kind}", {f"zeros{i}": bytes(200_000) for i in range(4)})
    assert_refused(path, r"unpacks to more than \d+ bytes from \d+, the most that is allowed", max_ratio=50)
    assert_refused(path, "unpacks to more than 700000 bytes", max_bytes=700_000, max_ratio=1e6)
    assert len(content(unpack(path, tmp_path / "folder", max_ratio=1e6))) == 4


def test_a_small_archive_of_zeros_is_no_bomb(tmp_path):
    path = write_archive(tmp_path / "a.zip", {"zeros": bytes(2_000_000)})
    assert path.stat().st_size * archives.MAX_RATIO < 2_000_000
    assert len(content(unpack(path, tmp_path / "folder"))["zeros"]) == 2_000_000


@pytest.mark.parametrize("size", [0, 10])
def test_a_zip_that_lies_about_sizes(tmp_path, size):
    path = write_archive(tmp_path / "a.zip", {"zeros": bytes(100_000)})
    true, false = (100_000).to_bytes(4, "little"), size.to_bytes(4, "little")
    path.write_bytes(path.read_bytes().replace(true, false))
    assert_refused(path, "cut short, damaged")


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    assert_refused(write_archive(tmp_path / "a.tar", {str(i): b"" for i in range(6)}), "more than 5 members")


def test_a_password(tmp_path):
    path = write_archive(tmp_path / "a.zip", {"a": b"1"})
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        data[data.index(signature) + offset] |= 1
    path.write_bytes(data)
    assert_refused(path, "needs a password: unpack it yourself")


def test_a_file_and_a_folder_of_one_name(tmp_path):
    assert_refused(write_archive(tmp_path / "a.tar", {"a": b"1", "a/b": b"2"}), "a file and a folder of one name")


def test_what_is_no_archive(tmp_path):
    path = tmp_path / "a.h5ad"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    assert not is_archive(path)
    assert not is_archive(tmp_path)
    assert not is_archive(tmp_path / "missing")
    assert_refused(path, "no archive")
    packed = tmp_path / "matrix.mtx.gz"
    packed.write_bytes(gzip.compress(b"text" * 1000))
    assert not is_archive(packed)


def test_gunzip(tmp_path, monkeypatch):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b"{}" * 5000))
    target = tmp_path / "a.json"
    target.write_text("old")
    assert gunzip(path, target).read_bytes() == b"{}" * 5000
    target.write_text("old")
    with pytest.raises(ValueError, match="unpacks to more than 100 bytes"):
        gunzip(path, target, max_bytes=100)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="cut short, damaged"):
        gunzip(path, target)
    assert target.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.gz"]


def test_full_disk(tmp_path):
    path = write_archive(tmp_path / "a.zip", {"random": os.urandom(500_000)})
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted ({mounted.stderr.decode().strip()})")
    try:
        with pytest.raises(OSError, match="The disk is full: make room to unpack"):
            unpack(path, disk / "folder")
        assert [p.name for p in disk.iterdir()] == [".folder.lock"]
    finally:
        subprocess.run(["umount", disk], check=True)
