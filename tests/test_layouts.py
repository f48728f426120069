"""From what an archive serves to slides: every layout arrives, and equals what was served."""

import gzip
import io
import json
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata import AnnData
from loopback import Loopback, serving
from PIL import Image
from slide_files import MATRIX, SYMBOLS, assert_same_slide, make_slide, write_space_ranger

from data_processing.fetching import fetch_sources
from data_processing.layouts import open_source
from data_processing.resuming import Retry
from data_processing.sources import Source
from modeling_stimg import read_slide

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server(tmp_path):
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as loopback:
        yield loopback


def read_source(path: Path, source: Source, work_dir: Path) -> dict[str, AnnData]:
    """All slides of a source."""
    return {name: read() for name, read in open_source(path, source, work_dir).items()}


def arrive(server: Loopback, name: str, layout: str, member: str = "", **fields) -> dict[str, AnnData]:
    """Fetch and read what the server has, as a source called "it"."""
    url = "|".join(server.address(part) for part in name.split("|")) + (f"#{member}" if member else "")
    source = Source("it", url=url, layout=layout, **fields)
    folder = server.folder.parent
    (fetched,) = fetch_sources([source], folder / "cache", progress=False, retry=Retry(num_tries=2, first_wait=0.01))
    assert fetched.path is not None, fetched.error
    return read_source(fetched.path, source, folder / "work")


def arrive_one(*args, **fields) -> AnnData:
    slides = arrive(*args, **fields)
    assert list(slides) == ["it"]
    return slides["it"]


def refused(server: Loopback, name: str, layout: str, **fields) -> str:
    """The sentence with which a source is refused."""
    with pytest.raises(ValueError, match=r"^it: ") as caught:
        arrive(server, name, layout, **fields)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def other_slide() -> AnnData:
    """Another slide of the same barcodes and genes: other counts, at the same positions in another order."""
    slide = make_slide()
    slide.X = sp.csr_matrix(slide.X.toarray()[::-1] + 1)
    slide.obs[["array_row", "array_col"]] = slide.obs[["array_row", "array_col"]].to_numpy()[::-1]
    slide.obsm["spatial"] = slide.obsm["spatial"][::-1].copy()
    return slide


def outs_with_images(outs: Path, slide: AnnData, **options) -> Path:
    write_space_ranger(outs, slide, **options)
    Image.fromarray(PIXELS).save(outs / "spatial" / "tissue_hires_image.png")
    (outs / "spatial" / "scalefactors_json.json").write_text(json.dumps({"tissue_hires_scalef": 0.08}))
    return outs


