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
"""Kriging: interpolation whose reach, and whose trust in a single spot, are chosen by leaving spots out."""

from collections.abc import Sequence

import numpy as np

RANGES = (2.0, 4.0, 8.0, 16.0)
NUGGETS = (1.0, 3.0, 10.0, 30.0, 100.0)
# Distances that are held at once.
DISTANCES_AT_ONCE = 1 << 20


def distances(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 (n, m) of float (n, 2) and (m, 2)."""
    return np.sqrt(((places[:, None] - others) ** 2).sum(-1))


def nearest_distances(places: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 (n,): from float (n, 2) to the nearest of float (m, 2)."""
    at_once = max(DISTANCES_AT_ONCE // max(len(others), 1), 1)
    parts = [distances(places[start : start + at_once], others) for start in range(0, len(places), at_once)]
    return np.concatenate([part.min(1) for part in parts])


def kriging_weights(
    targets: Sequence[np.ndarray],
    places: np.ndarray,
    sites: np.ndarray,
    ranges: Sequence[float] = RANGES,
    nuggets: Sequence[float] = NUGGETS,
) -> list[np.ndarray]:
    """Weights of simple kriging with the covariance exp(-distance / range), and a nugget of noise in each spot.

    Range and nugget, the same for all columns of a target, are those with the lowest squared error where every spot is
    predicted from the others.

    Args:
        targets: float (n, columns) each, what is to be interpolated.
        places, sites: float (n, 2) and (m, 2), where it is known and where it is asked for.
        ranges: in the units of these. nuggets: as shares of the variance of what is smooth.

    Returns:
        for every target, float64 (m, n): `mean + weights @ (values - mean)` are its values at the sites.
    """
    centred = [np.asarray(values, np.float64) - np.mean(values, axis=0, dtype=np.float64) for values in targets]
    apart = distances(places, places)
    best: list[tuple] = [(np.inf,)] * len(centred)
    for reach in ranges:
        variances, axes = np.linalg.eigh(np.exp(-apart / reach))
        turned = [axes.T @ values for values in centred]
        for nugget in nuggets:
            inverse = 1 / (np.maximum(variances, 0) + nugget)
            diagonal = (axes**2) @ inverse
            for number, values in enumerate(turned):
                # What leaving a spot out changes, from the inverse alone (Rasmussen and Williams 2006, Eq. 5.12).
                error = float((((axes @ (inverse[:, None] * values)) / diagonal[:, None]) ** 2).sum())
                if error < best[number][0]:
                    best[number] = (error, reach, axes, inverse)
    return [np.exp(-distances(sites, places) / reach) @ axes * inverse @ axes.T for _, reach, axes, inverse in best]


__all__ = ["distances", "kriging_weights", "nearest_distances"]
