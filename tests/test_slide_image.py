"""A slide as a sparse image."""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor
from modeling_stimg.slide_image_stimg import window_counts

NUM_GENES = 60
GENES = [f"G{i:02d}" for i in range(NUM_GENES)]


def make_slide(counts: np.ndarray, rows: list[int], cols: list[int], genes: list[str] = GENES) -> AnnData:
    obs = pd.DataFrame({"array_row": np.array(rows, np.int64), "array_col": np.array(cols, np.int64)})
    obs.index = obs.index.astype(str)
    return AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))


def dense_image(image: SlideImage) -> np.ndarray:
    """float32 (num_spots, vocabulary), from the CSR arrays."""
    shape = (image.num_spots, image.pad_id)
    return sp.csr_matrix((image.values, image.indices, image.indptr), shape=shape).toarray()


@st.composite
def random_slides(draw) -> tuple[AnnData, list[str]]:
    """Up to 20 spots at distinct positions, counts over a shuffled part of the vocabulary and a few foreign genes."""
    positions = draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    genes = [*rng.permutation(GENES)[: rng.integers(50, NUM_GENES + 1)], "foreign 1", "foreign 2"]
    counts = rng.poisson(0.4, (len(positions), len(genes)))
    return make_slide(counts, [p[0] for p in positions], [p[1] for p in positions], genes), genes


def test_few_of_a_models_genes_are_warned_about():
    counts = np.ones((2, NUM_GENES))
    many = GeneVocabulary([*GENES, *(f"X{i}" for i in range(20 * NUM_GENES))])
    with pytest.warns(UserWarning, match="Only 60 of the 1,260 genes that the model knows were measured"):
        STPatchProcessor(many).slide_to_image(make_slide(counts, [0, 0], [0, 1]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # most of a small panel that the model is of
        STPatchProcessor(GeneVocabulary(GENES)).slide_to_image(make_slide(counts, [0, 0], [0, 1]))


@given(random_slides())
@settings(deadline=None, max_examples=60)
def test_image_equals_a_plain_loop(slide_and_genes):
    adata, genes = slide_and_genes
    vocabulary = GeneVocabulary(GENES)
    image = STPatchProcessor(vocabulary).slide_to_image(adata)
    counts, values = adata.X.toarray(), dense_image(image)
    assert (np.diff(image.rows * image.width + image.cols) > 0).all(), "spots stand in grid order"
    for spot, row in enumerate(image.obs_index):
        assert image.spot_of_obs[row] == spot
        library = counts[row].sum()
        expected = np.zeros(NUM_GENES)
        for column, gene in enumerate(genes):
            if gene in GENES and library > 0:
                expected[GENES.index(gene)] = np.log1p(counts[row, column] / library * 1e4)
        np.testing.assert_allclose(values[spot], expected, rtol=1e-6)
    assert vocabulary.decode(image.measured) == sorted(g for g in genes if g in GENES)
    assert sorted(image.obs_index) == list(range(adata.n_obs))


def test_order_of_spots_and_genes_and_kind_of_matrix_do_not_matter(slides, processor: STPatchProcessor):
    adata = slides["staggered"]
    image = processor.slide_to_image(adata)
    rng = np.random.default_rng(0)
    shuffled = adata[rng.permutation(adata.n_obs), rng.permutation(adata.n_vars)].copy()
    dense, by_column = adata.copy(), adata.copy()
    dense.X, by_column.X = adata.X.toarray(), adata.X.tocsc()
    for other in (shuffled, dense, by_column):
        again = processor.slide_to_image(other)
        for name in ("rows", "cols", "indptr", "indices", "values", "measured"):
            np.testing.assert_array_equal(getattr(again, name), getattr(image, name))


def test_counts_of_two_names_of_one_gene_are_summed():
    ids = [f"ENSG{i:011d}" for i in range(NUM_GENES)]
    vocabulary = GeneVocabulary(ids, GENES)
    counts = np.ones((1, NUM_GENES + 1))
    counts[0, -1] = 5
    image = STPatchProcessor(vocabulary).slide_to_image(make_slide(counts, [0], [0], [*ids, "G03"]))
    assert image.num_genes == NUM_GENES
    assert dense_image(image)[0, 3] == pytest.approx(np.log1p(6 / counts.sum() * 1e4))


def test_library_counts_all_genes_of_the_slide_not_only_known_ones():
    counts = np.ones((1, NUM_GENES + 40))
    genes = GENES + [f"foreign {i}" for i in range(40)]
    image = STPatchProcessor(GeneVocabulary(GENES)).slide_to_image(make_slide(counts, [0], [0], genes))
    np.testing.assert_allclose(image.values, np.log1p(1e4 / 100), rtol=1e-6)


def test_spots_on_one_position_are_an_error_or_counted_never_lost():
    counts = np.arange(3 * NUM_GENES).reshape(3, NUM_GENES)
    adata = make_slide(counts, [0, 1, 0], [0, 0, 0])
    processor = STPatchProcessor(GeneVocabulary(GENES))
    with pytest.raises(ValueError, match=r"1 of 3 spots stand on an array position.*rows 0 and 2"):
        processor.slide_to_image(adata)
    with pytest.warns(UserWarning, match="1 of 3 spots") as caught:
        image = processor.slide_to_image(adata, on_duplicate="first")
    assert len(caught) == 1
    assert image.obs_index.tolist() == [0, 1]
    assert image.spot_of_obs.tolist() == [0, 1, 0]
    assert dense_image(image)[0, 1] == pytest.approx(np.log1p(1 / counts[0].sum() * 1e4))


def test_spots_without_counts_keep_their_site():
    counts = np.ones((2, NUM_GENES))
    counts[1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = STPatchProcessor(GeneVocabulary(GENES)).slide_to_image(make_slide(counts, [0, 0], [0, 1]))
    assert image.spot_grid.tolist() == [[0, 1]]
    assert np.isfinite(image.values).all()
    assert image.indptr[2] == image.indptr[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.X.data.__setitem__(0, 0.5), "non-integers"),
        (lambda a: a.X.data.__setitem__(0, -1), "negative"),
        (lambda a: a.X.data.__setitem__(0, np.nan), "NaN"),
        (lambda a: a.obs.drop(columns="array_row", inplace=True), "no array_row"),
        (lambda a: a.obs.__setitem__("array_row", 0.5), "expected integer array indices"),
    ],
)
def test_bad_slides_get_one_clear_sentence(change, message: str):
    adata = make_slide(np.ones((2, NUM_GENES)), [0, 0], [0, 1])
    change(adata)
    with pytest.raises(ValueError, match=message):
        STPatchProcessor(GeneVocabulary(GENES)).slide_to_image(adata)


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.integers(1, 14))
@settings(deadline=None)
def test_window_counts_equal_a_plain_loop(seed: int, height: int, width: int, size: int):
    occupied = np.random.default_rng(seed).random((height, width)) < 0.5
    counts = window_counts(occupied, size)
    assert counts.shape == (max(height - size, 0) + 1, max(width - size, 0) + 1)
    for top in range(counts.shape[0]):
        for left in range(counts.shape[1]):
            assert counts[top, left] == occupied[top : top + size, left : left + size].sum()


