"""find_domains: domains without labels that a user can count on, smoothing against plain loops, and provenance."""

import sys
from collections import Counter

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from sklearn.metrics import adjusted_rand_score

import modeling_stimg
from modeling_stimg import STImageMAEModel, STPatchProcessor, clustering, embed_slide, find_domains, keys
from modeling_stimg.compaction_stimg import compact
from modeling_stimg.domains import by_size, majority, site_neighbours
from modeling_stimg.provenance import embedding_settings, fingerprint, same_settings

SIZES = (60, 40, 28)


@pytest.fixture
def embedded(slides: dict[str, AnnData]) -> AnnData:
    """A slide of which the first spots in the order of rows are one group, then the next, of falling size, ... ."""
    adata = slides["square"].copy()
    sizes = [*SIZES, adata.n_obs - sum(SIZES)]
    adata.obs["group"] = np.repeat(np.arange(4), sizes)
    rng = np.random.default_rng(0)
    centres = 8 * rng.normal(size=(4, 12))
    adata.obsm["X_stimg"] = (centres[adata.obs["group"]] + rng.normal(size=(adata.n_obs, 12))).astype(np.float32)
    return adata


@pytest.mark.parametrize(
    ("number", "method", "used"),
    [(4, "auto", "gmm"), (4, "kmeans", "kmeans"), (4, "leiden", "leiden"), (None, "auto", "leiden")],
)
def test_groups_are_found_and_called_by_their_size(embedded: AnnData, number, method: str, used: str):
    before = embedded.copy()
    find_domains(embedded, number, method=method)
    found = embedded.obs["stimg_domain"]
    assert found.dtype == pd.CategoricalDtype(["0", "1", "2", "3"])
    assert adjusted_rand_score(before.obs["group"], found) == 1
    sizes = found.value_counts()[found.cat.categories]
    assert sizes.is_monotonic_decreasing
    told = embedded.uns["stimg"]["domains"]["stimg_domain"]
    assert (told["method"], told["key"], told["found"], told.get("n_domains")) == (used, "X_stimg", 4, number)
    assert len(set(embedded.uns["stimg_domain_colors"])) == 4
    del embedded.obs["stimg_domain"], embedded.uns["stimg"], embedded.uns["stimg_domain_colors"]
    pd.testing.assert_frame_equal(embedded.obs, before.obs)
    assert list(embedded.uns) == list(before.uns)


@pytest.mark.parametrize("method", ["gmm", "kmeans", "leiden"])
def test_the_seed_decides_and_scale_does_not(slides: dict[str, AnnData], method: str):
    adata = slides["square"].copy()
    adata.obsm["X_stimg"] = np.random.default_rng(0).normal(size=(adata.n_obs, 8)).astype(np.float32)  # one cloud
    adata.obsm["small"] = adata.obsm["X_stimg"] / 1024  # exact in binary
    found = {}
    for name, options in {"a": {}, "b": {}, "c": {"seed": 1}, "d": {"key": "small"}}.items():
        find_domains(adata, 5, method=method, key_added=name, **options)
        found[name] = adata.obs[name].to_numpy(str)
    assert (found["a"] == found["b"]).all()
    assert (found["a"] != found["c"]).any()
    assert adjusted_rand_score(found["a"], found["d"]) == pytest.approx(1)
    assert list(adata.uns["stimg"]["domains"]) == ["a", "b", "c", "d"]


def test_equal_spots_have_neighbours_like_others():
    """Neighbours are looked for in pieces: the graph is that of scikit-learn, which takes all spots at once."""
    from sklearn.neighbors import kneighbors_graph

    features = np.random.default_rng(0).normal(size=(90, 5)).astype(np.float32)
    features[20:25] = features[60]
    for at_once in (7, 4096):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clustering, "SPOTS_AT_ONCE", at_once)
            found = {tuple(edge) for edge in clustering.NeighbourGraph(features).graph.get_edgelist()}
        whole = kneighbors_graph(features, clustering.NUM_NEIGHBOURS, mode="connectivity").tocoo()
        assert found == {(min(a, b), max(a, b)) for a, b in zip(whole.row.tolist(), whole.col.tolist(), strict=True)}


