"""The corpus as a `datasets` dataset: one row a slide, raw counts as CSR over the corpus' genes.

| column | type | what |
| --- | --- | --- |
| `id` | string | name of the slide, distinct |
| `source`, `organism`, `organ`, `condition`, `technology` | string | "" where unknown |
| `patient`, `licence`, `citation` | string | "" where unknown |
| `vocabulary` | string | fingerprint of the genes and their order (`GeneVocabulary.ids_sha256` of `genes.json`) |
| `num_spots`, `num_non_zeros` | int64 | |
| `num_source_genes`, `num_matched_genes` | int32 | columns of the source, and those that the vocabulary knows |
| `array_row`, `array_col` | list of int32 (num_spots) | place on the array, as it was read; spots in row-major order |
| `pixel_x`, `pixel_y` | list of float32 (num_spots) | null where unknown |
| `barcode` | list of string (num_spots) | name of the spot in its source |
| `library` | list of uint32 (num_spots) | counts of all genes that were measured, also of those the vocabulary lacks |
| `matched_library` | list of uint32 (num_spots) | counts of the genes that the vocabulary knows |
| `measured` | list of int32 | ascending numbers of the genes that were measured |
| `indptr` | list of int64 (num_spots + 1) | CSR |
| `indices` | list of int32 (num_non_zeros) | gene numbers, ascending within a spot |
| `counts` | list of uint16 (num_non_zeros) | raw counts; null where one exceeds 65,535, which has |
| `wide_counts` | list of uint32 (num_non_zeros) | the same, null elsewhere |

Lists are large lists (64-bit offsets). Nothing is compacted and nothing normalised, so that every compaction and every
normalisation can be studied on one corpus.
"""

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from anndata import AnnData

from modeling_stimg import GeneVocabulary
from modeling_stimg.counts_stimg import match_counts
from modeling_stimg.slide_image_stimg import one_spot_a_site

TEXT_COLUMNS = ("source", "organism", "organ", "condition", "technology", "patient", "licence", "citation")
_LISTS = {
    "array_row": "int32",
    "array_col": "int32",
    "pixel_x": "float32",
    "pixel_y": "float32",
    "barcode": "string",
    "library": "uint32",
    "matched_library": "uint32",
    "measured": "int32",
    "indptr": "int64",
    "indices": "int32",
    "counts": "uint16",
    "wide_counts": "uint32",
}
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        **{name: datasets.Value("string") for name in TEXT_COLUMNS},
        "vocabulary": datasets.Value("string"),
        "num_spots": datasets.Value("int64"),
        "num_non_zeros": datasets.Value("int64"),
        "num_source_genes": datasets.Value("int32"),
        "num_matched_genes": datasets.Value("int32"),
        **{name: datasets.LargeList(datasets.Value(dtype)) for name, dtype in _LISTS.items()},
    }
)


