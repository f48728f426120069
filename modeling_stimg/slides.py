"""`read_slide`: whatever a user has of a slide -> one AnnData of raw counts with checked array positions.

Each reader returns an AnnData as its format gives it; `_checked` then does the same for all: counts verified and made
CSR, array positions made int64 or found in the pixels. Nothing that is read is executed or unpickled.
"""

import csv
import gzip
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata import AnnData, read_h5ad
from anndata.utils import make_index_unique

from .counts_stimg import check_counts

_KINDS = (
    "read_slide reads .h5ad files, Space Ranger output folders (outs/), "
    "legacy ST count tables (.tsv or .txt, also gzipped) and AnnData in memory"
)
# (row, column) of the array, in the order in which they are looked for: Visium, legacy ST (row = y, column = x), plain.
_ARRAY_COLUMNS = (("array_row", "array_col"), ("array_y", "array_x"), ("row", "col"))
_PIXEL_ROWS = ("pxl_row_in_fullres", "pxl_y", "pixel_y", "imagerow", "y")  # in pixels, after obsm["spatial"]
_PIXEL_COLUMNS = tuple(zip(_PIXEL_ROWS, ("pxl_col_in_fullres", "pxl_x", "pixel_x", "imagecol", "x"), strict=True))
# Legacy ST names a spot by its place, XxY, sometimes after the name of its section: 10x13, 13.064x6.086, A1_HE_15x16.
_SPOT_NAME = re.compile(r"(?:^|_)(\d+(?:\.\d+)?)x(\d+(?:\.\d+)?)$")
_TABLE_SUFFIX = re.compile(r"\.(?:tsv|txt)(?:\.gz)?$")
_MATRIX = "filtered_feature_bc_matrix"
_POSITION_FILES = ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet")
_POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


