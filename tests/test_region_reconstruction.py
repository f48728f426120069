"""The evaluation of hidden regions: honest baselines, regions that see what they may, runs that go on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr
from sklearn.neighbors import KNeighborsRegressor

from eval import report, run_region_reconstruction
from eval.baselines.region import gene_mean, inverse_distance, kriging, nearest_mean, zeros
from eval.region_reconstruction import EvaluatedSlide, errors, reconstruct, square_regions
from eval.run_region_reconstruction import Evaluation, main
from modeling_stimg import STImageMAEForPreTraining, STPatchProcessor

SMALL = ["--mask_sizes", "2", "4", "--window_sizes", "8", "10", "--repetitions", "2", "--num_genes", "20"]
SMALL += ["--num_views", "1"]


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory, tissue) -> Path:
    path = tmp_path_factory.mktemp("regions") / "held_out.h5ad"
    adata = tissue.slide(8, height=16, width=14, median_counts=300)
    rows, cols = adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()
    adata.obs["hole"] = (abs(rows - 8) < 3) & (abs(cols - 14) < 6)
    adata.write_h5ad(path)
    return path


def evaluate(checkpoint: Path, slide: Path, output: Path, *options: str) -> dict:
    main(["--model", str(checkpoint), "--slides", str(slide), "--output_dir", str(output), *options])
    return json.loads((output / "results.json").read_text())


@pytest.fixture(scope="module")
def results(checkpoint: Path, slide: Path) -> dict:
    return evaluate(checkpoint, slide, slide.parent / "report", *SMALL)


# ---------------------------------------------------------------------------- baselines


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 30))
@settings(deadline=None, max_examples=25)
def test_interpolations_equal_scikit_learns(seed: int, num_visible: int, num_hidden: int):
    rng = np.random.default_rng(seed)
    visible, hidden = rng.random((num_visible, 2)) * 20, rng.random((num_hidden, 2)) * 20
    values = rng.poisson(1.0, (num_visible, 3)).astype(np.float32)
    neighbours = min(16, num_visible)
    nearest = KNeighborsRegressor(neighbours).fit(visible, values).predict(hidden)
    np.testing.assert_allclose(nearest_mean(values, visible, hidden), nearest, rtol=1e-6, atol=1e-7)
    # On a grid: distances are rounded, so that spots at one distance count alike, which shows where they are tiny.
    places = rng.permutation(41 * 41)[: num_visible + num_hidden]
    visible, hidden = np.split(np.stack(np.divmod(places, 41), axis=1) / 2, [num_visible])
    for power in (1.0, 2.0):
        everything = KNeighborsRegressor(num_visible, weights=lambda d, power=power: d**-power).fit(visible, values)
        weighted = inverse_distance(values, visible, hidden, power)
        np.testing.assert_allclose(weighted, everything.predict(hidden), rtol=1e-3, atol=1e-5)


def test_nearest_mean_on_a_grid_takes_the_first_of_equals_and_blocks_change_nothing(monkeypatch):
    rows, cols = np.mgrid[:9, :9].reshape(2, -1)
    places = np.stack([cols + 0.5 * (rows % 2), rows * np.sqrt(3) / 2], axis=1)  # staggered, six neighbours each
    hidden = (abs(rows - 4) < 2) & (abs(cols - 4) < 2)
    values = np.random.default_rng(0).random((81, 4))
    expected = []
    for spot in places[hidden]:
        squared = ((places[~hidden] - spot) ** 2).sum(1)
        nearest = sorted(range(len(squared)), key=lambda i: (round(squared[i], 5), i))[:16]
        expected.append(values[~hidden][nearest].mean(0))
    found = nearest_mean(values[~hidden], places[~hidden], places[hidden])
    np.testing.assert_allclose(found, expected)
    monkeypatch.setattr("eval.baselines.region.DISTANCES_AT_ONCE", 150)
    for predict in (nearest_mean, inverse_distance):
        once = predict(values[~hidden], places[~hidden], places[hidden])
        monkeypatch.setattr("eval.baselines.region.DISTANCES_AT_ONCE", 1 << 20)
        np.testing.assert_allclose(predict(values[~hidden], places[~hidden], places[hidden]), once)
    assert (zeros(values, places, places[hidden]) == 0).all()
    np.testing.assert_allclose(gene_mean(values, places, places[:2]), [values.mean(0)] * 2)


# ---------------------------------------------------------------------------- errors and regions


def test_kriging_of_a_large_slide_takes_the_spots_around_the_hole(monkeypatch: pytest.MonkeyPatch):
    places = np.stack(np.divmod(np.arange(20 * 20), 20), axis=1).astype(float)
    hole = (abs(places - 10) < 2).all(1)
    visible, hidden = places[~hole], places[hole]
    values = np.random.default_rng(0).poisson(1.0, (len(visible), 3)).astype(float)
    whole = kriging(values, visible, hidden)
    near = np.argsort(np.linalg.norm(visible[:, None] - hidden, axis=2).min(1), kind="stable")[:60]
    monkeypatch.setattr("eval.baselines.region.NUM_KRIGED", 60)
    found = kriging(values, visible, hidden)
    np.testing.assert_allclose(found, kriging(values[np.sort(near)], visible[np.sort(near)], hidden))
    assert not np.allclose(found, whole)
    monkeypatch.setattr("eval.baselines.region.NUM_KRIGED", len(visible))
    np.testing.assert_array_equal(kriging(values, visible, hidden), whole)


def test_errors_equal_scipys():
    rng = np.random.default_rng(0)
    truth, predicted = rng.random((30, 6)), rng.random((30, 6))
    truth[:, 1] = 0.5  # does not vary: no correlation to speak of
    predicted[:, 2] = 0.1  # says nothing
    found = errors(truth, predicted)
    correlations = [pearsonr(truth[:, g], predicted[:, g]).statistic for g in (0, 3, 4, 5)]
    assert found["pearson"] == pytest.approx(sum(correlations) / 5)
    assert found["pearson_genes"] == 5
    assert found["mse"] == pytest.approx(np.mean((truth - predicted) ** 2))
    assert found["mae"] == pytest.approx(np.mean(abs(truth - predicted)))
    assert errors(truth, truth)["pearson"] == pytest.approx(1)
    assert np.isnan(errors(truth[:, 1:2], predicted[:, :1])["pearson"])


@given(st.integers(0, 1000), st.integers(1, 6), st.integers(7, 16))
@settings(deadline=None, max_examples=20)
def test_squares_lie_in_the_middle_of_what_is_seen(images, seed: int, mask: int, window: int):
    for image in images.values():
        for region in square_regions(image, mask, window, 3, seed):
            assert not (region.hidden & region.visible).any()
            assert region.hidden.sum() >= mask**2 / 2
            assert region.visible.sum() >= (window**2 - mask**2) / 2
            seen = region.hidden | region.visible
            for axis in (image.rows, image.cols):
                assert np.ptp(axis[seen]) < window
                assert np.ptp(axis[region.hidden]) < mask
        again = square_regions(image, mask, window, 3, seed)
        assert [r.hidden.tobytes() for r in again] == [
            r.hidden.tobytes() for r in square_regions(image, mask, window, 3, seed)
        ]
    assert square_regions(images["square"], 4, 60, 3, seed) == []


def test_everything_sees_the_window_alone(slides: dict[str, AnnData], processor: STPatchProcessor, model):
    """Counts outside the window change no prediction, hidden ones neither; asked for are the same genes."""
    adata = slides["square"].copy()
    slide = EvaluatedSlide.of(adata, processor, "square")
    (region,) = square_regions(slide.image, 4, 8, 1, 0)
    outside = ~(region.hidden | region.visible)
    changed = adata.copy()
    dense = changed.X.toarray()
    dense[slide.image.obs_index[outside | region.hidden]] = 17
    changed.X = dense
    options = {"num_genes": adata.n_vars, "options": {"gene_selection": "weighted"}}
    before, after = (
        reconstruct(EvaluatedSlide.of(a, processor, "square"), region, {"stimg": model}, processor, **options)
        for a in (adata, changed)
    )
    order = [np.argsort(found.genes) for found in (before, after)]
    assert set(before.predicted) == set(after.predicted)
    assert len(before.predicted) == 7
    for name in before.predicted:
        np.testing.assert_array_equal(before.predicted[name][:, order[0]], after.predicted[name][:, order[1]])
    assert not np.array_equal(before.truth[:, order[0]], after.truth[:, order[1]])


# ---------------------------------------------------------------------------- the script


def test_every_row_is_there_and_told(results: dict, slide: Path):
    predictors = ["zeros", "gene mean", "mean of 16 nearest", "inverse distance, power 2", "kriging"]
    predictors += [f"{model}{how}" for model in ("untrained, random start", "stimg") for how in (", decoder alone", "")]
    rows = {(r["predictor"], r["window_size"], r["mask_size"]): r for r in results["records"]}
    assert set(rows) == {(p, w, m) for p in predictors for w in (8, 10) for m in (2, 4)}
    for (predictor, _, mask), row in rows.items():
        assert row["repetitions"] == 2
        assert row["genes"] == 20
        assert row["hidden_spots"] <= mask**2
        assert 0 < row["mae"] < 10
        assert row["seen"] == ("not told" if predictor.startswith("stimg") else None)
        assert (row["pearson"] == 0) == (predictor in ("zeros", "gene mean"))
    table = (slide.parent / "report" / "table.md").read_text()
    assert "log1p of counts per 10,000" in table
    assert all(name in table for name in predictors)
    assert "| predictor | window | 2: MSE | 2: MAE | 4: MSE | 4: MAE |" in table
    for figure in ("maps.png", "mse.png"):
        assert (slide.parent / "report" / figure).read_bytes().startswith(b"\x89PNG")


def test_sizes_that_a_slide_has_no_room_for_are_told_in_one_sentence(checkpoint: Path, slide: Path, tmp_path: Path):
    sizes = ["--mask_sizes", "2", "3", "--window_sizes", "8", "90", "--repetitions", "1", "--num_genes", "5"]
    found = evaluate(checkpoint, slide, tmp_path, *sizes, "--untrained", "false")
    assert {record["window_size"] for record in found["records"]} == {8}
    told = "held_out: no window of which half of the sites hold a spot, with 2 pair(s) of sizes: 2 in 90, 3 in 90."
    assert found["metadata"]["skipped"] == [told]
    assert f"- {told}" in (tmp_path / "table.md").read_text()


def test_its_results_make_a_report(results: dict, slide: Path, tmp_path: Path):
    report.main([str(slide.parent / "report" / "results.json"), "--output_dir", str(tmp_path)])
    assert (slide.parent / "report" / "table.md").read_text() in (tmp_path / "report.md").read_text()
    assert (tmp_path / "genes_0.png").read_bytes() == (slide.parent / "report" / "maps.png").read_bytes()


def test_same_command_same_numbers_and_a_killed_run_goes_on(
    results: dict, checkpoint: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, computed = Evaluation.records, []

    def killed(self, row):
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(row.key)
        yield from whole(self, row)

    monkeypatch.setattr(Evaluation, "records", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, slide, tmp_path, *SMALL)
    partial = json.loads((tmp_path / "results.json").read_text())["records"]
    assert partial == results["records"][: len(partial)]
    assert len(partial) == 18

    def told(self, row):
        computed.append(row.key)
        yield from whole(self, row)

    monkeypatch.setattr(Evaluation, "records", told)
    again = evaluate(checkpoint, slide, tmp_path, *SMALL)
    assert again["records"] == results["records"]
    assert len(computed) == len(set(computed)) == 4
    for name in ("table.md", "maps.png"):
        assert (tmp_path / name).read_bytes() == (slide.parent / "report" / name).read_bytes()
    with pytest.raises(ValueError, match="was made with another reading"):
        evaluate(checkpoint, slide, tmp_path, *SMALL, "--seed", "1")
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no results of this script"):
        evaluate(checkpoint, slide, tmp_path, *SMALL)


def test_rows_of_slides_or_regions_that_changed_are_not_taken_over(
    checkpoint: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_region_reconstruction, "plot_gene_maps", lambda *_: None)
    short = ["--num_genes", "20", "--untrained", "false", "--num_views", "1", "--repetitions", "1"]
    squares = ["--mask_sizes", "2", "--window_sizes", "8"]
    adata, path = read_h5ad(slide), tmp_path / "held_out.h5ad"
    adata.write_h5ad(path)
    evaluate(checkpoint, path, tmp_path / "out", *short, *squares)
    evaluate(checkpoint, path, tmp_path / "out", *short, "--region", "hole")  # squares and regions side by side
    moved, renamed, other = adata.copy(), adata.copy(), adata.copy()
    moved.obs["array_col"] += 2 * (moved.obs["array_row"] > 7)
    renamed.var_names = renamed.var_names[::-1]
    other.obs["hole"] &= other.obs["array_row"] > 7
    for changed, options in ((moved, squares), (renamed, squares), (other, ["--region", "hole"])):
        changed.write_h5ad(path)
        with pytest.raises(ValueError, match="made with other slides or regions called held_out"):
            evaluate(checkpoint, path, tmp_path / "out", *short, *options)
    assert len(evaluate(checkpoint, path, tmp_path / "out", *short, *squares)["records"]) == 14
    with pytest.raises(ValueError, match="has room for these sizes"):  # though there are rows of others
        evaluate(checkpoint, path, tmp_path / "out", *short, "--window_sizes", "90")
    # A slide that a later command leaves out is remembered all the same.
    adata.write_h5ad(path)
    adata.write_h5ad(tmp_path / "second.h5ad")
    evaluate(checkpoint, tmp_path / "second.h5ad", tmp_path / "out", *short, *squares)
    renamed.write_h5ad(path)
    with pytest.raises(ValueError, match="made with other slides or regions called held_out"):
        evaluate(checkpoint, path, tmp_path / "out", *short, *squares)


def test_a_model_in_half_precision_is_evaluated(
    checkpoint: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(run_region_reconstruction, "plot_gene_maps", lambda *_: None)
    model = STImageMAEForPreTraining.from_pretrained(checkpoint).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    STPatchProcessor.from_pretrained(checkpoint).save_pretrained(tmp_path / "half")
    options = ["--num_genes", "20", "--untrained", "false", "--num_views", "1", "--region", "hole"]
    rows = evaluate(tmp_path / "half", slide, tmp_path / "out", *options)["records"]
    assert all(np.isfinite(row["mse"]) for row in rows if row["predictor"].startswith("stimg"))


def test_regions_of_any_form(checkpoint: Path, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_region_reconstruction, "plot_gene_maps", lambda *_: None)
    short = ["--num_genes", "20", "--untrained", "false", "--num_views", "1"]
    column = evaluate(checkpoint, slide, tmp_path / "column", "--region", "hole", *short)
    options = ["--polygon", "8.5,5.5 19.5,5.5 19.5,10.5 8.5,10.5", "--polygon_key", "array", *short]
    polygon = evaluate(checkpoint, slide, tmp_path / "polygon", *options)
    for one, other in zip(column["records"], polygon["records"], strict=True):
        assert {**one, "region": ""} == {**other, "region": ""}
        assert one["repetitions"] == 1
        assert one["mask_size"] is None
    assert "column hole" in {r["region"] for r in column["records"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--region", "nonsense"], "held_out: obs has no column 'nonsense'"),
        (["--region", "label"], r"holds \w+ values: expected True and False"),
        (["--region", "hole", "--polygon", "0,0 1,1 1,0"], "Both --region and --polygon"),
        (["--polygon", "0,0 1,1"], "expected three corners or more"),
        (["--polygon", "0,0 1,1 a,b"], "expected three corners or more"),
        (["--polygon", "0,0 0,1 1,0"], "the region holds .* of .* spots"),
        (["--polygon", "0,0 0,1 1,0", "--polygon_key", "no"], "obsm has no 'no'"),
        (["--mask_sizes", "8", "--window_sizes", "8"], "leaves nothing to see"),
        (["--repetitions", "0"], "repetitions is 0"),
        (["--window_sizes", "90"], "has room for these sizes"),
    ],
)
def test_bad_input_gets_one_clear_sentence(checkpoint: Path, slide: Path, tmp_path: Path, options, message: str):
    with pytest.raises(ValueError, match=message):
        evaluate(checkpoint, slide, tmp_path / "out", *options)
    assert not (tmp_path / "out" / "results.json").exists()
