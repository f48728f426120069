"""reconstruct_region: nothing of the hidden spots enters, windows show what they can, and values come back in log1p."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stimg import (
    GeneVocabulary,
    SlideImage,
    STImageMAEConfig,
    STImageMAEForPreTraining,
    STImageMAEModel,
    STPatchProcessor,
    reconstruction_stimg,
)
from modeling_stimg import reconstruct_region as reconstruct
from modeling_stimg.context_windows_stimg import context_windows
from modeling_stimg.kriging_stimg import kriging_weights
from modeling_stimg.reconstruction_stimg import ReadSpots, calibrate, variable_genes
from modeling_stimg.spot_reading_stimg import SpotFeatures


def reconstruct_region(adata: AnnData, *args, **options) -> pd.DataFrame:
    return reconstruct(adata, *args, **options, progress=False)


def square(adata: AnnData, side: int = 4, top: int = 4, left: int = 4) -> np.ndarray:
    """bool (n_obs,): a square of array positions."""
    rows, cols = adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()
    return (rows >= top) & (rows < top + side) & (cols >= left) & (cols < left + side)


def with_counts(adata: AnnData, spots: np.ndarray, counts: np.ndarray) -> AnnData:
    """A copy of the slide with other counts at some spots."""
    changed = adata.copy()
    dense = changed.X.toarray()
    dense[spots] = counts
    changed.X = sp.csr_matrix(dense)
    return changed


@pytest.fixture(scope="module", params=["standardized", "centered"])
def standardized(vocabulary: GeneVocabulary, request: pytest.FixtureRequest) -> STPatchProcessor:
    rng = np.random.default_rng(5)
    statistics = rng.uniform(0.2, 2, (2, len(vocabulary))).astype(np.float32)
    described = vocabulary.with_statistics(mean=statistics[0], deviation=statistics[1])
    return STPatchProcessor(described, window_size=6, num_channels=32, normalization=request.param)


def gene_means(processor: STPatchProcessor, seen: SlideImage) -> np.ndarray:
    """What a processor takes from log1p values, of all genes."""
    return processor.vocabulary.mean if processor.normalization == "standardized" else seen.gene_means


@pytest.fixture
def residual(config) -> STImageMAEForPreTraining:
    """A fresh model that predicts by local means, with random weights."""
    torch.manual_seed(0)
    model = STImageMAEForPreTraining(STImageMAEConfig(**{**config.to_dict(), "reconstruction": "residual"}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


# ---------------------------------------------------------------------------- nothing leaks


@pytest.mark.parametrize(
    ("mask_unit", "how", "calibrated"),
    [
        ("mixed", "product", True),
        ("mixed", "residual", False),
        ("site", "product", False),
        ("site", "residual", True),
        ("entry", "product", False),
    ],
)
def test_hidden_counts_change_no_bit_and_visible_ones_do(
    slides, standardized, model, residual, mask_unit: str, how: str, calibrated: bool
):
    model = {"product": model, "residual": residual}[how]
    model.config.mask_unit = mask_unit
    adata = slides["square"]
    spots = square(adata)
    options = {"calibrated": calibrated, "num_gene_draws": 2, "num_views": 2}
    before = reconstruct_region(adata, model, standardized, spots, **options)
    rng = np.random.default_rng(0)
    for counts in (0, 1000, rng.integers(0, 3000, (spots.sum(), adata.n_vars))):
        after = reconstruct_region(with_counts(adata, spots, counts), model, standardized, spots, **options)
        pd.testing.assert_frame_equal(before, after, check_exact=True)
    beside = square(adata, 1, 3, 4)
    asked = list(before.columns)
    seen = with_counts(adata, beside, rng.integers(0, 3000, (1, adata.n_vars)))
    assert not np.array_equal(before, reconstruct_region(seen, model, standardized, spots, genes=asked, **options))


def test_spots_on_one_position_are_hidden_together(slides, processor, model):
    """Were only the second hidden, the first one's counts would be seen at the very site."""
    adata = slides["square"].copy()
    spots = square(adata)
    twin, inside = np.flatnonzero(~spots)[0], np.flatnonzero(spots)[0]
    for column in ("array_row", "array_col"):
        adata.obs.iloc[twin, adata.obs.columns.get_loc(column)] = adata.obs[column].iloc[inside]
    with pytest.warns(UserWarning, match="stand on an array position"):
        before = reconstruct_region(adata, model, processor, spots)
    with pytest.warns(UserWarning, match="stand on an array position"):
        after = reconstruct_region(with_counts(adata, np.arange(adata.n_obs) == twin, 77), model, processor, spots)
    pd.testing.assert_frame_equal(before, after, check_exact=True)
    assert list(before.index) == list(adata.obs_names[spots])


