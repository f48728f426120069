"""`read_slide`: every format of one slide reads as the same slide, and every bad input says what to do."""

import gzip
import json
import os
import sys
import warnings
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
from anndata import AnnData
from PIL import Image

from modeling_stimg.slides import read_slide

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


# One slide, every format


def test_h5ad_and_memory_keep_everything(tmp_path):
    slide = make_slide()
    slide.layers["normalized"] = slide.X * 0.5
    slide.obsm["X_pca"] = np.arange(NUM_SPOTS * 2.0).reshape(NUM_SPOTS, 2)
    slide.uns["meta"] = {"organ": "breast"}
    slide.raw = slide.copy()
    slide.write_h5ad(tmp_path / "slide.h5ad")
    for result in (read_slide(slide), read_slide(tmp_path / "slide.h5ad"), read_slide(str(tmp_path / "slide.h5ad"))):
        assert_same_slide(result, slide)
        assert list(result.obs_names) == list(slide.obs_names)
        assert list(result.var_names) == list(slide.var_names)
        assert list(result.obs.columns) == ["label", "array_row", "array_col"]
        assert list(result.obs["label"]) == list(slide.obs["label"])
        np.testing.assert_array_equal(result.obsm["spatial"], slide.obsm["spatial"])
        np.testing.assert_array_equal(result.obsm["X_pca"], slide.obsm["X_pca"])
        np.testing.assert_array_equal(result.layers["normalized"].toarray(), slide.layers["normalized"].toarray())
        np.testing.assert_array_equal(result.raw.X.toarray(), slide.raw.X.toarray())
        assert result.uns["meta"] == {"organ": "breast"}


@pytest.mark.parametrize("matrix", ["h5", "mtx", "mtx.gz"])
@pytest.mark.parametrize("positions", ["tissue_positions.csv", "tissue_positions_list.csv", "tissue_positions.parquet"])
def test_space_ranger_folders(tmp_path, matrix, positions):
    slide = make_slide()
    result = read_slide(write_space_ranger(tmp_path / LIBRARY / "outs", slide, matrix, positions))
    assert_same_slide(result, slide)
    assert list(result.obs_names) == list(slide.obs_names)
    assert list(result.var["gene_ids"]) == list(slide.var_names)
    np.testing.assert_array_equal(result.obsm["spatial"], slide.obsm["spatial"])  # (pxl_col, pxl_row)
    assert list(result.uns["spatial"]) == [LIBRARY]


@pytest.mark.parametrize("name", ["slide.tsv", "slide.tsv.gz", "slide.txt", "slide.txt.gz"])
@pytest.mark.parametrize("transposed", [False, True])
def test_legacy_tables(tmp_path, name, transposed):
    slide = make_slide()
    result = read_slide(write_legacy(tmp_path / name, slide, transposed))
    assert_same_slide(result, slide)
    assert list(result.obs_names) == legacy_names(slide)
    assert list(result.var_names) == SYMBOLS
    np.testing.assert_array_equal(result.obsm["spatial"], slide.obs[["array_col", "array_row"]])
    assert result.obsm["spatial"].dtype == np.float64


def test_reading_twice_changes_nothing(tmp_path):
    once = read_slide(write_space_ranger(tmp_path / "outs", make_slide()))
    once.write_h5ad(tmp_path / "slide.h5ad")
    for twice in (read_slide(once), read_slide(tmp_path / "slide.h5ad")):
        assert_same_slide(twice, once)
        pd.testing.assert_frame_equal(twice.obs, once.obs)
        pd.testing.assert_frame_equal(twice.var, once.var)


# An AnnData in memory


