"""Array indices from pixel coordinates: the neighbours are the true array's, and what is no array is refused."""

from collections.abc import Iterable

import anndata
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree
from scipy.stats import qmc

from modeling_stimg.compaction_stimg import compact, is_staggered
from modeling_stimg.lattice import array_positions

STEPS = {"staggered": [(0, 2), (1, 1), (1, -1)], "square": [(0, 1), (1, 0)]}
GRID_STEPS = [(0, 1), (1, 0), (1, 1), (1, -1)]  # 8 neighbours
NO_ARRAY = (
    r"no regular array \(.*\), expected spots on a staggered or square array: bin segmented cells to a square grid"
)


def array(kind: str, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    row, col = np.mgrid[:height, :width].reshape(2, -1)
    return row, 2 * col + row % 2 if kind == "staggered" else col


def place(kind: str, row: np.ndarray, col: np.ndarray, ratio: float = 1.0) -> np.ndarray:
    """(x, y) in units of the pitch; `ratio`: that of the pitch of y to that of x on a rectangular array."""
    xy = np.stack([col, row], axis=1).astype(float)
    return xy * ([0.5, np.sqrt(3) / 2] if kind == "staggered" else [1, ratio])


def rotated(xy: np.ndarray, degrees: float) -> np.ndarray:
    cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return xy @ np.array([[cos, sin], [-sin, cos]])


def pairs(row: np.ndarray, col: np.ndarray, steps: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
    """Pairs of spots (lower index first) that are one of `steps` apart."""
    spot = {site: index for index, site in enumerate(zip(row.tolist(), col.tolist(), strict=True))}
    assert len(spot) == len(row), "two spots on one site"
    found = (
        (spot[r, c], spot[r + down, c + right])
        for r, c in spot
        for down, right in steps
        if (r + down, c + right) in spot
    )
    return {(min(pair), max(pair)) for pair in found}


def assert_same_neighbours(kind: str, xy: np.ndarray, row: np.ndarray, col: np.ndarray) -> None:
    found_row, found_col = array_positions(xy)
    assert found_row.dtype == found_col.dtype == np.int64
    assert is_staggered(found_row, found_col) == (kind == "staggered")
    assert pairs(found_row, found_col, STEPS[kind]) == pairs(row, col, STEPS[kind])
    assert found_row.min() == 0
    assert found_col.min() in (0, 1)


@settings(deadline=None, max_examples=100)
@given(
    kind=st.sampled_from(["staggered", "square"]),
    size=st.tuples(st.integers(8, 40), st.integers(8, 40)),
    pitch=st.floats(1e-3, 1e3),
    degrees=st.floats(0, 360),
    dropout=st.sampled_from([0.0, 0.3, 0.5]),
    jitter=st.sampled_from([0.0, 0.02, 0.05]),
    stretch=st.floats(-0.03, 0.03),
    shear=st.floats(-0.02, 0.02),
    bend=st.floats(-3e-4, 3e-4),
    seed=st.integers(0, 2**32 - 1),
)
def test_neighbours_are_those_of_the_true_array(
    kind, size, pitch, degrees, dropout, jitter, stretch, shear, bend, seed
):
    rng = np.random.default_rng(seed)
    row, col = array(kind, *size)
    keep = np.sort(rng.permutation(len(row))[round(dropout * len(row)) :])
    row, col = row[keep], col[keep]
    xy = place(kind, row, col) @ np.array([[1 + stretch, shear], [0, 1]])
    xy[:, 0] += bend * (xy[:, 1] - size[0] / 2) ** 2  # slow drift
    xy = rotated(xy + rng.normal(0, jitter, xy.shape), degrees) * pitch + rng.uniform(-1e4, 1e4, 2) * pitch
    assert_same_neighbours(kind, xy, row, col)


@pytest.mark.parametrize("kind", ["staggered", "square"])
@pytest.mark.parametrize("pitch", [5.0, 137.3])
def test_pixels_rounded_to_integers(kind, pitch):
    row, col = array(kind, 30, 25)
    xy = np.rint(rotated(place(kind, row, col) * pitch, 0.7) + 1000).astype(np.int32)
    assert_same_neighbours(kind, xy, row, col)


@pytest.mark.parametrize("ratio", [0.75, 0.9, 1.1, 1.4])
def test_rectangular_pitch(ratio):
    row, col = array("square", 20, 15)
    found_row, found_col = array_positions(rotated(place("square", row, col, ratio), 8) * 50)
    np.testing.assert_array_equal(found_row, row)
    np.testing.assert_array_equal(found_col, col)


@settings(deadline=None, max_examples=30)
@given(
    kind=st.sampled_from(["staggered", "square"]),
    degrees=st.floats(0, 360),
    gap=st.integers(3, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_islands_are_placed_on_one_array(kind, degrees, gap, seed):
    """Three islands, `gap` sites apart, one of them a single row: also how they lie to each other is the truth's."""
    rng = np.random.default_rng(seed)
    row, col = array(kind, 40, 50)
    x, y = place(kind, row, col).T
    keep = (x < 15) & (y < 15)
    keep |= (x > 15 + gap) & (x < 22 + gap) & (y < 8)
    keep |= (x < 9) & (row == 18 + gap)
    keep &= rng.random(len(row)) > 0.1
    row, col = row[keep], col[keep]
    xy = place(kind, row, col)
    xy = rotated(xy + rng.normal(0, 0.03, xy.shape), degrees) * 100
    assert_same_neighbours(kind, xy, row, col)
    truth = np.stack([row, col, np.ones_like(row)], axis=1)
    found = np.stack(array_positions(xy), axis=1)
    same_array = truth @ np.linalg.lstsq(truth, found, rcond=None)[0]  # turned or mirrored, nothing else
    np.testing.assert_allclose(same_array, found, atol=1e-6)


# Orientation


@pytest.mark.parametrize("kind", ["staggered", "square"])
@pytest.mark.parametrize("degrees", [-12, 0, 3, 14])
def test_rows_near_the_horizontal_keep_the_indices(kind, degrees):
    row, col = array(kind, 12, 14)
    found_row, found_col = array_positions(rotated(place(kind, row, col), degrees) * 30 - 7)
    np.testing.assert_array_equal(found_row, row)
    np.testing.assert_array_equal(found_col, col)


@pytest.mark.parametrize("degrees", [80, 90, 101])
def test_rows_of_a_turned_staggered_slide_are_still_its_rows(degrees):
    row, col = array("staggered", 12, 14)  # x of the array is y of the image, y is -x
    found_row, found_col = array_positions(rotated(place("staggered", row, col), degrees) * 30)
    np.testing.assert_array_equal(found_row, 11 - row)
    np.testing.assert_array_equal(found_col - found_col.min(), col)
    assert is_staggered(found_row, found_col)


def test_a_turned_square_slide_has_rows_near_the_horizontal():
    row, col = array("square", 12, 14)
    found_row, found_col = array_positions(rotated(place("square", row, col), 90) * 30)
    np.testing.assert_array_equal(found_row, col)
    np.testing.assert_array_equal(found_col, 11 - row)


# Few spots, and spots on one place


@pytest.mark.parametrize("num_spots", [0, 1, 5])
def test_spots_on_one_place(num_spots):
    row, col = array_positions(np.full((num_spots, 2), 17.5))
    assert row.tolist() == col.tolist() == [0] * num_spots


@pytest.mark.parametrize("end", [(30, 4), (30, -4), (4, 30), (-4, 30)])
def test_two_spots_are_a_row_in_reading_order(end):
    row, col = array_positions(np.array([(0, 0), end], dtype=float))
    assert row.tolist() == [0, 0]
    assert col.tolist() == [0, 1]


@pytest.mark.parametrize("degrees", [0, 7, 90, 130, 170])
def test_one_line_of_spots_is_one_row(degrees):
    steps = np.array([0, 1, 2, 4, 5, 6, 9, 10, 12, 13, 14, 17])
    xy = np.stack([steps, np.zeros_like(steps)], axis=1) * 40.0
    xy += np.random.default_rng(0).normal(0, 0.8, xy.shape)
    row, col = array_positions(rotated(xy, degrees))
    assert set(row) == {0}
    np.testing.assert_array_equal(col, 17 - steps if degrees == 170 else steps)


def test_a_few_spots():
    xy = np.array([(0, 0), (10, 0), (0, 10), (10, 10)])
    row, col = array_positions(xy)
    assert (row * 10).tolist() == xy[:, 1].tolist()
    assert (col * 10).tolist() == xy[:, 0].tolist()
    row, col = array_positions(np.array([(5, 0), (0, 8.66), (10, 8.66)]))
    assert (row.tolist(), col.tolist()) == ([0, 1, 1], [2, 1, 3])


@pytest.mark.parametrize("kind", ["staggered", "square"])
def test_identical_coordinates_get_identical_indices(kind):
    row, col = array(kind, 8, 9)
    again = np.array([3, 3, 40, 71])
    row, col = np.append(row, row[again]), np.append(col, col[again])
    xy = rotated(place(kind, row, col), 2) * 25
    found_row, found_col = array_positions(xy)
    np.testing.assert_array_equal(found_row, row)
    np.testing.assert_array_equal(found_col, col)


# What is no array


def jittered(kind: str, seed: int) -> np.ndarray:
    """Half a pitch of jitter to either side."""
    return place(kind, *array(kind, 25, 25)) + np.random.default_rng(seed).uniform(-0.5, 0.5, (625, 2))


def oblique(seed: int) -> np.ndarray:
    return place("square", *array("square", 20, 20)) @ np.array([[1, 0], [0.3 + 0.01 * seed, 1.2]])


NO_ARRAYS = {
    "uniform": lambda seed: np.random.default_rng(seed).random((30 + 300 * seed, 2)),
    "cells": lambda seed: qmc.PoissonDisk(d=2, radius=0.1 / (1 + seed), seed=seed).fill_space(),
    "cells on whole pixels": lambda seed: np.rint(qmc.PoissonDisk(d=2, radius=0.03, seed=seed).fill_space() * 100),
    "sparse pixels": lambda seed: np.random.default_rng(seed).integers(0, 80, (500, 2)),
    "jittered staggered": lambda seed: jittered("staggered", seed),
    "jittered square": lambda seed: jittered("square", seed),
    "line": lambda seed: np.random.default_rng(seed).random((60, 1)) * [1.0, 0.2],
    "oblique": oblique,
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("what", NO_ARRAYS)
def test_no_array_is_refused_with_the_remedy(what, seed):
    with pytest.raises(ValueError, match=NO_ARRAY) as error:
        array_positions(NO_ARRAYS[what](seed) * 1000)
    message = str(error.value)
    assert "sum the counts of the cells in each bin" in message
    assert 'obs["array_row"]' in message
    assert "\n" not in message


def test_the_sentence_says_how_far_the_points_are_off():
    with pytest.raises(ValueError, match=r"625 spots .* 0\.\d\d of the pitch off the best lattice \(RMS\)"):
        array_positions(jittered("square", 0))


@pytest.mark.parametrize("far", [0.04, 0.5])
def test_one_spot_too_many_on_an_array_is_refused(far):
    """On the site of another spot, or between sites."""
    xy = place("square", *array("square", 15, 15))
    with pytest.raises(ValueError, match=NO_ARRAY):
        array_positions(np.append(xy, xy[[112]] + [far, 0], axis=0) * 80)


def test_a_spot_astronomically_far_away_is_refused():
    xy = place("square", *array("square", 15, 15))
    with pytest.raises(ValueError, match=r"some are 1e.* times as far apart as near ones"):
        array_positions(np.append(xy, [[1e9, -1e9]], axis=0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coordinates_that_are_not_finite_are_counted(value):
    xy = place("square", *array("square", 5, 5))
    xy[3] = value
    xy[7, 1] = value
    with pytest.raises(ValueError, match="2 of 25 spots have pixel coordinates that are no finite numbers"):
        array_positions(xy)


def test_coordinates_of_another_shape():
    with pytest.raises(ValueError, match=r"shape \(4, 3\): expected x and y of every spot"):
        array_positions(np.zeros((4, 3)))


def test_many_spots():
    """A hundred thousand bins in any order; nothing may be of size n x n."""
    row, col = array("square", 320, 320)
    order = np.random.default_rng(0).permutation(len(row))
    row, col = row[order], col[order]
    found_row, found_col = array_positions(rotated(place("square", row, col), 0.4) * 29.2)
    np.testing.assert_array_equal(found_row, row)
    np.testing.assert_array_equal(found_col, col)


# Real slides


@pytest.mark.real_data
def test_real_slide_without_an_array_gets_one(real_data):
    """Spots are neighbours on the array if, and only if, they are nearest in the image."""
    xy = anndata.read_h5ad(real_data / "slides" / "eevee_breast.h5ad").obsm["spatial"]
    row, col = array_positions(xy)
    assert is_staggered(row, col)
    tree = cKDTree(xy)
    pitch = np.median(tree.query(xy, k=2)[0][:, 1])
    assert pairs(row, col, STEPS["staggered"]) == tree.query_pairs(1.3 * pitch)


@pytest.mark.real_data
@pytest.mark.parametrize("degrees", [0, 3, -8])
def test_real_visium_array_is_found_again(real_data, degrees):
    slide = anndata.read_h5ad(real_data / "slides" / "dlpfc_151673_g8513.h5ad")
    truth = slide.obs["array_row"].to_numpy(), slide.obs["array_col"].to_numpy()
    found = array_positions(rotated(slide.obsm["spatial"], degrees))
    assert pairs(*found, STEPS["staggered"]) == pairs(*truth, STEPS["staggered"])
    assert pairs(*compact(*found, "lattice"), GRID_STEPS) == pairs(*compact(*truth, "lattice"), GRID_STEPS)


# Their spots were placed by hand. Of two, two spots are on one place of the array; of a third, two rows are nearly one.
BY_HAND = {"aspheart_1_CN73_E1", "aspheart_8_CN74_D2", "aspheart_2_CN73_E2"}


@pytest.mark.real_data
def test_every_real_array_is_found_again(real_data):
    paths = [path for path in sorted((real_data / "slides").glob("*.h5ad")) if path.stem not in BY_HAND]
    assert len(paths) > 50
    for path in paths:
        slide = anndata.read_h5ad(path)
        if "array_row" in slide.obs:
            kind, names = "staggered", ("array_row", "array_col")
        elif "array_y" in slide.obs:
            kind, names = "square", ("array_y", "array_x")
        else:
            continue
        truth = (np.rint(slide.obs[name].to_numpy(dtype=float)).astype(np.int64) for name in names)
        assert_same_neighbours(kind, slide.obsm["spatial"], *truth)