def pack(path: Path, folder: Path, top: str = "") -> Path:
    """A zip, tar or tar.gz archive of what `folder` holds, below `top`."""
    files = {f"{top}{file.relative_to(folder).as_posix()}": file for file in folder.rglob("*") if file.is_file()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, file in files.items():
                archive.write(file, name)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, file in files.items():
                archive.add(file, name)
    return path


def heap(server: Loopback, slides: dict[str, AnnData], matrix: str = "h5", compressed: bool = True) -> Path:
    """A folder with the files of Space Ranger runs, told apart by prefixes, most of them gzipped: as GEO has them."""
    folder = server.folder.parent / "heap"
    folder.mkdir()
    for prefix, slide in slides.items():
        options = {"matrix": matrix, "positions": "tissue_positions_list.csv"}
        outs = outs_with_images(server.folder.parent / f"outs_{prefix}", slide, **options)
        for path in [*outs.glob("*.h5"), *outs.glob(f"{MATRIX}/*"), *outs.glob("spatial/*")]:
            target = folder / f"{prefix}{path.name}"
            if compressed and path.suffix not in (".h5", ".gz"):
                target.with_name(f"{target.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            else:
                shutil.copyfile(path, target)
    return folder


def assert_space_ranger(result: AnnData, slide: AnnData, images: bool = True) -> None:
    assert_same_slide(result, slide)
    assert list(result.obs_names) == list(slide.obs_names)
    assert list(result.var["gene_ids"]) == list(slide.var_names)
    assert list(result.var["gene_name"]) == SYMBOLS
    np.testing.assert_array_equal(result.obsm["spatial"], slide.obsm["spatial"])
    if images:
        (section,) = result.uns["spatial"].values()
        assert section["scalefactors"] == {"tissue_hires_scalef": 0.08}
        np.testing.assert_allclose(section["images"]["hires"] * 255, PIXELS, atol=1e-3)


# h5ad


def test_h5ad(server, tissue):
    slide = tissue.slide(3, array="visium", height=12, width=11)
    slide.write_h5ad(server.folder / "slide.h5ad")
    shutil.copyfile(server.folder / "slide.h5ad", server.folder / "39055556")  # figshare gives no name
    (server.folder / "slide.h5ad.gz").write_bytes(gzip.compress((server.folder / "slide.h5ad").read_bytes()))
    expected = read_slide(slide)
    for name in ("slide.h5ad", "39055556", "slide.h5ad.gz"):
        result = arrive_one(server, name, "h5ad")
        assert_same_slide(result, expected)
        pd.testing.assert_frame_equal(result.obs, expected.obs, check_categorical=False)
        assert list(result.var_names) == list(slide.var_names)
        np.testing.assert_array_equal(result.obsm["spatial"], slide.obsm["spatial"])


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_h5ad_in_an_archive(server, tmp_path, kind):
    """All of it is a collection; a member is a slide."""
    for name, slide in (("A1", make_slide()), ("D1", other_slide())):
        (tmp_path / "all" / "node" / name).mkdir(parents=True)
        slide.write_h5ad(tmp_path / "all" / "node" / name / "adata_RNA.h5ad")
    (tmp_path / "all" / "node" / "annotation.csv").write_text("Barcode,manual-anno\n")
    archive = f"all.{kind}"
    pack(server.folder / archive, tmp_path / "all")
    slides = arrive(server, archive, "h5ad", contents="collection")
    assert list(slides) == ["it/node/A1/adata_RNA", "it/node/D1/adata_RNA"]
    assert_same_slide(slides["it/node/D1/adata_RNA"], other_slide())
    assert_same_slide(arrive_one(server, archive, "h5ad", member="node/D1/adata_RNA.h5ad"), other_slide())
    assert_same_slide(arrive_one(server, archive, "h5ad", member="node/A1"), make_slide())
    assert len(server.requests) == 1
    assert "holds 2 slides (node/A1/adata_RNA, node/D1/adata_RNA), not one" in refused(server, archive, "h5ad")
    assert "holds no 'node/B1', but node/A1/adata_RNA.h5ad" in refused(server, archive, "h5ad", member="node/B1")


# CELLXGENE


def cellxgene_slide(changed: bool) -> AnnData:
    """An unfiltered slide in the schema: spots off the tissue as well, Ensembl ids, symbols in `feature_name`.

    `changed`: X is normalised, of fewer genes, and the counts are in `.raw`.
    """
    inside = make_slide()
    outside = make_slide()[:4].copy()
    outside.obs_names = [f"TTTT{i}-1" for i in range(4)]
    outside.obs[["array_row", "array_col"]] += 50
    slide = AnnData(
        sp.vstack([outside.X, inside.X]).tocsr(),
        obs=pd.concat([outside.obs, inside.obs]).assign(in_tissue=[0] * 4 + [1] * 9),
        var=pd.DataFrame({"feature_is_filtered": False}, index=inside.var_names),
    )
    slide.obsm["spatial"] = np.vstack([outside.obsm["spatial"], inside.obsm["spatial"]])
    slide.uns["spatial"] = {"is_single": True, "library": {"images": {}}}
    if not changed:
        slide.var["feature_name"] = SYMBOLS
        return slide
    slide.raw = slide.copy()
    slide = slide[:, [0, 1, 2, 4]].copy()
    slide.var["feature_name"] = [SYMBOLS[i] for i in (0, 1, 2, 4)]
    slide.X = slide.X.log1p()
    return slide


@pytest.mark.parametrize("changed", [False, True])
def test_cellxgene(server, changed):
    cellxgene_slide(changed).write_h5ad(server.folder / "slide.h5ad")
    result = arrive_one(server, "slide.h5ad", "cellxgene")
    assert_same_slide(result, make_slide())
    assert list(result.obs_names) == list(make_slide().obs_names)
    assert list(result.var_names) == list(make_slide().var_names)
    symbols = list(result.var["feature_name"])
    ids = list(result.var_names)
    assert symbols == ([*SYMBOLS[:3], ids[3], SYMBOLS[4], ids[5]] if changed else SYMBOLS)
    np.testing.assert_array_equal(result.obsm["spatial"], make_slide().obsm["spatial"])


def test_cellxgene_refuses(server):
    path = server.folder / "slide.h5ad"
    slide = cellxgene_slide(False)
    slide.X = slide.X.log1p()
    slide.write_h5ad(path)
    assert "holds non-integers" in refused(server, "slide.h5ad", "cellxgene")
    for name, change in (("none", {"in_tissue": 0}), ("many", {})):
        slide = cellxgene_slide(False)
        slide.obs = slide.obs.assign(**change)
        slide.uns["spatial"]["is_single"] = name != "many"
        slide.write_h5ad(server.folder / f"{name}.h5ad")
    assert 'obs["in_tissue"] is 1 at none of 13 spots' in refused(server, "none.h5ad", "cellxgene")
    assert "holds several sections" in refused(server, "many.h5ad", "cellxgene")


# Space Ranger


@pytest.mark.parametrize("matrix", ["h5", "mtx", "mtx.gz"])
@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_space_ranger_archives(server, tmp_path, matrix, kind):
    outs_with_images(tmp_path / "run" / "outs", make_slide(), matrix=matrix)
    pack(server.folder / f"run.{kind}", tmp_path / "run", top="./run/")
    assert_space_ranger(arrive_one(server, f"run.{kind}", "space_ranger"), make_slide())


def test_space_ranger_folder_in_place(tmp_path):
    outs = outs_with_images(tmp_path / "run" / "outs", make_slide())
    for path in (outs, outs.parent):
        source = Source("it", url=str(path), layout="space_ranger")
        (fetched,) = fetch_sources([source], tmp_path / "cache", progress=False)
        assert_space_ranger(read_source(fetched.path, source, tmp_path / "work")["it"], make_slide())


def test_several_outs(server, tmp_path):
    """A collection: in folders, and in archives within the archive."""
    outs_with_images(tmp_path / "all" / "A" / "outs", make_slide())
    outs_with_images(tmp_path / "all" / "deep" / "B", other_slide())
    outs_with_images(tmp_path / "c", other_slide())
    pack(tmp_path / "all" / "C.tar.gz", tmp_path / "c", top="outs/")
    (tmp_path / "all" / "__MACOSX" / "A").mkdir(parents=True)
    (tmp_path / "all" / "__MACOSX" / "A" / f"._{MATRIX}.h5").touch()
    (tmp_path / "all" / "annotation.csv").touch()
    pack(server.folder / "all.zip", tmp_path / "all")
    slides = arrive(server, "all.zip", "space_ranger", contents="collection")
    assert list(slides) == ["it/A", "it/C", "it/deep/B"]
    for name, slide in zip(slides, (make_slide(), other_slide(), other_slide()), strict=True):
        assert_space_ranger(slides[name], slide)
    assert_space_ranger(arrive_one(server, "all.zip", "space_ranger", member="C/outs"), other_slide())


def test_visium_hd_is_not_one_slide(server, tmp_path):
    for size in ("002", "008"):
        write_space_ranger(tmp_path / "hd" / "binned_outputs" / f"square_{size}um", make_slide())
    pack(server.folder / "hd.zip", tmp_path / "hd")
    assert "holds Visium HD" in refused(server, "hd.zip", "space_ranger", contents="collection")
    assert_same_slide(arrive_one(server, "hd.zip", "space_ranger", member="binned_outputs/square_008um"), make_slide())


# GEO


@pytest.mark.parametrize("matrix", ["h5", "mtx", "mtx.gz"])
@pytest.mark.parametrize("compressed", [True, False])
def test_geo_bundle_of_two_samples(server, matrix, compressed):
    folder = heap(server, {"GSM1_A_": make_slide(), "GSM1_A_rep2_": other_slide()}, matrix, compressed)
    pack(server.folder / "GSE1_RAW.tar", folder)
    slides = arrive(server, "GSE1_RAW.tar", "geo", contents="collection")
    assert list(slides) == ["it/GSM1_A", "it/GSM1_A_rep2"]
    assert_space_ranger(slides["it/GSM1_A"], make_slide())
    assert_space_ranger(slides["it/GSM1_A_rep2"], other_slide())


def test_matrix_and_spatial_archive_of_two_addresses(server, tmp_path):
    """As 10x Genomics serves its samples: two files make one slide."""
    outs = outs_with_images(tmp_path / "outs", make_slide())
    shutil.copyfile(outs / f"{MATRIX}.h5", server.folder / f"V1_Heart_{MATRIX}.h5")
    pack(server.folder / "V1_Heart_spatial.tar.gz", outs / "spatial", top="spatial/")
    names = f"V1_Heart_{MATRIX}.h5|V1_Heart_spatial.tar.gz"
    assert_space_ranger(arrive_one(server, names, "geo"), make_slide())
    assert_space_ranger(arrive_one(server, names, "geo"), make_slide())  # from the cache, unpacked already
    assert len(server.requests) == 2


def test_samples_as_archives_and_folders(server, tmp_path):
    """Whole outputs in archives, a matrix beside a folder, and words that name no sample."""
    folder = tmp_path / "bundle"
    outs = outs_with_images(tmp_path / "outs", make_slide())
    (folder / "GSM3" / "counts").mkdir(parents=True)
    pack(folder / "GSM2_B.tar.gz", outs, top="outs/")
    shutil.copyfile(outs / f"{MATRIX}.h5", folder / "GSM3" / "counts" / f"{MATRIX}.h5")
    shutil.copytree(outs / "spatial", folder / "GSM3" / "spatial")
    pack(server.folder / "GSE2_RAW.tar", folder)
    slides = arrive(server, "GSE2_RAW.tar", "geo", contents="collection")
    assert list(slides) == ["it/GSM2_B", "it/GSM3/counts"]
    for slide in slides.values():
        assert_space_ranger(slide, make_slide())


def test_positions_of_another_slide_are_not_taken(server, tmp_path):
    """Every Visium slide has the same barcodes, so nothing but names and tissue tells them apart."""
    folder = heap(server, {"GSM1_A_": make_slide()})
    positions = folder / "GSM1_A_tissue_positions_list.csv.gz"
    positions.rename(folder / "GSM2_B_tissue_positions_list.csv.gz")
    pack(server.folder / "b.tar", folder)
    assert "no tissue_positions file begins like the matrix 'GSM1_A_...'" in refused(server, "b.tar", "geo")
    (folder / "GSM2_B_tissue_positions_list.csv.gz").rename(folder / "GSM1_tissue_positions_list.csv.gz")
    pack(server.folder / "c.tar", folder)  # of the same accession, and no other matrix there
    assert_space_ranger(arrive_one(server, "c.tar", "geo"), make_slide(), images=False)
    shutil.copyfile(folder / f"GSM1_A_{MATRIX}.h5", folder / f"GSM1_C_{MATRIX}.h5")
    pack(server.folder / "d.tar", folder)
    assert "and like no other" in refused(server, "d.tar", "geo")


def test_positions_that_say_off_tissue_are_of_another_slide(server):
    folder = heap(server, {"GSM1_": make_slide()}, compressed=False)
    path = folder / "GSM1_tissue_positions_list.csv"
    table = pd.read_csv(path, header=None)
    table.loc[[1, 4], 1] = 0
    table.to_csv(path, header=False, index=False)
    pack(server.folder / "a.tar", folder)
    error = refused(server, "a.tar", "geo")
    assert "2 of 9 spots of GSM1 lie outside of the tissue by their positions, expected none" in error


def test_geo_refuses(server):
    folder = heap(server, {"GSM1_": make_slide()}, matrix="mtx")
    shutil.copyfile(folder / "GSM1_tissue_positions_list.csv.gz", folder / "GSM1_tissue_positions.csv.gz")
    pack(server.folder / "two.tar", folder)
    assert "has several files of positions (GSM1_tissue_positions.csv.gz," in refused(server, "two.tar", "geo")
    (folder / "GSM1_tissue_positions.csv.gz").unlink()
    features = folder / "GSM1_features.tsv.gz"
    features.write_bytes(features.read_bytes()[:-9])
    pack(server.folder / "cut.tar", folder)
    assert "GSM1_features.tsv.gz is damaged" in refused(server, "cut.tar", "geo")
    features.unlink()
    pack(server.folder / "less.tar", folder)
    assert "GSM1_matrix.mtx.gz has no features.tsv beside it" in refused(server, "less.tar", "geo")
    (folder / "GSM1_matrix.mtx.gz").rename(folder / "GSM1_raw_feature_bc_matrix_matrix.mtx.gz")
    pack(server.folder / "raw.tar", folder)
    assert f"holds no {MATRIX}.h5, or matrix.mtx" in refused(server, "raw.tar", "geo")


# mtx


@pytest.mark.parametrize("matrix", ["mtx", "mtx.gz"])
@pytest.mark.parametrize("place", [MATRIX, "", "counts"])
def test_mtx_beside_spatial(server, tmp_path, matrix, place):
    outs = outs_with_images(tmp_path / "slide", make_slide(), matrix=matrix)
    folder = outs / MATRIX
    if place == "":
        for path in folder.iterdir():
            path.rename(outs / path.name)
    elif place != MATRIX:
        folder.rename(outs / place)
    pack(server.folder / "slide.zip", outs.parent / "slide", top="slide/")
    assert_space_ranger(arrive_one(server, "slide.zip", "mtx"), make_slide())


@pytest.mark.parametrize("columns", [1, 2])
def test_genes_of_older_versions(server, tmp_path, columns):
    """`genes.tsv` with id and symbol, or with a name alone."""
    outs = outs_with_images(tmp_path / "slide", make_slide(), matrix="mtx")
    table = pd.read_csv(outs / MATRIX / "features.tsv", sep="\t", header=None, keep_default_na=False)
    (outs / MATRIX / "features.tsv").unlink()
    table.iloc[:, :columns].to_csv(outs / MATRIX / "genes.tsv", sep="\t", header=False, index=False)
    pack(server.folder / "slide.tar.gz", outs)
    result = arrive_one(server, "slide.tar.gz", "mtx")
    if columns == 2:
        assert_space_ranger(result, make_slide())
    else:
        assert_same_slide(result, make_slide())
        assert list(result.var["gene_name"]) == list(make_slide().var_names)


# Zarr


def write_store(folder: Path, tables: dict[str, AnnData], version: int = 3) -> Path:
    """A SpatialData store, as far as its tables go."""
    (folder / "images").mkdir(parents=True)
    zarr.open_group(folder, mode="a", zarr_format=version).create_group("tables")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from anndata import settings

        with settings.override(zarr_write_format=version):
            for name, slide in tables.items():
                slide.write_zarr(folder / "tables" / name)
    return folder


@pytest.mark.parametrize("version", [2, 3])
def test_zarr_store(server, tmp_path, version):
    write_store(tmp_path / "all" / "visium.zarr", {"table": make_slide()}, version)
    pack(server.folder / "visium.zarr.zip", tmp_path / "all")
    result = arrive_one(server, "visium.zarr.zip", "zarr")
    assert_same_slide(result, make_slide())
    assert list(result.var_names) == list(make_slide().var_names)
    np.testing.assert_array_equal(result.obsm["spatial"], make_slide().obsm["spatial"])


def test_zarr_positions_in_pixels(tmp_path, tissue):
    slide = tissue.slide(4, array="square", height=9, width=10)
    expected = read_slide(slide)
    slide.obs = slide.obs[["label"]]
    slide.obsm["spatial"] = slide.obsm["spatial"] * 137.0
    store = write_store(tmp_path / "slide.zarr", {"table": slide})
    for path in (store, store / "tables" / "table"):
        result = read_source(path, Source("it", layout="zarr"), tmp_path / "work")["it"]
        np.testing.assert_array_equal(result.X.toarray(), expected.X.toarray())
        differences = np.ptp(result.obs[["array_row", "array_col"]].to_numpy().astype(float), axis=0)
        assert set(differences) == set(np.ptp(expected.obs[["array_row", "array_col"]].to_numpy(), axis=0))


def test_zarr_regions_and_tables(server, tmp_path):
    both = make_slide()
    both.obs["region"] = pd.Categorical(["left"] * 4 + ["right"] * 5)
    both.uns["spatialdata_attrs"] = {"region": ["left", "right"], "region_key": "region", "instance_key": "spot"}
    write_store(tmp_path / "a" / "two.zarr", {"table": both})
    pack(server.folder / "two.tar.gz", tmp_path / "a")
    slides = arrive(server, "two.tar.gz", "zarr", contents="collection")
    assert list(slides) == ["it/two/left", "it/two/right"]
    assert_same_slide(slides["it/two/right"], make_slide()[4:].copy())
    write_store(tmp_path / "b" / "bins.zarr", {"square_008um": make_slide(), "square_016um": other_slide()})
    pack(server.folder / "bins.zip", tmp_path / "b")
    assert "bins.zarr has several tables (bins.zarr/tables/square_008um," in refused(server, "bins.zip", "zarr")
    member = "bins.zarr/tables/square_016um"
    assert_same_slide(arrive_one(server, "bins.zip", "zarr", member=member), other_slide())


@pytest.mark.parametrize("place", ["filters", "compressor"])
def test_zarr_never_unpickles(server, tmp_path, place):
    """The codec "pickle" of version 2 would run what it reads."""
    store = write_store(tmp_path / "all" / "evil.zarr", {"table": make_slide()}, version=2)
    path = store / "tables" / "table" / "obs" / "_index" / ".zarray"
    content = json.loads(path.read_text())
    codec = {"id": "pickle", "protocol": 5}
    content[place] = [codec] if place == "filters" else codec
    path.write_text(json.dumps(content))
    pack(server.folder / "evil.zip", tmp_path / "all")
    assert "asks for the codec 'pickle', which is not trusted" in refused(server, "evil.zip", "zarr")


def test_damaged_zarr(server, tmp_path):
    store = write_store(tmp_path / "all" / "cut.zarr", {"table": make_slide()})
    shutil.rmtree(store / "tables" / "table" / "obs")
    pack(server.folder / "cut.zip", tmp_path / "all")
    assert "is damaged, cut short or not an AnnData in zarr" in refused(server, "cut.zip", "zarr")
    (store / "zarr.json").write_text("{")
    pack(server.folder / "json.zip", tmp_path / "all")
    assert "cut.zarr/zarr.json is damaged, cut short or not JSON" in refused(server, "json.zip", "zarr")


# What is refused


def test_a_file_that_is_cut_on_the_server(server):
    make_slide().write_h5ad(server.folder / "a.h5ad")
    data = (server.folder / "a.h5ad").read_bytes()
    (server.folder / "a.h5ad").write_bytes(data[: len(data) // 2])
    for layout in ("h5ad", "cellxgene"):
        assert "a.h5ad is damaged, cut short or not an .h5ad file" in refused(server, "a.h5ad", layout)


def test_a_matrix_that_is_cut_in_the_archive(server, tmp_path):
    outs = outs_with_images(tmp_path / "run" / "outs", make_slide())
    data = (outs / f"{MATRIX}.h5").read_bytes()
    (outs / f"{MATRIX}.h5").write_bytes(data[: len(data) // 2])
    pack(server.folder / "run.zip", tmp_path / "run")
    for layout in ("space_ranger", "geo"):
        assert f"{MATRIX}.h5 is damaged, cut short" in refused(server, "run.zip", layout)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_unsafe_archive(server, kind):
    path = server.folder / f"evil.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("../evil", "evil")
    else:
        with tarfile.open(path, "w") as archive:
            link = tarfile.TarInfo("outs")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc"
            archive.addfile(link)
    assert "it is not unpacked" in refused(server, path.name, "space_ranger")
    assert not list(server.folder.parent.rglob("evil"))


def test_the_wrong_layout(server, tmp_path):
    with tarfile.open(server.folder / "text.tar", "w") as archive:
        info = tarfile.TarInfo("readme.txt")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    for layout, expected in (
        ("space_ranger", "Space Ranger folder"),
        ("geo", f"{MATRIX}.h5"),
        ("mtx", "matrix.mtx"),
        ("zarr", "zarr store"),
    ):
        error = refused(server, "text.tar", layout)
        assert f"holds no {expected}" in error
        assert "but readme.txt: correct layout or url in the manifest." in error
    assert "its layout is not known: put one of h5ad, cellxgene" in refused(server, "text.tar", "")
    with pytest.raises(FileNotFoundError, match=r"^it: .* does not exist: fetch the source first"):
        read_source(tmp_path / "no", Source("it", layout="h5ad"), tmp_path / "work")


def test_slides_that_are_no_counts(server, tmp_path):
    slide = make_slide()
    slide.X = slide.X * 0.5
    slide.write_h5ad(server.folder / "a.h5ad")
    assert "X holds non-integers" in refused(server, "a.h5ad", "h5ad")
    write_store(tmp_path / "all" / "a.zarr", {"table": slide})
    pack(server.folder / "a.zip", tmp_path / "all")
    assert "a.zarr/tables/table: X holds non-integers" in refused(server, "a.zip", "zarr")


# Real slides


@pytest.mark.real_data
def test_real_slides(server, real_data):
    name = "aspheart_2_CN73_E2.h5ad"
    shutil.copyfile(real_data / "slides" / name, server.folder / name)
    expected = read_slide(real_data / "slides" / name)
    result = arrive_one(server, name, "h5ad")
    assert (result.X != expected.X).nnz == 0
    pd.testing.assert_frame_equal(result.obs, expected.obs)


@pytest.mark.real_data
def test_real_space_ranger_folder_zipped(server, real_data):
    folder = real_data / "original_formats" / "visium_targeted_breast"
    expected = read_slide(folder)
    pack(server.folder / "breast.zip", folder, top="breast/outs/")
    server.misbehave("breast.zip", drop_after=500_000, times=1)
    for layout in ("space_ranger", "geo"):
        result = arrive_one(server, "breast.zip", layout)
        assert result.shape == (4325, 1056)
        assert (result.X != expected.X).nnz == 0
        pd.testing.assert_frame_equal(result.obs, expected.obs)
        np.testing.assert_array_equal(result.obsm["spatial"], expected.obsm["spatial"])
    assert [request.status for request in server.requests] == [200, 206]