def test_same_input_same_bits_and_the_slide_stays(slides, processor, model):
    adata = slides["staggered"].copy()
    adata.obs["hole"] = square(adata, 6)
    obs, counts = adata.obs.copy(), adata.X.copy()
    model.train()
    torch.manual_seed(1)
    first = reconstruct_region(adata, model, processor, "hole")
    torch.manual_seed(2)
    second = reconstruct_region(adata, model, processor, spots=adata.obs["hole"].to_numpy())
    pd.testing.assert_frame_equal(first, second, check_exact=True)
    pd.testing.assert_frame_equal(adata.obs, obs)
    assert (counts != adata.X).nnz == 0
    assert model.training
    seeds = [reconstruct_region(adata, model, processor, "hole", seed=seed, calibrated=False) for seed in (0, 1)]
    assert not np.array_equal(*seeds)
    one_by_one = reconstruct_region(adata, model, processor, "hole", batch_size=1)
    np.testing.assert_allclose(first, one_by_one, atol=1e-4)


# ---------------------------------------------------------------------------- what it is


def test_rows_and_columns_are_those_asked_for(slides, processor, model):
    adata = slides["square"]
    shuffled = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    spots = square(adata)
    predicted = reconstruct_region(adata, model, processor, spots)
    assert predicted.dtypes.unique() == [np.float32]
    assert list(predicted.index) == list(adata.obs_names[spots])
    visible = np.asarray(processor.slide_to_image(adata[~spots].copy()).gene_variances)
    expected = processor.vocabulary.decode(np.argsort(-visible, kind="stable"))
    assert list(predicted.columns) == expected  # all 120 genes: fewer than 512
    again = reconstruct_region(shuffled, model, processor, square(shuffled))
    pd.testing.assert_frame_equal(again, predicted.loc[again.index], check_exact=True)
    some = ["PHANTOM0007", "PHANTOM0003"]
    np.testing.assert_allclose(reconstruct_region(adata, model, processor, spots, genes=some), predicted[some], 1e-5)
    numbers = processor.vocabulary.encode(some)
    pd.testing.assert_frame_equal(
        reconstruct_region(adata, model, processor, spots, genes=numbers),
        reconstruct_region(adata, model, processor, spots, genes=some),
    )


def test_genes_are_asked_for_by_the_slides_names_and_unmeasured_ones_too(slides, processor, model):
    adata = slides["square"][:, :100].copy()
    spots = square(adata)
    renamed = adata.copy()
    renamed.var["gene_name"] = adata.var_names
    renamed.var_names = [f"feature {i}" for i in range(100)]
    predicted = reconstruct_region(renamed, model, processor, spots, genes=["feature 5", "PHANTOM0119"])
    assert list(predicted.columns) == ["feature 5", "PHANTOM0119"]
    same = reconstruct_region(adata, model, processor, spots, genes=["PHANTOM0005", "PHANTOM0119"])
    np.testing.assert_array_equal(predicted, same)
    assert np.isfinite(same.to_numpy()).all()
    assert set(reconstruct_region(renamed, model, processor, spots).columns) == set(renamed.var_names)


def test_a_model_of_known_output_comes_back_in_log1p(slides, standardized, model: STImageMAEForPreTraining):
    """Every decoded feature is one vector, so the prediction is its product with the gene's vector, times the gene's
    deviation, plus its mean, and no value is below 0."""
    feature = torch.linspace(-4, 6, model.config.hidden_size)
    with torch.no_grad():
        model.decoder.project.weight.zero_()
        model.decoder.project.bias.copy_(feature)
    adata = slides["square"]
    predicted = reconstruct_region(adata, model, standardized, square(adata), calibrated=False)
    vocabulary = standardized.vocabulary
    numbers = vocabulary.encode(predicted.columns)
    products = (model.get_input_embeddings().weight.detach()[numbers] @ feature).numpy()
    image = standardized.slide_to_image(adata)
    means = gene_means(standardized, image.part(~square(adata)[image.obs_index]))
    expected = np.maximum(products * vocabulary.deviation[numbers] + means[numbers], 0)
    np.testing.assert_allclose(predicted, np.tile(expected, (len(predicted), 1)), rtol=1e-4, atol=1e-5)
    assert (expected == 0).any()
    assert (expected > 0).any()


