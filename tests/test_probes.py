import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from data_processing.splits import spot_splits
from eval.linear_probe import logistic_regression
from eval.probes import HIDDEN_SIZES, PROBES, _generator, init_mlp, mlp_probe, score, train_mlp


def _blobs(num_spots=90, num_features=12, distance=2.0, seed=0):
    """Three Gaussian classes, numbered 2, 5, 9."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, num_spots)
    centres = rng.normal(size=(3, num_features)) * distance
    features = centres[kind] + rng.normal(size=(num_spots, num_features))
    return features.astype(np.float32), np.array([2, 5, 9])[kind]


def _probe(name):
    """The probe, its training shortened to what these small problems need."""
    return (lambda *arguments: mlp_probe(*arguments, epochs=15)) if name == "mlp" else PROBES[name]


every_probe = pytest.mark.parametrize("name", PROBES)


@every_probe
def test_probes_learn_separable_classes_and_repeat_themselves(name):
    features, labels = _blobs()
    splits = spot_splits(labels, num_splits=3, train_share=0.5)
    predictions = _probe(name)(features, labels, splits, 0)
    assert score(labels, predictions, splits)["accuracy"][0] > 0.9
    for predicted, again, (_, test) in zip(predictions, _probe(name)(features, labels, splits, 0), splits, strict=True):
        assert predicted.dtype == np.int64
        assert predicted.shape == test.shape
        np.testing.assert_array_equal(predicted, again)


@every_probe
def test_probes_find_nothing_in_noise(name):
    _, labels = _blobs()
    noise = np.random.default_rng(1).normal(size=(90, 12))
    splits = spot_splits(labels, num_splits=3)
    assert abs(score(labels, _probe(name)(noise, labels, splits, 0), splits)["ari"][0]) < 0.15


@every_probe
def test_unlabelled_spots_do_not_matter(name):
    features, labels = _blobs(distance=0.5)
    splits = spot_splits(labels, num_splits=2)
    expected = _probe(name)(features, labels, splits, 0)
    with_others = np.concatenate([features, np.full((5, 12), 1e4, dtype=np.float32)])
    predictions = _probe(name)(with_others, np.append(labels, [-1] * 5), splits, 0)
    for predicted, wanted in zip(predictions, expected, strict=True):
        np.testing.assert_array_equal(predicted, wanted)


@every_probe
def test_a_test_spot_does_not_influence_another(name):
    features, labels = _blobs(distance=0.5)
    (split,) = spot_splits(labels, num_splits=1)
    (before,) = _probe(name)(features, labels, [split], 0)
    features[split[1][0]] *= 1e3
    (after,) = _probe(name)(features, labels, [split], 0)
    np.testing.assert_array_equal(before[1:], after[1:])


@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_trained_probes_do_not_depend_on_the_features_scale(name):
    features, labels = _blobs()
    splits = spot_splits(labels, num_splits=2)
    scale = 10.0 ** (np.arange(12) % 7 - 3)
    expected = _probe(name)(features, labels, splits, 0)
    for predicted, wanted in zip(_probe(name)(features * scale, labels, splits, 0), expected, strict=True):
        np.testing.assert_array_equal(predicted, wanted)


@every_probe
def test_a_training_side_with_one_class_predicts_it(name):
    features, labels = _blobs()
    split = (np.flatnonzero(labels == 5), np.flatnonzero(labels != 5))
    (predicted,) = _probe(name)(features, labels, [split], 0)
    assert set(predicted) == {5}


def test_knn_is_the_vote_of_the_ten_nearest():
    features, labels = _blobs(distance=0.5)
    splits = spot_splits(labels, num_splits=2, train_share=0.5)
    for predicted, (train, test) in zip(PROBES["knn"](features, labels, splits, 0), splits, strict=True):
        for spot, vote in zip(test, predicted, strict=True):
            nearest = train[np.argsort(((features[train] - features[spot]) ** 2).sum(axis=1))[:10]]
            counts = Counter(labels[nearest].tolist())
            assert vote == min(counts, key=lambda label: (-counts[label], label))


def test_knn_with_few_training_spots_asks_all_of_them():
    features, labels = _blobs(num_spots=30)
    split = (np.flatnonzero(labels == 2)[:2], np.flatnonzero(labels == 9))
    (predicted,) = PROBES["knn"](features, labels, [split], 0)
    assert set(predicted) == {2}


@pytest.mark.parametrize(("width", "seed"), [(3, 0), (40, 1), (200, 2)])
def test_knn_is_that_of_scikit_learn(width, seed):
    features, labels = _blobs(num_spots=300, num_features=width, distance=0.3, seed=seed)
    splits = spot_splits(labels, num_splits=3, seed=seed)
    for predicted, (train, test) in zip(PROBES["knn"](features, labels, splits, 0), splits, strict=True):
        knn = KNeighborsClassifier(n_neighbors=10).fit(features[train], labels[train])
        np.testing.assert_array_equal(predicted, knn.predict(features[test]))


def test_knn_takes_the_first_of_equally_distant_spots():
    """On a grid many distances are equal: the first in the split's order vote, and the lowest class wins a tie."""
    points = np.stack(np.divmod(np.arange(64), 8), axis=1).astype(np.float32)
    labels = np.random.default_rng(0).integers(0, 3, 64)
    splits = spot_splits(labels, num_splits=4, train_share=0.6)
    for predicted, (train, test) in zip(PROBES["knn"](points, labels, splits, 0), splits, strict=True):
        for spot, vote in zip(test, predicted, strict=True):
            distances = ((points[train] - points[spot]) ** 2).sum(axis=1)
            counts = Counter(labels[train[np.argsort(distances, kind="stable")[:10]]].tolist())
            assert vote == min(counts, key=lambda label: (-counts[label], label))


