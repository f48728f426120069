"""Which slide a slide is, told from its counts: to keep evaluation slides and duplicates out of a corpus.

Names lie: one section is published as GSM8195494, as `A1` and as `lymph_node_1.h5ad`, with its spots in another order,
a subset of its genes, or without the spots that somebody's quality control dropped. A `Fingerprint` is what stays the
same, and two of them are compared in two ways:

- **genes**: for every gene, a hash of the multiset of its non-zero counts: the sum over spots of a mixed count, so that
  the order of spots does not matter. The share of the genes counted on both slides whose hashes agree is 1 for the
  same spots, whatever subset of the genes is left, and falls quickly once spots are missing.
- **spots**: every gene has a pseudo-random rank, a hash of its identity, and of every spot the counts of its K counted
  genes of lowest rank are kept. Restricted to the genes that both slides have, these lists still begin alike on both,
  so that the first few of them make a signature which a spot keeps when other genes or other spots are missing. The
  share is that of the smaller slide's signatures which the other slide has too. Where hardly any of a slide's genes is
  common to both, the lists get too short for that, and the genes alone decide.

Genes are identified by their name in the vocabulary, not by their number: fingerprints made with two vocabularies of
one gene table compare. Two names of one gene are summed. Positions do not enter: they are renamed like everything else.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from modeling_stimg import GeneVocabulary

# The lists of spots: genes a spot, fewer where a slide has so many spots that all lists would exceed the budget.
MAX_SPOT_GENES, MIN_SPOT_GENES, MAX_ENTRIES = 64, 12, 1 << 19
# A gene is informative from this many counts on the slide: with fewer, two slides agree on it by chance.
MIN_GENE_COUNTS = 100
# A look needs this much to see: informative genes that both slides have, spots with a signature.
MIN_GENES, MIN_SPOTS = 30, 20
# A signature is as short as it can be, of this many genes, for so many of a slide's spots to be alone with theirs: the
# shorter, the likelier it outlives a corrected count.
MIN_SIGNATURE, MAX_SIGNATURE, UNIQUE_SIGNATURES = 4, 8, 0.95
# Two slides are the same from these shares on. Of 1,484 pairs of different real sections, neighbours in one block of
# tissue among them, none shares more than 0.1 % of its genes or 4 % of its spots.
SAME_GENES, SAME_SPOTS = 0.1, 0.15
BLOCK_SPOTS = 2048


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What identifies a slide's content; `fingerprint` makes it. The same for the same spots in any order.

    Attributes:
        name: the slide's id. patient: its donor, named so that it is unique over studies; "" where it is not known.
        num_spots: spots of the slide.
        genes: uint64 (G,), hashed identities of the genes that the slide has counts of, ascending.
        informative: bool (G,), whether a gene has enough counts to tell slides apart.
        multisets: uint32 (G,), hash of the gene's non-zero counts over all spots.
        spot_genes: uint16 or uint32 (distinct spots with counts, K), of each spot its first K counted genes, as
            positions in `genes`, ascending. spot_counts: uint16 of the same shape, their counts, 0 where the spot has
            fewer genes.
    """

    name: str
    patient: str
    num_spots: int
    genes: np.ndarray
    informative: np.ndarray
    multisets: np.ndarray
    spot_genes: np.ndarray
    spot_counts: np.ndarray


@dataclass(frozen=True)
class Similarity:
    """How much of two slides is the same.

    Attributes:
        genes: share of the compared genes with the same counts over all spots; None where too few are comparable.
        num_genes: informative genes that both slides have.
        spots: share of the compared spots of the smaller slide that the other has too; None where spots have no
            distinctive signatures in the genes that both have.
        num_spots: spots of the smaller slide that were looked for.
    """

    genes: float | None
    num_genes: int
    spots: float | None
    num_spots: int

    @property
    def comparable(self) -> bool:
        """Whether anything could be compared. If not, nothing is known, and `same` is False."""
        return self.genes is not None or self.spots is not None

    @property
    def same(self) -> bool:
        """Whether the two are one section, or one holds a good part of the other."""
        by_genes = self.genes is not None and self.genes >= SAME_GENES
        return by_genes or (self.spots is not None and self.spots >= SAME_SPOTS)

    def __str__(self) -> str:
        if not self.comparable:
            return f"only {self.num_genes} genes with enough counts and {self.num_spots} spots can be compared"
        told = []
        if self.genes is not None:
            told.append(f"{self.genes:.0%} of {self.num_genes:,} genes have the same counts")
        if self.spots is not None:
            told.append(f"{self.spots:.0%} of {self.num_spots:,} spots are the same")
        return ", ".join(told)


