"""Space Ranger output folders: Visium, CytAssist (6.5 and 11 mm) and the bins of Visium HD.

File formats: 10x Genomics, "Space Ranger Outputs", "Spatial Outputs" and "Feature-Barcode Matrices"
(10xgenomics.com/support/software/space-ranger).
"""

import gzip
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata import AnnData
from anndata.utils import make_index_unique

from .declared_sizes import check_hdf5, check_matrix_market
from .parsing import check_compressed, finite, reading, tell

MATRIX = "filtered_feature_bc_matrix"
HD_DEFAULT = "square_008um"  # the bins that Space Ranger itself analyses first
_POSITION_FILES = ("tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet")
_POSITION_COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
# Visium HD names a bin by its size, row and column: s_008um_00301_00321-1.
_BIN_NAME = re.compile(r"s_\d+um_(\d{1,9})_(\d{1,9})(?:-\d+)?")


def space_ranger_outs(folder: Path) -> Path:
    """The folder that holds the counts and `spatial/`: `folder` itself, its `outs/`, or one bin size of Visium HD.

    Of Visium HD, which has a folder for each bin size in `binned_outputs/`, that is `square_008um`, with a warning;
    where it is not there, the only one.

    Raises:
        ValueError: neither is there, or there are several bin sizes without 8 um.
    """
    for bins in (folder / "binned_outputs", folder / "outs" / "binned_outputs", folder):
        sizes = sorted(path.name for path in bins.glob("square_*um") if _is_outs(path))
        if sizes:
            return _bin_size(bins, sizes)
    for outs in (folder, folder / "outs"):
        if _is_outs(outs):
            return outs
    found = sorted(entry.name for entry in folder.iterdir())
    raise ValueError(
        f"not a Space Ranger output folder: looked for {MATRIX}.h5 (or {MATRIX}/) and spatial/, here and in outs/, "
        f"found {', '.join(found[:8]) or 'nothing'}{', ...' if len(found) > 8 else ''}: pass the folder that holds both"
    )


def _is_outs(folder: Path) -> bool:
    has_matrix = (folder / f"{MATRIX}.h5").is_file() or (folder / MATRIX).is_dir()
    return has_matrix and (folder / "spatial").is_dir()


def _bin_size(bins: Path, sizes: list[str]) -> Path:
    """The folder of one bin size among `sizes`."""
    if len(sizes) == 1:
        return bins / sizes[0]
    if HD_DEFAULT not in sizes:
        raise ValueError(
            f"Visium HD, one slide per bin size ({', '.join(sizes)}): pass the folder of one of them, e.g. "
            f"{bins / sizes[-1]}"
        )
    others = ", ".join(size for size in sizes if size != HD_DEFAULT)
    tell(f"{bins}: Visium HD, {HD_DEFAULT} is read; for other bins ({others}) pass their folder")
    return bins / HD_DEFAULT


def read_space_ranger(outs: Path) -> AnnData:
    """The slide in one folder of `space_ranger_outs`, unchecked."""
    name = f"{MATRIX}.h5" if (outs / f"{MATRIX}.h5").is_file() else MATRIX
    with reading(name, "a 10x count matrix"):
        adata = _read_10x_h5(outs / name) if name.endswith(".h5") else _read_10x_mtx(outs / name)
    is_gene = (adata.var["feature_types"] == "Gene Expression").to_numpy()
    if not is_gene.all():
        kinds = ", ".join(sorted(set(adata.var["feature_types"][~is_gene])))
        tell(f"{outs}: left out {np.sum(~is_gene)} features that are no genes ({kinds})")
        adata = adata[:, is_gene].copy()
    adata.var_names = make_index_unique(pd.Index(adata.var["gene_name"]).rename(None))

    folder = outs.resolve()
    library = adata.uns.pop("library_id", folder.parent.name if folder.name == "outs" else folder.name)
    path = next((outs / "spatial" / name for name in _POSITION_FILES if (outs / "spatial" / name).is_file()), None)
    reason = "holds no positions" if path is None else _unreadable(path)
    sites = bin_sites(adata.obs_names) if reason else None
    if sites is not None:
        tell(f"{outs}/spatial {reason}: rows and columns are those of the barcodes, and pixel positions are left out")
        adata.obs["array_row"], adata.obs["array_col"] = sites.T
        adata.obsm["spatial"] = sites[:, ::-1].astype(np.float64)  # (num_spots, 2), in bins
        return adata
    positions = _positions_of(adata.obs_names, path)
    for column in ("in_tissue", "array_row", "array_col"):
        adata.obs[column] = positions[column].to_numpy()
    pixels = [finite(positions[column], column) for column in ("pxl_col_in_fullres", "pxl_row_in_fullres")]
    adata.obsm["spatial"] = np.stack(pixels, axis=1)  # (num_spots, 2)
    adata.uns["spatial"] = {library: _images_and_scales(outs / "spatial")}
    return adata


