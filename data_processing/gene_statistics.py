"""Statistics of genes over a corpus: mean, deviation, share of counts, and leading singular vectors."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from modeling_stimg import SlideImage

DEVIATION_FLOOR = 0.1
BLOCK_SPOTS = 1024


def gene_moments(images: Sequence[SlideImage]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and floored standard deviation of every gene's log1p values, over the spots of slides that measured it.

    The floor keeps a gene that was seen a handful of times from dwarfing all others once it is standardised.

    Returns:
        mean, deviation: float32 (vocabulary,); 0 and the floor for a gene that no slide measured.
    """
    num_genes = images[0].pad_id
    count, total, square = (np.zeros(num_genes) for _ in range(3))
    for image in images:
        values = image.values.astype(np.float64)
        count[image.measured] += image.num_spots
        total += np.bincount(image.indices, values, minlength=num_genes)
        square += np.bincount(image.indices, values * values, minlength=num_genes)
    count = np.maximum(count, 1)
    mean = total / count
    deviation = np.sqrt(np.maximum(square / count - mean * mean, 0))
    return mean.astype(np.float32), np.maximum(deviation, DEVIATION_FLOOR).astype(np.float32)


def gene_shares(images: Sequence[SlideImage], num_iterations: int = 1000, tolerance: float = 1e-9) -> np.ndarray:
    """Share of a spot's counts that each gene would have if all genes of the corpus were measured.

    Slides that measure few genes say how these relate to one another, slides that measure more how they relate to
    the rest: shares are the maximum-likelihood fit of one multinomial of which every slide saw a part, each spot
    with the same weight, by the MM iteration that Hunter (2004) gives for such models.

    Args:
        images: slides, with any `target_sum`.
        num_iterations, tolerance: when to stop; the largest relative change of a slide's total.

    Returns:
        float32 (vocabulary,), sum 1; 0 for a gene that was never counted.
    """
    num_genes = images[0].pad_id
    weights, seen = np.zeros(len(images)), np.zeros(num_genes)
    for i, image in enumerate(images):
        counts = np.expm1(image.values.astype(np.float64))  # up to a factor of each spot
        owner = np.repeat(np.arange(image.num_spots), np.diff(image.indptr))
        library = np.bincount(owner, counts, minlength=image.num_spots)
        weights[i] = np.count_nonzero(library)
        seen += np.bincount(image.indices, counts / library[owner], minlength=num_genes)
    share, totals = seen / max(seen.sum(), 1e-300), np.ones(len(images))
    for _ in range(num_iterations):
        expected = np.zeros(num_genes)
        for image, weight, total in zip(images, weights, totals, strict=True):
            expected[image.measured] += weight / max(total, 1e-300)
        share = np.divide(seen, expected, out=np.zeros(num_genes), where=seen > 0)
        share /= max(share.sum(), 1e-300)
        previous, totals = totals, np.array([share[image.measured].sum() for image in images])
        if np.abs(totals - previous).max() <= tolerance * totals.max():
            break
    return share.astype(np.float32)


def leading_gene_vectors(
    images: Sequence[SlideImage],
    mean: np.ndarray,
    deviation: np.ndarray,
    rank: int,
    seed: int = 0,
    max_spots: int = 50_000,
    num_iterations: int = 4,
    progress: bool = True,
) -> np.ndarray:
    """Leading right singular vectors of the corpus' standardised expression, by randomised subspace iteration.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1. Expression is made dense a block of spots at a time, so
    memory does not grow with the corpus beyond `spots x rank`. A gene that a slide did not measure counts as average.

    Args:
        mean, deviation: float32 (vocabulary,), from `gene_moments`.
        rank: number of vectors. seed: of the start and of the subset of spots.
        max_spots: a corpus with more spots is represented by that many, drawn at random.

    Returns:
        float32 (vocabulary, rank), orthonormal columns; fewer than `rank` are non-zero where the corpus has fewer
        spots or genes.
    """
    rng = np.random.default_rng([seed, 0])
    spots = _subset_of_spots(images, max_spots, rng)
    num_genes, num_spots = len(mean), sum(map(len, spots))
    width = min(rank + 16, num_genes, num_spots)
    basis = torch.from_numpy(np.linalg.qr(rng.standard_normal((num_genes, width)))[0].astype(np.float32))
    for _ in tqdm(range(num_iterations), desc="gene vectors", disable=not progress):
        left = torch.cat([block @ basis for block in _standardized_blocks(images, spots, mean, deviation)])
        left = torch.linalg.qr(left)[0]
        basis, start = torch.zeros_like(basis), 0
        for block in _standardized_blocks(images, spots, mean, deviation):
            basis += block.T @ left[start : start + len(block)]
            start += len(block)
        vectors, _, _ = torch.linalg.svd(basis, full_matrices=False)
        basis = vectors
    kept = basis[:, : min(rank, width)].numpy()
    # The sign of a singular vector is arbitrary: fix it, so that the start does not depend on the linear algebra.
    kept = kept * np.where(kept[np.abs(kept).argmax(0), np.arange(kept.shape[1])] < 0, -1.0, 1.0).astype(np.float32)
    return np.pad(kept, ((0, 0), (0, rank - kept.shape[1])))


def _subset_of_spots(images: Sequence[SlideImage], max_spots: int, rng: np.random.Generator) -> list[np.ndarray]:
    total = sum(image.num_spots for image in images)
    if total <= max_spots:
        return [np.arange(image.num_spots) for image in images]
    chosen = np.sort(rng.choice(total, max_spots, replace=False))
    starts = np.cumsum([0, *(image.num_spots for image in images)])
    return [chosen[(chosen >= a) & (chosen < b)] - a for a, b in itertools.pairwise(starts)]


def _standardized_blocks(
    images: Sequence[SlideImage], spots: Sequence[np.ndarray], mean: np.ndarray, deviation: np.ndarray
) -> Iterator[torch.Tensor]:
    """float32 (at most BLOCK_SPOTS, vocabulary), block by block, in the order of slides and spots."""
    for image, chosen in zip(images, spots, strict=True):
        measured = np.zeros(len(mean), dtype=np.float32)
        measured[image.measured] = 1 / deviation[image.measured]
        for start in range(0, len(chosen), BLOCK_SPOTS):
            part = chosen[start : start + BLOCK_SPOTS]
            positions, owner = image.entries(part)
            dense = np.zeros((len(part), len(mean)), dtype=np.float32)
            dense[owner, image.indices[positions]] = image.values[positions]
            yield torch.from_numpy((dense - mean) * measured)
