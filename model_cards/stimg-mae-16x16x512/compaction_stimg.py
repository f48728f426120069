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
"""Compaction: the array indices of a slide's spots -> a tight grid, one spot a site (Eq. 5)."""

import numpy as np

COMPACTIONS = ("lattice", "rank", "minmax")
# Of a grid; the finest arrays have some ten million.
MAX_SITES = 100_000_000
# Highest grid index of `"minmax"`.
MINMAX_RANGE = 139


def compact(array_row: np.ndarray, array_col: np.ndarray, compaction: str) -> tuple[np.ndarray, np.ndarray]:
    """Grid row and column of every spot, order-preserving on both axes.

    Eq. 5 of arXiv 2603.13432 replaces each array index by its rank among the distinct levels that hold a spot, so
    levels without any spot disappear and no spot is invented, merged or moved past another.

    Args:
        array_row, array_col: int (num_spots,), positions on the capture array, any offset.
        compaction: `"lattice"` first closes the gaps of a staggered array, where every second site of a row is
            empty by construction: odd rows are shifted half a site and `array_col // 2` is the column (odd-r offset
            coordinates). `"rank"` is Eq. 5 literally: on a staggered array half of the grid stays empty. `"minmax"`
            does not rank: each axis is stretched from its lowest to its highest index over the integers 0 to 139, or
            to as many as the axis spans where that is more, so that no two levels meet. Neighbours move apart.

    Returns:
        rows, cols: int64 (num_spots,), from 0; with `"lattice"` and `"rank"` to the number of levels of the axis less
        one, without gaps.

    Raises:
        ValueError: unknown `compaction`, or arrays that are no integers of one length.
    """
    array_row, array_col = np.asarray(array_row), np.asarray(array_col)
    if array_row.shape != array_col.shape or array_row.ndim != 1:
        raise ValueError(
            f"array_row has shape {array_row.shape} and array_col {array_col.shape}: expected one value a spot in each."
        )
    for name, levels in (("array_row", array_row), ("array_col", array_col)):
        if levels.dtype.kind not in "iu":
            raise ValueError(
                f"{name} has dtype {levels.dtype}: expected integer array indices; read the slide with read_slide, "
                "which rounds or derives them."
            )
    if compaction not in COMPACTIONS:
        raise ValueError(f"compaction is {compaction!r}: expected one of {COMPACTIONS}.")
    array_row, array_col = array_row.astype(np.int64), array_col.astype(np.int64)  # unsigned differences would wrap
    if compaction == "minmax":
        return _stretch(array_row), _stretch(array_col)
    if compaction == "lattice" and is_staggered(array_row, array_col):
        array_col = array_col // 2
    return _rank(array_row), _rank(array_col)


def check_grid(grid_row: np.ndarray, grid_col: np.ndarray) -> None:
    """ValueError where a grid (both int64 (num_spots,), from `compact`) is larger than any array of spots."""
    height, width = int(grid_row.max()) + 1, int(grid_col.max()) + 1
    if height * width > MAX_SITES:
        raise ValueError(
            f"The array positions of {len(grid_row):,} spots make a grid of {height:,} x {width:,} sites: expected "
            "rows and columns of an array; coordinates of cells have to be binned, with bin_size=50 (--bin-size 50)."
        )


def is_staggered(array_row: np.ndarray, array_col: np.ndarray) -> bool:
    """Whether all spots lie on one colour of a checkerboard, as Visium's do (`array_row + array_col` always even)."""
    parity = (array_row + array_col) & 1
    return parity.size > 0 and bool((parity == parity[0]).all())


def _rank(levels: np.ndarray) -> np.ndarray:
    return np.unique(levels, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _stretch(levels: np.ndarray) -> np.ndarray:
    """Min-max scaling to 0 … MINMAX_RANGE, halves rounded up; in integers, where steps of at least 1 never merge."""
    levels = levels - levels.min(initial=levels[0] if levels.size else 0)
    span = int(levels.max(initial=0))
    if span == 0 or span >= MINMAX_RANGE:
        return levels
    return (2 * levels * MINMAX_RANGE + span) // (2 * span)


__all__ = ["COMPACTIONS", "MAX_SITES", "check_grid", "compact", "is_staggered"]
