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
"""Sample units: which sites of a slide make one sample. Everything else, the model included, is the same for all.

| unit | sites of a sample | sides of its tensors |
| --- | --- | --- |
| `patch` | all of a window | `window_size` |
| `spot` | a single one | 1 |
| `multi_spot` | a spot and the 16 nearest on the grid, within a window around it | `window_size` |
| `slice` | all of the slide | the slide's longer side |
"""

from collections.abc import Sequence

import numpy as np

from .noise_stimg import window_uniforms
from .sampling_stimg import covering_corners, draw_corners, window_spots
from .slide_image_stimg import SlideImage

NUM_NEIGHBOURS = 16


def sample_side(image: SlideImage, sample_unit: str, window_size: int) -> int:
    """Side of the tensors of one sample, in sites."""
    return {"spot": 1, "slice": max(image.height, image.width)}.get(sample_unit, window_size)


def spots_of_samples(sample_unit: str, window_size: int) -> int | None:
    """Sites of one sample, were they all occupied; None where that depends on the slide."""
    sites = {"patch": window_size**2, "spot": 1, "multi_spot": min(NUM_NEIGHBOURS + 1, window_size**2)}
    return sites.get(sample_unit)


def draw_samples(
    image: SlideImage, sample_unit: str, side: int, min_observed: float, seed: int, windows: Sequence[int]
) -> list[tuple[int, int]]:
    """The (top, left) of the samples with the given numbers: windows as in `draw_corners`, or spots uniformly.

    Raises:
        ValueError: the slide has no spot.
    """
    if sample_unit == "patch" or image.num_spots == 0:
        return draw_corners(image, side, min_observed, seed, windows)
    if sample_unit == "slice":
        return [(0, 0)] * len(windows)
    spots = [int(window_uniforms(seed, window)[1] * image.num_spots) for window in windows]
    return _around(image, np.array(spots, dtype=np.int64), side)


def covering_samples(image: SlideImage, sample_unit: str, side: int, stride: int) -> list[tuple[int, int]]:
    """The (top, left) of samples that together hold every spot; `stride` is that of windows."""
    if sample_unit == "patch":
        return covering_corners(image, side, stride)
    return [(0, 0)] if sample_unit == "slice" else _around(image, np.arange(image.num_spots), side)


def sample_spots(image: SlideImage, sample_unit: str, corners: Sequence[tuple[int, int]], side: int) -> np.ndarray:
    """int64 (B, S, S): the spot at every site of the samples, -1 where there is none or it does not belong to it."""
    spots = window_spots(image, corners, side)
    if sample_unit == "multi_spot":
        offsets = np.arange(side) - side // 2
        # By distance from the centre; of equally distant sites the upper, then the left one.
        order = np.argsort((offsets[:, None] ** 2 + offsets**2).ravel(), kind="stable")
        flat = spots.reshape(len(corners), -1)  # (B, S*S), a view
        beyond = (flat[:, order] >= 0).cumsum(-1) > NUM_NEIGHBOURS + 1
        flat[:, order] = np.where(beyond, -1, flat[:, order])
    return spots


def _around(image: SlideImage, spots: np.ndarray, side: int) -> list[tuple[int, int]]:
    """Corners of the windows in whose centre the spots stand; they may lie beyond the slide."""
    reach = side // 2
    return list(zip((image.rows[spots] - reach).tolist(), (image.cols[spots] - reach).tolist(), strict=True))


__all__ = [
    "NUM_NEIGHBOURS",
    "covering_samples",
    "draw_samples",
    "sample_side",
    "sample_spots",
    "spots_of_samples",
]
