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
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from sklearn.preprocessing import StandardScaler
from torch.optim.adam import adam

from data_processing.splits import Split
from eval.linear_probe import logistic_regression
from eval.scoring import score
from eval.threads import in_threads

__all__ = ["PROBES", "Probe", "check_neighbours", "knn_probe", "linear_probe", "mlp_probe", "score"]

NUM_NEIGHBOURS = 10
BLOCK = 1024  # test spots at a time, whose distances to all training spots are in memory
HIDDEN_SIZES = (512, 256, 128)
BATCH_SIZE = 32
LEARNING_RATE = 1e-3


def knn_probe(features: np.ndarray, labels: np.ndarray, splits: Sequence[Split], seed: int) -> list[np.ndarray]:
    """Vote of the 10 nearest training spots, Euclidean, on the features as they are.

    Of training spots at the same distance the first in the split's order come first; of classes with as many votes the
    lowest number wins, as in scikit-learn. Fewer training spots than 10: all of them vote. Nothing is random; `seed` is
    there for the common call.
    """
    features, labels = _checked(features, labels, splits)
    precise = features.astype(np.float64)
    squares = (precise**2).sum(1)
    classes = np.unique(labels[labels >= 0])

    def vote(split: Split) -> np.ndarray:
        train, test = split
        onehot = (labels[train][:, None] == classes).astype(np.float32)  # (training, classes)
        predicted = np.empty(len(test), dtype=np.int64)
        neighbours = min(NUM_NEIGHBOURS, len(train))
        for start in range(0, len(test), BLOCK):
            block = test[start : start + BLOCK]
            distances = squares[train] - 2 * (precise[block] @ precise[train].T)  # (b, training), less a constant a row
            limit = np.partition(distances, neighbours - 1, axis=1)[:, neighbours - 1 : neighbours]
            near = distances <= limit
            for row in np.flatnonzero(near.sum(1) > neighbours):  # ties at the border
                tied = np.flatnonzero(distances[row] == limit[row])
                near[row, tied[neighbours - (distances[row] < limit[row]).sum() :]] = False
            predicted[start : start + BLOCK] = classes[(near.astype(np.float32) @ onehot).argmax(1)]
        return predicted

    return _once_each(vote, splits)


def linear_probe(features: np.ndarray, labels: np.ndarray, splits: Sequence[Split], seed: int) -> list[np.ndarray]:
    """Multinomial logistic regression (L2, C = 1) on features standardised with the training spots' statistics.

    A training side with a single class predicts that class. Nothing is random; `seed` is there for the common call.
    """
    features, labels = _checked(features, labels, splits)

    def fit_and_predict(split: Split) -> np.ndarray:
        train, test = split
        classes, targets = np.unique(labels[train], return_inverse=True)
        if len(classes) == 1:  # the optimum is at infinity; the other probes do just this
            return np.full(len(test), classes[0])
        scaler = StandardScaler().fit(features[train].astype(np.float64))
        weights, intercepts = logistic_regression(scaler.transform(features[train].astype(np.float64)), targets)
        return classes[(scaler.transform(features[test].astype(np.float64)) @ weights + intercepts).argmax(1)]

    return _once_each(fit_and_predict, splits)


def mlp_probe(
    features: np.ndarray, labels: np.ndarray, splits: Sequence[Split], seed: int, epochs: int = 800
) -> list[np.ndarray]:
    """The paper's probe (arXiv 2603.13432): hidden layers 512, 256, 128, ReLU, Adam 1e-3, batches of 32, 800 epochs.

    Features are standardised with the training spots' statistics. The initialisation and the batch order of split `i`
    depend on `(seed, i)`, and its classifier on no other split. The global random state is left alone.
    """
    features, labels = _checked(features, labels, splits)
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}: ask for at least 1")
    classes = np.unique(labels[labels >= 0])  # of all spots: the networks' shape must not depend on the other splits
    targets = np.searchsorted(classes, labels)

    def train_and_predict(split_index: int) -> np.ndarray:
        train, test = splits[split_index]
        scaler = StandardScaler().fit(features[train])
        inputs, known = (torch.from_numpy(array[train]) for array in (scaler.transform(features), targets))
        parameters = train_mlp(inputs, known, len(classes), _generator(seed, split_index), epochs)
        logits = mlp_forward(torch.from_numpy(scaler.transform(features[test])), parameters)[-1]
        return classes[logits.argmax(dim=-1).numpy()]

    return in_threads(train_and_predict, range(len(splits)))


