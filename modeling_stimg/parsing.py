"""What every reader of slides says: errors of parsers in one sentence, warnings in the name of whoever called."""

import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData, read_h5ad

from .declared_sizes import check_hdf5

_MAX_POSITION = 2.0**53  # integers beyond it are no float64
_PACKAGE = str(Path(__file__).parent)
# Legacy ST names a spot by its place, XxY, sometimes after the name of its section: 10x13, 13.064x6.086, A1_HE_15x16.
_SPOT_NAME = re.compile(r"(?:^|_)(\d{1,9}(?:\.\d+)?)x(\d{1,9}(?:\.\d+)?)$")


@contextmanager
def reading(name: str, kind: str) -> Iterator[None]:
    """Turn whatever a parser throws into one ValueError. Only parsing belongs inside: checks say more outside."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    # Parsers of damaged files raise nearly anything: OSError, EOFError, KeyError, TypeError, zlib.error.
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name} is damaged, cut short or not {kind} ({reason}): fetch or export it again") from error


def read_h5ad_file(path: Path) -> AnnData:
    """All of an .h5ad. ValueError where it is none, or cannot hold what it says it holds."""
    with reading(path.name, "an .h5ad file"):
        with h5py.File(path, "r") as file:
            check_hdf5(file)
        adata = read_h5ad(path)
        check_sparse(adata)
        return adata


def check_sparse(adata: AnnData) -> None:
    """ValueError where a sparse matrix of an AnnData in memory would make SciPy read or write beyond its arrays."""
    matrices = {"X": adata.X, "raw.X": None if adata.raw is None else adata.raw.X}
    for name in ("layers", "obsm", "varm", "obsp", "varp"):
        matrices |= {f"{name}/{key}": value for key, value in getattr(adata, name).items()}
    for name, matrix in matrices.items():
        if sp.issparse(matrix) and matrix.format in ("csr", "csc"):
            try:
                check_compressed(matrix)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error


def check_compressed(matrix: sp.csr_matrix | sp.csc_matrix) -> None:
    """ValueError where `indices` or `indptr` of a matrix are none."""
    # SciPy's own check looks at neither where indptr ends in 0.
    if len(matrix.indptr) and (matrix.indptr[-1] < 0 or np.diff(matrix.indptr).min(initial=0) < 0):
        raise ValueError("indptr must be a non-decreasing sequence")
    matrix.check_format(full_check=True)


def tell(message: str) -> None:
    """A warning in the name of the code that called the library, however deep inside it is given."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def finite(column: pd.Series, what: str) -> np.ndarray:
    """float64 (num_spots): the positions of one column. ValueError where one is missing, infinite or no number."""
    values = pd.to_numeric(column, errors="coerce").to_numpy(np.float64)
    bad = np.flatnonzero(~(np.abs(values) < _MAX_POSITION))
    if bad.size:
        raise ValueError(
            f"{what} holds {bad.size} values that are no finite number (the first: {column.iloc[bad[0]]} at spot "
            f"{column.index[bad[0]]}): give every spot its position, or leave these spots out"
        )
    return values


def positions_in_names(names: Iterable[str]) -> np.ndarray | None:
    """X and Y of spots that are all named XxY: float64 (num_spots, 2). None where one of them, or every one, is not."""
    matches = [_SPOT_NAME.search(name) for name in names]
    return np.array([match.groups() for match in matches], np.float64) if matches and all(matches) else None
