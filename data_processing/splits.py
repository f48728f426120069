"""Which spots a probe is trained on and which it is tested on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from anndata import AnnData

Split = tuple[np.ndarray, np.ndarray]
# How tables write a missing value (pandas' list); a column that was made text keeps them as if they were names.
MISSING_NAMES = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-NaN", "-nan", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
MAX_DRAWS = 1000  # until a training side has two classes


def slide_labels(adata: AnnData, label_key: str = "label", unlabelled: Sequence[str] = ("undetermined",)) -> np.ndarray:
    """The annotated class of every spot of a slide.

    Parameters
    ----------
    adata
        A slide whose `obs` holds the annotation.
    label_key
        Column of `obs`.
    unlabelled
        Values of that column that are no class; missing values, empty strings and what tables write for them
        (`MISSING_NAMES`) never are.

    Returns
    -------
    Object array (n_obs,) of str, None where the spot has no class. Blanks around a name are no part of it, and whole
    numbers are the same class whether a column holds them as integers or, because others are missing, as floats.
    """
    if label_key not in adata.obs:
        raise ValueError(f"obs has no column {label_key!r}; it has {list(adata.obs.columns)}: name one as label_key")
    no_class = {*MISSING_NAMES, *unlabelled}
    values = adata.obs[label_key].astype(object)
    names = [None if pd.isna(value) else _class_name(value) for value in values]
    return np.array([None if name in no_class else name for name in names], dtype=object)


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
    labelled, num_classes = _enough(labels, num_splits, train_share)
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


def block_splits(
    labels: np.ndarray,
    rows: np.ndarray,
    cols: np.ndarray,
    num_splits: int = 10,
    train_share: float = 0.2,
    seed: int = 0,
    side: int = 6,
    min_train_spots: int = 10,
) -> list[Split]:
    """Random splits of one slide's tiles, so that most test spots have no training spot beside them.

    Tiles are squares of the compact grid, counted from its upper left corner; those without a labelled spot are left
    out. A share of the tiles is drawn to train on, all others are tested on, so the number of training spots differs
    between splits. A draw with fewer than two classes or `min_train_spots` spots in training is replaced by the split's
    next draw. A class that is in no training tile is kept in the test: its spots count as errors. Split `i`
    depends on `(seed, i)`, the labelled spots and their tiles only.

    Parameters
    ----------
    labels
        (n,) one class per spot, as in `spot_splits`.
    rows, cols
        int (n,), each spot's site on the compact grid.
    num_splits, train_share, seed
        As in `spot_splits`; the share is that of tiles, rounded, at least one.
    side
        Sites along a tile's side.
    min_train_spots
        Labelled spots that the tiles to train on must hold together.

    Returns
    -------
    `num_splits` pairs of sorted int64 indices into `labels`: training spots, test spots.

    Raises
    ------
    ValueError
        With fewer than two classes or two tiles, or where no draw of tiles has two classes and enough spots.
    """
    labelled, _ = _enough(labels, num_splits, train_share)
    if side < 1:
        raise ValueError(f"side is {side}: give the sites along a tile's side, at least 1")
    tile_rows, tile_cols = (np.asarray(axis)[labelled] // side for axis in (rows, cols))
    tiles, tile_of_spot = np.unique(np.stack([tile_rows, tile_cols]), axis=1, return_inverse=True)
    num_tiles, tile_of_spot = tiles.shape[1], tile_of_spot.reshape(-1)
    if num_tiles < 2:
        raise ValueError(
            f"the {len(labelled)} labelled spots lie in one tile of {side} x {side} sites: a blocked split needs 2, "
            "so make the tiles smaller or leave this split out"
        )
    num_train = min(max(round(train_share * num_tiles), 1), num_tiles - 1)
    classes = np.asarray(labels, dtype=object)[labelled]
    splits = []
    for split_index in range(num_splits):
        rng = np.random.default_rng([seed, split_index])
        for _ in range(MAX_DRAWS):
            train = np.isin(tile_of_spot, rng.permutation(num_tiles)[:num_train])
            if train.sum() >= min_train_spots and len(set(classes[train])) >= 2:
                break
        else:
            raise ValueError(
                f"{MAX_DRAWS} draws of {num_train} from {num_tiles} tiles of {side} x {side} sites never held two "
                f"classes and {min_train_spots} spots: raise train_share, or make the tiles smaller"
            )
        splits.append((labelled[train], labelled[~train]))
    return splits


@dataclass(frozen=True)
class Transfer:
    """Which slides train a probe that is tested on another.

    Attributes:
        test: the slide to test on. training: the slides to train on, in the order of the set.
        trained_on: "other patients", or "other sections" where there is no other patient's slide.
        left_out: sections that share spots with the tested one and therefore do not train.
    """

    test: str
    training: tuple[str, ...]
    trained_on: str
    left_out: tuple[str, ...] = ()


def transfers(patients: Mapping[str, str], same_spots: Collection[frozenset[str]] = ()) -> list[Transfer]:
    """Every slide of a set once as the test, with all slides of other patients to train on.

    Where no slide is another patient's for certain (an unknown patient could be anybody), all other sections train,
    without those that share spots with the tested one. Nothing is drawn.

    Parameters
    ----------
    patients
        Patient by slide, "" where not known.
    same_spots
        Pairs of slides that hold the same spots in part.

    Returns
    -------
    One `Transfer` a slide, in the order of `patients`; a slide that nothing is left for is missing.
    """
    chosen = []
    for test, patient in patients.items():
        others = [name for name in patients if name != test]
        training = [name for name in others if patient and patients[name] not in ("", patient)]
        trained_on = "other patients" if training else "other sections"
        candidates = training or others
        training = [name for name in candidates if frozenset((name, test)) not in same_spots]
        left_out = tuple(name for name in candidates if name not in training)
        if training:
            chosen.append(Transfer(test, tuple(training), trained_on, left_out))
    return chosen


def transfer_splits(
    training: np.ndarray, test: np.ndarray, num_splits: int = 10, max_train_spots: int = 1000, seed: int = 0
) -> tuple[list[Split], dict[str, dict[str, int]]]:
    """Splits that train on some slides and test on another one.

    Only classes that both sides have are used. Every split tests on all such spots of the test slide and trains on as
    many of the training slides' as `max_train_spots` allows, drawn anew; where all fit, the splits are all the same
    and only a probe that draws its start differs between them.

    Parameters
    ----------
    training, test
        One class per spot, None where unlabelled: of all training slides one after the other, and of the test slide.
    num_splits, max_train_spots, seed
        Split `i` depends on `(seed, i)` and the labels only.

    Returns
    -------
    splits
        Pairs of sorted int64 indices into the training slides' spots followed by the test slide's.
    dropped
        {"training": {class: spots}, "test": {class: spots}}: the classes that the other side has not.

    Raises
    ------
    ValueError
        Fewer than two classes in common.
    """
    if num_splits < 1 or max_train_spots < 2:
        raise ValueError(f"num_splits is {num_splits}, max_train_spots {max_train_spots}: ask for at least 1 and 2")
    sides = {"training": np.asarray(training, dtype=object), "test": np.asarray(test, dtype=object)}
    counts = {side: Counter(labels[_labelled(labels)].tolist()) for side, labels in sides.items()}
    shared = counts["training"].keys() & counts["test"].keys()
    if len(shared) < 2:
        raise ValueError(
            f"the training slides have the classes {sorted(counts['training'])} and the test slide has "
            f"{sorted(counts['test'])}: {len(shared)} in common, a probe needs 2"
        )
    dropped = {side: {c: n for c, n in sorted(count.items()) if c not in shared} for side, count in counts.items()}
    usable = {side: np.flatnonzero([label in shared for label in labels]) for side, labels in sides.items()}
    tested = usable["test"] + len(training)
    splits = []
    for split_index in range(num_splits):
        rng = np.random.default_rng([seed, split_index])
        for _ in range(MAX_DRAWS):
            drawn = np.sort(rng.permutation(usable["training"])[:max_train_spots])
            if len(set(sides["training"][drawn])) >= 2:
                break
        splits.append((drawn, tested))
    return splits, dropped


def _class_name(value: object) -> str:
    """`2.0` -> `"2"`, `" tumour "` -> `"tumour"`."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        value = int(value)
    return str(value).strip()


def _enough(labels: np.ndarray, num_splits: int, train_share: float) -> tuple[np.ndarray, int]:
    """int64 indices of the labelled spots and the number of their classes, or a ValueError that says what is wrong."""
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
    return labelled, num_classes


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
