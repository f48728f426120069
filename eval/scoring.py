"""How good predictions are: the numbers of the tables, as plain functions of arrays.

The modules of `eval/metrics/` wrap them for `evaluate.load`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score

from data_processing.splits import Split


def cluster_scores(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """{"ari"}: the adjusted Rand index, the agreement of two groupings of the same spots, whatever they are called.

    1 for the same grouping, 0 on average for groupings that have nothing to do with each other.
    """
    _check_lengths(predictions, references)
    return {"ari": float(adjusted_rand_score(references, predictions))}


def probe_scores(predictions: Sequence, references: Sequence) -> dict[str, float]:
    """{"accuracy", "ari", "macro_f1"} of predicted classes on test spots.

    Macro F1 is the mean over every class that is among the references or the predictions.
    """
    _check_lengths(predictions, references)
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        **cluster_scores(predictions, references),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
    }


def region_scores(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """{"mse", "mae", "pearson"} of predicted expression, float (spots, genes).

    Errors are means over all entries. Pearson's correlation is taken over spots for every gene and then averaged over
    the genes that vary among the references; a constant prediction of such a gene counts as 0. It is NaN where no gene
    varies.
    """
    predicted, true = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    if predicted.shape != true.shape or true.ndim != 2 or not true.size:
        raise ValueError(f"predictions {predicted.shape} and references {true.shape}: expected both (spots, genes)")
    error = predicted - true
    left, right = (values - values.mean(0) for values in (predicted, true))
    varies = (true != true[:1]).any(0)
    norms = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    correlation = np.divide((left * right).sum(0), norms, out=np.zeros(len(norms)), where=norms > 0)
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "pearson": float(correlation[varies].mean()) if varies.any() else float("nan"),
    }


def score(
    labels: np.ndarray, predictions: Sequence[np.ndarray], splits: Sequence[Split]
) -> dict[str, tuple[float, float]]:
    """Mean and deviation (over splits, ddof = 0) of accuracy, adjusted Rand index and macro F1 on the test spots.

    Parameters
    ----------
    labels
        int64 (n,), the true class numbers.
    predictions
        What a probe returned for `splits`.
    splits
        Pairs of training and test indices.

    Returns
    -------
    {"accuracy": (mean, sd), "ari": (mean, sd), "macro_f1": (mean, sd)}
    """
    if len(predictions) != len(splits) or not splits:
        raise ValueError(f"{len(predictions)} predictions for {len(splits)} splits: give one per split, at least one")
    labels = np.asarray(labels)
    met: dict[tuple[bytes, bytes], dict[str, float]] = {}  # splits may repeat, and so do their scores then
    scores = []
    for found, (_, test) in zip(predictions, splits, strict=True):
        key = (np.asarray(found).tobytes(), np.asarray(test).tobytes())
        if key not in met:
            met[key] = probe_scores(found, labels[test])
        scores.append(met[key])
    columns = {name: [one[name] for one in scores] for name in scores[0]}
    return {name: (float(np.mean(column)), float(np.std(column))) for name, column in columns.items()}


def named_clusters(clusters: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Clusters named after classes, one to one, so that the labelled spots agree with as many labels as they can.

    The assignment is the Hungarian algorithm's. Clusters that are left over, where there are more than classes, are
    called "cluster 1", "cluster 2", ...

    Parameters
    ----------
    clusters
        int (n,), from 0.
    labels
        int64 (n,), class numbers, -1 where unlabelled.
    classes
        Names of the classes.

    Returns
    -------
    object (n,), a name per spot.
    """
    num_clusters = int(clusters.max()) + 1
    shared = np.zeros((num_clusters, len(classes)), dtype=np.int64)
    labelled = labels >= 0
    np.add.at(shared, (clusters[labelled], labels[labelled]), 1)
    names = {c: classes[k] for c, k in zip(*linear_sum_assignment(-shared), strict=True)}
    left_over = (f"cluster {number}" for number in range(1, num_clusters + 1))
    return np.array([names.get(c) or next(left_over) for c in range(num_clusters)], dtype=object)[clusters]


def _check_lengths(predictions: Sequence, references: Sequence) -> None:
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references: give as many, at least one")
