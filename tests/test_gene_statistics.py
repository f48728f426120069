"""Gene statistics of a corpus against dense linear algebra."""

import numpy as np
import pytest

from data_processing.gene_statistics import DEVIATION_FLOOR, gene_moments, gene_shares, leading_gene_vectors
from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor
from modeling_stimg.embedding_stimg import neighbourhood_mean


@pytest.fixture
def corpus(slides, processor: STPatchProcessor) -> list[SlideImage]:
    """Two slides; the second measured only 90 of the 120 genes."""
    return [
        processor.slide_to_image(slides["staggered"]),
        processor.slide_to_image(slides["square"][:, :90].copy()),
    ]


def dense(image: SlideImage) -> np.ndarray:
    values = np.full((image.num_spots, image.pad_id), np.nan)
    values[:, image.measured] = 0
    for spot in range(image.num_spots):
        part = slice(image.indptr[spot], image.indptr[spot + 1])
        values[spot, image.indices[part]] = image.values[part]
    return values


def test_moments_are_over_spots_of_slides_that_measured_the_gene(corpus: list[SlideImage]):
    mean, deviation = gene_moments(corpus)
    values = np.concatenate([dense(image) for image in corpus])
    np.testing.assert_allclose(mean, np.nanmean(values, axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation, np.maximum(np.nanstd(values, axis=0), DEVIATION_FLOOR), rtol=1e-4)
    assert deviation.dtype == mean.dtype == np.float32


def test_shares_of_one_slide_are_the_mean_shares_of_its_spots(slides, processor: STPatchProcessor):
    counts = slides["square"].X.toarray()
    expected = (counts / counts.sum(1, keepdims=True)).mean(0)
    numbers = processor.vocabulary.encode(slides["square"].var_names)
    for image in (
        processor.slide_to_image(slides["square"]),
        STPatchProcessor(processor.vocabulary, target_sum=50).slide_to_image(slides["square"]),
    ):
        shares = gene_shares([image])
        np.testing.assert_allclose(shares[numbers], expected, rtol=1e-4)
        assert shares.dtype == np.float32


def test_shares_are_those_of_all_genes_though_no_slide_measured_them_all(slides, processor: STPatchProcessor):
    """Three panels that overlap, of the same spots: the fit must find the shares of the whole."""
    whole, vocabulary = slides["square"], processor.vocabulary
    panels = [whole[:, :90].copy(), whole[:, 30:].copy(), whole[:, 20:75].copy()]
    shares = gene_shares([processor.slide_to_image(panel) for panel in panels])
    expected = gene_shares([processor.slide_to_image(whole)])
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    # Spots weigh alike within each panel, so that the fit is near the whole's shares, not equal to them.
    np.testing.assert_allclose(shares, expected, rtol=0.1, atol=2e-4)
    naive = np.zeros(len(vocabulary))
    for panel in panels:
        naive += gene_shares([processor.slide_to_image(panel)]) / 3
    assert np.abs(shares - expected).sum() < 0.2 * np.abs(naive - expected).sum()


@pytest.mark.parametrize("low", [0.05, 0.0005])
def test_shares_of_a_panel_of_rare_genes_are_found(tissue, low: float):
    """A panel that holds hardly any counts says nothing of the whole: the slide with all genes alone decides."""
    whole = tissue.slide(0, array="square", height=20, width=20, median_counts=4000)
    processor = STPatchProcessor(GeneVocabulary(list(whole.var_names)))
    totals = np.asarray(whole.X.sum(0)).ravel()
    rare = np.argsort(totals)[: max(50, np.searchsorted(np.cumsum(np.sort(totals)) / totals.sum(), low))]
    broad, panel = processor.slide_to_image(whole), processor.slide_to_image(whole[:, np.sort(rare)].copy())
    together, alone = gene_shares([broad, *[panel] * 5]), gene_shares([broad])
    assert together[panel.measured].sum() == pytest.approx(alone[panel.measured].sum(), rel=0.02)


def test_slides_without_a_common_gene_are_told(slides, processor: STPatchProcessor):
    parts = [processor.slide_to_image(slides["square"][:, part].copy()) for part in (slice(0, 60), slice(60, 120))]
    with pytest.warns(UserWarning, match="1 of 2 sets of measured genes have no gene in common"):
        shares = gene_shares(parts)
    assert shares.sum() == pytest.approx(1, abs=1e-5)


def test_a_spot_or_slide_without_counts_has_no_share(slides, processor: STPatchProcessor):
    empty = slides["square"].copy()
    empty.X = empty.X * 0
    image = processor.slide_to_image(slides["square"])
    np.testing.assert_allclose(gene_shares([image, processor.slide_to_image(empty)]), gene_shares([image]), rtol=1e-6)
    assert not gene_shares([processor.slide_to_image(empty)]).any()


def test_vectors_span_the_leading_right_singular_space(corpus: list[SlideImage]):
    mean, deviation = gene_moments(corpus)
    vectors = leading_gene_vectors(corpus, mean, deviation, rank=5, num_iterations=30, progress=False)
    values = np.concatenate([dense(image) for image in corpus])
    standard = np.nan_to_num((values - mean) / deviation)
    exact = np.linalg.svd(standard, full_matrices=False)[2][:5].T
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-4)
    # Sums of squares captured agree, vector by vector; the vectors themselves where singular values are apart.
    np.testing.assert_allclose(
        np.linalg.norm(standard @ vectors, axis=0), np.linalg.norm(standard @ exact, axis=0), rtol=1e-3
    )
    assert abs(vectors[:, 0] @ exact[:, 0]) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("radius", [1, 3])
def test_vectors_of_smoothed_expression_span_what_neighbours_share(corpus: list[SlideImage], radius: int):
    mean, deviation = gene_moments(corpus)
    options = {"rank": 5, "num_iterations": 30, "progress": False, "smoothing": radius}
    vectors = leading_gene_vectors(corpus, mean, deviation, **options)
    smoothed = []
    for image in corpus:
        standard = np.nan_to_num((dense(image) - mean) / deviation)
        means = neighbourhood_mean(image, standard, radius)
        smoothed.append(means - neighbourhood_mean(image, np.tile(standard.mean(0), (len(standard), 1)), radius))
    exact = np.linalg.svd(np.concatenate(smoothed), full_matrices=False)[2][:5].T
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(5), atol=1e-4)
    captured = [np.linalg.norm(np.concatenate(smoothed) @ of, axis=0) for of in (vectors, exact)]
    np.testing.assert_allclose(*captured, rtol=1e-3)
    assert abs(vectors[:, 0] @ exact[:, 0]) == pytest.approx(1, abs=1e-3)
    few = leading_gene_vectors(corpus, mean, deviation, **options, max_spots=corpus[0].num_spots + 5)
    assert not np.array_equal(few, vectors)
    np.testing.assert_allclose(few.T @ few, np.eye(5), atol=1e-4)


def test_vectors_are_the_same_every_time_and_padded_beyond_the_corpus(corpus: list[SlideImage]):
    mean, deviation = gene_moments(corpus)
    a, b = (leading_gene_vectors(corpus, mean, deviation, rank=200, seed=1, progress=False) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert a.shape == (120, 200)
    assert not a[:, 120:].any()


def test_large_corpus_is_represented_by_a_subset_of_spots(corpus: list[SlideImage]):
    mean, deviation = gene_moments(corpus)
    vectors = leading_gene_vectors(corpus, mean, deviation, rank=3, max_spots=60, progress=False)
    whole = leading_gene_vectors(corpus, mean, deviation, rank=3, progress=False)
    assert not np.array_equal(vectors, whole)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-4)
