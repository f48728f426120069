"""`read_slide`: every format of one slide reads as the same slide, and every bad input says what to do."""

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from slide_files import (
    LIBRARY,
    MATRIX,
    NUM_GENES,
    NUM_SPOTS,
    SYMBOLS,
    assert_same_slide,
    legacy_names,
    make_slide,
    with_positions,
    write_legacy,
    write_space_ranger,
)

from modeling_stimg.slides import read_slide


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
    slide.obs["array_row"], slide.obs["array_col"] = [5] * (NUM_SPOTS - 1) + [6], 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = read_slide(slide)
    assert list(result.obs_names) == ["spot"] * NUM_SPOTS
    assert set(result.obs["array_row"]) == {5, 6}
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
    looked_for = (
        r"no array positions: looked for spot names .* obsm\[\"spatial\"\], .* array_row \+ array_col, .* y \+ x: add"
    )
    with pytest.raises(ValueError, match=looked_for):
        read_slide(with_positions())


# Pixels alone: nine spots of a square array, in an order of their own

ORDER = np.array([4, 0, 8, 2, 6, 1, 7, 3, 5])
PIXEL_X, PIXEL_Y = ORDER % 3 * 50.25 + 3, ORDER // 3 * 50.25 + 7
PIXEL_COLUMNS = [
    ("pxl_row_in_fullres", "pxl_col_in_fullres"),
    ("pxl_y", "pxl_x"),
    ("pixel_y", "pixel_x"),
    ("imagerow", "imagecol"),
    ("y", "x"),
]


