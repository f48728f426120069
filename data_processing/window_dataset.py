"""WindowDataset: an endless-looking stream of training windows, every one a function of (seed, index)."""

import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from modeling_stimg import SlideImage, STPatchProcessor
from modeling_stimg.noise_stimg import mask_noise, window_uniforms
from modeling_stimg.sample_units_stimg import draw_samples, sample_side, sample_spots, spots_of_samples

# Axes of the sites, by name of the tensor.
_SITE_AXES = {"pixel_values": (1, 2), "noise": (1, 2), "pixel_mask": (0, 1), "coordinates": (0, 1)}


def spots_of(images: Sequence[SlideImage]) -> np.ndarray:
    """int64 (slides,): spots of every slide, without opening the slides of a corpus."""
    known = getattr(images, "num_spots", None)
    return np.array([image.num_spots for image in images], dtype=np.int64) if known is None else known


def windows_per_epoch(
    images: Sequence[SlideImage], window_sizes: Sequence[int], coverage: float = 2.0, sample_unit: str = "patch"
) -> int:
    """Samples that cover every spot `coverage` times on average, were the windows full.

    Args:
        window_sizes: those that windows are drawn with, equally often.
    """
    spots = spots_of(images)
    sites = [spots_of_samples(sample_unit, size) for size in window_sizes]
    a_sample = float(spots.mean()) if None in sites else float(np.mean(sites))
    return max(1, round(coverage * int(spots.sum()) / a_sample))


def collate_windows(items: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of items of `WindowDataset`. Whole slides of different sizes are filled up with empty sites."""
    side = max(item["pixel_mask"].shape[-1] for item in items)
    return {key: torch.stack([_filled_up(key, item[key], side) for item in items]) for key in items[0]}


def _filled_up(key: str, tensor: torch.Tensor, side: int) -> torch.Tensor:
    axes = _SITE_AXES.get(key, ())
    if all(tensor.shape[axis] == side for axis in axes):
        return tensor
    larger = tensor.new_zeros([side if axis in axes else length for axis, length in enumerate(tensor.shape)])
    larger[tuple(slice(length) for length in tensor.shape)] = tensor
    return larger


def give_way(worker: int, before: Callable[[int], None] | None = None) -> None:
    """Initialise a loader's worker so that it runs where the training leaves a core idle, and seldom in its way.

    Threads of one matrix product wait for each other: a worker that takes a core from one of them stops them all.

    Args:
        worker: its number. before: another initialisation, called first.
    """
    if before is not None:
        before(worker)
    if hasattr(os, "nice"):
        os.nice(10)  # with 19 the training, whose threads wait actively, leaves it too little


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
        window_sizes: sides to draw windows with instead of the processor's, equally often; one side for every
            `windows_a_step` items that follow each other, so that the windows of a step make one tensor.

    Items are dicts of tensors without batch dimension: the keys of the processor's `BatchFeature` but `spot_index`,
    and `noise` float32 (C, S, S) for the mask.

    Raises:
        ValueError: no slides.
        IndexError: an item beyond the length.
    """

    def __init__(
        self,
        images: Sequence[SlideImage],
        processor: STPatchProcessor,
        num_windows: int,
        seed: int = 0,
        window_sizes: Sequence[int] = (),
        windows_a_step: int = 1,
    ):
        if not images:
            raise ValueError("A WindowDataset needs at least one slide: got none.")
        self.images = images
        self.processor = processor
        self.num_windows = num_windows
        self.seed = seed
        self.window_sizes = tuple(window_sizes) or (processor.window_size,)
        self.windows_a_step = windows_a_step
        self._area = np.cumsum(spots_of(images))

    def __len__(self) -> int:
        return self.num_windows

    def slide_of(self, index: int) -> SlideImage:
        """The slide from which item `index` is drawn."""
        return self.images[self._slide_number(index)]

    def window_size_of(self, index: int) -> int:
        """The side of item `index`."""
        if len(self.window_sizes) == 1:
            return self.window_sizes[0]
        step = index // self.windows_a_step
        # A third number, lest it be the draw of a window.
        return int(np.random.default_rng([self.seed, step, 1]).choice(self.window_sizes))

    def spots_of_items(self, start: int, stop: int) -> np.ndarray:
        """int64 (stop - start,): spots that stand in items `start` to `stop`, which need not lie within the length.

        Windows are placed for it, and nothing of them is read.
        """
        by_place: dict[tuple[int, int], list[int]] = {}
        for index in range(start, stop):
            by_place.setdefault((self._slide_number(index), self.window_size_of(index)), []).append(index)
        spots = np.zeros(stop - start, dtype=np.int64)
        unit = self.processor.sample_unit
        for (slide, size), indices in by_place.items():
            image = self.images[slide]
            if unit in ("spot", "slice"):
                spots[np.array(indices) - start] = 1 if unit == "spot" else image.num_spots
                continue
            side = sample_side(image, unit, size)
            corners = draw_samples(image, unit, side, self.processor.min_observed, self.seed, indices)
            occupied = sample_spots(image, unit, corners, side) >= 0
            spots[np.array(indices) - start] = occupied.reshape(len(indices), -1).sum(-1)
        return spots

    def num_spots(self, at_a_time: int = 10_000) -> int:
        """Spots in all items, repetitions counted: the budget of a training."""
        starts = range(0, self.num_windows, at_a_time)
        return sum(int(self.spots_of_items(i, min(i + at_a_time, self.num_windows)).sum()) for i in starts)

    def _slide_number(self, index: int) -> int:
        uniform, _ = window_uniforms(self.seed, index)
        return int(np.searchsorted(self._area, uniform * self._area[-1], side="right"))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.num_windows:
            raise IndexError(f"Window {index} of {self.num_windows}.")
        batch = self.processor(
            self.slide_of(index),
            num_windows=1,
            first_window=index,
            seed=self.seed,
            window_size=self.window_size_of(index),
            return_tensors="pt",
        )
        item = {key: batch[key][0] for key in batch if key != "spot_index"}
        item["noise"] = torch.from_numpy(mask_noise(self.seed, index, tuple(item["pixel_values"].shape)))
        return item
