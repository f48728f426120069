"""A corpus that was built, opened for training: slides stay on disk, memory-mapped, and windows read what they need."""

import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np

from data_processing.corpus import SlideRecord
from data_processing.st_corpus import STCorpus, numpy_row
from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor
from modeling_stimg.hub import Found, find_files

ARROW_FOLDER = "arrow"
CORPUS_FILE = "corpus.json"  # written last
# All that training reads of a corpus on the Hub.
FILES = (CORPUS_FILE, "genes.json", "gene_vectors.safetensors", "data/*.parquet")


def find_corpus(given: str) -> Found:
    """The corpus of a folder, whose `$VARIABLES` and `~` are expanded, or of the Hub (`ORG/NAME`, `ORG/NAME@REVISION`).

    Raises:
        FileNotFoundError: no such folder or dataset, or a private one. OSError: the Hub cannot be reached.
    """
    return find_files(os.path.expanduser(os.path.expandvars(given)), FILES, kind="corpus")


class Corpus:
    """A folder that `build_corpus.py` wrote, or what of it was published.

    Args:
        folder: with `genes.json` (the genes, with statistics), `corpus.json`, and the slides in `arrow/` or `data/`.
        unfinished: do not ask whether it was built to its end.

    Raises:
        FileNotFoundError: no such folder, or a corpus that was not built to its end.
    """

    def __init__(self, folder: str | Path, unfinished: bool = False):
        self.folder = Path(folder)
        if not unfinished and not (self.folder / CORPUS_FILE).exists():
            raise FileNotFoundError(
                f"{self.folder} holds no {CORPUS_FILE}: expected a corpus that data_processing/build_corpus.py has "
                "built to its end."
            )

    @cached_property
    def vocabulary(self) -> GeneVocabulary:
        """The corpus' genes, with mean, deviation and share."""
        return GeneVocabulary.load(self.folder / "genes.json")

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """The rows, memory-mapped, as Arrow tables.

        A corpus that was published has no `arrow/`: the cache of `datasets` keeps its rows in that form, which takes a
        while when they are opened for the first time.

        Raises:
            ValueError, FileNotFoundError: rows that are missing or damaged.
        """
        arrow = self.folder / ARROW_FOLDER
        rows = datasets.load_from_disk(str(arrow)) if arrow.exists() else self._published_rows()
        return rows.with_format("arrow")

    def _published_rows(self) -> datasets.Dataset:
        shards = self.facts.get("shards")
        if shards is None:
            raise FileNotFoundError(
                f"{self.folder} holds no {ARROW_FOLDER}/, and its {CORPUS_FILE} does not tell the order of its shards: "
                "build the corpus again, data_processing/build_corpus.py."
            )
        files = [self.folder / name for name in shards]
        missing = [name for name, file in zip(shards, files, strict=True) if not file.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{self.folder} lacks {len(missing)} of {len(files)} shards, e.g. {missing[0]}: download the corpus "
                "again."
            )
        # A folder that was downloaded anew holds other rows under the same names.
        states = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        builder = STCorpus(files=tuple(str(file.absolute()) for file in files), states=states)
        try:
            builder.download_and_prepare()
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(
                f"The rows of {self.folder} cannot be read ({error.__cause__ or error}): download the corpus again."
            ) from error
        return builder.as_dataset(split="train")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The content of `corpus.json`."""
        return json.loads((self.folder / CORPUS_FILE).read_text(encoding="utf-8"))

    def column(self, name: str) -> list[Any]:
        """A scalar column: one value a slide."""
        return self.dataset.data.column(name).to_pylist()

    def records(self) -> list[SlideRecord]:
        """What to tell of the slides."""
        columns = (self.column(name) for name in ("id", "patient", "num_spots"))
        return [SlideRecord(*row) for row in zip(*columns, strict=True)]

    @property
    def target_sum(self) -> float:
        """Counts per spot at which gene statistics and vectors were computed."""
        return self.facts["target_sum"]

    def images(self, processor: STPatchProcessor) -> "CorpusImages":
        """Every slide as an image of `processor`, made when it is first asked for."""
        return CorpusImages(self, processor)

    def __getstate__(self) -> dict[str, Any]:
        # Another process maps the files itself.
        return {"folder": self.folder}

    def __len__(self) -> int:
        return len(self.dataset)


class CorpusImages(Sequence[SlideImage]):
    """The slides of a corpus as images whose counts stay on disk.

    Attributes:
        num_spots: int64 (slides,), occupied sites.
    """

    def __init__(self, corpus: Corpus, processor: STPatchProcessor):
        self.corpus = corpus
        self.processor = processor
        self.num_spots = np.array(corpus.column("num_spots"), dtype=np.int64)
        self._images: dict[int, SlideImage] = {}

    def __len__(self) -> int:
        return len(self.num_spots)

    @overload
    def __getitem__(self, index: int) -> SlideImage: ...
    @overload
    def __getitem__(self, index: slice) -> list[SlideImage]: ...
    def __getitem__(self, index: int | slice) -> SlideImage | list[SlideImage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._images:
            columns = [n for n in self.corpus.dataset.column_names if n not in ("barcode", "pixel_x", "pixel_y")]
            row = numpy_row(self.corpus.dataset.data.table.select(columns), number)
            self._images[number] = self.processor.slide_to_image(row)
        return self._images[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": {}}