def read_slide(source: str | os.PathLike | AnnData) -> AnnData:
    """Read one slide: raw counts and the place of every spot on the array.

    `source` is one of

    - an AnnData, or an `.h5ad` file. The array positions are, in this order, `obs["array_row"]`, `obs["array_col"]`;
      `obs["array_y"]`, `obs["array_x"]` (row = y, column = x); `obs["row"]`, `obs["col"]`; or spot names such as
      `10x13` (X x Y, also after an underscore: column = X, row = Y). Without these, `lattice` finds the array
      in pixel coordinates: `obsm["spatial"]` (x, y), or columns such as `obs["pxl_y"]`, `obs["pxl_x"]`;
    - a Space Ranger output folder: `outs/` or its parent, with `filtered_feature_bc_matrix.h5` (or the folder
      `filtered_feature_bc_matrix/`) and `spatial/`. Named as scanpy names it: symbols made unique as `var_names`,
      `var["gene_ids"]`, `var["gene_name"]` (symbols as they are), `var["feature_types"]`, `obs["in_tissue"]`, images
      and scale factors in `uns["spatial"][library_id]`. Features that are not "Gene Expression" are left out, with a
      warning;
    - a legacy ST count table (`.tsv`, `.txt`, also `.gz`): spots named `XxY` as rows and genes as columns, or the other
      way round. A table `<stem>.spots.tsv` beside it (x, y, pixel_x, pixel_y) gives the pixel positions.

    Returns an AnnData of all spots, genes and columns of the source, in its order:

    - `X`: scipy CSR (num_spots, num_genes), raw counts, indices sorted; float32, from an AnnData the type it has;
    - `obs["array_row"]`, `obs["array_col"]`: int64, fractional positions rounded to the nearest integer;
    - `obsm["spatial"]`: (num_spots, 2) as the source has it; float64 pixels (column, row) from Space Ranger; (X, Y) in
      array units from a legacy table without pixels.

    An AnnData given as `source` is left as it is; the result shares its large arrays. Spot names may repeat, and two
    spots may sit on one array position.

    Raises FileNotFoundError where there is nothing; ValueError, in one sentence, for an unknown kind of file, an
    unreadable one, an empty slide, values that are no counts, missing or infinite positions, and pixels of no array;
    ImportError for `tissue_positions.parquet` without pyarrow; TypeError where `source` is neither path nor AnnData.
    """
    with warnings.catch_warnings():
        # Real slides repeat spot names, and nothing here looks a spot up by its name.
        warnings.filterwarnings("ignore", message="Observation names are not unique", category=UserWarning)
        if isinstance(source, AnnData):
            return _checked(source)
        if not isinstance(source, str | os.PathLike):
            raise TypeError(f"a slide cannot be read from a {type(source).__name__}: {_KINDS}")
        path = Path(source).expanduser()
        try:
            return _checked(_read_path(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _read_path(path: Path) -> AnnData:
    """The slide at `path`, unchecked."""
    name = path.name.lower()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {_KINDS}")
    if path.is_dir() and not name.endswith(".zarr"):
        return _read_space_ranger(_space_ranger_outs(path))
    if path.is_file() and name.endswith(".h5ad"):
        with reading(path.name, "an .h5ad file"):
            return read_h5ad(path)
    if path.is_file() and _TABLE_SUFFIX.search(name):
        return _read_legacy_table(path)
    if _MATRIX in name:
        raise ValueError("counts without positions: pass the Space Ranger folder that holds this file and spatial/")
    raise ValueError(f"unknown kind of slide: {_KINDS}")


@contextmanager
def reading(name: str, kind: str) -> Iterator[None]:
    """Turn whatever a parser throws into one ValueError. Only parsing belongs inside: checks say more outside."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    # Parsers of damaged files raise nearly anything: OSError, EOFError, KeyError, TypeError, zlib.error.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is damaged, cut short or not {kind} ({reason}): fetch or export it again") from error


def _checked(adata: AnnData) -> AnnData:
    """A new AnnData with counts in CSR and int64 array positions; `adata` is untouched, its large arrays are shared."""
    if adata.isbacked:
        adata = adata.to_memory()
    elif adata.is_view:
        adata = adata.copy()  # a view's arrays are cut out at every access: do it once
    if 0 in adata.shape:
        raise ValueError(
            f"the slide is empty ({adata.n_obs} spots, {adata.n_vars} genes): pass one with spots and genes"
        )
    counts = _as_csr(adata.X)
    try:
        check_counts(counts.data)
    except ValueError as error:
        raise ValueError(f"{str(error).rstrip('.')}; here {_where_counts_are(adata)}") from error
    obs = adata.obs.copy()
    obs["array_row"], obs["array_col"] = spot_positions(adata)
    shared = {name: dict(getattr(adata, name)) for name in ("obsm", "varm", "obsp", "varp", "layers")}
    return AnnData(counts, obs=obs, var=adata.var.copy(), uns=_copied_mapping(adata.uns), raw=adata.raw, **shared)


def _copied_mapping(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of `uns` copied, the arrays in them shared: a new key in the result is none in the input."""
    return {key: _copied_mapping(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _as_csr(values: Any) -> sp.csr_matrix:
    """Counts (num_spots, num_genes) as canonical CSR; its arrays are those of `values` where they can be."""
    if not isinstance(values, np.ndarray) and not sp.issparse(values):
        raise ValueError(f"X is a {type(values).__name__}: pass raw counts in memory, as a NumPy array or a scipy CSR")
    with reading("X", "a matrix of numbers"):
        matrix = sp.csc_matrix(values) if sp.issparse(values) and values.format == "csc" else sp.csr_matrix(values)
        matrix.check_format(full_check=True)  # an index out of bounds would otherwise read foreign memory later on
        matrix = matrix.tocsr()
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    return matrix


def _where_counts_are(adata: AnnData) -> str:
    """The end of the sentence that refuses `adata.X`: where this very slide holds counts, if it does."""
    for key in sorted(adata.layers, key=lambda name: name != "counts"):  # "counts" first
        if _holds_counts(adata.layers[key]):
            return f'adata.layers["{key}"] holds integer counts, set adata.X = adata.layers["{key}"]'
    if adata.raw is not None and _holds_counts(adata.raw.X):
        return "adata.raw holds integer counts, pass adata.raw.to_adata()"
    return "no layer of this slide holds them, nor does its .raw"


def _holds_counts(values: Any) -> bool:
    try:
        check_counts(values.data if sp.issparse(values) else values)
    except ValueError:
        return False
    return bool(values.max() > 0)


def spot_positions(adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every spot on the array, each int64 (num_spots)."""
    for names in _ARRAY_COLUMNS:
        if all(name in adata.obs for name in names):
            row, col = (_finite(adata.obs[name], f'obs["{name}"]') for name in names)
            break
    else:
        xy = _positions_in_names(adata.obs_names)
        if xy is None:
            from .lattice import array_positions  # scipy's spatial and image modules, for few slides

            return array_positions(_pixels(adata))
        col, row = xy.T
    return np.rint(row).astype(np.int64), np.rint(col).astype(np.int64)


def _pixels(adata: AnnData) -> np.ndarray:
    """Pixel coordinates (x, y) of every spot, float64 (num_spots, 2)."""
    if "spatial" in adata.obsm:
        return np.asarray(adata.obsm["spatial"], dtype=np.float64)[:, :2]  # a third column is the section or the depth
    for y, x in _PIXEL_COLUMNS:
        if x in adata.obs and y in adata.obs:
            return np.stack([_finite(adata.obs[name], f'obs["{name}"]') for name in (x, y)], axis=1)
    raise ValueError(
        'no array positions: looked for spot names such as 10x13, for obsm["spatial"], and in obs for '
        f"{', '.join(map(' + '.join, _ARRAY_COLUMNS + _PIXEL_COLUMNS))}: "
        'add obs["array_row"] and obs["array_col"] from spatial/tissue_positions.csv'
    )


def _finite(column: pd.Series, what: str) -> np.ndarray:
    """float64 (num_spots): the positions of one column. ValueError where one is missing, infinite or no number."""
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(
            f"{what} holds {bad.size} values that are no finite number (the first: {column.iloc[bad[0]]} at spot "
            f"{column.index[bad[0]]}): give every spot its position, or leave these spots out"
        )
    return values


def _positions_in_names(names: Iterable[str]) -> np.ndarray | None:
    """X and Y of spots that are all named XxY: float64 (num_spots, 2). None where one of them, or every one, is not."""
    matches = [_SPOT_NAME.search(name) for name in names]
    return np.array([match.groups() for match in matches], np.float64) if matches and all(matches) else None


def _space_ranger_outs(folder: Path) -> Path:
    """The folder that holds the counts and `spatial/`: `folder` itself or its `outs/`."""
    for outs in (folder, folder / "outs"):
        has_matrix = (outs / f"{_MATRIX}.h5").is_file() or (outs / _MATRIX).is_dir()
        if has_matrix and (outs / "spatial").is_dir():
            return outs
    for bins in (folder / "binned_outputs", folder / "outs" / "binned_outputs"):
        if bins.is_dir():
            raise ValueError(f"Visium HD, one slide per bin size: pass one of them, e.g. {bins}/square_016um")
    found = sorted(entry.name for entry in folder.iterdir())
    raise ValueError(
        f"not a Space Ranger output folder: looked for {_MATRIX}.h5 (or {_MATRIX}/) and spatial/, here and in outs/, "
        f"found {', '.join(found[:8]) or 'nothing'}{', ...' if len(found) > 8 else ''}: pass the folder that holds both"
    )


def _read_space_ranger(outs: Path) -> AnnData:
    name = f"{_MATRIX}.h5" if (outs / f"{_MATRIX}.h5").is_file() else _MATRIX
    with reading(name, "a 10x count matrix"):
        adata = _read_10x_h5(outs / name) if name.endswith(".h5") else _read_10x_mtx(outs / name)
    is_gene = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    if not is_gene.all():
        kinds = ", ".join(sorted(set(adata.var["feature_types"][~is_gene])))
        warnings.warn(f"{outs}: left out {np.sum(~is_gene)} features that are no genes ({kinds})", stacklevel=4)
        adata = adata[:, is_gene].copy()
    adata.var_names = make_index_unique(pd.Index(adata.var["gene_name"]).rename(None))

    positions = _positions_of(adata.obs_names, outs / "spatial")
    for column in ("in_tissue", "array_row", "array_col"):
        adata.obs[column] = positions[column].to_numpy()
    pixels = [_finite(positions[column], column) for column in ("pxl_col_in_fullres", "pxl_row_in_fullres")]
    adata.obsm["spatial"] = np.stack(pixels, axis=1)  # (num_spots, 2)
    folder = outs.resolve()
    library = adata.uns.pop("library_id", folder.parent.name if folder.name == "outs" else folder.name)
    adata.uns["spatial"] = {library: _images_and_scales(outs / "spatial")}
    return adata


def _read_10x_h5(path: Path) -> AnnData:
    """Counts of a 10x HDF5 file, version 3. `uns["library_id"]`: the library, where the file names it."""
    with h5py.File(path, "r") as file:
        matrix, features, libraries = file["matrix"], file["matrix/features"], file.attrs.get("library_ids", [])
        # Genes x barcodes in CSC is barcodes x genes in CSR: the same three arrays.
        counts = tuple(matrix[key][:] for key in ("data", "indices", "indptr"))
        counts = sp.csr_matrix(counts, shape=matrix["shape"][:][::-1], dtype=np.float32)
        names = [features[key].asstr()[:] for key in ("id", "name", "feature_type")]
        adata = _10x_slide(counts, matrix["barcodes"].asstr()[:], names)
    if len(libraries):
        adata.uns["library_id"] = libraries[0].decode() if isinstance(libraries[0], bytes) else str(libraries[0])
    return adata


def _read_10x_mtx(folder: Path) -> AnnData:
    """Counts of the folder `matrix.mtx`, `features.tsv`, `barcodes.tsv`, each gzipped or not."""
    paths = [folder / name for name in ("matrix.mtx", "features.tsv", "barcodes.tsv")]
    paths = [path if path.is_file() else path.with_name(f"{path.name}.gz") for path in paths]
    table = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False}
    features, barcodes = (pd.read_csv(path, **table) for path in paths[1:])
    counts = sp.csr_matrix(scipy.io.mmread(paths[0]).T, dtype=np.float32)
    return _10x_slide(counts, barcodes[0].to_numpy(), [features[column].to_numpy() for column in range(3)])


def _10x_slide(counts: sp.csr_matrix, barcodes: np.ndarray, features: list[np.ndarray]) -> AnnData:
    """`features`: ids, symbols, types. The genes are named by their ids for now, because symbols repeat."""
    var = dict(zip(("gene_ids", "gene_name", "feature_types"), features, strict=True))
    return AnnData(counts, obs=pd.DataFrame(index=barcodes), var=pd.DataFrame(var, index=features[0]))


def _positions_of(barcodes: pd.Index, spatial: Path) -> pd.DataFrame:
    """The rows of the positions file that belong to `barcodes`, in their order."""
    path = next((spatial / name for name in _POSITION_FILES if (spatial / name).is_file()), None)
    if path is None:
        raise ValueError(f"spatial/ holds no positions: looked for {', '.join(_POSITION_FILES)}, add one of them")
    with reading(f"spatial/{path.name}", "spot positions"):
        positions = _read_position_file(path)[_POSITION_COLUMNS].set_index("barcode")
    if not positions.index.is_unique:
        twice = positions.index[positions.index.duplicated()][0]
        raise ValueError(f"spatial/{path.name} holds barcode {twice} more than once: give each barcode one position")
    missing = barcodes[~barcodes.isin(positions.index)]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(barcodes)} barcodes of the matrix have no position in spatial/{path.name} "
            f"(e.g. {missing[0]}): counts and spatial/ must be of one Space Ranger run"
        )
    return positions.loc[barcodes]


def _read_position_file(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"reading {path} needs pyarrow: pip install 'stimg[data]'") from error
        return parquet.read_table(path, columns=_POSITION_COLUMNS).to_pandas()
    with path.open() as file:  # tissue_positions_list.csv has no header, unless someone renamed tissue_positions.csv
        has_header = file.readline().startswith("barcode")
    return pd.read_csv(path, names=None if has_header else _POSITION_COLUMNS)


def _images_and_scales(spatial: Path) -> dict[str, dict[str, Any]]:
    """What scanpy keeps in `uns["spatial"][library_id]`: images float32 (height, width, 3) in [0, 1], scale factors."""
    from PIL import Image

    images = {}
    for name in ("hires", "lowres"):
        path = spatial / f"tissue_{name}_image.png"
        if path.is_file():
            with reading(f"spatial/{path.name}", "an image"), Image.open(path) as image:
                images[name] = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    scales = spatial / "scalefactors_json.json"
    if not scales.is_file():
        return {"images": images, "scalefactors": {}}
    with reading(f"spatial/{scales.name}", "JSON"):
        return {"images": images, "scalefactors": json.loads(scales.read_text())}


def _read_legacy_table(path: Path) -> AnnData:
    """A table of counts, spots x genes or genes x spots: whichever axis is named XxY holds the spots."""
    with reading(path.name, "a legacy ST count table"):
        rows, columns, frame = _read_table(path)
    values = _table_counts(frame)
    xy = _positions_in_names(rows)
    if xy is None:
        rows, columns, values, xy = columns, rows, values.T, _positions_in_names(columns)
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
    stem = _TABLE_SUFFIX.sub("", path.name)
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
        message = f'{table} lacks {missing} of {len(xy)} spots: obsm["spatial"] is in array units instead of pixels'
        warnings.warn(message, stacklevel=5)
        return None
    return pixels
