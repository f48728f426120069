"""Array indices to a tight grid."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling_stimg.compaction_stimg import compact, is_staggered

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


def test_full_visium_slide_becomes_78_by_64_without_gaps():
    array = staggered([(row, col) for row in range(78) for col in range(64)])
    rows, cols = compact(array[:, 0], array[:, 1], "lattice")
    assert (rows.max() + 1, cols.max() + 1, len(rows)) == (78, 64, 78 * 64)
    rows, cols = compact(array[:, 0], array[:, 1], "rank")
    assert (rows.max() + 1, cols.max() + 1) == (78, 128)


def test_neighbours_on_a_staggered_array_stay_neighbours():
    array = staggered([(row, col) for row in range(6) for col in range(5)])
    rows, cols = compact(array[:, 0], array[:, 1], "lattice")
    grid = dict(zip(map(tuple, array.tolist()), zip(rows.tolist(), cols.tolist(), strict=True), strict=True))
    for (row, col), (grid_row, grid_col) in grid.items():
        for step in ((0, 2), (1, 1), (1, -1)):
            neighbour = grid.get((row + step[0], col + step[1]))
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
