"""Cells at any positions -> square bins with summed counts: an image that a model can look at."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .compaction_stimg import MAX_SITES
from .keys import BIN
from .slides import positions, read_cells, slide_rows


def bin_cells(
    adata: AnnData, bin_size: float, microns_per_pixel: float | None = None, slide_key: str | None = None
) -> AnnData:
    """Sum the counts of cells, or of transcripts, in square bins.

    Bin (r, c) of a slide holds the cells with floor(y / `bin_size`) = r and floor(x / `bin_size`) = c, in um, counted
    from the first bin that holds one. Bins without a cell are left out.

    Also writes `adata.obs["stimg_bin"]`: int64, the row of the result that holds the cell.

    Args:
        adata: raw counts as `read_slide` finds them; positions of cells (x, y) in `obsm["spatial"]`, or in columns such
            as `obs["x_centroid"]`, `obs["y_centroid"]`.
        bin_size: side of a bin in um.
        microns_per_pixel: the scale of positions in pixels; None = they are in um, unless Space Ranger's scale factors
            in `uns["spatial"]` say otherwise.
        slide_key: a column of `obs` that tells several slides apart: each has bins of its own, numbered from (0, 0).

    Returns:
        AnnData of the bins, slide by slide and row by row:

        - `X`: CSR (num_bins, num_genes), sums of counts; `var` as in `adata`;
        - `obs["array_row"]`, `obs["array_col"]`: int64; `obs["num_cells"]`: int64; `obs[slide_key]`, where given;
        - `obsm["spatial"]`: float64 (num_bins, 2), the bins' centres (x, y), in the unit of the cells' positions;
        - `uns["stimg_bins"]`: `bin_size`, and `bin_of_cell` int64 (num_cells,), the same as `obs["stimg_bin"]`.

    Raises:
        ValueError: no raw counts, positions that are missing or not finite, a `bin_size` that is no positive number,
            or one that puts all cells into one bin or takes a grid of more than 100 million sites: the positions are in
            another unit, then.
    """
    cells = read_cells(adata)
    scale = microns_per_pixel if microns_per_pixel is not None else _scale_of_space_ranger(cells)
    for name, value in (("bin_size", bin_size), ("microns_per_pixel", scale)):
        if not 0 < value < np.inf:
            raise ValueError(f"{name} is {value}: expected a positive number")
    xy = positions(cells)
    bad = np.count_nonzero(~np.isfinite(xy).all(axis=1))
    if bad:
        raise ValueError(f"{bad} of {len(xy)} cells have positions that are no finite numbers: leave these cells out")
    site = np.floor(xy[:, ::-1] * (scale / bin_size))  # row, column
    slides = {"": np.arange(cells.n_obs)} if slide_key is None else slide_rows(cells, slide_key)
    slide = np.zeros(cells.n_obs, dtype=np.int64)
    for number, rows in enumerate(slides.values()):
        slide[rows] = number
        site[rows] -= site[rows].min(axis=0)
        _check_grid(site[rows], bin_size)
    row, col = site.astype(np.int64).T
    key = (slide * (row.max() + 1) + row) * (col.max() + 1) + col
    _, first, bin_of_cell, num_cells = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
    bin_of_cell = bin_of_cell.reshape(-1).astype(np.int64)
    obs = {"array_row": row[first], "array_col": col[first], "num_cells": num_cells.astype(np.int64)}
    names = [f"bin_{r}_{c}" for r, c in zip(row[first], col[first], strict=True)]
    if slide_key is not None:
        obs[slide_key] = cells.obs[slide_key].array[first]
        names = [f"{label}_{name}" for label, name in zip(obs[slide_key], names, strict=True)]
    centres = (np.floor(xy[first] * (scale / bin_size)) + 0.5) * (bin_size / scale)
    adata.obs[BIN] = bin_of_cell
    return AnnData(
        _sums(cells.X, bin_of_cell, len(first)),
        obs=pd.DataFrame(obs, index=names),
        var=cells.var,
        obsm={"spatial": centres},
        uns={"stimg_bins": {"bin_size": float(bin_size), "bin_of_cell": bin_of_cell}},
    )


def _scale_of_space_ranger(cells: AnnData) -> float:
    """Microns per pixel, of the scale factors of Visium HD; 1 without them."""
    spatial = cells.uns.get("spatial")
    for library in spatial.values() if isinstance(spatial, Mapping) else ():
        scales = library.get("scalefactors") if isinstance(library, Mapping) else None
        if isinstance(scales, Mapping) and "microns_per_pixel" in scales:
            try:
                return float(scales["microns_per_pixel"])
            except (TypeError, ValueError):
                raise ValueError(
                    f"the slide's scale factors say that microns_per_pixel is {scales['microns_per_pixel']!r}: give it"
                ) from None
    return 1.0


def _check_grid(site: np.ndarray, bin_size: float) -> None:
    """`site`: float (num_cells, 2), rows and columns of bins from 0. A unit that is not um shows in their range."""
    height, width = site.max(axis=0) + 1
    if not height * width <= MAX_SITES:  # nor where it is no number
        raise ValueError(
            f"bins of {bin_size:g} um would make a grid of {height:,.0f} x {width:,.0f}: are the positions in pixels? "
            "Then give microns_per_pixel, or else a larger bin_size"
        )
    if height * width == 1 and len(site) > 1:
        raise ValueError(
            f"all {len(site):,} cells lie in one bin of {bin_size:g} um: give positions in um, microns_per_pixel, or a "
            "smaller bin_size"
        )


def _sums(counts: sp.csr_matrix, bin_of_cell: np.ndarray, num_bins: int) -> sp.csr_matrix:
    """Counts (num_bins, num_genes): the product with a matrix of ones, bins x cells. float32 or wider, so that small
    integers do not wrap."""
    ones = np.ones(len(bin_of_cell), dtype=np.float32)
    member = sp.csr_matrix((ones, (bin_of_cell, np.arange(len(bin_of_cell)))), shape=(num_bins, len(bin_of_cell)))
    sums = member @ counts
    sums.sort_indices()
    return sums
