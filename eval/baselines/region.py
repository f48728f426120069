"""Simple predictors of a hidden region: what zeros, means and interpolation say before any model does.

All take the same two things, values of the visible spots and positions, and know nothing else of the slide.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from modeling_stimg.kriging_stimg import kriging_weights

NUM_NEIGHBOURS = 16
POWER = 2.0
NUM_KRIGED = 5000
# Distances that are held at once.
DISTANCES_AT_ONCE = 1 << 23


def zeros(values: np.ndarray, visible: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Nothing is expressed: the best guess by absolute error where most counts are zero.

    Parameters
    ----------
    values
        float (n, genes) of the visible spots.
    visible, hidden
        float (n, 2) and (m, 2), positions of the visible and the hidden spots, in any unit.

    Returns
    -------
    float64 (m, genes).
    """
    return np.zeros((len(hidden), values.shape[1]))


def gene_mean(values: np.ndarray, visible: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Every gene's mean over the visible spots, the same for every hidden spot; arguments as in `zeros`."""
    mean = np.asarray(values, np.float64).mean(axis=0)
    return np.repeat(mean[None], len(hidden), axis=0)


def nearest_mean(
    values: np.ndarray, visible: np.ndarray, hidden: np.ndarray, num_neighbours: int = NUM_NEIGHBOURS
) -> np.ndarray:
    """Mean of the nearest visible spots; of equally distant ones the first. Arguments as in `zeros`."""

    def of_nearest(squared: np.ndarray) -> np.ndarray:
        nearest = np.argsort(squared, axis=1, kind="stable")[:, :num_neighbours]
        return np.asarray(values, np.float64)[nearest].mean(axis=1)

    return _by_distance(visible, hidden, of_nearest, num_neighbours * values.shape[1])


def inverse_distance(values: np.ndarray, visible: np.ndarray, hidden: np.ndarray, power: float = POWER) -> np.ndarray:
    """Mean of all visible spots weighted by distance to the minus `power` (Shepard 1968); arguments as in `zeros`.

    No hidden spot stands on the position of a visible one.
    """

    def weighted(squared: np.ndarray) -> np.ndarray:
        weights = squared ** (-power / 2)
        return weights / weights.sum(axis=1, keepdims=True) @ np.asarray(values, np.float64)

    return _by_distance(visible, hidden, weighted)


def kriging(values: np.ndarray, visible: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Interpolation that chooses its smoothness itself, without a model; arguments as in `zeros`, in spot distances.

    Of more than `NUM_KRIGED` visible spots the nearest to hidden ones count: all spots of a Visium array fit, but the
    covariances of a slide of larger ones would not fit into memory.
    """
    values = np.asarray(values, np.float64)
    if len(visible) > NUM_KRIGED:
        distance, _ = cKDTree(hidden).query(visible)
        # Rounded, so that of equally distant spots the first count.
        nearest = np.sort(np.argsort(distance.round(6), kind="stable")[:NUM_KRIGED])
        values, visible = values[nearest], visible[nearest]
    [weights] = kriging_weights([values], visible, hidden)
    mean = values.mean(axis=0)
    return mean + weights @ (values - mean)


def _by_distance(
    visible: np.ndarray, hidden: np.ndarray, predict: Callable[[np.ndarray], np.ndarray], temporaries: int = 0
) -> np.ndarray:
    """`predict` of squared distances (some hidden spots, visible spots), a few hidden spots at a time."""
    at_once = max(1, DISTANCES_AT_ONCE // max(len(visible), temporaries))
    parts = []
    for first in range(0, len(hidden), at_once):
        squared = cdist(hidden[first : first + at_once], visible, "sqeuclidean")
        # Rounded, so that on a lattice equal distances are equal whatever sqrt(3) was rounded to.
        parts.append(predict(squared.round(6)))
    return np.concatenate(parts)


PREDICTORS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "zeros": zeros,
    "gene mean": gene_mean,
    f"mean of {NUM_NEIGHBOURS} nearest": nearest_mean,
    f"inverse distance, power {POWER:g}": inverse_distance,
    # What the model is calibrated with: the row that it has to beat to have told anything.
    "kriging": kriging,
}
