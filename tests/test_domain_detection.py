"""The evaluation script on phantom slides: all rows, numbers that can be checked, honest words, runs that go on."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, adjusted_rand_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from data_processing.corpus import SlideRecord, save_pretraining
from data_processing.phantom import PhantomTissue
from data_processing.splits import block_splits, encode_labels, spot_splits, transfer_splits
from eval import domain_scores
from eval.baselines.gene_token import GeneTokenConfig, GeneTokenForPreTraining, nearest_spots_mean
from eval.baselines.shuffled import shuffle_spots
from eval.domain_scores import Protocol, plan_set
from eval.embedders import EncoderEmbedder, cached, load_embedders, load_gene_token_embedders, slide_key
from eval.evaluation_sets import load_given_set
from eval.features import BY_DEFAULT, embedder_methods
from eval.run_domain_detection import main
from modeling_stimg import STImageMAEModel, STPatchProcessor, embed_slide, read_slide

ROOT = Path(__file__).parents[1]
BASELINES = ["raw", "PCA", "coordinates only", "raw, counts shuffled"]
MODELS = ["untrained, random start", "stimg", f"stimg{BY_DEFAULT}"]
NO_FIGURES = ("--figures", "false")
QUICK = ("--num_splits", "2", "--mlp_epochs", "2", "--smoothings", "0", "1", "--tile_side", "3")


@pytest.fixture(scope="module")
def checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of all tests, with a neighbourhood mean by default."""
    copy = shutil.copytree(checkpoint, tmp_path_factory.mktemp("checkpoint") / "model")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"embedding_defaults": {"smoothing": 2}}))
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tissue: PhantomTissue) -> Path:
    """Two slides of two patients, one of them with unlabelled spots and a class of its own."""
    folder = tmp_path_factory.mktemp("evaluation")
    tissue.slide(8, height=13, width=13, median_counts=300).write_h5ad(folder / "a.h5ad")
    slide = tissue.slide(9, array="square", height=12, width=12, median_counts=300)
    labels = slide.obs["label"].astype(str)
    labels[:10] = "undetermined"
    labels[labels == "layer 4"] = "other"
    slide.obs["label"] = labels
    slide[:, 20:].write_h5ad(folder / "b.h5ad")
    return folder


def evaluate(model: Path | None, folder: Path, output: Path, *options: str) -> dict:
    models = [] if model is None else ["--model", str(model)]
    main([*models, "--slides", str(folder / "*.h5ad"), "--output_dir", str(output), *QUICK, *options])
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def results(folder: Path, checkpoint: Path) -> dict:
    return evaluate(checkpoint, folder, folder / "report")


def cell(results: dict, slide: str, features: str, split: str, probe: str, smoothing: int = 0) -> dict:
    place = {"slide": slide, "features": features, "split": split, "probe": probe, "smoothing": smoothing}
    (found,) = [record for record in results["records"] if place.items() <= record.items()]
    return found


def test_every_cell_is_there(results: dict, folder: Path):
    places = {(r["slide"], r["features"], r["smoothing"], r["split"], r["probe"]) for r in results["records"]}
    assert len(places) == len(results["records"])
    expected = set()
    for slide in "ab":
        for features in [*BASELINES, *MODELS]:
            for smoothing in (0,) if features.endswith(BY_DEFAULT) else (0, 1):
                for split in ("spots", "blocks", "slides"):
                    probes = ("knn", "linear", "mlp") if smoothing == 0 else ("knn", "linear")
                    expected |= {(slide, features, smoothing, split, probe) for probe in probes}
                expected |= {(slide, features, smoothing, "no labels", c) for c in ("k-means", "leiden")}
    assert places == expected
    report = folder / "report"
    table = (report / "table.md").read_text()
    assert all(f"| {name} |" in table for name in (*BASELINES, *MODELS))
    for figure in ("maps_slides.png", "ari.png", "smoothing.png"):
        assert (report / figure).read_bytes().startswith(b"\x89PNG")


