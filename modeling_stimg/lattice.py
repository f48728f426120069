"""Array indices of spots of which only the pixel coordinates are known: the lattice is found in the coordinates.

1. `_displacements`: from every point to its nearest neighbours. On an array these vectors pile up at the lattice
   vectors, wherever the points are missing or in islands.
2. `_basis`: the two shortest independent piles, Gauss-reduced and refined by least squares.
3. `_grow`: from the densest place outwards, points are rounded to sites and the map from pixels to sites is refitted.
4. `_fault`: the residuals of all points decide. Points on no array fail here, whatever the steps before made of them.
"""

from collections.abc import Iterator

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter
from scipy.spatial import cKDTree

_MAX_COORDINATE = 2.0**53  # the squares of much larger ones are infinite
_NUM_NEIGHBOURS = 24
_MAX_QUERIES = 20_000
# Shares of the highest pile that a pile must reach to be taken for a lattice vector, tried in this order: with many
# spots missing, the pile of a shortest vector can be a low one.
_PILE_SHARES = (0.5, 0.25, 0.1)
# Residuals in units of the pitch. Random points have an RMS of 0.37 (staggered) to 0.41 (square) on any lattice, arrays
# registered by hand up to 0.13. Half a pitch from its site a point is as near to the next one.
_MAX_RMS, _MAX_RESIDUAL = 0.15, 0.45
_ENOUGH = 20  # points; fewer fit some lattice by chance, so they must fit it better
_MAX_EXTENT = 1e5  # in distances of near spots; the finest arrays have several thousand sites a side
# Cells on whole pixels lie on the lattice of pixels, and most of its sites are empty. Share of occupied neighbours.
_MIN_NEIGHBOURS = 0.2
# A basis this uneven is neither staggered (three equal vectors, 60 degrees apart) nor rectangular.
_MAX_STAGGERED_RATIO, _MAX_SQUARE_RATIO, _MAX_SQUARE_COSINE = 1.15, 1.5, 0.14


