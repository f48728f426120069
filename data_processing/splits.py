"""Which spots a probe is trained on and which it is tested on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData

Split = tuple[np.ndarray, np.ndarray]


def slide_labels(adata: AnnData, label_key: str = "label", unlabelled: Sequence[str] = ("undetermined",)) -> np.ndarray:
    """The annotated class of every spot of a slide.

    Parameters
    ----------
    adata
        A slide whose `obs` holds the annotation.
    label_key
        Column of `obs`.
    unlabelled
        Values of that column that are no class; missing values and empty strings never are.

    Returns
    -------
    Object array (n_obs,) of str, None where the spot has no class.
    """
    if label_key not in adata.obs:
        raise ValueError(f"obs has no column {label_key!r}; it has {list(adata.obs.columns)}: name one as label_key")
    no_class = {"", *unlabelled}
    values = adata.obs[label_key].astype(object)
    names = [None if pd.isna(value) or str(value) in no_class else str(value) for value in values]
    return np.array(names, dtype=object)


def encode_labels(labels: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Class numbers for the probes.

    Parameters
    ----------
    labels
        (n,) class names, None, NaN or "" where unlabelled.

    Returns
    -------
    codes
        int64 (n,), -1 where unlabelled.
    names
        The sorted class names; `names[code]` is the class.
    """
    labelled = _labelled(labels)
    names, codes_of_labelled = np.unique(np.asarray(labels, dtype=object)[labelled].astype(str), return_inverse=True)
    codes = np.full(len(labels), -1, dtype=np.int64)
    codes[labelled] = codes_of_labelled
    return codes, names.tolist()


def spot_splits(labels: np.ndarray, num_splits: int = 10, train_share: float = 0.2, seed: int = 0) -> list[Split]:
    """Random splits of one slide's labelled spots (arXiv 2603.13432: 20 % to train the probe, 80 % to test it).

    Plain random splits, as in the paper: not stratified and never redrawn, so a rare class may be absent from a
    training side and its test spots then count as errors. Split `i` depends on `(seed, i)` and the labelled spots
    only, not on `num_splits`.

    Parameters
    ----------
    labels
        (n,) one class per spot; None, NaN, "" and negative integers mark unlabelled spots.
    num_splits
        Number of splits.
    train_share
        Share of the labelled spots to train on, in (0, 1); the number is rounded.
    seed
        Non-negative.

    Returns
    -------
    `num_splits` pairs of sorted int64 indices into `labels`: training spots, test spots. All have the same sizes.

    Raises
    ------
    ValueError
        With fewer than two classes, or too few labelled spots to train on one per class and to test on any.
    """
    if num_splits < 1:
        raise ValueError(f"num_splits is {num_splits}: ask for at least 1")
    if not 0 < train_share < 1:
        raise ValueError(f"train_share is {train_share}: give a share between 0 and 1")
    labelled = np.flatnonzero(_labelled(labels))
    num_classes = len(set(np.asarray(labels, dtype=object)[labelled]))
    if num_classes < 2:
        raise ValueError(
            f"the {len(labelled)} labelled of {len(labels)} spots hold {num_classes} class(es), a probe needs at least "
            "2: check the label column"
        )
    num_train = round(train_share * len(labelled))
    if num_train < num_classes or num_train == len(labelled):
        raise ValueError(
            f"{len(labelled)} labelled spots give {num_train} to train on and {len(labelled) - num_train} to test on, "
            f"needed are at least {num_classes} (one per class) and 1: label more spots or change train_share"
        )
    splits = []
    for split_index in range(num_splits):
        order = np.random.default_rng([seed, split_index]).permutation(labelled)
        splits.append((np.sort(order[:num_train]), np.sort(order[num_train:])))
    return splits


def _labelled(labels: np.ndarray) -> np.ndarray:
    """bool (n,): True where a spot has a class."""
    values = np.asarray(labels)
    if values.ndim != 1:
        raise ValueError(f"labels have shape {values.shape}, expected one label per spot: (n,)")
    if values.dtype.kind == "i":
        return values >= 0
    labelled = ~pd.isna(values.astype(object))
    labelled[labelled] = values[labelled] != ""  # apart, because pandas.NA compares with nothing
    return labelled
