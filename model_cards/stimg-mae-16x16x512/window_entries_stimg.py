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
"""The non-zeros of windows: their gene variances (Eq. 7), and the dense tensor of the chosen genes (Eq. 6).

Two versions of one thing. `HostEntries` is one window in NumPy, `DeviceEntries` are many windows on an accelerator.

What bounds both is memory traffic: every non-zero is added to two tables of gene sums, and its gene looked up in one
of channels. On the CPU, where these tables live in the caches, so must the temporaries: they are reused from window to
window, and worked on in blocks.
"""

import threading
from typing import Any

import numpy as np
import torch

from .slide_image_stimg import SlideImage

BLOCK_ENTRIES = 1 << 16
# Variances are rounded to multiples of this. It is far above what the order of addition changes in the last bits, so
# that no device can tell two genes of equal variance apart, and far below what could matter to a draw.
VARIANCE_STEP = 2.0**-34

_scratch = threading.local()


def scratch(name: str, length: int, dtype: Any) -> np.ndarray:
    """An array of a name that is reused by the next call from this thread; its content is arbitrary."""
    array = getattr(_scratch, name, None)
    if array is None or len(array) < length:
        array = np.empty(length * 5 // 4, dtype)
        setattr(_scratch, name, array)
    return array[:length]


def find_spots(image: SlideImage, spot_index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The observed sites of windows, in row-major order.

    Args:
        spot_index: int64 (B, S, S), the spot at every site, -1 = empty.

    Returns:
        sites: int64 (k,), `window * S * S + site`; spots: int64 (k,); starts, ends: int64 (k,), where the spots'
        non-zeros stand in the slide's CSR.
    """
    flat = spot_index.reshape(-1)
    sites = np.flatnonzero(flat >= 0)
    spots = flat[sites]
    return sites, spots, image.indptr[spots], image.indptr[spots + 1]


def first_places(
    first_window: int, windows: int, num_windows: int, num_channels: int, num_sites: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where channels begin in a flat tensor of `num_windows` windows, less the window's part of `sites`.

    Returns:
        channels: int64 (windows, num_channels); elsewhere: int64 (windows, 1), what stands behind the last window.
    """
    window = np.arange(windows)[:, None]
    channels = ((first_window + window) * num_channels + np.arange(num_channels) - window) * num_sites
    return channels, (num_windows * num_channels - window) * num_sites


class HostEntries:
    """The non-zeros of one window, valid until the next is made in this thread.

    Args:
        spot_index: int64 (1, S, S), the spot at every site, -1 = empty.
    """

    def __init__(self, image: SlideImage, spot_index: np.ndarray):
        sites, spots, starts, ends = find_spots(image, spot_index)
        self.num_genes = image.pad_id
        self.num_sites = spot_index.size
        self.num_spots = len(spots)
        lengths = ends - starts
        total = int(lengths.sum())
        genes, values = scratch("genes", total, np.int64), scratch("values", total, np.float32)
        # Spots stand in grid order, so each row of a window is one run of the CSR arrays: copied as a whole.
        last = [*np.flatnonzero(spots[1:] - spots[:-1] != 1).tolist(), len(spots) - 1][: len(spots)]
        first = [0, *(spot + 1 for spot in last[:-1])]
        begin, end = starts.tolist(), ends.tolist()
        runs = [slice(0, 0), *(slice(begin[a], end[b]) for a, b in zip(first, last, strict=False))]
        np.concatenate([image.indices[run] for run in runs], out=genes)
        if isinstance(image.values, np.ndarray):
            np.concatenate([image.values[run] for run in runs], out=values)
        else:
            image.values.read(runs, spots, lengths, values)
        # Blocks of whole spots: genes, values, the spots' sites, their numbers of non-zeros.
        self.blocks: list[tuple[torch.Tensor, np.ndarray, np.ndarray, np.ndarray]] = []
        spot = entry = size = 0
        for row_end, run in zip(last, runs[1:], strict=True):
            size += run.stop - run.start
            if size >= BLOCK_ENTRIES or row_end == last[-1]:
                part, spot_part = slice(entry, entry + size), slice(spot, row_end + 1)
                self.blocks.append((torch.from_numpy(genes[part]), values[part], sites[spot_part], lengths[spot_part]))
                spot, entry, size = row_end + 1, entry + size, 0

    def variances(self) -> np.ndarray:
        """float64 (1, num_genes): variance over the observed spots of every gene, zeros included, rounded."""
        # A value and its square as one complex number: one pass over the genes adds up both. torch adds faster than
        # np.bincount, in the same memory.
        sums = torch.zeros(self.num_genes, dtype=torch.complex128, device="cpu")
        for genes, values, _, _ in self.blocks:
            pairs = scratch("pairs", 2 * len(values), np.float64).reshape(-1, 2)
            wide = scratch("wide", len(values), np.float64)
            np.copyto(wide, values)
            pairs[:, 0] = wide
            np.multiply(wide, wide, out=pairs[:, 1])
            sums.scatter_add_(0, genes, torch.from_numpy(pairs.view(np.complex128)[:, 0]))
        moments = sums.numpy().view(np.float64).reshape(-1, 2)
        moments /= max(self.num_spots, 1)
        mean = moments[:, 0].copy()
        variances = moments[:, 1] - mean * mean
        variances /= VARIANCE_STEP
        np.rint(variances, out=variances)
        variances *= VARIANCE_STEP
        return np.maximum(variances, 0, out=variances)[None]

    def rasterize(self, gene_ids: np.ndarray, pixel_values: torch.Tensor, first_window: int, num_windows: int) -> None:
        """Write the values of the chosen genes into a tensor of many windows.

        Args:
            gene_ids: int64 (1, C), distinct but for padding (`num_genes`).
            pixel_values: float32 (num_windows * C * S * S + S * S,): windows of zeros, and behind them a place where
                the values of all other genes end up. To sort these out first would take longer.
            first_window: which window of the tensor this is.
        """
        channels, elsewhere = first_places(first_window, 1, num_windows, gene_ids.shape[1], self.num_sites)
        table = np.full(self.num_genes + 1, elsewhere[0])
        table[gene_ids[0]] = channels[0]
        table = torch.from_numpy(table)
        for genes, values, sites, lengths in self.blocks:
            place = scratch("place", len(values), np.int64)
            torch.index_select(table, 0, genes, out=torch.from_numpy(place))
            place += np.repeat(sites, lengths)  # NumPy's addition: torch multiplies by a factor of 1, which is slow
            pixel_values.scatter_(0, torch.from_numpy(place), torch.from_numpy(values))


class DeviceEntries:
    """The non-zeros of B windows, as tensors where the slide's arrays lie.

    Args:
        device: one on which the slide has arrays (`SlideImage.arrays`), or will have them.
        spot_index: int64 (B, S, S), the spot at every site, -1 = empty.
    """

    def __init__(self, image: SlideImage, spot_index: np.ndarray, device: str | torch.device):
        arrays = image.arrays(device)
        sites, _, starts, ends = find_spots(image, spot_index)
        self.num_genes = image.pad_id
        self.num_sites = spot_index[0].size
        lengths = ends - starts
        total = int(lengths.sum())
        per_spot = (sites, lengths, starts - (np.cumsum(lengths) - lengths), sites // self.num_sites * self.num_genes)
        sites, lengths, shift, offset = (torch.from_numpy(a).to(device) for a in per_spot)
        self.num_spots = torch.from_numpy((spot_index >= 0).sum((1, 2)).clip(min=1)[:, None]).to(device)
        spot = torch.arange(len(sites), device=device).repeat_interleave(lengths, output_size=total)
        position = shift[spot] + torch.arange(total, device=device)
        self.values = arrays.values[position]  # float32 (n,)
        self.cell = arrays.indices[position] + offset[spot]  # int64 (n,), window * num_genes + gene
        self.site = sites[spot]  # int64 (n,), window * S * S + site

    def variances(self) -> torch.Tensor:
        """float64 (B, num_genes); see `HostEntries.variances`."""
        sums = torch.zeros(2, len(self.num_spots) * self.num_genes, dtype=torch.float64, device=self.values.device)
        values = self.values.double()
        sums[0].scatter_add_(0, self.cell, values)
        sums[1].scatter_add_(0, self.cell, values.square_())
        mean, square = sums.view(2, -1, self.num_genes) / self.num_spots
        variances = (square - mean * mean).div_(VARIANCE_STEP).round_().mul_(VARIANCE_STEP)
        return variances.clamp_(min=0)

    def rasterize(
        self, gene_ids: torch.Tensor, pixel_values: torch.Tensor, first_window: int, num_windows: int
    ) -> None:
        """The same for gene_ids int64 (B, C), the genes of B windows; see `HostEntries.rasterize`."""
        places = first_places(first_window, len(gene_ids), num_windows, gene_ids.shape[1], self.num_sites)
        channels, elsewhere = (torch.from_numpy(a).to(gene_ids.device) for a in places)
        table = elsewhere.repeat(1, self.num_genes + 1).scatter_(1, gene_ids, channels)
        table = table[:, :-1].reshape(-1)  # the last column is padding
        pixel_values.scatter_(0, table[self.cell] + self.site, self.values)


__all__ = ["DeviceEntries", "HostEntries"]
