"""Statistics of genes over a corpus: mean, deviation, share of counts, and leading singular vectors."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import connected_components
from sklearn.neighbors import radius_neighbors_graph
from tqdm.auto import tqdm

from data_processing.window_dataset import spots_of
from modeling_stimg import SlideImage

DEVIATION_FLOOR = 0.1
BLOCK_SPOTS = 1024
BLOCK_ENTRIES = 1 << 22


@dataclass
class GeneSums:
    """What one pass over a corpus adds up; every statistic of a gene follows from it.

    Attributes:
        count: float64 (vocabulary,), spots on which a gene was measured. total, square: sums of log1p values and of
            their squares. seen: shares of spots' counts, added up.
        measured: the distinct sets of genes that slides measured, int64 ascending. weights: counted spots of each set.
    """

    count: np.ndarray
    total: np.ndarray
    square: np.ndarray
    seen: np.ndarray
    measured: list[np.ndarray]
    weights: list[int]

    @classmethod
    def of(cls, images: Iterable[SlideImage], progress: bool = False) -> "GeneSums":
        """Add up slides, a block of spots at a time.

        Raises:
            ValueError: no slides.
        """
        sums, groups = None, {}
        for image in tqdm(images, desc="gene statistics", disable=not progress):
            if sums is None:
                sums = cls(*(np.zeros(image.pad_id) for _ in range(4)), measured=[], weights=[])
            group = groups.setdefault(image.measured.tobytes(), len(sums.measured))
            if group == len(sums.measured):
                sums.measured.append(image.measured)
                sums.weights.append(0)
            sums.weights[group] += sums._add(image)
        if sums is None:
            raise ValueError("Gene statistics need at least one slide: got none.")
        return sums

    def _add(self, image: SlideImage) -> int:
        """Add one slide; returns its spots that have counts."""
        self.count[image.measured] += image.num_spots
        num_counted = 0
        for spots in _blocks_of_spots(image):
            entries = slice(image.indptr[spots.start], image.indptr[spots.stop])
            values, genes = np.asarray(image.values[entries], dtype=np.float64), image.indices[entries]
            self.total += np.bincount(genes, values, minlength=image.pad_id)
            self.square += np.bincount(genes, values * values, minlength=image.pad_id)
            counts = np.expm1(values)  # up to a factor of each spot
            owner = np.repeat(np.arange(spots.stop - spots.start), np.diff(image.indptr[spots.start : spots.stop + 1]))
            library = np.bincount(owner, counts, minlength=spots.stop - spots.start)
            num_counted += np.count_nonzero(library)
            self.seen += np.bincount(genes, counts / library[owner], minlength=image.pad_id)
        return num_counted

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and floored standard deviation of log1p values; see `gene_moments`."""
        count = np.maximum(self.count, 1)
        mean = self.total / count
        deviation = np.sqrt(np.maximum(self.square / count - mean * mean, 0))
        return mean.astype(np.float32), np.maximum(deviation, DEVIATION_FLOOR).astype(np.float32)

    def shares(self) -> np.ndarray:
        """Share of counts; see `gene_shares`."""
        counted = self.seen > 0
        member = np.zeros((len(self.measured), len(self.seen)), dtype=bool)
        for row, genes in zip(member, self.measured, strict=True):
            row[genes] = counted[genes]
        weights = np.array(self.weights, dtype=np.float64)
        kept = member.any(1) & (weights > 0)
        share = np.zeros(len(self.seen))
        if kept.any():
            share[counted] = _fit_shares(member[kept][:, counted], weights[kept], self.seen[counted])
        return share.astype(np.float32)


