"""The `stimg` command as a user meets it."""

import warnings
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from command_line import stimg

from modeling_stimg import (
    GeneVocabulary,
    STImageMAEModel,
    STPatchProcessor,
    embed_slide,
    hub,
    plot_domains,
    read_slide,
)
from modeling_stimg.plotting import save_figure


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, slides: dict[str, AnnData]) -> Path:
    path = tmp_path_factory.mktemp("cli") / "slide.h5ad"
    slides["staggered"].write_h5ad(path)
    return path


def test_embed_writes_the_slide_with_an_embedding_and_a_map(
    slide: Path, checkpoint: Path, slides: dict[str, AnnData], tmp_path: Path
):
    run = stimg("embed", slide, "--model", checkpoint, "--output", tmp_path / "a.h5ad", "--plot", tmp_path / "a.png")
    assert run.returncode == 0, run.stderr
    assert "matched 120 of 120 genes" in run.stderr
    written, original = anndata.read_h5ad(tmp_path / "a.h5ad"), slides["staggered"]
    assert list(written.obs_names) == list(original.obs_names)
    assert (written.X != original.X).nnz == 0
    here = original.copy()
    embed_slide(
        here, STImageMAEModel.from_pretrained(checkpoint), STPatchProcessor.from_pretrained(checkpoint), progress=False
    )
    np.testing.assert_allclose(written.obsm["X_stimg"], here.obsm["X_stimg"], atol=1e-5)
    assert written.obs["stimg_domain"].nunique() == 7
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.h5ad", "a.png"]

    assert stimg("embed", slide, "--model", checkpoint, "--output", tmp_path / "b.h5ad").returncode == 0
    again = anndata.read_h5ad(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(again.obsm["X_stimg"], written.obsm["X_stimg"])


def test_inspect_tells_what_a_slide_holds(slide: Path, checkpoint: Path, slides: dict[str, AnnData]):
    run = stimg("inspect", slide, "--model", checkpoint, "--window-size", 6)
    assert run.returncode == 0, run.stderr
    assert f"spots:           {slides['staggered'].n_obs}\n" in run.stdout
    assert "staggered, 14 x 12 sites" in run.stdout
    assert "fullest window:  36 of 36 sites" in run.stdout
    assert "120 of its genes measured, 0 columns unmatched" in run.stdout
    by_rank = stimg("inspect", slide, "--compaction", "rank", "--window-size", 6)
    assert "fullest window:  18 of 36 sites" in by_rank.stdout


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_inspect_writes_a_row_a_slide(slide: Path, slides: dict[str, AnnData], tmp_path: Path):
    twice = slides["square"][[0, 1, 2, 3, 4, 4]].copy()
    twice.obs_names_make_unique()
    twice.var_names = [*twice.var_names[:110], *(f"foreign {i}" for i in range(10))]
    twice.write_h5ad(tmp_path / "twice.h5ad")
    rows = "".join(f"{gene}\t{gene}\n" for gene in slides["square"].var_names)
    (tmp_path / "genes.tsv").write_text(f"gene_id\tgene_name\n{rows}")
    run = stimg(
        "inspect", slide, tmp_path / "twice.h5ad", "--genes", tmp_path / "genes.tsv", "--table", tmp_path / "t.tsv"
    )
    assert run.returncode == 0, run.stderr
    table = pd.read_csv(tmp_path / "t.tsv", sep="\t", index_col="slide")
    assert list(table.index) == ["slide", "twice"]
    row = table.loc["twice"]
    assert (row.spots, row.sites, row.genes, row.measured, row.unmatched) == (6, 5, 120, 110, 10)
    assert row.fill == pytest.approx(5 / (row.height * row.width), rel=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["genes.tsv", "t.tsv", "twice.h5ad"]


def test_inspect_names_the_bad_slide_and_tells_the_others(slide: Path, slides: dict[str, AnnData], tmp_path: Path):
    (tmp_path / "bad.h5ad").write_text("no slide")
    (tmp_path / "again").mkdir()
    slides["square"].write_h5ad(tmp_path / "again" / "slide.h5ad")
    paths = slide, tmp_path / "bad.h5ad", tmp_path / "again" / "slide.h5ad"
    run = stimg("inspect", *paths, "--table", tmp_path / "t.tsv")
    assert run.returncode == 2
    assert "error: 1 of 3 slides:" in run.stderr
    assert "bad.h5ad" in run.stderr
    table = pd.read_csv(tmp_path / "t.tsv", sep="\t")
    assert table["slide"].tolist() == [str(slide), str(paths[2])], "two slides of one name are told apart"
    assert table["spots"].tolist() == [slides["staggered"].n_obs, slides["square"].n_obs]


@pytest.mark.real_data
def test_every_real_slide_becomes_an_image(real_data: Path, tmp_path: Path):
    paths = sorted((real_data / "slides").glob("*.h5ad"))
    tables = {}
    for compaction in ("lattice", "rank"):
        table = tmp_path / f"{compaction}.tsv"
        genes = real_data / "genes" / "ensembl_symbol.tsv"
        run = stimg("inspect", *paths, "--genes", genes, "--compaction", compaction, "--table", table)
        assert run.returncode == 0, run.stderr
        tables[compaction] = pd.read_csv(table, sep="\t", index_col="slide")
    lattice, rank = tables["lattice"], tables["rank"]
    assert list(lattice.index) == [path.stem for path in paths]
    assert (lattice.sites < lattice.spots).sum() == 2, "two of the heart slides have spots that share a position"
    assert (lattice.measured >= 0.85 * lattice.genes).all()
    staggered = lattice.index[(lattice.array == "staggered") & (lattice.fill > 0.6)]
    assert len(staggered) >= 7
    assert (lattice.loc[staggered, "fullest_window"] == 256).all()
    assert (rank.loc[staggered, "fullest_window"] == 128).all()
    vocabulary = GeneVocabulary.from_table(genes)
    for path in paths:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*stand on an array position")
            image = STPatchProcessor(vocabulary).slide_to_image(read_slide(path), on_duplicate="first")
        row = lattice.loc[path.stem]
        assert (image.height, image.width, image.num_spots) == (row.height, row.width, row.sites), path
        assert (image.num_genes, len(image.spot_of_obs)) == (row.measured, row.spots), path
        assert np.isfinite(image.values).all(), path


@pytest.mark.parametrize("kind", ["classes", "numbers", "missing"])
def test_maps_are_drawn_for_classes_numbers_and_missing_labels(slides: dict[str, AnnData], kind: str, tmp_path: Path):
    adata = slides["staggered"]
    values = {
        "classes": adata.obs["label"],
        "numbers": adata.obs["array_row"].to_numpy(float),
        "missing": [None if i % 3 else "a" for i in range(adata.n_obs)],
    }[kind]
    ax = plot_domains(adata, values, title="a map")
    assert ax.get_title() == "a map"
    (discs,) = ax.collections
    assert len(discs.get_offsets()) == adata.n_obs
    if kind != "numbers":
        texts = [t.get_text() for t in ax.get_legend().get_texts()]
        assert texts == (["a", "no label"] if kind == "missing" else sorted(set(values)))
    save_figure(ax.figure, tmp_path / "map.png")
    assert [p.name for p in tmp_path.iterdir()] == ["map.png"]


def test_without_a_model_the_one_of_the_checkout_is_taken(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(hub, "PUBLISHED", checkpoint)
    assert hub.find_model(None).folder == checkpoint
    with pytest.raises(ValueError, match="'v1' is given without a model"):
        hub.find_model(None, "v1")
    monkeypatch.setattr(hub, "PUBLISHED", tmp_path)
    with pytest.raises(ValueError, match="no checkout with a published one"):
        hub.find_model(None)