def test_input_is_untouched_and_large_arrays_are_shared():
    slide = with_positions(array_x=np.arange(NUM_SPOTS) + 0.9, array_y=np.arange(NUM_SPOTS) * 2.0)
    slide.obsm["X_pca"] = np.ones((NUM_SPOTS, 2))
    slide.uns["spatial"] = {LIBRARY: {"scalefactors": {}}}
    before = slide.copy()
    result = read_slide(slide)
    assert np.shares_memory(result.X.data, slide.X.data)
    assert np.shares_memory(result.obsm["X_pca"], slide.obsm["X_pca"])
    result.obs["label"] = "changed"
    result.var["changed"] = 1
    result.obsm["X_stimg"] = np.zeros((NUM_SPOTS, 2))
    result.layers["changed"] = result.X
    result.uns["spatial"][LIBRARY]["changed"] = 1
    pd.testing.assert_frame_equal(slide.obs, before.obs)
    pd.testing.assert_frame_equal(slide.var, before.var)
    assert list(slide.obsm) == ["X_pca"]
    assert list(slide.layers) == []
    assert slide.uns == before.uns


@pytest.mark.parametrize("convert", [np.asarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint16])
def test_any_matrix_becomes_csr_of_its_own_type(convert, dtype):
    slide = make_slide()
    given = AnnData(convert(slide.X.toarray().astype(dtype)), obs=slide.obs, var=slide.var)
    result = read_slide(given)
    assert_same_slide(result, slide)
    assert result.X.dtype == dtype
    assert type(given.X) is type(convert(np.eye(2)))


def test_split_and_unsorted_entries_are_summed_without_touching_the_input():
    slide = make_slide()
    # Spot 0 has gene 2 twice (1 + 3), and its genes out of order.
    arrays = (np.array([1.0, 5.0, 3.0]), np.array([2, 0, 2]), np.array([0] + [3] * NUM_SPOTS))
    split = sp.csr_matrix(arrays, shape=slide.shape)
    result = read_slide(AnnData(split, obs=slide.obs, var=slide.var))
    assert result.X.indices.tolist() == [0, 2]
    assert result.X.data.tolist() == [5.0, 4.0]
    assert split.indices.tolist() == [2, 0, 2]
    assert split.data.tolist() == [1.0, 5.0, 3.0]


def test_views_and_backed_slides(tmp_path):
    slide = make_slide()
    slide.write_h5ad(tmp_path / "slide.h5ad")
    keep = np.array([7, 2, 5])
    view = slide[keep]
    result = read_slide(view)
    assert view.is_view
    assert type(result.obsm["spatial"]) is np.ndarray  # no view of a slide that may go away
    assert_same_slide(result, slide[keep].copy())
    backed = anndata.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    assert_same_slide(read_slide(backed), slide)
    backed.file.close()


def test_repeated_names_and_places_are_allowed_in_silence():
    slide = make_slide()
    slide.obs_names = ["spot"] * NUM_SPOTS
    slide.obs["array_row"], slide.obs["array_col"] = 5, 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = read_slide(slide)
    assert list(result.obs_names) == ["spot"] * NUM_SPOTS
    assert set(result.obs["array_row"]) == {5}
    assert set(result.obs["array_col"]) == {7}


# Array positions

ROWS, COLS = np.arange(NUM_SPOTS), np.arange(NUM_SPOTS) * 3 + 1


@pytest.mark.parametrize(
    "columns",
    [
        {"array_row": ROWS, "array_col": COLS},
        {"array_y": ROWS + 0.1, "array_x": COLS - 0.4},
        {"row": ROWS, "col": COLS},
        {"array_row": ROWS, "array_col": COLS, "array_y": COLS, "array_x": ROWS, "row": COLS, "col": ROWS},
        {"array_row": COLS, "array_y": ROWS, "array_x": COLS, "row": COLS, "col": ROWS},
    ],
    ids=["visium", "legacy", "plain", "visium first", "half a visium pair"],
)
def test_position_columns_in_their_order(columns):
    slide = with_positions(**columns)
    result = read_slide(slide)
    np.testing.assert_array_equal(result.obs["array_row"], ROWS)
    np.testing.assert_array_equal(result.obs["array_col"], COLS)
    kept = [name for name in columns if name not in ("array_row", "array_col")]
    pd.testing.assert_frame_equal(result.obs[kept], slide.obs[kept])