def plain_features(model, processor, image, hidden: np.ndarray, corners, views, draws: int) -> np.ndarray:
    """One window at a time; the hidden spots are taken out by hand, after the processor made the window."""
    seen, size = image.part(~hidden), processor.window_size
    of_spot = {int(spot): [] for spot in np.flatnonzero(hidden)}
    for number, (top, left) in enumerate(corners * draws):
        batch = dict(processor(seen, windows=[(top, left)], first_window=number, return_tensors="pt"))
        del batch["spot_index"]
        full = processor(image, windows=[(top, left)], return_tensors="pt")
        spots = full["spot_index"][0].numpy()
        mask = torch.tensor(np.where(spots >= 0, hidden[spots], False))
        batch["pixel_mask"], batch["coordinates"] = full["pixel_mask"], full["coordinates"]
        mask = mask[None, None].expand_as(batch["pixel_values"])
        with torch.no_grad():
            encoded = model.stimg(**batch, bool_masked_entries=mask).last_hidden_state
            decoded = model.decode(encoded, batch["pixel_mask"], batch["coordinates"])[0][0].numpy()
        for spot, row in zip(np.flatnonzero(hidden), views, strict=True):
            if number % len(corners) in row:
                of_spot[spot].append(decoded[(image.rows[spot] - top) * size + image.cols[spot] - left])
    return np.array([np.mean(features, axis=0) for features in of_spot.values()])


@pytest.mark.parametrize("positions", ["window", "slide"])
def test_prediction_equals_a_plain_loop(slides, vocabulary, model, positions: str):
    model.config.position_embedding_type = positions
    processor = STPatchProcessor(vocabulary, window_size=5, num_channels=16)
    image = processor.slide_to_image(slides["square"])
    hidden = (abs(image.rows - 5) < 3) & (abs(image.cols - 5) < 2)
    genes = np.arange(0, len(vocabulary), 3)
    fast = model.reconstruct_spots(
        image, processor, hidden, genes=genes, stride=2, num_views=3, num_gene_draws=2, batch_size=4, calibrated=False
    )
    corners, views = context_windows(image.part(hidden), image.part(~hidden), 5, 2, 3)
    features = plain_features(model, processor, image, hidden, corners, views, 2)
    slow = features @ model.get_input_embeddings().weight.detach().numpy()[genes].T
    np.testing.assert_allclose(fast, np.maximum(slow, 0), atol=1e-4)


def test_a_model_of_local_means_is_read_by_its_weights(slides, standardized, residual):
    """One window at a time, the decoder's own local means of the genes that are asked for."""
    image = standardized.slide_to_image(slides["square"])
    hidden = (abs(image.rows - 5) < 3) & (abs(image.cols - 5) < 2)
    seen, size, genes = image.part(~hidden), standardized.window_size, np.array([5, 90, 2])
    corners, views = context_windows(image.part(hidden), seen, size, 2, 2)
    found: dict[int, list[np.ndarray]] = {int(spot): [] for spot in np.flatnonzero(hidden)}
    for number, (top, left) in enumerate(corners):
        batch = dict(standardized(seen, windows=[(top, left)], first_window=number, return_tensors="pt"))
        asked = standardized(seen, windows=[(top, left)], genes=genes, return_tensors="pt")["pixel_values"]
        full = standardized(image, windows=[(top, left)], return_tensors="pt")
        visible = batch["pixel_mask"][:, None].expand_as(asked)
        batch["pixel_mask"], batch["coordinates"] = full["pixel_mask"], full["coordinates"]
        mask = (full["pixel_mask"] & (batch.pop("spot_index") < 0))[:, None].expand_as(batch["pixel_values"])
        with torch.no_grad():
            encoded = residual.stimg(**batch, bool_masked_entries=mask).last_hidden_state
            numbers = torch.from_numpy(genes)[None]
            said = residual.reconstruct(encoded, numbers, batch["pixel_mask"], batch["coordinates"], asked, visible)[
                0
            ].numpy()
        for spot, row in zip(np.flatnonzero(hidden), views, strict=True):
            if number in row:
                found[spot].append(said[:, image.rows[spot] - top, image.cols[spot] - left])
    said = np.array([np.mean(of_spot, axis=0) for of_spot in found.values()])
    deviation, means = standardized.vocabulary.deviation[genes], gene_means(standardized, seen)[genes]
    expected = np.maximum(said * deviation + means, 0)
    predicted = residual.reconstruct_spots(
        image, standardized, hidden, genes=genes, stride=2, num_views=2, calibrated=False
    )
    np.testing.assert_allclose(predicted, expected, atol=1e-4)
    assert (expected > 0).any()


