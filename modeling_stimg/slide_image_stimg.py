# Copyright 2026 The stimg authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""SlideImage: a slide as a sparse image, one site a spot and one channel a gene."""

import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .compaction_stimg import compact
from .genes_stimg import GeneVocabulary

ON_DUPLICATE = ("error", "first")
PANEL = "panel"
PANEL_TOTAL = 1e4
# Non-zeros that are worked on at once while a slide becomes an image: about 110 bytes of temporaries each.
BLOCK_ENTRIES = 1 << 22


def usable_device(device: str | torch.device) -> torch.device:
    """A device that tensors can be put on, with its number: `"cuda"` is `cuda:0`, or whichever is current.

    Raises:
        ValueError: no such kind of device, or none of it here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'The device "{device}" cannot be used here ({reason}): try "cpu".') from error


def on_host(device: str | torch.device) -> bool:
    """Whether windows are made in NumPy there, not in torch."""
    return torch.device(device).type == "cpu"


@dataclass(frozen=True)
class SlideArrays:
    """The non-zeros of a `SlideImage` where windows are made from them: NumPy arrays, or tensors on an accelerator.

    Attributes:
        indices: int32 (nnz,). values: float32 (nnz,). measured: int64 (m,).
    """

    indices: Any
    values: Any
    measured: Any


@dataclass
class SlideImage:
    """A slide on its compact grid: what training, embedding and reconstruction all start from.

    Spots stand in grid order (row by row). Their expression is a CSR matrix over vocabulary numbers: spot `i` has
    the genes `indices[indptr[i]:indptr[i + 1]]`, ascending, with the log1p values `values[...]`.

    Attributes:
        height, width: sides of the grid, in sites.
        rows, cols: int64 (num_spots,), the site of every spot.
        indptr: int64 (num_spots + 1,). indices: int32 (nnz,). values: float32 (nnz,), log1p of counts per
            `target_sum`; of a corpus row an array-like that computes them when they are read.
        measured: int64 (num_genes,), ascending vocabulary numbers of the genes that were measured on the slide.
        pad_id: number that stands for no gene, `len(vocabulary)`.
        obs_index: int64 (num_spots,), the source row of every spot.
        spot_of_obs: int64 (n_obs,), the spot of every source row. Source rows that share an array position share a
            spot.
        num_source_genes, num_matched_genes: columns of the source, and those that the vocabulary knows.
        name: what messages call the slide.
    """

    height: int
    width: int
    rows: np.ndarray
    cols: np.ndarray
    indptr: np.ndarray
    indices: np.ndarray
    values: np.ndarray
    measured: np.ndarray
    pad_id: int
    obs_index: np.ndarray
    spot_of_obs: np.ndarray
    num_source_genes: int
    num_matched_genes: int
    name: str = "slide"
    _corners: dict[tuple[int, float], np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)
    _arrays: dict[torch.device, SlideArrays] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_spots(self) -> int:
        """Occupied sites."""
        return len(self.rows)

    @property
    def num_genes(self) -> int:
        """Genes of the vocabulary that were measured here."""
        return len(self.measured)

    @cached_property
    def spot_grid(self) -> np.ndarray:
        """int64 (height, width): the spot at every site, -1 where the site is empty."""
        grid = np.full((self.height, self.width), -1, dtype=np.int64)
        grid[self.rows, self.cols] = np.arange(self.num_spots)
        return grid

    @cached_property
    def coordinates(self) -> np.ndarray:
        """float32 (num_spots, 2): row and column as a share of the slide, 0 to 100 (Eq. 5); 0 on a one-level axis."""
        sites = np.stack([self.rows, self.cols], axis=1)
        levels = np.array([self.height, self.width])
        return (100.0 * sites / np.maximum(levels - 1, 1)).astype(np.float32)

    def admissible_corners(self, window_size: int, min_observed: float) -> np.ndarray:
        """Corners from which a training window may be drawn.

        A window is admissible if it holds at least `min(min_observed * S * S, half of the slide's fullest window)`
        spots, so that slides smaller or sparser than the rule still have windows.

        Args:
            window_size: side S, in sites. min_observed: share of a window's sites that should hold a spot.

        Returns:
            int64 (num_corners, 2): (top, left) in row-major order, 0 … max(side - S, 0) on each axis.
        """
        key = (window_size, float(min_observed))
        if key not in self._corners:
            counts = window_counts(self.spot_grid >= 0, window_size)
            needed = min(min_observed * window_size**2, counts.max(initial=0) / 2)
            self._corners[key] = np.argwhere(counts >= max(needed, 1)).astype(np.int64)
        return self._corners[key]

    def arrays(self, device: str | torch.device = "cpu") -> SlideArrays:
        """The slide's non-zeros on a device, put there once. On the CPU they are the NumPy arrays themselves.

        Raises:
            ValueError: no such device here, or one without float64, which draws need.
        """
        where = torch.device("cpu") if device == "cpu" else usable_device(device)
        if where.type == "mps":
            raise ValueError(f'Windows cannot be made on "{device}", which has no float64: make them on "cpu".')
        if where not in self._arrays:
            arrays = self.indices, self.values, self.measured
            if not on_host(where):
                arrays = [torch.tensor(np.asarray(array), device=where) for array in arrays]
            self._arrays[where] = SlideArrays(*arrays)
        return self._arrays[where]

    def release(self, device: str | torch.device) -> None:
        """Forget the copies on a device that `arrays` made."""
        self._arrays.pop(usable_device(device), None)

    def __getstate__(self) -> dict[str, Any]:
        # A copy in another process puts its own arrays on an accelerator.
        return {**self.__dict__, "_arrays": {}}

    @property
    def gene_match(self) -> str:
        """How many of the source's genes the vocabulary knows, in words."""
        return f"matched {self.num_matched_genes:,} of {self.num_source_genes:,} genes"

    def entries(self, spots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The non-zeros of some spots.

        Args:
            spots: int64 (k,).

        Returns:
            positions: int64, where in `indices` and `values` they stand; owner: int64, which of the k spots has each.
        """
        return csr_entries(self.indptr, spots)

    def __repr__(self) -> str:
        return (
            f"SlideImage({self.name!r}: {self.num_spots:,} spots on {self.height} x {self.width} sites, "
            f"{self.num_genes:,} genes)"
        )


def window_counts(occupied: np.ndarray, window_size: int) -> np.ndarray:
    """Spots in the window at every corner, by an integral image.

    Args:
        occupied: bool (height, width). window_size: side S.

    Returns:
        int64 (max(height - S, 0) + 1, max(width - S, 0) + 1).
    """
    integral = np.zeros((occupied.shape[0] + 1, occupied.shape[1] + 1), dtype=np.int64)
    integral[1:, 1:] = occupied.cumsum(0).cumsum(1)
    tall, wide = (min(window_size, side) for side in occupied.shape)
    return integral[tall:, wide:] - integral[:-tall, wide:] - integral[tall:, :-wide] + integral[:-tall, :-wide]


def csr_entries(indptr: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the entries of some CSR rows, and for each entry the place of its row in `rows` (both int64)."""
    lengths = indptr[rows + 1] - indptr[rows]
    owner = np.repeat(np.arange(len(rows)), lengths)
    shift = indptr[rows] - (np.cumsum(lengths) - lengths)
    return np.arange(len(owner)) + shift[owner], owner


def check_counts(values: np.ndarray) -> None:
    """Raise ValueError unless every one of `values` is a finite non-negative integer, of whatever numeric type."""
    if values.dtype.kind not in "fiub":
        raise ValueError(f"X holds values of type {values.dtype}: pass raw counts")
    values = values.reshape(-1)
    blocks = [values[start : start + BLOCK_ENTRIES] for start in range(0, values.size, BLOCK_ENTRIES)]
    if values.dtype.kind == "f":
        num_bad = sum(np.count_nonzero(~np.isfinite(block)) for block in blocks)
        if num_bad:
            raise ValueError(f"X holds {num_bad} NaN or infinite values: pass raw counts")
    if values.size and values.min() < 0:
        raise ValueError(f"X holds negative values (min {values.min():.6g}): pass raw counts")
    if values.dtype.kind == "f" and any((block != np.rint(block)).any() for block in blocks):
        raise ValueError(f"X holds non-integers (max {values.max():.6g}): pass raw counts")


def csr_arrays(matrix: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(indptr int64, indices int, data) of a 2-D matrix: SciPy-like with `tocsr`, or dense. Shared where possible."""
    if hasattr(matrix, "tocsr"):
        matrix = matrix.tocsr()
        return np.asarray(matrix.indptr, np.int64), np.asarray(matrix.indices), np.asarray(matrix.data)
    dense = np.asarray(matrix)
    rows, columns = np.nonzero(dense)
    indptr = np.searchsorted(rows, np.arange(dense.shape[0] + 1)).astype(np.int64)
    return indptr, columns.astype(np.int64), dense[rows, columns]


def slide_image_from_adata(
    adata: Any,
    vocabulary: GeneVocabulary,
    compaction: str,
    target_sum: float | str,
    on_duplicate: str = "error",
    name: str = "slide",
) -> SlideImage:
    """Compact, match and normalise a slide; see `STPatchProcessor.slide_to_image`, its public face."""
    if on_duplicate not in ON_DUPLICATE:
        raise ValueError(f"on_duplicate is {on_duplicate!r}: expected one of {ON_DUPLICATE}.")
    if len(adata.var_names) == 0 or len(adata.obs) == 0:
        raise ValueError(f"The slide has {len(adata.obs)} spots and {len(adata.var_names)} genes: nothing to read.")
    grid_rows, grid_cols = _grid_positions(adata, compaction)
    obs_index, spot_of_obs = _one_spot_a_site(grid_rows, grid_cols, on_duplicate)
    match = vocabulary.match(adata)
    measured = np.unique(match.ids[match.ids >= 0])
    indptr, indices, values = _expression(adata.X, obs_index, match.ids, vocabulary, measured, target_sum)
    return SlideImage(
        height=int(grid_rows.max()) + 1,
        width=int(grid_cols.max()) + 1,
        rows=grid_rows[obs_index],
        cols=grid_cols[obs_index],
        indptr=indptr,
        indices=indices,
        values=values,
        measured=measured,
        pad_id=vocabulary.pad_id,
        obs_index=obs_index,
        spot_of_obs=spot_of_obs,
        num_source_genes=match.num_genes,
        num_matched_genes=match.num_matched,
        name=name,
    )


def _expression(
    matrix: Any,
    obs_index: np.ndarray,
    gene_of_column: np.ndarray,
    vocabulary: GeneVocabulary,
    measured: np.ndarray,
    target_sum: float | str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CSR of log1p values over vocabulary numbers, spots in the order of `obs_index`; a block of spots at a time."""
    source_indptr, columns, counts = csr_arrays(matrix)
    check_counts(counts)
    of_all, of_matched = np.ones(len(gene_of_column), dtype=bool), gene_of_column >= 0
    in_library, total = total_of(target_sum, vocabulary, measured, of_all, of_matched)

    lengths = np.diff(source_indptr)[obs_index]
    indices = np.empty(lengths.sum(), dtype=np.int32)  # at most: foreign genes are left out
    values = np.empty(len(indices), dtype=np.float32)
    indptr = np.zeros(len(obs_index) + 1, dtype=np.int64)
    for block in _blocks(lengths, BLOCK_ENTRIES):
        entries, owner = csr_entries(source_indptr, obs_index[block])
        entry_columns, entry_counts = columns[entries], counts[entries].astype(np.float64)
        # float64 sums of integers are exact, in whatever order.
        in_sum = entry_counts * in_library[entry_columns]
        library = np.bincount(owner, in_sum, minlength=block.stop - block.start)
        genes = gene_of_column[entry_columns]
        kept = (genes >= 0) & (entry_counts > 0)
        owner, genes, entry_counts = _sum_same_gene(owner[kept], genes[kept], entry_counts[kept], len(vocabulary))
        start = indptr[block.start]
        indptr[block.start + 1 : block.stop + 1] = start + np.searchsorted(owner, np.arange(1, len(library) + 1))
        indices[start : start + len(genes)] = genes
        values[start : start + len(genes)] = np.log1p(entry_counts * (total / np.maximum(library, 1))[owner])
    return indptr, indices[: indptr[-1]], values[: indptr[-1]]


def total_of(
    target_sum: float | str, vocabulary: GeneVocabulary, measured: np.ndarray, all_genes: Any, matched_genes: Any
) -> tuple[Any, float]:
    """What counts as a spot's library, and what it is scaled to.

    The library is all that was measured, also genes that the vocabulary lacks (`all_genes`); of a panel it is what the
    vocabulary knows (`matched_genes`), because nothing is known of how much the rest should hold.

    Raises:
        ValueError: a panel of genes that the corpus never counted.
    """
    if target_sum != PANEL:
        return all_genes, float(target_sum)
    total = PANEL_TOTAL * float(vocabulary.share[measured].sum())
    if not total > 0:
        raise ValueError(
            f'target_sum="{PANEL}": the corpus expects no counts from the {len(measured):,} genes that were measured '
            "here, because none of its slides counted them; give a number instead."
        )
    return matched_genes, total


def _blocks(lengths: np.ndarray, block_entries: int) -> list[slice]:
    """Consecutive rows of at most about `block_entries` entries together."""
    block = np.cumsum(lengths) // block_entries
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _grid_positions(adata: Any, compaction: str) -> tuple[np.ndarray, np.ndarray]:
    missing = [c for c in ("array_row", "array_col") if c not in adata.obs]
    if missing:
        raise ValueError(
            f"The slide's obs has no {' and '.join(missing)}: pass it through read_slide first, which finds the array "
            "indices under the names that readers use."
        )
    return compact(adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy(), compaction)


def _one_spot_a_site(rows: np.ndarray, cols: np.ndarray, on_duplicate: str) -> tuple[np.ndarray, np.ndarray]:
    """(obs_index, spot_of_obs): the first source row of every occupied site in grid order, and every row's spot."""
    site = rows * (cols.max() + 1) + cols
    _, obs_index, spot_of_obs = np.unique(site, return_index=True, return_inverse=True)
    num_shared = len(site) - len(obs_index)
    if num_shared:
        second = int(np.setdiff1d(np.arange(len(site)), obs_index)[0])
        first = int(obs_index[spot_of_obs[second]])
        found = (
            f"{num_shared} of {len(site)} spots stand on an array position that another spot has already "
            f"(e.g. rows {first} and {second} of the slide)"
        )
        if on_duplicate == "error":
            raise ValueError(
                f'{found}: expected one spot a position; remove them, or pass on_duplicate="first", which keeps the '
                "first and lets the others share its embedding."
            )
        warnings.warn(f"{found}: the first is kept, the others share its embedding.", UserWarning, stacklevel=4)
    return obs_index.astype(np.int64), spot_of_obs.reshape(-1).astype(np.int64)


def _sum_same_gene(
    owner: np.ndarray, genes: np.ndarray, counts: np.ndarray, num_genes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries sorted by spot and gene; the counts (float64) of two names of one gene are added up."""
    key = owner * num_genes + genes
    order = np.argsort(key)
    key, counts = key[order], counts[order]
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    if len(starts) < len(key):
        counts, key = np.add.reduceat(counts, starts), key[starts]
    return key // num_genes, key % num_genes, counts


__all__ = [
    "PANEL",
    "SlideArrays",
    "SlideImage",
    "check_counts",
    "csr_arrays",
    "on_host",
    "slide_image_from_adata",
    "total_of",
    "usable_device",
    "window_counts",
]
