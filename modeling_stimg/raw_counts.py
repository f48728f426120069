"""Where an AnnData holds its raw counts, and the counts as CSR: in memory, or read from its file in blocks."""

from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp
from anndata import AnnData
from anndata.abc import CSCDataset, CSRDataset

from .counts_stimg import check_counts
from .parsing import check_compressed, reading, tell

# Layers that are looked in without being named. Others may hold a part of the counts, such as those of unspliced RNA.
_COUNT_LAYERS = ("counts", "raw_counts")
_BLOCK_VALUES = 1 << 24  # of a dense matrix on disk that are in memory at once
_ALIGNED = ("obsm", "varm", "obsp", "varp", "layers")


def with_raw_counts(adata: AnnData, layer: str | None = None) -> AnnData:
    """A new AnnData with raw counts in `X`; `adata` is untouched, its large arrays are shared.

    The counts are those of `X`, else of `layers["counts"]`, else of `layers["raw_counts"]`, else of `.raw`: the first
    that holds finite non-negative integers. Where they are not those of `X`, a warning tells whose they are, and what
    stood in `X` is kept in `layers["X"]`. From a `.raw` of other genes, the genes are those of `.raw`, and what belongs
    to the genes of `X` (layers, varm, varp) is left out.

    Of an AnnData that is backed by a file, the counts alone are read, in blocks where they are dense; `.raw`, and an
    `X` that holds none, stay on disk and are not in the result.

    Args:
        layer: where the counts are: the name of a layer, `"X"` or `"raw"`; None = the order above.

    Returns:
        AnnData with `X` CSR (num_spots, num_genes), indices sorted, of the type that the counts have.

    Raises:
        ValueError: an empty slide, no raw counts, or an unknown `layer`.
    """
    if adata.is_view:  # a view's arrays are cut out at every access: do it once
        adata = adata.to_memory() if adata.isbacked else adata.copy()
    if 0 in adata.shape:
        raise ValueError(
            f"the slide is empty ({adata.n_obs} spots, {adata.n_vars} genes): pass one with spots and genes"
        )
    place = _place_of_counts(adata, layer)
    counts = _as_csr(_values(adata, place), _words(place))
    shared = {name: dict(getattr(adata, name)) for name in _ALIGNED}
    if place != "X" and adata.X is not None and not adata.isbacked and "X" not in shared["layers"]:
        shared["layers"]["X"] = adata.X
    var, raw = adata.var, None if adata.isbacked else adata.raw
    if place == "raw":
        raw = None
        if not adata.raw.var_names.equals(adata.var_names):
            var = adata.raw.var
            shared |= {"varm": {}, "varp": {}, "layers": {}}
    return AnnData(counts, obs=adata.obs.copy(), var=var.copy(), uns=_copied(adata.uns), raw=raw, **shared)


def _copied(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of `uns` copied, the arrays in them shared: a new key in the result is none in the input."""
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _values(adata: AnnData, place: str) -> Any:
    """The matrix at "X", "raw" or "layers/NAME"."""
    if place == "raw":
        return None if adata.raw is None else adata.raw.X
    return adata.X if place == "X" else adata.layers[place.removeprefix("layers/")]


def _words(place: str) -> str:
    """As a user writes it."""
    return {"X": "X", "raw": "adata.raw"}.get(place, f'adata.layers["{place.removeprefix("layers/")}"]')


def _place_of_counts(adata: AnnData, layer: str | None) -> str:
    """Where the counts are, with a warning where it is neither `X` nor what was asked for."""
    if layer is not None:
        place = f"layers/{layer}" if layer in adata.layers else layer
        if place not in ("X", "raw", f"layers/{layer}"):
            found = ", ".join(["X", *adata.layers, *(["raw"] if adata.raw is not None else [])])
            raise ValueError(f"there is no layer {layer!r}: expected one of {found}")
        _check(adata, place)
        return place
    try:
        _check(adata, "X")
        return "X"
    except ValueError as error:
        fault = str(error).rstrip(".")
    for place in [*(f"layers/{name}" for name in _COUNT_LAYERS if name in adata.layers), "raw"]:
        if _holds_counts(adata, place):
            tell(f"{fault.split(':')[0]}: the counts of {_words(place)} are taken")
            return place
    for name in sorted(adata.layers):
        if _holds_counts(adata, f"layers/{name}"):
            raise ValueError(f'{fault}; here adata.layers["{name}"] holds integer counts, pass layer="{name}"')
    raise ValueError(f"{fault}; here no layer of this slide holds them, nor does its .raw")


def _holds_counts(adata: AnnData, place: str) -> bool:
    try:
        _check(adata, place)
    except ValueError:
        return False
    values = _values(adata, place)
    return bool(values.max() > 0) if isinstance(values, np.ndarray) or sp.issparse(values) else True


def _check(adata: AnnData, place: str) -> None:
    """ValueError, in the words of `check_counts`, unless the values there are counts. Of a file its first block."""
    values = _values(adata, place)
    if isinstance(values, h5py.Dataset):
        values = values[: _rows_at_once(values)]
    elif isinstance(values, CSRDataset | CSCDataset):
        values = values.group["data"][:_BLOCK_VALUES]
    elif not isinstance(values, np.ndarray) and not sp.issparse(values):
        raise ValueError(
            f"{_words(place)} is a {type(values).__name__}: pass raw counts in memory, as a NumPy array or a scipy CSR"
        )
    _check_values(values, place)


def _check_values(values: Any, where: str) -> None:
    try:
        check_counts(values.data if sp.issparse(values) else values)
    except ValueError as error:
        raise ValueError(str(error).replace("X holds", f"{_words(where)} holds", 1)) from error


def _rows_at_once(values: h5py.Dataset) -> int:
    return max(_BLOCK_VALUES // max(values.shape[1], 1), 1)


def _as_csr(values: Any, name: str) -> sp.csr_matrix:
    """Counts (num_spots, num_genes) as canonical CSR; its arrays are those of `values` where they can be."""
    if isinstance(values, h5py.Dataset):
        step = _rows_at_once(values)
        blocks = []
        for start in range(0, values.shape[0], step):
            blocks.append(sp.csr_matrix(values[start : start + step]))
            check_counts(blocks[-1].data)
        return sp.vstack(blocks, format="csr")
    on_disk = isinstance(values, CSRDataset | CSCDataset)
    with reading(name, "a matrix of numbers"):
        if on_disk:
            values = values.to_memory()
        matrix = sp.csc_matrix(values) if sp.issparse(values) and values.format == "csc" else sp.csr_matrix(values)
        check_compressed(matrix)  # an index out of bounds would otherwise read foreign memory later on
        matrix = matrix.tocsr()
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    if on_disk:  # of which only the first block has been looked at
        check_counts(matrix.data)
    return matrix
