"""The processor: batches that depend on (seed, window) alone, options, files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stimg import GeneVocabulary, STPatchProcessor
from modeling_stimg.processing_stimg import NORMALIZATIONS, Normalization

SHAPES = {
    "pixel_values": ((3, 32, 6, 6), torch.float32),
    "gene_ids": ((3, 32), torch.int64),
    "channel_mask": ((3, 32), torch.bool),
    "pixel_mask": ((3, 6, 6), torch.bool),
    "coordinates": ((3, 6, 6, 2), torch.float32),
    "spot_index": ((3, 6, 6), torch.int64),
}


def test_keys_shapes_and_types_are_the_public_ones(images, processor: STPatchProcessor):
    batch = processor(images["square"], num_windows=3, seed=0, return_tensors="pt")
    assert {k: (tuple(v.shape), v.dtype) for k, v in batch.items()} == SHAPES


@given(st.integers(0, 2**40), st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(deadline=None, max_examples=25)
def test_a_window_does_not_depend_on_its_batch(images, processor: STPatchProcessor, seed: int, parts: list[int]):
    image, total = images["staggered"], sum(parts)
    whole = processor(image, num_windows=total, seed=seed)
    start = 0
    for part in parts:
        some = processor(image, num_windows=part, seed=seed, first_window=start)
        for key in whole:
            np.testing.assert_array_equal(some[key], whole[key][start : start + part])
        start += part


def test_seeds_and_windows_differ(images, processor: STPatchProcessor):
    a, b = (processor(images["square"], num_windows=8, seed=s) for s in (0, 1))
    assert not np.array_equal(a["gene_ids"], b["gene_ids"])
    assert not np.array_equal(a["spot_index"], b["spot_index"])
    assert len({tuple(ids) for ids in a["gene_ids"]}) == 8


def test_given_genes_fix_the_channels_and_unmeasured_ones_are_padding(slides, images, vocabulary: GeneVocabulary):
    processor = STPatchProcessor(vocabulary, window_size=6, num_channels=32)
    names = [vocabulary.gene_ids[i] for i in (7, 3, 99)]
    by_name = processor(images["square"], windows=[(0, 0)], genes=names)
    by_number = processor(images["square"], windows=[(0, 0)], genes=[7, 3, 99])
    assert by_name["gene_ids"].tolist() == by_number["gene_ids"].tolist() == [[7, 3, 99]]
    panel = slides["square"][:, [g not in (names[1],) for g in slides["square"].var_names]].copy()
    batch = processor(processor.slide_to_image(panel), windows=[(0, 0)], genes=names)
    assert batch["gene_ids"].tolist() == [[7, vocabulary.pad_id, 99]]
    assert batch["channel_mask"].tolist() == [[True, False, True]]
    assert not batch["pixel_values"][0, 1].any()


def test_slide_with_fewer_genes_than_channels_is_padded(slides, vocabulary: GeneVocabulary):
    processor = STPatchProcessor(vocabulary, window_size=6, num_channels=64)
    image = processor.slide_to_image(slides["square"][:, :55].copy())
    batch = processor(image, num_windows=2)
    assert (batch["gene_ids"][:, :55] < vocabulary.pad_id).all()
    assert (batch["gene_ids"][:, 55:] == vocabulary.pad_id).all()
    np.testing.assert_array_equal(batch["channel_mask"], batch["gene_ids"] != vocabulary.pad_id)
    assert not batch["pixel_values"][:, 55:].any()


def test_slide_smaller_than_the_window_leaves_sites_empty(images, vocabulary: GeneVocabulary):
    image = images["square"]
    batch = STPatchProcessor(vocabulary, window_size=20, num_channels=8)(image, num_windows=2)
    assert batch["pixel_mask"].sum(axis=(1, 2)).tolist() == [image.num_spots] * 2


def test_standardized_input_is_standardised_where_observed_and_zero_elsewhere(images, vocabulary: GeneVocabulary):
    rng = np.random.default_rng(0)
    mean, deviation = rng.random(len(vocabulary)), rng.random(len(vocabulary)) + 0.5
    known = vocabulary.with_statistics(mean, deviation)
    options = {"window_size": 6, "num_channels": 16}
    plain = STPatchProcessor(known, **options)(images["square"], num_windows=4)
    standard = STPatchProcessor(known, normalization="standardized", **options)(images["square"], num_windows=4)
    np.testing.assert_array_equal(standard["gene_ids"], plain["gene_ids"])
    for b in range(4):
        for c, gene in enumerate(plain["gene_ids"][b]):
            observed = plain["pixel_mask"][b]
            expected = np.where(observed, (plain["pixel_values"][b, c] - mean[gene]) / deviation[gene], 0)
            np.testing.assert_allclose(standard["pixel_values"][b, c], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="needs the mean and deviation of every gene"):
        STPatchProcessor(vocabulary, normalization="standardized")


def test_centered_input_is_less_the_mean_of_its_own_slide(images, vocabulary: GeneVocabulary):
    """The mean over all spots of a slide, zeros included, whatever the window; over a corpus' deviation."""
    deviation = np.random.default_rng(0).random(len(vocabulary)) + 0.5
    known, image = vocabulary.with_statistics(deviation=deviation), images["staggered"]
    processor = STPatchProcessor(known, window_size=6, normalization="centered")
    genes, options = np.array([5, 90, 2]), {"num_windows": 3, "return_tensors": "pt"}
    plain = STPatchProcessor(known, window_size=6)(image, genes=genes, **options)
    batch = processor(image, genes=genes, **options)
    whole = STPatchProcessor(known, window_size=40)(image, genes=genes, windows=[(0, 0)])
    means = whole["pixel_values"][0][:, whole["pixel_mask"][0]].mean(1)
    expected = (
        (plain["pixel_values"] - means[:, None, None]) / deviation[genes][:, None, None] * plain["pixel_mask"][:, None]
    )
    torch.testing.assert_close(batch["pixel_values"], expected.float(), atol=1e-5, rtol=1e-5)
    assert (~plain["pixel_mask"]).any()
    log1p = processor.log1p_values(np.zeros((1, 3)), genes, image)
    np.testing.assert_allclose(log1p[0], means, rtol=1e-5)


