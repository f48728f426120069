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
"""Sampling: which windows, which genes, and the dense tensor of a window (Eqs. 6 and 7).

Every draw is a function of (seed, window number) and the slide, so it does not depend on batch, worker, process or
device. A window's place comes from `numpy.random.default_rng([seed, window])`; the noise of genes and masks, which is
drawn by the hundred thousand, from a counter-based hash with the same integers in NumPy and torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .slide_image_stimg import SlideImage

GENE_SELECTIONS = ("weighted", "variable", "random")
VARIANCE_EPS = 1e-6
GENE_STREAM, MASK_STREAM = 1, 2

_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


# ---------------------------------------------------------------------------- counter-based noise


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits: torch has no unsigned arithmetic."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word


def _mix(x: Any) -> Any:
    """SplitMix64's finaliser on an int64 array or tensor; multiplication wraps, shifts are made logical."""
    x = (x ^ ((x >> 30) & (_WORD >> 30))) * _signed(_MIX_1)
    x = (x ^ ((x >> 27) & (_WORD >> 27))) * _signed(_MIX_2)
    return x ^ ((x >> 31) & (_WORD >> 31))


def _mix_word(x: int) -> int:
    """The same on one Python integer."""
    x = ((x ^ (x >> 30)) * _MIX_1) & _WORD
    x = ((x ^ (x >> 27)) * _MIX_2) & _WORD
    return x ^ (x >> 31)


def stream_key(seed: int, window: int, stream: int) -> int:
    """The int64 that starts the noise of one window."""
    key = _mix_word((int(seed) + _GOLDEN) & _WORD)
    key = _mix_word((key + int(window) * _GOLDEN) & _WORD)
    return _signed(_mix_word((key + stream * _GOLDEN) & _WORD))


def counter_hash(key: int, counters: Any) -> Any:
    """SplitMix64 at the given counters: int64 array or tensor -> int64, the same bits in NumPy and torch."""
    return _mix((counters + 1) * _signed(_GOLDEN) + key)


def counter_uniform(key: int, counters: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), exclusive at both ends: the 52 high bits of the hash, centred.

    Args:
        key: from `stream_key`. counters: int64, any shape.
    """
    bits = (counter_hash(key, counters) >> 12) & (_WORD >> 12)
    return (bits + 0.5) * 2.0**-52


def mask_noise(seed: int, window: int, shape: tuple[int, ...]) -> np.ndarray:
    """float32 `shape` in [0, 1): the `noise` of one window, entry `i` (flat) from the hash of (seed, window, i)."""
    bits = (counter_hash(stream_key(seed, window, MASK_STREAM), np.arange(np.prod(shape))) >> 40) & (_WORD >> 40)
    return (bits.astype(np.float32) * np.float32(2.0**-24)).reshape(shape)


def window_uniforms(seed: int, window: int) -> tuple[float, float]:
    """Two numbers in [0, 1) that place window `window`: the first picks the slide (of many), the second the corner."""
    slide, corner = np.random.default_rng([seed, window]).random(2)
    return float(slide), float(corner)


# ---------------------------------------------------------------------------- windows


def draw_corner(image: SlideImage, window_size: int, min_observed: float, seed: int, window: int) -> tuple[int, int]:
    """The (top, left) of window number `window`, uniform over the admissible corners (Eq. 6)."""
    corners = image.admissible_corners(window_size, min_observed)
    top, left = corners[int(window_uniforms(seed, window)[1] * len(corners))]
    return int(top), int(left)


def window_spots(image: SlideImage, corner: tuple[int, int], window_size: int) -> np.ndarray:
    """int64 (S, S): the spot at every site of a window, -1 where it is empty or beyond the slide."""
    top, left = corner
    spots = np.full((window_size, window_size), -1, dtype=np.int64)
    part = image.spot_grid[top : top + window_size, left : left + window_size]
    spots[: part.shape[0], : part.shape[1]] = part
    return spots


# ---------------------------------------------------------------------------- genes


def gene_variances(genes: np.ndarray, values: np.ndarray, num_spots: int, num_genes: int) -> np.ndarray:
    """float64 (num_genes,): variance over a window's observed spots of every gene, zeros included.

    Args:
        genes: int (nnz,). values: float32 (nnz,), the non-zeros. num_spots: observed spots.
    """
    values = values.astype(np.float64)
    mean = np.bincount(genes, values, minlength=num_genes) / num_spots
    square = np.bincount(genes, values * values, minlength=num_genes) / num_spots
    return np.maximum(square - mean * mean, 0.0)


def select_genes(
    variances: np.ndarray, measured: np.ndarray, num_channels: int, gene_selection: str, seed: int, window: int
) -> np.ndarray:
    """Genes of one window, at most `num_channels` and only measured ones.

    `"weighted"` draws without replacement with weights `v_g + eps` (Eq. 7): the genes with the smallest
    `-log(u_g) / (v_g + eps)`, u_g uniform, which is Gumbel top-k on `log(v_g + eps)` with one logarithm instead of
    three. `"variable"` takes the highest variances, `"random"` any genes. Ties go to the lower vocabulary number.

    Args:
        variances: float64 (vocabulary,). measured: int64 (m,), ascending.

    Returns:
        int64 (min(num_channels, m),), ascending.
    """
    if gene_selection not in GENE_SELECTIONS:
        raise ValueError(f"gene_selection is {gene_selection!r}: expected one of {GENE_SELECTIONS}.")
    if len(measured) <= num_channels:
        return measured
    if gene_selection == "variable":
        cost = -variances[measured]
    else:
        cost = counter_uniform(stream_key(seed, window, GENE_STREAM), measured)
        if gene_selection == "weighted":
            cost = -np.log(cost) / (variances[measured] + VARIANCE_EPS)
    return np.sort(measured[np.argsort(cost, kind="stable")[:num_channels]])


# ---------------------------------------------------------------------------- the tensor


@dataclass
class Window:
    """One window as dense arrays; the keys and shapes are those of the processor's `BatchFeature`, without batch."""

    pixel_values: np.ndarray
    gene_ids: np.ndarray
    channel_mask: np.ndarray
    pixel_mask: np.ndarray
    coordinates: np.ndarray
    spot_index: np.ndarray


