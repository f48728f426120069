"""Legacy ST count tables: spots named XxY on one axis, genes on the other."""

import csv
import gzip
import re
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .parsing import positions_in_names, reading, tell

TABLE_SUFFIX = re.compile(r"\.(?:tsv|txt)(?:\.gz)?$")


def read_legacy_table(path: Path) -> AnnData:
    """A table of counts, spots x genes or genes x spots: whichever axis is named XxY holds the spots."""
    with reading(path.name, "a legacy ST count table"):
        rows, columns, frame = _read_table(path)
    values = _table_counts(frame)
    xy = positions_in_names(rows)
    if xy is None:
        rows, columns, values, xy = columns, rows, values.T, positions_in_names(columns)
    if xy is None:
        raise ValueError(
            f"not a legacy ST count table: neither all rows ({', '.join(columns[:2])}, ...) nor all columns "
            f"({', '.join(rows[:2])}, ...) are spots named XxY such as 10x13, name the spots by their array positions"
        )
    adata = AnnData(sp.csr_matrix(values), obs=pd.DataFrame(index=rows), var=pd.DataFrame(index=columns))
    pixels = _spot_pixels(path, xy)
    adata.obsm["spatial"] = xy if pixels is None else pixels
    return adata


def _read_table(path: Path) -> tuple[list[str], list[str], pd.DataFrame]:
    """Row names, column names and values. The names are taken as they stand: pandas would rename repeated columns, and
    the second `10x13` would become `10x13.1`, another place on the array."""
    options = {"header": None, "index_col": 0, "dtype": {0: str}, "keep_default_na": False, "low_memory": False}
    # utf-8-sig: a table saved by a spreadsheet may start with a byte-order mark, which is no part of a name.
    with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader([file.readline()], delimiter="\t"))
        frame = pd.read_csv(file, sep="\t", **options)
    if len(header) - frame.shape[1] not in (0, 1):  # R writes no name over the row names
        raise ValueError(f"{len(header)} column names for {frame.shape[1]} columns")
    return list(frame.index), header[len(header) - frame.shape[1] :], frame


def _table_counts(frame: pd.DataFrame) -> np.ndarray:
    """float32, of the table's shape."""
    text = frame.select_dtypes(exclude="number")
    if text.shape[1]:
        cell = next((cell for cell in text.iloc[:, 0] if not re.fullmatch(r"[\d.]+", str(cell))), text.iloc[0, 0])
        raise ValueError(f"the table holds {cell!r} where a count was expected: pass the table of raw counts")
    return frame.to_numpy(np.float32)


def _spot_pixels(path: Path, xy: np.ndarray) -> np.ndarray | None:
    """Pixels, float64 (num_spots, 2), of the spots at `xy`, from `<stem>.spots.tsv` beside `path`; None without it."""
    stem = TABLE_SUFFIX.sub("", path.name)
    names = dict.fromkeys((f"{stem}.spots.tsv", f"{stem.removesuffix('.counts')}.spots.tsv"))
    table = next((path.with_name(name) for name in names if path.with_name(name).is_file()), None)
    if table is None:
        return None
    with reading(table.name, "a table of spots (x, y, pixel_x, pixel_y)"):
        spots = pd.read_csv(table, sep="\t")[["x", "y", "pixel_x", "pixel_y"]].astype(np.float64)
        places = pd.MultiIndex.from_arrays(np.rint(spots[["x", "y"]].to_numpy().T))
    # Two rows on one place: the first. A pixel position is a convenience, no reason to refuse the counts.
    pixels = spots[["pixel_x", "pixel_y"]].set_axis(places)[~places.duplicated()]
    pixels = pixels.reindex(pd.MultiIndex.from_arrays(np.rint(xy.T))).to_numpy()
    missing = np.count_nonzero(~np.isfinite(pixels).all(axis=1))
    if missing:
        tell(f'{table} lacks {missing} of {len(xy)} spots: obsm["spatial"] is in array units instead of pixels')
        return None
    return pixels
