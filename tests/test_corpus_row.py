"""A corpus row as a SlideImage: the same bits as from the AnnData, whatever is read of it."""

import numpy as np
import pytest
from anndata import AnnData

from data_processing.st_corpus import FEATURES, numpy_row, row_table, slide_row
from modeling_stimg import GeneVocabulary, STPatchProcessor
from modeling_stimg.corpus_row_stimg import TABLE_COUNTS


@pytest.fixture
def deep(slides: dict[str, AnnData]) -> AnnData:
    """A slide with small and large counts, two names of one gene, a spot without counts and one on a taken place."""
    adata = slides["staggered"].copy()
    adata.X = adata.X.multiply(np.where(np.arange(adata.n_vars) % 7 == 0, 40, 1)).tocsr().astype(np.float32)
    adata.X[3] = 0
    adata.obs["array_row"] = adata.obs["array_row"].to_numpy() - 5  # array indices may be negative
    adata.obs.loc[adata.obs_names[9], ["array_row", "array_col"]] = adata.obs.loc[
        adata.obs_names[2], ["array_row", "array_col"]
    ].to_numpy()
    return adata


@pytest.mark.filterwarnings("ignore:.*stand on an array position")
@pytest.mark.parametrize("compaction", ["lattice", "rank", "minmax"])
@pytest.mark.parametrize("target_sum", [1e4, 500, "panel"])
def test_a_row_makes_the_windows_of_its_slide(deep: AnnData, vocabulary: GeneVocabulary, compaction, target_sum):
    known = vocabulary.with_statistics(share=np.full(len(vocabulary), 1 / len(vocabulary)))
    processor = STPatchProcessor(known, window_size=6, num_channels=32, compaction=compaction, target_sum=target_sum)
    panel = deep[:, :100].copy()
    panel.var_names = [*panel.var_names[:97], "foreign 1", "foreign 2", "foreign 3"]
    expected = processor.slide_to_image(panel, on_duplicate="first")
    image = processor.slide_to_image(numpy_row(row_table(slide_row(panel, vocabulary, "a row"))))
    assert image.name == "a row"
    for name in ("rows", "cols", "indptr", "indices", "measured", "coordinates", "spot_grid"):
        np.testing.assert_array_equal(getattr(image, name), getattr(expected, name), err_msg=name)
    np.testing.assert_array_equal(np.asarray(image.values), expected.values, strict=True)
    assert (image.num_source_genes, image.num_matched_genes) == (100, 97)
    a, b = (processor(i, num_windows=8, seed=3) for i in (image, expected))
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def test_values_are_the_same_however_they_are_read(deep: AnnData, processor: STPatchProcessor):
    image = processor.slide_to_image(numpy_row(row_table(slide_row(deep, processor.vocabulary, "deep"))))
    counts, whole = image.values.counts, np.asarray(image.values)
    assert counts.dtype == np.uint16
    assert counts.min() == 1
    assert counts.max() > TABLE_COUNTS, "both ways of computing are met"
    assert whole.dtype == np.float32
    rng = np.random.default_rng(0)
    for _ in range(50):
        a, b = np.sort(rng.integers(0, len(whole) + 1, 2))
        np.testing.assert_array_equal(image.values[a:b], whole[a:b])
    np.testing.assert_array_equal(image.values[3:200:7], whole[3:200:7])
    positions = rng.integers(0, len(whole), 100)
    np.testing.assert_array_equal(image.values[positions], whole[positions])
    spots = rng.integers(0, image.num_spots, 9)
    genes, values, owner = image.expression(spots)
    for k, spot in enumerate(spots):
        part = slice(image.indptr[spot], image.indptr[spot + 1])
        np.testing.assert_array_equal(genes[owner == k], image.indices[part])
        np.testing.assert_array_equal(values[owner == k], whole[part])


def test_large_counts_take_the_wide_column(slides: dict[str, AnnData], processor: STPatchProcessor):
    adata = slides["square"].copy()
    adata.X[0, 0] = 70_000
    row = slide_row(adata, processor.vocabulary, "wide")
    assert row["counts"] is None
    back = numpy_row(row_table(row))
    assert back["counts"].dtype == np.uint32
    assert back["counts"].max() == 70_000
    expected = processor.slide_to_image(adata)
    np.testing.assert_array_equal(np.asarray(processor.slide_to_image(back).values), expected.values)


def test_the_table_has_the_documented_columns_and_shares_memory(slides: dict[str, AnnData], vocabulary):
    row = slide_row(slides["square"], vocabulary, "square", organ="none", licence="CC0")
    table = row_table(row)
    assert table.schema.equals(FEATURES.arrow_schema)
    back = numpy_row(table)
    assert (back["id"], back["organ"], back["licence"], back["patient"]) == ("square", "none", "CC0", "")
    for name in ("indptr", "indices", "counts", "library"):
        assert np.shares_memory(back[name], row[name]), name
    names = slides["square"].obs_names.to_numpy()
    order = np.lexsort((slides["square"].obs["array_col"], slides["square"].obs["array_row"]))
    assert back["barcode"].tolist() == names[order].tolist()
    np.testing.assert_array_equal(back["library"], slides["square"].X.toarray().sum(1)[order])


def test_a_row_of_another_vocabulary_is_refused(slides: dict[str, AnnData], vocabulary: GeneVocabulary):
    row = slide_row(slides["square"], vocabulary, "square")
    other = STPatchProcessor(GeneVocabulary(vocabulary.gene_ids[::-1]))
    with pytest.raises(ValueError, match="'square' numbers its genes by another vocabulary"):
        other.slide_to_image(row)
