"""Hidden regions of a slide, and how far predictions of them are from what was measured there.

Squares are hidden in the middle of square windows, as in the paper's grid, and the window is all that is seen: neither
a model nor a baseline looks at a spot outside it. A region of any other form is seen from the whole slide around it.
Truth, baselines and predictions are log1p of counts per the processor's `target_sum`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from anndata import AnnData

from eval.baselines.region import PREDICTORS
from modeling_stimg import SlideImage, STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.plotting import grid_positions
from modeling_stimg.reconstruction_stimg import read_spots, variable_genes
from modeling_stimg.slide_image_stimg import window_counts

DECODER_ALONE = ", decoder alone"
METRICS = ("mse", "mae", "pearson")
# Of the sites of a mask, and of the window around it, this share has to hold a spot.
MIN_OCCUPIED = 0.5


@dataclass(frozen=True)
class Region:
    """Spots of a slide that are hidden, and those that may be looked at; both bool (num_spots,)."""

    hidden: np.ndarray
    visible: np.ndarray


@dataclass(frozen=True)
class EvaluatedSlide:
    """A slide as it is scored.

    Attributes:
        positions: float64 (num_spots, 2), in distances between neighbouring spots.
    """

    image: SlideImage
    positions: np.ndarray

    @classmethod
    def of(cls, adata: AnnData, processor: STPatchProcessor, name: str) -> EvaluatedSlide:
        """A slide from `read_slide`; of spots on one array position the first counts."""
        image = processor.slide_to_image(adata, on_duplicate="first", name=name)
        positions, pitch = grid_positions(adata)
        return cls(image, positions[image.obs_index] / pitch)

    def values(self, spots: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """float64 (spots, genes): what was measured. spots: bool (num_spots,). genes: int64, vocabulary numbers."""
        kept = np.flatnonzero(spots)
        indices, values, owner = self.image.expression(kept)
        shape = len(kept), self.image.pad_id
        return sp.csr_matrix((values, (owner, indices)), shape)[:, genes].toarray().astype(np.float64)


@dataclass(frozen=True)
class Reconstruction:
    """What was measured in a region and what is predicted there.

    Attributes:
        genes: int64 (genes,), vocabulary numbers. truth: float64 (hidden spots, genes). predicted: by predictor, the
            same.
    """

    genes: np.ndarray
    truth: np.ndarray
    predicted: dict[str, np.ndarray]


def square_regions(image: SlideImage, mask_size: int, window_size: int, count: int, seed: int) -> list[Region]:
    """Squares in the middle of square windows, drawn with replacement; a function of the slide, the sizes and `seed`.

    Windows are drawn uniformly among those of whose masked and of whose other sites at least half hold a spot. A window
    may be larger than the slide.

    Returns:
        `count` regions, or none where the slide has no such window.
    """
    margin = (window_size - mask_size) // 2
    sides = np.maximum((image.height, image.width), window_size)
    occupied = np.zeros(sides, dtype=bool)
    occupied[image.rows, image.cols] = True
    in_window = window_counts(occupied, window_size)
    tops, lefts = in_window.shape
    in_mask = window_counts(occupied, mask_size)[margin : margin + tops, margin : margin + lefts]
    fits = in_mask >= max(MIN_OCCUPIED * mask_size**2, 1)
    fits &= in_window - in_mask >= max(MIN_OCCUPIED * (window_size**2 - mask_size**2), 1)
    corners = np.argwhere(fits)
    if len(corners) == 0:
        return []
    drawn = np.random.default_rng([seed, window_size, mask_size]).integers(len(corners), size=count)
    regions = []
    for top, left in corners[drawn]:
        in_crop = _in_square(image, top, left, window_size)
        hidden = _in_square(image, top + margin, left + margin, mask_size)
        regions.append(Region(hidden, in_crop & ~hidden))
    return regions


def _in_square(image: SlideImage, top: int, left: int, side: int) -> np.ndarray:
    rows, cols = image.rows - top, image.cols - left
    return (rows >= 0) & (rows < side) & (cols >= 0) & (cols < side)


def reconstruct(
    slide: EvaluatedSlide,
    region: Region,
    models: Mapping[str, STImageMAEForPreTraining],
    processor: STPatchProcessor,
    num_genes: int,
    options: Mapping[str, Any],
) -> Reconstruction:
    """Predict a region by every baseline, and by every model: its decoder alone, and calibrated on what is seen.

    Args:
        num_genes: how many genes are asked for: those that vary most over the spots of the slide that are not hidden.
        options: of `read_spots`.
    """
    genes = variable_genes(slide.image.part(~region.hidden), num_genes)
    values = slide.values(region.visible, genes)
    places = slide.positions[region.visible], slide.positions[region.hidden]
    predicted = {name: predict(values, *places) for name, predict in PREDICTORS.items()}
    for name, model in models.items():
        read = read_spots(model, processor, slide.image, region.hidden, visible=region.visible, **options)
        for row, calibrated in ((name + DECODER_ALONE, False), (name, True)):
            predicted[row] = read.values(genes, calibrated)
    return Reconstruction(genes, slide.values(region.hidden, genes), predicted)


def errors(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """How far a prediction is from the truth, both float (spots, genes).

    `mse`, `mae`: means over all entries. `pearson`: mean over genes of the correlation over spots, among the
    `pearson_genes` genes that vary over them; a prediction that does not vary says nothing of where a gene is expressed
    and counts as 0. NaN where no gene varies.
    """
    difference = np.asarray(predicted, np.float64) - truth
    centred, guess = (np.asarray(a, np.float64) - np.mean(a, axis=0, dtype=np.float64) for a in (truth, predicted))
    varies = np.ptp(truth, axis=0) > 0
    spread = np.sqrt((centred**2).sum(0) * (guess**2).sum(0))
    told = varies & (np.ptp(predicted, axis=0) > 0)
    correlation = np.divide((centred * guess).sum(0), spread, out=np.zeros(truth.shape[1]), where=told)
    return {
        "mse": float((difference**2).mean()),
        "mae": float(np.abs(difference).mean()),
        "pearson": float(correlation[varies].mean()) if varies.any() else float("nan"),
        "pearson_genes": int(varies.sum()),
    }


def summarise(scores: list[dict[str, float]]) -> dict[str, float | None]:
    """Mean and standard deviation over repetitions of every metric; None where no repetition has it."""
    summary: dict[str, float | None] = {}
    for metric in METRICS:
        values = np.array([score[metric] for score in scores])
        values = values[np.isfinite(values)]
        summary[metric] = float(values.mean()) if len(values) else None
        summary[f"{metric}_sd"] = float(values.std()) if len(values) else None
    return {**summary, "pearson_genes": float(np.mean([score["pearson_genes"] for score in scores]))}


def fingerprint(*arrays: np.ndarray) -> str:
    """SHA-256 of arrays' types, shapes and bytes: what tells that a file was not exchanged between two runs."""
    digest = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(array)
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(array.data)
    return digest.hexdigest()
