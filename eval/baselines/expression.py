"""Features without any learning across slides: expression, its neighbourhood means, its principal components.

A plain neighbourhood mean is a strong baseline under random splits of one slide's spots, and so are bare coordinates;
a table without them says little about a model.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.neighbors import radius_neighbors_graph
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.sparsefuncs import mean_variance_axis

TARGET_SUM = 1e4
NUM_GENES = 512
NUM_PCA_GENES = 2000


def log1p_cp10k(counts: sp.csr_matrix | sp.csr_array) -> sp.csr_matrix:
    """log(1 + counts per 10,000 of the spot's total).

    Parameters
    ----------
    counts
        (n, genes) raw counts, left as they are.

    Returns
    -------
    float32 CSR (n, genes); a spot without counts stays zero.
    """
    values = sp.csr_matrix(counts, dtype=np.float64, copy=True)
    values.sum_duplicates()
    if values.nnz and not (np.isfinite(values.data).all() and values.data.min() >= 0):
        raise ValueError(f"counts hold negative or non-finite values (minimum {values.data.min()}): pass raw counts")
    totals = np.asarray(values.sum(axis=1)).ravel()
    scale = np.divide(TARGET_SUM, totals, out=np.zeros_like(totals), where=totals > 0)
    values.data = np.log1p(values.data * np.repeat(scale, np.diff(values.indptr)))
    return values.astype(np.float32)


def raw_expression(counts: sp.csr_matrix | sp.csr_array, num_genes: int = NUM_GENES) -> np.ndarray:
    """log1p values of the slide's most variable genes.

    Parameters
    ----------
    counts
        (n, genes) raw counts.
    num_genes
        How many genes; all of them if the slide has fewer.

    Returns
    -------
    float32 (n, num_genes), most variable gene first; variance over the spots in float64, ties by gene order.
    """
    if num_genes < 1:
        raise ValueError(f"num_genes is {num_genes}: ask for at least 1")
    values = log1p_cp10k(counts)
    _, variance = mean_variance_axis(values.astype(np.float64), axis=0)
    genes = np.argsort(-variance, kind="stable")[:num_genes]
    return values[:, genes].toarray()


def neighbourhood_mean(features: np.ndarray, rows: np.ndarray, cols: np.ndarray, radius: int) -> np.ndarray:
    """Mean over the observed spots in the square of sites around each spot, the spot itself included.

    Parameters
    ----------
    features
        float (n, d).
    rows, cols
        int (n,), each spot's site on the compact grid. Spots that share a site all count.
    radius
        Sites to each side: 1 averages over 3 x 3 sites, 2 over 5 x 5. Empty sites do not count.

    Returns
    -------
    float32 (n, d).
    """
    features = np.asarray(features)
    if radius < 0:
        raise ValueError(f"radius is {radius}: give 0 or more sites")
    if features.ndim != 2 or not len(features) == len(rows) == len(cols):
        raise ValueError(f"features {features.shape} with {len(rows)} rows and {len(cols)} columns: need one per spot")
    sites = np.column_stack([rows, cols])
    graph = radius_neighbors_graph(sites, radius, mode="connectivity", metric="chebyshev", include_self=True)
    num_neighbours = np.diff(graph.indptr)[:, None]
    return (graph @ features.astype(np.float64) / num_neighbours).astype(np.float32)


def principal_components(counts: sp.csr_matrix | sp.csr_array, num_components: int = 50, seed: int = 0) -> np.ndarray:
    """Centred principal components of the log1p values of the 2,000 most variable genes.

    Parameters
    ----------
    counts
        (n, genes) raw counts, n >= 2.
    num_components
        At most this many; no more than n - 1 or the number of genes.
    seed
        Of scikit-learn's randomised solver, which it takes for large slides. Same input and seed, same result.

    Returns
    -------
    float32 (n, components).
    """
    expression = raw_expression(counts, NUM_PCA_GENES)
    num_components = min(num_components, len(expression) - 1, expression.shape[1])
    if num_components < 1:
        raise ValueError(f"no principal components of expression {expression.shape}: need 2 spots and 1 gene or more")
    pca = PCA(num_components, random_state=seed)
    return pca.fit_transform(expression.astype(np.float64)).astype(np.float32)


def coordinates_only(rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    """float32 (n, 2): a spot's grid row and column, each stretched to [0, 100]; 0 on an axis of one level."""
    sites = np.column_stack([rows, cols]).astype(np.float64)
    return MinMaxScaler(feature_range=(0, 100)).fit_transform(sites).astype(np.float32)
