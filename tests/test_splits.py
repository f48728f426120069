import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.splits import encode_labels, slide_labels, spot_splits


def _labels(num_labelled: int, num_unlabelled: int, seed: int = 0) -> np.ndarray:
    labels = [f"layer {i % 3}" for i in range(num_labelled)] + [None, np.nan, "", pd.NA] * num_unlabelled
    return np.random.default_rng(seed).permutation(np.array(labels, dtype=object))


@settings(max_examples=30, deadline=None)
@given(
    num_labelled=st.integers(20, 90),
    num_unlabelled=st.integers(0, 5),
    train_share=st.floats(0.2, 0.8),
    seed=st.integers(0, 2**32),
)
def test_splits_partition_the_labelled_spots(num_labelled, num_unlabelled, train_share, seed):
    labels = _labels(num_labelled, num_unlabelled)
    labelled = [i for i, label in enumerate(labels) if isinstance(label, str) and label]
    for train, test in spot_splits(labels, num_splits=3, train_share=train_share, seed=seed):
        assert train.dtype == test.dtype == np.int64
        assert len(train) == round(train_share * num_labelled)
        assert sorted([*train, *test]) == labelled  # disjoint, complete, and no unlabelled spot


def test_a_split_does_not_depend_on_how_many_are_drawn():
    labels = _labels(60, 3)
    three, five = spot_splits(labels, num_splits=3, seed=4), spot_splits(labels, num_splits=5, seed=4)
    for (train, test), (same_train, same_test) in zip(three, five[:3], strict=True):
        np.testing.assert_array_equal(train, same_train)
        np.testing.assert_array_equal(test, same_test)


def test_splits_differ_from_each_other_and_between_seeds():
    labels = _labels(60, 3)
    trains = [tuple(train) for seed in (0, 1) for train, _ in spot_splits(labels, num_splits=5, seed=seed)]
    assert len(set(trains)) == 10


def test_every_spot_is_about_equally_often_in_training():
    labels = _labels(50, 0)
    times = np.bincount(np.concatenate([train for train, _ in spot_splits(labels, num_splits=1000)]), minlength=50)
    np.testing.assert_allclose(times, 200, atol=5 * np.sqrt(1000 * 0.2 * 0.8))


def test_class_numbers_give_the_same_splits_as_names():
    labels = _labels(60, 3)
    codes, names = encode_labels(labels)
    assert names == ["layer 0", "layer 1", "layer 2"]
    for code, label in zip(codes, labels, strict=True):
        assert names[code] == label if code >= 0 else not isinstance(label, str) or label == ""
    for by_name, by_code in zip(spot_splits(labels), spot_splits(codes), strict=True):
        np.testing.assert_array_equal(by_name[0], by_code[0])


@pytest.mark.parametrize(
    ("labels", "arguments", "message"),
    [
        (["a"] * 20, {}, "1 class"),
        ([None] * 20, {}, "0 class"),
        (["a", "b", "c"] * 3, {}, "9 labelled spots give 2 to train on"),
        (["a", "b"] * 2, {"train_share": 0.95}, "0 to test on"),
        (["a", "b"] * 9, {"train_share": 1.0}, "train_share is 1.0"),
        (["a", "b"] * 9, {"num_splits": 0}, "num_splits is 0"),
        ([["a"], ["b"]], {}, "one label per spot"),
    ],
)
def test_impossible_splits_are_refused(labels, arguments, message):
    with pytest.raises(ValueError, match=message):
        spot_splits(np.array(labels, dtype=object), **arguments)


@pytest.mark.parametrize("categorical", [True, False])
def test_slide_labels_turn_every_non_class_into_none(categorical):
    column = pd.Series(["tumour", np.nan, "undetermined", "", "fat", "artefact"], dtype=object)
    obs = pd.DataFrame({"label": column.astype("category") if categorical else column})
    obs.index = obs.index.astype(str)
    adata = ad.AnnData(np.zeros((6, 1), dtype=np.float32), obs=obs)
    assert slide_labels(adata).tolist() == ["tumour", None, None, None, "fat", "artefact"]
    kept = slide_labels(adata, unlabelled=("artefact",)).tolist()
    assert kept == ["tumour", None, "undetermined", None, "fat", None]


def test_slide_labels_name_the_columns_there_are():
    adata = ad.AnnData(np.zeros((2, 1), dtype=np.float32), obs=pd.DataFrame({"layer": ["a", "b"]}, index=["0", "1"]))
    with pytest.raises(ValueError, match=r"no column 'label'.*'layer'"):
        slide_labels(adata)