def test_a_further_normalization_is_one_entry(images, vocabulary: GeneVocabulary, monkeypatch: pytest.MonkeyPatch):
    centred = Normalization(lambda pixel_values, mean: pixel_values - mean, statistics=("mean",))
    monkeypatch.setitem(NORMALIZATIONS, "centred", centred)
    known = vocabulary.with_statistics(mean=np.arange(len(vocabulary)))
    plain = STPatchProcessor(known, window_size=6, num_channels=16)(images["square"], num_windows=2)
    batch = STPatchProcessor(known, window_size=6, num_channels=16, normalization="centred")(
        images["square"], num_windows=2
    )
    expected = (plain["pixel_values"] - plain["gene_ids"][:, :, None, None]) * plain["pixel_mask"][:, None]
    np.testing.assert_allclose(batch["pixel_values"], expected, rtol=1e-6)


def test_panel_scales_by_the_share_that_the_corpus_expects(slides, vocabulary: GeneVocabulary):
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(len(vocabulary)))
    known = vocabulary.with_statistics(share=share)
    panel = slides["square"][:, :60].copy()
    panel.var_names = [*panel.var_names[:58], "foreign 1", "foreign 2"]
    image = STPatchProcessor(known, target_sum="panel").slide_to_image(panel)
    counts, genes = panel.X.toarray()[image.obs_index], known.encode(panel.var_names)
    matched = genes >= 0
    assert matched.sum() == 58
    library = counts[:, matched].sum(1, keepdims=True)
    expected = np.log1p(counts[:, matched] / library * 1e4 * share[genes[matched]].sum())
    dense = np.zeros((image.num_spots, len(known)))
    for spot in range(image.num_spots):
        part = slice(image.indptr[spot], image.indptr[spot + 1])
        dense[spot, image.indices[part]] = image.values[part]
    np.testing.assert_allclose(dense[:, genes[matched]], expected, rtol=1e-5)
    nothing = vocabulary.with_statistics(share=np.zeros(len(vocabulary)))
    with pytest.raises(ValueError, match="the corpus expects no counts from the 58 genes"):
        STPatchProcessor(nothing, target_sum="panel").slide_to_image(panel)
    with pytest.raises(ValueError, match="none below 0"):
        vocabulary.with_statistics(share=np.full(len(vocabulary), -1))
    with pytest.raises(ValueError, match='target_sum="panel" needs the share of every gene'):
        STPatchProcessor(vocabulary, target_sum="panel")


