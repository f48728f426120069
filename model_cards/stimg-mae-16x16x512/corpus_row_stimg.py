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
"""A row of a corpus as a SlideImage: raw counts that stay where they are, normalised where a window needs them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .compaction_stimg import compact
from .counts_stimg import BLOCK_ENTRIES, depth_scale
from .genes_stimg import GeneVocabulary
from .slide_image_stimg import SlideImage

# Counts below this are looked up in a table of their spot, larger ones computed: few counts of a slide are larger.
TABLE_COUNTS = 16


class CountValues:
    """log1p values of a CSR of counts, computed for the entries that are read, so that counts can be memory-mapped.

    It stands for the array `values` of a `SlideImage`: slices, integer arrays and `np.asarray` give float32.

    Args:
        counts: integer (nnz,). indptr: int64 (num_spots + 1,). scale: float64 (num_spots,), from `depth_scale`.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, counts: np.ndarray, indptr: np.ndarray, scale: np.ndarray):
        self.counts = counts
        self.indptr = indptr
        self.scale = scale
        self._table: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def table(self) -> np.ndarray:
        """float32 (num_spots, TABLE_COUNTS): the value of every small count on every spot."""
        if self._table is None:
            self._table = np.log1p(np.arange(TABLE_COUNTS) * self.scale[:, None]).astype(np.float32)
        return self._table

    def of_counts(self, counts: np.ndarray, spots: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """float32 (n,): the values of counts (n,) of some spots (k,), `lengths` (k,) of them each."""
        place = np.repeat(spots * TABLE_COUNTS, lengths)
        large = np.flatnonzero(counts >= TABLE_COUNTS)
        if len(large):
            scale = self.scale[place[large] // TABLE_COUNTS]
            place += np.minimum(counts, TABLE_COUNTS - 1)
            values = self.table.reshape(-1).take(place)
            values[large] = np.log1p(counts[large] * scale)
            return values
        place += counts
        return self.table.reshape(-1).take(place)

    def read(self, runs: Sequence[slice], spots: np.ndarray, lengths: np.ndarray, out: np.ndarray) -> None:
        """Write the values of runs of entries, which are those of the given spots, into float32 (n,)."""
        counts = np.concatenate([self.counts[run] for run in runs])
        np.copyto(out, self.of_counts(counts, spots, lengths))

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        if not isinstance(index, slice):
            spots = np.searchsorted(self.indptr, index, side="right") - 1
            return self.of_counts(self.counts[index], spots, np.ones(len(spots), dtype=np.int64))
        start, stop, step = index.indices(len(self))
        if step != 1:
            return self[np.arange(start, stop, step)]
        stop = max(start, stop)
        first = int(np.searchsorted(self.indptr, start, side="right")) - 1
        last = int(np.searchsorted(self.indptr, stop, side="left"))
        lengths = np.diff(self.indptr[first : last + 1].clip(start, stop))
        return self.of_counts(self.counts[start:stop], np.arange(first, first + len(lengths)), lengths)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        values = np.empty(len(self), dtype=np.float32)
        for start in range(0, len(self), BLOCK_ENTRIES):  # temporaries stay small
            values[start : start + BLOCK_ENTRIES] = self[start : start + BLOCK_ENTRIES]
        return values if dtype is None else values.astype(dtype, copy=False)


def slide_image_from_row(
    row: Mapping[str, Any], vocabulary: GeneVocabulary, compaction: str, target_sum: float | str
) -> SlideImage:
    """Compact a row of a corpus; see `STPatchProcessor.slide_to_image`, its public face.

    Args:
        row: `id`, `vocabulary` (str), `num_source_genes`, `num_matched_genes` (int) and the arrays `indptr`, `indices`,
            `counts`, `library`, `matched_library`, `measured`, `array_row`, `array_col` of a slide, spots in row-major
            order of the array. Arrays are not copied.

    Raises:
        ValueError: a row whose gene numbers are those of another vocabulary.
    """
    if row["vocabulary"] != vocabulary.ids_sha256:
        raise ValueError(
            f"The corpus row {row['id']!r} numbers its genes by another vocabulary: use the genes.json of its corpus."
        )
    rows, cols = compact(np.asarray(row["array_row"]), np.asarray(row["array_col"]), compaction)
    measured = np.asarray(row["measured"], dtype=np.int64)
    scale = depth_scale(target_sum, vocabulary, measured, row["library"], row["matched_library"])
    indptr = np.asarray(row["indptr"], dtype=np.int64)
    every = np.arange(len(rows))
    return SlideImage(
        height=int(rows.max()) + 1,
        width=int(cols.max()) + 1,
        rows=rows,
        cols=cols,
        indptr=indptr,
        indices=np.asarray(row["indices"]),
        values=CountValues(np.asarray(row["counts"]), indptr, scale),
        measured=measured,
        pad_id=vocabulary.pad_id,
        obs_index=every,
        spot_of_obs=every,
        num_source_genes=int(row["num_source_genes"]),
        num_matched_genes=int(row["num_matched_genes"]),
        name=str(row["id"]),
    )


__all__ = ["CountValues", "slide_image_from_row"]