@pytest.mark.parametrize("width", [2, 3])
@pytest.mark.parametrize("convert", [np.asarray, lambda xy: pd.DataFrame(xy, index=make_slide().obs_names)])
def test_array_is_found_in_the_pixels(width, convert):
    slide = with_positions()
    slide.obsm["spatial"] = convert(np.stack([PIXEL_X, PIXEL_Y, np.arange(NUM_SPOTS)], axis=1)[:, :width])
    result = read_slide(slide)
    np.testing.assert_array_equal(result.obs["array_row"], ORDER // 3)
    np.testing.assert_array_equal(result.obs["array_col"], ORDER % 3)
    assert result.obs["array_row"].dtype == result.obs["array_col"].dtype == np.int64
    np.testing.assert_array_equal(result.obsm["spatial"], slide.obsm["spatial"])


@pytest.mark.parametrize(("y", "x"), PIXEL_COLUMNS)
def test_array_is_found_in_pixel_columns(y, x):
    result = read_slide(with_positions(**{y: PIXEL_Y, x: PIXEL_X}))
    np.testing.assert_array_equal(result.obs["array_row"], ORDER // 3)
    np.testing.assert_array_equal(result.obs["array_col"], ORDER % 3)


def test_pixels_come_last_and_in_their_order():
    names = [name for pair in PIXEL_COLUMNS for name in pair]
    wrong = dict.fromkeys(names, np.zeros(NUM_SPOTS))
    for index, (y, x) in enumerate(PIXEL_COLUMNS):
        columns = {name: wrong[name] for name in names[2 * index :]} | {y: PIXEL_Y, x: PIXEL_X}
        np.testing.assert_array_equal(read_slide(with_positions(**columns)).obs["array_col"], ORDER % 3)
    slide = with_positions(**wrong)
    slide.obsm["spatial"] = np.stack([PIXEL_X, PIXEL_Y], axis=1)
    np.testing.assert_array_equal(read_slide(slide).obs["array_col"], ORDER % 3)
    slide.obs_names = [f"{x}x{y}" for x, y in zip(COLS, ROWS, strict=True)]
    np.testing.assert_array_equal(read_slide(slide).obs["array_col"], COLS)
    slide.obs["row"], slide.obs["col"] = ROWS + 1, COLS + 1
    np.testing.assert_array_equal(read_slide(slide).obs["array_col"], COLS + 1)


@pytest.mark.parametrize("where", ["obsm", "obs"])
def test_pixels_on_no_array(tmp_path, where):
    rng = np.random.default_rng(0)
    x, y = rng.random((2, NUM_SPOTS))
    slide = with_positions(**({"pxl_x": x, "pxl_y": y} if where == "obs" else {}))
    if where == "obsm":
        slide.obsm["spatial"] = np.stack([x, y], axis=1)
    slide.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(
        ValueError, match=r"cells\.h5ad: .*9 spots are no regular array .* bin segmented cells to a square"
    ):
        read_slide(tmp_path / "cells.h5ad")


def test_pixels_must_not_be_infinite_when_squared():
    slide = make_slide()
    slide.obs = slide.obs[["label"]]
    slide.obsm["spatial"][2] = 1e300
    with pytest.raises(ValueError, match="1 of 9 spots have pixel coordinates that are no finite numbers"):
        read_slide(slide)


def test_pixels_must_be_finite():
    x = PIXEL_X.copy()
    x[3] = np.nan
    with pytest.raises(ValueError, match=r'obs\["pixel_x"\] holds 1 values that are no finite number'):
        read_slide(with_positions(pixel_x=x, pixel_y=PIXEL_Y))
    slide = with_positions()
    slide.obsm["spatial"] = np.stack([x, PIXEL_Y], axis=1)
    with pytest.raises(ValueError, match="1 of 9 spots have pixel coordinates that are no finite numbers"):
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


def normalised(*places: str) -> AnnData:
    """The slide with log1p values in X, its counts in the layers `places` or in "raw", and layers that hold none."""
    slide = make_slide()
    counts = slide.X.copy()
    if "raw" in places:
        slide.raw = AnnData(counts, obs=slide.obs, var=slide.var)
    slide.X = np.log1p(counts)
    slide.layers["scaled"] = slide.X * 0.3
    slide.layers["zeros"] = sp.csr_matrix(slide.shape)
    for name in set(places) - {"raw"}:
        slide.layers[name] = counts
    return slide


@pytest.mark.parametrize(
    ("places", "taken"),
    [
        (["counts"], r'adata\.layers\["counts"\]'),
        (["raw_counts", "a"], r'adata\.layers\["raw_counts"\]'),
        (["raw"], r"adata\.raw"),
        (["raw", "raw_counts", "counts"], r'adata\.layers\["counts"\]'),
        (["raw", "a"], r"adata\.raw"),
    ],
)
def test_counts_are_found_where_they_are_and_one_line_tells_where(tmp_path, places, taken):
    slide = normalised(*places)
    slide.write_h5ad(tmp_path / "slide.h5ad")
    before = slide.X.toarray()
    message = rf"^X holds non-integers \(max \d\.\d+\): the counts of {taken} are taken$"
    backed = anndata.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    for source in (slide, tmp_path / "slide.h5ad", backed):
        with pytest.warns(UserWarning, match=message) as caught:
            result = read_slide(source)
        assert [w.filename for w in caught if "are taken" in str(w.message)] == [__file__]
        assert_same_slide(result, make_slide())
        if source is not backed:
            np.testing.assert_array_equal(result.layers["X"].toarray(), before)
    backed.file.close()
    assert list(slide.layers) == list(normalised(*places).layers)
    np.testing.assert_array_equal(slide.X.toarray(), before)


def test_counts_of_x_come_first_and_a_named_layer_before_all():
    slide = make_slide()
    for factor, name in ((2, "counts"), (3, "umi")):
        slide.layers[name] = slide.X * factor
    slide.raw = AnnData(slide.X * 4, obs=slide.obs, var=slide.var)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        factors = {None: 1, "X": 1, "counts": 2, "umi": 3, "raw": 4}
        for layer, factor in factors.items():
            result = read_slide(slide, layer=layer)
            np.testing.assert_array_equal(result.X.toarray(), slide.X.toarray() * factor)


def test_a_named_layer_must_be_there_and_hold_counts():
    slide = normalised("raw")
    with pytest.raises(ValueError, match=r"no layer 'umi': expected one of X, scaled, zeros, raw$"):
        read_slide(slide, layer="umi")
    with pytest.raises(ValueError, match=r'^adata\.layers\["scaled"\] holds non-integers'):
        read_slide(slide, layer="scaled")


def test_other_layers_are_named_but_not_taken():
    with pytest.raises(ValueError, match=r'adata\.layers\["umi"\] holds integer counts, pass layer="umi"$'):
        read_slide(normalised("umi"))
    with pytest.raises(ValueError, match=r"here no layer of this slide holds them, nor does its \.raw$"):
        read_slide(normalised())


def test_raw_of_more_genes_brings_its_genes():
    """What belongs to the genes of X alone is left out; spots, and what belongs to them, stay."""
    slide = normalised("raw")
    slide = slide[:, [4, 1]].copy()
    slide.varm["loadings"] = np.ones((2, 3))
    with pytest.warns(UserWarning, match=r"the counts of adata\.raw are taken"):
        result = read_slide(slide)
    assert_same_slide(result, make_slide())
    assert list(result.var_names) == list(make_slide().var_names)
    assert (list(result.layers), list(result.varm), list(result.obsm)) == ([], [], ["spatial"])


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