def test_numbers_of_numpy_serve_as_well(images, vocabulary: GeneVocabulary, tmp_path: Path):
    processor = STPatchProcessor(
        vocabulary, window_size=np.int64(6), num_channels=np.int32(16), target_sum=np.float32(500)
    )
    processor.save_pretrained(tmp_path)
    assert STPatchProcessor.from_pretrained(tmp_path).target_sum == 500.0
    far = {"seed": np.int64(2**63 - 1), "first_window": np.int64(2**63 - 2), "num_windows": 4}
    assert processor(images["square"], **far)["gene_ids"].shape == (4, 16)


def test_another_vocabulary_brings_its_own_statistics(images, vocabulary: GeneVocabulary):
    ones, zeros = np.ones(len(vocabulary)), np.zeros(len(vocabulary))
    processor = STPatchProcessor(
        vocabulary.with_statistics(zeros, ones), window_size=6, num_channels=8, normalization="standardized"
    )
    before = processor(images["square"], num_windows=1)["pixel_values"]
    processor.vocabulary = vocabulary.with_statistics(ones, ones)
    after = pickle.loads(pickle.dumps(processor))(images["square"], num_windows=1)
    expected = (before - 1) * after["pixel_mask"][:, None]
    np.testing.assert_allclose(after["pixel_values"], expected, rtol=1e-6)


def test_file_round_trip_gives_the_same_windows(tmp_path: Path, images, vocabulary: GeneVocabulary):
    processor = STPatchProcessor(
        vocabulary, window_size=5, num_channels=17, compaction="rank", gene_selection="variable", min_observed=0.4
    )
    processor.save_pretrained(tmp_path)
    again = STPatchProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == {**processor.to_dict(), "auto_map": again.auto_map}
    a, b = (p(images["square"], num_windows=3, seed=2) for p in (processor, again))
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
    assert STPatchProcessor.from_pretrained(tmp_path, window_size=9).window_size == 9
    assert "gene_ids" not in json.loads((tmp_path / "preprocessor_config.json").read_text())


def test_gene_file_of_another_model_is_refused(tmp_path: Path, processor: STPatchProcessor):
    processor.save_pretrained(tmp_path)
    GeneVocabulary(processor.vocabulary.gene_ids[::-1]).save(tmp_path)
    with pytest.raises(ValueError, match="sha256 differs"):
        STPatchProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compaction": "hexagon"}, "compaction is 'hexagon': expected one of"),
        ({"gene_selection": "best"}, "gene_selection is 'best'"),
        ({"normalization": "none"}, "normalization is 'none'"),
        ({"window_size": 0}, "window_size is 0"),
        ({"min_observed": 2}, "min_observed is 2"),
        ({"target_sum": 0}, "target_sum is 0"),
        ({"target_sum": float("inf")}, "target_sum is inf"),
        ({"num_channels": 2.5}, "num_channels is 2.5"),
        ({"target_sum": "median"}, "target_sum is 'median': expected a positive number or \"panel\""),
        ({"windowsize": 3}, "no option windowsize: window_size is meant"),
    ],
)
def test_bad_options_get_one_clear_sentence(vocabulary: GeneVocabulary, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        STPatchProcessor(vocabulary, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"windows": [(99, 0)]}, "lies outside"),
        ({"windows": [(0, 0)], "num_windows": 1}, "pass one of them"),
        ({"windows": []}, "at least one"),
        ({"genes": ["nonsense"]}, "not in the vocabulary"),
        ({"genes": [1, 1]}, "given twice"),
        ({"seed": -1}, "seed is -1: expected a whole number from 0"),
        ({"gene_selection": "best"}, "gene_selection is 'best'"),
        ({"device": "meta"}, 'device is "meta" and return_tensors None'),
        ({"device": "gpu", "return_tensors": "pt"}, 'The device "gpu" cannot be used here'),
        ({"window_size": 0}, "window_size is 0: expected a whole number from 1"),
        ({"window_size": 2.5}, "window_size is 2.5"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"num_windows": -1}, "num_windows is -1"),
        ({"genes": "G001"}, "expected a list of names"),
        ({"windows": [(1,)]}, r"expected integers \(B, 2\)"),
        ({"windows": [(0.7, 1.2)]}, r"expected integers \(B, 2\)"),
    ],
)
def test_bad_calls_get_one_clear_sentence(images, processor: STPatchProcessor, call: dict, message: str):
    with pytest.raises(ValueError, match=message):
        processor(images["square"], **call)


def test_a_slide_in_place_of_an_image_is_told_the_way(slides, processor: STPatchProcessor):
    with pytest.raises(ValueError, match="slide_to_image"):
        processor(slides["square"])