def make_window(
    image: SlideImage,
    corner: tuple[int, int],
    window_size: int,
    num_channels: int,
    gene_selection: str,
    seed: int,
    window: int,
    genes: np.ndarray | None = None,
) -> Window:
    """Rasterise one window (Eq. 6) with genes drawn for it (Eq. 7), or with the given ones.

    Args:
        genes: int64 (C,), vocabulary numbers that fix the channels and their order; those that were not measured on
            the slide become padding.
    """
    spot_index = window_spots(image, corner, window_size)
    pixel_mask = spot_index >= 0
    spots = spot_index[pixel_mask]
    positions, owner = image.entries(spots)
    entry_genes, entry_values = image.indices[positions], image.values[positions]
    if genes is None:
        variances = gene_variances(entry_genes, entry_values, max(len(spots), 1), image.pad_id)
        chosen = select_genes(variances, image.measured, num_channels, gene_selection, seed, window)
        gene_ids = np.full(num_channels, image.pad_id, dtype=np.int64)
        gene_ids[: len(chosen)] = chosen
    else:
        gene_ids = np.where(np.isin(genes, image.measured), genes, image.pad_id)

    channel_of_gene = np.full(image.pad_id + 1, -1, dtype=np.int64)
    channel_of_gene[gene_ids] = np.arange(len(gene_ids))
    channel_of_gene[image.pad_id] = -1
    channels = channel_of_gene[entry_genes]
    seen = channels >= 0
    sites = np.flatnonzero(pixel_mask)
    pixel_values = np.zeros((len(gene_ids), window_size * window_size), dtype=np.float32)
    pixel_values[channels[seen], sites[owner[seen]]] = entry_values[seen]
    coordinates = np.zeros((window_size, window_size, 2), dtype=np.float32)
    coordinates[pixel_mask] = image.coordinates[spots]
    return Window(
        pixel_values=pixel_values.reshape(len(gene_ids), window_size, window_size),
        gene_ids=gene_ids,
        channel_mask=gene_ids != image.pad_id,
        pixel_mask=pixel_mask,
        coordinates=coordinates,
        spot_index=spot_index,
    )


def covering_corners(image: SlideImage, window_size: int, stride: int) -> list[tuple[int, int]]:
    """Corners of overlapping windows that together hold every spot, row by row; windows without a spot are left out.

    Corners stand every `stride` sites, and at the far edge of each axis.
    """

    def starts(side: int) -> Iterable[int]:
        last = max(side - window_size, 0)
        return [*range(0, last, stride), last]

    corners = [(top, left) for top in starts(image.height) for left in starts(image.width)]
    return [c for c in corners if (window_spots(image, c, window_size) >= 0).any()]


__all__ = [
    "GENE_SELECTIONS",
    "Window",
    "counter_hash",
    "counter_uniform",
    "covering_corners",
    "draw_corner",
    "gene_variances",
    "make_window",
    "mask_noise",
    "select_genes",
    "stream_key",
    "window_spots",
    "window_uniforms",
]