def gene_moments(images: Iterable[SlideImage]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and floored standard deviation of every gene's log1p values, over the spots of slides that measured it.

    The floor keeps a gene that was seen a handful of times from dwarfing all others once it is standardised.

    Returns:
        mean, deviation: float32 (vocabulary,); 0 and the floor for a gene that no slide measured.
    """
    return GeneSums.of(images).moments()


def gene_shares(images: Iterable[SlideImage]) -> np.ndarray:
    """Share of a spot's counts that each gene would have if all genes of the corpus were measured.

    Slides that measure few genes say how these relate to one another, slides that measure more how they relate to
    the rest: shares are the maximum-likelihood fit of one multinomial of which every slide saw a part, each spot
    with the same weight. Warns where slides have no gene in common, whose shares nothing relates.

    Args:
        images: slides, with any `target_sum`.

    Returns:
        float32 (vocabulary,), sum 1; 0 for a gene that was never counted.
    """
    return GeneSums.of(images).shares()


def _blocks_of_spots(image: SlideImage) -> Iterator[slice]:
    """Consecutive spots, so few at a time that what is made of their non-zeros stays small."""
    step = max(1, BLOCK_ENTRIES * image.num_spots // max(len(image.indices), 1))
    for start in range(0, image.num_spots, step):
        yield slice(start, min(start + step, image.num_spots))


def _fit_shares(member: np.ndarray, weights: np.ndarray, seen: np.ndarray, num_iterations: int = 100) -> np.ndarray:
    """Shares float64 (genes,) from which groups of slides saw parts.

    With `T_s` the share that the genes of group s hold together, the likelihood is highest where
    `a_g = seen_g / sum over groups with g of (weight_s / T_s)`; `T_s = sum of a_g` closes the circle. Iterating these
    two is the MM algorithm of Hunter (2004), which a panel of small `T_s` makes crawl: Newton's method on log T does
    not, and gives way to it wherever it would lower the likelihood.

    Args:
        member: bool (groups, genes), the genes that a group measured. weights: float64 (groups,), spots.
        seen: float64 (genes,), shares of spots added up, all positive.
    """
    num_parts, part = connected_components(sp.csr_matrix(member.astype(np.float32) @ member.T))
    if num_parts > 1:
        lone = int((part != np.bincount(part).argmax()).sum())
        warnings.warn(
            f"{lone} of {len(member)} sets of measured genes have no gene in common with the others: how the shares of "
            "the one relate to those of the other is a guess.",
            UserWarning,
            stacklevel=3,
        )
    member = member.astype(np.float64)

    def shares_of(log_totals: np.ndarray) -> np.ndarray:
        share = seen / ((weights * np.exp(-log_totals)) @ member)
        return share / share.sum()

    def likelihood(share: np.ndarray) -> float:
        return float(seen @ np.log(share) - weights @ np.log(member @ share))

    log_totals = np.zeros(len(weights))
    for _ in range(num_iterations):
        share = shares_of(log_totals)
        step = np.log(member @ share) - log_totals
        if np.abs(step - step.mean()).max() < 1e-10:
            break
        # d log(T_s of the shares) / d log_totals_t, up to the scale of all shares, which nothing depends on.
        inverse = weights * np.exp(-log_totals)
        pull = (member * (share / (inverse @ member))) @ (member.T * inverse) / (member @ share)[:, None]
        newton = np.linalg.lstsq(np.eye(len(weights)) - pull, step, rcond=1e-12)[0]
        proposed = log_totals + newton - newton.mean()
        better = np.isfinite(proposed).all() and likelihood(shares_of(proposed)) > likelihood(share)
        log_totals = proposed if better else log_totals + step
    return shares_of(log_totals)


def leading_gene_vectors(
    images: Sequence[SlideImage],
    mean: np.ndarray,
    deviation: np.ndarray,
    rank: int,
    seed: int = 0,
    max_spots: int = 50_000,
    num_iterations: int = 4,
    progress: bool = True,
    smoothing: int = 0,
) -> np.ndarray:
    """Leading right singular vectors of the corpus' standardised expression, by randomised subspace iteration.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1. Expression is made dense a block of spots at a time, so
    memory does not grow with the corpus beyond `spots x rank`. A gene that a slide did not measure counts as average.

    Args:
        mean, deviation: float32 (vocabulary,), from `gene_moments`.
        rank: number of vectors. seed: of the start and of the subset of spots.
        max_spots: a corpus with more spots is represented by that many, drawn at random; with `smoothing` by whole
            slides, but for a part of the last one.
        smoothing: 0: of every spot's own expression. From 1: of its mean over the spots in the square of this radius in
            sites, less the mean of the slide. Most of a spot's variance is noise, of which neighbours share none.

    Returns:
        float32 (vocabulary, rank), orthonormal columns; fewer than `rank` are non-zero where the corpus has fewer
        spots or genes.
    """
    rng = np.random.default_rng([seed, 0])
    draw = _subset_of_slides if smoothing else _subset_of_spots
    spots = draw(spots_of(images), max_spots, rng)
    smooth = [_Smoother(image, chosen, smoothing) for image, chosen in zip(images, spots, strict=True)]
    num_genes, num_spots = len(mean), sum(map(len, spots))
    width = min(rank + 16, num_genes, num_spots)
    basis = torch.from_numpy(np.linalg.qr(rng.standard_normal((num_genes, width)))[0].astype(np.float32))
    for _ in tqdm(range(num_iterations), desc="gene vectors", disable=not progress):
        left = torch.cat(
            [
                smoother.of(torch.cat([block @ basis for block in _standardized_blocks(*slide, mean, deviation)]))
                for smoother, *slide in zip(smooth, images, spots, strict=True)
                if len(slide[1])
            ]
        )
        left = torch.linalg.qr(left)[0]
        basis, first = torch.zeros_like(basis), 0
        for smoother, *slide in zip(smooth, images, spots, strict=True):
            of_slide, start = smoother.transposed(left[first : first + len(slide[1])]), 0
            for block in _standardized_blocks(*slide, mean, deviation):
                basis += block.T @ of_slide[start : start + len(block)]
                start += len(block)
            first += start
        vectors, _, _ = torch.linalg.svd(basis, full_matrices=False)
        basis = vectors
    kept = basis[:, : min(rank, width)].numpy()
    # The sign of a singular vector is arbitrary: fix it, so that the start does not depend on the linear algebra.
    kept = kept * np.where(kept[np.abs(kept).argmax(0), np.arange(kept.shape[1])] < 0, -1.0, 1.0).astype(np.float32)
    return np.pad(kept, ((0, 0), (0, rank - kept.shape[1])))


class _Smoother:
    """Means over neighbours less their mean over the slide, as a linear map of what its spots have; or the identity."""

    def __init__(self, image: SlideImage, spots: np.ndarray, radius: int):
        self.means = None
        if radius and len(spots):
            sites = np.column_stack([image.rows[spots], image.cols[spots]])
            near = radius_neighbors_graph(sites, radius, mode="connectivity", metric="chebyshev", include_self=True)
            self.means = (sp.diags_array(1 / np.diff(near.indptr)) @ near).astype(np.float32)

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """float32 (spots, k) -> float32 (spots, k)."""
        if self.means is None:
            return values
        return torch.from_numpy(self.means @ (values - values.mean(0)).numpy())

    def transposed(self, values: torch.Tensor) -> torch.Tensor:
        """The transposed map: float32 (spots, k) -> float32 (spots, k)."""
        if self.means is None:
            return values
        spread = torch.from_numpy(self.means.T @ values.numpy())
        return spread - spread.mean(0)


def _subset_of_spots(num_spots: np.ndarray, max_spots: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Of every slide the spots that stand for it, int64 ascending; `num_spots`: int64 (slides,)."""
    total = int(num_spots.sum())
    if total <= max_spots:
        return [np.arange(n) for n in num_spots]
    chosen = np.sort(rng.choice(total, max_spots, replace=False))
    starts = np.cumsum([0, *num_spots])
    return [chosen[(chosen >= a) & (chosen < b)] - a for a, b in itertools.pairwise(starts)]


def _subset_of_slides(num_spots: np.ndarray, max_spots: int, rng: np.random.Generator) -> list[np.ndarray]:
    """The same, neighbours together: whole slides in a random order, of the last one the first rows of its grid."""
    left, spots = max_spots, [np.arange(0)] * len(num_spots)
    for slide in rng.permutation(len(num_spots)):
        spots[slide] = np.arange(min(num_spots[slide], left))
        left -= len(spots[slide])
    return spots


def _standardized_blocks(
    image: SlideImage, chosen: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> Iterator[torch.Tensor]:
    """float32 (at most BLOCK_SPOTS, vocabulary), block by block, in the order of spots."""
    measured = np.zeros(len(mean), dtype=np.float32)
    measured[image.measured] = 1 / deviation[image.measured]
    for start in range(0, len(chosen), BLOCK_SPOTS):
        part = chosen[start : start + BLOCK_SPOTS]
        genes, values, owner = image.expression(part)
        dense = np.zeros((len(part), len(mean)), dtype=np.float32)
        dense[owner, genes] = values
        yield torch.from_numpy((dense - mean) * measured)