def test_results_tell_how_they_were_made(results: dict, folder: Path):
    metadata = results["metadata"]
    assert metadata["protocol"]["num_splits"] == 2
    assert metadata["seed"] == 0
    told = metadata["sets"]["slides"]
    assert told["slides"]["a"]["patient"] == "phantom 8"
    assert told["slides"]["b"]["labelled"] == told["slides"]["b"]["spots"] - 10
    (to_a, to_b) = told["across_slides"]
    assert (to_a["test"], to_a["training"], to_a["trained_on"]) == ("a", ["b"], "other patients")
    assert set(to_b["dropped"]["test"]) == {"other"}
    assert set(to_b["dropped"]["training"]) >= {"layer 4"}
    assert any("dropped, because the other side lacks the class" in note for note in told["notes"])
    for text in (str(ROOT), str(folder)):
        assert text not in (folder / "report" / "results.json").read_text()


# ---------------------------------------------------------------- numbers, computed another way


def plain_expression(adata: AnnData) -> np.ndarray:
    """log1p of counts per 10,000, by the formula; all genes, as there are fewer than 512."""
    dense = np.asarray(adata.X.todense(), dtype=np.float64)
    total = dense.sum(1, keepdims=True)
    return np.log1p(1e4 * np.divide(dense, total, out=np.zeros_like(dense), where=total > 0))


def plain_mean(values: np.ndarray, adata: AnnData) -> np.ndarray:
    """Over the 3 x 3 sites around each spot, by a loop; odd rows of a staggered array are shifted half a site."""
    rows, cols = adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()
    if (rows % 2 == cols % 2).all():
        cols = cols // 2
    near = (np.abs(rows[:, None] - rows) <= 1) & (np.abs(cols[:, None] - cols) <= 1)
    return np.stack([values[row].mean(0) for row in near])


def plain_scores(features: np.ndarray, codes: np.ndarray, splits: list, probe: str) -> tuple[float, float]:
    accuracy, ari = [], []
    for train, test in splits:
        inputs, model = features, KNeighborsClassifier(10)
        if probe == "linear":
            inputs = StandardScaler().fit(features[train]).transform(features)
            model = LogisticRegression(max_iter=5000, tol=1e-8)
        predicted = model.fit(inputs[train], codes[train]).predict(inputs[test])
        accuracy.append(accuracy_score(codes[test], predicted))
        ari.append(adjusted_rand_score(codes[test], predicted))
    return float(np.mean(accuracy)), float(np.mean(ari))


@pytest.mark.parametrize("probe", ["knn", "linear"])
@pytest.mark.parametrize("smoothing", [0, 1])
@pytest.mark.parametrize("row", ["raw", "raw, counts shuffled"])
def test_baselines_agree_with_scikit_learn(results: dict, folder: Path, probe: str, smoothing: int, row: str):
    """k-NN to the last vote, the linear probe but for spots on the border between two classes."""
    tolerance = 0 if probe == "knn" else 0.02
    adatas = {name: read_slide(folder / f"{name}.h5ad") for name in "ab"}
    if row != "raw":
        adatas = {name: shuffle_spots(adata, seed=0) for name, adata in adatas.items()}
    labels = {n: adata.obs["label"].astype(object).replace("undetermined", None) for n, adata in adatas.items()}
    for name, adata in adatas.items():
        features = plain_expression(adata)
        features = plain_mean(features, adata) if smoothing else features
        codes, _ = encode_labels(labels[name].to_numpy())
        cols = adata.obs["array_col"].to_numpy() // (2 if name == "a" else 1)
        rows, cols = (np.unique(axis, return_inverse=True)[1] for axis in (adata.obs["array_row"], cols))
        splits = {"spots": spot_splits(codes, 2), "blocks": block_splits(codes, rows, cols, 2, side=3)}
        for kind, of_kind in splits.items():
            found = cell(results, name, row, kind, probe, smoothing)
            assert (found["accuracy"], found["ari"]) == pytest.approx(
                plain_scores(features, codes, of_kind, probe), abs=tolerance + 1e-12
            )
    shared = [gene for gene in adatas["a"].var_names if gene in set(adatas["b"].var_names)]
    features = [plain_expression(adatas[name][:, shared]) for name in "ba"]
    if smoothing:
        features = [plain_mean(f, adatas[name]) for f, name in zip(features, "ba", strict=True)]
    splits, _ = transfer_splits(labels["b"].to_numpy(), labels["a"].to_numpy(), 2)
    codes, _ = encode_labels(np.concatenate([labels["b"], labels["a"]]))
    found = cell(results, "a", row, "slides", probe, smoothing)
    assert found["accuracy"] == pytest.approx(
        plain_scores(np.concatenate(features), codes, splits, probe)[0], abs=tolerance + 1e-12
    )


