"""What a stranger drops on the page -> a slide, or one clear sentence.

Nothing of an upload is believed. A zip is unpacked into a folder of its own, which is removed again, with limits to
what comes out of it, and without links (`archives`). An HDF5 file can name other files of this machine as the place of
its values, and state sizes that no memory has: both are looked for before a value is read. Nothing is executed or
unpickled.
"""

import gzip
import tempfile
import zlib
from pathlib import Path

import h5py
from anndata import AnnData

from .archives import unpack
from .parsing import reading
from .slides import read_slide
from .space_ranger import MATRIX, space_ranger_outs
from .spatialdata_reading import is_store

SUFFIXES = (".h5ad", ".zip")
MAX_UPLOAD = 4 * 2**30  # bytes of a file that is dropped
MAX_UNPACKED = 16 * 2**30  # bytes of what comes out of it, in a folder or in memory
_BESIDES = ("__MACOSX", ".DS_Store", ".unpacked")  # what a zip, or its unpacking, leaves beside the slide
_PIECE = 1 << 20


def read_upload(path: Path, folder: Path, max_bytes: int = MAX_UNPACKED) -> AnnData:
    """The slide in a file that was dropped on the page.

    Args:
        path: an `.h5ad`, or a zip of a Space Ranger folder. folder: where a zip may be unpacked for the while.
        max_bytes: of all files of a zip, and of all arrays of an HDF5 file.

    Returns:
        As `read_slide`.

    Raises:
        ValueError: in one sentence that calls the upload by its name: another kind of file, a damaged, unsafe or too
            large one, or one that `read_slide` refuses.
        OSError: a full disk. ImportError: positions that need pyarrow, without it.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path.name} is neither .h5ad nor .zip: drop an .h5ad, or a zipped Space Ranger folder.")
    if suffix == ".h5ad":
        check_hdf5(path, max_bytes)
        try:
            return read_slide(path)
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{path}: ")) from error
    with tempfile.TemporaryDirectory(prefix="unpacked-", dir=folder) as temporary:
        return _read_zip(path, Path(temporary), max_bytes)


def _read_zip(path: Path, temporary: Path, max_bytes: int) -> AnnData:
    """The slide of a zipped Space Ranger folder, unpacked below `temporary`."""
    try:
        top = unpack(path, temporary / path.stem, max_bytes)
        outs = space_ranger_outs(_only_folder(top))
        if is_store(outs):
            raise ValueError("a zarr store: write its table as .h5ad and drop that")
        _check_matrix(outs, max_bytes)
        return read_slide(outs)
    except ValueError as error:
        told = str(error).replace(str(path), path.name)
        for place in (*sorted(temporary.rglob("*/"), key=lambda p: -len(str(p))), temporary):
            told = told.replace(f"{place}: ", "").replace(f"{place}/", "").replace(str(place), place.name)
        raise ValueError(told if path.name in told else f"{path.name}: {told}") from error


def _only_folder(folder: Path) -> Path:
    """The folder itself, or the one that is all that it holds, however deep."""
    entries = [entry for entry in folder.iterdir() if entry.name not in _BESIDES]
    if len(entries) == 1 and entries[0].is_dir() and entries[0].name != "binned_outputs":
        return _only_folder(entries[0])
    return folder


def _check_matrix(outs: Path, max_bytes: int) -> None:
    """Look at the counts of a Space Ranger folder before they are read."""
    if (outs / f"{MATRIX}.h5").is_file():
        check_hdf5(outs / f"{MATRIX}.h5", max_bytes)
        return
    left = max_bytes
    for path in sorted((outs / MATRIX).glob("*.gz")):
        try:
            with gzip.open(path) as file:
                while piece := file.read(_PIECE):
                    left -= len(piece)
                    if left < 0:
                        raise ValueError(f"the tables of counts hold more than {_size(max_bytes)}: too much for a page")
        except (EOFError, zlib.error, OSError) as error:
            raise ValueError(f"{path.name} is damaged or cut short ({error}): zip the folder again") from error


def check_hdf5(path: Path, max_bytes: int = MAX_UNPACKED) -> None:
    """Refuse an HDF5 file that is damaged, that has values outside of itself, or that is larger than it may be.

    Raises:
        ValueError: no HDF5; a link to another file; an array whose values lie in other files; arrays that take more
            than `max_bytes` in memory.
    """
    total = 0

    def look_at(name: str, item: h5py.Group | h5py.Dataset) -> None:
        nonlocal total
        if isinstance(item, h5py.Dataset):
            if item.external or item.is_virtual:
                outside.append(name)
            total += item.size * item.dtype.itemsize if item.size else 0

    def follow(name: str, link: object) -> None:
        if not isinstance(link, h5py.HardLink | h5py.SoftLink):
            outside.append(name)

    outside: list[str] = []
    with reading(path.name, "HDF5"), h5py.File(path, "r") as file:
        file.visititems_links(follow)
        file.visititems(look_at)
    if outside:
        raise ValueError(
            f"{path.name} keeps {outside[0]!r} in another file, which is not read: write the slide as one whole file."
        )
    if total > max_bytes:
        raise ValueError(
            f"{path.name} takes {_size(total)} in memory, and {_size(max_bytes)} are the most here: run stimg on the "
            "command line on a machine of your own."
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