@pytest.mark.parametrize("dtype", ["int8", "Int32", "float64", "Float64", "str", "category"])
def test_positions_of_any_type_become_int64(dtype):
    result = read_slide(with_positions(array_row=pd.Series(ROWS).astype(dtype).array, array_col=COLS))
    assert result.obs["array_row"].dtype == np.int64
    np.testing.assert_array_equal(result.obs["array_row"], ROWS)


@pytest.mark.parametrize(
    ("name", "row", "col"),
    [("10x13", 13, 10), ("13.064x6.086", 6, 13), ("17.907x4.967", 5, 18), ("1_CN73_E1_HE__15x16", 16, 15)],
)
def test_positions_in_spot_names(name, row, col):
    slide = with_positions()
    slide.obs_names = [name, *(f"{i}x0" for i in range(1, NUM_SPOTS))]
    result = read_slide(slide)
    assert (result.obs["array_row"].iloc[0], result.obs["array_col"].iloc[0]) == (row, col)
    assert result.obs_names[0] == name


@pytest.mark.parametrize("value", [np.nan, np.inf, None, "left"])
def test_positions_must_be_finite(value):
    values = pd.Series(ROWS, dtype=object)
    values[3] = value
    slide = with_positions(array_row=values.array, array_col=COLS)
    with pytest.raises(ValueError, match=rf'obs\["array_row"\] holds 1 values .* spot {slide.obs_names[3]}\)'):
        read_slide(slide)


def test_missing_nullable_position():
    slide = with_positions(array_row=pd.array([None, *ROWS[1:]], dtype="Int32"), array_col=COLS)
    with pytest.raises(ValueError, match=r'obs\["array_row"\] holds 1 values that are no finite number'):
        read_slide(slide)


def test_no_positions_at_all():
    with pytest.raises(ValueError, match=r"looked in obs for array_row \+ array_col, array_y .* 10x13: add") as error:
        read_slide(with_positions())
    assert "pixel" not in str(error.value)


@pytest.mark.parametrize("where", ["obsm", "obs"])
def test_pixels_alone_do_not_define_the_array(where):
    slide = with_positions(**({"pxl_x": ROWS, "pxl_y": COLS} if where == "obs" else {}))
    if where == "obsm":
        slide.obsm["spatial"] = np.ones((NUM_SPOTS, 2))
    with pytest.raises(ValueError, match=r'pixel coordinates only.*add obs\["array_row"\].*tissue_positions\.csv'):
        read_slide(slide)


def test_one_spot_name_without_a_place_is_no_position():
    slide = with_positions()
    slide.obs_names = [*(f"{i}x1" for i in range(NUM_SPOTS - 1)), "control"]
    with pytest.raises(ValueError, match="no array positions"):
        read_slide(slide)


# Counts


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7.31, r"X holds non-integers \(max 7\.31\): pass raw counts"),
        (-2.0, r"X holds negative values \(min -2\): pass raw counts"),
        (np.nan, "X holds .*NaN or infinite values: pass raw counts"),
        (np.inf, "X holds .*NaN or infinite values: pass raw counts"),
    ],
)
@pytest.mark.parametrize("convert", [sp.csr_matrix, np.asarray])
def test_values_that_are_no_counts(value, message, convert):
    slide = make_slide()
    values = slide.X.toarray()
    values[2, 1] = value
    slide.X = convert(values)
    with pytest.raises(ValueError, match=message):
        read_slide(slide)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (["counts"], r'adata\.layers\["counts"\] holds integer counts, set adata\.X = adata\.layers\["counts"\]$'),
        (["before", "counts"], r'adata\.layers\["counts"\] holds integer counts'),
        (["umi"], r'adata\.layers\["umi"\] holds integer counts, set adata\.X = adata\.layers\["umi"\]$'),
        ([], "no layer of this slide holds them"),
    ],
)
def test_the_sentence_names_the_layer_that_holds_the_counts(layers, message):
    slide = make_slide()
    counts = slide.X.copy()
    slide.X = np.log1p(counts)
    slide.layers["scaled"] = slide.X * 0.3
    slide.layers["zeros"] = sp.csr_matrix(slide.shape)
    for name in layers:
        slide.layers[name] = counts
    with pytest.raises(ValueError, match=message):
        read_slide(slide)


