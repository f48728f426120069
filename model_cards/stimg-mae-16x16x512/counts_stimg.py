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
"""Raw counts: checked, matched to the vocabulary and scaled by depth, a block of spots at a time."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .genes_stimg import GeneVocabulary

PANEL = "panel"
PANEL_TOTAL = 1e4
# Non-zeros that are worked on at once while a slide becomes an image: about 110 bytes of temporaries each, in arrays so
# small that the C library reuses them. Larger ones are mapped and zeroed anew in each step, which takes twice the time.
BLOCK_ENTRIES = 1 << 18


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


def csr_entries(indptr: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the entries of some CSR rows, and for each entry the place of its row in `rows` (both int64)."""
    lengths = indptr[rows + 1] - indptr[rows]
    owner = np.repeat(np.arange(len(rows)), lengths)
    shift = indptr[rows] - (np.cumsum(lengths) - lengths)
    return np.arange(len(owner)) + shift[owner], owner


@dataclass(frozen=True)
class GeneCounts:
    """CSR of some spots over vocabulary numbers, genes ascending within a spot, and what each spot holds in all.

    Attributes:
        indptr: int64 (num_spots + 1,). indices: int32 (nnz,). data: (nnz,), counts or what was made of them.
        library: float64 (num_spots,), counts of all columns. matched_library: of those that the vocabulary knows.
    """

    indptr: np.ndarray
    indices: np.ndarray
    data: np.ndarray
    library: np.ndarray
    matched_library: np.ndarray


def match_counts(
    matrix: Any,
    spots: np.ndarray,
    gene_of_column: np.ndarray,
    num_genes: int,
    dtype: Any,
    convert: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> GeneCounts:
    """The counts of some spots by gene, a block of spots at a time; names of one gene are added up.

    Args:
        matrix: counts (n_obs, n_vars), SciPy-like or dense. spots: int64 (num_spots,), rows of it.
        gene_of_column: int64 (n_vars,), -1 = unknown.
        dtype: of `data`.
        convert: counts float64 (n,), the spot of each, and both libraries of the block's spots -> data (n,).

    Raises:
        ValueError: values that are no counts.
    """
    source_indptr, columns, counts = csr_arrays(matrix)
    check_counts(counts)
    known = gene_of_column >= 0
    lengths = np.diff(source_indptr)[spots]
    indices = np.empty(lengths.sum(), dtype=np.int32)  # at most: foreign genes are left out
    data = np.empty(len(indices), dtype=dtype)
    indptr = np.zeros(len(spots) + 1, dtype=np.int64)
    library, matched_library = np.zeros(len(spots)), np.zeros(len(spots))
    for block in _blocks(lengths, BLOCK_ENTRIES):
        entries, owner = csr_entries(source_indptr, spots[block])
        entry_columns, entry_counts = columns[entries], counts[entries].astype(np.float64)
        size = block.stop - block.start
        # float64 sums of integers are exact, in whatever order.
        library[block] = np.bincount(owner, entry_counts, minlength=size)
        matched_library[block] = np.bincount(owner, entry_counts * known[entry_columns], minlength=size)
        genes = gene_of_column[entry_columns]
        kept = (genes >= 0) & (entry_counts > 0)
        owner, genes, entry_counts = _sum_same_gene(owner[kept], genes[kept], entry_counts[kept], num_genes)
        start = indptr[block.start]
        indptr[block.start + 1 : block.stop + 1] = start + np.searchsorted(owner, np.arange(1, size + 1))
        part = slice(start, start + len(genes))
        indices[part] = genes
        libraries = library[block], matched_library[block]
        data[part] = entry_counts if convert is None else convert(entry_counts, owner, *libraries)
    return GeneCounts(indptr, indices[: indptr[-1]], data[: indptr[-1]], library, matched_library)


def depth_scale(
    target_sum: float | str,
    vocabulary: GeneVocabulary,
    measured: np.ndarray,
    library: np.ndarray,
    matched_library: np.ndarray,
) -> np.ndarray:
    """float64 (num_spots,): what counts are multiplied by before log1p.

    A spot's library is all that was measured on it, also genes that the vocabulary lacks; of a panel it is what the
    vocabulary knows, because nothing is known of how much the rest should hold.

    Raises:
        ValueError: a panel of genes that the corpus never counted.
    """
    if target_sum != PANEL:
        return float(target_sum) / np.maximum(np.asarray(library, dtype=np.float64), 1)
    total = PANEL_TOTAL * float(vocabulary.share[measured].sum())
    if not total > 0:
        raise ValueError(
            f'target_sum="{PANEL}": the corpus expects no counts from the {len(measured):,} genes that were measured '
            "here, because none of its slides counted them; give a number instead."
        )
    return total / np.maximum(np.asarray(matched_library, dtype=np.float64), 1)


def _blocks(lengths: np.ndarray, block_entries: int) -> list[slice]:
    """Consecutive rows of at most about `block_entries` entries together."""
    block = np.cumsum(lengths) // block_entries
    starts = np.flatnonzero(np.diff(block, prepend=-1))
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(lengths)], strict=True)]


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
    "GeneCounts",
    "check_counts",
    "csr_arrays",
    "csr_entries",
    "depth_scale",
    "match_counts",
]