@pytest.fixture
def read_spots(images, processor) -> ReadSpots:
    """Features that tell something of what was measured; of every third visible spot nothing was read."""
    image = images["square"]
    rng = np.random.default_rng(0)
    inside = (abs(image.rows - 5) < 3) & (abs(image.cols - 5) < 3)
    hidden, seen = image.part(inside), image.part(~inside)
    vectors = np.linalg.qr(rng.normal(size=(image.pad_id, 8)))[0]
    checks = dense(seen) @ vectors + 0.1 * rng.normal(size=(seen.num_spots, 8))
    checks[::3] = np.nan
    return ReadSpots(hidden, seen, SpotFeatures(dense(hidden) @ vectors), SpotFeatures(checks), vectors, processor)


def dense(image) -> np.ndarray:
    return sp.csr_matrix((image.values, image.indices, image.indptr), (image.num_spots, image.pad_id)).toarray()


def test_calibration_is_the_trend_and_the_kriging_of_what_it_leaves(read_spots, monkeypatch: pytest.MonkeyPatch):
    hidden, seen, genes = read_spots.hidden, read_spots.seen, np.array([7, 3, 60, 11])
    read = [v for v in range(seen.num_spots) if v % 3]
    places = [np.stack([part.rows, part.cols], axis=1).astype(float) for part in (seen, hidden)]
    x, p = dense(seen)[read], read_spots.of_checks.features[read] @ read_spots.embeddings.T
    slope = np.sum((p - p.mean(0)) * (x - x.mean(0))) / np.sum((p - p.mean(0)) ** 2)
    assert slope > 0.5  # these features do tell something
    weights, alone = kriging_weights([x - slope * p, x], places[0][read], places[1])
    left = (x - slope * p)[:, genes]
    trend = slope * read_spots.of_hidden.features @ read_spots.embeddings[genes].T
    regressed = trend + left.mean(0) + weights @ (left - left.mean(0))
    kriged = x[:, genes].mean(0) + alone @ (x - x.mean(0))[:, genes]
    near = np.sqrt(((places[1][:, None] - places[0]) ** 2).sum(-1)).min(1)[:, None]
    assert near.min() == 1
    assert near.max() == 3
    expected = regressed / near + kriged * (1 - 1 / near)
    np.testing.assert_allclose(calibrate(read_spots, genes), expected, atol=1e-6)
    monkeypatch.setattr("modeling_stimg.reconstruction_stimg.VALUES_AT_ONCE", 100)
    np.testing.assert_allclose(calibrate(read_spots, genes), expected, atol=1e-6)
    # Of too many spots the nearest ones to the region are left, here all those that touch it.
    monkeypatch.setattr("modeling_stimg.reconstruction_stimg.NUM_CHECKS", 10)
    assert np.isfinite(calibrate(read_spots, genes)).all()
    # A model that contradicts the slide is not listened to: what is left is the interpolation.
    monkeypatch.undo()
    contrary = replace(read_spots, of_checks=SpotFeatures(-read_spots.of_checks.features))
    [weights] = kriging_weights([x], places[0][read], places[1])
    expected = x[:, genes].mean(0) + weights @ (x - x.mean(0))[:, genes]
    np.testing.assert_allclose(calibrate(contrary, genes), expected, atol=1e-6)
    nothing = replace(read_spots, of_checks=SpotFeatures(np.full_like(read_spots.of_checks.features, np.nan)))
    np.testing.assert_array_equal(calibrate(nothing, genes), nothing.said(nothing.of_hidden, genes))


