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
"""Sampling: which windows, which genes, and the dense tensor of a batch of windows (Eqs. 6 and 7).

One sampler for CPU and accelerators: array operations on the slide's CSR, in NumPy on the CPU, in torch where the
slide lies on an accelerator. What is drawn for a window is a function of (seed, window number) and the slide alone;
see `noise_stimg.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .masking_stimg import first_lowest
from .noise_stimg import GENE_STREAM, counter_uniform, stream_key, window_uniforms
from .slide_image_stimg import SlideImage, on_host, window_counts
from .window_entries_stimg import VARIANCE_STEP, DeviceEntries, HostEntries

GENE_SELECTIONS = ("weighted", "variable", "random", "slide")
VARIANCE_EPS = 1e-6
# Non-zeros, or genes of as many windows, that are worked on at once on an accelerator: about 50 bytes of temporaries
# each.
ENTRIES_AT_ONCE = 1 << 23


# ---------------------------------------------------------------------------- windows


def draw_corners(
    image: SlideImage, window_size: int, min_observed: float, seed: int, windows: Sequence[int]
) -> list[tuple[int, int]]:
    """The (top, left) of the windows with the given numbers, uniform over the admissible corners (Eq. 6).

    Raises:
        ValueError: the slide has no spot, so that no window is admissible.
    """
    corners = image.admissible_corners(window_size, min_observed)
    if len(corners) == 0:
        raise ValueError(f"{image!r} has no window of {window_size} x {window_size} sites with a spot: leave it out.")
    drawn = corners[[int(window_uniforms(seed, window)[1] * len(corners)) for window in windows]]
    return [(top, left) for top, left in drawn.tolist()]


def window_spots(image: SlideImage, corners: Sequence[tuple[int, int]], window_size: int) -> np.ndarray:
    """int64 (B, S, S): the spot at every site of the windows, -1 where it is empty or beyond the slide."""
    spots = np.full((len(corners), window_size, window_size), -1, dtype=np.int64)
    for window, (top, left) in zip(spots, corners, strict=True):
        above, before = max(-top, 0), max(-left, 0)
        part = image.spot_grid[top + above : max(top + window_size, 0), left + before : max(left + window_size, 0)]
        window[above : above + part.shape[0], before : before + part.shape[1]] = part
    return spots


def covering_corners(image: SlideImage, window_size: int, stride: int) -> list[tuple[int, int]]:
    """Corners of overlapping windows that together hold every spot, row by row; windows without a spot are left out.

    Corners stand every `stride` sites, and at the far edge of each axis.
    """
    counts = window_counts(image.spot_grid >= 0, window_size)
    tops, lefts = ([*range(0, side - 1, stride), side - 1] for side in counts.shape)
    return [(top, left) for top in tops for left in lefts if counts[top, left] > 0]


# ---------------------------------------------------------------------------- genes


def select_genes(
    variances: Any, measured: Any, num_channels: int, gene_selection: str, seed: int, windows: Sequence[int]
) -> Any:
    """Genes of each window, at most `num_channels` and only measured ones.

    `"weighted"` draws without replacement with weights `v_g + eps` (Eq. 7): the genes with the smallest
    `-log(u_g) / (v_g + eps)`, u_g uniform, which is Gumbel top-k on `log(v_g + eps)` with one logarithm instead of
    three. `"variable"` and `"slide"` take the highest variances, `"random"` any genes. Ties go to the lower vocabulary
    number.

    Args:
        variances: float64 (B, vocabulary), array or tensor; None for `"random"`.
        measured: int64 (m,), ascending.
        windows: number of each window.

    Returns:
        int64 (B, min(num_channels, m)), ascending; (1, m) for all windows where all genes fit.
    """
    if len(measured) <= num_channels:
        return measured[None]
    in_numpy = isinstance(measured, np.ndarray)
    if variances is not None and len(measured) < variances.shape[1]:
        variances = variances[:, measured]
    if gene_selection in ("variable", "slide"):
        cost = -variances
    else:
        keys = np.array([[stream_key(seed, window, GENE_STREAM)] for window in windows])
        cost = counter_uniform(keys if in_numpy else torch.from_numpy(keys).to(measured.device), measured)  # (B, m)
        if gene_selection == "weighted":
            cost = (np.log(cost) if in_numpy else cost.log()) / -(variances + VARIANCE_EPS)
    if in_numpy:
        return measured[np.stack([_lowest_of_row(row, num_channels) for row in cost])]
    # Only the value of the last one matters; kthvalue would say it too, but not deterministically on every device.
    cut = cost.topk(num_channels, dim=-1, largest=False).values[:, -1:]
    return measured[first_lowest(cost, cut, num_channels).nonzero()[:, 1]].view(-1, num_channels)


def _lowest_of_row(cost: np.ndarray, count: int) -> np.ndarray:
    """int64 (count,): where the lowest values of float (m,) are, ascending; of equal ones the first."""
    # A sample tells a bound that about a third more than `count` values keep, which leaves little to be sorted.
    sample = cost[::16]
    rank = min(len(sample) - 1, len(sample) * count * 4 // (3 * len(cost)) + 8)
    few = np.flatnonzero(cost <= np.partition(sample, rank)[rank])
    if len(few) < count:
        few = np.arange(len(cost))
    cost = cost[few]
    cut = np.partition(cost, count - 1)[count - 1]
    lowest = np.flatnonzero(cost <= cut)
    if len(lowest) > count:
        lowest = np.flatnonzero(first_lowest(cost[None], cut, count))
    return few[lowest]


def _slide_variances(image: SlideImage, device: str | torch.device) -> Any:
    """float64 (1, vocabulary), array or tensor: rounded variances over all spots of the slide, for all windows."""
    variances = np.rint(image.gene_variances / VARIANCE_STEP)[None] * VARIANCE_STEP
    return variances if on_host(device) else torch.from_numpy(variances).to(device)


# ---------------------------------------------------------------------------- the tensor


def make_windows(
    image: SlideImage,
    spot_index: np.ndarray,
    num_channels: int,
    gene_selection: str,
    seed: int,
    windows: Sequence[int],
    genes: np.ndarray | None = None,
    device: str | torch.device = "cpu",
    slide_variances: bool = False,
) -> dict[str, torch.Tensor]:
    """Rasterise windows (Eq. 6) with genes drawn for each (Eq. 7), or with the given ones.

    Args:
        spot_index: int64 (B, S, S), the spot at every site, -1 = empty (`window_spots`). windows: number of every
            window, for its noise.
        genes: int64 (C,), vocabulary numbers that fix the channels and their order; those that were not measured on
            the slide become padding.
        device: where the slide's arrays lie, from the first call on, and where the windows are made.
        slide_variances: weigh genes by their variance over the slide, not over the window: for windows of one spot,
            within which nothing varies.

    Returns:
        The tensors of the processor's `BatchFeature`, values not yet normalised.

    Raises:
        ValueError: unknown `gene_selection`, or a device that cannot be used.
    """
    if gene_selection not in GENE_SELECTIONS:
        raise ValueError(f"gene_selection is {gene_selection!r}: expected one of {GENE_SELECTIONS}.")
    shape = len(spot_index), num_channels if genes is None else len(genes)
    measured = image.arrays(device).measured
    gene_ids = np.full(shape, image.pad_id)
    if genes is not None:
        gene_ids[:] = np.where(np.isin(genes, image.measured), genes, image.pad_id)
    in_numpy = on_host(device)
    num_sites, at_once = spot_index.shape[1] * spot_index.shape[2], 1
    if not in_numpy:
        gene_ids = torch.from_numpy(gene_ids).to(device)
        fullest = num_sites * int(np.diff(image.indptr).max(initial=1))
        at_once = max(1, ENTRIES_AT_ONCE // max(fullest, image.pad_id))
    pixel_values = torch.zeros((shape[0] * shape[1] + 1) * num_sites, dtype=torch.float32, device=device)
    for first in range(0, len(spot_index), at_once):
        part = slice(first, first + at_once)
        spots = spot_index[part]
        entries = HostEntries(image, spots) if in_numpy else DeviceEntries(image, spots, device)
        if genes is None:
            variances = None
            if gene_selection != "random":
                of_slide = slide_variances or gene_selection == "slide"
                variances = _slide_variances(image, device) if of_slide else entries.variances()
            chosen = select_genes(variances, measured, num_channels, gene_selection, seed, windows[part])
            gene_ids[part, : chosen.shape[1]] = chosen
        entries.rasterize(gene_ids[part], pixel_values, first, len(spot_index))
    gene_ids = torch.from_numpy(gene_ids) if in_numpy else gene_ids
    return {
        "pixel_values": pixel_values[:-num_sites].view(*shape, *spot_index.shape[1:]),
        "gene_ids": gene_ids,
        "channel_mask": gene_ids != image.pad_id,
        **window_sites(image, spot_index, device),
    }


def window_sites(image: SlideImage, spot_index: np.ndarray, device: str | torch.device) -> dict[str, torch.Tensor]:
    """What a batch says of the sites of windows, but for their expression.

    Args:
        spot_index: int64 (B, S, S), the spot at every site, -1 = empty.

    Returns:
        `coordinates`, `spot_index` and `pixel_mask` of the processor's `BatchFeature`.
    """
    # -1 reads the last row, which is one more than there are spots.
    coordinates = np.concatenate([image.coordinates, np.zeros((1, 2), np.float32)])[spot_index]
    spots = torch.from_numpy(spot_index).to(device)
    return {"coordinates": torch.from_numpy(coordinates).to(device), "spot_index": spots, "pixel_mask": spots >= 0}


__all__ = [
    "GENE_SELECTIONS",
    "VARIANCE_EPS",
    "covering_corners",
    "draw_corners",
    "make_windows",
    "select_genes",
    "window_sites",
    "window_spots",
]
