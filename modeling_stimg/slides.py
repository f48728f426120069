"""`read_slide`: whatever a user has of a slide -> one AnnData of raw counts with checked array positions.

Each reader returns an AnnData as its format gives it (`space_ranger`, `legacy_tables`, `spatialdata_reading`). Then the
same for all: counts are found, verified and made CSR (`raw_counts`); array positions are made int64, found in pixels
(`lattice`), or made by binning (`binning`). Nothing that is read is executed or unpickled.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData

from .legacy_tables import TABLE_SUFFIX, read_legacy_table
from .parsing import finite, positions_in_names, read_h5ad_file
from .raw_counts import with_raw_counts
from .space_ranger import MATRIX, bin_sites, read_space_ranger, space_ranger_outs

_KINDS = (
    "read_slide reads .h5ad files, Space Ranger output folders (outs/), SpatialData and AnnData stores (.zarr), "
    "legacy ST count tables (.tsv or .txt, also gzipped) and AnnData in memory"
)
# (row, column) of the array, in the order in which they are looked for: Visium, legacy ST (row = y, column = x), plain.
_ARRAY_COLUMNS = (("array_row", "array_col"), ("array_y", "array_x"), ("row", "col"))
# In pixels or um, after obsm["spatial"]: spots, then cells of Xenium and MERSCOPE, then whatever is called x and y.
_PIXEL_ROWS = ("pxl_row_in_fullres", "pxl_y", "pixel_y", "imagerow", "y_centroid", "center_y", "y")
_PIXEL_COLUMNS = ("pxl_col_in_fullres", "pxl_x", "pixel_x", "imagecol", "x_centroid", "center_x", "x")
_PIXELS = tuple(zip(_PIXEL_ROWS, _PIXEL_COLUMNS, strict=True))


def read_slide(
    source: str | os.PathLike | AnnData,
    *,
    layer: str | None = None,
    table: str | None = None,
    slide_key: str | None = None,
    bin_size: float | None = None,
    microns_per_pixel: float | None = None,
) -> AnnData:
    """Read one slide: raw counts and the place of every spot on the array.

    `source` is one of

    - an AnnData, or an `.h5ad` file. The array positions are, in this order, `obs["array_row"]`, `obs["array_col"]`;
      `obs["array_y"]`, `obs["array_x"]` (row = y, column = x); `obs["row"]`, `obs["col"]`; spot names such as `10x13`
      (X x Y, also after an underscore: column = X, row = Y), or barcodes of Visium HD, `s_008um_00301_00321-1` (row,
      column). Without these, `lattice` finds the array in pixel coordinates: `obsm["spatial"]` (x, y), or columns such
      as `obs["pxl_y"]`, `obs["pxl_x"]`. An AnnData may be backed by a file: its counts alone are read;
    - a Space Ranger output folder: `outs/` or its parent, with `filtered_feature_bc_matrix.h5` (or the folder
      `filtered_feature_bc_matrix/`) and `spatial/`. Named as scanpy names it: symbols made unique as `var_names`,
      `var["gene_ids"]`, `var["gene_name"]` (symbols as they are), `var["feature_types"]`, `obs["in_tissue"]`, images
      and scale factors in `uns["spatial"][library_id]`. Features that are not "Gene Expression" are left out, with a
      warning. Of Visium HD (`binned_outputs/`) the bins of 8 um are read, with a warning; name the folder of others,
      such as `outs/binned_outputs/square_016um`;
    - a SpatialData store (`.zarr`), with one table, or the one that `table` names, or its path
      `store.zarr/tables/NAME`; also an AnnData store. Where the table has no positions, they are the centroids of the
      shapes that it annotates, in the shapes' own coordinates;
    - a legacy ST count table (`.tsv`, `.txt`, also `.gz`): spots named `XxY` as rows and genes as columns, or the other
      way round. A table `<stem>.spots.tsv` beside it (x, y, pixel_x, pixel_y) gives the pixel positions.

    The counts are those of `X`, else of `layers["counts"]`, else of `layers["raw_counts"]`, else of `.raw`: the first
    that holds finite non-negative integers, with a warning where it is not `X` (`raw_counts.with_raw_counts`).

    Args:
        source: see above.
        layer: where the counts are: the name of a layer, `"X"` or `"raw"`; None = the order above.
        table: of a SpatialData store.
        slide_key: a column of `obs` that tells several slides in one AnnData apart. Array positions that have to be
            found in pixels are then found slide by slide.
        bin_size: um; cells, or transcripts, at any position are summed in squares of that side: `bin_cells`.
        microns_per_pixel: with `bin_size`, the scale of the positions; None = they are in um, or as Space Ranger's
            scale factors say.

    Returns:
        AnnData of all spots, genes and columns of the source, in its order:

        - `X`: scipy CSR (num_spots, num_genes), raw counts, indices sorted; float32, from an AnnData the type it has;
        - `obs["array_row"]`, `obs["array_col"]`: int64, fractional positions rounded to the nearest integer;
        - `obsm["spatial"]`: (num_spots, 2) as the source has it; float64 pixels (column, row) from Space Ranger; (X, Y)
          in array units from a legacy table, and from Visium HD, without pixels.

        With `bin_size`: what `bin_cells` returns.

    An AnnData given as `source` is left as it is; the result shares its large arrays. Spot names may repeat, and two
    spots may sit on one array position.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: in one sentence, for an unknown kind of file, an unreadable one, an empty slide, values that are no
            counts, missing or infinite positions, all spots on one, pixels of no array, several tables, an unknown
            layer, table or column, or a bin size that does not fit the positions.
        ImportError: a file that needs pyarrow or shapely, without them.
        TypeError: `source` is neither path nor AnnData.
    """
    with _named(source):
        cells = _counted(source, layer, table)
        slides = None if slide_key is None else slide_rows(cells, slide_key)
        if bin_size is not None:
            from .binning import bin_cells

            return bin_cells(cells, bin_size, microns_per_pixel, slide_key)
        if microns_per_pixel is not None:
            raise ValueError("microns_per_pixel is given without bin_size: give both, or leave it out")
        if slides is None:
            cells.obs["array_row"], cells.obs["array_col"] = _checked_positions(cells)
            return cells
        array = np.zeros((2, cells.n_obs), dtype=np.int64)
        for name, rows in slides.items():
            try:
                array[:, rows] = _checked_positions(cells[rows])
            except ValueError as error:
                raise ValueError(f"slide {name}: {error}") from error
        cells.obs["array_row"], cells.obs["array_col"] = array
        return cells


def read_cells(source: str | os.PathLike | AnnData, *, layer: str | None = None, table: str | None = None) -> AnnData:
    """Read what lies at any positions, such as the cells of an imaging platform: `read_slide` without an array.

    For `bin_cells` and `embed_slide(..., bin_size=...)`.

    Args:
        source, layer, table: as in `read_slide`.

    Returns:
        AnnData as `read_slide` gives it, but without `obs["array_row"]`, `obs["array_col"]`, where the source has none.

    Raises:
        As `read_slide`, but for array positions.
    """
    with _named(source):
        return _counted(source, layer, table)


def slide_rows(adata: AnnData, slide_key: str) -> dict[str, np.ndarray]:
    """The rows of each slide of an AnnData that holds several: int64 (rows of the slide,) by name, in order of
    appearance.

    Raises:
        ValueError: `obs` has no column `slide_key`, or it does not name a slide in every row.
    """
    if slide_key not in adata.obs:
        raise ValueError(f"obs has no column {slide_key!r} of slides: expected one of {list(adata.obs.columns)}")
    codes, names = pd.factorize(adata.obs[slide_key])
    if (codes < 0).any():
        raise ValueError(f"obs[{slide_key!r}] names no slide in {np.sum(codes < 0)} of {len(codes)} rows: fill it in")
    return {str(name): np.flatnonzero(codes == code) for code, name in enumerate(names)}


def positions(adata: AnnData) -> np.ndarray:
    """Coordinates (x, y) of every spot or cell in the unit that the source has, float64 (num_spots, 2).

    Raises:
        ValueError: none are found, or they are no finite numbers.
    """
    if "spatial" in adata.obsm:
        found = adata.obsm["spatial"]
        try:
            xy = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError):
            xy = np.empty(0)
        if xy.ndim != 2 or xy.shape[1] < 2:
            raise ValueError(
                f'obsm["spatial"] is a {type(found).__name__} of the shape {getattr(found, "shape", None)}: expected '
                "numbers (num_spots, 2), x and y"
            )
        return xy[:, :2]  # a third column is the section or the depth
    for y, x in _PIXELS:
        if x in adata.obs and y in adata.obs:
            return np.stack([finite(adata.obs[name], f'obs["{name}"]') for name in (x, y)], axis=1)
    raise ValueError(
        'no array positions: looked for spot names such as 10x13, for obsm["spatial"], and in obs for '
        f"{', '.join(map(' + '.join, _ARRAY_COLUMNS + _PIXELS))}: "
        'add obs["array_row"] and obs["array_col"] from spatial/tissue_positions.csv'
    )


@contextmanager
def _named(source: Any) -> Iterator[None]:
    """Name the file in every error, and hold back a warning that says nothing here."""
    if not isinstance(source, str | os.PathLike | AnnData):
        raise TypeError(f"a slide cannot be read from a {type(source).__name__}: {_KINDS}")
    with warnings.catch_warnings():
        # Real slides repeat spot names, and nothing here looks a spot up by its name.
        warnings.filterwarnings("ignore", message="Observation names are not unique", category=UserWarning)
        try:
            yield
        except ValueError as error:
            if isinstance(source, AnnData):
                raise
            raise ValueError(f"{Path(source).expanduser()}: {error}") from error


def _counted(source: str | os.PathLike | AnnData, layer: str | None, table: str | None) -> AnnData:
    """A new AnnData with counts in CSR, without array positions; a `source` in memory is untouched."""
    if isinstance(source, AnnData):
        if table is not None:
            raise ValueError("table is given with an AnnData: it names a table of a SpatialData store")
        return with_raw_counts(source, layer)
    return with_raw_counts(_read_path(Path(source).expanduser(), table), layer)


def _read_path(path: Path, table: str | None) -> AnnData:
    """The slide at `path`, unchecked."""
    name = path.name.lower()
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: {_KINDS}")
    if path.is_dir():
        from .spatialdata_reading import is_store, read_store

        if is_store(path):
            return read_store(path, table)
    if table is not None:
        raise ValueError("table is given, but this is no SpatialData store")
    if path.is_dir() and not name.endswith(".zarr"):
        return read_space_ranger(space_ranger_outs(path))
    if path.is_file() and name.endswith(".h5ad"):
        return read_h5ad_file(path)
    if path.is_file() and TABLE_SUFFIX.search(name):
        return read_legacy_table(path)
    if MATRIX in name:
        raise ValueError("counts without positions: pass the Space Ranger folder that holds this file and spatial/")
    raise ValueError(f"unknown kind of slide: {_KINDS}")


def _checked_positions(adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """`spot_positions` of a slide that is to be read: of several spots, not all on one position."""
    row, col = spot_positions(adata)
    if len(row) > 1 and (row == row[0]).all() and (col == col[0]).all():
        raise ValueError(
            f"all {len(row):,} spots stand on one array position, row {row[0]} and column {col[0]}: give every spot a "
            "position of its own"
        )
    return row, col


def spot_positions(adata: AnnData) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every spot on the array, each int64 (num_spots)."""
    for names in _ARRAY_COLUMNS:
        if all(name in adata.obs for name in names):
            row, col = (finite(adata.obs[name], f'obs["{name}"]') for name in names)
            break
    else:
        xy = positions_in_names(adata.obs_names)
        if xy is None:
            sites = bin_sites(adata.obs_names)
            if sites is not None:
                return sites[:, 0], sites[:, 1]
            from .lattice import array_positions  # scipy's spatial and image modules, for few slides

            return array_positions(positions(adata))
        col, row = xy.T
    return np.rint(row).astype(np.int64), np.rint(col).astype(np.int64)
