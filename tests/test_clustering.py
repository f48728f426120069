import random

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from eval.clustering import CLUSTERINGS


def _blobs(num_spots=120, distance=6.0, seed=0):
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, num_spots)
    return (rng.normal(size=(4, 8))[kind] * distance + rng.normal(size=(num_spots, 8))).astype(np.float32), kind


every_clustering = pytest.mark.parametrize("name", CLUSTERINGS)


@every_clustering
def test_separate_groups_are_found(name):
    features, kind = _blobs()
    clusters = CLUSTERINGS[name](features, 4, 0)
    assert clusters.dtype == np.int64
    assert clusters.max() == 3
    assert adjusted_rand_score(kind, clusters) == 1


@every_clustering
@pytest.mark.parametrize("number", [2, 5, 9])
def test_as_many_clusters_as_asked_for(name, number):
    features = np.random.default_rng(0).normal(size=(150, 6)).astype(np.float32)  # one cloud: the number is imposed
    found = len(np.unique(CLUSTERINGS[name](features, number, 0)))
    # Communities merge and part several at a time: not every number has a resolution.
    assert found == number if name == "k-means" else abs(found - number) <= 1


@every_clustering
def test_the_seed_decides_and_global_randomness_is_left_alone(name):
    features, _ = _blobs(distance=0.5)
    random.seed(1)
    first = CLUSTERINGS[name](features, 5, 3)
    left = random.random()
    np.testing.assert_array_equal(first, CLUSTERINGS[name](features, 5, 3))
    random.seed(1)
    assert random.random() == left


@every_clustering
def test_fewer_spots_than_clusters_are_refused(name):
    with pytest.raises(ValueError, match="3 spots and 4 clusters"):
        CLUSTERINGS[name](np.zeros((3, 2), np.float32), 4, 0)
