"""embed_slide and what stands behind it: every spot, in order, the same bits, and readouts that mean what they say."""

import numpy as np
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stimg import GeneVocabulary, SlideImage, STImageMAEForPreTraining, STPatchProcessor, embed_slide
from modeling_stimg.embedding_stimg import neighbourhood_mean
from modeling_stimg.sampling_stimg import covering_corners


def plain_embedding(model, processor, image: SlideImage, stride: int, readout: str, draws: int, **genes) -> np.ndarray:
    """One window and one masked quarter at a time, with a Python loop over sites."""
    size, width = processor.window_size, model.config.hidden_size
    total, count = np.zeros((image.num_spots, width)), np.zeros(image.num_spots)
    corners = covering_corners(image, size, stride) * draws
    for number, (top, left) in enumerate(corners):
        batch = dict(processor(image, windows=[(top, left)], first_window=number, return_tensors="pt", **genes))
        spots = batch.pop("spot_index")[0].numpy()
        for row in range(size):
            for col in range(size):
                if spots[row, col] < 0:
                    continue
                mask = None
                if readout == "context":
                    rows, cols = np.mgrid[top : top + size, left : left + size] % 2
                    same = (rows == (top + row) % 2) & (cols == (left + col) % 2)
                    mask = torch.tensor(same)[None, None].expand(batch["pixel_values"].shape)
                with torch.no_grad():
                    hidden = model.stimg(**batch, bool_masked_entries=mask).last_hidden_state
                total[spots[row, col]] += hidden[0, row * size + col].numpy()
                count[spots[row, col]] += 1
    return total / count[:, None]


@pytest.mark.parametrize("readout", ["spot", "context"])
def test_embedding_equals_a_plain_loop(slides, vocabulary, model: STImageMAEForPreTraining, readout: str):
    processor = STPatchProcessor(vocabulary, window_size=5, num_channels=16)
    image = processor.slide_to_image(slides["square"][::2].copy())
    fast = model.embed(image, processor, stride=4, readout=readout, num_gene_draws=2, batch_size=3)
    slow = plain_embedding(model, processor, image, 4, readout, 2)
    np.testing.assert_allclose(fast, slow, atol=1e-4)


def test_as_many_genes_as_asked_for_the_same_ones_everywhere(slides, vocabulary, model: STImageMAEForPreTraining):
    processor = STPatchProcessor(vocabulary, window_size=5, num_channels=16)
    image = processor.slide_to_image(slides["square"])
    fast = model.embed(image, processor, stride=4, gene_selection="slide", num_channels=40)
    most_variable = np.argsort(-image.gene_variances, kind="stable")[:40]
    slow = plain_embedding(model, processor, image, 4, "spot", 1, genes=most_variable)
    np.testing.assert_allclose(fast, slow, atol=1e-4)


def test_centred_embeddings_are_less_their_mean_before_they_are_smoothed(images, processor, model):
    image = images["staggered"]
    plain = model.embed(image, processor).astype(np.float64)
    centred = model.embed(image, processor, centered=True)
    np.testing.assert_allclose(centred, plain - plain.mean(0), atol=1e-5)
    smoothed = model.embed(image, processor, centered=True, smoothing=2)
    np.testing.assert_allclose(smoothed, neighbourhood_mean(image, plain - plain.mean(0), 2), atol=1e-5)


def test_both_is_spot_and_context_side_by_side(images, processor, model: STImageMAEForPreTraining):
    both, spot, context = (model.embed(images["staggered"], processor, readout=r) for r in ("both", "spot", "context"))
    assert both.dtype == np.float32
    np.testing.assert_array_equal(both, np.concatenate([spot, context], axis=1))
    assert not np.allclose(spot, context)


def test_context_readout_does_not_see_the_spot_itself(slides, vocabulary, model: STImageMAEForPreTraining):
    """With fixed genes, changing one spot's counts changes its own context embedding by no bit, but its neighbours'."""
    processor = STPatchProcessor(vocabulary, window_size=6, num_channels=len(vocabulary))
    adata = slides["square"].copy()
    before = model.embed(processor.slide_to_image(adata), processor, readout="context")
    changed = adata.copy()
    dense = changed.X.toarray()
    dense[40] = dense[40][::-1]
    changed.X = dense
    after = model.embed(processor.slide_to_image(changed), processor, readout="context")
    image = processor.slide_to_image(adata)
    spot = int(image.spot_of_obs[40])
    np.testing.assert_array_equal(before[spot], after[spot])
    assert (before != after).any(axis=1).sum() > 5


def test_embed_slide_works_in_place_and_keeps_the_order(slides, processor, model: STImageMAEForPreTraining):
    adata = slides["staggered"].copy()
    shuffled = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    untouched = shuffled.copy()
    assert embed_slide(adata, model, processor, progress=False) is None
    embed_slide(shuffled, model, processor, progress=False)
    assert adata.obsm["X_stimg"].dtype == np.float32
    assert adata.obsm["X_stimg"].shape == (adata.n_obs, model.config.hidden_size)
    by_name = dict(zip(adata.obs_names, adata.obsm["X_stimg"], strict=True))
    for name, row in zip(shuffled.obs_names, shuffled.obsm["X_stimg"], strict=True):
        np.testing.assert_array_equal(row, by_name[name])
    del shuffled.obsm["X_stimg"]
    assert list(shuffled.obs.columns) == list(untouched.obs.columns)
    assert list(shuffled.obsm) == list(untouched.obsm)
    assert (shuffled.X != untouched.X).nnz == 0


