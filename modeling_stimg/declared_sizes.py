"""Files that say they hold more than they can: refused before memory is asked for.

An array that was never written takes no bytes of a file, whatever its shape, and a reader that believes the shape asks
for terabytes, or gets them and is killed.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.io

# What compression makes of bytes at most: deflate 1032 of one.
_MAX_RATIO = 1100
# Arrays of one value may take less. As much as this is never too much.
_FREE = 1 << 30
_SHORTEST_LINE = 4  # bytes of an entry in text: "1 1" and its end


def check_declared(declared: int, size: int) -> None:
    """ValueError where `declared` bytes cannot come out of a file or a folder of `size` bytes."""
    if declared > max(_FREE, _MAX_RATIO * size):
        raise ValueError(f"it says that it holds {declared:.1e} bytes, and has {size:,}")


def check_hdf5(file: h5py.File) -> None:
    """ValueError where the datasets of a file cannot come out of it."""
    sizes = []

    def add(_name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            sizes.append(int(item.size or 0) * item.dtype.itemsize)

    file.visititems(add)
    check_declared(sum(sizes), Path(file.filename).stat().st_size)


def check_matrix_market(path: Path, num_rows: int, num_columns: int) -> None:
    """ValueError where a Matrix Market file, gzipped or not, has another shape, or more entries than it can hold."""
    rows, columns, entries = (int(number) for number in scipy.io.mminfo(path)[:3])
    if (rows, columns) != (num_rows, num_columns):
        raise ValueError(f"{rows} x {columns} counts for {num_rows} features and {num_columns} barcodes")
    size = path.stat().st_size
    if entries * _SHORTEST_LINE > size * (_MAX_RATIO if path.suffix == ".gz" else 1):
        raise ValueError(f"it says that it holds {entries:,} entries, and has {size:,} bytes")


def zarr_bytes(metadata: Any) -> int:
    """Bytes of an array, or of one of its chunks where that is larger, by its metadata of version 2 or 3; 0 of a group.

    Raises:
        ValueError, TypeError, KeyError: no such metadata.
    """
    if not isinstance(metadata, Mapping) or "shape" not in metadata:
        return 0
    grid = metadata.get("chunk_grid")
    chunks = metadata["chunks"] if grid is None else grid["configuration"]["chunk_shape"]
    try:
        width = np.dtype(metadata.get("dtype", metadata.get("data_type"))).itemsize
    except (TypeError, ValueError):  # text of any length: as many references
        width = 8
    return max(math.prod(map(int, shape)) for shape in (metadata["shape"], chunks)) * max(width, 1)