Probe = Callable[[np.ndarray, np.ndarray, Sequence[Split], int], list[np.ndarray]]
PROBES: dict[str, Probe] = {"knn": knn_probe, "linear": linear_probe, "mlp": mlp_probe}


def check_neighbours(num_train: int, probes: Collection[str]) -> None:
    """ValueError where fewer spots train than the k-NN probe, if it is among the probes, has neighbours."""
    if "knn" in probes and num_train < NUM_NEIGHBOURS:
        raise ValueError(
            f"{num_train} spots train, fewer than the k-NN probe's {NUM_NEIGHBOURS} neighbours: raise train_share, or "
            "leave the slide or the probe out"
        )


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


def _once_each(predict: Callable[[Split], np.ndarray], splits: Sequence[Split]) -> list[np.ndarray]:
    """Predictions of every split, where the same split is asked for again the same ones."""
    keys = [(np.asarray(train).tobytes(), np.asarray(test).tobytes()) for train, test in splits]
    different = dict(zip(keys, splits, strict=True))
    predictions = dict(zip(different, in_threads(predict, list(different.values())), strict=True))
    return [predictions[key] for key in keys]


def init_mlp(sizes: Sequence[int], generator: torch.Generator) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """One float32 vector of all parameters, and its views: weights (in, out) and biases (out,), alternating.

    Distributed as torch.nn.Linear starts them.
    """
    shapes = [shape for num_in, num_out in itertools.pairwise(sizes) for shape in ((num_in, num_out), (num_out,))]
    flat = torch.empty(sum(math.prod(shape) for shape in shapes))
    views = parameter_views(flat, shapes)
    for position, view in enumerate(views):
        bound = 1 / math.sqrt(shapes[position - position % 2][0])
        view.copy_((torch.rand(view.shape, generator=generator) * 2 - 1) * bound)
    return flat, views


def parameter_views(flat: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[torch.Tensor]:
    """Consecutive parts of a vector in the given shapes."""
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def mlp_forward(inputs: torch.Tensor, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The inputs (B, d) and every layer's outputs, the last of them the logits (B, classes)."""
    outputs = [inputs]
    for layer in range(0, len(parameters), 2):
        # In two steps: addmm would first copy the bias to every row.
        outputs.append(torch.mm(outputs[-1], parameters[layer]).add_(parameters[layer + 1]))
        if layer < len(parameters) - 2:
            outputs[-1].relu_()
    return outputs


@torch.no_grad()
def train_mlp(
    inputs: torch.Tensor, targets: torch.Tensor, num_classes: int, generator: torch.Generator, epochs: int
) -> list[torch.Tensor]:
    """Train one network by Adam on its mean cross-entropy.

    One network at a time, because its parameters, moments and gradients then stay in a core's cache: they are read and
    written at every step. The gradient is written out for the same reason, into the one vector that Adam reads.

    Parameters
    ----------
    inputs
        float32 (n, d), standardised training features.
    targets
        int64 (n,).
    num_classes
        Width of the output.
    generator
        Draws the network's start and then its batch orders.
    epochs
        Passes over the n training spots; the last batch of a pass may be smaller.

    Returns
    -------
    Weights and biases as in `init_mlp`.
    """
    flat, parameters = init_mlp((inputs.shape[1], *HIDDEN_SIZES, num_classes), generator)
    gradient, mean, square = (torch.zeros_like(flat) for _ in range(3))
    gradients = parameter_views(gradient, [tuple(parameter.shape) for parameter in parameters])
    step = torch.zeros(())
    settings = {"lr": LEARNING_RATE, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    onehot = torch.nn.functional.one_hot(targets, num_classes).float()
    for _ in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for batch, wanted in zip(inputs[order].split(BATCH_SIZE), onehot[order].split(BATCH_SIZE), strict=True):
            outputs = mlp_forward(batch, parameters)
            error = outputs[-1].softmax(-1).sub_(wanted).div_(len(batch))  # d loss / d logits
            for layer in reversed(range(0, len(parameters), 2)):
                into = outputs[layer // 2]
                torch.mm(into.T, error, out=gradients[layer])
                torch.sum(error, 0, out=gradients[layer + 1])
                if layer:
                    # The gradient of a ReLU in one pass, without a mask in memory.
                    error = torch.ops.aten.threshold_backward(torch.mm(error, parameters[layer].T), into, 0)
            # Of torch.optim.Adam the function alone: the class takes a quarter of its time for bookkeeping.
            adam(
                [flat], [gradient], [mean], [square], [], [step], fused=True, **settings, amsgrad=False, maximize=False
            )
    return parameters
