"""A corpus that was built, opened for training: slides stay on disk, memory-mapped, and windows read what they need."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np

from data_processing.corpus import SlideRecord
from data_processing.st_corpus import numpy_row
from modeling_stimg import GeneVocabulary, SlideImage, STPatchProcessor

ARROW_FOLDER = "arrow"
CORPUS_FILE = "corpus.json"  # written last


class Corpus:
    """A folder that `build_corpus.py` wrote.

    Args:
        folder: with `arrow/` (the slides), `genes.json` (their genes, with statistics) and `corpus.json`.
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
        """The rows, memory-mapped, as Arrow tables."""
        return datasets.load_from_disk(str(self.folder / ARROW_FOLDER)).with_format("arrow")

    def column(self, name: str) -> list[Any]:
        """A scalar column: one value a slide."""
        return self.dataset.data.column(name).to_pylist()

    def records(self) -> list[SlideRecord]:
        """What to tell of the slides."""
        columns = (self.column(name) for name in ("id", "patient", "num_spots"))
        return [SlideRecord(*row) for row in zip(*columns, strict=True)]

    @cached_property
    def target_sum(self) -> float:
        """Counts per spot at which gene statistics and vectors were computed."""
        return json.loads((self.folder / CORPUS_FILE).read_text(encoding="utf-8"))["target_sum"]

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