def slide_row(
    adata: AnnData,
    vocabulary: GeneVocabulary,
    name: str,
    library: np.ndarray | None = None,
    num_source_genes: int | None = None,
    **texts: str,
) -> dict[str, Any]:
    """A slide as a row of the corpus; of spots that share an array position the first is kept.

    Args:
        adata: a slide as `read_slide` gives it.
        library, num_source_genes: of the slide before genes were left out: counts of all genes, (n_obs,), and columns.
        texts: any of `TEXT_COLUMNS`.

    Returns:
        The columns of `FEATURES`; lists are NumPy arrays, or None.

    Raises:
        ValueError: too few genes that the vocabulary knows, or counts beyond 32 bits.
    """
    match = vocabulary.match(adata)
    array_row, array_col = (adata.obs[column].to_numpy(np.int64) for column in ("array_row", "array_col"))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*stand on an array position")
        spots, _ = one_spot_a_site(array_row - array_row.min(), array_col - array_col.min(), "first")
    matched = match_counts(adata.X, spots, match.ids, len(vocabulary), np.float64)
    library = matched.library if library is None else np.asarray(library)[spots]
    if library.max(initial=0) > np.iinfo(np.uint32).max:
        raise ValueError(f"{name} has a spot with {library.max():,.0f} counts: expected raw counts.")
    narrow = matched.data.max(initial=0) <= np.iinfo(np.uint16).max
    pixels = np.asarray(adata.obsm["spatial"], np.float32)[spots] if "spatial" in adata.obsm else None
    return {
        "id": name,
        **{column: texts.get(column, "") for column in TEXT_COLUMNS},
        "vocabulary": vocabulary.ids_sha256,
        "num_spots": len(spots),
        "num_non_zeros": len(matched.data),
        "num_source_genes": match.num_genes if num_source_genes is None else num_source_genes,
        "num_matched_genes": match.num_matched,
        "array_row": array_row[spots].astype(np.int32),
        "array_col": array_col[spots].astype(np.int32),
        "pixel_x": None if pixels is None else np.ascontiguousarray(pixels[:, 0]),
        "pixel_y": None if pixels is None else np.ascontiguousarray(pixels[:, 1]),
        "barcode": adata.obs_names.to_numpy(object)[spots],
        "library": library.astype(np.uint32),
        "matched_library": matched.matched_library.astype(np.uint32),
        "measured": np.unique(match.ids[match.ids >= 0]).astype(np.int32),
        "indptr": matched.indptr,
        "indices": matched.indices,
        "counts": matched.data.astype(np.uint16) if narrow else None,
        "wide_counts": None if narrow else matched.data.astype(np.uint32),
    }


def row_table(row: Mapping[str, Any]) -> pa.Table:
    """One row, as `slide_row` gives it, with the types of `FEATURES`; arrays are not copied."""
    columns = []
    for name, field in zip(FEATURES, FEATURES.arrow_schema, strict=True):
        value = row[name]
        if name not in _LISTS or value is None:
            columns.append(pa.array([value], type=field.type))
            continue
        values = pa.array(value, type=field.type.value_type)
        columns.append(pa.LargeListArray.from_arrays(pa.array([0, len(values)], pa.int64()), values))
    return pa.Table.from_arrays(columns, schema=FEATURES.arrow_schema)


def write_row(row: Mapping[str, Any], path: Path) -> None:
    """One row as a Parquet file, which appears whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        pq.write_table(row_table(row), temporary, compression="zstd", use_dictionary=False)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def numpy_row(table: pa.Table, index: int = 0) -> dict[str, Any]:
    """A row of an Arrow table as `slide_row` gives it; lists are views of the table's memory where Arrow allows it.

    `counts` is whichever of `counts` and `wide_counts` the row has.
    """
    row = {}
    for name in table.column_names:
        scalar = table[name][index]
        if name not in _LISTS:
            row[name] = scalar.as_py()
        elif not scalar.is_valid:
            row[name] = None
        elif _LISTS[name] == "string":
            row[name] = scalar.values.to_numpy(zero_copy_only=False)
        else:
            row[name] = scalar.values.to_numpy()
    row["counts"] = row.pop("wide_counts") if row["counts"] is None else row["counts"]
    return row


@dataclass
class STCorpusConfig(datasets.BuilderConfig):
    """Which rows: Parquet files of one row each, as `write_row` leaves them.

    Attributes:
        states: of the files, whatever tells one content of them from another; what is cached belongs to these.
    """

    files: Sequence[str] = ()
    states: Sequence[Any] = ()


class STCorpus(datasets.ArrowBasedBuilder):
    """Slides, a row each, from the files that `build_corpus.py` made of them; columns are those of `FEATURES`."""

    BUILDER_CONFIG_CLASS = STCorpusConfig
    # A slide has up to hundreds of megabytes: never hold more than a few of them.
    DEFAULT_WRITER_BATCH_SIZE = 1

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(description="Raw counts of spatial transcriptomics slides.", features=FEATURES)

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        if not self.config.files:
            raise ValueError("A corpus needs at least one slide: got no files.")
        return [datasets.SplitGenerator(datasets.Split.TRAIN, gen_kwargs={"files": list(self.config.files)})]

    def _generate_tables(self, files: Sequence[str]) -> Iterator[tuple[Any, pa.Table]]:
        for number, file in enumerate(files):
            yield datasets.builder.Key(number, 0), pq.read_table(file)
