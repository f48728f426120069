"""One small slide, and how to write it in every format that `read_slide` knows."""

import gzip
import json
import struct
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from anndata import AnnData

NUM_SPOTS, NUM_GENES = 9, 6
LIBRARY = "Section_1"
SYMBOLS = ["ACTB", "MATR3", "TP53", "MATR3", "KRT8", "NA"]  # one twice, one that pandas would take for missing
MATRIX = "filtered_feature_bc_matrix"


def make_slide() -> AnnData:
    """A slide with an empty spot, a label column, and positions in an order that no reader would invent."""
    rng = np.random.default_rng(3)
    counts = rng.poisson(1.5, (NUM_SPOTS, NUM_GENES)).astype(np.float32)
    counts[4] = 0
    places = rng.permutation(40)[:NUM_SPOTS]
    obs = pd.DataFrame(
        {"label": pd.Categorical(list("aabbccaab")), "array_row": places // 8, "array_col": places % 8 + 20},
        index=[f"{'ACGTTGCAA'[i]}{'CCATGGATT'[i]}AC{i}-1" for i in range(NUM_SPOTS)],
    )
    slide = AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(NUM_GENES)]))
    slide.obsm["spatial"] = np.stack([slide.obs["array_col"] * 100.5, slide.obs["array_row"] * 100.25], axis=1)
    return slide


def with_positions(**columns) -> AnnData:
    """The slide with these columns in `obs` in place of its array positions, and no pixels."""
    slide = make_slide()
    slide.obs = slide.obs[["label"]].assign(**columns)
    del slide.obsm["spatial"]
    return slide


def legacy_names(slide: AnnData) -> list[str]:
    return [f"{col}x{row}" for row, col in zip(slide.obs["array_row"], slide.obs["array_col"], strict=True)]


def write_legacy(path: Path, slide: AnnData, transposed: bool = False) -> Path:
    table = pd.DataFrame(slide.X.toarray().astype(int), index=legacy_names(slide), columns=SYMBOLS)
    (table.T if transposed else table).to_csv(path, sep="\t")
    return path


def write_space_ranger(
    outs: Path, slide: AnnData, matrix: str = "h5", positions: str = "tissue_positions.csv", proteins: int = 0
) -> Path:
    """A Space Ranger output folder of `slide`: genes first, then `proteins` antibody features with counts of 99."""
    (outs / "spatial").mkdir(parents=True)
    counts = sp.hstack([slide.X, sp.csr_matrix(np.full((NUM_SPOTS, proteins), 99.0))]).tocsr().astype(np.int32)
    features = {
        "id": [*slide.var_names, *(f"CD{i}" for i in range(proteins))],
        "name": [*SYMBOLS, *(f"CD{i}" for i in range(proteins))],
        "feature_type": ["Gene Expression"] * NUM_GENES + ["Antibody Capture"] * proteins,
    }
    if matrix == "h5":
        write_10x_h5(outs / f"{MATRIX}.h5", counts, list(slide.obs_names), features)
    else:
        write_10x_mtx(outs / MATRIX, counts, list(slide.obs_names), features, suffix=matrix.removeprefix("mtx"))
    write_positions(outs / "spatial" / positions, position_table(slide))
    return outs


