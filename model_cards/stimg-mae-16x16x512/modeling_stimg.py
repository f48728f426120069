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
"""STImageMAE: a masked autoencoder over the sites of a window, with genes as channels."""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_stimg import STImageMAEConfig
from .embedding_stimg import embed_image
from .layers_stimg import (
    STImageMAEAttention,
    STImageMAEDecoder,
    STImageMAEEmbeddings,
    STImageMAELayer,
    add_positions,
    attention_positions,
)
from .masking_stimg import (
    check_site_embeds,
    default_masks,
    draw_mask,
    hidden_entries,
    local_means,
    masked_mean_squared_error,
)
from .pipeline_stimg import custom_pipelines
from .positions_stimg import Locality, site_positions
from .reconstruction_stimg import reconstruct_spots
from .visible_sites_stimg import select_sites

AUTO_MAP = {
    "AutoConfig": "configuration_stimg.STImageMAEConfig",
    "AutoModel": "modeling_stimg.STImageMAEModel",
    "AutoModelForPreTraining": "modeling_stimg.STImageMAEForPreTraining",
}
RECORDED = ("output_hidden_states", "output_attentions")


@dataclass
class STImageMAEForPreTrainingOutput(ModelOutput):
    """Output of `STImageMAEForPreTraining`.

    Args:
        loss (`torch.Tensor` of shape `()`): Eq. 8: mean over windows of each window's mean squared error over its
            masked entries, or their local means (`config.target_smoothing`); windows without one do not count.
        reconstruction (`torch.Tensor` of shape `(batch_size, num_channels, window_size, window_size)`): The predicted
            value of every entry, masked or not; 0 at empty sites.
        mask (`torch.BoolTensor` of shape `(batch_size, num_channels, window_size, window_size)`): True = was masked.
        hidden_states, attentions: those of the encoder, when asked for.
    """

    loss: torch.FloatTensor | None = None
    reconstruction: torch.FloatTensor | None = None
    mask: torch.BoolTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class STImageMAEPreTrainedModel(PreTrainedModel):
    """Weights, files and defaults that both models share."""

    config: STImageMAEConfig
    base_model_prefix = "stimg"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # The loss is a mean over windows already: the Trainer has to average it over accumulation steps itself.
    accepts_loss_kwargs = False
    _no_split_modules = ["STImageMAEEmbeddings", "STImageMAELayer", "STImageMAEDecoder"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": STImageMAELayer, "attentions": STImageMAEAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, STImageMAEEmbeddings):
            init.normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, Locality):
            init.copy_(module.strength, module.start())
        elif isinstance(module, STImageMAEModel) and module.projection is not None:
            init.copy_(module.projection, torch.eye(*module.projection.shape))  # until it is fitted

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model from a folder or a Hub repository, as transformers does, but from safetensors alone.

        Raises:
            OSError: no such file: other forms of weights are pickles, which are read where `use_safetensors=False` asks
                for it.
            ValueError: a config of another model type. SafetensorError: weights that are damaged or cut off.
        """
        kwargs.setdefault("use_safetensors", True)
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except SafetensorError as error:
            # The same type, which pipelines hand on, where they fold others into their own report.
            raise SafetensorError(
                f"The weights of {pretrained_model_name_or_path} are damaged or cut off, or no safetensors ({error}): "
                "download or copy the model again."
            ) from error

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write weights, config and the code that reads them, so that every Auto class and the pipeline find theirs."""
        self.config.auto_map = dict(AUTO_MAP)
        self.config.custom_pipelines = custom_pipelines()
        super().save_pretrained(save_directory, *args, **kwargs)

    def embed(self, image: Any, processor: Any, **options: Any) -> np.ndarray:
        """Embed every spot of a `SlideImage`; see `embed_image` for the options.

        Returns:
            float32 (num_spots, width), in the image's order of spots.
        """
        return embed_image(self, processor, image, **options)


