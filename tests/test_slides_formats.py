"""`read_slide` on Space Ranger folders and legacy ST tables: their conventions, and their damages."""

import json
import sys
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from slide_files import (
    LIBRARY,
    MATRIX,
    assert_same_slide,
    make_slide,
    position_table,
    write_legacy,
    write_positions,
    write_space_ranger,
)

from modeling_stimg.slides import read_slide

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
    with pytest.raises(ImportError, match=r"needs pyarrow: pip install 'stimg\[parquet\]'"):
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