@given(st.integers(0, 2**31), st.integers(1, 9), st.floats(0, 1))
@settings(deadline=None)
def test_admissible_corners_follow_the_rule(seed: int, size: int, min_observed: float):
    sites = np.argwhere(np.random.default_rng(seed).random((8, 7)) < 0.4)
    if len(sites) == 0:
        return
    adata = make_slide(np.ones((len(sites), NUM_GENES)), sites[:, 0].tolist(), sites[:, 1].tolist())
    image = STPatchProcessor(GeneVocabulary(GENES), compaction="rank").slide_to_image(adata)
    corners = {tuple(c) for c in image.admissible_corners(size, min_observed).tolist()}
    counts = {
        (top, left): (image.spot_grid[top : top + size, left : left + size] >= 0).sum()
        for top in range(max(image.height - size, 0) + 1)
        for left in range(max(image.width - size, 0) + 1)
    }
    needed = min(min_observed * size * size, max(counts.values()) / 2)
    assert corners == {c for c, n in counts.items() if n >= needed and n > 0}
    assert corners, "every slide has a window"


def test_coordinates_run_from_0_to_100_and_are_0_on_a_one_level_axis():
    processor = STPatchProcessor(GeneVocabulary(GENES))
    image = processor.slide_to_image(make_slide(np.ones((3, NUM_GENES)), [7, 7, 7], [0, 1, 9]))
    np.testing.assert_array_equal(image.coordinates, np.float32([[0, 0], [0, 50], [0, 100]]))
