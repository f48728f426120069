"""Windows, gene draws and the dense tensor, against plain loops and the laws they should follow."""

import itertools
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from anndata import AnnData
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor
from modeling_stimg.noise_stimg import GENE_STREAM, counter_uniform, stream_key
from modeling_stimg.sampling_stimg import VARIANCE_EPS, covering_corners, select_genes, window_spots

GENES = [f"G{i:02d}" for i in range(70)]
KEYS = ("pixel_values", "gene_ids", "channel_mask", "pixel_mask", "coordinates", "spot_index")


@st.composite
def random_images(draw) -> SlideImage:
    """Up to 40 spots on a ragged grid, 50 to 60 of the vocabulary's genes measured in an order of their own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    sites = np.argwhere(rng.random((7, 8)) < draw(st.sampled_from([0.1, 0.5, 0.9])))
    sites = sites if len(sites) else np.array([[3, 3]])
    genes = rng.permutation(GENES)[: rng.integers(50, 61)]
    counts = rng.poisson(rng.choice([0.05, 0.5, 3.0], len(genes)), (len(sites), len(genes)))
    obs = pd.DataFrame({"array_row": sites[:, 0], "array_col": sites[:, 1]}, index=map(str, range(len(sites))))
    adata = AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=genes))
    return STPatchProcessor(GeneVocabulary(GENES), compaction="rank").slide_to_image(adata)


def plain_selection(image: SlideImage, spots: list[int], channels: int, rule: str, seed: int, window: int) -> list[int]:
    """Genes of a window, one after another, in plain Python; variances in exact fractions."""
    spots = list(range(image.num_spots)) if rule == "slide" else spots
    columns = {int(g): [Fraction(0)] * len(spots) for g in image.measured}
    for place, spot in enumerate(spots):
        for position in range(image.indptr[spot], image.indptr[spot + 1]):
            columns[int(image.indices[position])][place] = Fraction(float(image.values[position]))
    key, costs = stream_key(seed, window, GENE_STREAM), {}
    for gene, values in columns.items():
        mean = sum(values) / max(len(values), 1)
        variance = float(sum(v * v for v in values) / max(len(values), 1) - mean * mean)
        uniform = float(counter_uniform(key, np.array([gene]))[0])
        costs[gene] = {
            "variable": -variance,
            "slide": -variance,
            "random": uniform,
            "weighted": -math.log(uniform) / (variance + VARIANCE_EPS),
        }[rule]
    order = sorted(costs, key=lambda gene: (costs[gene], gene))
    if rule in ("variable", "slide") and channels < len(order):  # almost equal, but not equal: either would be right
        gap = costs[order[channels]] - costs[order[channels - 1]]
        assume(gap == 0 or gap > 1e-9)
    return sorted(order[:channels])


def plain_window(image: SlideImage, corner: tuple[int, int], size: int, genes: list[int]) -> dict[str, np.ndarray]:
    """A window with given channels, site by site."""
    channels = len(genes)
    window = {
        "pixel_values": np.zeros((channels, size, size), np.float32),
        "gene_ids": np.array(genes),
        "channel_mask": np.array([g != image.pad_id for g in genes]),
        "pixel_mask": np.zeros((size, size), bool),
        "coordinates": np.zeros((size, size, 2), np.float32),
        "spot_index": np.full((size, size), -1),
    }
    for spot, (row, col) in enumerate(zip(image.rows, image.cols, strict=True)):
        i, j = row - corner[0], col - corner[1]
        if 0 <= i < size and 0 <= j < size:
            window["pixel_mask"][i, j], window["spot_index"][i, j] = True, spot
            levels = max(image.height - 1, 1), max(image.width - 1, 1)
            window["coordinates"][i, j] = 100 * row / levels[0], 100 * col / levels[1]
            for position in range(image.indptr[spot], image.indptr[spot + 1]):
                if image.indices[position] in genes:
                    window["pixel_values"][genes.index(image.indices[position]), i, j] = image.values[position]
    return window


@given(
    random_images(),
    st.sampled_from(["weighted", "variable", "random", "slide"]),
    st.integers(1, 9),
    st.integers(1, 70),
    st.integers(0, 2**40),
    st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=150)
def test_windows_equal_a_plain_loop(image, rule: str, size: int, channels: int, seed: int, first: int):
    processor = STPatchProcessor(
        GeneVocabulary(GENES), window_size=size, num_channels=channels, gene_selection=rule, compaction="rank"
    )
    drawn = processor(image, num_windows=2, seed=seed, first_window=first)
    # A window at the far end of the slide, of which part lies beyond.
    given_corner = processor(image, windows=[(image.height - 1, image.width - 1)], seed=seed, first_window=first)
    for batch, b, window in ((drawn, 0, first), (drawn, 1, first + 1), (given_corner, 0, first)):
        spot_index = batch["spot_index"][b]
        if batch is drawn:
            i, j = np.argwhere(spot_index >= 0)[0]
            corner = image.rows[spot_index[i, j]] - i, image.cols[spot_index[i, j]] - j
        else:
            corner = image.height - 1, image.width - 1
        spots = [int(s) for s in spot_index.ravel() if s >= 0]
        genes = plain_selection(image, spots, channels, rule, seed, window)
        genes += [image.pad_id] * (channels - len(genes))
        for key, expected in plain_window(image, corner, size, genes).items():
            np.testing.assert_array_equal(batch[key][b], expected, err_msg=key, strict=key != "coordinates")


@given(random_images(), st.permutations(range(len(GENES))), st.integers(1, 20), st.integers(1, 9))
@settings(deadline=None, max_examples=40)
def test_windows_with_given_genes_equal_a_plain_loop(image, order, channels: int, size: int):
    processor = STPatchProcessor(GeneVocabulary(GENES), window_size=size, compaction="rank")
    batch = processor(image, windows=[(0, 0)], genes=order[:channels])
    genes = [g if g in image.measured else image.pad_id for g in order[:channels]]
    for key, expected in plain_window(image, (0, 0), size, genes).items():
        np.testing.assert_array_equal(batch[key][0], expected, err_msg=key)


@given(random_images(), st.sampled_from(["log1p", "standardized"]), st.integers(1, 9), st.integers(50, 70))
@settings(deadline=None, max_examples=40)
def test_empty_sites_and_padding_are_zero_and_masked(image, normalization: str, size: int, channels: int):
    rng = np.random.default_rng(0)
    vocabulary = GeneVocabulary(GENES, mean=rng.random(len(GENES)), deviation=rng.random(len(GENES)) + 0.1)
    processor = STPatchProcessor(vocabulary, window_size=size, num_channels=channels, normalization=normalization)
    batch = processor(image, windows=[(0, 0), (image.height - 1, 0)])
    empty = batch["spot_index"] < 0
    np.testing.assert_array_equal(batch["pixel_mask"], ~empty)
    assert not np.moveaxis(batch["pixel_values"], 1, -1)[empty].any()
    assert not batch["coordinates"][empty].any()
    padded = batch["gene_ids"] == image.pad_id
    assert (padded.sum(1) == max(channels - image.num_genes, 0)).all()
    np.testing.assert_array_equal(batch["channel_mask"], ~padded)
    assert not batch["pixel_values"][padded].any()
    for b in range(2):  # `spot_index` inverts the compaction
        for i, j in np.argwhere(~empty[b]):
            spot = batch["spot_index"][b, i, j]
            assert (image.rows[spot] - i, image.cols[spot] - j) == ((0, 0), (image.height - 1, 0))[b]


@pytest.mark.parametrize("in_torch", [False, True])
def test_genes_that_do_not_vary_are_equals(processor: STPatchProcessor, images, request, in_torch: bool):
    """One spot, or spots all alike: every variance is 0, so that ties go by number and chance is even."""
    if in_torch:
        request.getfixturevalue("torch_path")
    image = images["square"]
    values, spots = image.values, image.num_spots
    row = slice(image.indptr[0], image.indptr[1])
    alike = replace(
        image,
        indptr=np.arange(spots + 1) * len(values[row]),
        indices=np.tile(image.indices[row], spots),
        values=np.tile(values[row], spots),
    )
    for slide, size in ((replace(image), 1), (alike, 6)):
        batch = processor(slide, num_windows=4, window_size=size, gene_selection="variable", return_tensors="pt")
        assert batch["gene_ids"].tolist() == [image.measured[:32].tolist()] * 4
        drawn = processor(slide, num_windows=2000, window_size=size, seed=1, return_tensors="pt")["gene_ids"]
        counts = np.bincount(drawn.ravel(), minlength=120)[image.measured]
        assert stats.chisquare(counts).pvalue > 1e-3


def test_defaults_of_torch_do_not_reach_the_windows(images, processor: STPatchProcessor):
    expected = processor(images["square"], num_windows=2, return_tensors="pt")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            batch = processor(images["square"], num_windows=2, return_tensors="pt")
    finally:
        torch.set_default_dtype(torch.float32)
    for key in KEYS:
        assert torch.equal(batch[key], expected[key])
        assert batch[key].dtype == expected[key].dtype


@pytest.fixture
def torch_path(monkeypatch: pytest.MonkeyPatch):
    """Windows made as on an accelerator, with tensors on the CPU in its place."""
    monkeypatch.setattr("modeling_stimg.sampling_stimg.on_host", lambda device: False)
    monkeypatch.setattr("modeling_stimg.slide_image_stimg.on_host", lambda device: False)


@given(
    random_images(), st.sampled_from(["weighted", "variable", "random", "slide"]), st.integers(1, 9), st.integers(1, 70)
)
@settings(deadline=None, max_examples=60)
def test_torch_and_numpy_make_the_same_windows_of_any_slide(image, rule: str, size: int, channels: int):
    rng = np.random.default_rng(0)
    vocabulary = GeneVocabulary(GENES, mean=rng.random(len(GENES)), deviation=rng.random(len(GENES)) + 0.1)
    processor = STPatchProcessor(
        vocabulary, window_size=size, num_channels=channels, gene_selection=rule, normalization="standardized"
    )
    call = {"windows": [(0, 0), (image.height - 1, 0), (0, image.width - 1)], "seed": 9, "return_tensors": "pt"}
    in_numpy = processor(image, **call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("modeling_stimg.sampling_stimg.on_host", lambda device: False)
        patch.setattr("modeling_stimg.slide_image_stimg.on_host", lambda device: False)
        in_torch = processor(replace(image), **call)
    for key in KEYS:
        assert torch.equal(in_torch[key], in_numpy[key]), key


@pytest.mark.parametrize("rule", ["weighted", "variable", "random", "slide", "given"])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_torch_and_numpy_make_the_same_windows(
    images, processor: STPatchProcessor, torch_path, monkeypatch: pytest.MonkeyPatch, rule: str, at_once: int
):
    image = images["staggered"]
    fullest = max(int(np.diff(image.indptr).max()) * processor.window_size**2, image.pad_id)
    monkeypatch.setattr("modeling_stimg.sampling_stimg.ENTRIES_AT_ONCE", at_once * fullest)
    options = {"genes": [5, 3, 99]} if rule == "given" else {"gene_selection": rule}
    call = {"num_windows": 7, "seed": 4, "first_window": 11, "return_tensors": "pt", **options}
    in_torch = processor(replace(image), **call)
    monkeypatch.undo()
    in_numpy = processor(image, **call)
    for key in KEYS:
        assert torch.equal(in_torch[key], in_numpy[key]), key
        assert in_torch[key].dtype == in_numpy[key].dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rule", ["weighted", "variable", "random", "slide"])
def test_a_gpu_makes_the_same_windows(images, processor: STPatchProcessor, rule: str):
    call = {"num_windows": 64, "seed": 4, "gene_selection": rule, "return_tensors": "pt"}
    for image in images.values():
        on_cpu, on_gpu = processor(image, **call), processor(image, device="cuda", **call)
        for key in KEYS:
            assert on_gpu[key].is_cuda
            torch.testing.assert_close(on_gpu[key].cpu(), on_cpu[key], rtol=0, atol=0)


def successive_probability(weights: np.ndarray, chosen: tuple[int, ...]) -> float:
    """Exact probability that drawing one after another, without replacement, yields this set."""
    total = 0.0
    for order in itertools.permutations(chosen):
        probability, left = 1.0, weights.sum()
        for gene in order:
            probability *= weights[gene] / left
            left -= weights[gene]
        total += probability
    return total


@pytest.mark.parametrize("in_torch", [False, True])
def test_weighted_selection_has_the_exact_law_of_successive_draws(in_torch: bool):
    """Chi-square of how often each set of 3 of 6 genes is drawn, against Eq. 7 worked out in full."""
    variances, rounds, channels = np.array([0.1, 0.2, 0.3, 0.5, 0.8, 1.2]), 20_000, 3
    table, measured = np.broadcast_to(variances, (rounds, 6)), np.arange(6)
    if in_torch:
        drawn = select_genes(torch.tensor(table), torch.tensor(measured), channels, "weighted", 1, range(rounds))
    else:
        drawn = select_genes(table, measured, channels, "weighted", 1, range(rounds))
    sets = list(itertools.combinations(range(6), channels))
    expected = np.array([successive_probability(variances + VARIANCE_EPS, s) for s in sets]) * rounds
    observed = np.array([(np.asarray(drawn) == s).all(1).sum() for s in sets])
    assert observed.sum() == rounds
    assert expected.min() > 5
    assert stats.chisquare(observed, expected * rounds / expected.sum()).pvalue > 1e-3
    # The same test would notice draws with replacement's first-order law, weights / sum, in place of Eq. 7.
    independent = np.array([np.prod([variances[list(s)]]) for s in sets])
    assert stats.chisquare(observed, independent / independent.sum() * rounds).pvalue < 1e-6


@given(st.lists(st.integers(0, 12), min_size=2, max_size=200), st.data())
@settings(deadline=None)
def test_highest_variances_are_taken_and_ties_go_to_the_lower_number(values: list[int], data):
    count = data.draw(st.integers(1, len(values) - 1))
    variances, measured = np.array([values], float) / 7, np.arange(3, 3 + len(values))
    padded = np.concatenate([np.full((1, 3), 99.0), variances], axis=1)  # three genes that were not measured
    expected = sorted(sorted(range(len(values)), key=lambda g: (-values[g], g))[:count])
    for kind in (np.asarray, torch.tensor):
        chosen = select_genes(kind(padded), kind(measured), count, "variable", 0, [0])
        assert (np.asarray(chosen)[0] - 3).tolist() == expected


@pytest.mark.parametrize("gene_selection", ["weighted", "variable", "random", "slide"])
def test_genes_are_distinct_measured_and_drawn_anew_for_each_window(
    images: dict[str, SlideImage], processor: STPatchProcessor, gene_selection: str
):
    batch = processor(images["square"], windows=[(0, 0)] * 3, gene_selection=gene_selection)
    for ids in batch["gene_ids"]:
        assert len(set(ids)) == processor.num_channels
        assert set(ids) <= set(images["square"].measured)
    assert (batch["gene_ids"][0] == batch["gene_ids"][1]).all() == (gene_selection in ("variable", "slide"))


def test_drawn_corners_are_uniform_over_the_admissible_ones(images, processor: STPatchProcessor):
    image = images["square"]
    corners = [tuple(c) for c in image.admissible_corners(6, 0.2).tolist()]
    batch = processor(image, num_windows=2000, seed=5)
    drawn = []
    for spot_index in batch["spot_index"]:
        i, j = np.argwhere(spot_index >= 0)[0]
        spot = spot_index[i, j]
        drawn.append((int(image.rows[spot] - i), int(image.cols[spot] - j)))
    counts = np.array([drawn.count(c) for c in corners])
    assert counts.sum() == 2000
    assert stats.chisquare(counts).pvalue > 1e-4


def test_a_slide_without_spots_has_no_window_and_is_named(images, processor: STPatchProcessor):
    none = np.empty(0, np.int64)
    empty = replace(
        images["square"],
        rows=none,
        cols=none,
        indptr=np.zeros(1, np.int64),
        indices=none.astype(np.int32),
        values=none.astype(np.float32),
        obs_index=none,
        name="void",
    )
    with pytest.raises(ValueError, match=r"'void'.*has no window of 6 x 6 sites with a spot"):
        processor(empty, num_windows=1)
    assert not processor(empty, windows=[(0, 0)])["pixel_mask"].any()


def test_a_window_between_the_spots_is_all_empty(processor: STPatchProcessor, images):
    image = images["square"]
    left = image.cols < 4
    cut = replace(image, rows=image.rows[left], cols=image.cols[left], indptr=image.indptr[: left.sum() + 1])
    batch = processor(cut, windows=[(0, image.width - 6), (0, 0)])
    assert not batch["pixel_mask"][0].any()
    assert not batch["pixel_values"][0].any()
    assert batch["pixel_mask"][1].any()


@given(st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=30)
def test_covering_windows_hold_every_spot(images, size: int, data):
    stride = data.draw(st.integers(1, size))
    for image in images.values():
        corners = covering_corners(image, size, stride)
        held = window_spots(image, corners, size)
        assert set(held[held >= 0]) == set(range(image.num_spots))
        assert (held >= 0).any((1, 2)).all(), "windows without a spot are left out"
        assert len(set(corners)) == len(corners)
        tops = sorted({c[0] for c in corners})
        assert all(b - a <= stride for a, b in itertools.pairwise(tops)) or len(tops) < 3


def test_threads_do_not_meet_in_the_reused_arrays(images, processor: STPatchProcessor):
    calls = [(image, seed) for seed in range(20) for image in images.values()]

    def make(call):
        return processor(call[0], num_windows=4, seed=call[1])["pixel_values"]

    alone = list(map(make, calls))
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(make, calls))
    for a, b in zip(alone, together, strict=True):
        np.testing.assert_array_equal(a, b)


def test_read_only_arrays_and_copies_in_other_processes_serve_as_well(images, processor: STPatchProcessor):
    image = images["square"]
    mapped = replace(image, indices=image.indices.copy(), values=image.values.copy(), indptr=image.indptr.copy())
    for array in (mapped.indices, mapped.values, mapped.indptr):
        array.flags.writeable = False
    expected = processor(image, num_windows=3)["pixel_values"]
    for other in (mapped, pickle.loads(pickle.dumps(image))):
        np.testing.assert_array_equal(processor(other, num_windows=3)["pixel_values"], expected)
