"""Phantom tissue is what it claims: seeded, staggered or square, with domains that counts only hint at."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_processing.phantom import DOMAINS, PhantomTissue, main
from modeling_stimg import STPatchProcessor, read_slide
from modeling_stimg.compaction_stimg import compact, is_staggered


def test_same_seed_same_slide_and_another_seed_another(tissue: PhantomTissue):
    a, b, c = (tissue.slide(seed, height=12, width=12) for seed in (5, 5, 6))
    assert (a.X != b.X).nnz == 0
    assert a.obs.equals(b.obs)
    assert a.shape != c.shape or (a.X != c.X).nnz > 0


@pytest.mark.parametrize("array", ["visium", "square"])
def test_array_is_staggered_or_square_and_compacts_to_the_asked_size(tissue: PhantomTissue, array: str):
    adata = tissue.slide(0, array=array, height=20, width=16, num_holes=0)
    row, col = adata.obs["array_row"].to_numpy(), adata.obs["array_col"].to_numpy()
    assert is_staggered(row, col) == (array == "visium")
    grid_row, grid_col = compact(row, col, "lattice")
    assert (grid_row.max() + 1, grid_col.max() + 1) == (20, 16)


def test_counts_are_overdispersed_with_library_sizes_of_their_own(tissue: PhantomTissue):
    adata = tissue.slide(1, height=40, width=40, median_counts=400)
    counts = adata.X.toarray()
    assert (counts == np.rint(counts)).all()
    assert counts.min() == 0
    library = counts.sum(1)
    assert np.median(library) == pytest.approx(400, rel=0.1)
    assert library.std() > 2 * np.sqrt(library.mean()), "more spread than Poisson sampling alone"


def test_every_domain_is_there_nested_and_has_markers(tissue: PhantomTissue):
    adata = tissue.slide(2, height=48, width=48)
    labels = adata.obs["label"].astype(str).to_numpy()
    assert set(labels) == set(DOMAINS)
    shares = np.stack([adata.X.toarray()[labels == d].sum(0) for d in DOMAINS])
    shares /= shares.sum(1, keepdims=True)
    for i in range(len(DOMAINS)):
        others = np.delete(shares, i, axis=0).mean(0)
        assert (shares[i] > 1.3 * others).sum() >= 3, f"{DOMAINS[i]} has no marker genes"


def test_command_writes_slides_that_read_slide_takes(tmp_path: Path):
    command = [sys.executable, str(Path(__file__).parents[1] / "data_processing" / "phantom.py")]
    options = ["--num-slides", "2", "--height", "8", "--width", "8", "--num-genes", "60", "--array", "square"]
    run = subprocess.run([*command, "--output", str(tmp_path), *options], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["phantom_00.h5ad", "phantom_01.h5ad"]
    first = read_slide(tmp_path / "phantom_00.h5ad")
    again = PhantomTissue.create(num_genes=60, seed=0).slide(0, "square", 8, 8)
    assert (first.X != again.X).nnz == 0


def test_bad_options_get_one_clear_sentence(tissue: PhantomTissue):
    with pytest.raises(ValueError, match="array is 'round'"):
        tissue.slide(0, array="round")
    with pytest.raises(ValueError, match="at least 4 x 4"):
        tissue.slide(0, height=3)


def test_phantoms_are_called_after_the_most_abundant_genes_of_a_model(small_model: Path, tmp_path: Path):
    vocabulary = STPatchProcessor.from_pretrained(small_model).vocabulary
    main(tmp_path, num_slides=1, height=8, width=8, num_genes=60, genes_of=small_model)
    slide = read_slide(tmp_path / "phantom_00.h5ad")
    chosen = vocabulary.encode(list(slide.var_names))
    assert len(set(chosen)) == 60
    assert vocabulary.share[chosen].min() >= np.delete(vocabulary.share, chosen).max()


def test_a_model_with_too_few_genes_names_no_phantoms(small_model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="at least 10,000 genes"):
        main(tmp_path, num_slides=1, num_genes=10_000, genes_of=small_model)