def test_the_default_row_is_what_embed_slide_writes(folder: Path, checkpoint: Path):
    model = STImageMAEModel.from_pretrained(checkpoint)
    model.config.embedding_defaults = {"smoothing": 2, "stride": 4}
    processor = STPatchProcessor.from_pretrained(checkpoint)
    evaluation_set = load_given_set(sorted(folder.glob("*.h5ad")))
    embedder = EncoderEmbedder("stimg", model, processor)
    for slide in evaluation_set.slides.values():
        plain = embedder.embed(slide)
        adata = slide.adata.copy()
        embed_slide(adata, model, processor, smoothing=0, progress=False, key_added="plain")
        embed_slide(adata, model, processor, progress=False)
        np.testing.assert_array_equal(plain, adata.obsm["plain"])
        written = embedder.smoothed_by_default(slide, plain)
        np.testing.assert_allclose(written, adata.obsm["X_stimg"], rtol=1e-5, atol=1e-6)
        assert not np.allclose(written, plain)


def test_a_default_without_a_mean_is_no_row_of_its_own(checkpoint: Path, tmp_path: Path):
    (embedder,) = (e for e in load_embedders([("stimg", str(checkpoint))]) if e.name == "stimg")
    assert [method.name for method in embedder_methods([embedder], tmp_path)] == ["stimg", f"stimg{BY_DEFAULT}"]
    embedder.model.config.embedding_defaults = {"smoothing": 0}
    assert [method.name for method in embedder_methods([embedder], tmp_path)] == ["stimg"]


# ---------------------------------------------------------------- again, and on


def test_same_command_same_numbers(results: dict, folder: Path, checkpoint: Path, tmp_path: Path):
    fewer = ("--splits", "blocks", "slides", "--smoothings", "0", *NO_FIGURES)
    again = evaluate(checkpoint, folder, tmp_path / "again", *fewer)["records"]
    assert {record["probe"] for record in again} == {"knn", "linear", "mlp", "k-means", "leiden"}
    assert [record for record in again if record not in results["records"]] == []


