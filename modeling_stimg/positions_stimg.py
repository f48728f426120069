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
"""Where a site is, as a vector: fixed 2-D sine-cosine codes."""

import torch


def sine_cosine_positions(positions: torch.Tensor, width: int) -> torch.Tensor:
    """Fixed 2-D position code: [sin row | cos row | sin col | cos col].

    Args:
        positions: float (..., 2), row and column. width: a multiple of 4.

    Returns:
        float32 (..., width).
    """
    frequencies = 10000.0 ** -(torch.arange(width // 4, device=positions.device, dtype=torch.float32) / (width // 4))
    angles = positions.float()[..., None] * frequencies  # (..., 2, width / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def site_positions(
    position_embedding_type: str, pixel_mask: torch.Tensor, coordinates: torch.Tensor | None
) -> torch.Tensor:
    """Row and column of every site within the window or, for `"slide"`, on the slide: float (1 or B, S*S, 2)."""
    if position_embedding_type == "slide":
        if coordinates is None:
            raise ValueError(
                'position_embedding_type is "slide": pass coordinates (B, S, S, 2), as the processor does.'
            )
        return coordinates.flatten(1, 2)
    height, width = pixel_mask.shape[1:]
    rows = torch.arange(height, device=pixel_mask.device, dtype=torch.float32)
    cols = torch.arange(width, device=pixel_mask.device, dtype=torch.float32)
    return torch.stack(torch.meshgrid(rows, cols, indexing="ij"), dim=-1).flatten(0, 1)[None]


__all__ = ["sine_cosine_positions", "site_positions"]
