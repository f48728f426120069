"""What stimg writes is taken by scanpy as its own: neighbours, Leiden and maps of an embedded slide."""

import os

import anndata
import numpy as np
import pytest
from anndata import AnnData

from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor, embed_slide, find_domains, pl

os.environ.setdefault("MPLBACKEND", "agg")
sc = pytest.importorskip("scanpy", reason="scanpy is not installed: pip install 'stimg[interop]', about 300 MB")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scanpy_goes_on_from_an_embedded_slide(
    slides: dict[str, AnnData], model: STImageMAEForPreTraining, processor: STPatchProcessor, tmp_path
):
    adata = slides["square"].copy()
    embed_slide(adata, model, processor, progress=False)
    find_domains(adata, 3)
    adata.write_h5ad(tmp_path / "embedded.h5ad")
    adata = anndata.read_h5ad(tmp_path / "embedded.h5ad")
    sc.pp.neighbors(adata, use_rep="X_stimg", n_neighbors=10)
    assert adata.uns["neighbors"]["params"]["use_rep"] == "X_stimg"
    nearest = ((adata.obsm["X_stimg"][:, None] - adata.obsm["X_stimg"][None]) ** 2).sum(-1)
    np.fill_diagonal(nearest, np.inf)
    linked = adata.obsp["distances"].toarray()[np.arange(adata.n_obs), nearest.argmin(1)] > 0
    assert linked.mean() > 0.95, "each spot's nearest by the embedding is its neighbour"
    sc.tl.leiden(adata, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    assert adata.obs["leiden"].nunique() >= 1
    ax = sc.pl.embedding(adata, basis="spatial", color="stimg_domain", show=False)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["0", "1", "2"]
    colours = {tuple(np.round(c, 3)) for c in pl.domains(adata).collections[0].get_facecolor()}
    drawn = {
        tuple(np.round(c, 3)) for group in ax.collections for c in group.get_facecolor() if group.get_offsets().size
    }
    assert colours <= drawn, "scanpy takes the colours that stand in uns"
    adata.write_h5ad(tmp_path / "again.h5ad")
    assert "stimg" in anndata.read_h5ad(tmp_path / "again.h5ad").uns
