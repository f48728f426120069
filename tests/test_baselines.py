import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from eval.baselines.across_slides import shared_components, shared_counts, shared_expression
from eval.baselines.expression import (
    coordinates_only,
    log1p_cp10k,
    neighbourhood_mean,
    principal_components,
    raw_expression,
)

count_matrices = hnp.arrays(np.int64, st.tuples(st.integers(2, 8), st.integers(1, 9)), elements=st.integers(0, 30))


def _counts(num_spots=60, num_genes=40, seed=0):
    rng = np.random.default_rng(seed)
    return rng.poisson(rng.gamma(1.0, 2.0, num_genes), (num_spots, num_genes)).astype(np.float32)


def _slow_log1p(dense):
    expected = np.zeros(dense.shape)
    for spot, row in enumerate(dense.astype(np.float64)):
        if row.sum() > 0:
            expected[spot] = np.log1p(row * 1e4 / row.sum())
    return expected


@settings(max_examples=40, deadline=None)
@given(dense=count_matrices)
def test_log1p_matches_the_plain_formula(dense):
    counts = sp.csr_matrix(dense)
    values = log1p_cp10k(counts)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values.toarray(), _slow_log1p(dense), rtol=1e-6)
    np.testing.assert_array_equal(counts.toarray(), dense)  # the input is left alone


def test_log1p_takes_repeated_entries_as_their_sum():
    repeated = sp.csr_matrix((np.array([2.0, 3.0, 5.0]), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    np.testing.assert_allclose(log1p_cp10k(repeated).toarray(), np.log1p([[5000.0, 5000.0]]), rtol=1e-6)
    assert repeated.nnz == 3


@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_log1p_refuses_what_cannot_be_counts(bad):
    with pytest.raises(ValueError, match="negative or non-finite"):
        log1p_cp10k(sp.csr_matrix(np.array([[1.0, bad]])))


@settings(max_examples=40, deadline=None)
@given(dense=count_matrices, num_genes=st.integers(1, 12))
def test_raw_expression_keeps_the_most_variable_genes(dense, num_genes):
    num_kept = min(num_genes, dense.shape[1])
    kept = raw_expression(sp.csr_matrix(dense), num_genes)
    assert kept.shape == (len(dense), num_kept)
    assert kept.dtype == np.float32
    values = _slow_log1p(dense)
    variances = np.sort(values.var(axis=0))[::-1]
    np.testing.assert_allclose(kept.astype(np.float64).var(axis=0), variances[:num_kept], rtol=1e-4, atol=1e-6)
    for column in kept.T:  # every column is a gene of the slide
        assert np.isclose(values, column[:, None], rtol=1e-5).all(axis=0).any()


def test_raw_expression_breaks_ties_by_gene_order():
    dense = np.array([[1, 2, 1, 2, 5], [4, 1, 4, 1, 5], [0, 3, 0, 3, 5]])
    values = _slow_log1p(dense)
    np.testing.assert_allclose(raw_expression(sp.csr_matrix(dense), 5), values[:, [0, 2, 1, 3, 4]], rtol=1e-6)


def test_raw_expression_needs_a_gene():
    with pytest.raises(ValueError, match="num_genes is 0"):
        raw_expression(sp.csr_matrix(_counts()), 0)


@settings(max_examples=50, deadline=None)
@given(
    sites=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=40),  # sites repeat
    radius=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_neighbourhood_mean_matches_a_plain_loop(sites, radius, seed):
    rows, cols = np.array(sites, dtype=np.int64).T
    features = np.random.default_rng(seed).normal(size=(len(sites), 3)).astype(np.float32)
    smoothed = neighbourhood_mean(features, rows, cols, radius)
    assert smoothed.dtype == np.float32
    for spot, (row, col) in enumerate(sites):
        near = [i for i, (r, c) in enumerate(sites) if abs(r - row) <= radius and abs(c - col) <= radius]
        np.testing.assert_allclose(smoothed[spot], features[near].mean(axis=0), rtol=1e-5, atol=1e-6)


def test_neighbourhood_mean_refuses_bad_input():
    sites = np.arange(4)
    with pytest.raises(ValueError, match="radius is -1"):
        neighbourhood_mean(np.zeros((4, 2)), sites, sites, -1)
    with pytest.raises(ValueError, match="one per spot"):
        neighbourhood_mean(np.zeros((5, 2)), sites, sites, 1)


def test_principal_components_match_a_plain_decomposition():
    dense = _counts()
    components = principal_components(sp.csr_matrix(dense), num_components=5)
    centred = _slow_log1p(dense) - _slow_log1p(dense).mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :5] * values[:5]
    assert components.dtype == np.float32
    np.testing.assert_allclose(np.abs(components), np.abs(expected), atol=1e-3)  # a component's sign is free
    np.testing.assert_allclose(components.mean(axis=0), 0, atol=1e-4)


def test_principal_components_see_the_most_variable_genes_only():
    dense = _counts(num_spots=30, num_genes=2100)
    components = principal_components(sp.csr_matrix(dense), num_components=29)
    variable = raw_expression(sp.csr_matrix(dense), 2000).astype(np.float64)
    total = ((variable - variable.mean(axis=0)) ** 2).sum()
    assert (components**2).sum() == pytest.approx(total, rel=1e-4)


def test_principal_components_repeat_themselves_with_the_randomised_solver():
    counts = sp.csr_matrix(_counts(num_spots=700, num_genes=1200))
    first, second = (principal_components(counts, seed=3) for _ in range(2))
    assert first.shape == (700, 50)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(("num_spots", "num_genes", "expected"), [(7, 40, 6), (60, 4, 4), (2, 1, 1)])
def test_principal_components_are_fewer_on_small_slides(num_spots, num_genes, expected):
    assert principal_components(sp.csr_matrix(_counts(num_spots, num_genes))).shape == (num_spots, expected)


def test_principal_components_of_one_spot_are_refused():
    with pytest.raises(ValueError, match="need 2 spots"):
        principal_components(sp.csr_matrix(_counts(num_spots=1)))


def test_coordinates_span_zero_to_hundred():
    coordinates = coordinates_only(np.array([2, 4, 6]), np.array([7, 7, 7]))
    assert coordinates.dtype == np.float32
    np.testing.assert_array_equal(coordinates, [[0, 0], [50, 0], [100, 0]])


def _slides():
    """Three slides with their genes in different orders, one of them with two columns of one gene."""
    rng = np.random.default_rng(0)
    slides = []
    for number, num_spots in enumerate((30, 40, 25)):
        names = [f"gene {g}" for g in rng.permutation(60 + number)[: 50 + number]]
        counts = rng.poisson(rng.gamma(1.0, 2.0, len(names)), (num_spots, len(names))).astype(np.float32)
        slides.append(AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=names)))
    doubled = [*slides[2].var_names[:-1], slides[2].var_names[0]]
    slides[2] = AnnData(slides[2].X, var=pd.DataFrame(index=doubled))
    return slides