def write_10x_h5(path: Path, counts: sp.csr_matrix, barcodes: list[str], features: dict[str, list[str]]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["library_ids"] = np.array([LIBRARY.encode()])
        group = file.create_group("matrix")
        group["data"], group["indices"] = counts.data, counts.indices.astype(np.int64)
        group["indptr"], group["shape"] = counts.indptr.astype(np.int64), np.array(counts.shape[::-1], np.int32)
        group["barcodes"] = np.array(barcodes, "S")
        for key, values in features.items():
            group[f"features/{key}"] = np.array(values, "S")


def write_10x_mtx(
    folder: Path, counts: sp.csr_matrix, barcodes: list[str], features: dict[str, list[str]], suffix: str
) -> None:
    folder.mkdir()
    scipy.io.mmwrite(folder / "matrix.mtx", counts.T)
    (folder / "features.tsv").write_text("".join("\t".join(row) + "\n" for row in zip(*features.values(), strict=True)))
    (folder / "barcodes.tsv").write_text("".join(f"{barcode}\n" for barcode in barcodes))
    for path in list(folder.iterdir()) if suffix else []:
        path.with_name(path.name + suffix).write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def position_table(slide: AnnData) -> pd.DataFrame:
    """Positions as Space Ranger has them: another order than the matrix, and spots off the tissue as well."""
    table = pd.DataFrame(
        {
            "barcode": slide.obs_names,
            "in_tissue": 1,
            "array_row": slide.obs["array_row"].to_numpy(),
            "array_col": slide.obs["array_col"].to_numpy(),
            "pxl_row_in_fullres": slide.obsm["spatial"][:, 1],
            "pxl_col_in_fullres": slide.obsm["spatial"][:, 0],
        }
    )
    off_tissue = pd.DataFrame([["TTTTTTT-1", 0, 77, 77, 1.0, 1.0]], columns=table.columns)
    return pd.concat([table[::-1], off_tissue], ignore_index=True)


def write_positions(path: Path, table: pd.DataFrame) -> None:
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow")
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, header=not path.name.endswith("_list.csv"))


def assert_same_slide(result: AnnData, expected: AnnData) -> None:
    """Counts, positions and the order of spots and genes: what every format can carry."""
    assert isinstance(result.X, sp.csr_matrix)
    np.testing.assert_array_equal(result.X.toarray(), expected.X.toarray())
    for name in ("array_row", "array_col"):
        assert result.obs[name].dtype == np.int64
        np.testing.assert_array_equal(result.obs[name], expected.obs[name])


def write_spatialdata(store: Path, tables: dict[str, AnnData], shapes: dict | None = None) -> Path:
    """A store as spatialdata writes it: tables as AnnData in tables/, shapes as GeoParquet in shapes/.

    `shapes`: for each region, geometries as WKB by instance.
    """
    import zarr
    from anndata.io import write_elem

    root = zarr.open_group(store, mode="w")
    group = root.create_group("tables")
    for name, table in tables.items():
        write_elem(group, name, table)
        group[name].attrs.update({"spatialdata-encoding-type": "ngff:regions_table", "version": "0.1"})
    for name, (index, geometries) in (shapes or {}).items():
        import pyarrow as pa
        from pyarrow import parquet

        root.require_group("shapes").create_group(name)
        frame = pd.DataFrame({"geometry": geometries, "radius": 1.0}, index=pd.Index(index, name="cell_id"))
        geo = {"version": "1.0.0", "primary_column": "geometry", "columns": {"geometry": {"encoding": "WKB"}}}
        written = pa.Table.from_pandas(frame)
        written = written.replace_schema_metadata({**written.schema.metadata, b"geo": json.dumps(geo).encode()})
        parquet.write_table(written, store / "shapes" / name / "shapes.parquet")
    return store


def annotating(slide: AnnData, region: str | list[str]) -> AnnData:
    """A table whose rows are the shapes 100, 101, ... of `region`, a name, or one of every row; no positions."""
    table = AnnData(slide.X, obs=slide.obs[["label"]], var=slide.var)
    table.obs["region"] = pd.Categorical([region] * slide.n_obs if isinstance(region, str) else region)
    table.obs["instance_id"] = np.arange(slide.n_obs) + 100
    regions = list(table.obs["region"].cat.categories)
    attrs = {"region": regions, "region_key": "region", "instance_key": "instance_id"}
    table.uns["spatialdata_attrs"] = attrs
    return table


def point(x: float, y: float) -> bytes:
    return struct.pack("<BIdd", 1, 1, x, y)


def square(x: float, y: float) -> bytes:
    """A polygon of side 10 around (x, y)."""
    corners = [(x - 5, y - 5), (x + 5, y - 5), (x + 5, y + 5), (x - 5, y + 5), (x - 5, y - 5)]
    return struct.pack("<BIII", 1, 3, 1, 5) + b"".join(struct.pack("<dd", *corner) for corner in corners)
