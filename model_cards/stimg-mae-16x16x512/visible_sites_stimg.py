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
"""Which sites a stack of layers works on: those that are kept, gathered where that saves work."""

from dataclasses import dataclass

import torch

# Of the sites, at most this share has to be kept for a gather to be worth its two copies of the tokens.
WORTH_GATHERING = 15 / 16


@dataclass
class SiteSelection:
    """The tokens of a batch of windows, and the way back to their sites.

    Attributes:
        kept: bool (B, N): sites whose tokens mean something.
        rows: int64 (B, L), the token's place among all B * N sites; None: all sites are tokens, L = N.
        keys: bool (B, L), tokens that may be attended to; None: all.
    """

    kept: torch.Tensor
    rows: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    @property
    def tokens_kept(self) -> torch.Tensor:
        """bool (B, L): tokens of kept sites; where windows differ, the shorter ones are filled up with others."""
        return self.kept if self.rows is None else self.kept.flatten()[self.rows]

    def gather(self, sites: torch.Tensor) -> torch.Tensor:
        """(B, N, D) -> (B, L, D)."""
        if self.rows is None:
            return sites
        return sites.flatten(0, 1).index_select(0, self.rows.flatten()).unflatten(0, tuple(self.rows.shape))

    def scatter(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, L, D) -> (B, N, D), 0 at sites that are not kept."""
        if self.rows is None and self.keys is None:
            return tokens
        if self.rows is not None:
            sites = tokens.new_zeros(self.kept.numel(), tokens.shape[-1])
            tokens = sites.index_copy(0, self.rows.flatten(), tokens.flatten(0, 1)).unflatten(0, tuple(self.kept.shape))
        return tokens * self.kept[..., None]


def select_sites(kept: torch.Tensor, gather: bool = True) -> SiteSelection:
    """Tokens for the kept sites: as many of each window as the fullest one has, or all sites.

    All sites are tokens where there is little to save, and unless `gather`. A window without a kept site attends
    everywhere, so that softmax stays finite.

    Args:
        kept: bool (B, N).
    """
    # An exported program holds no branch on data.
    if torch.jit.is_tracing() or getattr(torch.compiler, "is_exporting", bool)():
        return SiteSelection(kept, keys=_attended(kept))
    return _select_sites(kept, gather)


@torch.compiler.disable
def _select_sites(kept: torch.Tensor, gather: bool) -> SiteSelection:
    num_sites = kept.shape[1]
    counts = kept.sum(-1)
    fewest, most = torch.stack(counts.aminmax()).tolist() if counts.numel() else (num_sites, num_sites)
    if fewest == num_sites:
        return SiteSelection(kept)
    if not gather or most > WORTH_GATHERING * num_sites:
        return SiteSelection(kept, keys=_attended(kept))
    sites = kept.int().argsort(dim=-1, descending=True, stable=True)[:, : max(most, 1)]  # (B, L), kept ones first
    keys = None if fewest == most else _attended(kept.gather(1, sites))
    first = torch.arange(0, kept.numel(), num_sites, device=kept.device)  # (B,), each window's first row
    return SiteSelection(kept, rows=sites + first[:, None], keys=keys)


def _attended(kept: torch.Tensor) -> torch.Tensor:
    return kept | ~kept.any(-1, keepdim=True)


__all__ = ["SiteSelection", "select_sites"]
