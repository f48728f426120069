"""Array indices to a tight grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_stimg.compaction_stimg import COMPACTIONS, MINMAX_RANGE, compact, is_staggered

POSITIONS = st.lists(st.tuples(st.integers(-5, 40), st.integers(-5, 40)), min_size=1, max_size=60, unique=True)


def staggered(positions: list[tuple[int, int]]) -> np.ndarray:
    """Positions of a Visium array: (row, 2 * col + row % 2)."""
    return np.array([(row, 2 * col + row % 2) for row, col in positions])


@given(POSITIONS, st.sampled_from(["lattice", "rank"]), st.booleans())
def test_compaction_is_injective_order_preserving_and_tight(positions, compaction, visium):
    array = staggered(positions) if visium else np.array(positions)
    rows, cols = compact(array[:, 0], array[:, 1], compaction)
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) == len(positions)
    for axis, grid in ((array[:, 0], rows), (array[:, 1], cols)):
        order = np.argsort(axis, kind="stable")
        assert (np.diff(grid[order]) >= 0).all(), "a spot was moved past another"
        assert set(grid.tolist()) == set(range(grid.max() + 1)), "a level without spots was kept"


@given(POSITIONS, st.booleans(), st.sampled_from([1, 7, 1000]))
def test_minmax_is_injective_and_order_preserving_and_fills_its_range(positions, visium, step):
    array = (staggered(positions) if visium else np.array(positions)) * step
    rows, cols = compact(array[:, 0], array[:, 1], "minmax")
    assert len(set(zip(rows.tolist(), cols.tolist(), strict=True))) == len(positions)
    for axis, grid in ((array[:, 0], rows), (array[:, 1], cols)):
        order = np.argsort(axis, kind="stable")
        assert (np.sign(np.diff(grid[order])) == np.sign(np.diff(axis[order]))).all()
        span = np.ptp(axis)
        assert (grid.min(), grid.max()) == (0, max(MINMAX_RANGE, span) if span else 0)
        if span:  # no level is farther than half a step from where scaling puts it
            exact = (axis - axis.min()) / span * max(MINMAX_RANGE, span)
            assert np.abs(grid - exact).max() <= 0.5


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.uint16, np.uint32, np.int64])
@pytest.mark.parametrize("compaction", COMPACTIONS)
def test_the_integer_type_of_the_indices_does_not_matter(dtype, compaction: str):
    rows, cols = np.array([3, 0, 120]), np.array([1, 100, 7])
    expected = compact(rows, cols, compaction)
    for got, want in zip(compact(rows.astype(dtype), cols.astype(dtype), compaction), expected, strict=True):
        np.testing.assert_array_equal(got, want, strict=True)


@pytest.mark.parametrize(("height", "width"), [(78, 64), (128, 112)])
def test_full_visium_windows_are_full_with_lattice_and_half_full_with_rank(height: int, width: int):
    """Capture areas of 6.5 and 11 mm."""
    array = staggered([(row, col) for row in range(height) for col in range(width)])
    for compaction, filled in (("lattice", 256), ("rank", 128)):
        rows, cols = compact(array[:, 0], array[:, 1], compaction)
        grid = np.zeros((rows.max() + 1, cols.max() + 1), bool)
        grid[rows, cols] = True
        assert {grid[top : top + 16, left : left + 16].sum() for top in (0, 5, 31) for left in (0, 9, 48)} == {filled}


def test_full_visium_slide_becomes_78_by_64_without_gaps():
    array = staggered([(row, col) for row in range(78) for col in range(64)])
    rows, cols = compact(array[:, 0], array[:, 1], "lattice")
    assert (rows.max() + 1, cols.max() + 1, len(rows)) == (78, 64, 78 * 64)
    rows, cols = compact(array[:, 0], array[:, 1], "rank")
    assert (rows.max() + 1, cols.max() + 1) == (78, 128)


@given(POSITIONS, st.booleans())
def test_neighbours_stay_neighbours(positions, visium):
    """Whoever touched on the array touches on the grid; a staggered array has six neighbours, a square one eight."""
    array = staggered(positions) if visium else np.array(positions)
    rows, cols = compact(array[:, 0], array[:, 1], "lattice")
    grid = dict(zip(map(tuple, array.tolist()), zip(rows.tolist(), cols.tolist(), strict=True), strict=True))
    # Fewer spots may lie on one colour of a checkerboard by chance; then they are as good as staggered.
    steps = ((0, 2), (1, 1), (1, -1)) if is_staggered(*array.T) else ((0, 1), (1, 0), (1, 1), (1, -1))
    for (row, col), (grid_row, grid_col) in grid.items():
        for down, right in steps:
            neighbour = grid.get((row + down, col + right))
            if neighbour is not None:
                assert max(abs(neighbour[0] - grid_row), abs(neighbour[1] - grid_col)) == 1


def test_square_array_is_not_taken_for_staggered():
    rows, cols = np.mgrid[:3, :4].reshape(2, -1)
    assert not is_staggered(rows, cols)
    assert compact(rows, cols, "lattice")[1].max() == 3


def test_bad_positions_get_one_clear_sentence():
    with pytest.raises(ValueError, match="expected integer array indices"):
        compact(np.array([0.5, 1.5]), np.array([0, 1]), "lattice")
    with pytest.raises(ValueError, match="expected one value a spot"):
        compact(np.array([0, 1]), np.array([0]), "lattice")
    with pytest.raises(ValueError, match="expected one of"):
        compact(np.array([0]), np.array([0]), "hexagon")
