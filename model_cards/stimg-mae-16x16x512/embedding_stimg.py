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
"""Embedding a whole slide: windows that cover it, the encoder over each, and one average a spot."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .sample_units_stimg import covering_samples, sample_side, sample_spots, spots_of_samples
from .sampling_stimg import GENE_SELECTIONS, make_windows, window_sites
from .slide_image_stimg import SlideImage, on_host, usable_device, window_counts

logger = logging.get_logger(__name__)

READOUTS = ("spot", "context", "both")
NUM_CONTEXT_PASSES = 4
# Of spots x genes, that are dense at once: what fits into a core's cache, or keeps an accelerator busy.
VALUES_AT_ONCE = {"cpu": 1 << 19, "accelerator": 1 << 23}
# Values of features, spots x width, that are averaged over neighbours at once.
FEATURES_AT_ONCE = 1 << 20
# Sites that the CPU encodes at once: enough for its matrix products, and their activations are still in its caches.
SITES_AT_ONCE_ON_CPU = 2048


def embedding_options(model: Any, processor: Any, **given: Any) -> dict[str, Any]:
    """What `embed_image` will do: the given options, then `config.embedding_defaults`, then the general defaults.

    Raises:
        ValueError: an unknown option, one outside its range, or a readout that the model cannot give.
    """
    options = {
        "stride": max(processor.window_size // 2, 1),
        "readout": "spot",
        "gene_selection": processor.gene_selection,
        "num_channels": processor.num_channels,
        "num_gene_draws": 1,
        "projected": None,
        "smoothing": 0,
        "centered": False,
    }
    for source in (model.config.embedding_defaults or {}, given):
        unknown = set(source) - set(options)
        if unknown:
            raise ValueError(f"Unknown embedding options {sorted(unknown)}: expected any of {sorted(options)}.")
        options.update({k: v for k, v in source.items() if v is not None})
    if options["readout"] not in READOUTS:
        raise ValueError(f"readout is {options['readout']!r}: expected one of {READOUTS}.")
    if options["gene_selection"] not in GENE_SELECTIONS:
        raise ValueError(f"gene_selection is {options['gene_selection']!r}: expected one of {GENE_SELECTIONS}.")
    if options["readout"] != "spot" and model.config.mask_unit == "site":
        raise ValueError(
            f'readout is "{options["readout"]}", which reads masked sites, but with mask_unit="site" these never enter '
            'the encoder: train with "mixed", or read "spot".'
        )
    for name in ("stride", "num_channels", "num_gene_draws"):
        if options[name] < 1:
            raise ValueError(f"{name} is {options[name]}: expected an integer from 1.")
    radii = options["smoothing"]
    if not isinstance(radii, int | np.integer):
        options["smoothing"] = radii = list(radii)
    if min(radii if isinstance(radii, list) else [radii], default=-1) < 0:
        raise ValueError(f"smoothing is {radii}: expected a radius in sites, from 0, or several.")
    options["projected"] = _is_projected(model.config, options)
    if options["stride"] > processor.window_size:
        raise ValueError(
            f"stride is {options['stride']}, larger than the window ({processor.window_size}), and spots between "
            f"windows would be left out: expected 1 to {processor.window_size}."
        )
    return options


def _is_projected(config: Any, options: dict[str, Any]) -> bool:
    """Whether outputs are projected: when not told, where the model has a projection for what is read."""
    fitted = config.projection_size > 0 and options["readout"] == "spot"
    if options["projected"] and not fitted:
        raise ValueError(
            f'projected is True with the readout "{options["readout"]}" and a projection_size of '
            f'{config.projection_size}: expected "spot", and a model that was trained with a projection.'
        )
    return fitted if options["projected"] is None else options["projected"]


def check_pair(model: Any, processor: Any) -> None:
    """Raise ValueError unless a model and a processor belong together, as far as they tell."""
    if len(processor.vocabulary) + 1 != model.config.vocab_size:
        raise ValueError(
            f"The model has {model.config.vocab_size:,} gene embeddings, padding included, and the processor "
            f"{len(processor.vocabulary):,} genes: they belong to different models; load both from one folder."
        )
    if processor.sample_unit != model.config.sample_unit:
        raise ValueError(
            f'The model was trained on the sample unit "{model.config.sample_unit}" and the processor makes '
            f'"{processor.sample_unit}": load both from one folder.'
        )


@contextmanager
def frozen(
    network: Any, image: SlideImage, device: str | torch.device | None
) -> Iterator[tuple[torch.device, torch.device]]:
    """A network in evaluation mode on a device (None: where it is), and as it was afterwards.

    Yields where it runs, and where windows of `image` are made.
    """
    where = network.device if device is None else usable_device(device)
    home, was_training = network.device, network.training
    # Windows are drawn with float64, which not every accelerator has.
    sampler = where if where.type == "cuda" else torch.device("cpu")
    network.to(where).eval()
    try:
        yield where, sampler
    finally:
        network.to(home).train(was_training)
        image.release(sampler)


@torch.no_grad()
def embed_image(
    model: Any,
    processor: Any,
    image: SlideImage,
    stride: int | None = None,
    readout: str | None = None,
    gene_selection: str | None = None,
    num_gene_draws: int | None = None,
    smoothing: int | Sequence[int] | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
    num_channels: int | None = None,
    centered: bool | None = None,
    projected: bool | None = None,
) -> np.ndarray:
    """Embed every spot of a slide with a frozen encoder.

    Windows cover the slide with overlap; a spot's embedding is the mean of the encoder's outputs at its site over all
    windows that hold it and all gene draws.

    Args:
        model: an `STImageMAEModel` or `STImageMAEForPreTraining`. processor: its processor.
        stride: sites between neighbouring windows; half a window when neither given nor a default of the model.
        readout: `"spot"`: the spot is seen. `"context"`: a quarter of the sites is masked at a time, so that each is
            masked once, and read where it is masked: what the surroundings say about the spot. Trained by
            `mask_unit="mixed"`; impossible with `"site"`. `"both"`: side by side.
        gene_selection: how a window's genes are chosen, as in the processor.
        num_gene_draws: how often each window is read, with genes drawn anew.
        smoothing: radius in sites of a final mean over the square around each spot, 0 = none; or several radii, whose
            means stand side by side, each scaled to a mean square norm of 1 over the slide's spots.
        batch_size: windows at a time; of the sample unit `"spot"` as many spots as these windows have sites. On a CPU
            fewer, where they are large: more at a time would take longer.
        device: where to run; `None` = where the model is.
        seed: of the gene draws. The same input gives the same bits.
        progress: show a progress bar.
        num_channels: how many genes a window has, instead of the processor's number.
        centered: whether the mean over the slide's spots is taken off, before any smoothing, so that slides that were
            made differently can be compared.
        projected: whether outputs go through the model's projection. Done when not told, where the model has one and
            the readout is `"spot"`, for which it was fitted.

    Returns:
        float32 (num_spots, width): width is the encoder's `hidden_size`, twice that for `"both"`, or the
        `projection_size`; times the number of radii.
    """
    options = embedding_options(
        model,
        processor,
        stride=stride,
        readout=readout,
        gene_selection=gene_selection,
        num_channels=num_channels,
        num_gene_draws=num_gene_draws,
        smoothing=smoothing,
        centered=centered,
        projected=projected,
    )
    check_pair(model, processor)
    if options["readout"] != "spot" and model.config.mask_unit == "entry":
        logger.warning_once(
            f'readout="{options["readout"]}" reads masked sites, which a model trained with mask_unit="entry" has not '
            'met: train with "mixed", or read "spot".'
        )
    encoder = model.base_model
    with frozen(encoder, image, device) as (where, sampler):
        parts = _readout_means(encoder, processor, image, options, batch_size, where, sampler, seed, progress)
    embedding = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    del parts
    if options["projected"]:
        embedding = embedding @ encoder.projection.T.cpu().double().numpy()
    if options["centered"]:
        embedding -= embedding.mean(0)  # in place, as all that is as large as a slide of bins
    return neighbourhood_means(image, embedding, options["smoothing"]).astype(np.float32, copy=False)


def _readout_means(
    encoder: Any,
    processor: Any,
    image: SlideImage,
    options: dict[str, Any],
    batch_size: int,
    device: torch.device,
    sampler: torch.device,
    seed: int,
    progress: bool,
) -> list[np.ndarray]:
    """For each readout asked for, float64 (num_spots, hidden): means over windows and draws."""
    side = sample_side(image, processor.sample_unit, processor.window_size)
    corners = covering_samples(image, processor.sample_unit, side, options["stride"])
    if processor.sample_unit == "spot":
        batch_size *= processor.window_size**2  # as many sites at a time as in windows
    if device.type == "cpu":
        sites = spots_of_samples(processor.sample_unit, processor.window_size) or side**2
        batch_size = min(batch_size, max(1, SITES_AT_ONCE_ON_CPU // sites))
    if genes_are_shared(encoder, image, options):
        corners = fullest_first(image, processor.sample_unit, corners, side)
        tokens = spot_tokens(encoder, processor, image, options["num_channels"], device, sampler)
        batches = _token_batches(tokens, processor, image, corners, side, batch_size)
    else:
        # Windows have numbers, by which their genes are drawn.
        corners = corners * options["num_gene_draws"]
        batches = _pixel_batches(processor, image, options, corners, batch_size, device, sampler, seed)
    num_batches = -(-len(corners) // batch_size)
    readouts = ("spot", "context") if options["readout"] == "both" else (options["readout"],)
    sums = {r: np.zeros((image.num_spots, encoder.config.hidden_size)) for r in readouts}
    counts = np.zeros(image.num_spots)
    for batch_corners, inputs in tqdm(batches, f"embed {image.name}", num_batches, disable=not progress):
        spots = inputs.pop("spot_index").flatten(1).cpu().numpy()  # (B, S*S)
        for readout in readouts:
            hidden = _read(encoder, inputs, batch_corners, readout).cpu().double().numpy()
            for site_spots, site_hidden in zip(spots, hidden, strict=True):
                # A spot stands once in a window, so plain indexed addition is exact.
                sums[readout][site_spots[site_spots >= 0]] += site_hidden[site_spots >= 0]
        for site_spots in spots:
            counts[site_spots[site_spots >= 0]] += 1
    for total in sums.values():
        total /= counts[:, None]  # in place: on a large slide these are the largest arrays
    return list(sums.values())


# Corners of a batch of windows, and what the model reads of it, with `spot_index` besides.
Batches = Iterator[tuple[list[tuple[int, int]], dict[str, torch.Tensor]]]


def _pixel_batches(
    processor: Any,
    image: SlideImage,
    options: dict[str, Any],
    corners: list[tuple[int, int]],
    batch_size: int,
    device: torch.device,
    sampler: torch.device,
    seed: int,
) -> Batches:
    """Windows as the processor makes them."""
    for start in range(0, len(corners), batch_size):
        batch = processor(
            image,
            windows=corners[start : start + batch_size],
            seed=seed,
            first_window=start,
            gene_selection=options["gene_selection"],
            num_channels=options["num_channels"],
            device=sampler,
            return_tensors="pt",
        )
        yield corners[start : start + batch_size], {k: v.to(device) for k, v in batch.items()}


def _token_batches(
    tokens: torch.Tensor,
    processor: Any,
    image: SlideImage,
    corners: list[tuple[int, int]],
    side: int,
    batch_size: int,
) -> Batches:
    """The same windows, with the tokens of their sites in place of values and genes."""
    for start in range(0, len(corners), batch_size):
        batch_corners = corners[start : start + batch_size]
        spots = sample_spots(image, processor.sample_unit, batch_corners, side)
        batch = window_sites(image, spots, tokens.device)
        # Of an empty site (-1) that of the last spot, which nobody looks at.
        yield batch_corners, {**batch, "site_embeds": tokens[batch["spot_index"].flatten(1)]}


def genes_are_shared(encoder: Any, image: SlideImage, options: dict[str, Any]) -> bool:
    """Whether all windows of a slide have the same genes, and the encoder takes tokens that were made of them once."""
    takes_tokens = "site_embeds" in inspect.signature(encoder.forward).parameters
    return takes_tokens and (options["gene_selection"] == "slide" or image.num_genes <= options["num_channels"])


def fullest_first(
    image: SlideImage, sample_unit: str, corners: list[tuple[int, int]], side: int
) -> list[tuple[int, int]]:
    """Windows by how many spots they hold: those of a batch are encoded with as many tokens as the fullest has."""
    if sample_unit != "patch":
        return corners
    counts = window_counts(image.spot_grid >= 0, side)
    return sorted(corners, key=lambda corner: -counts[corner])


def spot_tokens(
    encoder: Any, processor: Any, image: SlideImage, num_channels: int, device: torch.device, sampler: torch.device
) -> torch.Tensor:
    """Every spot's token with the slide's most variable genes, nothing masked: the same in all windows that hold it.

    A spot is in several windows, and a window's values of many genes are far more than its tokens.

    Args:
        num_channels: how many genes. device: where the encoder is. sampler: where values are made dense.

    Returns:
        float (num_spots, hidden_size), without positions.
    """
    at_once = max(1, VALUES_AT_ONCE["cpu" if on_host(sampler) else "accelerator"] // num_channels)
    tokens = []
    for start in range(0, image.num_spots, at_once):
        # As far as values go, any spots are a window.
        spots = np.arange(start, min(start + at_once, image.num_spots))[None, None]  # (1, 1, spots)
        arrays = make_windows(image, spots, num_channels, "slide", 0, [0], device=sampler)
        arrays["pixel_values"] = processor.normalize(arrays, image)
        inputs = (arrays[name].to(device) for name in ("pixel_values", "gene_ids", "channel_mask"))
        tokens.append(encoder.embeddings(*inputs)[0])
    return torch.cat(tokens)


def _read(encoder: Any, inputs: dict[str, torch.Tensor], corners: list[tuple[int, int]], readout: str) -> torch.Tensor:
    """One readout of a batch of windows: float (B, S*S, hidden)."""
    if readout == "spot":
        return encoder(**inputs).last_hidden_state
    size = inputs["pixel_mask"].shape[-1]
    offsets = torch.tensor(corners, device=inputs["pixel_mask"].device)  # (B, 2)
    steps = torch.arange(size, device=offsets.device)
    # The quarters are the four colours of a 2 x 2 tiling of the *slide*: a masked spot keeps all its neighbours, and
    # the pattern does not move with the window.
    colour = 2 * ((offsets[:, :1] + steps) % 2)[:, :, None] + ((offsets[:, 1:] + steps) % 2)[:, None]  # (B, S, S)
    read = None
    for quarter in range(NUM_CONTEXT_PASSES):
        masked = colour == quarter
        hidden = encoder(**inputs, bool_masked_entries=masked[:, None]).last_hidden_state
        here = masked.flatten(1)[..., None]
        read = torch.where(here, hidden, torch.zeros_like(hidden) if read is None else read)
    return read


def neighbourhood_mean(image: SlideImage, features: np.ndarray, radius: int) -> np.ndarray:
    """Mean over the occupied sites of the (2 * radius + 1)-sided square around each spot, itself included.

    Args:
        features: float (num_spots, width). radius: in sites.

    Returns:
        float64 (num_spots, width).
    """
    radius = min(radius, max(image.height, image.width) - 1)  # further there is nothing
    means = np.zeros(features.shape, dtype=np.float64)
    padded = np.pad(image.spot_grid, radius, constant_values=-1)
    at_once = max(1, FEATURES_AT_ONCE // max(features.shape[1], 1))
    for start in range(0, image.num_spots, at_once):
        total, count = means[start : start + at_once], 0
        rows, cols = image.rows[start : start + at_once], image.cols[start : start + at_once]
        for down in range(2 * radius + 1):
            for right in range(2 * radius + 1):
                neighbour = padded[rows + down, cols + right]
                there = neighbour >= 0
                total[there] += features[neighbour[there]]
                count = count + there
        total /= count[:, None]
    return means


def neighbourhood_means(image: SlideImage, features: np.ndarray, smoothing: int | Sequence[int]) -> np.ndarray:
    """The mean of one radius; or those of several side by side, each scaled to a mean square norm of 1.

    Unscaled, a wider mean would count less in any distance, because it varies less.

    Args:
        features: float (num_spots, width). smoothing: radius or radii in sites, 0 = the features themselves.

    Returns:
        float (num_spots, width times the number of radii); of several radii float32.
    """
    if isinstance(smoothing, int | np.integer):
        return features if smoothing == 0 else neighbourhood_mean(image, features, smoothing)
    means = np.empty((len(features), len(smoothing), features.shape[1]), dtype=np.float32)
    for number, radius in enumerate(smoothing):
        mean = neighbourhood_means(image, features, radius)
        size = np.sqrt(np.einsum("ij,ij->", mean, mean, dtype=np.float64) / max(len(mean), 1))
        np.divide(mean, size if size > 0 else 1, out=means[:, number], casting="same_kind")
    return means.reshape(len(features), -1)


__all__ = [
    "READOUTS",
    "check_pair",
    "embed_image",
    "embedding_options",
    "frozen",
    "neighbourhood_mean",
    "neighbourhood_means",
]
