"""`read_slide` on Visium HD, CytAssist, SpatialData, backed files and several slides; `bin_cells` on cells anywhere."""

import json
import sys
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from slide_files import (
    MATRIX,
    annotating,
    assert_same_slide,
    make_slide,
    point,
    position_table,
    square,
    write_positions,
    write_space_ranger,
    write_spatialdata,
)

from modeling_stimg import bin_cells, embed_slide, read_cells, read_slide
from modeling_stimg.cli import app
from modeling_stimg.compaction_stimg import compact

# Visium HD


def hd_slide(size: int) -> AnnData:
    """The slide with the barcodes of Visium HD's bins of `size` um."""
    slide = make_slide()
    places = zip(slide.obs["array_row"], slide.obs["array_col"], strict=True)
    slide.obs_names = [f"s_{size:03d}um_{row:05d}_{col:05d}-1" for row, col in places]
    slide.X = slide.X * size  # so that the sizes can be told apart
    return slide


def write_hd(outs, sizes=(2, 8, 16)):
    """`outs/` of Visium HD as Space Ranger lays it out."""
    (outs / "spatial").mkdir(parents=True)  # images alone
    for size in sizes:
        folder = outs / "binned_outputs" / f"square_{size:03d}um"
        write_space_ranger(folder, hd_slide(size), positions="tissue_positions.parquet")
        scales = {"spot_diameter_fullres": 29.2, "bin_size_um": float(size), "microns_per_pixel": size / 29.2}
        (folder / "spatial" / "scalefactors_json.json").write_text(json.dumps(scales))
    return outs


