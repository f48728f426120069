"""SpatialData stores: one table of counts, and where the table has no positions, the centroids of its shapes.

Read with anndata and the formats that a store is made of, without the `spatialdata` package: a table is an AnnData in
`tables/NAME`, `uns["spatialdata_attrs"]` tells which shapes it annotates (`region`, `region_key`, `instance_key`), and
these are GeoParquet in `shapes/REGION/shapes.parquet` (spatialdata.scverse.org, "Design document").
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_zarr

from .declared_sizes import check_declared, zarr_bytes
from .parsing import check_sparse, reading

_ROOTS = ("zarr.json", ".zgroup", ".zattrs")
# What zarr may decode with. Others are refused: the codec "pickle" of version 2 would run what it reads.
_CODECS = ("blosc", "bz2", "delta", "fixedscaleoffset", "gzip", "lz4", "lzma", "shuffle", "zlib", "zstd")
_ZARR_CODECS = {*_CODECS, *(f"numcodecs.{name}" for name in _CODECS), "bytes", "crc32c", "endian", "sharding_indexed"}
_ZARR_CODECS |= {"transpose", "vlen-array", "vlen-bytes", "vlen-utf8"}


def is_store(path: Path) -> bool:
    """Whether a folder is the root of a zarr store, or a group in one."""
    return any((path / name).is_file() for name in _ROOTS)


def read_store(path: Path, table: str | None = None) -> AnnData:
    """The slide in a SpatialData store, in one of its tables, or in a store of one AnnData; unchecked.

    Args:
        path: `store.zarr`, or `store.zarr/tables/NAME`.
        table: its name, where the store holds several.

    Returns:
        The table, with `obsm["spatial"]` (x, y) float64 from its shapes where it has neither that nor array positions.

    Raises:
        ValueError: no table, several, not the one that is named, a damaged store, a codec that is not trusted, or
            shapes that lack rows of the table.
        ImportError: shapes are needed, and pyarrow or shapely are missing.
    """
    if _is_anndata(path):
        if table is not None:
            raise ValueError(f"table is {table!r}, but this is one AnnData: leave it out")
        store = path.parent.parent if path.parent.name in ("tables", "table") else None
        return _read_table(path, store)
    tables = {
        folder.name: folder
        for parent in ("tables", "table")  # the second one until spatialdata 0.1
        for folder in sorted((path / parent).glob("*"))
        if _is_anndata(folder)
    }
    found = ", ".join(tables)
    if not tables:
        raise ValueError("the store holds no table of counts: looked for an AnnData in tables/")
    if table is None and len(tables) > 1:
        raise ValueError(
            f"the store holds {len(tables)} tables ({found}): name one, table={next(iter(tables))!r}, or pass its "
            f"path, {next(iter(tables.values()))}"
        )
    if table is not None and table not in tables:
        raise ValueError(f"the store holds no table {table!r}: expected one of {found}")
    return _read_table(next(iter(tables.values())) if table is None else tables[table], path)


def _is_anndata(folder: Path) -> bool:
    """Whether a group of a store is an AnnData, by its attributes: those of version 3, or of version 2."""
    for name in ("zarr.json", ".zattrs"):
        if (folder / name).is_file():
            with reading(name, "JSON"):
                content = json.loads((folder / name).read_text(encoding="utf-8"))
                return (content.get("attributes", {}) if name == "zarr.json" else content).get(
                    "encoding-type"
                ) == "anndata"
    return False


def _read_table(folder: Path, store: Path | None) -> AnnData:
    check_arrays(folder)
    with reading(folder.name, "an AnnData in zarr"):
        adata = read_zarr(folder)
        check_sparse(adata)
    has_positions = "spatial" in adata.obsm or {"array_row", "array_col"} <= set(adata.obs)
    attrs = adata.uns.get("spatialdata_attrs")
    if store is not None and not has_positions and isinstance(attrs, Mapping):
        adata.obsm["spatial"] = _positions_of_shapes(adata, attrs, store)
    return adata


def _positions_of_shapes(adata: AnnData, attrs: Mapping[str, Any], store: Path) -> np.ndarray:
    """Centroids (x, y) of the shape of every row of the table, float64 (n_obs, 2), in the shapes' coordinates."""
    region_key, instance_key = attrs.get("region_key"), attrs.get("instance_key")
    if region_key not in adata.obs or instance_key not in adata.obs:
        raise ValueError(f"obs lacks {region_key!r} or {instance_key!r}, which tell the shape of every row")
    xy = np.full((adata.n_obs, 2), np.nan)
    codes, regions = pd.factorize(adata.obs[region_key])
    for code, region in enumerate(regions):
        rows = np.flatnonzero(codes == code)
        centroids = _centroids(store / "shapes" / str(region))
        if not centroids.index.is_unique:
            twice = centroids.index[centroids.index.duplicated()][0]
            raise ValueError(f"shapes/{region} holds instance {twice} more than once: give each instance one shape")
        shape = centroids.index.get_indexer(pd.Index(adata.obs[instance_key].to_numpy()[rows]))
        if (shape < 0).any():
            raise ValueError(f"shapes/{region} lacks {np.sum(shape < 0)} of {len(rows)} instances of the table")
        xy[rows] = centroids.to_numpy()[shape]
    return xy


def _centroids(folder: Path) -> pd.DataFrame:
    """x and y of every shape, by its instance."""
    path = folder / "shapes.parquet"
    if not path.is_file():
        raise ValueError(
            f'the table has no obsm["spatial"], and {folder.parent.name}/{folder.name}/shapes.parquet, whose centroids '
            "would be the positions, is not there: add the positions to the table"
        )
    try:
        import shapely
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow and shapely: pip install 'stimg[spatialdata]'") from error
    with reading(f"{folder.name}/{path.name}", "GeoParquet"):
        geo = json.loads(parquet.read_schema(path).metadata[b"geo"])
        column = geo["primary_column"]
        frame = parquet.read_table(path, columns=[column], use_pandas_metadata=True).to_pandas()
        centroids = shapely.centroid(shapely.from_wkb(frame[column].to_numpy()))
        return pd.DataFrame({"x": shapely.get_x(centroids), "y": shapely.get_y(centroids)}, index=frame.index)


def check_arrays(folder: Path) -> None:
    """Refuse a store that says it holds more than it can, or that would be decoded by anything but the usual codecs."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    declared = 0
    for name in (".zarray", ".zmetadata", "zarr.json"):
        for path in sorted(folder.rglob(name)):
            with reading(path.name, "JSON"):
                content = json.loads(path.read_text(encoding="utf-8"))
            unknown = sorted(set(_codecs(content)) - _ZARR_CODECS)
            if unknown:
                raise ValueError(f"{path} asks for the codec {unknown[0]!r}, which is not trusted: it is not read")
            with reading(path.name, "the metadata of an array"):
                declared += 0 if name == ".zmetadata" else zarr_bytes(content)
                check_declared(declared, size)


def _codecs(content: Any, is_codec: bool = False) -> Iterator[str]:
    """Names of the codecs in the metadata of an array, of either version."""
    if isinstance(content, list):
        for item in content:
            yield from _codecs(item, is_codec)
    elif isinstance(content, dict):
        if is_codec:
            yield str(content.get("id", content.get("name", "")))
        for key, value in content.items():
            yield from _codecs(value, key in ("compressor", "filters", "codecs", "index_codecs"))
    elif is_codec and isinstance(content, str):  # version 3 allows a bare name
        yield content
