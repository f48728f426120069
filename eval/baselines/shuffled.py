"""A control: a slide whose spots have swapped their counts. Nothing but position can be read off it.

Where a spot lies decides which windows hold it, which genes were drawn for these, and where in them it stands; an
embedding carries that along, and a probe under a random split of spots turns it into domains. What a model scores here
it did not get from expression.
"""

from __future__ import annotations

import numpy as np
from anndata import AnnData


def shuffled_order(num_spots: int, seed: int) -> np.ndarray:
    """int64 (num_spots,): whose counts every spot gets; the same for all slides of one length."""
    return np.random.default_rng([seed, num_spots]).permutation(num_spots)


def shuffle_spots(adata: AnnData, seed: int) -> AnnData:
    """The slide with its rows of counts in random order; spots, positions and labels stay where they are."""
    shuffled = adata.copy()
    shuffled.X = adata.X[shuffled_order(adata.n_obs, seed)]
    return shuffled
