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
"""Masks: which entries a window hides, which sites and channels are there, and the error over what was hidden."""

from typing import Any

import numpy as np
import torch
from torch import nn


@torch.compiler.disable  # how many are chosen depends on the data
def lowest(noise: torch.Tensor, candidates: torch.Tensor, ratio: float) -> torch.Tensor:
    """The `round(ratio * n)` lowest-noise of each row's n candidates; equal noises go by position.

    Args:
        noise: float (B, N). candidates: bool (B, N).

    Returns:
        bool (B, N).
    """
    noise = noise.float()
    if noise.device.type == "cpu":
        rows = zip(noise.numpy(), candidates.numpy(), strict=True)
        chosen = [_lowest_of_row(row, row_candidates, ratio) for row, row_candidates in rows]
        return torch.from_numpy(np.stack(chosen)) if chosen else torch.zeros_like(candidates)
    counts = torch.round(candidates.sum(-1).double() * ratio).long()  # (B,), half to even as Python's round
    largest = int(counts.max()) if counts.numel() else 0
    if largest == 0:
        return torch.zeros_like(candidates)
    noise = noise.masked_fill(~candidates, torch.inf)
    lowest_noise = noise.topk(largest, dim=-1, largest=False, sorted=True).values
    cut = lowest_noise.gather(-1, (counts - 1).clamp(min=0)[:, None])  # (B, 1), the highest noise that is chosen
    return first_lowest(noise, cut, counts[:, None]) & (counts[:, None] > 0)


def _lowest_of_row(noise: np.ndarray, candidates: np.ndarray, ratio: float) -> np.ndarray:
    """The same for one row (N,) on the CPU, where NumPy's partition takes a tenth of the time of torch's topk."""
    count = round(int(np.count_nonzero(candidates)) * ratio)
    if count == 0:
        return np.zeros_like(candidates)
    noise = np.where(candidates, noise, np.float32(np.inf))
    cut = np.partition(noise, count - 1)[count - 1]
    chosen = noise <= cut
    if np.count_nonzero(chosen) == count:
        return chosen
    return first_lowest(noise[None], cut, count)[0]


def first_lowest(values: Any, cut: Any, count: Any) -> Any:
    """Exactly `count` lowest values of each row; of several that equal the cut the first ones, on every device.

    Args:
        values: float (B, N), array or tensor. cut: float (B, 1), the row's `count`-th lowest value. count: int, or
            int64 (B, 1).

    Returns:
        bool (B, N), array or tensor.
    """
    below, at_cut = values < cut, values == cut
    missing = count - below.sum(-1)[:, None]
    return below | (at_cut & (at_cut.cumsum(-1) <= missing))


def draw_mask(
    noise: torch.Tensor, channel_mask: torch.Tensor, pixel_mask: torch.Tensor, mask_ratio: float, mask_unit: str
) -> torch.Tensor:
    """Which entries a window hides. Empty sites and padded channels are never among them.

    Args:
        noise: float (B, C, S, S) in [0, 1). channel_mask: bool (B, C). pixel_mask: bool (B, S, S).
        mask_ratio: share of the maskable entries (or sites) that is hidden, rounded to a whole number.
        mask_unit: `"entry"`, `"site"` (by channel 0's noise), or `"mixed"` (sites, then entries of the other sites).

    Returns:
        bool (B, C, S, S).
    """
    noise, observed = noise.flatten(2), pixel_mask.flatten(1)  # (B, C, S*S), (B, S*S)
    maskable = channel_mask[:, :, None] & observed[:, None]
    if mask_unit == "entry":
        mask = lowest(noise.flatten(1), maskable.flatten(1), mask_ratio).view_as(maskable)
    else:
        sites = lowest(noise[:, 0], observed, mask_ratio)  # (B, S*S)
        mask = sites[:, None] & maskable
    if mask_unit == "mixed":
        # The sites that are left have high noise in channel 0: spread it over [0, 1) again, so that this channel is
        # masked as often as any other.
        reach = noise[:, :1].masked_fill(~sites[:, None], 0.0).amax(-1, keepdim=True)
        rest = torch.cat([(noise[:, :1] - reach) / (1 - reach), noise[:, 1:]], dim=1)
        mask = mask | lowest(rest.flatten(1), (maskable & ~mask).flatten(1), mask_ratio).view_as(mask)
    return mask.unflatten(-1, tuple(pixel_mask.shape[1:]))


