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
"""Reading spots from windows in which they are masked: their features, and how much of visible values goes to them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from .sampling_stimg import window_spots
from .slide_image_stimg import SlideImage


@dataclass(frozen=True)
class Reading:
    """How hidden spots are read: which windows, and what of each.

    Attributes:
        hidden, seen: the hidden spots, whose counts are never looked at, and the visible ones.
        corners, views: from `context_windows`. size: side of the windows. num_gene_draws: how often each is read.
    """

    hidden: SlideImage
    seen: SlideImage
    corners: list[tuple[int, int]]
    views: np.ndarray
    size: int
    num_gene_draws: int

    def batches(self, batch_size: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """First window of every batch, and the number of the corner and of the gene draw of each of its windows."""
        number = np.arange(len(self.corners) * self.num_gene_draws)
        for start in range(0, len(number), batch_size):
            draw, corner = np.divmod(number[start : start + batch_size], len(self.corners))
            yield start, corner, draw


@dataclass(frozen=True)
class SpotFeatures:
    """What was read of some spots: means over windows and gene draws.

    Attributes:
        features: float64 (spots, D), decoded; NaN of spots that were not read.
        weights: sparse float64 (spots, visible spots), how much the model takes of the values of each visible spot,
            where `config.reconstruction` is `"residual"`; else None.
    """

    features: np.ndarray
    weights: torch.Tensor | None = None


def mean_features(
    model: Any,
    processor: Any,
    reading: Reading,
    with_checks: bool,
    batch_size: int,
    devices: tuple[torch.device, torch.device],
    options: dict[str, Any],
    progress: bool,
) -> tuple[SpotFeatures, SpotFeatures]:
    """What is read of the hidden spots, and of visible ones as if they were hidden.

    Args:
        with_checks: whether to read visible spots. devices: where the model runs, and where windows are made. options:
            of the processor.
    """
    hidden, seen, (where, sampler) = reading.hidden, reading.seen, devices
    sums = [FeatureSums(part.num_spots, seen.num_spots, model.config.hidden_size) for part in (hidden, seen)]
    num_batches = -(-len(reading.corners) * reading.num_gene_draws // batch_size)
    batches = tqdm(reading.batches(batch_size), f"reconstruct {seen.name}", num_batches, disable=not progress)
    for start, numbers, draws in batches:
        corners = [reading.corners[number] for number in numbers]
        batch = processor(seen, windows=corners, first_window=start, device=sampler, **options)
        visible = batch.pop("spot_index").cpu().numpy()  # (B, S, S), which visible spot is where
        places = window_spots(hidden, corners, reading.size)  # (B, S, S), which hidden spot is where
        inputs = {key: value.to(where) for key, value in _with_hidden_sites(batch, places, hidden).items()}
        read = (places >= 0) & (reading.views[places] == numbers[:, None, None, None]).any(-1)
        sums[0].add(model, inputs, places, read, visible)
        if with_checks:
            checked = _quarters(corners, numbers + draws, reading.size) & (visible >= 0)
            mask = inputs["bool_masked_entries"] | torch.from_numpy(checked).to(where)[:, None]
            sums[1].add(
                model, {**inputs, "bool_masked_entries": mask}, visible, checked, np.where(checked, -1, visible)
            )
    return sums[0].means(), sums[1].means()


class FeatureSums:
    """Sums over windows of what is read of spots, of which there are `num_spots`; `num_seen` are visible."""

    def __init__(self, num_spots: int, num_seen: int, width: int):
        self.features, self.count = np.zeros((num_spots, width)), np.zeros(num_spots)
        self.shape = num_spots, num_seen
        self.triplets: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # reading spot, spot read, weight

    def add(
        self, model: Any, inputs: dict[str, torch.Tensor], spots: np.ndarray, sites: np.ndarray, visible: np.ndarray
    ) -> None:
        """Read a batch of windows.

        Args:
            inputs: of the model. spots: int64 (B, S, S), the spot at every site. sites: bool (B, S, S), where to read.
            visible: int64 (B, S, S), the visible spot at every site, -1 = none, or one that is masked.
        """
        encoded = model.base_model(**inputs).last_hidden_state
        features, hidden_states = model.decode(encoded, inputs["pixel_mask"], inputs["coordinates"])
        weights = [None] * len(spots)
        if model.decoder.local_mean is not None:
            weights = _local_weights(model, hidden_states, inputs["pixel_mask"], visible)
        features = features.cpu().double().numpy()
        windows = (spots.reshape(len(spots), -1), sites.reshape(len(spots), -1), visible.reshape(len(spots), -1))
        for spot, here, shown, feature, weight in zip(*windows, features, weights, strict=True):
            # A spot stands once in a window, so plain indexed addition is exact.
            self.features[spot[here]] += feature[here]
            self.count[spot[here]] += 1
            if weight is not None:
                reading, read = np.meshgrid(spot[here], shown[shown >= 0], indexing="ij")
                self.triplets.append((reading.ravel(), read.ravel(), weight[here][:, shown >= 0].ravel()))

    def means(self) -> SpotFeatures:
        with np.errstate(invalid="ignore"):
            features = self.features / self.count[:, None]
        if not self.triplets:
            return SpotFeatures(features)
        reading, read, weight = (np.concatenate(part) for part in zip(*self.triplets, strict=True))
        weight = torch.from_numpy(weight / self.count[reading])
        weights = torch.sparse_coo_tensor(np.stack([reading, read]), weight, self.shape, check_invariants=True)
        return SpotFeatures(features, weights.coalesce())


def _local_weights(
    model: Any, hidden_states: torch.Tensor, pixel_mask: torch.Tensor, visible: np.ndarray
) -> np.ndarray:
    """float64 (B, S*S, S*S): how much a `"residual"` model takes to the first site of the value at the second.

    They are local means of genes that are 1 at one site, and visible wherever a spot is.
    """
    sites = pixel_mask[0].numel()
    shown = torch.from_numpy(visible.reshape(len(visible), sites, 1) >= 0).to(hidden_states.device)
    one_hot = torch.eye(sites, device=hidden_states.device).expand(len(visible), -1, -1)
    weights = model.decoder.local_mean(hidden_states, pixel_mask.flatten(1), one_hot, shown.expand(-1, -1, sites))
    return weights.cpu().double().numpy()


def _quarters(corners: list[tuple[int, int]], numbers: np.ndarray, size: int) -> np.ndarray:
    """bool (B, S, S): one of the four colours of a 2 x 2 tiling of the *slide*; which one goes by the number."""
    steps = np.array(corners)[:, :, None] + np.arange(size)  # (B, 2, S)
    rows = (steps[:, 0] + numbers[:, None] // 2) % 2 == 0
    cols = (steps[:, 1] + numbers[:, None]) % 2 == 0
    return rows[:, :, None] & cols[:, None]


def _with_hidden_sites(batch: Any, places: np.ndarray, hidden: SlideImage) -> dict[str, torch.Tensor]:
    """A batch of windows of the visible spots, with the hidden ones on their sites and masked in every channel.

    Args:
        places: int64 (B, S, S), which hidden spot is where, -1 = none.
    """
    tensors = {key: value for key, value in batch.items() if key != "spot_index"}
    where = tensors["pixel_mask"].device
    here = torch.from_numpy(places >= 0).to(where)
    coordinates = torch.from_numpy(hidden.coordinates[places]).to(where)  # those of -1 are not taken
    tensors["pixel_mask"] = tensors["pixel_mask"] | here
    tensors["coordinates"] = torch.where(here[..., None], coordinates, tensors["coordinates"])
    tensors["bool_masked_entries"] = here[:, None].expand_as(tensors["pixel_values"])
    return tensors


__all__ = ["Reading", "SpotFeatures", "mean_features"]
