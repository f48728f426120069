"""A control: a slide whose spots have swapped their counts. Nothing but position can be read off it.

Where a spot lies decides which windows hold it, which genes were drawn for these, and where in them it stands; an
embedding carries that along, and a probe under a random split of spots turns it into domains. What a model scores here
it did not get from expression.
"""

from __future__ import annotations

import numpy as np
from anndata import AnnData


def shuffle_spots(adata: AnnData, seed: int) -> AnnData:
    """The slide with its rows of counts in random order; spots, positions and labels stay where they are."""
    order = np.random.default_rng([seed, adata.n_obs]).permutation(adata.n_obs)
    shuffled = adata.copy()
    shuffled.X = adata.X[order]
    return shuffled