def default_masks(
    pad_token_id: int,
    pixel_values: torch.Tensor | None,
    gene_ids: torch.Tensor | None,
    pixel_mask: torch.Tensor | None,
    channel_mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`pixel_mask` bool (B, S, S) and `channel_mask` bool (B, C), all sites and all but padding where not given."""
    if pixel_values is None or gene_ids is None:
        raise ValueError("pixel_values or gene_ids is missing: pass both, or site_embeds and pixel_mask.")
    if pixel_values.ndim != 4 or gene_ids.shape != pixel_values.shape[:2]:
        raise ValueError(
            f"pixel_values has shape {tuple(pixel_values.shape)} and gene_ids {tuple(gene_ids.shape)}: expected "
            "(B, C, S, S) and (B, C)."
        )
    if pixel_mask is None:
        pixel_mask = torch.ones(pixel_values.shape[:1] + pixel_values.shape[2:], device=pixel_values.device)
    if channel_mask is None:
        channel_mask = gene_ids != pad_token_id
    return pixel_mask.bool(), channel_mask.bool()


def check_site_embeds(
    site_embeds: torch.Tensor,
    pixel_values: torch.Tensor | None,
    pixel_mask: torch.Tensor | None,
    bool_masked_entries: torch.Tensor | None,
) -> None:
    """Raise ValueError unless sites given as embeddings come with all that belongs to them, and no other input."""
    if pixel_values is not None:
        raise ValueError("Both pixel_values and site_embeds are given: pass one of them.")
    if pixel_mask is None or site_embeds.shape[:2] != pixel_mask.flatten(1).shape:
        found = None if pixel_mask is None else tuple(pixel_mask.shape)
        raise ValueError(
            f"site_embeds has shape {tuple(site_embeds.shape)} and pixel_mask {found}: expected (B, S*S, hidden_size) "
            "and (B, S, S)."
        )
    if bool_masked_entries is not None and bool_masked_entries.shape[1] != 1:
        raise ValueError(
            f"bool_masked_entries has shape {tuple(bool_masked_entries.shape)}: site_embeds can be hidden by whole "
            "sites alone, (B, 1, S, S)."
        )


def hidden_entries(channel_mask: torch.Tensor, bool_masked_entries: torch.Tensor | None) -> torch.Tensor:
    """bool (B, C, S*S), or (B, C, 1) for all sites: entries that are hidden or whose gene was not measured."""
    unmeasured = ~channel_mask[:, :, None]
    return unmeasured if bool_masked_entries is None else unmeasured | bool_masked_entries.flatten(2)


def local_means(pixel_values: torch.Tensor, pixel_mask: torch.Tensor, radius: int) -> torch.Tensor:
    """Mean over the observed sites in the (2 * radius + 1)-sided square around each site, itself included.

    Args:
        pixel_values: float (B, C, S, S), 0 at empty sites. pixel_mask: bool (B, S, S), True = observed.
        radius: in sites.

    Returns:
        float (B, C, S, S); 0 where no site is observed.
    """
    if radius == 0:
        return pixel_values
    # Separable, and a sum of shifted copies rather than a convolution: the square is small and the channels are many.
    observed = pixel_mask[:, None].to(pixel_values.dtype)
    total, count = (_box_sum(_box_sum(t, radius, -1), radius, -2) for t in (pixel_values, observed))
    return total / count.clamp(min=1)


def _box_sum(values: torch.Tensor, radius: int, dim: int) -> torch.Tensor:
    """Sums over `2 * radius + 1` neighbours along an axis, what lies beyond it being 0."""
    side = values.shape[dim]
    total = values.clone()
    for step in range(1, min(radius, side - 1) + 1):
        total.narrow(dim, step, side - step).add_(values.narrow(dim, 0, side - step))
        total.narrow(dim, 0, side - step).add_(values.narrow(dim, step, side - step))
    return total


def masked_mean_squared_error(reconstruction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over windows of each window's mean squared error over its masked entries, in float32."""
    # What is not masked is compared with itself: one pass, where a multiplication by the mask takes several.
    reconstruction = reconstruction.float()
    target = torch.where(mask, target.float(), reconstruction.detach())
    squared = nn.functional.mse_loss(reconstruction, target, reduction="none")
    masked = mask.flatten(1).sum(-1)  # (B,)
    per_window = squared.flatten(1).sum(-1) / masked.clamp(min=1)
    return per_window.sum() / (masked > 0).sum().clamp(min=1)


__all__ = [
    "check_site_embeds",
    "default_masks",
    "draw_mask",
    "first_lowest",
    "hidden_entries",
    "local_means",
    "lowest",
    "masked_mean_squared_error",
]