def _loss(inputs, targets, weights, intercepts):
    """What scikit-learn minimises with C = 1, for a weight matrix (d, classes)."""
    log_p = log_softmax(inputs @ weights + intercepts, axis=1)
    difference = weights[:, 1] - weights[:, 0]
    penalty = (difference**2).sum() if weights.shape[1] == 2 else (weights**2).sum()
    return -log_p[np.arange(len(targets)), targets].sum() + penalty / 2


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize(("num_spots", "width"), [(150, 12), (40, 90), (60, 60)])
def test_logistic_regression_reaches_the_optimum_of_scikit_learn(num_classes, num_spots, width):
    rng = np.random.default_rng(num_spots)
    targets = np.concatenate([np.arange(num_classes), rng.integers(0, num_classes, num_spots - num_classes)])
    inputs = 0.4 * rng.normal(size=(num_classes, width))[targets] + rng.normal(size=(num_spots, width))
    inputs[:, -1] = inputs[:, 0]  # collinear, as smoothed features are
    inputs = (inputs - inputs.mean(0)) / inputs.std(0)
    reference = LogisticRegression(max_iter=10000, tol=1e-10).fit(inputs, targets)
    coef, intercept = reference.coef_, reference.intercept_
    if num_classes == 2:  # one vector, for the second class
        coef, intercept = np.concatenate([-coef, coef]) / 2, np.concatenate([-intercept, intercept]) / 2
    optimum = _loss(inputs, targets, coef.T, intercept)
    weights, intercepts = logistic_regression(inputs, targets)
    assert optimum <= _loss(inputs, targets, weights, intercepts) + 1e-9
    assert _loss(inputs, targets, weights, intercepts) < optimum * (1 + 1e-3)
    weights, intercepts = logistic_regression(inputs, targets, tolerance=1e-5)
    assert _loss(inputs, targets, weights, intercepts) == pytest.approx(optimum, rel=1e-7)
    new = rng.normal(size=(500, width))
    agree = (new @ weights + intercepts).argmax(1) == reference.predict(new)
    assert agree.mean() > 0.99


def test_linear_probe_is_scikit_learn_on_standardised_features():
    features, labels = _blobs(num_spots=200, distance=0.4)
    splits = spot_splits(labels, num_splits=3)
    for predicted, (train, test) in zip(PROBES["linear"](features, labels, splits, 0), splits, strict=True):
        reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000, tol=1e-8))
        expected = reference.fit(features[train].astype(float), labels[train]).predict(features[test].astype(float))
        assert (predicted == expected).mean() > 0.99


