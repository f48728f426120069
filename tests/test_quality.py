import json
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.quality import Decisions, QualityRules, apply_quality
from modeling_stimg import GeneVocabulary, read_slide

NUM_GENES = 60
IDS = [f"ENSG{i:011d}" for i in range(NUM_GENES)]
NAMES = [f"GENE{i}" for i in range(NUM_GENES)]
RULES = QualityRules(min_counts=30, min_spots=5, min_genes=20)


@pytest.fixture(scope="module")
def vocabulary():
    return GeneVocabulary(IDS, NAMES)


def slide(counts=None, genes=IDS, **obs):
    """12 spots in a row, each with one count of every gene, unless told otherwise."""
    counts = np.ones((12, len(genes))) if counts is None else np.asarray(counts)
    places = {"array_row": np.zeros(len(counts), int), "array_col": np.arange(len(counts))}
    frame = pd.DataFrame(places | obs, index=[f"spot{i}" for i in range(len(counts))])
    return AnnData(sp.csr_matrix(counts, dtype=np.float32), obs=frame, var=pd.DataFrame(index=list(genes)))


def refusal(adata, vocabulary, rules=RULES, **kwargs):
    kept, decisions = apply_quality(adata, vocabulary, rules, **kwargs)
    assert (kept is None) == bool(decisions.refused)
    return decisions.refused


def test_spots_and_genes_are_dropped_and_every_decision_is_counted(vocabulary):
    counts = np.ones((12, NUM_GENES + 2))
    counts[4, 29:] = 0  # one count too few
    counts[5, 30:] = 0  # just enough
    counts[:, -1] = 1000  # no gene of the vocabulary: it must not lift a spot over the threshold
    in_tissue = np.ones(12, int)
    in_tissue[[0, 3]] = 0
    adata = slide(counts, [*IDS[::-1], "GENE7", "strange"], in_tissue=in_tissue, label=list("abcdefghijkl"))
    adata.obsm["spatial"] = np.arange(24.0).reshape(12, 2)
    adata.layers["other"] = adata.X.copy()
    kept, decisions = apply_quality(adata, vocabulary, RULES)
    assert decisions == Decisions(
        spots_in=12,
        spots_out_of_tissue=2,
        spots_low_counts=1,
        spots_kept=9,
        genes_in=62,
        genes_matched=61,
        genes_unmatched=1,
        genes_merged=1,
        genes_kept=60,
        genes_counted=60,
        counts_in=int(counts.sum()),
        counts_kept=int(counts[[1, 2, 5, 6, 7, 8, 9, 10, 11], :-1].sum()),
    )
    assert list(kept.obs["label"]) == list("bcfghijkl")
    np.testing.assert_array_equal(kept.obsm["spatial"], adata.obsm["spatial"][[1, 2, 5, 6, 7, 8, 9, 10, 11]])
    assert list(kept.var_names) == IDS
    assert list(kept.var["gene_name"]) == NAMES
    dense = kept.X.toarray()
    np.testing.assert_array_equal(dense[0], np.where(np.arange(NUM_GENES) == 7, 2, 1))  # both names of gene 7
    np.testing.assert_array_equal(dense[2], np.arange(NUM_GENES) >= 30)  # the columns came in reverse
    assert kept.X.has_canonical_format
    assert kept.X.dtype == np.float32
    assert not kept.layers


def test_the_result_is_a_slide_again(vocabulary):
    kept, _ = apply_quality(slide(), vocabulary, RULES)
    again = read_slide(kept)
    np.testing.assert_array_equal(vocabulary.match(again).ids, np.arange(NUM_GENES))
    twice, decisions = apply_quality(kept, vocabulary, RULES)
    assert (twice.X != kept.X).nnz == 0
    assert decisions.spots_kept == decisions.spots_in