@pytest.mark.parametrize("dense", [False, True])
def test_the_sentence_names_raw_and_its_advice_works(dense):
    slide = make_slide()
    slide.raw = AnnData(slide.X.toarray() if dense else slide.X.copy(), obs=slide.obs, var=slide.var)
    slide.X = np.log1p(slide.X)
    with pytest.raises(ValueError, match=r"adata\.raw holds integer counts, pass adata\.raw\.to_adata\(\)"):
        read_slide(slide)
    assert_same_slide(read_slide(slide.raw.to_adata()), make_slide())


def test_values_that_are_no_real_numbers():
    slide = make_slide()
    with pytest.raises(ValueError, match=r"complex128.* raw counts"):
        read_slide(AnnData(slide.X.astype(np.complex128), obs=slide.obs, var=slide.var))


def test_slide_without_counts():
    with pytest.raises(ValueError, match="X is a NoneType: pass raw counts"):
        read_slide(AnnData(obs=make_slide().obs, var=make_slide().var))


@pytest.mark.parametrize(("spots", "genes"), [(0, NUM_GENES), (NUM_SPOTS, 0)])
def test_empty_slide(spots, genes):
    with pytest.raises(ValueError, match=rf"the slide is empty \({spots} spots, {genes} genes\)"):
        read_slide(make_slide()[:spots, :genes].copy())


# Files


@pytest.mark.parametrize("name", ["slide.csv", "slide.h5", "slide.zarr", "notes"])
def test_unknown_kind_of_file_lists_what_is_read(tmp_path, name):
    (tmp_path / name).mkdir() if name == "slide.zarr" else (tmp_path / name).touch()
    with pytest.raises(
        ValueError, match=rf"{name}: unknown kind of slide: read_slide reads \.h5ad files, Space Ranger"
    ):
        read_slide(tmp_path / name)


def test_nothing_there_and_nothing_to_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.h5ad does not exist: read_slide reads"):
        read_slide(tmp_path / "gone.h5ad")
    with pytest.raises(TypeError, match="cannot be read from a ndarray: read_slide reads"):
        read_slide(np.ones((3, 3)))


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_slide().write_h5ad(tmp_path / "slide.h5ad")
    assert_same_slide(read_slide("~/slide.h5ad"), make_slide())