def test_visium_hd_reads_8_um_and_says_so(tmp_path):
    outs = write_hd(tmp_path / "run" / "outs")
    for given in (outs, outs.parent, outs / "binned_outputs"):
        with pytest.warns(UserWarning, match=r"square_008um is read; .* \(square_002um, square_016um\)") as caught:
            result = read_slide(given)
        assert [warning.filename for warning in caught] == [__file__]
        assert_same_slide(result, hd_slide(8))
        np.testing.assert_array_equal(result.obsm["spatial"], hd_slide(8).obsm["spatial"])
        assert set(result.obs["in_tissue"]) == {1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (2, 16):
            assert_same_slide(read_slide(outs / "binned_outputs" / f"square_{size:03d}um"), hd_slide(size))


def test_other_bin_sizes_of_visium_hd(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_slide(read_slide(write_hd(tmp_path / "one", [24])), hd_slide(24))
    with pytest.raises(
        ValueError, match=r"one slide per bin size \(square_002um, square_016um\): pass the folder of one"
    ):
        read_slide(write_hd(tmp_path / "two", [2, 16]))


@pytest.mark.parametrize("missing", ["pyarrow", "file"])
def test_barcodes_of_visium_hd_tell_rows_and_columns(tmp_path, monkeypatch, missing):
    folder = write_hd(tmp_path / "outs", [8]) / "binned_outputs" / "square_008um"
    message = r"spatial holds no positions: rows and columns are those of the barcodes"
    if missing == "pyarrow":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
        message = r"needs pyarrow \(pip install 'stimg\[parquet\]'\): rows and columns are those of the barcodes"
    else:
        (folder / "spatial" / "tissue_positions.parquet").unlink()
    with pytest.warns(UserWarning, match=message):
        result = read_slide(folder)
    assert_same_slide(result, hd_slide(8))
    np.testing.assert_array_equal(result.obsm["spatial"], result.obs[["array_col", "array_row"]])
    bare = AnnData(hd_slide(8).X, obs=pd.DataFrame(index=hd_slide(8).obs_names))
    assert_same_slide(read_slide(bare), hd_slide(8))


# CytAssist


@pytest.mark.parametrize(("rows", "cols"), [(78, 128), (128, 224)], ids=["6.5 mm", "11 mm"])
def test_cytassist_capture_areas(tmp_path, rows, cols):
    """All spots of the area: `tissue_positions.csv` with its header, whole pixels, probes named as features."""
    row, col = np.divmod(np.arange(rows * cols), cols)
    on_array = (row + col) % 2 == 0
    row, col = row[on_array], col[on_array]
    names = [f"{''.join('ACGT'[(i >> (2 * digit)) % 4] for digit in range(16))}-1" for i in range(len(row))]
    slide = AnnData(
        sp.csr_matrix(np.random.default_rng(0).poisson(1, (len(row), 6)).astype(np.float32)),
        obs=pd.DataFrame({"array_row": row, "array_col": col}, index=names),
        var=make_slide().var,
    )
    slide.obsm["spatial"] = np.stack([1000 + col * 137, 800 + row * 237], axis=1)
    outs = tmp_path / "outs"
    (outs / "spatial").mkdir(parents=True)
    write_positions(outs / "spatial" / "tissue_positions.csv", position_table(slide))
    with h5py.File(outs / f"{MATRIX}.h5", "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(slide.X, key).astype(np.int64)
        group["shape"] = np.array(slide.shape[::-1])
        group["barcodes"] = np.array(names, "S")
        for key in ("id", "name"):
            group[f"features/{key}"] = np.array(slide.var_names, "S")
        group["features/feature_type"] = np.array(["Gene Expression"] * 6, "S")
        group["features/target_sets/probes"] = np.arange(6)
    result = read_slide(outs)
    assert_same_slide(result, slide)
    np.testing.assert_array_equal(result.obsm["spatial"], slide.obsm["spatial"])
    grid_row, grid_col = compact(*(result.obs[name].to_numpy() for name in ("array_row", "array_col")), "lattice")
    assert (grid_row.max() + 1, grid_col.max() + 1) == (rows, cols // 2)


# SpatialData


def test_spatialdata_table_with_positions(tmp_path):
    store = write_spatialdata(tmp_path / "one.zarr", {"table": make_slide()})
    for path in (store, store / "tables" / "table"):
        assert_same_slide(read_slide(path), make_slide())
    with pytest.raises(ValueError, match="holds no table 'cells': expected one of table"):
        read_slide(store, table="cells")


def test_several_tables_have_to_be_told_apart(tmp_path):
    tables = {f"square_{size:03d}um": hd_slide(size) for size in (8, 16)}
    store = write_spatialdata(tmp_path / "hd.zarr", tables)
    with pytest.raises(
        ValueError, match=r"holds 2 tables \(square_008um, square_016um\)|\(square_016um, square_008um\)"
    ):
        read_slide(store)
    assert_same_slide(read_slide(store, table="square_016um"), hd_slide(16))
    assert_same_slide(read_slide(store / "tables" / "square_008um"), hd_slide(8))
    with pytest.raises(ValueError, match="this is one AnnData"):
        read_slide(store / "tables" / "square_008um", table="square_008um")


def test_one_anndata_in_zarr(tmp_path):
    make_slide().write_zarr(tmp_path / "slide.zarr")
    assert_same_slide(read_slide(tmp_path / "slide.zarr"), make_slide())


@pytest.mark.parametrize("shape", [point, square])
def test_spatialdata_positions_are_centroids_of_the_shapes(tmp_path, shape):
    """Shapes of two regions, in another order than the table."""
    pytest.importorskip("pyarrow")
    pytest.importorskip("shapely")
    slide = make_slide()
    regions = ["left"] * 5 + ["right"] * 4
    xy = slide.obsm["spatial"]
    order = np.arange(9)[::-1]
    shapes = {
        name: (order[mask[order]] + 100, [shape(*xy[i]) for i in order[mask[order]]])
        for name, mask in ((name, np.array(regions) == name) for name in ("left", "right"))
    }
    store = write_spatialdata(tmp_path / "s.zarr", {"table": annotating(slide, regions)}, shapes)
    result = read_cells(store)
    np.testing.assert_allclose(result.obsm["spatial"], xy)
    np.testing.assert_array_equal(result.X.toarray(), slide.X.toarray())
    binned = read_slide(store, bin_size=100, slide_key="region")
    assert binned.X.sum() == slide.X.sum()
    shapes["right"] = (shapes["right"][0] + 1, shapes["right"][1])
    store = write_spatialdata(tmp_path / "lacking.zarr", {"table": annotating(slide, regions)}, shapes)
    with pytest.raises(ValueError, match="shapes/right lacks 1 of 4 instances of the table"):
        read_slide(store)


def test_spatialdata_without_what_it_needs(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    slide = make_slide()
    labels = write_spatialdata(tmp_path / "labels.zarr", {"table": annotating(slide, "labels")})
    with pytest.raises(ValueError, match=r"shapes/labels/shapes\.parquet, whose centroids .* is not there"):
        read_slide(labels)
    with pytest.raises(ValueError, match="the store holds no table of counts"):
        read_slide(write_spatialdata(tmp_path / "images.zarr", {}))
    shapes = {"spots": (np.arange(9) + 100, [point(0, 0)] * 9)}
    store = write_spatialdata(tmp_path / "s.zarr", {"table": annotating(slide, "spots")}, shapes)
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(ImportError, match=r"needs pyarrow and shapely: pip install 'stimg\[spatialdata\]'"):
        read_slide(store)


# Backed files


@pytest.mark.parametrize("convert", [sp.csr_matrix, sp.csc_matrix, np.asarray])
def test_of_a_backed_slide_only_the_counts_are_read(tmp_path, monkeypatch, convert):
    """Dense ones in blocks: here of two spots. Values that are no counts are noticed in whatever block they are."""
    monkeypatch.setattr("modeling_stimg.raw_counts._BLOCK_VALUES", 12)
    slide = make_slide()
    slide.X = convert(slide.X.toarray())
    slide.raw = slide.copy()
    slide.write_h5ad(tmp_path / "slide.h5ad")
    backed = anndata.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    result = read_slide(backed)
    assert_same_slide(result, make_slide())
    assert backed.isbacked
    assert not result.isbacked
    assert result.raw is None
    assert_same_slide(read_slide(backed[[3, 1]]), make_slide()[[3, 1]].copy())
    backed.file.close()
    values = slide.X.toarray() if sp.issparse(slide.X) else slide.X.copy()
    values[8, 5] = 0.5
    AnnData(convert(values), obs=slide.obs, var=slide.var).write_h5ad(tmp_path / "last.h5ad")
    backed = anndata.read_h5ad(tmp_path / "last.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"X holds non-integers"):
        read_slide(backed)
    backed.file.close()


def test_a_backed_slide_is_embedded(tmp_path, slides, processor, model):
    slide = slides["square"].copy()
    slide.write_h5ad(tmp_path / "slide.h5ad")
    backed = anndata.read_h5ad(tmp_path / "slide.h5ad", backed="r")
    for adata in (slide, backed):
        embed_slide(adata, model, processor, progress=False)
    np.testing.assert_array_equal(backed.obsm["X_stimg"], slide.obsm["X_stimg"])
    assert backed.isbacked
    backed.file.close()


# Cells


def make_cells(num_cells: int = 400, dtype=np.float32) -> AnnData:
    rng = np.random.default_rng(5)
    cells = AnnData(sp.csr_matrix(rng.poisson(0.5, (num_cells, 7)).astype(dtype)))
    cells.obs_names = [f"cell {i}" for i in range(num_cells)]
    cells.obsm["spatial"] = rng.uniform((-120, 3000), (300, 3500), (num_cells, 2))
    return cells


def plain_bins(cells: AnnData, bin_size: float) -> dict[tuple[int, int], np.ndarray]:
    """Counts by (row, column), a cell at a time."""
    sums: dict[tuple[int, int], np.ndarray] = {}
    for (x, y), counts in zip(cells.obsm["spatial"], cells.X.toarray().astype(np.int64), strict=True):
        place = int(y // bin_size), int(x // bin_size)
        sums[place] = sums.get(place, 0) + counts
    first = np.min(list(sums), axis=0)
    return {(row - first[0], col - first[1]): counts for (row, col), counts in sums.items()}


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
@pytest.mark.parametrize("bin_size", [50, 12.5])
def test_bins_equal_a_plain_loop(bin_size, dtype):
    cells = make_cells(dtype=dtype)
    if dtype == np.uint8:
        cells.X = cells.X * 60  # sums beyond 255
    bins = bin_cells(cells, bin_size)
    expected = plain_bins(cells, bin_size)
    assert bins.n_obs == len(expected)
    for counts, row, col in zip(bins.X.toarray(), bins.obs["array_row"], bins.obs["array_col"], strict=True):
        np.testing.assert_array_equal(counts, expected[row, col])
    where = cells.obs["stimg_bin"].to_numpy()
    assert where.dtype == np.int64
    np.testing.assert_array_equal(where, bins.uns["stimg_bins"]["bin_of_cell"])
    np.testing.assert_array_equal(np.bincount(where), bins.obs["num_cells"])
    assert np.abs(bins.obsm["spatial"][where] - cells.obsm["spatial"]).max() <= bin_size / 2
    assert_same_slide(read_slide(bins), bins)


def test_pixels_are_bins_of_the_same_tissue():
    cells, pixels = make_cells(), make_cells()
    pixels.obsm["spatial"] = pixels.obsm["spatial"] * 4
    in_um, in_pixels = bin_cells(cells, 50), bin_cells(pixels, 50, microns_per_pixel=0.25)
    assert_same_slide(in_pixels, in_um)
    np.testing.assert_allclose(in_pixels.obsm["spatial"], in_um.obsm["spatial"] * 4)
    pixels.uns["spatial"] = {"library": {"scalefactors": {"microns_per_pixel": 0.25}}}
    assert_same_slide(bin_cells(pixels, 50), in_um)


def test_read_slide_bins_files_and_columns_of_imaging_platforms(tmp_path):
    cells = make_cells()
    expected = bin_cells(cells.copy(), 50)
    cells.obs["x_centroid"], cells.obs["y_centroid"] = cells.obsm["spatial"].T
    del cells.obsm["spatial"]
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert_same_slide(read_slide(tmp_path / "cells.h5ad", bin_size=50), expected)
    assert "stimg_bin" not in cells.obs
    assert_same_slide(read_slide(cells, bin_size=50), expected)
    assert "stimg_bin" not in cells.obs, "what is passed to read_slide stays as it is"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bin_size": 0}, "bin_size is 0: expected a positive number"),
        ({"bin_size": float("nan")}, "bin_size is nan"),
        ({"bin_size": 50, "microns_per_pixel": -1}, "microns_per_pixel is -1"),
        ({"bin_size": 1e5}, r"all 400 cells lie in one bin of 100000 um: give positions in um, microns_per_pixel"),
        ({"bin_size": 1e-3}, "would make a grid of .*: are the positions in pixels"),
        ({"microns_per_pixel": 0.2}, "given without bin_size"),
    ],
)
def test_bins_that_make_no_sense(options, message):
    cells = make_cells()
    cells.obsm["spatial"] += 2.5e5 if options.get("bin_size") == 1e5 else 0
    with pytest.raises(ValueError, match=message):
        read_slide(cells, **options)


def test_cells_without_a_place():
    cells = make_cells()
    cells.obsm["spatial"][7, 0] = np.nan
    with pytest.raises(ValueError, match="1 of 400 cells have positions that are no finite numbers"):
        bin_cells(cells, 50)


@pytest.fixture
def cells_of_slide(slides) -> AnnData:
    """Cells of the square slide: each spot's counts in two cells, at any place in the spot's bin of 50 um."""
    slide = slides["square"]
    rng = np.random.default_rng(2)
    first = slide.X.toarray() // 3
    cells = AnnData(sp.csr_matrix(np.concatenate([first, slide.X.toarray() - first])), var=slide.var)
    sites = np.tile(slide.obs[["array_col", "array_row"]].to_numpy(), (2, 1))
    cells.obsm["spatial"] = (sites + rng.uniform(0.01, 0.99, sites.shape)) * 50
    cells.obs_names = [f"cell {i}" for i in range(cells.n_obs)]
    return cells[rng.permutation(cells.n_obs)].copy()


def test_every_cell_gets_the_embedding_of_its_bin(cells_of_slide, slides, processor, model):
    """Cells that sum to the spots of a slide get the spots' embeddings, in their own order."""
    cells, slide = cells_of_slide, slides["square"].copy()
    embed_slide(slide, model, processor, progress=False)
    embed_slide(cells, model, processor, bin_size=50, progress=False)
    of_place = {
        (row, col): vector
        for row, col, vector in zip(slide.obs["array_row"], slide.obs["array_col"], slide.obsm["X_stimg"], strict=True)
    }
    assert cells.obsm["X_stimg"].dtype == np.float32
    for (x, y), vector in zip(cells.obsm["spatial"], cells.obsm["X_stimg"], strict=True):
        np.testing.assert_array_equal(vector, of_place[int(y // 50), int(x // 50)])
    assert cells.obs["stimg_bin"].nunique() == slide.n_obs


def run(*arguments) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_bins_cells_and_writes_them(cells_of_slide, processor, model, checkpoint, tmp_path, capsys):
    cells_of_slide.write_h5ad(tmp_path / "cells.h5ad")
    output = tmp_path / "out.h5ad"
    shown = "--plot", tmp_path / "map.png", "--num-domains", 3
    run("embed", tmp_path / "cells.h5ad", "--model", checkpoint, "--bin-size", 50, "--output", output, *shown)
    written = anndata.read_h5ad(output)
    assert list(written.obs_names) == list(cells_of_slide.obs_names)
    np.testing.assert_array_equal(written.obsm["spatial"], cells_of_slide.obsm["spatial"])
    assert (written.X != cells_of_slide.X).nnz == 0
    assert written.obs.groupby("stimg_bin")["stimg_domain"].nunique().max() == 1
    assert (tmp_path / "map.png").stat().st_size > 1000
    run("inspect", tmp_path / "cells.h5ad", "--bin-size", 50)
    assert f"spots:           {written.obs['stimg_bin'].nunique()}\n" in capsys.readouterr().out


# Several slides in one AnnData


def test_slides_of_one_anndata_are_embedded_apart(slides, processor, model, checkpoint, tmp_path, capsys):
    """Rows of two slides, mixed: each as if it were alone, although their array positions overlap."""
    alone = {name: slide.copy() for name, slide in slides.items()}
    for slide in alone.values():
        embed_slide(slide, model, processor, progress=False)
    both = anndata.concat(alone, label="sample", index_unique=" ")
    del both.obsm["X_stimg"]
    both = both[np.random.default_rng(0).permutation(both.n_obs)].copy()
    embed_slide(both, model, processor, slide_key="sample", progress=False)
    for name, slide in alone.items():
        rows = both.obs_names.get_indexer([f"{spot} {name}" for spot in slide.obs_names])
        np.testing.assert_array_equal(both.obsm["X_stimg"][rows], slide.obsm["X_stimg"])
    both.write_h5ad(tmp_path / "both.h5ad")
    run("inspect", tmp_path / "both.h5ad", "--slide-key", "sample")
    shown = capsys.readouterr().out
    assert "both/square\n" in shown
    assert "both/staggered\n" in shown
    command = "embed", tmp_path / "both.h5ad", "--model", checkpoint, "--output", tmp_path / "out.h5ad"
    run(*command, "--slide-key", "sample")
    assert anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_stimg"].shape == both.obsm["X_stimg"].shape
    with pytest.raises(ValueError, match="--plot draws one slide"):
        run(*command, "--slide-key", "sample", "--plot", tmp_path / "map.png")


def test_arrays_are_found_slide_by_slide():
    """Two square arrays that overlap, turned against each other, with pixels alone."""
    row, col = np.divmod(np.arange(64), 8)
    slides = {}
    for name, angle in (("a", 0.0), ("b", 0.3)):
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        slides[name] = AnnData(np.ones((64, 3), np.float32))
        slides[name].obsm["spatial"] = np.stack([col, row], axis=1) * 100.0 @ turn
    both = anndata.concat(slides, label="sample", index_unique="-")
    result = read_slide(both, slide_key="sample")
    np.testing.assert_array_equal(result.obs["array_row"], np.tile(row, 2))
    np.testing.assert_array_equal(result.obs["array_col"], np.tile(col, 2))
    both.obsm["spatial"][64:] = np.random.default_rng(0).random((64, 2))
    with pytest.raises(ValueError, match="slide b: the pixel coordinates of 64 spots are no regular array"):
        read_slide(both, slide_key="sample")


def test_cells_of_several_slides_are_binned_apart():
    """Two slides at one place, and one far away, which a common grid would put beside it."""
    slides = {"a": make_cells(), "b": make_cells(300), "c": make_cells(200)}
    slides["c"].obsm["spatial"] += 1e7
    cells = anndata.concat(slides, label="sample", index_unique=" ")
    bins = bin_cells(cells, 50, slide_key="sample")
    assert len(set(bins.obs_names)) == bins.n_obs
    for name, slide in slides.items():
        assert_same_slide(bins[bins.obs["sample"] == name].copy(), bin_cells(slide, 50))
    assert (bins.obs["sample"].to_numpy()[cells.obs["stimg_bin"]] == cells.obs["sample"]).all()


def test_slides_have_to_be_named():
    slide = make_slide()
    with pytest.raises(ValueError, match=r"obs has no column 'sample' of slides: expected one of \['label', "):
        read_slide(slide, slide_key="sample")
    slide.obs["sample"] = ["a", None] + ["b"] * 7
    with pytest.raises(ValueError, match=r"obs\['sample'\] names no slide in 1 of 9 rows"):
        read_slide(slide, slide_key="sample")