def array_positions(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places on the array of spots given by pixel coordinates, in any unit, at any rotation, in any order.

    Rows of the array follow the lattice direction that is nearest to an image axis. Where they are near the horizontal,
    `array_col` grows with x and `array_row` with y; near the vertical (a staggered array in an image turned by 90
    degrees), `array_col` grows with y and `array_row` with x. A staggered array gets Visium's indices: `array_col`
    steps by 2 within a row and `array_row + array_col` is even. A square or rectangular one gets consecutive integers.
    Spots on one line are one row. The smallest `array_row` is 0, the smallest `array_col` 0 or 1.

    Jitter, drift, slight distortion, missing spots and separate islands of spots are allowed. Spots with identical
    coordinates get identical indices.

    Args:
        pixels: float (num_spots, 2), x (column) and y (row) of every spot.

    Returns:
        array_row, array_col: int64 (num_spots,).

    Raises:
        ValueError: coordinates that are not finite, or that lie on no staggered, square or rectangular array.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    if pixels.ndim != 2 or pixels.shape[1] != 2:
        raise ValueError(
            f"the pixel coordinates have shape {pixels.shape}: expected x and y of every spot, (num_spots, 2)"
        )
    if len(pixels) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    bad = np.count_nonzero(~(np.abs(pixels) < _MAX_COORDINATE).all(axis=1))
    if bad:
        raise ValueError(
            f"{bad} of {len(pixels)} spots have pixel coordinates that are no finite numbers: give every spot its "
            "position, or leave these spots out"
        )
    points, inverse = np.unique(pixels, axis=0, return_inverse=True)
    if len(points) < 2:
        return np.zeros(len(pixels), np.int64), np.zeros(len(pixels), np.int64)
    array_row, array_col = _indices(*_find_sites(points))
    return array_row[inverse.ravel()], array_col[inverse.ravel()]


def _find_sites(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sites int64 (num_points, 2) of distinct points, and the basis float (2, 2), one row a lattice vector."""
    displacements, scale, start = _displacements(points)
    extent = np.ptp(points, axis=0).max() / scale
    too_far = extent > _MAX_EXTENT
    fault = f"some are {extent:.0e} times as far apart as near ones" if too_far else "no step between them recurs"
    faults = [(np.inf, fault)]
    for basis in () if too_far else _bases(displacements / scale):
        sites, basis, residuals = _grow(points / scale, start, basis)
        fault = _fault(sites, basis, residuals)
        if fault is None:
            return sites, basis
        faults.append(fault)
    _, fault = min(faults)
    raise ValueError(
        f"the pixel coordinates of {len(points)} spots are no regular array ({fault}), expected spots on a staggered "
        "or square array: bin segmented cells to a square grid, i.e. sum the counts of the cells in each bin, with "
        "bin_size=50 (--bin-size 50, in um); tell several slides apart with slide_key (--slide-key); or give "
        'obs["array_row"] and obs["array_col"]'
    )


def _displacements(points: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Vectors (num_vectors, 2) between near points, the typical length of the shortest, the point in the densest place.

    A sample of the points is enough to find the lattice; every vector comes with its opposite.
    """
    rng = np.random.default_rng(0)
    sample = rng.choice(len(points), min(len(points), _MAX_QUERIES), replace=False)
    distances, neighbours = cKDTree(points).query(points[sample], k=min(_NUM_NEIGHBOURS + 1, len(points)))
    vectors = (points[neighbours[:, 1:]] - points[sample, None]).reshape(-1, 2)
    scale = float(np.quantile(distances[:, 1], 0.25))
    return np.concatenate([vectors, -vectors]), scale, int(sample[distances[:, -1].argmin()])


def _bases(vectors: np.ndarray) -> Iterator[np.ndarray]:
    """Candidates (2, 2) for the basis, one row a lattice vector. `vectors`: the shortest ones about 1 long."""
    piles, heights = _piles(vectors)
    seen = []
    for share in _PILE_SHARES:
        basis = _basis(vectors, piles[heights >= share * heights.max(initial=0)])
        if basis is not None and not any(np.allclose(basis, old, atol=0.02) for old in seen):
            seen.append(basis)
            yield basis


def _piles(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres (num_piles, 2) and heights (num_piles,) of the density's peaks, the shortest first."""
    reach, bins = 3.0, 120  # shortest lattice vectors are about 1 long, bins 0.05 wide
    density, edges, _ = np.histogram2d(*vectors.T, bins=bins, range=[[-reach, reach]] * 2)
    density = gaussian_filter(density, 2)  # 0.1: two jitters of several per cent
    i, j = np.nonzero((density == maximum_filter(density, 17)) & (density > 0))  # none within 0.4 of a higher one
    middles = (edges[:-1] + edges[1:]) / 2
    centres = np.stack([middles[i], middles[j]], axis=1)
    order = np.argsort(np.linalg.norm(centres, axis=1), kind="stable")
    order = order[np.linalg.norm(centres[order], axis=1) > 0.4]
    return centres[order], density[i, j][order]


def _basis(vectors: np.ndarray, piles: np.ndarray) -> np.ndarray | None:
    """Reduced basis (2, 2) of the lattice spanned by the two shortest independent `piles`; None without piles."""
    if not len(piles):
        return None
    first = piles[0]
    sines = np.abs(_cross(first, piles)) / np.linalg.norm(first) / np.linalg.norm(piles, axis=1)
    independent = piles[sines > 0.6]  # 0.87 between the shortest vectors of a staggered lattice
    basis = _reduced(np.stack([first, independent[0]])) if len(independent) else first[None]
    length = np.linalg.norm(vectors, axis=1)
    for reach in (1.2, 1.6, 2, 3, 3):  # long vectors only once the basis is good enough to count their steps
        sides = np.linalg.norm(basis, axis=1)
        steps = np.rint(vectors @ np.linalg.pinv(basis))
        near = (np.linalg.norm(vectors - steps @ basis, axis=1) < 0.3 * sides.min()) & (length < reach * sides.max())
        if np.linalg.matrix_rank(steps[near]) < len(basis):
            return None
        basis = np.linalg.lstsq(steps[near], vectors[near], rcond=None)[0]
    if len(basis) == 1:  # one line of spots; whatever lies beside it shows in the residuals
        return np.concatenate([basis, basis[:, ::-1] * [-1, 1]])
    return _reduced(basis)


def _reduced(basis: np.ndarray) -> np.ndarray:
    """Gauss's reduction: the two shortest vectors (2, 2) of the same lattice, at an angle of 60 to 90 degrees."""
    short, long = sorted(basis, key=np.linalg.norm)
    while True:
        long = long - np.rint(long @ short / (short @ short)) * short
        if not long @ long < (1 - 1e-9) * (short @ short):
            return np.stack([short, long if long @ short >= 0 else -long])
        short, long = long, short


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _grow(points: np.ndarray, start: int, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sites int64 (num_points, 2), fitted basis (2, 2), and residuals (num_points,) in units of the pitch.

    Sites are quadratic in the coordinates, site = c0 + C1 p + p' C2 p: nearly linear, with room for slow drift. The fit
    is a ridge regression around the `basis` that the displacements of the whole slide gave, so that an island of few
    spots, or one row of them, does not bend the map by what it cannot know. Twice as many points in every round: those
    that are new are never far from fitted ones, measured by the extent of these.
    """
    pitch = np.linalg.norm(basis, axis=1).min()
    x, y = ((points - points[start]) / pitch).T
    order = np.argsort(x**2 + y**2, kind="stable")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)[order]
    # Noise of 0.1 pitch against a basis known to 0.01 of it, and a bend of 3e-4 per pitch.
    stiffness = np.diag([0.0, 1e2, 1e2, 1e5, 1e5, 1e5])
    prior = np.zeros((6, 2))
    prior[1:3] = np.linalg.inv(basis / pitch)
    count = min(16, len(points))
    # The origin is where the first points agree, not where a single one happens to be.
    prior[0] = -np.angle(np.exp(2j * np.pi * terms[:count] @ prior).mean(axis=0)) / (2 * np.pi)
    coefficients, previous = prior, None
    while True:
        for _ in range(10):
            sites = np.rint(terms[:count] @ coefficients)
            gram = terms[:count].T @ terms[:count] + stiffness
            units = np.sqrt(np.diag(gram))[:, None]  # squares of hundreds beside ones: solve in even units
            moments = terms[:count].T @ (sites - terms[:count] @ prior)
            coefficients = prior + np.linalg.solve(gram / units / units.T, moments / units) / units
            if previous is not None and np.array_equal(sites, previous):
                break
            previous = sites
        if count == len(points):
            break
        count = min(2 * count, len(points))
    # How the coordinates turn into sites at the middle of the slide, and its inverse, the basis.
    mid_x, mid_y = terms[:, 1:3].mean(axis=0)
    slope = coefficients[1:3] + np.array([[2 * mid_x, mid_y, 0], [0, mid_x, 2 * mid_y]]) @ coefficients[3:]
    basis = np.linalg.inv(slope)
    places = terms @ coefficients
    sites = np.rint(places)
    residuals = np.linalg.norm((places - sites) @ basis, axis=1) / np.linalg.norm(basis, axis=1).min()
    back = np.argsort(order)
    return sites[back].astype(np.int64), basis, residuals[back]


def _fault(sites: np.ndarray, basis: np.ndarray, residuals: np.ndarray) -> tuple[float, str] | None:
    """What shows that the points are on no array, with the RMS residual; None where nothing does."""
    freedom = max(1 - 3 / len(sites), 0.25)  # six numbers fitted to two coordinates of every point
    rms, largest = float(np.sqrt((residuals**2).mean() / freedom)), float(residuals.max())
    max_rms = _MAX_RMS * min(1, len(sites) / _ENOUGH)
    if rms > max_rms or largest > _MAX_RESIDUAL:
        found = f"they lie {rms:.2f} of the pitch off the best lattice (RMS), the farthest {largest:.2f}"
        return rms, f"{found}, where {max_rms:.2f} and {_MAX_RESIDUAL:.2f} are allowed"
    steps = _steps(sites, basis)
    if not len(steps):
        lengths = np.linalg.norm(basis, axis=1)
        angle = np.degrees(np.arccos(basis[0] @ basis[1] / lengths.prod()))
        return rms, f"their lattice has sides in the ratio {lengths.max() / lengths.min():.2f} at {angle:.0f} degrees"
    row, col = (sites - sites.min(axis=0)).T
    width = col.max() + 2  # one empty column, or a step from the end of a row would reach the next one
    keys = np.unique(row * width + col)
    if len(keys) < len(sites):
        return rms, f"{len(sites) - len(keys)} of them share a site of the best lattice with another one"
    share = np.mean([np.isin(keys + step @ [width, 1], keys, assume_unique=True).mean() for step in steps])
    if share < _MIN_NEIGHBOURS:
        return rms, f"only {share:.0%} of the sites beside them on the best lattice hold one too"
    return None


def _steps(sites: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """From a site to its neighbours, opposite steps left out: int (3, 2) on a staggered array, (2, 2) on a square or
    rectangular one, (1, 2) on a single line, (0, 2) where the lattice is none of these."""
    lengths = np.linalg.norm([*basis, basis[0] - basis[1]], axis=1)
    cosine = abs(basis[0] @ basis[1]) / lengths[:2].prod()
    if (sites[:, 1] == sites[0, 1]).all():
        return np.array([[1, 0]])
    if lengths.max() <= _MAX_STAGGERED_RATIO * lengths.min():
        return np.array([[1, 0], [0, 1], [1, -1]])
    if lengths[:2].max() <= _MAX_SQUARE_RATIO * lengths[:2].min() and cosine <= _MAX_SQUARE_COSINE:
        return np.array([[1, 0], [0, 1]])
    return np.empty((0, 2), np.int64)


def _indices(sites: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """array_row, array_col int64 (num_points,) in the orientation that `array_positions` promises."""
    steps = _steps(sites, basis)
    line, square, staggered = (len(steps) == number for number in (1, 2, 3))
    steps = np.concatenate([steps, -steps])
    directions = steps @ basis
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    # Turned by 90 degrees a square array is the same array: its rows are near the horizontal, axis 0.
    along, axis = np.unravel_index(directions[:, : 1 if square else 2].argmax(), (len(steps), 1 if square else 2))
    if line:
        array_col = sites @ steps[along]
        return np.zeros_like(array_col), array_col - array_col.min()
    across = np.abs(directions @ directions[along] - (0.5 if staggered else 0)) < 0.3  # to either side of the row
    across = np.where(across, directions[:, 1 - axis], -np.inf).argmax()
    array_col, array_row = np.rint(sites @ np.linalg.inv(steps[[along, across]])).astype(np.int64).T
    array_row = array_row - array_row.min()
    if staggered:
        array_col = 2 * array_col + array_row
    array_col = array_col - array_col.min()
    if staggered and (array_row[0] + array_col[0]) % 2:
        array_col += 1
    return array_row, array_col
