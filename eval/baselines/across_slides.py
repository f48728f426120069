"""Expression of several slides in common terms, for probes that are trained on some slides and tested on another.

Counts are restricted to the genes that all slides have before depth is taken out: a slide with 500 chosen genes and one
with 8,000 would otherwise be normalised by different totals. Genes and components are chosen on the training slides.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from sklearn.decomposition import PCA
from sklearn.utils.sparsefuncs import mean_variance_axis

from eval.baselines.expression import NUM_GENES, NUM_PCA_GENES, log1p_cp10k


def shared_counts(slides: Sequence[AnnData]) -> list[sp.csr_matrix]:
    """Raw counts (n, genes) of every slide over the genes that all of them have, sorted by name.

    Two columns of one name are summed.

    Raises:
        ValueError: not a single gene in common.
    """
    genes = sorted(set.intersection(*(set(map(str, slide.var_names)) for slide in slides)))
    if not genes:
        names = " and ".join(repr(str(slide.var_names[0])) for slide in slides[:2])
        raise ValueError(f"The slides have no gene in common (the first are {names}): name genes alike on all of them.")
    place = {gene: number for number, gene in enumerate(genes)}
    restricted = []
    for slide in slides:
        columns = [(column, place[str(name)]) for column, name in enumerate(slide.var_names) if str(name) in place]
        sources, targets = np.array(columns, dtype=np.int64).T
        ones = np.ones(len(columns), dtype=np.float64)
        selection = sp.csr_matrix((ones, (sources, targets)), shape=(slide.n_vars, len(genes)))
        restricted.append(sp.csr_matrix(slide.X, dtype=np.float64) @ selection)
    return restricted


def shared_expression(training: Sequence[AnnData], test: AnnData, num_genes: int = NUM_GENES) -> list[np.ndarray]:
    """log1p values of the shared genes that vary most over the spots of the training slides.

    Returns
    -------
    float32 (n, num_genes) of every training slide, then of the test slide; fewer genes where fewer are shared. The most
    variable gene first, ties by name.
    """
    values = [log1p_cp10k(counts) for counts in shared_counts([*training, test])]
    _, variance = mean_variance_axis(sp.vstack(values[:-1], format="csr").astype(np.float64), axis=0)
    genes = np.argsort(-variance, kind="stable")[:num_genes]
    return [slide[:, genes].toarray() for slide in values]


def shared_components(
    training: Sequence[AnnData], test: AnnData, num_components: int = 50, seed: int = 0
) -> list[np.ndarray]:
    """Principal components of the training slides' 2,000 most variable shared genes.

    Returns
    -------
    float32 (n, components) of every training slide, then of the test slide.
    """
    expression = [values.astype(np.float64) for values in shared_expression(training, test, NUM_PCA_GENES)]
    stacked = np.concatenate(expression[:-1])
    num_components = min(num_components, len(stacked) - 1, stacked.shape[1])
    pca = PCA(num_components, random_state=seed).fit(stacked)
    return [pca.transform(values).astype(np.float32) for values in expression]