def plain_square(adata: AnnData, spot: int, radius: int) -> list[int]:
    rows, cols = compact(adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy(), "lattice")
    near = (abs(rows - rows[spot]) <= radius) & (abs(cols - cols[spot]) <= radius)
    return np.flatnonzero(near).tolist()


@pytest.mark.parametrize("array", ["staggered", "square"])
def test_smoothed_labels_are_those_of_most_neighbours(slides: dict[str, AnnData], array: str):
    adata = slides[array][::2].copy()  # with holes
    adata.obs.iloc[3, [adata.obs.columns.get_loc(c) for c in ("array_row", "array_col")]] = adata.obs.iloc[7][
        ["array_row", "array_col"]
    ].to_numpy()  # two spots on a site
    labels = by_size(np.random.default_rng(1).integers(0, 4, adata.n_obs))
    smooth = majority(site_neighbours(adata, 2), labels)
    for spot in range(adata.n_obs):
        votes = Counter(labels[plain_square(adata, spot, 2)].tolist())
        most = max(votes.values())
        winners = sorted(label for label, count in votes.items() if count == most)
        assert smooth[spot] == (labels[spot] if labels[spot] in winners else winners[0])


def test_smoothing_takes_single_spots_away(embedded: AnnData):
    embedded.obsm["X_stimg"][10] = embedded.obsm["X_stimg"][-1]  # a spot of the last group within the first
    find_domains(embedded, 4, key_added="rough")
    find_domains(embedded, 4, smoothing=1, key_added="labels")
    find_domains(embedded, 4, smoothing=1, smoothed="embedding", key_added="means")
    assert embedded.obs["rough"].iloc[10] != embedded.obs["rough"].iloc[9]
    assert embedded.obs["labels"].iloc[10] == embedded.obs["labels"].iloc[9]
    assert embedded.obs["means"].iloc[10] == embedded.obs["means"].iloc[9]
    means = embedded.copy()
    means.obsm["X_stimg"] = np.stack(
        [embedded.obsm["X_stimg"][plain_square(embedded, spot, 1)].mean(0) for spot in range(embedded.n_obs)]
    )
    find_domains(means, 4)
    assert (means.obs["stimg_domain"] == embedded.obs["means"]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dbscan"}, "method is 'dbscan'"),
        ({"method": "gmm"}, 'method is "gmm", which needs n_domains'),
        ({"n_domains": 1}, "n_domains is 1: expected at least 2"),
        ({"n_domains": 500}, "has only 145 different rows"),
        ({"key": "X_pca"}, "obsm has no 'X_pca' .it has 'spatial', 'X_stimg'"),
        ({"smoothing": -1}, "smoothing is -1"),
        ({"smoothed": "spots"}, "smoothed is 'spots'"),
        ({"seed": -1}, "seed is -1"),
        ({"resolution": 0}, "resolution is 0"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(embedded: AnnData, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        find_domains(embedded, **options)
    assert "stimg_domain" not in embedded.obs
    assert "stimg" not in embedded.uns


def test_broken_embeddings_and_foreign_keys_are_told(embedded: AnnData, monkeypatch: pytest.MonkeyPatch):
    embedded.obsm["X_nan"] = embedded.obsm["X_stimg"].copy()
    embedded.obsm["X_nan"][3:5, 1] = np.nan
    with pytest.raises(ValueError, match=r"obsm\['X_nan'\] has NaN or infinite values at 2 spots"):
        find_domains(embedded, 4, key="X_nan")
    embedded.uns["stimg"] = "mine"
    with pytest.raises(ValueError, match=r"uns\['stimg'\] is a str"):
        find_domains(embedded, 4)
    del embedded.uns["stimg"]
    monkeypatch.setitem(sys.modules, "igraph", None)
    with pytest.raises(ImportError, match=r"pip install 'stimg\[domains\]', or tell the number of domains"):
        find_domains(embedded)


# ---------------------------------------------------------------- provenance


def test_what_made_an_embedding_survives_a_file(slides, processor, checkpoint, tmp_path):
    adata = slides["square"].copy()
    model = STImageMAEModel.from_pretrained(checkpoint)
    options = {"stride": 4, "smoothing": [0, 2], "seed": 3, "centered": True}
    embed_slide(adata, model, processor, progress=False, **options)
    embed_slide(adata, model, processor, progress=False, key_added="X_other")
    find_domains(adata, 3)
    adata.write_h5ad(tmp_path / "a.h5ad")
    read = anndata.read_h5ad(tmp_path / "a.h5ad")
    told = read.uns["stimg"]["embedding"]["X_stimg"]
    assert told["model"] == checkpoint.name
    assert str(checkpoint.parent) not in str(dict(told))
    assert (told["readout"], told["stride"], told["seed"], told["num_channels"]) == ("spot", 4, 3, 32)
    assert (told["matched_genes"], told["source_genes"]) == (120, 120)
    assert told["stimg_version"] == modeling_stimg.__version__
    assert not told["projected"]
    assert told["centered"]
    assert told["gene_selection"] == "weighted"
    np.testing.assert_array_equal(told["smoothing"], [0, 2])
    assert set(read.uns["stimg"]["embedding"]) == {"X_stimg", "X_other"}
    assert read.obs["stimg_domain"].cat.categories.tolist() == ["0", "1", "2"]
    assert list(read.uns["stimg_domain_colors"]) == adata.uns["stimg_domain_colors"]

    assert same_settings(told, embedding_settings(model, processor, **options)) == []
    assert same_settings(told, embedding_settings(model, processor, **{**options, "stride": 3})) == ["stride"]
    assert same_settings(told, embedding_settings(model, processor, **{**options, "smoothing": 2})) == ["smoothing"]
    assert same_settings({}, embedding_settings(model, processor)) != []


def test_a_fingerprint_is_that_of_the_encoder_and_its_genes(model, vocabulary, processor, tmp_path):
    first = fingerprint(model, processor)
    assert fingerprint(model.stimg, processor) == first
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    again, its = (
        STImageMAEModel.from_pretrained(tmp_path / "again"),
        STPatchProcessor.from_pretrained(tmp_path / "again"),
    )
    assert fingerprint(again, its) == first
    assert fingerprint(model, STPatchProcessor(vocabulary, window_size=6, num_channels=32, target_sum=1e3)) != first
    model.stimg.get_input_embeddings().weight.data[0, 0] += 1e-6
    assert fingerprint(model, processor) != first


def test_models_of_the_hub_are_called_by_their_commit(model, processor):
    from modeling_stimg.provenance import model_name

    commit = "0123456789abcdef0123456789abcdef01234567"
    for path, name in {
        f"/home/me/.cache/huggingface/hub/models--lab--made/snapshots/{commit}": f"lab/made@{commit}",
        "runs/mine/": "mine",
        "": "unnamed",
    }.items():
        model.config._name_or_path = path
        assert model_name(model) == name
    model.config._name_or_path, model.config._commit_hash = "lab/made", commit
    assert model_name(model) == f"lab/made@{commit}"


def test_a_foreign_uns_is_told_before_anything_is_computed(slides, processor, model):
    adata = slides["square"].copy()
    adata.uns["stimg"] = {keys.OF_EMBEDDING: 3}
    with pytest.raises(ValueError, match="uns\\['stimg/embedding'\\] is a int"):
        embed_slide(adata, model, processor, progress=False)
    assert "X_stimg" not in adata.obsm
