"""Views of slides that stay where they are: some of them, or all with their genes numbered anew."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, overload

import numpy as np

from data_processing.window_dataset import spots_of
from modeling_stimg import SlideImage


class ImageView(Sequence[SlideImage]):
    """Some slides of a sequence, opened when they are asked for.

    Args:
        images: slides in memory, or `CorpusImages`. numbers: which of them, in this order.

    Attributes:
        num_spots: int64 (slides,).
        corpus: that of `images`, where they have one.
    """

    def __init__(self, images: Sequence[SlideImage], numbers: Sequence[int]):
        self.images = images
        self.numbers = list(numbers)
        self.num_spots = spots_of(images)[self.numbers]
        self.corpus = getattr(images, "corpus", None)

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> SlideImage: ...
    @overload
    def __getitem__(self, index: slice) -> list[SlideImage]: ...
    def __getitem__(self, index: int | slice) -> SlideImage | list[SlideImage]:
        chosen = self.numbers[index]
        return [self.images[i] for i in chosen] if isinstance(index, slice) else self.images[chosen]


class RenumberedGenes:
    """Stands for the array `indices` of a `SlideImage`, so that it can stay memory-mapped: other numbers when read.

    Args:
        indices: int32 (nnz,). numbers: int32 (genes,), the new number of every old one.
    """

    def __init__(self, indices: np.ndarray, numbers: np.ndarray):
        self.indices = indices
        self.numbers = numbers
        self.dtype = numbers.dtype

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        return self.numbers[self.indices[index]]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype=dtype)


class RenumberedImages(Sequence[SlideImage]):
    """Slides of one vocabulary as slides of another, which holds all of its genes. A spot's genes keep their order.

    Args:
        images: slides. numbers: int64 (genes,), the new number of every old one, distinct.
        pad_id: number of genes of the other vocabulary.

    Attributes:
        num_spots: int64 (slides,).
    """

    def __init__(self, images: Sequence[SlideImage], numbers: np.ndarray, pad_id: int):
        self.images = images
        self.gene_numbers = numbers.astype(np.int32)
        self.pad_id = pad_id
        self.num_spots = spots_of(images)
        self._renumbered: dict[int, SlideImage] = {}

    def __len__(self) -> int:
        return len(self.images)

    @overload
    def __getitem__(self, index: int) -> SlideImage: ...
    @overload
    def __getitem__(self, index: slice) -> list[SlideImage]: ...
    def __getitem__(self, index: int | slice) -> SlideImage | list[SlideImage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        if number not in self._renumbered:
            image = self.images[number]
            self._renumbered[number] = replace(
                image,
                indices=RenumberedGenes(image.indices, self.gene_numbers),
                measured=np.sort(self.gene_numbers[image.measured]).astype(np.int64),
                pad_id=self.pad_id,
            )
        return self._renumbered[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_renumbered": {}}
