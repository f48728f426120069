"""`find_domains`: tissue domains from an embedding, without labels."""

from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from .clustering import NeighbourGraph, gaussian_mixture, k_means
from .compaction_stimg import compact
from .keys import DOMAIN, EMBEDDING, OF_DOMAINS, check_uns, colours_key, tell
from .palette import class_colours
from .slides import spot_positions

METHODS = ("auto", "leiden", "gmm", "kmeans")
SMOOTHED = ("labels", "embedding")


def find_domains(
    adata: AnnData,
    n_domains: int | None = None,
    key: str = EMBEDDING,
    method: str = "auto",
    smoothing: int = 0,
    seed: int = 0,
    key_added: str = DOMAIN,
    smoothed: str = "labels",
    resolution: float = 1.0,
    progress: bool = False,
) -> None:
    """Find the domains of an embedded slide, in `adata.obs[key_added]`.

    Writes a categorical with the categories "0", "1", ... by falling size, their colours to
    `uns[f"{key_added}_colors"]`, where scanpy and squidpy look for them, and what was done to
    `uns["stimg"]["domains"][key_added]`; everything else stays as it is. The same input gives the same domains.

    Args:
        adata: a slide with an embedding, as `embed_slide` writes it; `X` is not looked at.
        n_domains: how many; None = as many as Leiden finds at `resolution`.
        key: of the embedding in `obsm`, (n_obs, width).
        method: `"gmm"`: a Gaussian mixture of one common covariance on the 20 leading principal components.
            `"kmeans"`: k-means on the embedding as it is. `"leiden"`: communities of the graph of the 15 nearest
            neighbours; with `n_domains` at the resolution that gives as many, or nearly as many (needs igraph, the
            extra `domains`). `"auto"`: `"gmm"` with `n_domains`, else `"leiden"`.
        smoothing: radius in sites of the square around each spot that decides with it, 0 = none; as `smoothing` of
            `embed_slide`.
        seed: of starts and of the order in which Leiden goes through spots, 0 to 2**32 - 1.
        key_added: column of `obs`.
        smoothed: what is smoothed. `"labels"`: a spot takes the domain that most spots in its square have, itself
            included; its own, then the larger one, where two have as many. `"embedding"`: means over squares are
            clustered.
        resolution: of Leiden without `n_domains`: the higher, the more domains.
        progress: show a progress bar.

    Raises:
        ValueError: no such embedding, or one with NaN; an unknown method, or one that needs `n_domains`; numbers out
            of their range; fewer different spots than domains; no array positions, where they are needed to smooth.
        ImportError: Leiden without igraph.
    """
    settings = domain_settings(n_domains, key, method, smoothing, seed, smoothed, resolution)
    check_uns(adata.uns)
    features = _features(adata, key)
    squares = site_neighbours(adata, smoothing) if smoothing else None
    if squares is not None and smoothed == "embedding":
        features = (squares @ features) / np.asarray(squares.sum(axis=1))
    if n_domains is not None:
        different = len(np.unique(features, axis=0))
        if different < n_domains:
            raise ValueError(
                f"n_domains is {n_domains}, but obsm[{key!r}] has only {different} different rows: expected fewer."
            )
    domains = by_size(_clusters(features, n_domains, settings["method"], seed, resolution, progress))
    if squares is not None and smoothed == "labels":
        domains = by_size(majority(squares, domains))
    number = int(domains.max()) + 1
    names = [str(i) for i in range(number)]
    adata.obs[key_added] = pd.Categorical([names[i] for i in domains], categories=names)
    adata.uns[colours_key(key_added)] = class_colours(number)
    from . import __version__

    tell(adata.uns, OF_DOMAINS, key_added, {**settings, "found": number, "stimg_version": __version__})


