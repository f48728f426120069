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
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .compaction_stimg import check_grid, compact
from .counts_stimg import csr_entries, depth_scale, match_counts
from .genes_stimg import GeneVocabulary

# Fewer than both, the second a share of what the model knows, and whoever embeds the slide is told.
FEW_GENES, FEW_OF_VOCABULARY = 1000, 0.05
ON_DUPLICATE = ("error", "first")


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
            spot. -1 in a `part` that the spot does not belong to.
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

    @cached_property
    def _gene_moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Means of every gene's log1p values and of their squares over all spots, both float64 (vocabulary,)."""
        genes, values = np.asarray(self.indices), np.asarray(self.values, dtype=np.float64)
        mean, square = (np.bincount(genes, w, self.pad_id) / max(self.num_spots, 1) for w in (values, values**2))
        return mean, square

    @cached_property
    def gene_means(self) -> np.ndarray:
        """float32 (vocabulary,): mean of every gene's log1p values over all spots; 0 for genes not measured."""
        return self._gene_moments[0].astype(np.float32)

    @cached_property
    def gene_variances(self) -> np.ndarray:
        """float64 (vocabulary,): population variance of every gene's log1p values over all spots."""
        mean, square = self._gene_moments
        return np.maximum(square - mean**2, 0)

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

    def expression(self, spots: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The non-zeros of some spots: genes int32 (n,), values float32 (n,), and which of the k spots has each."""
        positions, owner = csr_entries(self.indptr, spots)
        if isinstance(self.values, np.ndarray):
            return self.indices[positions], self.values[positions], owner
        lengths = self.indptr[spots + 1] - self.indptr[spots]
        return self.indices[positions], self.values.of_counts(self.values.counts[positions], spots, lengths), owner

    def part(self, spots: np.ndarray) -> "SlideImage":
        """Some of the spots alone on the same grid: the sites of the others are empty, their counts are not held.

        Args:
            spots: bool (num_spots,), True = stays.

        Raises:
            ValueError: not one bool a spot.
        """
        spots = np.asarray(spots)
        if spots.dtype != bool or spots.shape != (self.num_spots,):
            raise ValueError(f"spots is {spots.dtype} {spots.shape}: expected bool ({self.num_spots},), one a spot.")
        kept = np.flatnonzero(spots)
        indices, values, owner = self.expression(kept)
        number = np.append(np.where(spots, spots.cumsum() - 1, -1), -1)  # the last one is for -1
        return replace(
            self,
            rows=self.rows[kept],
            cols=self.cols[kept],
            indptr=np.searchsorted(owner, np.arange(len(kept) + 1)).astype(np.int64),
            indices=indices,
            values=values,
            obs_index=self.obs_index[kept],
            spot_of_obs=number[self.spot_of_obs],
        )

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
    check_grid(grid_rows, grid_cols)
    obs_index, spot_of_obs = one_spot_a_site(grid_rows, grid_cols, on_duplicate)
    match = vocabulary.match(adata)
    measured = np.unique(match.ids[match.ids >= 0])
    if len(measured) < min(FEW_GENES, FEW_OF_VOCABULARY * len(vocabulary)):
        warnings.warn(
            f"Only {len(measured):,} of the {len(vocabulary):,} genes that the model knows were measured on the slide: "
            "embeddings tell its spots apart, but compare them with those of slides with more genes with care.",
            UserWarning,
            stacklevel=3,
        )

    def log1p(counts: np.ndarray, owner: np.ndarray, library: np.ndarray, matched_library: np.ndarray) -> np.ndarray:
        scale = depth_scale(target_sum, vocabulary, measured, library, matched_library)
        return np.log1p(counts * scale[owner])

    expression = match_counts(adata.X, obs_index, match.ids, len(vocabulary), np.float32, log1p)
    return SlideImage(
        height=int(grid_rows.max()) + 1,
        width=int(grid_cols.max()) + 1,
        rows=grid_rows[obs_index],
        cols=grid_cols[obs_index],
        indptr=expression.indptr,
        indices=expression.indices,
        values=expression.data,
        measured=measured,
        pad_id=vocabulary.pad_id,
        obs_index=obs_index,
        spot_of_obs=spot_of_obs,
        num_source_genes=match.num_genes,
        num_matched_genes=match.num_matched,
        name=name,
    )


def _grid_positions(adata: Any, compaction: str) -> tuple[np.ndarray, np.ndarray]:
    missing = [c for c in ("array_row", "array_col") if c not in adata.obs]
    if missing:
        raise ValueError(
            f"The slide's obs has no {' and '.join(missing)}: pass it through read_slide first, which finds the array "
            "indices under the names that readers use."
        )
    return compact(adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy(), compaction)


def one_spot_a_site(rows: np.ndarray, cols: np.ndarray, on_duplicate: str) -> tuple[np.ndarray, np.ndarray]:
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


__all__ = [
    "SlideArrays",
    "SlideImage",
    "on_host",
    "one_spot_a_site",
    "slide_image_from_adata",
    "usable_device",
    "window_counts",
]