class STImageMAEModel(STImageMAEPreTrainedModel):
    """The encoder: windows of a slide to one vector a site. Nothing is masked unless a mask is given."""

    # A pretraining checkpoint holds the decoder too; it is not missed here.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012

    def __init__(self, config: STImageMAEConfig):
        super().__init__(config)
        self.embeddings = STImageMAEEmbeddings(config)
        self.layers = nn.ModuleList(
            STImageMAELayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        # What `embed_image` takes of the outputs, float (projection_size, D): fitted, and not learnt by gradients.
        projection = torch.empty(config.projection_size, config.hidden_size) if config.projection_size else None
        self.register_buffer("projection", projection)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.gene_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embeddings.gene_embeddings = value

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        gene_ids: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        channel_mask: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        bool_masked_entries: torch.Tensor | None = None,
        site_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, window_size, window_size)`): Expression.
                Needed, with `gene_ids`, unless `site_embeds` is given.
            gene_ids (`torch.LongTensor` of shape `(batch_size, num_channels)`): Vocabulary number of every channel.
            pixel_mask (`torch.BoolTensor` of shape `(batch_size, window_size, window_size)`, *optional*): True =
                observed; `None` = all are. Empty sites are not attended to, and their outputs are 0.
            channel_mask (`torch.BoolTensor` of shape `(batch_size, num_channels)`, *optional*): True = measured;
                `None` = `gene_ids != config.pad_token_id`.
            coordinates (`torch.Tensor` of shape `(batch_size, window_size, window_size, 2)`, *optional*): Row and
                column on the slide, 0 to 100; needed when `config.position_embedding_type` is `"slide"`.
            bool_masked_entries (`torch.BoolTensor` of shape `(batch_size, num_channels, window_size, window_size)`,
                *optional*): True = hidden. A site all of whose measured channels are hidden enters as a mask token or,
                when `config.mask_unit` is `"site"`, does not enter: no site sees it, and the mask token is its output.
                Of one channel only, it hides whole sites.
            site_embeds (`torch.Tensor` of shape `(batch_size, window_size ** 2, hidden_size)`, *optional*): Instead of
                `pixel_values` and `gene_ids`, what `embeddings` made of them, nothing masked: a site's does not depend
                on its window, so that windows that overlap and have the same genes can share it. Needs `pixel_mask`.

        Returns:
            `last_hidden_state` `(batch_size, window_size ** 2, hidden_size)`, sites row by row, and `pooler_output`
            `(batch_size, hidden_size)`, their mean over the observed sites that entered.
        """
        if site_embeds is None:
            pixel_mask, channel_mask = default_masks(
                self.config.pad_token_id, pixel_values, gene_ids, pixel_mask, channel_mask
            )
            hidden_states = self.embeddings(pixel_values, gene_ids, channel_mask, bool_masked_entries)  # (B, S*S, D)
        else:
            check_site_embeds(site_embeds, pixel_values, pixel_mask, bool_masked_entries)
            pixel_mask = pixel_mask.bool()
            hidden_states, channel_mask = site_embeds, pixel_mask.new_ones(len(pixel_mask), 1)
            if bool_masked_entries is not None:
                hidden = hidden_entries(channel_mask, bool_masked_entries)
                hidden_states = self.embeddings.hide(site_embeds, hidden[:, 0])
        positions = site_positions(self.config.position_embedding_type, pixel_mask, coordinates)
        hidden_states = add_positions(self.config, hidden_states, positions)
        observed = pixel_mask.flatten(1)
        dropped = None
        if self.config.mask_unit == "site" and bool_masked_entries is not None:
            dropped = observed & hidden_entries(channel_mask, bool_masked_entries).all(1)  # (B, S*S)
        # Whoever asks for the layers' outputs gets them for all sites.
        recorded = any(kwargs.get(key, getattr(self.config, key, False)) for key in RECORDED)
        selection = select_sites(observed if dropped is None else observed & ~dropped, gather=not recorded)
        hidden_states = selection.gather(hidden_states)  # (B, L, D)
        attention_mask = create_bidirectional_mask(self.config, hidden_states, selection.keys)
        head_dim = hidden_states.shape[-1] // self.config.num_attention_heads
        position_embeddings = attention_positions(self.config, selection, positions, head_dim)
        for layer in self.layers:
            hidden_states = layer(hidden_states, attention_mask, position_embeddings, **kwargs)
        last_hidden_state = selection.scatter(self.layernorm(hidden_states))  # (B, S*S, D)
        pooled = last_hidden_state.sum(1) / selection.kept.sum(1, keepdim=True).clamp(min=1)
        if dropped is not None:
            mask_token = self.embeddings.mask_token.to(last_hidden_state.dtype)
            last_hidden_state = torch.where(dropped[..., None], mask_token, last_hidden_state)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooled)


class STImageMAEForPreTraining(STImageMAEPreTrainedModel):
    """Encoder and decoder: hide a part of a window and predict it (Eq. 8)."""

    def __init__(self, config: STImageMAEConfig):
        super().__init__(config)
        self.stimg = STImageMAEModel(config)
        self.decoder = STImageMAEDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.stimg.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.stimg.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        gene_ids: torch.Tensor,
        pixel_mask: torch.Tensor | None = None,
        channel_mask: torch.Tensor | None = None,
        coordinates: torch.Tensor | None = None,
        bool_masked_entries: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        mask_ratio: float | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> STImageMAEForPreTrainingOutput:
        r"""
        Args:
            pixel_values, gene_ids, pixel_mask, channel_mask, coordinates: As for `STImageMAEModel`.
            bool_masked_entries (`torch.BoolTensor` of shape `(batch_size, num_channels, window_size, window_size)`,
                *optional*): The mask itself. Entries of empty sites and padded channels are taken out of it.
            noise (`torch.Tensor` of shape `(batch_size, num_channels, window_size, window_size)`, *optional*):
                Uniform in [0, 1), where no mask is given: the lowest `round(mask_ratio * n)` of a window's n maskable
                entries (or sites, by channel 0) are hidden. `None`: drawn from torch's global generator.
            mask_ratio (`float`, *optional*): Instead of `config.mask_ratio`.
        """
        pixel_mask, channel_mask = default_masks(
            self.config.pad_token_id, pixel_values, gene_ids, pixel_mask, channel_mask
        )
        maskable = channel_mask[:, :, None, None] & pixel_mask[:, None]
        if bool_masked_entries is not None:
            mask = bool_masked_entries.bool() & maskable
        else:
            if noise is None:
                noise = torch.rand(pixel_values.shape, device=pixel_values.device)
            ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
            mask = draw_mask(noise, channel_mask, pixel_mask, ratio, self.config.mask_unit)
        outputs = self.stimg(
            pixel_values,
            gene_ids,
            pixel_mask=pixel_mask,
            channel_mask=channel_mask,
            coordinates=coordinates,
            bool_masked_entries=mask,
            **kwargs,
        )
        visible = maskable & ~mask
        reconstruction = self.reconstruct(
            outputs.last_hidden_state, gene_ids, pixel_mask, coordinates, pixel_values, visible
        )
        target = local_means(pixel_values, pixel_mask, self.config.target_smoothing)
        return STImageMAEForPreTrainingOutput(
            loss=masked_mean_squared_error(reconstruction, target, mask),
            reconstruction=reconstruction,
            mask=mask,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def reconstruct(
        self,
        last_hidden_state: torch.Tensor,
        gene_ids: torch.Tensor,
        pixel_mask: torch.Tensor,
        coordinates: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        visible: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict genes at every site: the site's decoded feature, projected, times the gene's embedding (Eq. 8).

        Args:
            last_hidden_state: float (B, S*S, D), from the encoder. gene_ids: int64 (B, C), any genes, also others
                than the encoder saw. pixel_mask: bool (B, S, S). coordinates: as in `forward`.
            pixel_values: float (B, C, S, S), values of these genes, and visible: bool (B, C, S, S), True = may be read:
                needed where `config.reconstruction` is `"residual"`, whose prediction starts from them.

        Returns:
            float (B, C, S, S), 0 at empty sites.

        Raises:
            ValueError: a `"residual"` model without values.
        """
        positions = site_positions(self.config.position_embedding_type, pixel_mask, coordinates)
        selection, features, hidden_states = self.decoder(last_hidden_state, pixel_mask, positions)
        genes = self.get_input_embeddings()(gene_ids).to(features.dtype)  # (B, C, D)
        predicted = features @ genes.transpose(1, 2)  # (B, L, C)
        if self.decoder.local_mean is not None:
            if pixel_values is None or visible is None:
                raise ValueError(
                    'This model predicts by config.reconstruction="residual", from values that can be seen: pass '
                    "pixel_values and visible, both (B, C, S, S)."
                )
            values, visible = (selection.gather(t.flatten(2).transpose(1, 2)) for t in (pixel_values, visible))
            predicted = predicted + self.decoder.local_mean(hidden_states, selection.tokens_kept, values, visible)
        return selection.scatter(predicted).transpose(1, 2).unflatten(-1, tuple(pixel_mask.shape[1:]))

    def decode(
        self, last_hidden_state: torch.Tensor, pixel_mask: torch.Tensor, coordinates: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of every site the feature that genes are multiplied with, float (B, S*S, D), and the decoder's output that it
        is projected from, float (B, S*S, decoder width); arguments as in `reconstruct`."""
        positions = site_positions(self.config.position_embedding_type, pixel_mask, coordinates)
        selection, features, hidden_states = self.decoder(last_hidden_state, pixel_mask, positions)
        return selection.scatter(features), selection.scatter(hidden_states)

    def reconstruct_spots(self, image: Any, processor: Any, spots: np.ndarray, **options: Any) -> np.ndarray:
        """Predict spots of a `SlideImage` from those around them; see `reconstruct_spots` for the options.

        Args:
            spots: bool (num_spots,), True = hidden and predicted.

        Returns:
            float32 (hidden spots, genes), log1p values, in the image's order of spots.
        """
        return reconstruct_spots(self, processor, image, spots, **options)


STImageMAEConfig.register_for_auto_class()
STImageMAEModel.register_for_auto_class("AutoModel")
STImageMAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = [
    "STImageMAEForPreTraining",
    "STImageMAEForPreTrainingOutput",
    "STImageMAEModel",
    "STImageMAEPreTrainedModel",
]