def domain_settings(
    n_domains: int | None = None,
    key: str = EMBEDDING,
    method: str = "auto",
    smoothing: int = 0,
    seed: int = 0,
    smoothed: str = "labels",
    resolution: float = 1.0,
) -> dict[str, Any]:
    """What decides the domains of an embedding, checked, `"auto"` decided: text and numbers.

    `n_domains` is left out where it is None, `smoothed` without smoothing, `resolution` where it is not used.

    Raises:
        ValueError: as `find_domains`.
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}: expected one of {METHODS}.")
    if smoothed not in SMOOTHED:
        raise ValueError(f"smoothed is {smoothed!r}: expected one of {SMOOTHED}.")
    if n_domains is not None and n_domains < 2:
        raise ValueError(f"n_domains is {n_domains}: expected at least 2, or None for as many as Leiden finds.")
    if smoothing < 0:
        raise ValueError(f"smoothing is {smoothing}: expected a radius in sites, from 0.")
    if not resolution > 0:
        raise ValueError(f"resolution is {resolution}: expected a positive number.")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: expected a number from 0 to {2**32 - 1}.")
    if method == "auto":
        method = "leiden" if n_domains is None else "gmm"
    if n_domains is None and method != "leiden":
        raise ValueError(f'method is "{method}", which needs n_domains: tell how many, or take "leiden".')
    settings: dict[str, Any] = {"key": key, "method": method, "smoothing": int(smoothing), "seed": int(seed)}
    if n_domains is None:
        settings["resolution"] = float(resolution)
    else:
        settings["n_domains"] = int(n_domains)
    if smoothing:
        settings["smoothed"] = smoothed
    return settings


def _features(adata: AnnData, key: str) -> np.ndarray:
    """The embedding, checked: float (n_obs, width)."""
    if key not in adata.obsm:
        found = ", ".join(map(repr, adata.obsm)) or "nothing"
        raise ValueError(f"obsm has no {key!r} (it has {found}): embed the slide first, with embed_slide.")
    features = np.asarray(adata.obsm[key])
    if features.ndim != 2 or features.dtype.kind != "f" or not features.size:
        raise ValueError(f"obsm[{key!r}] is {features.dtype} {features.shape}: expected floats (spots, width).")
    bad = int((~np.isfinite(features)).any(axis=1).sum())
    if bad:
        raise ValueError(f"obsm[{key!r}] has NaN or infinite values at {bad} spots: embed the slide again.")
    if len(features) < 2:
        raise ValueError("The slide has one spot: expected at least two, to tell domains apart.")
    return features


def _clusters(
    features: np.ndarray, n_domains: int | None, method: str, seed: int, resolution: float, progress: bool
) -> np.ndarray:
    if method == "gmm":
        return gaussian_mixture(features, n_domains, seed, progress)
    if method == "kmeans":
        return k_means(features, n_domains, seed)
    graph = NeighbourGraph(features, progress)
    if n_domains is None:
        return graph.communities(resolution, seed)
    return graph.as_many_communities(n_domains, seed, progress)


def by_size(clusters: np.ndarray) -> np.ndarray:
    """int64 (n,): the same clusters called 0, 1, ... by falling size; of two as large that of the earlier spot first.

    Args:
        clusters: int (n,), any numbers.
    """
    _, first, inverse, sizes = np.unique(clusters, return_index=True, return_inverse=True, return_counts=True)
    order = np.lexsort((first, -sizes))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank[inverse.reshape(-1)]


def site_neighbours(adata: AnnData, radius: int) -> sp.csr_matrix:
    """float64 (n_obs, n_obs), 1 where a spot stands in the (2 * radius + 1)-sided square around another; with itself.

    On the slide's compact grid (`"lattice"`), so that on a staggered array sites are neighbours as they are for the
    model; spots on one position are all in.
    """
    rows, cols = compact(*spot_positions(adata), "lattice")
    radius = min(radius, int(max(rows.max(), cols.max())))  # further there is nothing
    grid = np.full((rows.max() + 1 + 2 * radius, cols.max() + 1 + 2 * radius), -1, dtype=np.int64)
    sites, site_of_spot = np.unique(np.stack([rows, cols], axis=1), axis=0, return_inverse=True)
    site_of_spot = site_of_spot.reshape(-1)
    grid[sites[:, 0] + radius, sites[:, 1] + radius] = np.arange(len(sites))
    pairs = []
    for down in range(2 * radius + 1):
        for right in range(2 * radius + 1):
            neighbour = grid[sites[:, 0] + down, sites[:, 1] + right]
            here = np.flatnonzero(neighbour >= 0)
            pairs.append(np.stack([here, neighbour[here]]))
    one, other = np.concatenate(pairs, axis=1)
    of_sites = sp.csr_matrix((np.ones(len(one)), (one, other)), shape=(len(sites), len(sites)))
    stands = sp.csr_matrix((np.ones(len(rows)), (np.arange(len(rows)), site_of_spot)), shape=(len(rows), len(sites)))
    return (stands @ of_sites @ stands.T).tocsr()


def majority(squares: sp.csr_matrix, domains: np.ndarray) -> np.ndarray:
    """int64 (n,): the domain that most spots in each spot's square have; its own, then the lowest, among equals."""
    number = int(domains.max()) + 1
    own = sp.csr_matrix((np.ones(len(domains)), (np.arange(len(domains)), domains)), shape=(len(domains), number))
    votes = (squares @ own).toarray()
    votes[np.arange(len(domains)), domains] += 0.5
    return votes.argmax(axis=1)