def test_kriging_equals_scikit_learns_gaussian_process_and_leaves_spots_out():
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern

    rng = np.random.default_rng(1)
    places, sites = rng.random((40, 2)) * 12, rng.random((9, 2)) * 12
    smooth = np.sin(places / 4) @ rng.normal(size=(2, 5))
    values = smooth + 0.3 * rng.normal(size=(40, 5))
    values -= values.mean(0)

    def process(reach: float, nugget: float) -> GaussianProcessRegressor:
        return GaussianProcessRegressor(Matern(reach, nu=0.5), alpha=nugget, optimizer=None)

    errors = {}
    for reach in (2.0, 8.0):
        for nugget in (0.1, 3.0):
            off = [
                process(reach, nugget).fit(np.delete(places, i, 0), np.delete(values, i, 0)).predict(places[i : i + 1])
                for i in range(40)
            ]
            errors[reach, nugget] = np.sum((values - np.concatenate(off)) ** 2)
    best = min(errors, key=errors.get)
    noise = rng.normal(size=(40, 5)) * 5
    # Every target has its own.
    of_noise, weights = kriging_weights([noise, values], places, sites, (2.0, 8.0), (0.1, 3.0))
    assert not np.allclose(of_noise, weights)
    np.testing.assert_allclose(weights @ values, process(*best).fit(places, values).predict(sites), atol=1e-8)


# ---------------------------------------------------------------------------- windows


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 9), st.integers(1, 6))
@settings(deadline=None, max_examples=25)
def test_windows_show_a_spot_the_most_of_its_surroundings(images, seed: int, size: int, stride: int, num_views: int):
    image = images["square"]
    rng = np.random.default_rng(seed)
    hidden = rng.random(image.num_spots) < rng.choice([0.02, 0.3, 0.9])
    hidden[rng.integers(image.num_spots)] = True
    hidden[rng.integers(image.num_spots)] = False
    if not hidden.any():
        return
    stride = min(stride, size)
    corners, views = context_windows(image.part(hidden), image.part(~hidden), size, stride, num_views)
    tops, lefts = (sorted({*range(0, s - size, stride), max(s - size, 0)}) for s in (image.height, image.width))
    places = np.stack([image.rows, image.cols], axis=1)
    for spot, row in zip(places[hidden], views, strict=True):
        holding = [
            (top, left)
            for top in tops
            for left in lefts
            if (spot - (top, left) >= 0).all() and max(spot - (top, left)) < size
        ]
        shown = {}
        for corner in holding:
            inside = (places[~hidden] >= corner).all(1) & (places[~hidden] < np.add(corner, size)).all(1)
            shown[corner] = (1 / ((places[~hidden][inside] - spot) ** 2).sum(1)).sum()
        best = sorted(holding, key=lambda corner: (-round(shown[corner], 6), corner))[:num_views]
        chosen = [corners[window] for window in row if window >= 0]
        assert sorted(map(tuple, chosen)) == sorted(best) or np.allclose(
            sorted(shown[c] for c in chosen), sorted(shown[c] for c in best)
        )
        assert len(set(chosen)) == len(best)
    assert set(views[views >= 0]) == set(range(len(corners)))


def test_a_region_larger_than_a_window_and_at_the_border(slides, processor, model, caplog: pytest.LogCaptureFixture):
    adata = slides["square"]
    whole_but_one = np.ones(adata.n_obs, dtype=bool)
    whole_but_one[0] = False
    predicted = reconstruct_region(adata, model, processor, whole_but_one)
    assert np.isfinite(predicted.to_numpy()).all()
    assert "have no visible spot within a window of 6 sites" in caplog.text
    corner = square(adata, 5, 0, 0)
    assert np.isfinite(reconstruct_region(adata, model, processor, corner).to_numpy()).all()
    large = reconstruct_region(adata, model, processor, corner, window_size=40)  # the whole slide at once
    assert np.isfinite(large.to_numpy()).all()


def test_a_model_of_whole_slices_reads_the_slide_at_once(slides, vocabulary, model):
    processor = STPatchProcessor(vocabulary, window_size=6, num_channels=32, sample_unit="slice")
    model.config.sample_unit = "slice"
    adata = slides["square"]
    assert np.isfinite(reconstruct_region(adata, model, processor, square(adata)).to_numpy()).all()


