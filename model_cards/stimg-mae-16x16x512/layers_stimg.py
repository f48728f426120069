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
"""What the models are made of: sites to tokens, Transformer layers, decoded sites to features of genes."""

from collections.abc import Callable

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .configuration_stimg import STImageMAEConfig
from .masking_stimg import hidden_entries
from .positions_stimg import Locality, rotary_embeddings, rotate, sine_cosine_positions
from .visible_sites_stimg import SiteSelection, select_sites


def add_positions(config: STImageMAEConfig, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Tokens float (B, S*S, D) with their positions' code; rotary ones enter in attention instead."""
    if config.position_embedding_type == "rotary":
        return tokens
    return tokens + sine_cosine_positions(positions, tokens.shape[-1]).to(tokens.dtype)


def attention_positions(
    config: STImageMAEConfig, selection: SiteSelection, positions: torch.Tensor, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """By what the selected sites' queries and keys are turned, two float (1 or B, L, head_dim / 2), or None."""
    if config.position_embedding_type != "rotary":
        return None
    if selection.rows is not None:
        positions = selection.gather(positions.expand(len(selection.kept), -1, -1))
    return rotary_embeddings(positions, head_dim)


class STImageMAEEmbeddings(nn.Module):
    """Sites to tokens: the sum over visible channels of value x gene embedding, or a mask token where none is."""

    def __init__(self, config: STImageMAEConfig):
        super().__init__()
        self.config = config
        self.gene_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mask_token = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(
        self,
        pixel_values: torch.Tensor,
        gene_ids: torch.Tensor,
        channel_mask: torch.Tensor,
        bool_masked_entries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """float (B, S*S, D), without positions; arguments as in `STImageMAEModel`, with a `channel_mask`."""
        values = pixel_values.flatten(2)  # (B, C, S*S)
        hidden = hidden_entries(channel_mask, bool_masked_entries)
        genes = self.gene_embeddings(gene_ids)  # (B, C, D)
        tokens = torch.where(hidden, 0, values).transpose(1, 2).to(genes.dtype) @ genes  # (B, S*S, D)
        num_visible = values.shape[1] - hidden.sum(1)[..., None]  # (B, S*S or 1, 1)
        # Over the share of visible channels, so that the scale does not depend on how many genes there are.
        tokens = self.layernorm(tokens * (values.shape[1] / num_visible.clamp(min=1)).to(tokens.dtype))
        return self.hide(tokens, num_visible[..., 0] == 0)

    def hide(self, tokens: torch.Tensor, sites: torch.Tensor) -> torch.Tensor:
        """Tokens float (B, S*S, D), but the mask token at sites, bool (B, S*S or 1)."""
        return torch.where(sites[..., None], self.mask_token.to(tokens.dtype), tokens)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; the other implementations come from transformers."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = nn.functional.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class STImageMAEAttention(nn.Module):
    """Multi-head self-attention among the sites of a window."""

    def __init__(self, config: STImageMAEConfig, hidden_size: int, num_heads: int):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.locality = Locality(num_heads, self.head_dim) if config.position_embedding_type == "rotary" else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            projection(hidden_states).view(shape).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            local = self.locality().to(query.dtype)
            query, key = (rotate(heads + local, position_embeddings) for heads in (query, key))
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attention(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


class STImageMAELayer(GradientCheckpointingLayer):
    """A pre-norm Transformer layer; encoder and decoder differ in its sizes alone."""

    def __init__(self, config: STImageMAEConfig, hidden_size: int, num_heads: int, intermediate_size: int):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = STImageMAEAttention(config, hidden_size, num_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.attention(
            self.layernorm_before(hidden_states), attention_mask, position_embeddings, **kwargs
        )
        hidden_states = hidden_states + self.dropout(attended)
        update = self.fc2(self.activation(self.fc1(self.layernorm_after(hidden_states))))
        return hidden_states + self.dropout(update)


class STImageMAEDecoder(nn.Module):
    """Encoded sites to features in the space of the gene embeddings, and how sites are read from each other."""

    def __init__(self, config: STImageMAEConfig):
        super().__init__()
        self.config = config
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.layers = nn.ModuleList(
            STImageMAELayer(config, width, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.project = nn.Linear(width, config.hidden_size)
        self.local_mean = STImageMAELocalMean(config) if config.reconstruction == "residual" else None

    def forward(
        self, encoded: torch.Tensor, pixel_mask: torch.Tensor, positions: torch.Tensor
    ) -> tuple[SiteSelection, torch.Tensor, torch.Tensor]:
        hidden_states = self.embed(encoded)  # (B, S*S, decoder width)
        hidden_states = add_positions(self.config, hidden_states, positions)
        selection = select_sites(pixel_mask.flatten(1))
        hidden_states = selection.gather(hidden_states)  # (B, L, decoder width)
        attention_mask = create_bidirectional_mask(self.config, hidden_states, selection.keys)
        head_dim = hidden_states.shape[-1] // self.config.decoder_num_attention_heads
        position_embeddings = attention_positions(self.config, selection, positions, head_dim)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, position_embeddings)
        hidden_states = self.layernorm(hidden_states)
        return selection, self.project(hidden_states), hidden_states  # observed sites: (B, L, D), (B, L, decoder width)


class STImageMAELocalMean(nn.Module):
    """What other sites say of a gene at a site: the mean of its values that can be seen there, weighted by attention.

    `sum_v a_uv m_vg x_vg / sum_v a_uv m_vg`, with `a` the softmax over the other observed sites v of a window, and
    `m_vg` 1 where the value can be seen. Weights are the same for all genes; a site never reads its own values.
    """

    def __init__(self, config: STImageMAEConfig):
        super().__init__()
        self.query = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.key = nn.Linear(config.decoder_hidden_size, config.decoder_hidden_size)
        self.scaling = config.decoder_hidden_size**-0.5

    def forward(
        self, hidden_states: torch.Tensor, observed: torch.Tensor, values: torch.Tensor, visible: torch.Tensor
    ) -> torch.Tensor:
        """Local means of every gene at every site; 0 at empty sites, and of a gene of which nothing else can be seen.

        Args:
            hidden_states: float (B, L, decoder width), decoded sites. observed: bool (B, L).
            values: float (B, L, C). visible: bool (B, L, C).

        Returns:
            float (B, L, C).
        """
        itself = torch.eye(observed.shape[-1], dtype=torch.bool, device=observed.device)
        scores = self.query(hidden_states) @ self.key(hidden_states).transpose(1, 2) * self.scaling
        pairs = observed[:, :, None] & observed[:, None] & ~itself  # (B, reading site, site that is read)
        # A finite minimum: a site alone in its window has nothing to read, and softmax has to stay finite.
        scores = scores.float().masked_fill(~pairs, torch.finfo(torch.float32).min)
        weights = (scores.softmax(-1) * pairs).to(hidden_states.dtype)
        visible = visible.to(weights.dtype)
        total, mass = weights @ (values.to(weights.dtype) * visible), weights @ visible
        return total / mass.clamp(min=torch.finfo(torch.float16).tiny)


__all__ = [
    "STImageMAEAttention",
    "STImageMAEDecoder",
    "STImageMAEEmbeddings",
    "STImageMAELayer",
    "STImageMAELocalMean",
    "add_positions",
    "attention_positions",
]
