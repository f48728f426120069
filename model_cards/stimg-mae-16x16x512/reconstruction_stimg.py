# Copyright 2026 The stimg authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Reconstructing a region: spots that are hidden whole, predicted from the spots around them.

The hidden spots' counts are taken off the slide before anything else happens. What is left of them is their sites,
which enter windows as mask tokens; genes are chosen, and everything else is computed, from the spots that can be seen.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from .context_windows_stimg import context_windows
from .embedding_stimg import check_pair, frozen
from .kriging_stimg import kriging_weights, nearest_distances
from .sample_units_stimg import sample_side
from .slide_image_stimg import SlideImage
from .spot_reading_stimg import Reading, SpotFeatures, mean_features

logger = logging.get_logger(__name__)

NUM_GENES = 512
# Visible spots that predictions are calibrated on, at most: their covariances take the third power of their number.
NUM_CHECKS = 1000
# Values that are held at once where predictions are calibrated.
VALUES_AT_ONCE = 1 << 23


def variable_genes(image: SlideImage, num_genes: int = NUM_GENES) -> np.ndarray:
    """The measured genes with the highest variances of log1p values over a slide, or a part of it; ties by number.

    Returns:
        int64 (min(num_genes, measured genes),), vocabulary numbers, most variable first.
    """
    variances = image.gene_variances[image.measured]
    return image.measured[np.argsort(-variances, kind="stable")[:num_genes]]


