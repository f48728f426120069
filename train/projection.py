"""The projection of a trained encoder's outputs: what neighbouring spots share, apart from what they do not.

The minimum noise fraction transform of multispectral images (Green et al. 1988, IEEE TGRS 26:65-74): noise is estimated
from the differences between neighbouring sites, outputs are scaled so that it is the same in every direction, and the
directions are kept in which most is left beside it. No label enters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.linalg import eigh, hadamard
from tqdm.auto import tqdm

from data_processing.window_dataset import spots_of
from modeling_stimg import SlideImage, STPatchProcessor

REGULARIZATION = 0.1  # of the mean noise of a direction: what is added to the noise of each
MAX_SPOTS = 100_000  # of a large corpus: more would not change the covariances of a few hundred outputs


def fit_projection(model: Any, processor: STPatchProcessor, images: Sequence[SlideImage], seed: int) -> np.ndarray:
    """The projection for a model's `spot` readout, embedded as its `embedding_defaults` say, from slides of a corpus.

    Args:
        model: an `STImageMAEModel` or `STImageMAEForPreTraining` with a `projection_size`. seed: of the choice of
            slides where they hold more than `MAX_SPOTS` spots.

    Returns:
        float32 (projection_size, hidden).

    Raises:
        ValueError: no slide has two spots side by side.
    """
    order = np.random.default_rng(seed).permutation(len(images))
    before = np.concatenate([[0], spots_of(images)[order].cumsum()[:-1]])
    chosen = np.sort(order[before < MAX_SPOTS])
    embeddings = (
        (images[i], model.embed(images[i], processor, readout="spot", projected=False, smoothing=0))
        for i in tqdm(chosen.tolist(), desc="projection")
    )
    return noise_projection(embeddings, model.config.projection_size)


def noise_projection(embeddings: Iterable[tuple[SlideImage, np.ndarray]], size: int) -> np.ndarray:
    """A linear map after which the difference of neighbours has the same variance in all directions.

    With the covariances T of the outputs within slides and N of half the differences between neighbours, of which
    every slide counts with the root of its number of spots: the eigenvectors w of (T - N) w = l (N + c I) w with the
    largest l, turned by a Hadamard matrix. That leaves distances as they are, and gives all outputs the same variance,
    so that whoever standardises them does not raise those that hold little.

    Args:
        embeddings: slides, and float (num_spots, width) of each. size: a power of two, at most the width.

    Returns:
        float32 (size, width).
    """
    total: np.ndarray | float = 0.0
    noise: np.ndarray | float = 0.0
    for image, outputs in embeddings:
        centred = outputs.astype(np.float64) - outputs.mean(0, dtype=np.float64)
        differences = np.concatenate([centred[here] - centred[there] for here, there in neighbours(image)])
        if len(differences):
            weight = np.sqrt(len(centred))
            total = total + weight * (centred.T @ centred) / len(centred)
            noise = noise + weight * (differences.T @ differences) / (2 * len(differences))
    if isinstance(noise, float):
        raise ValueError(
            "No slide has two spots side by side: a projection cannot be fitted; leave projection_size out."
        )
    regular = noise + REGULARIZATION * np.trace(noise) / len(noise) * np.eye(len(noise))
    _, vectors = eigh(total - noise, regular)
    leading = vectors[:, ::-1][:, :size]  # (width, size)
    # Their signs are arbitrary; without a rule, so would be the turned outputs.
    leading *= np.sign(leading[np.abs(leading).argmax(0), np.arange(size)])
    return (leading @ hadamard(size) / np.sqrt(size)).T.astype(np.float32)


def neighbours(image: SlideImage) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Spots and the spots to the right of them, then below them: int64 (pairs,) twice."""
    grid = np.pad(image.spot_grid, (0, 1), constant_values=-1)
    for down, right in ((0, 1), (1, 0)):
        there = grid[image.rows + down, image.cols + right]
        yield np.flatnonzero(there >= 0), there[there >= 0]