@pytest.mark.filterwarnings("ignore:Element")  # anndata's word about the 10x file
@pytest.mark.parametrize("damage", ["cut", "text", "10x", "index"])
def test_damaged_h5ad(tmp_path, damage):
    path = tmp_path / "slide.h5ad"
    make_slide().write_h5ad(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "text":
        path.write_text("not HDF5")
    elif damage == "10x":
        (write_space_ranger(tmp_path / "outs", make_slide()) / f"{MATRIX}.h5").rename(path)
    else:
        with h5py.File(path, "a") as file:
            file["X/indices"][0] = NUM_GENES + 1000
    with pytest.raises(ValueError, match=r"slide\.h5ad: .* is damaged, cut short or not a.*: fetch or export it again"):
        read_slide(path)


# Space Ranger


def test_space_ranger_conventions(tmp_path):
    outs = write_space_ranger(tmp_path / "outs", make_slide())
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(outs / "spatial" / "tissue_hires_image.png")
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps({"tissue_hires_scalef": 0.08}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = read_slide(tmp_path)  # the parent of outs/
    assert list(result.var_names) == ["ACTB", "MATR3", "TP53", "MATR3-1", "KRT8", "NA"]
    assert result.var_names.name is None
    assert list(result.var.columns) == ["gene_ids", "gene_name", "feature_types"]
    assert list(result.obs.columns) == ["in_tissue", "array_row", "array_col"]
    assert set(result.obs["in_tissue"]) == {1}
    assert result.obsm["spatial"].dtype == np.float64
    assert result.X.dtype == np.float32
    section = result.uns["spatial"][LIBRARY]
    assert section["scalefactors"] == {"tissue_hires_scalef": 0.08}
    assert list(section["images"]) == ["hires"]
    assert section["images"]["hires"].dtype == np.float32
    np.testing.assert_allclose(section["images"]["hires"] * 255, pixels, atol=1e-3)


@pytest.mark.parametrize("matrix", ["h5", "mtx.gz"])
def test_proteins_are_left_out_with_a_warning(tmp_path, matrix):
    outs = write_space_ranger(tmp_path / "outs", make_slide(), matrix, proteins=2)
    with pytest.warns(UserWarning, match=r"left out 2 features that are no genes \(Antibody Capture\)") as caught:
        result = read_slide(outs)
    assert [warning.filename for warning in caught] == [__file__]  # the caller
    assert_same_slide(result, make_slide())


def test_a_slide_of_proteins_alone_is_empty(tmp_path):
    outs = write_space_ranger(tmp_path / "outs", make_slide())
    with h5py.File(outs / f"{MATRIX}.h5", "a") as file:
        file["matrix/features/feature_type"][:] = b"Antibody"
    with (
        pytest.warns(UserWarning, match="left out 6 features"),
        pytest.raises(ValueError, match=r"the slide is empty \(9 spots, 0 genes\)"),
    ):
        read_slide(outs)


def test_header_is_recognised_whatever_the_file_is_called(tmp_path):
    outs = write_space_ranger(tmp_path / "outs", make_slide())
    (outs / "spatial" / "tissue_positions.csv").rename(outs / "spatial" / "tissue_positions_list.csv")
    assert_same_slide(read_slide(outs), make_slide())


def test_barcodes_without_position(tmp_path):
    slide = make_slide()
    outs = write_space_ranger(tmp_path / "outs", slide)
    table = position_table(slide)
    write_positions(outs / "spatial" / "tissue_positions.csv", table[~table["barcode"].isin(slide.obs_names[[2, 5]])])
    message = r"2 of 9 barcodes of the matrix have no position in spatial/tissue_positions\.csv \(e\.g\. "
    with pytest.raises(ValueError, match=message + slide.obs_names[2]):
        read_slide(outs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: pd.concat([table, table[:1]]), "holds barcode .* more than once"),
        (lambda table: table.drop(columns="array_col"), "not spot positions .*array_col"),
        (lambda table: table.assign(array_row=np.nan), r'obs\["array_row"\] holds 9 values that are no finite number'),
        (lambda table: table.assign(pxl_col_in_fullres=np.inf), "pxl_col_in_fullres holds 9 values"),
    ],
)
def test_unusable_position_files(tmp_path, change, message):
    outs = write_space_ranger(tmp_path / "outs", make_slide())
    write_positions(outs / "spatial" / "tissue_positions.csv", change(position_table(make_slide())))
    with pytest.raises(ValueError, match=message):
        read_slide(outs)


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    outs = write_space_ranger(tmp_path / "outs", make_slide(), positions="tissue_positions.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'stimg\[data\]'"):
        read_slide(outs)


