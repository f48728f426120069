"""Quality control: what of a slide may enter a corpus, with every decision counted.

Human slides only, the genes of the vocabulary only, spots on tissue with enough counts only. A slide with too little
left is refused with the reason, never mended: no value is changed, and nothing of the input is touched.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData

from modeling_stimg import GeneVocabulary
from modeling_stimg.counts_stimg import check_counts
from modeling_stimg.genes_stimg import SlideGenes

# How sources name the one organism that the vocabulary's genes are of; compared in lower case.
ORGANISMS = {
    "human": ("human", "homo sapiens", "human (homo sapiens)", "homo sapiens (human)", "ncbitaxon:9606", "9606")
}
NOT_TOLD = ("", "unknown", "na", "nan")
# Where CELLXGENE and others keep it, in `obs` or `uns`.
ORGANISM_KEYS = ("organism", "organism_ontology_term_id", "species")
# Names of human genes: Ensembl ids that start with ENSG, symbols in capitals (MT-CO1, C1orf112). Actb is a mouse's.
_HUMAN_ID, _FOREIGN_SYMBOL = re.compile(r"ENSG\d"), re.compile(r"(?:mt-)?[A-Z][a-z][a-z0-9-]*$|\d+[A-Z]\d+Rik$")
# Column of obs with a spot's counts over all genes that were measured.
LIBRARY = "library"
# Spike-ins and viruses are named in human references too; a reference of two species has half its genes foreign.
MAX_FOREIGN_GENES = 0.05


@dataclass(frozen=True)
class QualityRules:
    """What a slide needs to enter a corpus. The defaults keep all 55 of the real sections they were chosen on.

    Attributes:
        min_counts: of a spot, over the genes of the vocabulary. Spots off the tissue hold a handful of counts, tissue
            begins at 120 to 200 on the shallowest legacy sections, and few spots lie between. Of 38,579 spots of 54
            sections 100 drops 89, where 50 would drop 56 and 200 already 213. Of the one targeted panel (1,056 genes)
            it drops 13 %.
        min_spots: of a slide, after that. The smallest real section has 91; far fewer make no window of 16 x 16 sites
            worth the name.
        min_genes: of the vocabulary, that kept spots have counts of. The real section with the fewest has 500, about
            as many as a window has channels.
        organism: "human", the only one whose gene names are known.

    Raises:
        ValueError: a number below 1, or another organism.
    """

    min_counts: int = 100
    min_spots: int = 50
    min_genes: int = 500
    organism: str = "human"

    def __post_init__(self) -> None:
        for name in ("min_counts", "min_spots", "min_genes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: expected at least 1.")
        if self.organism not in ORGANISMS:
            raise ValueError(f"organism is {self.organism!r}: expected one of {sorted(ORGANISMS)}.")


@dataclass(frozen=True)
class Decisions:
    """What became of a slide's spots and genes.

    Attributes:
        spots_in: spots = `spots_out_of_tissue` + `spots_low_counts` + `spots_kept`, where the slide got that far.
        genes_in: columns = `genes_matched` + `genes_unmatched`, likewise.
        genes_merged: matched columns that are a second name of a gene: their counts were added to the first.
        genes_kept: distinct genes of the vocabulary that the slide measured; `genes_counted`: those of them that a kept
            spot has counts of.
        counts_in, counts_kept: sums over all spots and genes, before and after.
        refused: why the slide was refused, one sentence; "" where it was not.
    """

    spots_in: int = 0
    spots_out_of_tissue: int = 0
    spots_low_counts: int = 0
    spots_kept: int = 0
    genes_in: int = 0
    genes_matched: int = 0
    genes_unmatched: int = 0
    genes_merged: int = 0
    genes_kept: int = 0
    genes_counted: int = 0
    counts_in: int = 0
    counts_kept: int = 0
    refused: str = ""

    def to_dict(self) -> dict[str, int | str]:
        """For JSON."""
        return asdict(self)


def apply_quality(
    adata: AnnData, vocabulary: GeneVocabulary, rules: QualityRules | None = None, source_organism: str = ""
) -> tuple[AnnData | None, Decisions]:
    """Drop the spots and genes of a slide that must not enter a corpus, or refuse it.

    Args:
        adata: a slide from `read_slide`: raw counts in CSR. It is left as it is, and never made dense.
        vocabulary: the genes to keep. rules: None = the defaults.
        source_organism: what the source says the organism is, such as "Homo sapiens"; "" where it does not say.

    Returns:
        The slide, None where it is refused, and the decisions. The slide has the kept spots in their order; `obs`,
        `obsm` and `uns` go with them, `layers`, `raw` and everything by gene do not; `obs["library"]`, int64, holds
        what each spot counted over all columns, also those that are gone. Its genes are those of the
        vocabulary that it measured, by number: identities as `var_names`, symbols in `var["gene_name"]`, `X` CSR of
        the type it had, with sorted indices.

    Raises:
        ValueError: `X` is not CSR.
    """
    rules = rules or QualityRules()
    if not sp.issparse(adata.X) or adata.X.format != "csr":
        raise ValueError(f"X is a {type(adata.X).__name__}: pass a slide from read_slide, with raw counts in CSR.")
    decisions = Decisions(spots_in=adata.n_obs, genes_in=adata.n_vars)
    try:
        check_counts(adata.X.data)
        _check_organism(adata, rules.organism, source_organism)
        decisions = replace(decisions, counts_in=int(adata.X.data.sum(dtype=np.float64)))
        on_tissue = _on_tissue(adata.obs)
        ids = vocabulary.match(adata).ids
    except ValueError as error:
        return None, replace(decisions, refused=str(error))
    genes, column_of = np.unique(ids[ids >= 0], return_inverse=True)
    counts = _counts_of(adata.X, on_tissue, ids, column_of, len(genes))
    enough = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel() >= rules.min_counts
    counts = counts[enough]
    kept = np.flatnonzero(on_tissue)[enough]
    decisions = replace(
        decisions,
        spots_out_of_tissue=int((~on_tissue).sum()),
        spots_low_counts=int((~enough).sum()),
        spots_kept=len(kept),
        genes_matched=int((ids >= 0).sum()),
        genes_unmatched=int((ids < 0).sum()),
        genes_merged=int((ids >= 0).sum()) - len(genes),
        genes_kept=len(genes),
        genes_counted=len(np.unique(counts.indices[counts.data > 0])),
        counts_kept=int(counts.data.sum(dtype=np.float64)),
    )
    decisions = replace(decisions, refused=_too_little(decisions, rules))
    if decisions.refused:
        return None, decisions
    slide = _kept_slide(adata, kept, counts, genes, vocabulary)
    slide.obs[LIBRARY] = np.asarray(adata.X[kept].sum(axis=1, dtype=np.float64)).ravel().astype(np.int64)
    return slide, decisions


def _kept_slide(
    adata: AnnData, kept: np.ndarray, counts: sp.csr_matrix, genes: np.ndarray, vocabulary: GeneVocabulary
) -> AnnData:
    """The slide of the spots `kept` and their `counts` of `genes`, vocabulary numbers."""
    var = pd.DataFrame(
        {"gene_name": [vocabulary.gene_names[g] for g in genes]}, index=[vocabulary.gene_ids[g] for g in genes]
    )
    obsm = {key: rows.iloc[kept] if hasattr(rows, "iloc") else rows[kept] for key, rows in adata.obsm.items()}
    with warnings.catch_warnings():
        # As in `read_slide`: real slides repeat spot names.
        warnings.filterwarnings("ignore", message="Observation names are not unique", category=UserWarning)
        return AnnData(counts, obs=adata.obs.iloc[kept].copy(), var=var, obsm=obsm, uns=_copied(adata.uns))


def _counts_of(
    counts: sp.csr_matrix, spots: np.ndarray, ids: np.ndarray, column_of: np.ndarray, num_genes: int
) -> sp.csr_matrix:
    """Counts of the chosen spots over the distinct genes of the vocabulary, of the type they have; CSR, canonical.

    Args:
        spots: bool (num_spots,). ids: (n_vars,), -1 where unknown. column_of: new column of every known one.
    """
    known = counts[spots][:, ids >= 0]
    merged = sp.csr_matrix((known.data, column_of[known.indices], known.indptr), shape=(known.shape[0], num_genes))
    merged.sum_duplicates()  # two names of one gene; also sorts
    return merged


def _copied(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dicts of `uns` copied, the arrays in them shared."""
    return {key: _copied(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _too_little(decisions: Decisions, rules: QualityRules) -> str:
    """Why too little of the slide is left, or ""."""
    if decisions.spots_kept < rules.min_spots:
        return (
            f"{decisions.spots_kept} of {decisions.spots_in} spots are on tissue and have at least {rules.min_counts} "
            f"counts: a slide needs {rules.min_spots}."
        )
    if decisions.genes_counted < rules.min_genes:
        return (
            f"{decisions.genes_counted} of {decisions.genes_in} genes are known and counted: a slide needs "
            f"{rules.min_genes}."
        )
    return ""


# ---------------------------------------------------------------- organism and tissue


def _check_organism(adata: AnnData, organism: str, source_organism: str) -> None:
    """Raise ValueError where the source, the slide or its gene names tell another organism, or several."""
    names = ORGANISMS[organism]
    told = {f"the source says {source_organism!r}": source_organism}
    for key in ORGANISM_KEYS:
        values = list(adata.obs[key].dropna().unique()) if key in adata.obs else []
        values += [adata.uns[key]] if isinstance(adata.uns.get(key), str) else []
        told |= {f"{key} is {str(value)!r}": str(value) for value in values}
    foreign = [how for how, value in told.items() if value.strip().lower() not in (*names, *NOT_TOLD)]
    if foreign:
        raise ValueError(f"The slide is not {organism}, or not only: {', '.join(foreign[:3])}.")
    genes = SlideGenes.of(adata)
    kinds = (
        ([gene for gene in genes.ids if gene], lambda gene: _HUMAN_ID.match(gene) is None),
        (
            [name for name, gene in zip(genes.symbols, genes.ids, strict=True) if name and not gene],
            lambda name: _FOREIGN_SYMBOL.match(name) is not None,
        ),
    )
    for named, is_foreign in kinds:
        others = [gene for gene in named if is_foreign(gene)]
        if len(others) > MAX_FOREIGN_GENES * len(named):
            raise ValueError(
                f"The slide is not {organism}, or not only: {len(others)} of {len(named)} gene names are another "
                f"organism's, e.g. {others[0]}."
            )


def _on_tissue(obs: pd.DataFrame) -> np.ndarray:
    """bool (n_obs,): False where `obs["in_tissue"]` is 0; True for all without that column.

    Raises:
        ValueError: it holds something else than 0 and 1, or nothing.
    """
    if "in_tissue" not in obs:
        return np.ones(len(obs), bool)
    text = obs["in_tissue"].astype(object).map(lambda value: str(value).strip().lower())
    values = text.map({"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1})
    if values.isna().any():
        wrong = obs["in_tissue"][values.isna().to_numpy()].iloc[0]
        raise ValueError(f'obs["in_tissue"] holds {wrong!r}: expected 0 or 1.')
    return values.to_numpy() == 1