def _shared(slides):
    """Dense counts over the shared genes by name, a gene's columns summed one by one."""
    genes = sorted(set.intersection(*(set(slide.var_names) for slide in slides)))
    return genes, [
        np.stack([slide.X.toarray()[:, [name == gene for name in slide.var_names]].sum(1) for gene in genes], axis=1)
        for slide in slides
    ]


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_expression_across_slides_is_over_shared_genes_chosen_in_training():
    slides = _slides()
    genes, dense = _shared(slides)
    for counts, expected in zip(shared_counts(slides), dense, strict=True):
        np.testing.assert_array_equal(counts.toarray(), expected)
    values = [_slow_log1p(counts) for counts in dense]
    variance = np.concatenate(values[:2]).var(axis=0)  # of the training slides
    chosen = np.argsort(-variance, kind="stable")[:7]
    for found, expected in zip(shared_expression(slides[:2], slides[2], 7), values, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:, chosen], rtol=1e-5)
    assert shared_expression(slides[:2], slides[2])[0].shape == (30, len(genes))
    slides[2].var_names = [f"other {name}" for name in slides[2].var_names]
    with pytest.raises(ValueError, match="no gene in common"):
        shared_counts(slides)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_components_across_slides_are_those_of_the_training_slides():
    slides = _slides()
    values = [_slow_log1p(counts) for counts in _shared(slides)[1]]
    stacked = np.concatenate(values[:2])
    _, _, axes = np.linalg.svd(stacked - stacked.mean(0), full_matrices=False)
    for found, slide in zip(shared_components(slides[:2], slides[2], 4), values, strict=True):
        expected = (slide - stacked.mean(0)) @ axes[:4].T
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-3)  # a component's sign is free
