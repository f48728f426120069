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
"""Where a site is: a fixed 2-D sine-cosine code that is added to it, or a rotation of queries and keys."""

import torch
from torch import nn

# It tells sites apart up to half a period, 15 of them.
LOCAL_FREQUENCY = 0.2


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


def rotary_frequencies(head_dim: int, device: torch.device | None = None) -> torch.Tensor:
    """Radians a site by which pairs of a head's dimensions turn, float32 (head_dim / 4,).

    First that of `Locality`, then from 1 down to 0.01.
    """
    others = head_dim // 4 - 1
    steps = torch.arange(others, device=device, dtype=torch.float32) / max(others, 1)
    return torch.cat([torch.full((1,), LOCAL_FREQUENCY, device=device), 100.0**-steps])


def rotary_embeddings(positions: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary position embeddings (RoPE; Su et al. 2021) on two axes: cosines and sines of the angles, for all layers.

    Half of a head's pairs of dimensions turn with the row and half with the column, so that attention between two sites
    depends on how they lie to each other, and nothing on where in the window they lie.

    Args:
        positions: float (..., 2), row and column. head_dim: a multiple of 4.

    Returns:
        cos, sin: float32 (..., head_dim / 2).
    """
    angles = (positions.float()[..., None] * rotary_frequencies(head_dim, positions.device)).flatten(-2)
    return angles.cos(), angles.sin()


def rotate(heads: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the pairs (i, i + head_dim / 2) of queries or keys.

    Args:
        heads: float (B, heads, L, head_dim). position_embeddings: float (1 or B, L, head_dim / 2), cosines and sines.

    Returns:
        float (B, heads, L, head_dim).
    """
    cos, sin = (t[:, None].to(heads.dtype) for t in position_embeddings)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Locality(nn.Module):
    """What every head adds to its queries and keys before they are turned, so that it prefers sites nearby.

    A head of strength `s` adds `s^2 (cos(f y) + cos(f x))` to the attention scores of sites that lie `y` rows and `x`
    columns apart, with the frequency `f = LOCAL_FREQUENCY`: about a Gaussian of standard deviation `1 / (s f)` sites.
    Heads start with deviations from `NEAREST` to `FARTHEST` sites, so that together they see means over neighbourhoods
    of many sizes before they have learnt anything.
    """

    NEAREST, FARTHEST = 0.7, 11.2  # sites

    def __init__(self, num_heads: int, head_dim: int):
        super().__init__()
        self.strength = nn.Parameter(torch.empty(num_heads))
        self.head_dim = head_dim

    def start(self) -> torch.Tensor:
        """float32 (heads,): strengths of an untrained model."""
        num_heads = len(self.strength)
        share = torch.arange(num_heads) / max(num_heads - 1, 1)
        return 1 / (LOCAL_FREQUENCY * self.NEAREST * (self.FARTHEST / self.NEAREST) ** share)

    def forward(self) -> torch.Tensor:
        """float (1, heads, 1, head_dim)."""
        places = torch.zeros(self.head_dim, device=self.strength.device, dtype=self.strength.dtype)
        # Attention divides scores by the square root of the width.
        places[: self.head_dim // 2 : self.head_dim // 4] = self.head_dim**0.25  # the first pair of rows and of columns
        return self.strength[None, :, None, None] * places


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


__all__ = ["Locality", "rotary_embeddings", "rotary_frequencies", "rotate", "sine_cosine_positions", "site_positions"]