def _unreadable(path: Path) -> str:
    """Why the positions file cannot be read here, "" where it can."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            return f"holds {path.name}, which needs pyarrow (pip install 'stimg[parquet]')"
    return ""


def bin_sites(names: Iterable[str]) -> np.ndarray | None:
    """Row and column of bins that are all named as Visium HD does: int64 (num_bins, 2). None where one is not."""
    matches = [_BIN_NAME.fullmatch(name) for name in names]
    return np.array([match.groups() for match in matches]).astype(np.int64) if matches and all(matches) else None


def _read_10x_h5(path: Path) -> AnnData:
    """Counts of a 10x HDF5 file, version 3. `uns["library_id"]`: the library, where the file names it."""
    with h5py.File(path, "r") as file:
        check_hdf5(file)
        matrix, features, libraries = file["matrix"], file["matrix/features"], file.attrs.get("library_ids", [])
        # Genes x barcodes in CSC is barcodes x genes in CSR: the same three arrays. The file's are int64: of Visium HD
        # they are read as what SciPy makes of them in the end, so that they are not in memory twice.
        data, indices, indptr = (matrix[key] for key in ("data", "indices", "indptr"))
        narrow = np.int32 if data.shape[0] < 2**31 else np.int64
        counts = data.astype(np.float32)[:], indices.astype(narrow)[:], indptr.astype(narrow)[:]
        counts = sp.csr_matrix(counts, shape=matrix["shape"][:][::-1])
        check_compressed(counts)
        names = [features[key].asstr()[:] for key in ("id", "name", "feature_type")]
        adata = _10x_slide(counts, matrix["barcodes"].asstr()[:], names)
    if len(libraries):
        adata.uns["library_id"] = libraries[0].decode() if isinstance(libraries[0], bytes) else str(libraries[0])
    return adata


def _read_10x_mtx(folder: Path) -> AnnData:
    """Counts of the folder `matrix.mtx`, `features.tsv`, `barcodes.tsv`, each gzipped or not."""
    paths = [folder / name for name in ("matrix.mtx", "features.tsv", "barcodes.tsv")]
    paths = [path if path.is_file() else path.with_name(f"{path.name}.gz") for path in paths]
    table = {"sep": "\t", "header": None, "dtype": str, "keep_default_na": False}
    features, barcodes = (pd.read_csv(path, **table) for path in paths[1:])
    check_matrix_market(paths[0], len(features), len(barcodes))
    with gzip.open(paths[0]) if paths[0].suffix == ".gz" else paths[0].open("rb") as file:
        counts = sp.csr_matrix(scipy.io.mmread(_Text(file)).T, dtype=np.float32)
    return _10x_slide(counts, barcodes[0].to_numpy(), [features[column].to_numpy() for column in range(3)])


class _Text:
    """A file of text for SciPy, whose parser runs beyond the end of what it has read where there are bytes of 0."""

    def __init__(self, file: IO[bytes]):
        self.file = file

    def read(self, size: int = -1) -> bytes:
        """ValueError where it is no text."""
        content = self.file.read(size)
        if b"\0" in content:
            raise ValueError("bytes of 0 among its numbers")
        return content


def _10x_slide(counts: sp.csr_matrix, barcodes: np.ndarray, features: list[np.ndarray]) -> AnnData:
    """`features`: ids, symbols, types. The genes are named by their ids for now, because symbols repeat."""
    var = dict(zip(("gene_ids", "gene_name", "feature_types"), features, strict=True))
    return AnnData(counts, obs=pd.DataFrame(index=barcodes), var=pd.DataFrame(var, index=features[0]))


def _positions_of(barcodes: pd.Index, path: Path | None) -> pd.DataFrame:
    """The rows of the positions file at `path` that belong to `barcodes`, in their order."""
    if path is None:
        raise ValueError(f"spatial/ holds no positions: looked for {', '.join(_POSITION_FILES)}, add one of them")
    with reading(f"spatial/{path.name}", "spot positions"):
        positions = _read_position_file(path)[_POSITION_COLUMNS].set_index("barcode")
        positions.index = positions.index.map(str)  # a damaged Parquet file may hold lists
    if not positions.index.is_unique:
        twice = positions.index[positions.index.duplicated()][0]
        raise ValueError(f"spatial/{path.name} holds barcode {twice} more than once: give each barcode one position")
    missing = barcodes[~barcodes.isin(positions.index)]
    if len(missing):
        raise ValueError(
            f"{len(missing)} of {len(barcodes)} barcodes of the matrix have no position in spatial/{path.name} "
            f"(e.g. {missing[0]}): counts and spatial/ must be of one Space Ranger run"
        )
    return positions.loc[barcodes]


def _read_position_file(path: Path) -> pd.DataFrame:
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"reading {path} needs pyarrow: pip install 'stimg[parquet]'") from error
        return parquet.read_table(path, columns=_POSITION_COLUMNS).to_pandas()
    with path.open() as file:  # tissue_positions_list.csv has no header, unless someone renamed tissue_positions.csv
        has_header = file.readline().startswith("barcode")
    return pd.read_csv(path, names=None if has_header else _POSITION_COLUMNS)


def _images_and_scales(spatial: Path) -> dict[str, dict[str, Any]]:
    """What scanpy keeps in `uns["spatial"][library_id]`: images float32 (height, width, 3) in [0, 1], scale factors."""
    from PIL import Image

    images = {}
    for name in ("hires", "lowres"):
        path = spatial / f"tissue_{name}_image.png"
        if path.is_file():
            with reading(f"spatial/{path.name}", "an image"), Image.open(path) as image:
                images[name] = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    scales = spatial / "scalefactors_json.json"
    if not scales.is_file():
        return {"images": images, "scalefactors": {}}
    with reading(f"spatial/{scales.name}", "JSON"):
        factors = json.loads(scales.read_text(encoding="utf-8"))
    if not isinstance(factors, dict):
        raise ValueError(f"spatial/{scales.name} holds a {type(factors).__name__}: expected scale factors by name")
    # What no .h5ad can hold is no scale.
    factors = {name: value for name, value in factors.items() if isinstance(value, int | float | str)}
    return {"images": images, "scalefactors": factors}
