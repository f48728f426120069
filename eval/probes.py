"""Probes on frozen features: how much of the annotation can be read off an embedding.

Every probe has the same call, `probe(features, labels, splits, seed)`:

- features: float (n, d), one row per spot;
- labels: int64 (n,), class numbers, negative where unlabelled; a split must not name such spots;
- splits: pairs of int64 indices, training spots and test spots (`data_processing.splits`). For a probe across slides,
  stack the slides' features and let a split train on one slide's rows and test on another's;
- seed: of the probe's own randomness; same input, same predictions.

It returns one int64 array per split: the predicted class of that split's test spots, in the split's order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_processing.splits import Split

NUM_NEIGHBOURS = 10
HIDDEN_SIZES = (512, 256, 128)
BATCH_SIZE = 32
LEARNING_RATE = 1e-3


def knn_probe(features: np.ndarray, labels: np.ndarray, splits: Sequence[Split], seed: int) -> list[np.ndarray]:
    """Vote of the 10 nearest training spots, Euclidean, on the features as they are.

    Fewer training spots than 10: all of them vote. Nothing is random; `seed` is there for the common call.
    """
    features, labels = _checked(features, labels, splits)
    predictions = []
    for train, test in splits:
        knn = KNeighborsClassifier(n_neighbors=min(NUM_NEIGHBOURS, len(train)))
        predictions.append(knn.fit(features[train], labels[train]).predict(features[test]))
    return predictions


def linear_probe(features: np.ndarray, labels: np.ndarray, splits: Sequence[Split], seed: int) -> list[np.ndarray]:
    """Multinomial logistic regression (L2, C = 1) on features standardised with the training spots' statistics.

    A training side with a single class predicts that class. Nothing is random; `seed` is there for the common call.
    """
    features, labels = _checked(features, labels, splits)
    predictions = []
    for train, test in splits:
        if len(np.unique(labels[train])) == 1:  # scikit-learn refuses it, the other probes do just this
            predictions.append(np.full(len(test), labels[train[0]]))
            continue
        regression = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
        predictions.append(regression.fit(features[train], labels[train]).predict(features[test]))
    return predictions


def mlp_probe(
    features: np.ndarray, labels: np.ndarray, splits: Sequence[Split], seed: int, epochs: int = 800
) -> list[np.ndarray]:
    """The paper's probe (arXiv 2603.13432): hidden layers 512, 256, 128, ReLU, Adam 1e-3, batches of 32, 800 epochs.

    Features are standardised with the training spots' statistics. Splits with equally many training spots are trained
    at once, as batched matrix products; split `i` gets the classifier it would have got alone, up to float
    rounding: its initialisation and batch order depend on `(seed, i)`. The global random state is left alone.
    """
    features, labels = _checked(features, labels, splits)
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}: ask for at least 1")
    classes = np.unique(labels[labels >= 0])  # of all spots: the networks' shape must not depend on the other splits
    targets = np.searchsorted(classes, labels)
    same_size: dict[int, list[int]] = {}
    for split_index, (train, _) in enumerate(splits):
        same_size.setdefault(len(train), []).append(split_index)
    predictions: dict[int, np.ndarray] = {}
    for members in same_size.values():
        scalers = [StandardScaler().fit(features[splits[i][0]]) for i in members]
        inputs = np.stack([s.transform(features[splits[i][0]]) for s, i in zip(scalers, members, strict=True)])
        parameters = _train_mlps(
            torch.from_numpy(inputs),
            torch.from_numpy(np.stack([targets[splits[i][0]] for i in members])),
            num_classes=len(classes),
            generators=[_generator(seed, i) for i in members],
            epochs=epochs,
        )
        for position, (scaler, i) in enumerate(zip(scalers, members, strict=True)):
            test_features = torch.from_numpy(scaler.transform(features[splits[i][1]]))
            logits = _mlp_forward(test_features[None], [p[position : position + 1] for p in parameters])[0]
            predictions[i] = classes[logits.argmax(dim=-1).numpy()]
    return [predictions[i] for i in range(len(splits))]


Probe = Callable[[np.ndarray, np.ndarray, Sequence[Split], int], list[np.ndarray]]
PROBES: dict[str, Probe] = {"knn": knn_probe, "linear": linear_probe, "mlp": mlp_probe}


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
    values: dict[str, list[float]] = {"accuracy": [], "ari": [], "macro_f1": []}
    for predicted, (_, test) in zip(predictions, splits, strict=True):
        values["accuracy"].append(accuracy_score(labels[test], predicted))
        values["ari"].append(adjusted_rand_score(labels[test], predicted))
        values["macro_f1"].append(f1_score(labels[test], predicted, average="macro"))
    return {name: (float(np.mean(column)), float(np.std(column))) for name, column in values.items()}


def _checked(features: np.ndarray, labels: np.ndarray, splits: Sequence[Split]) -> tuple[np.ndarray, np.ndarray]:
    """Features as float32 (n, d) and labels as int64 (n,), or a ValueError that says what is wrong."""
    features, labels = np.asarray(features, dtype=np.float32), np.asarray(labels)
    if features.ndim != 2 or labels.shape != (len(features),):
        raise ValueError(f"features {features.shape} and labels {labels.shape}: expected (n, d) and (n,)")
    if labels.dtype.kind not in "iu":
        raise ValueError(f"labels are {labels.dtype}, expected class numbers: see data_processing.splits.encode_labels")
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinite values: every spot needs an embedding")
    if not splits:
        raise ValueError("no splits: see data_processing.splits.spot_splits")
    for split_index, (train, test) in enumerate(splits):
        if not len(train) or not len(test):
            raise ValueError(f"split {split_index} has {len(train)} training and {len(test)} test spots: needs both")
        used = np.concatenate([train, test])
        if used.min() < 0 or used.max() >= len(labels):
            raise ValueError(f"split {split_index} names spots outside 0 ... {len(labels) - 1}")
        if np.intersect1d(train, test).size:
            raise ValueError(f"split {split_index} tests on spots that it trains on")
        if (labels[used] < 0).any():
            raise ValueError(f"split {split_index} names unlabelled spots (label < 0)")
    return features, labels.astype(np.int64)


def _generator(seed: int, split_index: int) -> torch.Generator:
    """The random stream of one split's network."""
    state = np.random.SeedSequence([seed, split_index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def _init_mlps(sizes: Sequence[int], generators: Sequence[torch.Generator]) -> list[torch.Tensor]:
    """Weights (R, in, out) and biases (R, 1, out), alternating; distributed as torch.nn.Linear starts them."""
    parameters = []
    for num_in, num_out in itertools.pairwise(sizes):
        bound = 1 / math.sqrt(num_in)
        for num_rows in (num_in, 1):
            drawn = [torch.rand(num_rows, num_out, generator=generator) for generator in generators]
            parameters.append((torch.stack(drawn) * 2 - 1) * bound)
    return parameters


def _mlp_forward(inputs: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Logits (R, B, classes) of R networks on their own inputs (R, B, d)."""
    hidden = inputs
    for layer in range(0, len(parameters), 2):
        if layer:
            hidden = torch.relu(hidden)
        hidden = torch.baddbmm(parameters[layer + 1], hidden, parameters[layer])
    return hidden


def _train_mlps(
    inputs: torch.Tensor,
    targets: torch.Tensor,
    num_classes: int,
    generators: Sequence[torch.Generator],
    epochs: int,
) -> list[torch.Tensor]:
    """Train R networks side by side, each as if alone.

    The loss is the sum of the networks' mean cross-entropies, so that no network's gradient depends on another, and
    Adam works entry by entry.

    Parameters
    ----------
    inputs
        float32 (R, n, d), the standardised training features of each split.
    targets
        int64 (R, n).
    num_classes
        Width of the output.
    generators
        R of them; each draws its network's start and then its batch orders.
    epochs
        Passes over the n training spots; the last batch of a pass may be smaller.

    Returns
    -------
    Weights and biases as in `_init_mlps`, detached.
    """
    num_splits, num_spots, width = inputs.shape
    parameters = _init_mlps((width, *HIDDEN_SIZES, num_classes), generators)
    for parameter in parameters:
        parameter.requires_grad_()
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)
    network = torch.arange(num_splits)[:, None]
    for _ in range(epochs):
        order = torch.stack([torch.randperm(num_spots, generator=generator) for generator in generators])  # (R, n)
        for batch in order.split(BATCH_SIZE, dim=1):
            logits = _mlp_forward(inputs[network, batch], parameters)  # (R, B, classes)
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), targets[network, batch].flatten(), reduction="sum"
            )
            optimizer.zero_grad()
            (loss / batch.shape[1]).backward()
            optimizer.step()
    return [parameter.detach() for parameter in parameters]