def _training_data(num_spots=40, num_features=6):
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.normal(size=(num_spots, num_features)).astype(np.float32))
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def test_the_network_equals_a_plain_sequential_trained_by_adam():
    inputs, targets = _training_data()
    trained = train_mlp(inputs, targets, 3, _generator(7, 1), epochs=4)
    generator = _generator(7, 1)
    sizes = (6, *HIDDEN_SIZES, 3)
    _, start = init_mlp(sizes, generator)
    linears = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    with torch.no_grad():
        for layer, linear in enumerate(linears):
            linear.weight.copy_(start[2 * layer].T)
            linear.bias.copy_(start[2 * layer + 1])
    network = torch.nn.Sequential(*[part for linear in linears for part in (linear, torch.nn.ReLU())][:-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    for _ in range(4):
        for batch in torch.randperm(40, generator=generator).split(32):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(inputs[batch]), targets[batch]).backward()
            optimizer.step()
    for layer, linear in enumerate(linears):
        torch.testing.assert_close(trained[2 * layer].T, linear.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(trained[2 * layer + 1], linear.bias.detach(), rtol=1e-4, atol=1e-5)


def test_the_network_starts_as_torch_linear_does():
    flat, (weights, biases) = init_mlp((400, 300), _generator(0, 0))
    assert weights.shape == (400, 300)
    assert biases.shape == (300,)
    assert flat.shape == (401 * 300,)
    for values in (weights, biases):  # uniform within 1 / sqrt(fan in)
        assert 0.99 / 20 < values.abs().max() <= 1 / 20
        assert abs(values.std() - 1 / 20 / 3**0.5) < 0.002
    assert not torch.equal(flat, init_mlp((400, 300), _generator(0, 1))[0])


@every_probe
def test_the_number_of_threads_changes_no_prediction(name):
    features, labels = _blobs(distance=0.3)
    splits = spot_splits(labels, num_splits=3)
    before = torch.get_num_threads()
    predictions = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            predictions.append(_probe(name)(features, labels, splits, 0))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*predictions, strict=True):
        np.testing.assert_array_equal(one, two)


def test_mlp_of_a_split_does_not_depend_on_the_other_splits():
    features, labels = _blobs(distance=0.4)
    a, b, c = spot_splits(labels, num_splits=3)
    longer = spot_splits(labels, num_splits=1, train_share=0.5)[0]
    mixed = mlp_probe(features, labels, [longer, b, longer], 3, epochs=5)
    equal = mlp_probe(features, labels, [a, b, c], 3, epochs=5)
    np.testing.assert_array_equal(mixed[1], equal[1])
    assert [len(predicted) for predicted in mixed] == [45, 72, 45]  # unequal sizes come back in order
    assert not np.array_equal(mixed[0], mixed[2])  # the same spots, another start


def test_mlp_depends_on_the_seed_and_leaves_global_randomness_alone():
    features, labels = _blobs(distance=0.2)
    splits = spot_splits(labels, num_splits=1)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - it is looked at
    (one,), (other,) = (mlp_probe(features, labels, splits, seed, epochs=2) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002
    assert not np.array_equal(one, other)


def test_mlp_solves_what_a_linear_probe_cannot():
    points = np.random.default_rng(0).uniform(-1, 1, size=(200, 2)).astype(np.float32)
    labels = (points[:, 0] * points[:, 1] > 0).astype(np.int64)
    splits = spot_splits(labels, num_splits=2, train_share=0.5)
    mlp = score(labels, mlp_probe(points, labels, splits, 0, epochs=60), splits)["accuracy"][0]
    linear = score(labels, PROBES["linear"](points, labels, splits, 0), splits)["accuracy"][0]
    assert mlp > 0.9 > 0.7 > linear


def test_score_by_hand():
    labels = np.array([0, 0, 1, 1, 0, -1])
    splits = [(np.array([4]), np.array([0, 1, 2, 3])), (np.array([4]), np.array([3, 2, 1, 0]))]
    scores = score(labels, [np.array([0, 0, 1, 1]), np.array([1, 1, 1, 1])], splits)
    assert scores["accuracy"] == pytest.approx((0.75, 0.25))
    assert scores["ari"] == pytest.approx((0.5, 0.5))
    assert scores["macro_f1"] == pytest.approx(((1 + 1 / 3) / 2, (1 - 1 / 3) / 2))
    with pytest.raises(ValueError, match="1 predictions for 2 splits"):
        score(labels, [np.zeros(4)], splits)


@every_probe
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": np.zeros((5, 2))}, r"expected \(n, d\) and \(n,\)"),
        ({"features": np.full((6, 2), np.nan)}, "NaN or infinite"),
        ({"labels": np.array(list("aabbaa"), dtype=object)}, "encode_labels"),
        ({"splits": []}, "no splits"),
        ({"splits": [([0, 1], [])]}, "0 test spots"),
        ({"splits": [([0, 2], [3, 6])]}, r"outside 0 \.\.\. 5"),
        ({"splits": [([0, 2], [2, 3])]}, "tests on spots that it trains on"),
        ({"splits": [([0, 2], [3, 5])]}, "unlabelled"),
    ],
)
def test_bad_input_is_refused(name, change, message):
    arguments = {
        "features": np.zeros((6, 2)),
        "labels": np.array([0, 0, 1, 1, 0, -1]),
        "splits": [([0, 2], [1, 3])],
    } | change
    arguments["splits"] = [tuple(np.array(side, dtype=np.int64) for side in split) for split in arguments["splits"]]
    with pytest.raises(ValueError, match=message):
        PROBES[name](**arguments, seed=0)


def test_mlp_needs_an_epoch():
    features, labels = _blobs()
    with pytest.raises(ValueError, match="epochs is 0"):
        mlp_probe(features, labels, spot_splits(labels), 0, epochs=0)