def test_folders_that_are_no_space_ranger_output(tmp_path):
    outs = write_space_ranger(tmp_path / "run" / "outs", make_slide())
    looked_for = rf"looked for {MATRIX}\.h5 \(or {MATRIX}/\) and spatial/, here and in outs/, found "
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=looked_for + "nothing"):
        read_slide(tmp_path / "empty")
    with pytest.raises(ValueError, match=looked_for + "tissue_positions.csv"):
        read_slide(outs / "spatial")
    with pytest.raises(ValueError, match=r"pass the Space Ranger folder that holds this file and spatial/"):
        read_slide(outs / f"{MATRIX}.h5")
    (outs / "spatial" / "tissue_positions.csv").unlink()
    with pytest.raises(ValueError, match=r"spatial/ holds no positions: looked for tissue_positions\.csv, "):
        read_slide(outs)


def test_visium_hd_folder_points_to_its_bins(tmp_path):
    bins = tmp_path / "outs" / "binned_outputs"
    write_space_ranger(bins / "square_016um", make_slide())
    with pytest.raises(ValueError, match=r"Visium HD.*pass one of them, e\.g\. .*binned_outputs/square_016um"):
        read_slide(tmp_path)
    assert_same_slide(read_slide(bins / "square_016um"), make_slide())


def test_damaged_10x_files(tmp_path):
    cut = write_space_ranger(tmp_path / "a" / "outs", make_slide())
    (cut / f"{MATRIX}.h5").write_bytes((cut / f"{MATRIX}.h5").read_bytes()[:3000])
    no_group = write_space_ranger(tmp_path / "b" / "outs", make_slide())
    with h5py.File(no_group / f"{MATRIX}.h5", "a") as file:
        file.move("matrix", "GRCh38")
    one_barcode_less = write_space_ranger(tmp_path / "c" / "outs", make_slide(), "mtx")
    barcodes = (one_barcode_less / MATRIX / "barcodes.tsv").read_text().splitlines(keepends=True)
    (one_barcode_less / MATRIX / "barcodes.tsv").write_text("".join(barcodes[:-1]))
    no_features = write_space_ranger(tmp_path / "d" / "outs", make_slide(), "mtx.gz")
    (no_features / MATRIX / "features.tsv.gz").unlink()
    for outs in (cut, no_group, one_barcode_less, no_features):
        with pytest.raises(ValueError, match=rf"{MATRIX}.* is damaged, cut short or not a 10x count matrix"):
            read_slide(outs)


