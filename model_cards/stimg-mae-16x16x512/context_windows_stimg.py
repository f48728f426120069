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
"""Where windows are placed to read hidden spots, so that they show as much as they can of what surrounds these."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from transformers.utils import logging

from .sampling_stimg import covering_corners
from .slide_image_stimg import SlideImage

logger = logging.get_logger(__name__)

# Sites around hidden spots that are compared at once: about 40 bytes of temporaries each.
SITES_AT_ONCE = 1 << 21


def context_windows(
    hidden: SlideImage, seen: SlideImage, size: int, stride: int, num_views: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """For every hidden spot the windows in which it has most to go by.

    Compared are windows `stride` sites apart, and those at the far edge of each axis. A visible spot of a window counts
    by its inverse squared distance in sites, so that a window is good which holds the spot's nearest surroundings and,
    those being equal, most of the wider ones. Ties go to the upper, then the left window.

    Args:
        hidden, seen: parts of one image.

    Returns:
        corners: (top, left) of the windows that are needed, row by row; views: int64 (hidden spots, at most
        num_views), which of them, best first, -1 where there are no more.
    """
    candidates = np.array(covering_corners(hidden, size, stride), dtype=np.int64)  # (n, 2)
    number = np.full((seen.height + size - 1, seen.width + size - 1), -1, dtype=np.int64)
    number[candidates[:, 0] + size - 1, candidates[:, 1] + size - 1] = np.arange(len(candidates))
    steps = np.arange(1 - size, size)
    squared = (steps[:, None] ** 2 + steps**2).astype(np.float64)
    weight = np.divide(1, squared, out=np.zeros_like(squared), where=squared > 0)
    surroundings = sliding_window_view(np.pad(seen.spot_grid >= 0, size - 1), weight.shape)
    holding = sliding_window_view(number, (size, size))  # of a site, the windows that hold it, by their place on it
    views, alone, at_once = [], 0, max(SITES_AT_ONCE // weight.size, 1)
    for first in range(0, hidden.num_spots, at_once):
        rows, cols = hidden.rows[first : first + at_once], hidden.cols[first : first + at_once]
        sums = np.zeros((len(rows), 2 * size, 2 * size))
        sums[:, 1:, 1:] = (surroundings[rows, cols] * weight).cumsum(1).cumsum(2)
        tall = sums[:, size:] - sums[:, :-size]
        context = (tall[:, :, size:] - tall[:, :, :-size]).reshape(len(rows), -1)
        numbers = holding[rows, cols].reshape(len(rows), -1)
        # Rounded, so that the order of addition cannot tell two windows apart that show the same.
        context = np.where(numbers >= 0, context.round(9), -1)
        best = np.argsort(-context, axis=1, kind="stable")[:, :num_views]
        views.append(np.take_along_axis(numbers, best, axis=1))
        alone += int((context.max(1) <= 0).sum())
    if alone:
        logger.warning(
            f"{seen.name}: {alone} of {hidden.num_spots} hidden spots have no visible spot within a window of {size} "
            "sites: they are predicted from nothing; hide a smaller region or pass a larger window_size."
        )
    needed, views = np.unique(np.concatenate(views), return_inverse=True)
    views = views.reshape(hidden.num_spots, -1) - int(needed[0] < 0)  # where -1 is among them, it is the first
    return [(top, left) for top, left in candidates[needed[needed >= 0]].tolist()], views


__all__ = ["context_windows"]