def test_nothing_is_changed_in_place(vocabulary):
    adata = slide(in_tissue=[0] + [1] * 11, genes=[*IDS[:-1], "GENE7"])
    adata.uns["meta"] = {"patient": "P"}
    before = adata.copy()
    arrays = adata.X.data.copy(), adata.X.indices.copy(), adata.X.indptr.copy()
    kept, _ = apply_quality(adata, vocabulary, RULES)
    kept.X.data[:] = 7
    kept.uns["meta"]["patient"] = "Q"
    kept.obs["array_row"] = 5
    for now, then in zip((adata.X.data, adata.X.indices, adata.X.indptr), arrays, strict=True):
        np.testing.assert_array_equal(now, then)
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert adata.uns["meta"] == {"patient": "P"}


@given(st.lists(st.tuples(st.integers(0, 80), st.sampled_from([0, 1])), min_size=1, max_size=30), st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_decisions_add_up(spots, min_counts):
    totals, in_tissue = (np.array(values) for values in zip(*spots, strict=True))
    counts = np.zeros((len(totals), NUM_GENES))
    for spot, total in enumerate(totals):
        np.add.at(counts[spot], np.arange(total) % NUM_GENES, 1)
    rules = QualityRules(min_counts=min_counts, min_spots=3, min_genes=10)
    kept, decisions = apply_quality(slide(counts, in_tissue=in_tissue), GeneVocabulary(IDS, NAMES), rules)
    assert decisions.spots_out_of_tissue == (in_tissue == 0).sum()
    assert decisions.spots_low_counts == ((in_tissue == 1) & (totals < min_counts)).sum()
    assert decisions.spots_out_of_tissue + decisions.spots_low_counts + decisions.spots_kept == decisions.spots_in
    assert decisions.genes_matched + decisions.genes_unmatched == decisions.genes_in
    enough = decisions.spots_kept >= 3 and decisions.genes_counted >= 10
    assert (kept is not None) == enough == (decisions.refused == "")
    if kept is not None:
        assert decisions.counts_kept == kept.X.sum() == totals[(in_tissue == 1) & (totals >= min_counts)].sum()


@pytest.mark.parametrize("organism", ["", "human", "Homo sapiens", "NCBITaxon:9606", " HUMAN ", "unknown"])
def test_human_by_any_name_passes(vocabulary, organism):
    adata = slide(organism=["Homo sapiens"] * 12, organism_ontology_term_id=["NCBITaxon:9606"] * 11 + [None])
    assert refusal(adata, vocabulary, source_organism=organism) == ""


def test_other_organisms_are_refused_wherever_they_are_told(vocabulary):
    assert "'Mus musculus'" in refusal(slide(), vocabulary, source_organism="Mus musculus")
    assert "'Homo sapiens, Mus musculus'" in refusal(slide(), vocabulary, source_organism="Homo sapiens, Mus musculus")
    assert "'mouse'" in refusal(slide(organism=["human"] * 11 + ["mouse"]), vocabulary)
    terms = pd.Categorical(["NCBITaxon:10090"] * 12)
    assert "NCBITaxon:10090" in refusal(slide(organism_ontology_term_id=terms), vocabulary, source_organism="human")
    adata = slide()
    adata.uns["organism"] = "Rattus norvegicus"
    assert "Rattus" in refusal(adata, vocabulary)


def test_genes_of_another_organism_are_refused(vocabulary):
    mouse = [gene.replace("ENSG", "ENSMUSG") for gene in IDS]
    assert "ENSMUSG00000000000" in refusal(slide(genes=mouse), vocabulary)
    assert "5 of 60" in refusal(slide(genes=[*IDS[:55], *mouse[:5]]), vocabulary)  # a reference of both
    assert refusal(slide(genes=[*IDS[:57], *mouse[:3]]), vocabulary) == ""  # spike-ins and the like
    symbols = ["Actb", "Gapdh", "mt-Co1", "Rpl13a", "H2-K1", "1700001C02Rik", *(f"Gene{i}" for i in range(54))]
    assert "e.g. Actb" in refusal(slide(genes=symbols), vocabulary, source_organism="human")
    # In capitals, with Ensembl ids that tell otherwise.
    adata = slide(genes=NAMES)
    adata.var["gene_ids"] = mouse
    assert "ENSMUSG" in refusal(adata, vocabulary)


def test_symbols_do_not_matter_beside_ensembl_ids(vocabulary):
    adata = slide()
    adata.var["gene_name"] = [f"Gene{i}" for i in range(NUM_GENES)]
    assert refusal(adata, vocabulary) == ""


def test_human_symbols_of_all_kinds_are_human():
    odd = ["MT-CO1", "C1orf112", "HLA-A", "AL627309.1", "C20orf27", "NKX2-1", "hsa-mir-21", "RP11-34P13.7", "Y_RNA"]
    genes = [*NAMES, *odd]
    assert refusal(slide(genes=genes), GeneVocabulary(genes)) == ""


def test_too_little_is_refused_with_numbers(vocabulary):
    assert refusal(slide(np.ones((4, NUM_GENES))), vocabulary) == (
        "4 of 4 spots are on tissue and have at least 30 counts: a slide needs 5."
    )
    few = np.zeros((12, NUM_GENES))
    few[:, :19] = 10
    assert refusal(slide(few), vocabulary) == "19 of 60 genes are known and counted: a slide needs 20."
    assert "matched 0 of 60" in refusal(slide(genes=[f"X{i}" for i in range(60)]), vocabulary)
    few[:, 19] = 1
    assert refusal(slide(few), vocabulary) == ""


@pytest.mark.parametrize("values", [[True] * 6 + [False] * 6, ["1"] * 6 + ["0"] * 6, [1.0] * 6 + [0.0] * 6])
def test_in_tissue_of_any_type(vocabulary, values):
    for column in (values, pd.Categorical(values)):
        _, decisions = apply_quality(slide(in_tissue=column), vocabulary, RULES)
        assert (decisions.spots_out_of_tissue, decisions.spots_kept, decisions.refused) == (6, 6, "")


@pytest.mark.parametrize("value", [2, None, "yes"])
def test_unknown_in_tissue_is_refused(vocabulary, value):
    assert 'obs["in_tissue"] holds' in refusal(slide(in_tissue=[1] * 11 + [value]), vocabulary)


def test_what_is_no_count_is_refused_and_not_mended(vocabulary):
    assert "non-integers" in refusal(slide(np.full((12, NUM_GENES), 0.5)), vocabulary)
    assert "negative" in refusal(slide(np.full((12, NUM_GENES), -1)), vocabulary)
    adata = slide()
    adata.X = adata.X.toarray()
    with pytest.raises(ValueError, match="CSR"):
        apply_quality(adata, vocabulary, RULES)


def test_repeated_spot_names_and_frames_in_obsm_pass(vocabulary, recwarn):
    adata = slide()
    adata.obs_names = ["spot"] * 12
    adata.obsm["frame"] = pd.DataFrame({"x": range(12)}, index=adata.obs_names)
    recwarn.clear()
    kept, _ = apply_quality(adata, vocabulary, RULES)
    assert not recwarn
    assert list(kept.obsm["frame"]["x"]) == list(range(12))


def test_decisions_are_json():
    decisions = Decisions(spots_in=3, refused="why")
    assert json.loads(json.dumps(decisions.to_dict())) == asdict(decisions)


@pytest.mark.parametrize("wrong", [{"min_counts": 0}, {"min_spots": -1}, {"min_genes": 0}, {"organism": "mouse"}])
def test_rules_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        QualityRules(**wrong)


@pytest.mark.real_data
def test_the_default_rules_keep_every_real_section(real_data):
    vocabulary = GeneVocabulary.from_table(real_data / "genes" / "ensembl_symbol.tsv")
    paths = sorted((real_data / "slides").glob("*.h5ad"))[::4]
    for path in paths:
        kept, decisions = apply_quality(read_slide(path), vocabulary)
        assert decisions.refused == "", path
        assert decisions.spots_low_counts <= 0.02 * decisions.spots_in or "targeted" in path.name
        assert kept.shape == (decisions.spots_kept, decisions.genes_kept)
