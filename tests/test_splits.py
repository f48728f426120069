import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.splits import (
    Transfer,
    block_splits,
    encode_labels,
    slide_labels,
    spot_splits,
    transfer_splits,
    transfers,
)


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


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, 2, 3], ["1", "2", "3"]),
        ([1.0, np.nan, 2.5], ["1", None, "2.5"]),  # a missing value makes integers floats, but no other classes
        (pd.array([1, None, 2], dtype="Int64"), ["1", None, "2"]),
        (["a", " a", "a\t"], ["a", "a", "a"]),
        (["a", " ", "NA"], ["a", None, None]),
        (pd.Categorical(["nan", "a", "<NA>"]), [None, "a", None]),
        ([True, False, True], ["True", "False", "True"]),
    ],
)
def test_slide_labels_are_the_same_however_a_column_writes_them(values, expected):
    obs = pd.DataFrame({"label": values}, index=["0", "1", "2"])
    assert slide_labels(ad.AnnData(np.zeros((3, 1), dtype=np.float32), obs=obs)).tolist() == expected


def test_slide_labels_name_the_columns_there_are():
    adata = ad.AnnData(np.zeros((2, 1), dtype=np.float32), obs=pd.DataFrame({"layer": ["a", "b"]}, index=["0", "1"]))
    with pytest.raises(ValueError, match=r"no column 'label'.*'layer'"):
        slide_labels(adata)


# ---------------------------------------------------------------- blocks


def _grid(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, rows and columns of a slide with every tenth site empty and some spots unlabelled."""
    rows, cols = np.divmod(np.arange(height * width), width)
    there = np.random.default_rng(seed).random(len(rows)) > 0.1
    rows, cols = rows[there], cols[there]
    return _labels(len(rows) - 4, 1, seed), rows, cols


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(7, 20),
    width=st.integers(7, 20),
    side=st.integers(2, 6),
    train_share=st.floats(0.2, 0.7),
    seed=st.integers(0, 2**32),
)
def test_blocks_never_share_a_tile(height, width, side, train_share, seed):
    labels, rows, cols = _grid(height, width)
    labelled = [i for i, label in enumerate(labels) if isinstance(label, str) and label]
    tile = list(zip(rows // side, cols // side, strict=True))
    num_tiles = len({tile[i] for i in labelled})
    splits = block_splits(labels, rows, cols, 3, train_share, seed, side, min_train_spots=2)
    for train, test in splits:
        assert train.dtype == test.dtype == np.int64
        assert sorted([*train, *test]) == labelled
        trained = {tile[i] for i in train}
        assert not trained & {tile[i] for i in test}
        assert len(trained) == min(max(round(train_share * num_tiles), 1), num_tiles - 1)
        assert len(set(labels[train])) >= 2


def test_a_blocked_split_does_not_depend_on_how_many_are_drawn():
    labels, rows, cols = _grid(20, 20)
    three, five = (block_splits(labels, rows, cols, number, seed=4) for number in (3, 5))
    for (train, test), (same_train, same_test) in zip(three, five[:3], strict=True):
        np.testing.assert_array_equal(train, same_train)
        np.testing.assert_array_equal(test, same_test)
    assert len({tuple(train) for train, _ in five}) == 5


def test_draws_with_one_class_or_few_spots_are_replaced():
    """Four tiles in a row of one class each, a fifth with both: only draws with the fifth or with two classes count."""
    cols = np.repeat(np.arange(30), 6)
    rows = np.tile(np.arange(6), 30)
    labels = np.where(cols < 18, "a", "b").astype(object)
    labels[(cols >= 24) & (rows % 2 == 0)] = "a"
    for train, _ in block_splits(labels, rows, cols, num_splits=20):
        assert set(cols[train] // 6) == {4}
    with pytest.raises(ValueError, match=r"1 from 5 tiles of 6 x 6 sites never held two classes and 40 spots"):
        block_splits(labels, rows, cols, min_train_spots=40)
    with pytest.raises(ValueError, match="one tile of 60 x 60 sites"):
        block_splits(labels, rows, cols, side=60)


def test_classes_absent_from_the_training_tiles_stay_in_the_test():
    labels, rows, cols = _grid(18, 18)
    labels[(rows < 2) & (cols < 2)] = "rare"  # in one tile alone
    splits = block_splits(labels, rows, cols, num_splits=10)
    absent = [test for train, test in splits if "rare" not in labels[train]]
    assert absent
    assert all("rare" in labels[test] for test in absent)


# ---------------------------------------------------------------- slides


def test_other_patients_train_where_there_are_any():
    patients = {"a1": "a", "a2": "a", "b1": "b", "c1": "c"}
    assert transfers(patients) == [
        Transfer("a1", ("b1", "c1"), "other patients"),
        Transfer("a2", ("b1", "c1"), "other patients"),
        Transfer("b1", ("a1", "a2", "c1"), "other patients"),
        Transfer("c1", ("a1", "a2", "b1"), "other patients"),
    ]


def test_other_sections_train_where_no_other_patient_is_known():
    same = {frozenset(("a1", "a2"))}
    patients = {"a1": "a", "a2": "a", "a3": "a", "unknown": ""}
    assert transfers(patients, same) == [
        Transfer("a1", ("a3", "unknown"), "other sections", ("a2",)),
        Transfer("a2", ("a3", "unknown"), "other sections", ("a1",)),
        Transfer("a3", ("a1", "a2", "unknown"), "other sections"),
        Transfer("unknown", ("a1", "a2", "a3"), "other sections"),
    ]
    assert transfers({"a1": "a", "a2": "a"}, same) == []  # nothing is left to train on
    assert transfers({"a1": "a"}) == []


def test_splits_across_slides_use_the_classes_of_both_and_count_the_others():
    training = np.array(["a"] * 30 + ["b"] * 30 + ["c"] * 5 + [None], dtype=object)
    test = np.array(["a"] * 4 + ["b"] * 4 + ["d"] * 3 + [None], dtype=object)
    splits, dropped = transfer_splits(training, test, num_splits=4, max_train_spots=20)
    assert dropped == {"training": {"c": 5}, "test": {"d": 3}}
    labels = np.concatenate([training, test])
    for train, tested in splits:
        assert len(train) == 20
        assert train.max() < len(training)
        assert set(labels[train]) == {"a", "b"}
        np.testing.assert_array_equal(tested, len(training) + np.arange(8))
    assert len({tuple(train) for train, _ in splits}) == 4
    whole, _ = transfer_splits(training, test, num_splits=2)
    for train, _ in whole:
        np.testing.assert_array_equal(train, np.arange(60))
    with pytest.raises(ValueError, match=r"1 in common, a probe needs 2"):
        transfer_splits(training[:30], test)
