"""Clusters of features: k-means, a Gaussian mixture, and Leiden communities. The same seed gives the same clusters."""

from __future__ import annotations

import random
import warnings
from contextlib import AbstractContextManager
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from threadpoolctl import ThreadpoolController

NUM_NEIGHBOURS = 15
NUM_STARTS = 10
NUM_COMPONENTS = 20
MAX_BISECTIONS = 30
FIRST_RESOLUTION = 1.0
# Spots whose neighbours are looked for at once: a progress bar that moves, and no smaller matrix products.
SPOTS_AT_ONCE = 4096


@cache
def _controller() -> ThreadpoolController:
    """Of the libraries that are loaded; looking for them takes longer than a small clustering."""
    import sklearn.cluster  # noqa: F401 - which brings its own OpenMP
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def one_thread() -> AbstractContextManager:
    """A context in which NumPy, SciPy and scikit-learn use a single thread: several add up in the order they finish."""
    return _controller().limit(limits=1)


def k_means(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """int64 (n,): clusters of the features as they are, the best of 10 starts."""
    from sklearn.cluster import KMeans

    check_spots(features, num_clusters)
    with one_thread():
        return KMeans(num_clusters, n_init=NUM_STARTS, random_state=seed).fit_predict(features).astype(np.int64)


def gaussian_mixture(features: np.ndarray, num_clusters: int, seed: int, progress: bool = False) -> np.ndarray:
    """int64 (n,): the likeliest component of a Gaussian mixture, the best of 10 starts.

    On the 20 leading principal components, less where there are not as many; all components share one covariance
    ("tied", "EEE" in mclust's words), so that domains are told by where they are, and not by how wide they are. Scaling
    the features changes nothing. A component that is nobody's likeliest leaves fewer clusters than asked for.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    check_spots(features, num_clusters)
    components = principal_components(features, NUM_COMPONENTS)
    components = components / (components[:, :1].std() or 1.0)  # scikit-learn adds a constant to variances
    draws = np.random.RandomState(seed)
    best: Any = None
    with one_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # of one start; of the best one it is told below
        for _ in tqdm(range(NUM_STARTS), "Gaussian mixture", disable=not progress):
            mixture = GaussianMixture(num_clusters, covariance_type="tied", max_iter=300, random_state=draws)
            mixture.fit(components)
            if best is None or mixture.lower_bound_ > best.lower_bound_:
                best = mixture
        clusters = best.predict(components).astype(np.int64)
    if not best.converged_:
        warnings.warn("The Gaussian mixture still changes after 300 iterations: its domains are rough.", stacklevel=2)
    return clusters


def principal_components(features: np.ndarray, number: int) -> np.ndarray:
    """float64 (n, number), fewer where the features or spots are: the leading principal components."""
    from sklearn.decomposition import PCA

    number = min(number, features.shape[1], len(features) - 1)
    with one_thread():
        return PCA(number, svd_solver="full").fit_transform(np.asarray(features, dtype=np.float64))


class NeighbourGraph:
    """The undirected graph of the 15 nearest neighbours by the features as they are, and its Leiden communities."""

    def __init__(self, features: np.ndarray, progress: bool = False):
        """`features`: float (n, width), n from 2. Raises ImportError without igraph, ValueError for fewer spots."""
        check_spots(features, 2)
        try:
            import igraph
        except ImportError as error:
            raise ImportError(
                "Leiden communities need igraph: pip install 'stimg[domains]', or tell the number of domains for a "
                "Gaussian mixture."
            ) from error
        self.graph = igraph.Graph(n=len(features), edges=_neighbour_pairs(features, progress).tolist())

    def communities(self, resolution: float, seed: int) -> np.ndarray:
        """int64 (n,): Leiden communities by modularity; the higher the resolution, the more of them."""
        import igraph

        igraph.set_random_number_generator(random.Random(seed))
        try:
            found = self.graph.community_leiden("modularity", resolution=resolution, n_iterations=10)
        finally:
            igraph.set_random_number_generator(random)
        return np.array(found.membership, dtype=np.int64)

    def as_many_communities(self, number: int, seed: int, progress: bool = False) -> np.ndarray:
        """int64 (n,): communities at the resolution, found by bisection, that gives `number` of them.

        Where no resolution gives just as many, the closest number is taken, rather fewer than more.
        """
        best = self.communities(FIRST_RESOLUTION, seed)
        low, high, resolution = 0.0, None, FIRST_RESOLUTION
        with tqdm(desc="resolutions", total=MAX_BISECTIONS, disable=not progress, leave=False) as bar:
            for _ in range(MAX_BISECTIONS):
                found = best if resolution == FIRST_RESOLUTION else self.communities(resolution, seed)
                bar.update()
                size = found.max() + 1
                best = min(best, found, key=lambda clusters: (abs(clusters.max() + 1 - number), clusters.max()))
                if size == number:
                    break
                if size < number:
                    low = resolution
                else:
                    high = resolution
                resolution = 2 * resolution if high is None else (low + high) / 2
        return best


def leiden(features: np.ndarray, num_clusters: int, seed: int) -> np.ndarray:
    """int64 (n,): `num_clusters` Leiden communities of the 15 nearest neighbours, or nearly as many.

    See `NeighbourGraph.as_many_communities`.
    """
    check_spots(features, num_clusters)
    return NeighbourGraph(features).as_many_communities(num_clusters, seed)


def check_spots(features: np.ndarray, num_clusters: int) -> None:
    """Raise ValueError where there are fewer spots than clusters."""
    if len(features) < max(num_clusters, 2):
        raise ValueError(f"{len(features)} spots and {num_clusters} clusters: needed is a spot for each, and two")


def _neighbour_pairs(features: np.ndarray, progress: bool) -> np.ndarray:
    """int64 (edges, 2): pairs of spots one of which is among the 15 nearest of the other, each once."""
    from sklearn.neighbors import NearestNeighbors

    number = min(NUM_NEIGHBOURS, len(features) - 1)
    pairs = []
    with one_thread():
        search = NearestNeighbors(n_neighbors=number).fit(features)
        starts = range(0, len(features), SPOTS_AT_ONCE)
        for start in tqdm(starts, "nearest neighbours", disable=not progress or len(starts) == 1):
            spots = np.arange(start, min(start + SPOTS_AT_ONCE, len(features)))
            found = search.kneighbors(features[spots], number + 1, return_distance=False)
            own = found == spots[:, None]
            # A spot is its own nearest neighbour, but for others that are equal to it: one of those goes instead.
            own[~own.any(1), 0] = True
            nearest = found[~own].reshape(len(spots), number)
            pairs.append(np.stack([np.repeat(spots, number), nearest.ravel()], axis=1))
    return np.unique(np.sort(np.concatenate(pairs), axis=1), axis=0)


__all__ = [
    "NeighbourGraph",
    "check_spots",
    "gaussian_mixture",
    "k_means",
    "leiden",
    "one_thread",
    "principal_components",
]