def test_a_killed_run_goes_on_and_a_finished_one_computes_nothing(
    results: dict, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    probes, calls = dict(domain_scores.PROBES), []

    def counted(*arguments):
        if len(calls) == 7:
            raise KeyboardInterrupt
        calls.append(1)
        return probes["knn"](*arguments)

    options = ("--probes", "knn", "--splits", "spots", "slides", "--clusterings", "none", *NO_FIGURES)
    monkeypatch.setitem(domain_scores.PROBES, "knn", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(None, folder, tmp_path / "out", *options)
    monkeypatch.setitem(domain_scores.PROBES, "knn", lambda *a: (calls.append(1), probes["knn"](*a))[1])
    resumed = evaluate(None, folder, tmp_path / "out", *options)
    assert len(calls) == len(resumed["records"]) == len(BASELINES) * 2 * 2 * 2
    for record in resumed["records"]:
        assert record in results["records"]
    assert evaluate(None, folder, tmp_path / "out", *options)["records"] == resumed["records"]
    assert len(calls) == len(resumed["records"])
    other = evaluate(None, folder, tmp_path / "out", *options, "--seed", "1")
    assert len(calls) > len(resumed["records"])  # another setting is another number
    assert cell(other, "a", "raw", "spots", "knn") != cell(resumed, "a", "raw", "spots", "knn")


def test_embeddings_are_made_once_for_a_model_and_a_slide(folder: Path, checkpoint: Path, tmp_path: Path):
    (slide, other) = load_given_set(sorted(folder.glob("*.h5ad"))).slides.values()
    calls = []

    def embedder(name: str = "stimg", **options) -> EncoderEmbedder:
        made = next(e for e in load_embedders([(name, str(checkpoint))], **options) if e.name == name)
        embed = made.embed
        made.embed = lambda slide: (calls.append(slide.name), embed(slide))[1]
        return made

    first = cached(embedder(), tmp_path)(slide)
    np.testing.assert_array_equal(first, cached(embedder("renamed"), tmp_path)(slide))
    assert calls == ["a"]
    changed = embedder()
    changed.model.get_input_embeddings().weight.data[3] += 0.1
    for made, asked in ((changed, slide), (embedder(seed=1), slide), (embedder(), other)):
        calls.clear()
        assert not np.array_equal(first, cached(made, tmp_path)(asked))
        assert calls == [asked.name]
    calls.clear()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(first, cached(embedder(), tmp_path)(slide))
    assert calls == ["a"]


def test_genes_renamed_in_a_column_of_var_make_another_embedding(folder: Path, checkpoint: Path, tmp_path: Path):
    (slide, _) = load_given_set(sorted(folder.glob("*.h5ad"))).slides.values()
    names = slide.adata.var_names
    keys = {slide_key(slide)}
    for symbols in (names, names[::-1]):
        slide.adata.var["gene_name"] = symbols.to_numpy()
        keys.add(slide_key(slide))
    assert len(keys) == 3


# ---------------------------------------------------------------- models, and what they saw


def test_several_models_and_what_they_saw(folder: Path, checkpoint: Path, tmp_path: Path):
    shutil.copytree(checkpoint, tmp_path / "first")
    shutil.copytree(checkpoint, tmp_path / "second")
    save_pretraining(tmp_path / "first", [SlideRecord("a", "phantom 8", 1), SlideRecord("c", "phantom 9", 1)], {})
    save_pretraining(tmp_path / "second", [SlideRecord("c", "phantom 3", 1)], {})
    models = ("--models", f"patch={tmp_path / 'first'}", f"wide={tmp_path / 'second'}")
    options = ("--probes", "knn", "--splits", "spots", "--clusterings", "none", "--smoothings", "0", *NO_FIGURES)
    found = evaluate(None, folder, tmp_path / "out", *models, *options)
    seen = {(r["features"], r["slide"]): r.get("seen") for r in found["records"]}
    assert {key[0] for key in seen} == {
        *BASELINES,
        MODELS[0],
        *(m + d for m in ("patch", "wide") for d in ("", BY_DEFAULT)),
    }
    assert (seen["patch", "a"], seen["patch", "b"]) == ("transductive", "same patient")
    assert seen["wide", "a"] == seen["wide", "b"] == "unseen patient"
    assert seen["raw", "a"] is None
    assert seen[MODELS[0], "a"] is None
    assert found["metadata"]["models"]["patch"]["slides"] == ["a", "c"]
    # the same weights under two names
    assert cell(found, "a", "patch", "spots", "knn")["ari"] == cell(found, "a", "wide", "spots", "knn")["ari"]


def test_gene_tokens_have_two_rows(folder: Path, checkpoint: Path, tmp_path: Path):
    processor = STPatchProcessor.from_pretrained(checkpoint)
    config = GeneTokenConfig(
        vocab_size=len(processor.vocabulary) + 1, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    GeneTokenForPreTraining(config).save_pretrained(tmp_path / "tokens")
    token_processor = STPatchProcessor(processor.vocabulary, window_size=1, num_channels=16, sample_unit="spot")
    token_processor.save_pretrained(tmp_path / "tokens")
    (tokens, nearest) = load_gene_token_embedders(str(tmp_path / "tokens"), tmp_path / "cache")
    (slide, _) = load_given_set(sorted(folder.glob("*.h5ad"))).slides.values()
    image = tokens.image(slide)
    plain = tokens.embed(slide)
    expected = nearest_spots_mean(plain[image.obs_index], image)[image.spot_of_obs]
    np.testing.assert_array_equal(nearest.embed(slide), expected)
    assert tokens.key != nearest.key
    options = ("--probes", "knn", "--splits", "spots", "--clusterings", "none", "--smoothings", "0", *NO_FIGURES)
    found = evaluate(None, folder, tmp_path / "out", "--gene_tokens", str(tmp_path / "tokens"), *options)
    names = {record["features"] for record in found["records"]}
    assert names == {*BASELINES, "gene tokens", "gene tokens, 16 nearest"}
    assert found["metadata"]["models"]["gene tokens"]["sample_unit"] == "spot"


def test_slides_too_small_for_a_window_are_named(checkpoint: Path, tissue: PhantomTissue, tmp_path: Path, capsys):
    for seed in (3, 4):
        tissue.slide(seed, array="square", height=5, width=26).write_h5ad(tmp_path / f"flat_{seed}.h5ad")
    tissue.slide(5, array="square", height=12, width=12).write_h5ad(tmp_path / "square.h5ad")
    options = ("--probes", "knn", "--splits", "spots", "--clusterings", "none", "--smoothings", "0", *NO_FIGURES)
    found = evaluate(checkpoint, tmp_path, tmp_path / "out", *options)
    small = found["metadata"]["smaller_than_a_window"]
    assert small == {model: ["flat_3", "flat_4"] for model in MODELS[:2]}
    assert "stimg: no window fits into flat_3, flat_4" in capsys.readouterr().err


def test_sections_that_share_spots_do_not_train_each_other(tissue: PhantomTissue, tmp_path: Path):
    whole = tissue.slide(1, height=16, width=16, median_counts=400)
    other = tissue.slide(2, height=16, width=16, median_counts=400)
    other.uns["meta"] = whole.uns["meta"]
    whole[:150].copy().write_h5ad(tmp_path / "first.h5ad")
    whole[60:].copy().write_h5ad(tmp_path / "second.h5ad")
    other.write_h5ad(tmp_path / "third.h5ad")
    plan = plan_set(load_given_set(sorted(tmp_path.glob("*.h5ad"))), Protocol(splits=("slides",)))
    assert plan.same_spots == [("first", "second")]
    trained = {one.transfer.test: one.transfer.training for one in plan.across}
    assert trained == {"first": ("third",), "second": ("third",), "third": ("first", "second")}
    assert plan.notes[0] == "first and second share spots: they are one piece of evidence rather than two."
    assert any("left out, sharing spots with it: second" in note for note in plan.notes)


def test_slides_of_other_genes_stay_in_the_table_but_do_not_train_each_other(tissue: PhantomTissue, tmp_path: Path):
    """No gene in common, or ids here and symbols there, is said before anything is computed, and ends nothing."""
    size = {"array": "square", "height": 11, "width": 11, "median_counts": 400}
    slides = {name: tissue.slide(seed, **size) for seed, name in enumerate("abcd")}
    slides["b"] = slides["b"][:, 40:].copy()
    slides["c"].var_names = [f"ENSG{number:011d}" for number in range(slides["c"].n_vars)]
    slides["d"].var_names = slides["c"].var_names
    slides["d"].obs["label"] = "other"
    slides["d"].obs.loc[slides["d"].obs_names[::2], "label"] = "further"
    patients = {"a": "1", "b": "2", "c": "1", "d": "1"}
    for name, slide in slides.items():
        slide.uns["meta"] = {"patient": patients[name]}
        slide.write_h5ad(tmp_path / f"{name}.h5ad")
    plan = plan_set(load_given_set(sorted(tmp_path.glob("*.h5ad"))), Protocol(num_splits=2))
    assert [one.transfer.test for one in plan.across] == ["a"]
    assert any(
        note.startswith("a: trained on other patients, b; all of them have only 80 gene(s)") for note in plan.notes
    )
    assert (
        "c: no split across slides, because it and the slides to train on (b) have no gene of one name in common."
        in plan.notes
    )
    assert sum("name their genes in different ways" in note for note in plan.notes) == 4
    options = ("--probes", "knn", "--clusterings", "none", "--smoothings", "0", *NO_FIGURES)
    records = evaluate(None, tmp_path, tmp_path / "out", *options)["records"]
    assert {record["slide"] for record in records if record["split"] == "blocks"} == set("abcd")
    assert {record["slide"] for record in records if record["split"] == "slides"} == {"a"}


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--probes", "forest"], r"Unknown probes \['forest'\]: expected any of"),
        (["--splits", "rows"], r"Unknown splits \['rows'\]"),
        (["--clusterings", "dbscan"], r"Unknown clusterings \['dbscan'\]"),
        (["--smoothings", "-1"], r"smoothings are \[-1\]"),
        (["--models", "patch"], "'patch': write name=folder"),
        (["--label_key", "layer"], "a: obs has no column 'layer'"),
        (["--unlabelled", "layer 1", "layer 2", "layer 3", "layer 4", "core", "nodule"], r"a: .* no labelled spot"),
        (["--unlabelled", "layer 1", "layer 2", "layer 3", "layer 4", "core"], "a: .* the class 'nodule' alone"),
        (["--train_share", "0.05"], "a: 8 spots train, fewer than the k-NN probe's 10 neighbours"),
        (["--exclude", "c"], r"Excluded slides \['c'\] are not among"),
        (["--exclude", "a", "b"], "All slides are excluded"),
        (["--test_slides", "c"], r"no slides \['c'\] to test on: expected any of \['a', 'b'\]"),
    ],
)
def test_bad_input_is_said_in_one_sentence(folder: Path, tmp_path: Path, options: list[str], message: str):
    with pytest.raises(ValueError, match=message) as error:
        evaluate(None, folder, tmp_path / "out", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_rows_by_name(results: dict, folder: Path, tmp_path: Path):
    options = ("--probes", "knn", "--splits", "spots", "--clusterings", "none", *NO_FIGURES)
    found = evaluate(None, folder, tmp_path / "out", *options, "--rows", "coordinates only", "raw")["records"]
    assert list(dict.fromkeys(record["features"] for record in found)) == ["raw", "coordinates only"]
    assert [record for record in found if record not in results["records"]] == []
    with pytest.raises(ValueError, match=r"no rows \['rew'\]: expected any of \['raw', 'PCA', 'coordinates only'"):
        evaluate(None, folder, tmp_path / "out", *options, "--rows", "rew")


def test_slides_that_are_not_tested_still_train(results: dict, folder: Path, tmp_path: Path):
    options = ("--probes", "knn", "--clusterings", "none", *NO_FIGURES)
    found = evaluate(None, folder, tmp_path / "out", *options, "--test_slides", "b")["records"]
    assert {(record["slide"], record["split"]) for record in found} == {("b", s) for s in ("spots", "blocks", "slides")}
    assert [record for record in found if record not in results["records"]] == []


def test_nothing_to_evaluate_and_models_of_one_name_are_refused(folder: Path, checkpoint: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="give --sets or --slides"):
        main(["--output_dir", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="every one a name of its own"):
        evaluate(checkpoint, folder, tmp_path / "out", "--models", f"stimg={checkpoint}")
    for name in ("raw", f"stimg{BY_DEFAULT}"):
        with pytest.raises(ValueError, match=f"Two rows would be called '{name}'"):
            evaluate(checkpoint, folder, tmp_path / "out", "--models", f"{name}={checkpoint}")
    assert not (tmp_path / "out").exists()
