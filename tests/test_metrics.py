"""The modules of `eval/metrics/` load without a network and say what the plain functions say."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score

from eval.scoring import cluster_scores, named_clusters, probe_scores, region_scores

METRICS = Path(__file__).parents[1] / "eval" / "metrics"


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    evaluate = pytest.importorskip("evaluate", reason="evaluate is not installed: pip install 'stimg[eval]'")
    folder = tmp_path_factory.mktemp("evaluate")

    def no_network(*arguments, **options):
        raise AssertionError("a connection was asked for")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", folder / "modules")
        patch.setattr("socket.socket.connect", no_network)
        yield lambda name: evaluate.load(str(METRICS / name), cache_dir=str(folder / "cache"))


@pytest.mark.parametrize(("name", "function"), [("ari", cluster_scores), ("probe_accuracy", probe_scores)])
def test_class_metrics_are_the_plain_functions(load, name, function):
    predictions, references = np.random.default_rng(0).integers(0, 3, (2, 50))
    computed = load(name).compute(predictions=predictions, references=references)
    assert computed == function(predictions, references)
    assert computed["ari"] == adjusted_rand_score(references, predictions)


def test_region_metric_is_the_plain_function(load):
    predictions, references = np.random.default_rng(0).normal(size=(2, 9, 4))
    computed = load("region_error").compute(predictions=predictions, references=references)
    assert computed == pytest.approx(region_scores(predictions, references), rel=1e-12)


def test_probe_scores_are_those_of_scikit_learn():
    predictions, references = np.random.default_rng(1).integers(0, 4, (2, 60))
    assert probe_scores(predictions, references) == {
        "accuracy": accuracy_score(references, predictions),
        "ari": adjusted_rand_score(references, predictions),
        "macro_f1": f1_score(references, predictions, average="macro"),
    }
    with pytest.raises(ValueError, match="3 predictions for 2 references"):
        probe_scores([1, 2, 3], [1, 2])


def test_region_scores_match_a_plain_loop():
    rng = np.random.default_rng(2)
    true = rng.normal(size=(12, 5))
    predicted = true + rng.normal(size=true.shape)
    true[:, 1] = 3.0  # does not vary: no correlation is asked of it
    predicted[:, 2] = 0.5  # constant where the truth varies: no correlation
    scores = region_scores(predicted, true)
    assert scores["mse"] == pytest.approx(
        np.mean([(p - t) ** 2 for p, t in zip(predicted.flat, true.flat, strict=True)])
    )
    assert scores["mae"] == pytest.approx(np.mean([abs(p - t) for p, t in zip(predicted.flat, true.flat, strict=True)]))
    by_gene = [0.0 if g == 2 else np.corrcoef(predicted[:, g], true[:, g])[0, 1] for g in (0, 2, 3, 4)]
    assert scores["pearson"] == pytest.approx(np.mean(by_gene))
    assert np.isnan(region_scores(predicted[:1], true[:1])["pearson"])
    with pytest.raises(ValueError, match="expected both"):
        region_scores(predicted[:3], true)


def test_clusters_are_named_one_to_one_after_the_labels_they_meet():
    clusters = np.array([0, 0, 1, 1, 1, 2, 2, 3])
    labels = np.array([1, 1, 0, 0, 1, 1, -1, -1])
    named = named_clusters(clusters, labels, ["a", "b"])
    assert named.tolist() == ["b", "b", "a", "a", "a", "cluster 1", "cluster 1", "cluster 2"]
