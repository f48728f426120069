"""How well a model predicts what it does not see, beside predictors that have learnt nothing.

The same masked entries are predicted by the model, by each gene's mean over the corpus, by its mean over the window's
visible entries, and by a low-rank completion of the window, which tells how much of what is hidden can be guessed from
the rest of the window at all: most of a single count is noise. Errors are those of the loss (Eq. 8), in the units of
the model's input, so that they compare within a row and not between models that normalise differently.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader

from data_processing.window_dataset import WindowDataset, collate_windows, windows_per_epoch
from modeling_stimg import SlideImage, STImageMAEForPreTraining, STPatchProcessor
from modeling_stimg.masking_stimg import masked_mean_squared_error

PREDICTORS = ("model", "window mean", "corpus mean", "low rank")

# Of the low-rank completion: rank, threshold as a share of the largest singular value, and how often it is repeated.
RANK, THRESHOLD, ITERATIONS = 10, 0.5, 25


def corpus_mean(processor: STPatchProcessor, image: SlideImage, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """float32 (B, C): the corpus mean of every channel's gene as the model's input shows it; 0 of padding.

    Raises:
        ValueError: the vocabulary holds no means.
    """
    if processor.vocabulary.mean is None:
        raise ValueError("The processor's vocabulary holds no gene means: the corpus mean of a gene is not known.")
    means = torch.from_numpy(np.append(processor.vocabulary.mean, np.float32(0)))[batch["gene_ids"]]
    site = {"pixel_values": means[:, :, None, None], "pixel_mask": torch.ones(len(means), 1, 1, dtype=torch.bool)}
    site |= {name: batch[name] for name in ("gene_ids", "channel_mask")}
    return processor.normalize(site, image)[:, :, 0, 0]


def window_mean(batch: Mapping[str, torch.Tensor], mask: torch.Tensor, otherwise: torch.Tensor) -> torch.Tensor:
    """float32 (B, C): mean of every channel over the entries of its window that can be seen.

    Args:
        batch: with `pixel_values` float32 (B, C, S, S), `pixel_mask` bool (B, S, S). mask: bool (B, C, S, S), hidden.
        otherwise: float32 (B, C), for channels of which nothing can be seen.
    """
    visible = (batch["pixel_mask"][:, None] & ~mask).flatten(2)
    count = visible.sum(-1)
    total = (batch["pixel_values"].flatten(2) * visible).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), otherwise)


def low_rank(batch: Mapping[str, torch.Tensor], mask: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """float32 (B, C, S, S): every window completed by soft-impute (Mazumder, Hastie & Tibshirani 2010).

    Hidden entries start at their gene's mean and are replaced by a low-rank approximation with shrunk singular values,
    again and again.

    Args:
        batch, mask: as in `window_mean`. means: float32 (B, C), what it gives.
    """
    predicted = means[:, :, None, None].repeat(1, 1, *mask.shape[2:])
    for window, observed in enumerate(batch["pixel_mask"]):
        offset = means[window][:, None].numpy()
        hidden = mask[window][:, observed].numpy()  # (C, sites)
        centred = np.where(hidden, 0, batch["pixel_values"][window][:, observed].numpy() - offset)
        guess = np.zeros_like(centred)
        threshold = THRESHOLD * float(np.linalg.norm(centred, 2))
        for _ in range(ITERATIONS):
            left, singular, right = np.linalg.svd(np.where(hidden, guess, centred), full_matrices=False)
            shrunk = np.maximum(singular - threshold, 0)[:RANK]
            guess = (left[:, :RANK] * shrunk) @ right[:RANK]
        predicted[window][:, observed] = torch.from_numpy(guess + offset)
    return predicted


@torch.no_grad()
def masked_losses(
    model: STImageMAEForPreTraining,
    processor: STPatchProcessor,
    image: SlideImage,
    coverage: float = 2.0,
    seed: int = 0,
    batch_size: int = 16,
) -> dict[str, float]:
    """Mean squared error over masked entries of samples of one slide, by predictor, and how many samples there were.

    The samples, their genes and their masks are a function of `seed` and the slide. The model hides what it hid in
    pretraining.

    Args:
        coverage: how often the samples cover every spot on average. batch_size: windows at a time; of the sample unit
            `"spot"` as many spots as these have sites.
    """
    samples = windows_per_epoch([image], [processor.window_size], coverage, processor.sample_unit)
    at_a_time = {"spot": batch_size * processor.window_size**2, "slice": 1}.get(processor.sample_unit, batch_size)
    windows = DataLoader(
        WindowDataset([image], processor, samples, seed), batch_size=at_a_time, collate_fn=collate_windows
    )
    total = dict.fromkeys(PREDICTORS, 0.0)
    counted = 0
    model.eval()
    for batch in windows:
        outputs = model(**batch)
        counting = int(outputs.mask.flatten(1).any(-1).sum())
        of_corpus = corpus_mean(processor, image, batch)
        of_window = window_mean(batch, outputs.mask, of_corpus)
        predictions = {
            "model": outputs.reconstruction,
            "window mean": of_window[:, :, None, None],
            "corpus mean": of_corpus[:, :, None, None],
            "low rank": low_rank(batch, outputs.mask, of_window),
        }
        for name, prediction in predictions.items():
            prediction = prediction.float().expand_as(batch["pixel_values"])
            loss = masked_mean_squared_error(prediction, batch["pixel_values"], outputs.mask)
            total[name] += loss.item() * counting
        counted += counting
    if counted == 0:
        raise ValueError(f"{image.name}: nothing is masked in any sample, so there is no loss.")
    return {**{name: value / counted for name, value in total.items()}, "samples": counted}
