"""WindowDataset: an endless-looking stream of training windows, every one a function of (seed, index)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_stimg import SlideImage, STPatchProcessor
from modeling_stimg.noise_stimg import mask_noise, window_uniforms


def spots_of(images: Sequence[SlideImage]) -> np.ndarray:
    """int64 (slides,): spots of every slide, without opening the slides of a corpus."""
    known = getattr(images, "num_spots", None)
    return np.array([image.num_spots for image in images], dtype=np.int64) if known is None else known


def windows_per_epoch(images: Sequence[SlideImage], window_size: int, coverage: float = 2.0) -> int:
    """Windows that cover every spot `coverage` times on average, were the windows full."""
    return max(1, round(coverage * int(spots_of(images).sum()) / window_size**2))


class WindowDataset(Dataset):
    """Windows of many slides, drawn in proportion to tissue area.

    Item `i` is window number `i` of one slide: the first number of `default_rng([seed, i])` picks the slide, the
    second its corner, and counter-based hashes of (seed, i) its genes and its mask. So an item does not depend on
    workers, processes or on what was drawn before, and no two items of one run are the same draw.

    Args:
        images: slides in memory, or `CorpusImages`, whose counts stay on disk.
        processor: makes the windows.
        num_windows: virtual length: all windows of the whole training, not of one epoch.
        seed: int from 0.

    Items are dicts of tensors without batch dimension: the keys of the processor's `BatchFeature` but `spot_index`,
    and `noise` float32 (C, S, S) for the mask.

    Raises:
        ValueError: no slides.
        IndexError: an item beyond the length.
    """

    def __init__(self, images: Sequence[SlideImage], processor: STPatchProcessor, num_windows: int, seed: int = 0):
        if not images:
            raise ValueError("A WindowDataset needs at least one slide: got none.")
        self.images = images
        self.processor = processor
        self.num_windows = num_windows
        self.seed = seed
        self._area = np.cumsum(spots_of(images))

    def __len__(self) -> int:
        return self.num_windows

    def slide_of(self, index: int) -> SlideImage:
        """The slide from which item `index` is drawn."""
        uniform, _ = window_uniforms(self.seed, index)
        return self.images[int(np.searchsorted(self._area, uniform * self._area[-1], side="right"))]

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_windows:
            raise IndexError(f"Window {index} of {self.num_windows}.")
        batch = self.processor(
            self.slide_of(index), num_windows=1, first_window=index, seed=self.seed, return_tensors="pt"
        )
        item = {key: batch[key][0] for key in batch if key != "spot_index"}
        item["noise"] = torch.from_numpy(mask_noise(self.seed, index, tuple(item["pixel_values"].shape)))
        return item