def reconstruct_spots(
    model: Any,
    processor: Any,
    image: SlideImage,
    spots: np.ndarray,
    genes: np.ndarray | None = None,
    visible: np.ndarray | None = None,
    window_size: int | None = None,
    stride: int | None = None,
    num_views: int = 4,
    gene_selection: str | None = None,
    num_gene_draws: int = 1,
    calibrated: bool = True,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> np.ndarray:
    """Predict genes at hidden spots from the spots that can be seen around them.

    Every hidden spot is read in the `num_views` windows that show most of its surroundings (`context_windows`), with
    every gene draw. A prediction is the dot product of a spot's decoded feature with a gene's embedding (Eq. 8), so
    features are averaged and multiplied once, whatever the number of genes.

    Calibration (by kriging) tells the model what it does not know of this slide, such as how much its genes are
    expressed here beside the corpus: a quarter of the visible sites of each window are read as if they were hidden too,
    and what the model is off by there is added to what it says of the hidden spots (`calibrate`).

    Args:
        model: an `STImageMAEForPreTraining`. processor: its processor.
        spots: bool (num_spots,), True = hidden and predicted.
        genes: int64 (genes,), vocabulary numbers, any of the vocabulary; None = the 512 most variable over the visible
            spots.
        visible: bool (num_spots,), those that may be looked at; None = all that are not hidden.
        window_size: side of the windows, in sites; None = the processor's. A slide's own of the unit `"slice"`.
        stride: sites between the windows that are compared; a quarter of a window when None.
        num_views: windows that a hidden spot is read in, fewer where fewer hold it.
        gene_selection: how the genes that the encoder sees are chosen, as in the processor.
        num_gene_draws: how often each window is read, with genes drawn anew.
        calibrated: False: what the decoder says, and nothing else. Genes that were not measured on the slide are
            predicted that way in any case.
        batch_size: windows at a time. device: where to run; None = where the model is.
        seed: of the gene draws. The same input gives the same bits.
        progress: show a progress bar.

    Returns:
        float32 (hidden spots, genes): log1p of counts per the processor's `target_sum`, not below 0, in the image's
        order of spots.

    Raises:
        ValueError: no hidden or no visible spot, a spot that is both, a model without a decoder or of a sample unit
            that sees no surroundings, genes outside the vocabulary, or numbers below 1.
    """
    read = read_spots(
        model,
        processor,
        image,
        spots,
        visible=visible,
        window_size=window_size,
        stride=stride,
        num_views=num_views,
        gene_selection=gene_selection,
        num_gene_draws=num_gene_draws,
        with_checks=calibrated,
        batch_size=batch_size,
        device=device,
        seed=seed,
        progress=progress,
    )
    return read.values(variable_genes(read.seen) if genes is None else processor.gene_numbers(genes), calibrated)


@dataclass(frozen=True)
class ReadSpots:
    """What a model made of hidden spots: any gene's values can be had from it.

    Attributes:
        hidden, seen: the hidden and the visible spots.
        of_hidden, of_checks: what was read of the hidden spots, and of visible ones as if they were hidden.
        embeddings: float32 (vocabulary + 1, D), of genes.
    """

    hidden: SlideImage
    seen: SlideImage
    of_hidden: SpotFeatures
    of_checks: SpotFeatures
    embeddings: np.ndarray
    processor: Any

    def said(self, read: SpotFeatures, genes: np.ndarray) -> np.ndarray:
        """log1p values float64 (spots, genes) that the model says of what was read; NaN of spots that were not."""
        said = self.processor.log1p_values(
            read.features @ self.embeddings[genes].T.astype(np.float64), genes, self.seen
        )
        if read.weights is not None:
            # Local means are those of the model's input, in which 0 stands for `nothing`.
            nothing = self.processor.log1p_values(np.zeros((1, len(genes))), genes, self.seen)
            measured = np.flatnonzero(np.isin(genes, self.seen.measured))
            values = _values(self.seen, np.arange(self.seen.num_spots), genes[measured]) - nothing[:, measured]
            said[:, measured] += (read.weights @ torch.from_numpy(values)).numpy()
        return said

    def values(self, genes: np.ndarray, calibrated: bool = True) -> np.ndarray:
        """float32 (hidden spots, genes), log1p values, not below 0; see `reconstruct_spots`."""
        predicted = calibrate(self, genes) if calibrated else self.said(self.of_hidden, genes)
        return np.maximum(predicted, 0).astype(np.float32)


@torch.no_grad()
def read_spots(
    model: Any,
    processor: Any,
    image: SlideImage,
    spots: np.ndarray,
    visible: np.ndarray | None = None,
    window_size: int | None = None,
    stride: int | None = None,
    num_views: int = 4,
    gene_selection: str | None = None,
    num_gene_draws: int = 1,
    with_checks: bool = True,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> ReadSpots:
    """Read hidden spots from those around them, whatever is asked of them later; see `reconstruct_spots`.

    Args:
        with_checks: whether visible spots are read too, as calibration needs it.
    """
    _check_model(model, processor)
    for name, value in (("num_views", num_views), ("num_gene_draws", num_gene_draws), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: expected an integer from 1.")
    hidden, seen = _hidden_and_seen(image, spots, visible)
    size = sample_side(image, processor.sample_unit, processor.window_size if window_size is None else window_size)
    stride = max(size // 4, 1) if stride is None else stride
    if not 1 <= stride <= size:
        raise ValueError(f"stride is {stride}: expected 1 to {size}, the side of the windows.")
    corners, views = context_windows(hidden, seen, size, stride, num_views)
    reading = Reading(hidden, seen, corners, views, size, num_gene_draws)
    options = {"seed": seed, "gene_selection": gene_selection, "window_size": size, "return_tensors": "pt"}
    with frozen(model, seen, device) as devices:
        means = mean_features(model, processor, reading, with_checks, batch_size, devices, options, progress)
        embeddings = model.get_input_embeddings().weight.detach().float().cpu().numpy()
    return ReadSpots(hidden, seen, *means, embeddings, processor)


def _hidden_and_seen(image: SlideImage, spots: np.ndarray, visible: np.ndarray | None) -> tuple[SlideImage, SlideImage]:
    hidden = image.part(spots)
    seen = image.part(~np.asarray(spots) if visible is None else visible)
    if hidden.num_spots == 0:
        raise ValueError(f"{image.name}: no spot is hidden, so there is nothing to reconstruct.")
    if seen.num_spots == 0:
        raise ValueError(f"{image.name}: no spot is visible, so there is nothing to reconstruct the hidden ones from.")
    both = len(np.intersect1d(hidden.obs_index, seen.obs_index))
    if both:
        raise ValueError(f"{image.name}: {both} spots are both hidden and visible: expected one or the other.")
    return hidden, seen


def calibrate(spots: ReadSpots, genes: np.ndarray) -> np.ndarray:
    """Regression kriging near what is seen, and kriging alone further in.

    With x what was measured at visible spots v that were read as if hidden, p what the model says, and r = x - b * p,
    regression kriging has the model's prediction as its trend, and gives a hidden spot s

        b * p_s + mean(r) + sum_v w_sv (r_v - mean(r))

    with the weights of `kriging_weights`. b is the slope of x on p over these spots and the most variable genes, each
    gene less its mean, or 0 where that is negative: how much of what the model says is so on this slide. Kriging alone
    is the same with b = 0. Slopes were learnt at spots with visible ones next to them, and say too much of spots that
    have none: the prediction is the mean of both, the first weighted by 1 / d_s, with the distance d_s >= 1 in sites to
    the nearest visible spot, and the second by the rest. Of many spots that were read, the `NUM_CHECKS` nearest to
    hidden ones count.

    Args:
        genes: int64 (genes,), vocabulary numbers.

    Returns:
        float64 (hidden spots, genes); genes that were not measured as the model says.
    """
    hidden, seen = spots.hidden, spots.seen
    predicted = spots.said(spots.of_hidden, genes)
    read = np.flatnonzero(np.isfinite(spots.of_checks.features[:, 0]))
    measured = np.flatnonzero(np.isin(genes, seen.measured))
    if len(read) < 2 or len(measured) == 0:
        return predicted
    sites, places = (np.stack([part.rows, part.cols], axis=1).astype(np.float64) for part in (hidden, seen))
    if len(read) > NUM_CHECKS:
        nearest = nearest_distances(places[read], sites)
        read = np.sort(read[np.argsort(nearest, kind="stable")[:NUM_CHECKS]])
    of_slide = variable_genes(seen)
    said, found = spots.said(spots.of_checks, of_slide)[read], _values(seen, read, of_slide)
    deviation = said - said.mean(0)
    slope = max(float((deviation * (found - found.mean(0))).sum() / max((deviation**2).sum(), 1e-12)), 0)
    trusted = 1 / nearest_distances(sites, places)[:, None]
    with_trend, alone = kriging_weights([found - slope * said, found], places[read], sites)
    for some in np.array_split(measured, -(-len(measured) * len(read) // VALUES_AT_ONCE)):
        values = _values(seen, read, genes[some])
        left = values - slope * spots.said(spots.of_checks, genes[some])[read]
        mean, mean_left = values.mean(0), left.mean(0)
        kriged = mean + alone @ (values - mean)
        regressed = slope * predicted[:, some] + mean_left + with_trend @ (left - mean_left)
        predicted[:, some] = kriged + trusted * (regressed - kriged)
    return predicted


def _values(image: SlideImage, spots: np.ndarray, genes: np.ndarray) -> np.ndarray:
    """float64 (spots, genes): log1p values of some spots, int64, and some genes, vocabulary numbers."""
    column = np.full(image.pad_id + 1, len(genes))
    column[genes] = np.arange(len(genes))
    indices, values, owner = image.expression(spots)
    dense = np.zeros((len(spots), len(genes) + 1))  # the last one is for all other genes
    dense[owner, column[indices]] = values
    return dense[:, :-1]


def _check_model(model: Any, processor: Any) -> None:
    if not hasattr(model, "decode"):
        raise ValueError(
            f"A {type(model).__name__} has no decoder, which reconstructs: load STImageMAEForPreTraining "
            "(AutoModelForPreTraining) from the folder of the model."
        )
    check_pair(model, processor)
    if processor.sample_unit not in ("patch", "slice"):
        raise ValueError(
            f'The model was trained on the sample unit "{processor.sample_unit}", whose samples show a hidden spot '
            'nothing of what surrounds its region: expected "patch" or "slice".'
        )
    if model.config.mask_unit == "entry":
        logger.warning_once(
            'Reconstruction reads masked sites, which a model trained with mask_unit="entry" has not met: train with '
            '"mixed" or "site".'
        )


__all__ = ["NUM_GENES", "ReadSpots", "calibrate", "read_spots", "reconstruct_spots", "variable_genes"]