def test_damaged_image_and_scale_factors(tmp_path):
    outs = write_space_ranger(tmp_path / "outs", make_slide())
    (outs / "spatial" / "scalefactors_json.json").write_text("{")
    with pytest.raises(ValueError, match=r"scalefactors_json\.json is damaged, cut short or not JSON"):
        read_slide(outs)
    (outs / "spatial" / "tissue_lowres_image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"tissue_lowres_image\.png is damaged, cut short or not an image"):
        read_slide(outs)


# Legacy ST


@pytest.mark.parametrize("name", ["A1.tsv", "A1.counts.tsv", "A1.txt.gz"])
def test_pixels_of_a_spots_table(tmp_path, name):
    slide = make_slide()
    path = write_legacy(tmp_path / name, slide)
    spots = pd.DataFrame({"x": slide.obs["array_col"], "y": slide.obs["array_row"]})
    spots["pixel_x"], spots["pixel_y"] = slide.obsm["spatial"].T
    spots[::-1].to_csv(tmp_path / "A1.spots.tsv", sep="\t", index=False)
    np.testing.assert_array_equal(read_slide(path).obsm["spatial"], slide.obsm["spatial"])
    spots[1:].to_csv(tmp_path / "A1.spots.tsv", sep="\t", index=False)
    with pytest.warns(UserWarning, match=r"A1\.spots\.tsv lacks 1 of 9 spots") as caught:
        result = read_slide(path)
    assert [warning.filename for warning in caught if "lacks" in str(warning.message)] == [__file__]  # the caller
    np.testing.assert_array_equal(result.obsm["spatial"], slide.obs[["array_col", "array_row"]])
    (tmp_path / "A1.spots.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(ValueError, match=r"A1\.spots\.tsv is damaged, cut short or not a table of spots \(x, y, pixel"):
        read_slide(path)


def test_spots_table_is_matched_by_rounded_positions(tmp_path):
    """The first of two rows of one place counts; two spots of one place share its pixels."""
    (tmp_path / "B.tsv").write_text("\tACTB\n13.064x6.086\t1\n12.6x5.9\t2\n2x3\t3\n")
    (tmp_path / "B.spots.tsv").write_text("x\ty\tpixel_x\tpixel_y\n2.2\t3\t5\t6\n13\t6\t7\t8\n2\t3\t0\t0\n")
    assert read_slide(tmp_path / "B.tsv").obsm["spatial"].tolist() == [[7, 8], [7, 8], [5, 6]]


def test_legacy_table_as_r_writes_it(tmp_path):
    """Quoted names, none over the row names, fractional positions, numbers and NA as genes, a byte-order mark."""
    text = '\ufeff"ACTB"\t"7"\t"NA"\n"13.064x6.086"\t1\t0\t2\n"12.6x7"\t3\t4\t0\n'
    (tmp_path / "r.tsv").write_text(text, encoding="utf-8")
    result = read_slide(tmp_path / "r.tsv")
    assert list(result.var_names) == ["ACTB", "7", "NA"]
    assert list(result.obs_names) == ["13.064x6.086", "12.6x7"]
    assert result.X.toarray().tolist() == [[1, 0, 2], [3, 4, 0]]
    assert result.obs["array_row"].tolist() == [6, 7]
    assert result.obs["array_col"].tolist() == [13, 13]
    assert result.obsm["spatial"].tolist() == [[13.064, 6.086], [12.6, 7.0]]


def test_repeated_spots_of_a_transposed_table_keep_their_place(tmp_path):
    (tmp_path / "t.tsv").write_text("gene\t10x13\t10x13\t4x5\n12\t1\t2\t3\n007\t0\t0\t6\n")
    result = read_slide(tmp_path / "t.tsv")
    assert list(result.obs_names) == ["10x13", "10x13", "4x5"]
    assert result.obs["array_row"].tolist() == [13, 13, 5]
    assert list(result.var_names) == ["12", "007"]
    assert result.X.toarray().tolist() == [[1, 0], [2, 0], [3, 6]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\tACTB\n1x1\tmany\n", "holds 'many' where a count was expected"),
        ("\tACTB\tTP53\n1x1\t\t3\n", "holds '' where a count was expected"),
        ("\tACTB\tTP53\n1x1\t2\t3\n1x2\t4\n", "holds '' where a count was expected"),
        ("\tACTB\n1x1\t0.5\n", r"non-integers \(max 0\.5\)"),
        ("\tACTB\n1x1\t-1\n", "negative values"),
        ("spot\n1x1\n1x2\n", r"the slide is empty \(2 spots, 0 genes\)"),
        (
            "\tACTB\nspot_1\t3\n",
            r"neither all rows \(spot_1, \.\.\.\) nor all columns \(ACTB, \.\.\.\) are spots named XxY",
        ),
        ("", "t.tsv is damaged, cut short or not a legacy ST count table"),
        ("a\tb\tc\td\n1x1\t2\n", "4 column names for 1 columns"),
    ],
)
def test_tables_that_are_no_counts(tmp_path, text, message):
    (tmp_path / "t.tsv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_slide(tmp_path / "t.tsv")


def test_cut_gzip(tmp_path):
    path = write_legacy(tmp_path / "t.tsv.gz", make_slide())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"t\.tsv\.gz is damaged, cut short or not a legacy ST count table"):
        read_slide(path)


# Real slides


@pytest.fixture(scope="module")
def real_slides() -> Path:
    if not os.environ.get("STIMG_DATA"):
        pytest.skip("STIMG_DATA is not set: no real slides")
    return Path(os.environ["STIMG_DATA"])


@pytest.mark.real_data
def test_every_real_slide_reads(real_slides):
    paths = sorted((real_slides / "slides").glob("*.h5ad"))
    assert len(paths) > 50
    for path in paths:
        if path.stem == "eevee_breast":
            with pytest.raises(ValueError, match="pixel coordinates only, which alone do not define the array"):
                read_slide(path)
            continue
        source, result = anndata.read_h5ad(path), read_slide(path)
        assert (result.X != source.X).nnz == 0, path
        assert list(result.obs_names) == list(source.obs_names), path
        assert list(result.var_names) == list(source.var_names), path
        pd.testing.assert_frame_equal(
            result.obs[source.obs.columns.difference(["array_row", "array_col"], sort=False)],
            source.obs[source.obs.columns.difference(["array_row", "array_col"], sort=False)],
        )
        row, col = ("array_row", "array_col") if "array_row" in source.obs else ("array_y", "array_x")
        assert (result.obs[["array_row", "array_col"]].dtypes == np.int64).all(), path
        assert (np.abs(result.obs["array_row"] - source.obs[row].astype(float)) <= 0.5).all(), path
        assert (np.abs(result.obs["array_col"] - source.obs[col].astype(float)) <= 0.5).all(), path


@pytest.mark.real_data
def test_real_spot_names_and_columns_give_one_place(real_slides):
    """Legacy sections carry their positions twice; without the columns the names must say the same."""
    for name in ("her2st_A1", "aspheart_2_CN73_E2", "stahlbc_layer1", "pdacA_card"):
        source = anndata.read_h5ad(real_slides / "slides" / f"{name}.h5ad")
        by_column = read_slide(source)
        source.obs = source.obs.drop(columns=["array_x", "array_y"])
        columns = ["array_row", "array_col"]
        pd.testing.assert_frame_equal(read_slide(source).obs[columns], by_column.obs[columns])


@pytest.mark.real_data
def test_real_space_ranger_folder(real_slides):
    """The published section is the folder's, less the genes of the panel that no spot has a count of."""
    folder = read_slide(real_slides / "original_formats" / "visium_targeted_breast")
    section = read_slide(real_slides / "slides" / "breast_targeted_immunology.h5ad")
    assert folder.shape == (4325, 1056)
    counted = np.asarray(folder.X.sum(axis=0)).ravel() > 0
    assert list(folder.var_names[counted]) == list(section.var_names)
    assert list(folder.obs_names) == list(section.obs_names)
    assert (folder[:, counted].X != section.X).nnz == 0
    columns = ["array_row", "array_col"]
    pd.testing.assert_frame_equal(folder.obs[columns], section.obs[columns])
    np.testing.assert_array_equal(folder.obsm["spatial"], section.obsm["spatial"])
    (images,) = folder.uns["spatial"].values()
    assert images["images"]["lowres"].shape == (600, 600, 3)
    assert "hires" not in images["images"]


@pytest.mark.real_data
@pytest.mark.parametrize("section", ["A1", "B1", "G2"])
def test_real_legacy_tables(real_slides, section):
    table = read_slide(real_slides / "original_formats" / "legacy_st_her2" / f"{section}.counts.tsv.gz")
    slide = read_slide(real_slides / "slides" / f"her2st_{section}.h5ad")
    assert list(table.obs_names) == list(slide.obs_names)
    assert list(table.var_names) == list(slide.var_names)
    assert (table.X != slide.X).nnz == 0
    columns = ["array_row", "array_col"]
    pd.testing.assert_frame_equal(table.obs[columns], slide.obs[columns])
    np.testing.assert_array_equal(table.obsm["spatial"], slide.obsm["spatial"])  # pixels, from the spots table