# ---------------------------------------------------------------- making one


def fingerprint(adata: AnnData, vocabulary: GeneVocabulary, name: str, patient: str = "") -> Fingerprint:
    """Fingerprint a slide, as read or after quality control.

    Args:
        adata: raw counts in CSR (`read_slide`), left as it is. Read in blocks of spots, never made dense.
        vocabulary: names the genes; others do not count.
        name: the slide's id. patient: its donor, see `Fingerprint`.

    Raises:
        ValueError: no name, counts that are not CSR, or hardly any gene that the vocabulary knows.
    """
    if not name:
        raise ValueError("A fingerprint needs the name of its slide: got an empty one.")
    if not sp.issparse(adata.X) or adata.X.format != "csr":
        raise ValueError(
            f"X of {name} is a {type(adata.X).__name__}: pass a slide from read_slide, with counts in CSR."
        )
    columns, genes = _columns_by_rank(vocabulary.match(adata).ids, vocabulary)
    totals, multisets = np.zeros(len(genes), np.int64), np.zeros(len(genes), np.uint64)
    length = int(np.clip(MAX_ENTRIES // max(adata.n_obs, 1), MIN_SPOT_GENES, MAX_SPOT_GENES))
    lists = []
    for start in range(0, adata.n_obs, BLOCK_SPOTS):
        block = _block(adata.X, slice(start, start + BLOCK_SPOTS), columns, len(genes))
        np.add.at(totals, block.indices, block.data)
        np.add.at(multisets, block.indices, _mixed(block.data.astype(np.uint64)))
        lists.append(_first_genes(block, length))
    spot_genes, spot_counts = (np.concatenate(parts) for parts in zip(*lists, strict=True))
    # Only genes with counts are kept: whether a file lists a gene that no spot has says nothing about the slide.
    counted = totals > 0
    spot_genes = np.where(spot_counts > 0, (np.cumsum(counted) - 1)[spot_genes], 0)
    spots = _distinct_rows(np.hstack([spot_genes, spot_counts]).astype(np.uint32))
    return Fingerprint(
        name=name,
        patient=patient,
        num_spots=adata.n_obs,
        genes=genes[counted],
        informative=totals[counted] >= MIN_GENE_COUNTS,
        multisets=multisets[counted].astype(np.uint32),
        spot_genes=spots[:, :length].astype(place_type(int(counted.sum()))),
        spot_counts=spots[:, length:].astype(np.uint16),
    )


def place_type(num_genes: int) -> type:
    return np.uint16 if num_genes <= 1 << 16 else np.uint32


def _distinct_rows(rows: np.ndarray) -> np.ndarray:
    """The distinct rows of a C-contiguous matrix, in an order that does not depend on theirs."""
    whole = np.dtype((np.void, rows.shape[1] * rows.itemsize))
    return np.unique(rows.view(whole)).view(rows.dtype).reshape(-1, rows.shape[1])


def _columns_by_rank(ids: np.ndarray, vocabulary: GeneVocabulary) -> tuple[np.ndarray, np.ndarray]:
    """Place of every column's gene in the order of ranks, int64 (n_vars,), -1 where unknown; the ranks, uint64 (G,)."""
    distinct = np.unique(ids[ids >= 0])
    hashes = np.array([_identity(vocabulary.gene_ids[gene]) for gene in distinct], np.uint64)
    order = np.argsort(hashes)
    place = np.full(len(vocabulary) + 1, -1, np.int64)  # the last entry is that of -1
    place[distinct[order]] = np.arange(len(distinct))
    return place[ids], hashes[order]


def _identity(gene: str) -> int:
    return int.from_bytes(hashlib.blake2b(gene.encode(), digest_size=8).digest(), "little")


def _mixed(values: np.ndarray) -> np.ndarray:
    """uint64 -> pseudo-random uint64 (the finaliser of splitmix64)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _block(counts: sp.csr_matrix, rows: slice, columns: np.ndarray, num_genes: int) -> sp.csr_matrix:
    """Counts of some spots over genes in the order of ranks: int64 CSR, indices sorted, no zeros, one entry a gene."""
    block = counts[rows].tocoo()
    column = columns[block.col]
    known = column >= 0
    # From COO to CSR the counts of two names of one gene are summed.
    block = sp.csr_matrix(
        (block.data[known].astype(np.int64), (block.row[known], column[known])), shape=(block.shape[0], num_genes)
    )
    block.eliminate_zeros()
    block.sort_indices()
    return block


def _first_genes(block: sp.csr_matrix, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every spot that has counts the first `length` entries: genes int64 and counts uint16 (spots, length)."""
    counted = np.diff(block.indptr) > 0
    starts, ends = block.indptr[:-1][counted], block.indptr[1:][counted]
    places = starts[:, None] + np.arange(length)  # (spots, length)
    there = places < ends[:, None]
    places[~there] = 0
    if not block.nnz:
        return np.zeros((0, length), np.int64), np.zeros((0, length), np.uint16)
    # Counts above 65,535 stay that: a spot is told by all its genes together.
    counts = np.minimum(block.data[places], np.iinfo(np.uint16).max).astype(np.uint16)
    return np.where(there, block.indices[places], 0).astype(np.int64), np.where(there, counts, 0).astype(np.uint16)


# ---------------------------------------------------------------- comparing two


def similarity(a: Fingerprint, b: Fingerprint) -> Similarity:
    """Compare two slides, in either order."""
    _, in_a, in_b = np.intersect1d(a.genes, b.genes, assume_unique=True, return_indices=True)
    informative = a.informative[in_a] | b.informative[in_b]
    num_genes = int(informative.sum())
    agree = a.multisets[in_a][informative] == b.multisets[in_b][informative]
    spots, num_spots = _same_spots(a, b, in_a, in_b)
    return Similarity(float(agree.mean()) if num_genes >= MIN_GENES else None, num_genes, spots, num_spots)


def _same_spots(a: Fingerprint, b: Fingerprint, in_a: np.ndarray, in_b: np.ndarray) -> tuple[float | None, int]:
    """Share of the smaller slide's spots that the other has, and of how many; `in_a`, `in_b`: their common genes."""
    signatures_a, signatures_b = _signatures(a, in_a), _signatures(b, in_b)
    for length in range(MIN_SIGNATURE, MAX_SIGNATURE + 1):
        unique_a, unique_b = _unique(signatures_a, length), _unique(signatures_b, length)
        if unique_a is not None and unique_b is not None:
            smaller = min(len(unique_a), len(unique_b))
            return len(np.intersect1d(unique_a, unique_b, assume_unique=True)) / smaller, smaller
    return None, 0


def _signatures(slide: Fingerprint, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signatures from `genes` alone, of length 1, 2, ...: uint64 (spots, MAX_SIGNATURE); the longest, (spots,).

    A signature is the sum over its genes of count times a random weight of the gene, modulo 2 ** 64.
    """
    chosen = np.zeros(len(slide.genes), bool)
    chosen[genes] = True
    width = slide.spot_genes.shape[1]
    for columns in (width // 4, width):  # most often the first entries are enough
        spot_genes, spot_counts = slide.spot_genes[:, :columns], slide.spot_counts[:, :columns]
        entries = chosen[spot_genes] & (spot_counts > 0)
        numbers = np.cumsum(entries, axis=1, dtype=np.int16)
        if columns < width and np.mean(numbers[:, -1] >= MAX_SIGNATURE) > 0.95:
            break
    spots, places = np.nonzero(entries & (numbers <= MAX_SIGNATURE))
    weights = _mixed(slide.genes)[spot_genes[spots, places]]
    terms = np.zeros((len(spot_genes), MAX_SIGNATURE), np.uint64)
    terms[spots, numbers[spots, places] - 1] = weights * spot_counts[spots, places]
    return np.cumsum(terms, axis=1, dtype=np.uint64), numbers[:, -1]


def _unique(signatures: tuple[np.ndarray, np.ndarray], length: int) -> np.ndarray | None:
    """The signatures of that length that one spot alone has, ascending; None where they are few, or few are alone."""
    values, lengths = signatures
    distinct, times = np.unique(values[lengths >= length, length - 1], return_counts=True)
    unique = distinct[times == 1]
    return unique if len(unique) >= max(MIN_SPOTS, UNIQUE_SIGNATURES * times.sum()) else None
