"""Which gene a name means."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from modeling_stimg import GeneVocabulary


def ensembl(number: int) -> str:
    return f"ENSG{number:011d}"


def slide(names: list[str], **columns: list[str]) -> AnnData:
    return AnnData(np.ones((2, len(names)), np.float32), var=pd.DataFrame(columns, index=names))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """80 genes; two of them share the symbol TWIN, and OLD is an alias of G0."""
    rows = [f"{ensembl(i)}\tG{i}\t{'OLD|OLDER' if i == 0 else ''}" for i in range(78)]
    rows += [f"{ensembl(i)}\tTWIN\t" for i in (78, 79)]
    path = tmp_path / "genes.tsv"
    path.write_text("\n".join(["gene_id\tgene_name\taliases", *rows]) + "\n")
    return path


def test_ids_symbols_versions_and_aliases_mean_the_same_gene(table: Path):
    vocabulary = GeneVocabulary.from_table(table)
    names = [ensembl(0), f"{ensembl(0)}.7", "G0", "OLD", "OLDER", "nonsense"]
    assert vocabulary.encode(names).tolist() == [0, 0, 0, 0, 0, -1]
    assert vocabulary.encode(names).dtype == np.int64
    assert vocabulary.decode([0, vocabulary.pad_id]) == [ensembl(0), "[PAD]"]
    assert vocabulary.pad_id == len(vocabulary) == 80


def test_ambiguous_symbol_does_not_resolve_but_its_ids_do(table: Path):
    vocabulary = GeneVocabulary.from_table(table)
    assert vocabulary.ambiguous == ["TWIN"]
    assert vocabulary.encode(["TWIN", ensembl(78), ensembl(79)]).tolist() == [-1, 78, 79]


def test_vocabulary_of_slides_unites_ids_and_symbols_through_the_table(table: Path):
    by_id = slide([ensembl(i) for i in range(60)])
    by_symbol = slide([f"G{i}" for i in range(30, 70)] + ["TWIN", "NOVEL"])
    vocabulary = GeneVocabulary.from_slides([by_id, by_symbol], table=table)
    assert vocabulary.gene_ids == sorted([ensembl(i) for i in range(70)] + ["TWIN", "NOVEL"])
    assert (vocabulary.encode(["TWIN"]) >= 0).all(), "an ambiguous symbol that a slide used is an entry of its own"
    assert vocabulary.encode([ensembl(5)]).item() == vocabulary.encode(["G5"]).item() >= 0


def test_order_of_slides_does_not_matter(table: Path):
    slides = [slide([ensembl(i) for i in range(60)]), slide([f"G{i}" for i in range(70)])]
    assert GeneVocabulary.from_slides(slides, table) == GeneVocabulary.from_slides(slides[::-1], table)


def test_mixed_kinds_without_a_table_are_an_error():
    with pytest.raises(ValueError, match=r"by Ensembl id and slide 1 by symbol: pass `table`"):
        GeneVocabulary.from_slides([slide([ensembl(i) for i in range(60)]), slide([f"G{i}" for i in range(60)])])


def test_space_ranger_slide_brings_its_own_table():
    names = [f"G{i}" for i in range(60)]
    vocabulary = GeneVocabulary.from_slides([slide(names, gene_ids=[ensembl(i) for i in range(60)])])
    assert vocabulary.gene_ids[0] == ensembl(0)
    assert vocabulary.encode(["G7"]).item() == vocabulary.encode([ensembl(7)]).item() == 7


@pytest.mark.parametrize("missing", ["", None, np.nan, pd.NA])
def test_gene_without_an_id_keeps_its_symbol(missing):
    ids = [ensembl(i) if i < 55 else missing for i in range(60)]
    vocabulary = GeneVocabulary.from_slides([slide([f"G{i}" for i in range(60)], gene_ids=ids)])
    assert len(vocabulary) == 60
    assert (vocabulary.encode([f"G{i}" for i in range(60)]) >= 0).all()


def test_id_column_of_another_kind_is_passed_over():
    names = [f"G{i}" for i in range(60)]
    entrez = slide(names, gene_id=[str(1000 + i) for i in range(60)])
    assert GeneVocabulary.from_slides([entrez, slide(names)]).gene_ids == sorted(names)


def test_reference_that_names_some_genes_by_id_keeps_the_other_symbols():
    ids = [ensembl(i) for i in range(60)]
    names = [ids[0], *(f"G{i}" for i in range(1, 60))]
    vocabulary = GeneVocabulary.from_slides([slide(names, gene_ids=ids)])
    assert vocabulary.encode(names).tolist() == list(range(60))


def test_symbol_of_two_ids_is_ambiguous_also_without_a_table():
    """Readers make such symbols unique in the index (TWIN, TWIN-1) and keep them as they are in a column."""
    symbols = [*(f"G{i}" for i in range(60)), "TWIN", "TWIN"]
    adata = slide([*symbols[:-1], "TWIN-1"], gene_ids=[ensembl(i) for i in range(62)], gene_name=symbols)
    vocabulary = GeneVocabulary.from_slides([adata])
    assert vocabulary.ambiguous == ["TWIN"]
    assert vocabulary.encode(["TWIN"]).item() == -1
    assert vocabulary.match(adata).ids.tolist() == list(range(62))


def test_symbol_does_not_overrule_an_id(table: Path):
    """A gene with an id that the vocabulary lacks is unknown, whatever gene its symbol stands for there."""
    vocabulary = GeneVocabulary.from_table(table)
    names = [f"G{i}" for i in range(60)]
    ids = [*(ensembl(i) for i in range(59)), ensembl(999)]
    assert vocabulary.match(slide(names, gene_ids=ids)).ids.tolist() == [*range(59), -1]
    by_symbol = GeneVocabulary(names)
    assert by_symbol.match(slide(names, gene_ids=ids)).ids.tolist() == list(range(60))


def test_match_prefers_the_precise_name_and_reports(table: Path):
    vocabulary = GeneVocabulary.from_table(table)
    names = [f"G{i}" for i in range(59)] + ["TWIN", "unknown"]
    match = vocabulary.match(slide(names, gene_ids=[ensembl(i) for i in range(59)] + [ensembl(79), "unknown"]))
    assert match.ids.tolist() == [*range(59), 79, -1]
    assert str(match) == "matched 60 of 61 genes"


@pytest.mark.parametrize(
    ("known", "unknown", "accepted"), [(49, 0, False), (50, 0, True), (50, 950, True), (50, 951, False)]
)
def test_too_few_matches_are_an_error(table: Path, known: int, unknown: int, accepted: bool):
    vocabulary = GeneVocabulary.from_table(table)
    adata = slide([f"G{i}" for i in range(known)] + [f"mouse{i}" for i in range(unknown)])
    if accepted:
        assert vocabulary.match(adata).num_matched == known
    else:
        with pytest.raises(ValueError, match=f"matched {known} of"):
            vocabulary.match(adata)


def test_file_round_trip_keeps_everything(tmp_path: Path, table: Path):
    rng = np.random.default_rng(0)
    vocabulary = GeneVocabulary.from_table(table)
    vocabulary = vocabulary.with_statistics(rng.random(80), rng.random(80) + 0.1)
    again = GeneVocabulary.load(vocabulary.save(tmp_path), sha256=vocabulary.sha256)
    assert again == vocabulary
    assert again.encode(["OLD", "TWIN"]).tolist() == [0, -1]
    np.testing.assert_array_equal(again.mean, vocabulary.mean)
    np.testing.assert_array_equal(again.deviation, vocabulary.deviation)


def test_tampered_or_foreign_file_is_refused(tmp_path: Path, table: Path):
    vocabulary = GeneVocabulary.from_table(table)
    path = Path(vocabulary.save(tmp_path))
    content = json.loads(path.read_text())
    content["gene_ids"][:2] = content["gene_ids"][1::-1]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="sha256 differs"):
        GeneVocabulary.load(path, sha256=vocabulary.sha256)
    for text in ("not json", "[]", '{"format": 99}', '{"format": 1}'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"genes\.json|format"):
            GeneVocabulary.load(path)


def test_bad_tables_and_numbers_get_one_clear_sentence(tmp_path: Path, table: Path):
    (tmp_path / "bad.tsv").write_text("id\tname\nA\tB\n")
    with pytest.raises(ValueError, match="a gene table needs 'gene_id' and 'gene_name'"):
        GeneVocabulary.from_table(tmp_path / "bad.tsv")
    with pytest.raises(ValueError, match="occur twice"):
        GeneVocabulary(["A", "A"])
    with pytest.raises(ValueError, match="at least one gene"):
        GeneVocabulary([])
    with pytest.raises(ValueError, match="expected 0 to 80"):
        GeneVocabulary.from_table(table).decode([81])


@pytest.mark.real_data
def test_every_real_slide_meets_the_human_gene_table(real_data: Path):
    vocabulary = GeneVocabulary.from_table(real_data / "genes" / "ensembl_symbol.tsv")
    from modeling_stimg import read_slide

    for name in ("her2st_B1", "dlpfc_151510_g500", "aspheart_1_CN73_E1", "breast_targeted_immunology"):
        match = vocabulary.match(read_slide(real_data / "slides" / f"{name}.h5ad"))
        assert match.num_matched > 0.8 * match.num_genes, (name, str(match))