def test_legacy_names_of_positions_are_understood_without_touching_obs(slides, processor, model):
    adata = slides["square"].copy()
    legacy = adata.copy()
    legacy.obs = legacy.obs.rename(columns={"array_row": "array_y", "array_col": "array_x"})
    legacy.obs[["array_x", "array_y"]] += 0.01
    columns = list(legacy.obs.columns)
    for slide in (adata, legacy):
        embed_slide(slide, model, processor, progress=False)
    np.testing.assert_array_equal(legacy.obsm["X_stimg"], adata.obsm["X_stimg"])
    assert list(legacy.obs.columns) == columns


def test_same_input_same_bits_and_seeds_differ(images, processor, model: STImageMAEForPreTraining):
    torch.manual_seed(99)
    first = model.embed(images["square"], processor)
    torch.manual_seed(100)
    assert np.array_equal(first, model.embed(images["square"], processor))
    assert not np.array_equal(first, model.embed(images["square"], processor, seed=1))
    np.testing.assert_allclose(first, model.embed(images["square"], processor, batch_size=1), atol=1e-4)


def test_model_is_left_as_it_was(images, processor, model: STImageMAEForPreTraining):
    model.train()
    model.embed(images["square"], processor)
    assert model.stimg.training


def test_spots_on_one_position_share_an_embedding(slides, processor, model: STImageMAEForPreTraining):
    adata = slides["square"].copy()
    adata.obs.iloc[5, adata.obs.columns.get_loc("array_row")] = adata.obs["array_row"].iloc[9]
    adata.obs.iloc[5, adata.obs.columns.get_loc("array_col")] = adata.obs["array_col"].iloc[9]
    with pytest.warns(UserWarning, match="1 of .* spots stand on an array position"):
        embed_slide(adata, model, processor, progress=False)
    np.testing.assert_array_equal(adata.obsm["X_stimg"][5], adata.obsm["X_stimg"][9])
    assert np.isfinite(adata.obsm["X_stimg"]).all()


def test_defaults_of_the_model_are_used_and_overridden(slides, images, processor, model: STImageMAEForPreTraining):
    plain = model.embed(images["square"], processor)
    model.config.embedding_defaults = {"readout": "both", "stride": 2, "smoothing": 1}
    stored = model.embed(images["square"], processor)
    assert stored.shape[1] == 2 * plain.shape[1]
    again = model.embed(images["square"], processor, readout="spot", stride=3, smoothing=0)
    np.testing.assert_array_equal(again, plain)


@given(st.integers(0, 3), st.integers(0, 1000))
@settings(deadline=None, max_examples=10)
def test_smoothing_equals_a_plain_loop(images, radius: int, seed: int):
    image = images["staggered"]
    features = np.random.default_rng(seed).random((image.num_spots, 3))
    expected = [
        features[(abs(image.rows - r) <= radius) & (abs(image.cols - c) <= radius)].mean(0)
        for r, c in zip(image.rows, image.cols, strict=True)
    ]
    np.testing.assert_allclose(neighbourhood_mean(image, features, radius), expected)


def test_slide_of_one_spot_is_embedded(slides: dict[str, AnnData], processor, model):
    adata = slides["square"][:1].copy()
    embed_slide(adata, model, processor, readout="both", progress=False)
    assert np.isfinite(adata.obsm["X_stimg"]).all()


def test_number_of_matched_genes_is_told_unless_silenced(slides, processor, model, capsys: pytest.CaptureFixture):
    embed_slide(slides["square"].copy(), model, processor)
    assert "matched 120 of 120 genes" in capsys.readouterr().err
    embed_slide(slides["square"].copy(), model, processor, progress=False)
    assert capsys.readouterr().err == ""


def test_processor_of_another_model_is_refused(images, processor, model: STImageMAEForPreTraining):
    other = STPatchProcessor(GeneVocabulary(processor.vocabulary.gene_ids[:90]), window_size=6)
    with pytest.raises(ValueError, match="belong to different models"):
        model.embed(images["square"], other)


def test_unusable_device_gets_one_clear_sentence(images, processor, model: STImageMAEForPreTraining):
    for device in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match="cannot be used here"):
            model.embed(images["square"], processor, device=device)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"readout": "all"}, "readout is 'all'"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": 7}, "larger than the window"),
        ({"num_gene_draws": 0}, "num_gene_draws is 0"),
        ({"num_channels": 0}, "num_channels is 0"),
        ({"smoothing": -1}, "smoothing is -1"),
        ({"gene_selection": "best"}, "gene_selection is 'best'"),
    ],
)
def test_bad_options_get_one_clear_sentence(images, processor, model, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        model.embed(images["square"], processor, **options)


@pytest.mark.parametrize("readout", ["context", "both"])
def test_context_is_refused_where_masked_sites_never_enter_the_encoder(images, processor, model, readout: str):
    model.config.mask_unit = "site"
    with pytest.raises(ValueError, match='train with "mixed", or read "spot"'):
        model.embed(images["square"], processor, readout=readout)
    assert np.isfinite(model.embed(images["square"], processor)).all()


def test_unknown_defaults_are_refused(images, processor, model: STImageMAEForPreTraining):
    model.config.embedding_defaults = {"strid": 2}
    with pytest.raises(ValueError, match=r"Unknown embedding options \['strid'\]"):
        model.embed(images["square"], processor)
