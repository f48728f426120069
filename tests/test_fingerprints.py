from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData, concat
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing import slide_fingerprint
from data_processing.fingerprints import (
    Fingerprint,
    LeakGuard,
    Similarity,
    find_duplicates,
    fingerprint,
    load_fingerprints,
    save_fingerprints,
    similarity,
)
from data_processing.phantom import PhantomTissue
from modeling_stimg import GeneVocabulary, read_slide

TISSUE = PhantomTissue.create(num_genes=600, seed=5)
SLIDES = [TISSUE.slide(seed, height=16, width=16, median_counts=1500) for seed in range(3)]
VOCABULARY = GeneVocabulary(TISSUE.gene_names)
PRINTS = [fingerprint(adata, VOCABULARY, f"slide{i}", f"donor{i}") for i, adata in enumerate(SLIDES)]


def equal(a: Fingerprint, b: Fingerprint) -> bool:
    return all(
        np.array_equal(one, two) and getattr(one, "dtype", None) == getattr(two, "dtype", None)
        for one, two in ((getattr(a, field.name), getattr(b, field.name)) for field in fields(Fingerprint))
    )


def part(adata: AnnData, genes: float = 1.0, spots: float = 1.0, seed: int = 0) -> AnnData:
    """That share of the genes and spots, shuffled and renamed."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(adata.n_obs)[: round(spots * adata.n_obs)]
    columns = rng.permutation(adata.n_vars)[: round(genes * adata.n_vars)]
    chosen = AnnData(adata.X[rows][:, columns].tocsr(), var=pd.DataFrame(index=adata.var_names[columns]))
    chosen.obs_names = [f"renamed{i}" for i in range(chosen.n_obs)]
    return chosen


def look(adata: AnnData, other: Fingerprint = PRINTS[0]) -> Similarity:
    found = similarity(fingerprint(adata, VOCABULARY, "x"), other)
    assert found == similarity(other, fingerprint(adata, VOCABULARY, "x"))
    return found


# ---------------------------------------------------------------- making one


def test_a_fingerprint_is_the_same_for_shuffled_and_renamed_spots_and_genes():
    again = fingerprint(part(SLIDES[0], seed=3), VOCABULARY, "slide0", "donor0")
    assert equal(again, PRINTS[0])
    assert not equal(again, replace(PRINTS[1], name="slide0", patient="donor0"))


def test_it_is_what_the_counts_say():
    print_ = PRINTS[0]
    dense = SLIDES[0].X.toarray().astype(int)
    hashes = np.array([slide_fingerprint._identity(gene) for gene in VOCABULARY.gene_ids], np.uint64)
    order = np.argsort(hashes)
    counted = order[dense[:, order].sum(0) > 0]
    np.testing.assert_array_equal(print_.genes, hashes[counted])
    np.testing.assert_array_equal(print_.informative, dense[:, counted].sum(0) >= 100)
    expected = set()
    for spot in dense[:, counted]:
        genes = np.flatnonzero(spot)[: print_.spot_genes.shape[1]]
        expected.add((*genes, *spot[genes]))
    there = print_.spot_counts > 0
    lists = zip(print_.spot_genes, print_.spot_counts, there, strict=True)
    assert {(*genes[t].astype(int), *counts[t].astype(int)) for genes, counts, t in lists} == expected


def test_it_does_not_depend_on_the_vocabulary_or_on_blocks(monkeypatch):
    names = [f"OTHER{i}" for i in range(50)] + list(TISSUE.gene_names)[::-1]
    assert equal(fingerprint(SLIDES[0], GeneVocabulary(names), "slide0", "donor0"), PRINTS[0])
    monkeypatch.setattr(slide_fingerprint, "BLOCK_SPOTS", 17)
    assert equal(fingerprint(SLIDES[0], VOCABULARY, "slide0", "donor0"), PRINTS[0])


def test_two_names_of_one_gene_are_summed_and_uncounted_genes_and_empty_spots_do_not_matter():
    counts = SLIDES[0].X.tocsc()
    half = counts[:, [0]].copy()
    half.data = np.floor(half.data / 2)
    split = sp.hstack([half, counts[:, 1:], counts[:, [0]] - half, sp.csc_matrix((counts.shape[0], 1))]).tocsr()
    split = sp.vstack([split, sp.csr_matrix((1, split.shape[1]))]).tocsr()
    adata = AnnData(split.astype(np.float32), var=pd.DataFrame(index=[*TISSUE.gene_names, "alias", "UNCOUNTED"]))
    vocabulary = GeneVocabulary([*TISSUE.gene_names, "UNCOUNTED"], aliases={"alias": TISSUE.gene_names[0]})
    again = fingerprint(adata, vocabulary, "slide0", "donor0")
    assert again.num_spots == PRINTS[0].num_spots + 1
    assert equal(replace(again, num_spots=PRINTS[0].num_spots), PRINTS[0])


def test_the_slide_is_left_as_it_is():
    adata = SLIDES[0].copy()
    arrays = [array.copy() for array in (adata.X.data, adata.X.indices, adata.X.indptr)]
    fingerprint(adata, VOCABULARY, "x")
    for now, then in zip((adata.X.data, adata.X.indices, adata.X.indptr), arrays, strict=True):
        np.testing.assert_array_equal(now, then)


def test_many_spots_get_shorter_lists_and_still_compare(monkeypatch):
    monkeypatch.setattr(slide_fingerprint, "MAX_ENTRIES", 1)
    large = fingerprint(SLIDES[0], VOCABULARY, "large")
    assert large.spot_genes.shape[1] == slide_fingerprint.MIN_SPOT_GENES < PRINTS[0].spot_genes.shape[1]
    assert similarity(large, PRINTS[0]) == similarity(PRINTS[0], PRINTS[0])


def test_what_has_no_fingerprint_says_why():
    with pytest.raises(ValueError, match="name"):
        fingerprint(SLIDES[0], VOCABULARY, "")
    with pytest.raises(ValueError, match="x is a ndarray"):
        fingerprint(AnnData(SLIDES[0].X.toarray(), var=SLIDES[0].var), VOCABULARY, "x")
    with pytest.raises(ValueError, match="matched 0 of 600"):
        fingerprint(SLIDES[0], GeneVocabulary(["A", "B"]), "x")


# ---------------------------------------------------------------- comparing two


@given(st.floats(1 / 3, 1), st.floats(0.9, 1), st.integers(0, 99), st.integers(0, 2))
@settings(max_examples=40, deadline=None)
def test_a_part_of_a_slide_is_that_slide_and_no_other(genes, spots, seed, number):
    adata = part(SLIDES[number], genes, spots, seed)
    for other in range(3):
        found = look(adata, PRINTS[other])
        assert found.comparable
        assert found.same == (other == number), found
        if other == number:
            assert found.spots > 0.8
        else:
            assert found.genes < 0.02
            assert found.spots < 0.1


def test_all_spots_give_all_genes_whatever_genes_are_left():
    third = fingerprint(part(SLIDES[0], genes=1 / 3), VOCABULARY, "third")
    found = similarity(third, PRINTS[0])
    assert (found.genes, found.spots) == (1, 1)
    assert found.num_genes == third.informative.sum() > 150
    assert look(part(SLIDES[0], spots=0.95)).genes < 0.5  # why the spots are looked at, too


def test_a_merged_file_is_every_slide_in_it():
    merged = concat([SLIDES[0], SLIDES[1]], index_unique="-")
    twice = concat([SLIDES[0], SLIDES[0]], index_unique="-")
    for adata in (merged, twice):
        found = look(adata)
        assert found.same
        assert found.spots > 0.95
    assert not look(merged, PRINTS[2]).same


def test_unfiltered_spots_beside_the_tissue_do_not_hide_a_slide():
    rng = np.random.default_rng(0)
    background = sp.csr_matrix(rng.poisson(0.01, (400, 600)).astype(np.float32))
    counts = sp.vstack([background, SLIDES[0].X]).tocsr()
    assert look(AnnData(counts, var=SLIDES[0].var)).spots > 0.8


def test_slightly_corrected_counts_do_not_hide_a_slide():
    adata = SLIDES[0].copy()
    adata.X.data = np.random.default_rng(0).binomial(adata.X.data.astype(int), 0.98).astype(np.float32)
    adata.X.eliminate_zeros()
    found = look(adata)
    assert found.same
    assert found.spots < 1


def test_without_common_genes_nothing_can_be_said():
    half = [f"{name}x" for name in TISSUE.gene_names]
    adata = AnnData(SLIDES[0].X, var=pd.DataFrame(index=half))
    found = similarity(fingerprint(adata, GeneVocabulary(half), "x"), PRINTS[0])
    assert (found.comparable, found.same, found.genes, found.spots) == (False, False, None, None)
    assert "only 0 genes" in str(found)


def test_uniform_spots_are_not_taken_for_common_spots():
    """Two slides of spots with one and the same pattern of counts: signatures that everyone has tell nothing."""
    ones = [sp.csr_matrix(np.ones((size, 600), np.float32)) for size in (150, 170)]
    prints = [fingerprint(AnnData(x, var=SLIDES[0].var), VOCABULARY, "x") for x in ones]
    found = similarity(*prints)
    assert found.spots is None
    assert not found.same


def test_spots_that_many_slides_could_have_are_not_compared():
    """Counts of 1 and 2 by chance: eight genes make 256 patterns, and any two slides share many of them."""
    rng = np.random.default_rng(0)
    counts = [sp.csr_matrix(rng.choice([1.0, 2.0], (300, 600), p=[0.7, 0.3]).astype(np.float32)) for _ in range(2)]
    prints = [fingerprint(AnnData(x, var=SLIDES[0].var), VOCABULARY, "x") for x in counts]
    found = similarity(*prints)
    assert found.spots is None
    assert found.genes < 0.1
    assert not found.same


def test_genes_are_informative_by_the_deeper_slide():
    half = fingerprint(part(SLIDES[0], spots=0.5), VOCABULARY, "half")
    deep = PRINTS[0].genes[PRINTS[0].informative]
    assert similarity(half, PRINTS[0]).num_genes == len(np.intersect1d(deep, half.genes)) > half.informative.sum()


# ---------------------------------------------------------------- duplicates and leaks


def test_the_first_of_duplicates_stays():
    others = [
        fingerprint(part(SLIDES[1], spots=0.95), VOCABULARY, "again1"),
        fingerprint(part(SLIDES[0], genes=0.5), VOCABULARY, "again0"),
        fingerprint(part(SLIDES[1]), VOCABULARY, "once more"),
    ]
    found = find_duplicates([PRINTS[0], others[0], *PRINTS[1:], *others[1:]])
    assert [(first, second) for first, second, _ in found] == [
        ("again1", "slide1"),
        ("slide0", "again0"),
        ("again1", "once more"),
    ]
    assert all(similar.same for *_, similar in found)
    with pytest.raises(ValueError, match="'slide0'"):
        find_duplicates([PRINTS[0], PRINTS[0]])


def test_two_halves_of_a_dropped_whole_stay():
    rows = np.arange(SLIDES[0].n_obs)
    halves = [fingerprint(SLIDES[0][rows % 2 == i].copy(), VOCABULARY, f"half{i}") for i in (0, 1)]
    assert [names[:2] for names in find_duplicates([halves[0], PRINTS[0], halves[1]])] == [("half0", "slide0")]


SAME_IDS = [
    ("her2st_A1", "HER2ST-A1"),
    ("A1", "a1"),
    ("almaan/her2st_A1.h5ad", "her2st_A1"),
    ("GSE263617_GSM8195494_A1", "GSM8195494"),
    ("GSM8195494", "lymph_node_gsm8195494_A1"),
    ("GSM8195494A1.counts", "GSM8195494"),
    ("spatialLIBD_151673", "151673"),
    ("151673", "dlpfc_151673_g8513"),
    ("10x_V1_Breast_Cancer_Block_A_Section_1_v1.1.0", "V1_Breast_Cancer_Block_A_Section_1"),
    ("8a7d3c6e-0b4f-4b52-9a3e-2f5b1c9d8e70.h5ad", "8A7D3C6E-0B4F-4B52-9A3E-2F5B1C9D8E70"),
]
OTHER_IDS = [
    ("her2st_A2", "her2st_A1"),
    ("her2st_A10", "her2st_A1"),
    ("study_A1", "A1"),
    ("colon_section_1", "section_1"),
    ("patient1_s2_rep1", "patient1_s2"),
    ("GSE263617_GSM8195495", "GSE263617_GSM8195494"),
    ("GSM81954941", "GSM8195494"),
    ("1516730", "151673"),
    ("V1_Breast_Cancer_Block_A_Section_10", "V1_Breast_Cancer_Block_A_Section_1"),
    ("V1_Breast_Cancer_Block_A_Section_2", "V1_Breast_Cancer_Block_A_Section_1"),
    ("10x", "10x_Visium_3"),
    ("her2st", "her2st_A1"),
    ("???", "---"),
]


@pytest.mark.parametrize(("name", "evaluation"), SAME_IDS)
def test_evaluation_slides_are_caught_by_id(name, evaluation):
    reason = LeakGuard([], [evaluation]).check(replace(PRINTS[0], name=name))
    assert reason.startswith(f"{name} is evaluation slide {evaluation} by its id (")


@pytest.mark.parametrize(("name", "evaluation"), OTHER_IDS)
def test_ids_that_only_look_alike_are_let_through(name, evaluation):
    assert LeakGuard([], [evaluation]).check(replace(PRINTS[0], name=name)) == ""


def test_names_of_evaluation_fingerprints_are_ids():
    assert "by its id" in LeakGuard([PRINTS[0]], []).check(replace(PRINTS[1], name="SLIDE0"))


def test_evaluation_slides_are_caught_by_patient():
    guard = LeakGuard([PRINTS[0]], [], exclude_patients=["Br-8100", "unknown", "?"])
    assert guard.check(replace(PRINTS[1], patient="Donor0")) == (
        "slide1 is of patient Donor0, whose slides are left out."
    )
    assert "br 8100" in guard.check(replace(PRINTS[1], patient="br 8100"))
    for patient in ("", "?", "unknown", "donor00", "Br", "NaN"):
        assert guard.check(replace(PRINTS[1], patient=patient)) == ""


def test_evaluation_slides_are_caught_by_content():
    guard = LeakGuard(PRINTS[:2], ["something"])
    hidden = fingerprint(part(SLIDES[1], 0.4, 0.93), VOCABULARY, "hidden", "somebody")
    reason = guard.check(hidden)
    assert reason.startswith("hidden has the content of evaluation slide slide1: ")
    assert "spots are the same" in reason
    assert guard.check(PRINTS[2]) == ""


def test_what_cannot_be_compared_is_not_let_through():
    foreign = replace(PRINTS[2], genes=PRINTS[2].genes + np.uint64(1), name="foreign")
    reason = LeakGuard(PRINTS[:1], []).check(foreign)
    assert reason == (
        "foreign could not be compared with evaluation slide slide0: "
        "only 0 genes with enough counts and 0 spots can be compared."
    )


def test_a_guard_of_nothing_is_refused():
    with pytest.raises(ValueError, match="guards nothing"):
        LeakGuard([], [], ["unknown"])


# ---------------------------------------------------------------- files


def test_files_give_fingerprints_back(tmp_path):
    empty = fingerprint(AnnData(sp.csr_matrix((3, 600), dtype=np.float32), var=SLIDES[0].var), VOCABULARY, "empty")
    some = [PRINTS[1], empty, replace(fingerprint(part(SLIDES[2], 0.4), VOCABULARY, "part"), patient="Ä"), PRINTS[0]]
    save_fingerprints(some, tmp_path / "prints.npz")
    again = load_fingerprints(tmp_path / "prints.npz")
    assert len(again) == len(some)
    assert all(equal(one, two) for one, two in zip(again, some, strict=True))
    first = (tmp_path / "prints.npz").read_bytes()
    save_fingerprints(again, tmp_path / "prints.npz")
    assert (tmp_path / "prints.npz").read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["prints.npz"]


def test_a_file_of_none(tmp_path):
    save_fingerprints([], tmp_path / "none.npz")
    assert load_fingerprints(tmp_path / "none.npz") == []


@pytest.mark.parametrize("damage", ["cut", "text", "pickle", "format", "missing", "lengths", "places"])
def test_damaged_files_end_in_one_sentence(tmp_path, damage):
    path = tmp_path / "prints.npz"
    save_fingerprints(PRINTS[:2], path)
    with np.load(path) as file:
        content = {key: file[key] for key in file.files}
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "text":
        path.write_text("no fingerprints")
    else:
        changes = {
            "pickle": {"names": np.array([{}, {}], dtype=object)},
            "format": {"format": np.int64(99)},
            "lengths": {"spot_counts": content["spot_counts"][:-1]},
            "places": {"spot_genes": content["spot_genes"] + np.uint32(500)},
        }
        content |= changes.get(damage, {})
        if damage == "missing":
            del content["multisets"]
        np.savez(path, **content)
    with pytest.raises(ValueError, match="holds no fingerprints"):
        load_fingerprints(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz does not exist"):
        load_fingerprints(tmp_path / "none.npz")


# ---------------------------------------------------------------- real slides

# The published tables of these two neighbouring heart sections hold the same counts at the same 85 positions.
PUBLISHED_TWICE = ("aspheart_1_CN73_E1", "aspheart_2_CN73_E2")


@pytest.mark.real_data
def test_real_sections_are_themselves_and_not_their_neighbours(real_data):
    vocabulary = GeneVocabulary.from_table(real_data / "genes" / "ensembl_symbol.tsv")
    slides = {path.stem: read_slide(path) for path in sorted((real_data / "slides").glob("*.h5ad"))}
    prints = {name: fingerprint(adata, vocabulary, name) for name, adata in slides.items()}
    names = list(prints)
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            found = similarity(prints[name], prints[other])
            assert found.comparable
            if (name, other) == PUBLISHED_TWICE:
                assert found.same
                continue
            assert found.genes < 0.01, (name, other, found)
            assert found.spots is None or found.spots < 0.05, (name, other, found)
    for name in names[::5]:
        whole = similarity(fingerprint(part(slides[name], genes=1 / 3), vocabulary, "x"), prints[name])
        assert whole.genes == 1, name
        filtered = similarity(fingerprint(part(slides[name], genes=1 / 3, spots=0.9), vocabulary, "x"), prints[name])
        assert filtered.spots > 0.9, (name, filtered)
