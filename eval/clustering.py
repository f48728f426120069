"""Domains without labels: k-means and Leiden on an embedding, with as many clusters as there are true domains."""

from __future__ import annotations

import random

import numpy as np
from sklearn.cluster import KMeans
from sklearn.neighbors import kneighbors_graph

from eval.threads import one_thread

NUM_NEIGHBOURS = 15
MAX_BISECTIONS = 30
FIRST_RESOLUTION = 1.0


def k_means(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """int64 (n,): clusters of the features as they are, the best of 10 starts."""
    _check_spots(features, num_clusters)
    with one_thread():  # several threads add up in the order in which they finish
        return KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(features).astype(np.int64)


def leiden(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """int64 (n,): Leiden communities by modularity, of the 15 nearest neighbours by the features as they are.

    The resolution is found by bisection so that there are `num_clusters` communities; where no resolution gives just as
    many, the closest number is taken, rather fewer than more. The same seed gives the same communities.
    """
    _check_spots(features, num_clusters)
    import igraph

    with one_thread():
        graph = kneighbors_graph(features, min(NUM_NEIGHBOURS, len(features) - 1), mode="connectivity").tocoo()
    pairs = np.unique(np.sort(np.stack([graph.row, graph.col], axis=1), axis=1), axis=0)
    network = igraph.Graph(n=len(features), edges=pairs.tolist())

    def communities(resolution: float) -> np.ndarray:
        igraph.set_random_number_generator(random.Random(seed))
        try:
            found = network.community_leiden("modularity", resolution=resolution, n_iterations=10)
        finally:
            igraph.set_random_number_generator(random)
        return np.array(found.membership, dtype=np.int64)

    best = communities(FIRST_RESOLUTION)
    low, high, resolution = 0.0, None, FIRST_RESOLUTION
    for _ in range(MAX_BISECTIONS):
        found = best if resolution == FIRST_RESOLUTION else communities(resolution)
        number = found.max() + 1
        best = min(best, found, key=lambda clusters: (abs(clusters.max() + 1 - num_clusters), clusters.max()))
        if number == num_clusters:
            break
        if number < num_clusters:
            low = resolution
        else:
            high = resolution
        resolution = 2 * resolution if high is None else (low + high) / 2
    return best


CLUSTERINGS = {"k-means": k_means, "leiden": leiden}


def _check_spots(features: np.ndarray, num_clusters: int) -> None:
    if len(features) < max(num_clusters, 2):
        raise ValueError(f"{len(features)} spots and {num_clusters} clusters: needed is a spot for each, and two")
