"""`read_slide` on real slides, in the formats they were published in."""

import anndata
import numpy as np
import pandas as pd
import pytest

from modeling_stimg.compaction_stimg import is_staggered
from modeling_stimg.slides import read_slide


@pytest.mark.real_data
def test_every_real_slide_reads(real_data):
    paths = sorted((real_data / "slides").glob("*.h5ad"))
    assert len(paths) > 50
    for path in paths:
        source, result = anndata.read_h5ad(path), read_slide(path)
        assert (result.X != source.X).nnz == 0, path
        assert list(result.obs_names) == list(source.obs_names), path
        assert list(result.var_names) == list(source.var_names), path
        pd.testing.assert_frame_equal(
            result.obs[source.obs.columns.difference(["array_row", "array_col"], sort=False)],
            source.obs[source.obs.columns.difference(["array_row", "array_col"], sort=False)],
        )
        assert (result.obs[["array_row", "array_col"]].dtypes == np.int64).all(), path
        if path.stem == "eevee_breast":  # pixels alone
            assert is_staggered(*result.obs[["array_row", "array_col"]].to_numpy().T)
            continue
        row, col = ("array_row", "array_col") if "array_row" in source.obs else ("array_y", "array_x")
        assert (np.abs(result.obs["array_row"] - source.obs[row].astype(float)) <= 0.5).all(), path
        assert (np.abs(result.obs["array_col"] - source.obs[col].astype(float)) <= 0.5).all(), path


@pytest.mark.real_data
def test_real_spot_names_and_columns_give_one_place(real_data):
    """Legacy sections carry their positions twice; without the columns the names must say the same."""
    for name in ("her2st_A1", "aspheart_2_CN73_E2", "stahlbc_layer1", "pdacA_card"):
        source = anndata.read_h5ad(real_data / "slides" / f"{name}.h5ad")
        by_column = read_slide(source)
        source.obs = source.obs.drop(columns=["array_x", "array_y"])
        columns = ["array_row", "array_col"]
        pd.testing.assert_frame_equal(read_slide(source).obs[columns], by_column.obs[columns])


@pytest.mark.real_data
def test_real_space_ranger_folder(real_data):
    """The published section is the folder's, less the genes of the panel that no spot has a count of."""
    folder = read_slide(real_data / "original_formats" / "visium_targeted_breast")
    section = read_slide(real_data / "slides" / "breast_targeted_immunology.h5ad")
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
def test_real_legacy_tables(real_data, section):
    table = read_slide(real_data / "original_formats" / "legacy_st_her2" / f"{section}.counts.tsv.gz")
    slide = read_slide(real_data / "slides" / f"her2st_{section}.h5ad")
    assert list(table.obs_names) == list(slide.obs_names)
    assert list(table.var_names) == list(slide.var_names)
    assert (table.X != slide.X).nnz == 0
    columns = ["array_row", "array_col"]
    pd.testing.assert_frame_equal(table.obs[columns], slide.obs[columns])
    np.testing.assert_array_equal(table.obsm["spatial"], slide.obsm["spatial"])  # pixels, from the spots table