@pytest.mark.parametrize("unit", ["spot", "multi_spot"])
def test_models_that_see_no_surroundings_are_refused(slides, vocabulary, model, unit: str):
    processor = STPatchProcessor(vocabulary, window_size=6, num_channels=32, sample_unit=unit)
    model.config.sample_unit = unit
    with pytest.raises(ValueError, match=f'sample unit "{unit}"'):
        reconstruct_region(slides["square"], model, processor, square(slides["square"]))


# ---------------------------------------------------------------------------- parts of a slide


def test_a_part_is_the_slide_without_the_other_spots(slides, processor):
    adata = slides["square"]
    image = processor.slide_to_image(adata)
    kept = np.random.default_rng(3).random(image.num_spots) < 0.4
    part = image.part(kept)
    assert (part.height, part.width, part.num_spots) == (image.height, image.width, kept.sum())
    for spot, number in enumerate(np.flatnonzero(kept)):
        for before, after in zip(
            image.expression(np.array([number]))[:2], part.expression(np.array([spot]))[:2], strict=True
        ):
            np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(part.coordinates, image.coordinates[kept])
    np.testing.assert_array_equal(part.obs_index[part.spot_of_obs[part.obs_index]], part.obs_index)
    assert (part.spot_of_obs[image.obs_index[~kept]] == -1).all()
    assert variable_genes(part, 5).tolist() == np.argsort(-part.gene_variances, kind="stable")[:5].tolist()
    with pytest.raises(ValueError, match=r"expected bool \(\d+,\)"):
        image.part(kept[1:])


# ---------------------------------------------------------------------------- bad input


def test_bad_regions_and_genes_get_one_clear_sentence(slides, processor, model):
    adata = slides["square"].copy()
    adata.obs["number"] = 1.0
    spots = square(adata)
    for bad, message in (
        ("nonsense", "obs has no column 'nonsense'"),
        ("label", "holds .* values, e.g. 'layer 1': expected True or False"),
        ("number", "holds float64 values"),
        (spots[1:], r"spots has shape \(\d+,\): expected"),
        (np.zeros(adata.n_obs, bool), "True for no spot"),
        (np.ones(adata.n_obs, bool), "leave some out"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruct_region(adata, model, processor, bad)
    for bad, message in (
        (["PHANTOM0001", "nonsense"], "1 of 2 genes are not in the vocabulary, e.g. 'nonsense'"),
        (["PHANTOM0001", "PHANTOM0001"], "given twice"),
        ([], "genes is empty"),
        ("PHANTOM0001", "expected a list of names"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruct_region(adata, model, processor, spots, genes=bad)
    for options, message in (
        ({"num_views": 0}, "num_views is 0"),
        ({"stride": 7}, "stride is 7"),
        ({"num_gene_draws": 0}, "num_gene_draws is 0"),
        ({"device": "nonsense"}, "cannot be used here"),
    ):
        with pytest.raises(ValueError, match=message):
            reconstruct_region(adata, model, processor, spots, **options)


def test_a_model_that_cannot_reconstruct_says_why(slides, processor, model, config):
    adata = slides["square"]
    with pytest.raises(ValueError, match="has no decoder"):
        reconstruct_region(adata, STImageMAEModel(config), processor, square(adata))
    other = STPatchProcessor(GeneVocabulary(processor.vocabulary.gene_ids[:90]), window_size=6)
    with pytest.raises(ValueError, match="belong to different models"):
        reconstruct_region(adata, model, other, square(adata))


def test_spots_both_hidden_and_visible_are_refused(images, processor, model):
    image = images["square"]
    hidden = np.arange(image.num_spots) < 5
    for visible, message in (
        (~hidden | (np.arange(image.num_spots) == 2), "1 spots are both"),
        (hidden & False, "no spot"),
    ):
        with pytest.raises(ValueError, match=message):
            model.reconstruct_spots(image, processor, hidden, visible=visible)
    with pytest.raises(ValueError, match="no spot is hidden"):
        model.reconstruct_spots(image, processor, hidden & False)


def test_a_model_that_met_no_hidden_site_warns(slides, processor, model, caplog: pytest.LogCaptureFixture):
    type(reconstruction_stimg.logger).warning_once.cache_clear()
    for _ in range(2):
        reconstruct_region(slides["square"], model, processor, square(slides["square"]))
    assert caplog.text.count('mask_unit="entry" has not met') == 1
